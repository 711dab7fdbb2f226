"""Pooling against torch in float64: every window, what padding counts for, NaN and infinities.

Tensors lie between fences and are filled with NaN first, padding channels too, so that what is
read or written where it should not be, or not written at all, shows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from alexnet_triton.bench.inspect.compiled import compile_for
from alexnet_triton.kernels import layout, pool
from alexnet_triton.kernels.jit import MAX_TILE
from alexnet_triton.kernels.pool import PoolConfig, PoolShape
from hypothesis import given
from hypothesis import strategies as st

Fenced = Callable[[Sequence[int], torch.dtype], torch.Tensor]
Close = Callable[..., None]
Run = Callable[..., torch.Tensor]

each_rounding = pytest.mark.parametrize("ceil_mode", [False, True])

TILE = PoolConfig(4, 16)

# Windows on 3 images of 5 channels and 7x8 pixels, to which ceil_mode often adds one. The output's
# size is torch's to tell.
WINDOWS = {
    "alexnet": PoolShape(3, 5, 7, 8, 0, 0, kernel=(3, 3), stride=(2, 2)),
    "one pixel": PoolShape(3, 5, 7, 8, 0, 0, kernel=(1, 1)),
    "strides over the window": PoolShape(3, 5, 7, 8, 0, 0, kernel=(1, 2), stride=(4, 3)),
    "padding": PoolShape(3, 5, 7, 8, 0, 0, kernel=(3, 2), stride=(2, 3), padding=(1, 1)),
    "much padding": PoolShape(3, 5, 7, 8, 0, 0, kernel=(5, 4), stride=(3, 3), padding=(2, 2)),
    "over both ends": PoolShape(3, 5, 7, 8, 0, 0, kernel=(4, 3), stride=(3, 4), padding=(1, 1)),
    "the whole image": PoolShape(3, 5, 7, 8, 0, 0, kernel=(7, 8)),
}
DILATED = {
    "dilation": PoolShape(3, 5, 7, 8, 0, 0, (3, 2), (1, 2), dilation=(2, 5)),
    "dilation and padding": PoolShape(3, 5, 7, 8, 0, 0, (2, 3), (2, 2), (1, 1), (3, 2)),
}


def sized(shape: PoolShape, ceil_mode: bool) -> PoolShape:
    """With the output's size as torch counts it."""
    wanted = pool.max_reference(torch.zeros(1, 1, shape.H, shape.W), shape, ceil_mode)
    return replace(shape, OH=wanted.shape[2], OW=wanted.shape[3])


