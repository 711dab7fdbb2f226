"""The tail that convolution and linear layers share: bias, activation, scale and shift."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import triton.language as tl
from alexnet_triton.bench.inspect.compiled import compile_for
from alexnet_triton.kernels.epilogue import ACTIVATIONS, finish
from alexnet_triton.kernels.jit import Launch, jit

Fenced = Callable[[Sequence[int], torch.dtype], torch.Tensor]
Close = Callable[..., None]


Affine = tuple[torch.Tensor, torch.Tensor]


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
    activation: str | None,
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
    activation: str | None = None,
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
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("with_affine", [False, True])
def test_equals_float64(
    channels: int,
    activation: str | None,
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
    if activation is not None:
        wanted = getattr(torch, activation)(wanted)
    if with_affine:
        scale, shift = torch.randn(2, channels, generator=generator)
        affine = (scale, shift)
        wanted = wanted * scale.double() + shift.double()
    y = run(fenced, acc, bias, affine, channels, activation)
    assert_close(y[:, :channels], wanted, torch.float32, 4)
    assert y.isfinite().all()


@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
def test_activations_at_the_ends(activation: str, fenced: Fenced, assert_close: Close) -> None:
    """No NaN but where one came in, and NaN is not zero after a ReLU."""
    ends = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 1e-40, 0.0, -0.0])
    acc = ends[:, None].expand(8, 16)
    wanted = getattr(torch, activation)(acc.double())
    assert_close(run(fenced, acc, activation=activation), wanted, torch.float32, 1)


def test_a_compiled_relu_keeps_nan() -> None:
    """The interpreter's maximum keeps NaN in any case; the machine's has to be told."""
    tile = torch.zeros(8, 16)
    binary = compile_for(bind(tile, None, None, tile, 16, "relu"), 80)
    assert "max.NaN.f32" in binary.ptx
    assert "max.f32" not in binary.ptx
