"""The tail that convolution and linear layers share: bias, then activation, channels along N."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import triton.language as tl
from alexnet_triton.kernels.epilogue import ACTIVATIONS, finish
from alexnet_triton.kernels.jit import Launch, jit

Fenced = Callable[[Sequence[int], torch.dtype], torch.Tensor]
Close = Callable[..., None]


@jit
def _finish_kernel(acc, bias, y, N, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.arange(0, 8)[:, None] * 16
    channel = tl.arange(0, 16)
    tile = finish(tl.load(acc + row + channel[None, :]), bias, channel, channel < N, ACTIVATION)
    tl.store(y + row + channel[None, :], tile)


def run(
    fenced: Fenced, acc: torch.Tensor, bias: torch.Tensor | None, activation: str | None
) -> torch.Tensor:
    """`finish` on a float32 tile [8, 16]."""
    tile, y = fenced((8, 16), torch.float32).copy_(acc), fenced((8, 16), torch.float32)
    offsets = None if bias is None else fenced(bias.shape, bias.dtype).copy_(bias)
    count = 16 if bias is None else len(bias)
    arguments = {"acc": tile, "bias": offsets, "y": y, "N": count, "ACTIVATION": activation}
    Launch(_finish_kernel, (1,), arguments, num_warps=4, num_stages=1)()
    return y.cpu()


@pytest.mark.parametrize("channels", [None, 16, 11])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_equals_float64(
    channels: int | None,
    activation: str | None,
    dtype: torch.dtype,
    fenced: Fenced,
    generator: torch.Generator,
    assert_close: Close,
) -> None:
    """Channels that do not exist have no bias; what lies in its place is NaN and not read."""
    acc = torch.randn(8, 16, generator=generator)
    bias = None if channels is None else torch.randn(channels, generator=generator).to(dtype)
    y = run(fenced, acc, bias, activation)
    wanted = acc.double()
    if bias is not None:
        wanted[:, :channels] += bias.double()
    if activation is not None:
        wanted = getattr(torch, activation)(wanted)
    assert_close(y, wanted, torch.float32, 2, scale=1.0)


def test_activations_at_the_ends(fenced: Fenced, assert_close: Close) -> None:
    """No NaN but where one came in, and NaN is not zero after a ReLU."""
    ends = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 1e-40, 0.0, -0.0])
    acc = ends[:, None].expand(8, 16)
    for activation in ("relu", "sigmoid"):
        wanted = getattr(torch, activation)(acc.double())
        assert_close(run(fenced, acc, None, activation), wanted, torch.float32, 1)
