"""The tail that convolution and linear layers share: bias, activation, scale and shift."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import triton.language as tl
from alexnet_triton.bench.inspect.compiled import compile_for
from alexnet_triton.kernels.epilogue import (
    ACTIVATIONS,
    Activated,
    activated,
    check_activation,
    finish,
    rule,
)
from alexnet_triton.kernels.jit import Launch, jit

Fenced = Callable[[Sequence[int], torch.dtype], torch.Tensor]
Close = Callable[..., None]


Affine = tuple[torch.Tensor, torch.Tensor]

# Every row of the table, with a number for each parameter.
WRITTEN = [
    (name, *(0.25 for _ in row.parameters)) if row.parameters else name
    for name, row in ACTIVATIONS.items()
]


@jit
def _finish_kernel(acc, bias, scale, shift, y, N, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.arange(0, 8)[:, None] * 16
    channel = tl.arange(0, 16)
    tile = tl.load(acc + row + channel[None, :])
    tile = finish(tile, bias, scale, shift, channel, channel < N, ACTIVATION)
    tl.store(y + row + channel[None, :], tile)


def bind(
    acc: torch.Tensor,
    bias: torch.Tensor | None,
    affine: Affine | None,
    y: torch.Tensor,
    channels: int,
    activation: Activated,
) -> Launch:
    """`finish` on a float32 tile [8, 16] whose first `channels` channels exist."""
    scale, shift = affine or (None, None)
    arguments = {
        "acc": acc,
        "bias": bias,
        "scale": scale,
        "shift": shift,
        "y": y,
        "N": channels,
        "ACTIVATION": activation,
    }
    return Launch(_finish_kernel, (1,), arguments, num_warps=4, num_stages=1)


def run(
    fenced: Fenced,
    acc: torch.Tensor,
    bias: torch.Tensor | None = None,
    affine: Affine | None = None,
    channels: int = 16,
    activation: Activated = None,
) -> torch.Tensor:
    """Its answer, operands fenced."""
    tile, y = fenced((8, 16), torch.float32).copy_(acc), fenced((8, 16), torch.float32)
    if bias is not None:
        bias = fenced(bias.shape, bias.dtype).copy_(bias)
    if affine is not None:
        scale, shift = (fenced(t.shape, t.dtype).copy_(t) for t in affine)
        affine = (scale, shift)
    bind(tile, bias, affine, y, channels, activation)()
    return y.cpu()


@pytest.mark.parametrize("channels", [16, 11])
@pytest.mark.parametrize("activation", [None, *WRITTEN])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("with_affine", [False, True])
def test_equals_float64(
    channels: int,
    activation: Activated,
    dtype: torch.dtype | None,
    with_affine: bool,
    fenced: Fenced,
    generator: torch.Generator,
    assert_close: Close,
) -> None:
    """In this order; of channels that do not exist nothing is read, where NaN lies in wait."""
    acc = torch.randn(8, 16, generator=generator)
    wanted = acc[:, :channels].double()
    bias = affine = None
    if dtype is not None:
        bias = torch.randn(channels, generator=generator).to(dtype)
        wanted = wanted + bias.double()
    wanted = activated(wanted, activation)
    if with_affine:
        scale, shift = torch.randn(2, channels, generator=generator)
        affine = (scale, shift)
        wanted = wanted * scale.double() + shift.double()
    y = run(fenced, acc, bias, affine, channels, activation)
    assert_close(y[:, :channels], wanted, torch.float32, 4)
    assert y.isfinite().all()


@pytest.mark.parametrize("activation", WRITTEN)
def test_activations_at_the_ends(
    activation: Activated, fenced: Fenced, assert_close: Close
) -> None:
    """No NaN but where one came in, and NaN is not zero after a ReLU."""
    ends = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 1e-40, 0.0, -0.0])
    acc = ends[:, None].expand(8, 16)
    wanted = activated(acc.double(), activation)
    assert_close(run(fenced, acc, activation=activation), wanted, torch.float32, 1)


@pytest.mark.parametrize("activation", WRITTEN)
def test_an_activations_rule_is_its_function(activation: str) -> None:
    """In words, by torch, and by torch in place."""
    numbers = torch.linspace(-5, 5, 11, dtype=torch.float64)
    by_torch = activated(numbers.clone(), activation)
    spoken = [eval(rule(activation), {"exp": math.exp, "x": x}) for x in numbers.tolist()]
    assert torch.allclose(by_torch, torch.tensor(spoken, dtype=torch.float64), rtol=1e-12)
    there = numbers.clone()
    assert activated(there, activation, in_place=True) is there
    assert torch.equal(there, by_torch)


@pytest.mark.parametrize(
    "activation", ["tanh", "", (), ("relu",), ("relu", 0.5), ["relu"], (None,), 3]
)
def test_what_the_kernels_would_pass_over_is_refused(activation: Any) -> None:
    with pytest.raises(ValueError, match=r"conv2d: activation must be .*, got ") as refused:
        check_activation("conv2d", activation)
    assert "\n" not in str(refused.value)


def test_a_compiled_relu_keeps_nan() -> None:
    """The interpreter's maximum keeps NaN in any case; the machine's has to be told."""
    tile = torch.zeros(8, 16)
    binary = compile_for(bind(tile, None, None, tile, 16, "relu"), 80)
    assert "max.NaN.f32" in binary.ptx
    assert "max.f32" not in binary.ptx