def images(shape: PoolShape, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Random numbers [N, C, H, W], rounded to `dtype`."""
    return torch.randn(shape.N, shape.C, shape.H, shape.W, generator=generator).to(dtype)


def answer(
    fenced: Fenced,
    x: torch.Tensor,
    shape: PoolShape,
    config: PoolConfig,
    average: bool = False,
    count_include_pad: bool = True,
) -> torch.Tensor:
    """The kernel's answer [N, C, OH, OW] to images [N, C, H, W]."""
    image = fenced((shape.H, shape.W, shape.N, shape.C), x.dtype).copy_(layout.pack(x))
    out = fenced((shape.OH, shape.OW, shape.N, shape.C), x.dtype)
    if average:
        pool.avg_pool2d(image, out, shape, config, count_include_pad)()
    else:
        pool.max_pool2d(image, out, shape, config)()
    return layout.unpack(out).cpu()


# Maximum


@pytest.mark.parametrize("window", WINDOWS | DILATED)
@each_rounding
def test_max_is_exact(
    window: str, ceil_mode: bool, dtype: torch.dtype, run: Run, generator: torch.Generator
) -> None:
    shape = sized((WINDOWS | DILATED)[window], ceil_mode)
    x = images(shape, dtype, generator)
    y = run(x, shape, TILE)
    assert torch.equal(y.double(), pool.max_reference(x, shape, ceil_mode))


@pytest.mark.parametrize("average", [False, True])
def test_views_of_larger_activations(
    average: bool, device: torch.device, generator: torch.Generator
) -> None:
    """From rows [H, N, W, C] into a slice of the images of another activation."""
    shape = sized(WINDOWS["alexnet"], False)
    x = images(shape, torch.float32, generator)
    rows = layout.empty(shape.H, shape.N, shape.W + 1, shape.C, torch.float32, device)
    rows = rows.fill_(torch.nan).transpose(1, 2)
    image = rows[:, : shape.W].copy_(layout.pack(x))
    many = layout.empty(shape.OH, shape.OW, shape.N + 3, shape.C, torch.float32, device)
    out = many.fill_(torch.nan)[:, :, 1 : 1 + shape.N]
    function, reference = (
        (pool.avg_pool2d, pool.avg_reference) if average else (pool.max_pool2d, pool.max_reference)
    )
    function(image, out, shape, TILE)()
    made = layout.unpack(out).cpu().double()
    assert torch.allclose(made, reference(x, shape), rtol=1e-6, atol=1e-6)
    assert int(many.isnan().sum()) == many.numel() - out.numel(), "it wrote beside its view"


def test_max_of_nan_and_infinities(
    dtype: torch.dtype, run: Run, generator: torch.Generator
) -> None:
    """NaN wins over infinity, and padding loses even to the least number."""
    shape = sized(WINDOWS["padding"], True)
    x = images(shape, dtype, generator)
    x[0, 0] = -torch.inf
    x[1, 1, 2, 3], x[1, 1, 2, 4], x[1, 1, 6, 0] = torch.nan, torch.inf, -torch.inf
    x[2, 2] = torch.nan
    y = run(x, shape, TILE)
    wanted = pool.max_reference(x, shape, True)
    assert torch.equal(y[0, 0], torch.full_like(y[0, 0], -torch.inf))
    assert torch.equal(y.isnan(), wanted.isnan())
    assert torch.equal(y.double().nan_to_num(), wanted.nan_to_num())


@pytest.mark.parametrize(("dtype", "opcode"), [(torch.float32, "f32"), (torch.float16, "f16")])
def test_a_compiled_maximum_keeps_nan(dtype: torch.dtype, opcode: str) -> None:
    """The interpreter's keeps NaN in any case; the machine's has to be told."""
    shape = sized(WINDOWS["alexnet"], False)
    x = layout.empty(shape.H, shape.W, shape.N, shape.C, dtype, "cpu")
    y = layout.empty(shape.OH, shape.OW, shape.N, shape.C, dtype, "cpu")
    binary = compile_for(pool.max_pool2d(x, y, shape, pool.default_config(shape, 80)), 80)
    assert f"max.NaN.{opcode}" in binary.ptx
    assert f"max.{opcode}" not in binary.ptx


# Average


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("count_include_pad", [True, False])
@each_rounding
def test_average_equals_float64(
    window: str,
    count_include_pad: bool,
    ceil_mode: bool,
    run: Run,
    generator: torch.Generator,
    assert_close: Close,
) -> None:
    shape = sized(WINDOWS[window], ceil_mode)
    x = images(shape, torch.float32, generator)
    y = run(x, shape, TILE, True, count_include_pad)
    wanted = pool.avg_reference(x, shape, ceil_mode, count_include_pad)
    scale = pool.avg_reference(x.abs(), shape, ceil_mode, count_include_pad)
    assert_close(y, wanted, torch.float32, shape.kernel[0] * shape.kernel[1], scale=scale)


@pytest.mark.parametrize("size", [(1, 1), (6, 6), (3, 8), (7, 8), (9, 5), (8, 15)])
def test_adaptive_average_equals_float64(
    size: tuple[int, int],
    dtype: torch.dtype,
    run: Run,
    generator: torch.Generator,
    assert_close: Close,
) -> None:
    """Fewer pixels, more pixels, both at once, and as many as there are."""
    shape = PoolShape(2, 11, 7, 8, *size)
    x = images(shape, dtype, generator)
    y = run(x, shape, TILE, True)
    scale = pool.avg_reference(x.abs(), shape)
    assert_close(y, pool.avg_reference(x, shape), dtype, 56, scale=scale)


def test_average_sums_beyond_half_precision(run: Run, assert_close: Close) -> None:
    """56 numbers of 60000 sum to far more than 65504."""
    x = torch.full((1, 2, 7, 8), 60000.0).half()
    shape = PoolShape(1, 2, 7, 8, 1, 1)
    y = run(x, shape, TILE, True)
    assert_close(y, pool.avg_reference(x, shape), torch.float16, 56)


# Configurations, work, refusals


numbers = st.integers(1, 3000)


@given(numbers, numbers, st.integers(1, 300), st.sampled_from([None, 80, 90, 100]))
def test_default_configuration_has_legal_tiles(n: int, c: int, side: int, arch: int | None) -> None:
    config = pool.default_config(PoolShape(n, c, side, side, side, side, (1, 1)), arch)
    assert config.BLOCK_P.bit_count() == config.BLOCK_R.bit_count() == 1
    assert config.BLOCK_P * config.BLOCK_R <= MAX_TILE


def test_work() -> None:
    sliding = pool.work(PoolShape(3, 5, 7, 8, 3, 4, (3, 2), (2, 2)), torch.float16)
    assert sliding.flops == 3 * 5 * 3 * 4 * 6
    assert sliding.bytes == 3 * 5 * (7 * 8 + 3 * 4) * 2
    adaptive = pool.work(PoolShape(1, 1, 7, 8, 3, 4), torch.float32)
    assert adaptive.flops == 3 * 4 * (3 * 2)  # the largest window


def test_too_many_numbers_a_pixel_are_refused() -> None:
    x = torch.empty(1, 1, 2**20, 2048, device="meta")
    shape = PoolShape(2**20, 2048, 1, 1, 1, 1, (1, 1))
    with pytest.raises(ValueError, match=r"pooling: 2147483648 rows .* smaller batch"):
        pool.max_pool2d(x, x, shape, TILE)
