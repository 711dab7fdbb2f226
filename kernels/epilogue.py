"""The one tail of convolution and linear layers: what follows them, on a tile in registers.

    y = activation(acc + bias) * scale + shift

`acc` is float32 [BLOCK_M, BLOCK_N] with output channels along N. Fusing this saves a read and a
write of the whole output.
"""

from __future__ import annotations

import torch
import triton.language as tl

from .jit import jit

ACTIVATIONS = (None, "relu", "sigmoid")


def check_activation(function: str, activation: str | None) -> None:
    """Raises ValueError, naming the function, for an activation that `finish` would not apply."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"{function}: activation must be one of {ACTIVATIONS}, got {activation!r}")


def activated(y: torch.Tensor, activation: str | None) -> torch.Tensor:
    """The reference of `finish`: a tensor of any shape after the activation, by torch."""
    match activation:
        case "relu":
            return y.relu()
        case "sigmoid":
            return y.sigmoid()
    return y


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
