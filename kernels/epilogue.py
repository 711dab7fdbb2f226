"""The one tail of convolution and linear layers: what follows them, on a tile in registers.

    y = activation(acc + bias) * scale + shift

`acc` is float32 [BLOCK_M, BLOCK_N] with output channels along N. Fusing this saves a read and a
write of the whole output.

An activation is written as its name in ACTIVATIONS, or, where it has parameters, as a tuple of the
name and a number for each. All that anybody says or computes of one is in that table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton.language as tl

from .jit import jit

Activated = str | tuple[str | float, ...] | None


@dataclass(frozen=True, slots=True)
class Activation:
    """An activation for whoever is not the kernel."""

    label: str  # in a picture
    rule: str  # of one number x; its parameters stand in braces
    function: Callable[..., torch.Tensor]  # torch's, of a tensor and the parameters
    in_place: Callable[..., torch.Tensor]  # the same, on the tensor itself
    parameters: tuple[str, ...] = ()
    rounding: float = 0.0  # the largest number that it rounds itself, whatever x is


ACTIVATIONS = {
    "relu": Activation("ReLU", "max(x, 0)", torch.relu, torch.relu_),
    # exp turns the absolute error of x into a relative one of a number up to 1.
    "sigmoid": Activation(
        "sigmoid", "1 / (1 + exp(-x))", torch.sigmoid, torch.sigmoid_, rounding=1.0
    ),
}


def check_activation(function: str, activation: Activated) -> None:
    """Raises ValueError, naming the function, for an activation that is not in the table."""
    name, *values = activation if isinstance(activation, tuple) and activation else (activation,)
    legal = (None, *ACTIVATIONS)
    if name not in legal:
        raise ValueError(f"{function}: activation must be one of {legal}, got {activation!r}")
    parameters = () if name is None else ACTIVATIONS[str(name)].parameters
    form = (name, *parameters) if parameters else name
    fits = isinstance(activation, tuple) == bool(parameters) and len(values) == len(parameters)
    if not fits or not all(isinstance(value, int | float) for value in values):
        raise ValueError(f"{function}: activation must be written as {form}, got {activation!r}")


def row_of(activation: str | tuple[str | float, ...]) -> tuple[Activation, dict[str, float]]:
    """The row of an activation in the table, and its parameters by name."""
    name, *values = activation if isinstance(activation, tuple) else (activation,)
    row = ACTIVATIONS[str(name)]
    return row, dict(zip(row.parameters, map(float, values), strict=True))


def activated(y: torch.Tensor, activation: Activated, *, in_place: bool = False) -> torch.Tensor:
    """A tensor of any shape after the activation, by torch: the reference of `finish`."""
    if activation is None:
        return y
    row, parameters = row_of(activation)
    return (row.in_place if in_place else row.function)(y, *parameters.values())


def rule(activation: str | tuple[str | float, ...]) -> str:
    """What it does to a number x, in words: "max(x, 0)"."""
    row, parameters = row_of(activation)
    return row.rule.format(**parameters)


@jit
def finish(acc, bias, scale, shift, channel, in_range, ACTIVATION: tl.constexpr):
    """Bias, activation, scale and shift along N, each None where there is none. NaN stays NaN."""
    if bias is not None:
        acc += tl.load(bias + channel, mask=in_range, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == "relu":
        acc = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if ACTIVATION == "sigmoid":
        acc = 1.0 / (1.0 + tl.exp(-acc))
    if scale is not None:
        acc *= tl.load(scale + channel, mask=in_range, other=0.0)[None, :]
        acc += tl.load(shift + channel, mask=in_range, other=0.0)[None, :]
    return acc
