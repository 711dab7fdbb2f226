"""Local response normalisation against float64: window sizes, constants, and numbers too large."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from alexnet_triton.kernels import layout, lrn
from alexnet_triton.kernels.lrn import LRNConfig, LRNShape

Fenced = Callable[[Sequence[int], torch.dtype], torch.Tensor]
Close = Callable[..., None]
Run = Callable[..., torch.Tensor]

DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),  # the interpreter truncates it
]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def answer(
    fenced: Fenced, x: torch.Tensor, size: int, config: LRNConfig, **constants: float
) -> torch.Tensor:
    """The kernel's answer [N, C, H, W] to images [N, C, H, W]."""
    n, c, height, width = x.shape
    image = fenced((height, width, n, c), x.dtype).copy_(layout.pack(x))
    out = fenced((height, width, n, c), x.dtype)
    shape = LRNShape(height * width * n, c, size)
    lrn.local_response_norm(image, out, shape, config, **constants)()
    return layout.unpack(out).cpu()


@pytest.fixture
def run(fenced: Fenced) -> Run:
    """`answer` to operands between fences."""
    return partial(answer, fenced)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 9, 12, 30])
@pytest.mark.parametrize("channels", [1, 9, 16])
def test_window_equals_float64(
    size: int, channels: int, run: Run, generator: torch.Generator, assert_close: Close
) -> None:
    """Even and odd windows, up to some wider than all channels, over more than one tile."""
    x = torch.randn(3, channels, 2, 3, generator=generator)
    y = run(x, size, LRNConfig(16, 8), alpha=1.0)
    assert_close(y, lrn.reference(x, size, alpha=1.0), torch.float32, size, scale=x.abs())


@pytest.mark.parametrize(
    "constants",
    [
        {},
        {"k": 2.0},
        {"alpha": 0.1, "beta": 0.5},
        {"alpha": 2, "beta": 1, "k": 3},
        {"alpha": 0.0, "beta": 3.5, "k": 0.5},
        {"beta": 0.0},
        {"alpha": 1.0, "beta": -0.75},
        {"alpha": 1.0, "k": 0.0},
    ],
    ids=str,
)
@each_dtype
def test_constants_equal_float64(
    constants: dict[str, float],
    dtype: torch.dtype,
    run: Run,
    generator: torch.Generator,
    assert_close: Close,
) -> None:
    x = torch.randn(2, 11, 3, 2, generator=generator).to(dtype)
    y = run(x, 5, LRNConfig(16, 16), **constants)
    wanted = lrn.reference(x, 5, **constants)
    # log2 and exp2 are each a few units off; the power makes that relative to its exponent.
    assert_close(y, wanted, dtype, 5 + 16, scale=wanted.abs())


def test_squares_beyond_half_precision(run: Run, assert_close: Close) -> None:
    """The largest half-precision number is 65504, its square is 4e9."""
    x = torch.linspace(-60000, 60000, 24).reshape(1, 24, 1, 1).half()
    y = run(x, 5, LRNConfig(1, 32), alpha=1e-4)
    wanted = lrn.reference(x, 5, alpha=1e-4)
    assert_close(y, wanted, torch.float16, 5, scale=wanted.abs())


def test_nan_stays_in_its_windows(
    run: Run, generator: torch.Generator, assert_close: Close
) -> None:
    x = torch.randn(2, 11, 2, 2, generator=generator)
    x[1, 4, 1, 0] = torch.nan
    y = run(x, 3, LRNConfig(8, 16))
    wanted = lrn.reference(x, 3)
    assert int(wanted.isnan().sum()) == 3
    assert_close(y, wanted, torch.float32, 3)


def test_views_of_larger_activations(
    device: torch.device, generator: torch.Generator, assert_close: Close
) -> None:
    """From rows [H, N, W, C] into a slice of the images of another activation."""
    x = torch.randn(3, 24, 4, 5, generator=generator)
    rows = layout.empty(4, 3, 6, 24, torch.float32, device).fill_(torch.nan).transpose(1, 2)
    image = rows[:, :5].copy_(layout.pack(x))
    many = layout.empty(4, 5, 7, 24, torch.float32, device).fill_(torch.nan)
    out = many[:, :, 2:5]
    lrn.local_response_norm(image, out, LRNShape(60, 24, 5), LRNConfig(16, 16))()
    assert_close(layout.unpack(out), lrn.reference(x, 5), torch.float32, 5)
    assert int(many.isnan().sum()) == many.numel() - out.numel(), "it wrote beside its view"


def test_work() -> None:
    work = lrn.work(LRNShape(6, 10, 5), torch.float16)
    assert work.flops == 60 * 14  # a multiply-add a neighbour; scale, add, power, multiply
    assert work.bytes == 2 * 60 * 2


def test_groups_are_normalised_by_themselves(
    device: torch.device, generator: torch.Generator, assert_close: Close
) -> None:
    """As the two GPUs of 2012 did: a window does not reach into the other tower."""
    x = torch.randn(3, 24, 5, 4, generator=generator)
    shape = lrn.LRNShape(3 * 5 * 4, 24, size=5, groups=2)
    packed = layout.pack(x.to(device))
    out = layout.empty(5, 4, 3, 24, torch.float32, device).fill_(float("nan"))
    for arch in (None, 90):
        config = lrn.default_config(shape, arch)
        lrn.local_response_norm(packed, out, shape, config, alpha=0.5)()
        wanted = torch.cat([lrn.reference(part, 5, alpha=0.5) for part in x.chunk(2, 1)], 1)
        assert_close(layout.unpack(out), wanted, torch.float32, 5)
        assert (wanted - lrn.reference(x, 5, alpha=0.5)).abs().max() > 1e-3
