"""Convolution against float64 on every path it can take, and its count of work against torch's.

Tensors lie between fences and are filled with NaN first, padding channels too, so that what is
read or written where it should not be, or not written at all, shows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from alexnet_triton.kernels import conv, layout
from alexnet_triton.kernels.conv import Conv2dConfig, Conv2dShape
from alexnet_triton.kernels.conv import rows_tiling_fits as fits
from alexnet_triton.kernels.driver import SHARED_MEMORY
from alexnet_triton.kernels.jit import MAX_TILE
from hypothesis import assume, given
from hypothesis import strategies as st

Fenced = Callable[[Sequence[int], torch.dtype], torch.Tensor]
Close = Callable[..., None]
Run = Callable[..., torch.Tensor]
Check = Callable[..., None]
Affine = tuple[torch.Tensor, torch.Tensor]
Tiling = Literal["rows", "pixels"]

TILINGS: tuple[Tiling, Tiling] = ("rows", "pixels")
PATHS: list[tuple[Tiling, bool]] = list(itertools.product(TILINGS, (True, False)))

each_path = pytest.mark.parametrize(("tiling", "descriptors"), PATHS)

# Small where the interpreter pays by the tap, with more images, filters and channels than one tile
# of TILE holds where that is the point.
TILE = (16, 32, 16)
PROBLEMS = {
    "multiples of the tile": Conv2dShape(32, 32, 2, 3, 64, 2, 2),
    "multiples of nothing": Conv2dShape(17, 19, 2, 2, 37, 2, 3, padding=(1, 0, 1, 1)),
    "one of everything": Conv2dShape(1, 1, 1, 1, 1, 1, 1),
    "pointwise": Conv2dShape(5, 40, 3, 2, 24, 1, 1),
    "strides": Conv2dShape(3, 9, 6, 7, 10, 3, 2, stride=(2, 3), padding=(1, 1, 1, 1)),
    "strides over the filter": Conv2dShape(3, 8, 9, 8, 8, 2, 1, stride=(4, 3)),
    "dilation": Conv2dShape(3, 8, 6, 4, 8, 3, 3, padding=(1, 1, 1, 1), dilation=(3, 2)),
    "dilation and stride": Conv2dShape(
        2, 8, 7, 6, 8, 3, 3, stride=(2, 1), padding=(2, 2, 1, 1), dilation=(2, 3)
    ),
    "asymmetric padding": Conv2dShape(3, 5, 3, 3, 6, 3, 3, padding=(2, 0, 1, 2)),
    "padding at the end alone": Conv2dShape(3, 5, 3, 3, 6, 3, 3, padding=(0, 1, 0, 2)),
    "windows outside the image": Conv2dShape(
        3, 5, 2, 2, 6, 2, 2, stride=(2, 3), padding=(3, 3, 5, 5)
    ),
    "filter over the image": Conv2dShape(4, 5, 3, 2, 6, 5, 7, padding=(2, 1, 4, 3)),
    "aligned groups": Conv2dShape(17, 32, 2, 2, 36, 3, 3, padding=(1, 1, 1, 1), groups=2),
    "odd groups": Conv2dShape(3, 15, 2, 2, 21, 2, 3, padding=(1, 0, 1, 1), groups=3),
    "depthwise": Conv2dShape(3, 3, 2, 3, 6, 3, 3, padding=(1, 1, 1, 1), groups=3),
}


def random_operands(
    shape: Conv2dShape, dtype: torch.dtype, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images [N, C, H, W], filters [OC, C/groups, KH, KW] and bias [OC], rounded to `dtype`."""
    sizes = (
        (shape.N, shape.C, shape.H, shape.W),
        (shape.OC, shape.C // shape.groups, shape.KH, shape.KW),
        (shape.OC,),
    )
    x, weight, bias = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    return x, weight, bias


def answer(
    fenced: Fenced,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    shape: Conv2dShape,
    config: Conv2dConfig,
    activation: str | None = None,
    precision: str = "ieee",
    affine: Affine | None = None,
) -> torch.Tensor:
    """The kernel's answer [N, OC, OH, OW] to operands [N, C, H, W] and [OC, C/groups, KH, KW]."""
    packed = conv.pack_weight(weight)
    image = fenced((shape.H, shape.W, shape.N, shape.C), x.dtype).copy_(layout.pack(x))
    filters = fenced(packed.shape, x.dtype).copy_(packed)
    offsets = None if bias is None else fenced(bias.shape, x.dtype).copy_(bias)
    if affine is not None:
        scale, shift = (fenced(t.shape, t.dtype).copy_(t) for t in affine)
        affine = (scale, shift)
    out = fenced((shape.OH, shape.OW, shape.N, shape.OC), x.dtype)
    conv.conv2d(image, filters, offsets, out, shape, config, activation, precision, affine)()
    return layout.unpack(out).cpu()


def magnitude(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, shape: Conv2dShape
) -> torch.Tensor:
    """What the sums would be if nothing cancelled."""
    return conv.reference(x.abs(), weight.abs(), None if bias is None else bias.abs(), shape)


def products(shape: Conv2dShape) -> int:
    """How many products make one output."""
    return shape.KH * shape.KW * shape.C // shape.groups


# Numbers


@pytest.fixture
def check(run: Run, generator: torch.Generator, assert_close: Close) -> Check:
    """`check(shape, dtype, config, precision)`: one random problem with a bias against float64."""

    def check(
        shape: Conv2dShape, dtype: torch.dtype, config: Conv2dConfig, precision: str = "ieee"
    ) -> None:
        if config.tiling == "rows" and config.descriptors and not fits(shape, dtype):
            pytest.skip("a group's channels are no multiple of 16 bytes")
        x, weight, bias = random_operands(shape, dtype, generator)
        y = run(x, weight, bias, shape, config, precision=precision)
        scale = magnitude(x, weight, bias, shape)
        wanted = conv.reference(x, weight, bias, shape)
        assert_close(y, wanted, dtype, products(shape), precision, scale)

    return check


HALF = ("multiples of nothing", "aligned groups", "odd groups")


def each(
    problems: Iterable[str],
    config: Conv2dConfig,
    dtype: torch.dtype = torch.float32,
    precision: str = "ieee",
    gpu: bool = False,
) -> list[Any]:
    marks = [pytest.mark.gpu] if gpu else []
    return [pytest.param(name, dtype, config, precision, marks=marks) for name in problems]


FULL = ("multiples of nothing", "one of everything", "odd groups")
NUMBERS = [
    case
    for tiling, descriptors in PATHS
    for config in [Conv2dConfig(tiling, *TILE, descriptors=descriptors)]
    for case in (
        *each(PROBLEMS, config),
        *each(HALF, config, torch.float16),
        *each(HALF, config, torch.bfloat16, gpu=True),
        *each(PROBLEMS, replace(config, BLOCK_M=64, BLOCK_K=32), precision="tf32", gpu=True),
    )
]
for with_descriptors in (True, False):
    # Filters or rows that fill both accumulators, that end in the second, that do not reach it.
    one = Conv2dConfig("rows", *TILE, descriptors=with_descriptors)
    for two in (replace(one, BLOCK_N2=16), replace(one, BLOCK_M2=16)):
        NUMBERS += each(("multiples of the tile", *FULL), two)
for tiling, parts in itertools.product(TILINGS, (2, 5)):  # also more than there is to add
    NUMBERS += each(
        ("strides", *FULL), Conv2dConfig(tiling, *TILE, descriptors=parts == 2, SPLIT_K=parts)
    )


@pytest.mark.parametrize(("problem", "dtype", "config", "precision"), NUMBERS)
def test_equals_float64(
    problem: str, dtype: torch.dtype, config: Conv2dConfig, precision: str, check: Check
) -> None:
    check(PROBLEMS[problem], dtype, config, precision)


@pytest.mark.parametrize("tiling", TILINGS)
def test_a_split_sum_ends_like_a_whole_one(
    tiling: Tiling, device: torch.device, run: Run, generator: torch.Generator
) -> None:
    """Bias, activation, scale and shift once, not in every part; in any scratch memory."""
    shape = Conv2dShape(3, 16, 4, 4, 24, 3, 3, padding=(1, 1, 1, 1))
    x, weight, bias = random_operands(shape, torch.float32, generator)
    affine = (torch.rand(24, generator=generator), torch.rand(24, generator=generator))
    whole = Conv2dConfig(tiling, 64, 32, 16)
    split = replace(whole, SPLIT_K=3)
    one, other = (
        run(x, weight, bias, shape, config, "relu", affine=affine) for config in (whole, split)
    )
    assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)
    assert one.eq(affine[1][:, None, None]).any(), "no output was negative before the activation"
    scratch = torch.full((conv.scratch_numbers(shape, split),), torch.nan, device=device)
    out = layout.empty(shape.OH, shape.OW, shape.N, shape.OC, torch.float32, device)
    arguments = (layout.pack(x.to(device)), conv.pack_weight(weight.to(device)), bias.to(device))
    moved = (affine[0].to(device), affine[1].to(device))
    conv.conv2d(*arguments, out, shape, split, "relu", affine=moved, scratch=scratch)()
    assert torch.equal(layout.unpack(out).cpu(), other)


@each_path
@pytest.mark.parametrize("parts", [1, 3])
def test_views_of_larger_activations(
    tiling: Tiling,
    descriptors: bool,
    parts: int,
    device: torch.device,
    generator: torch.Generator,
    assert_close: Close,
) -> None:
    """Into a slice of another, rows [H, N, W, C]; pixels also from a slice of the images of one."""
    shape = Conv2dShape(5, 16, 4, 5, 24, 3, 2, padding=(1, 1, 1, 0))
    x, weight, bias = random_operands(shape, torch.float32, generator)
    many = layout.empty(4, 5, 9, 16, torch.float32, device).fill_(torch.nan)
    image = many[:, :, 3:8].copy_(layout.pack(x))
    rows = layout.empty(shape.OH, 7, shape.OW + 2, 24, torch.float32, device)
    rows = rows.fill_(torch.nan).transpose(1, 2)
    out = rows[:, 1:-1, 2:]
    packed = conv.pack_weight(weight.to(device))
    config = Conv2dConfig(tiling, *TILE, descriptors=descriptors, SPLIT_K=parts)
    if tiling == "rows":
        with pytest.raises(ValueError, match=r"144 elements apart, wanted 80, .* pixels tiling"):
            conv.conv2d(image, packed, bias.to(device), out, shape, config)
        image = layout.pack(x.to(device))
    conv.conv2d(image, packed, bias.to(device), out, shape, config)()
    scale = magnitude(x, weight, bias, shape)
    wanted = conv.reference(x, weight, bias, shape)
    made = layout.unpack(out).cpu()
    assert_close(made, wanted, torch.float32, products(shape), "ieee", scale)
    assert int(rows.isnan().sum()) == rows.numel() - out.numel(), "it wrote beside its view"


@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("groups", [1, 2])
def test_scale_and_shift_follow_the_activation(
    tiling: Tiling, groups: int, run: Run, generator: torch.Generator, assert_close: Close
) -> None:
    """Each filter its own, in float32 whatever the rest."""
    shape = Conv2dShape(3, 16, 3, 3, 14, 2, 2, groups=groups)
    x, weight, bias = random_operands(shape, torch.float16, generator)
    scale, shift = torch.randn(2, 14, generator=generator)
    config = Conv2dConfig(tiling, 16, 16, 16)
    y = run(x, weight, bias, shape, config, "relu", affine=(scale, shift))
    wanted = conv.reference(x, weight, bias, shape, "relu")
    wanted = wanted * scale[:, None, None] + shift[:, None, None]
    size = magnitude(x, weight, bias, shape) * scale.abs()[:, None, None]
    size += shift.abs()[:, None, None]
    assert_close(y, wanted, torch.float16, products(shape) + 2, scale=size)


@pytest.mark.parametrize("tiling", TILINGS)
def test_nan_and_infinity_come_through(
    tiling: Tiling, run: Run, generator: torch.Generator, assert_close: Close
) -> None:
    """And reach no other output."""
    shape = Conv2dShape(3, 4, 5, 5, 7, 2, 2)
    x, weight, bias = random_operands(shape, torch.float32, generator)
    x[1, 2, 0, 0], x[2, 0, 4, 4] = torch.nan, torch.inf
    y = run(x, weight, bias, shape, Conv2dConfig(tiling, 16, 16, 16))
    wanted = conv.reference(x, weight, bias, shape)
    assert wanted.isnan().any()
    assert_close(y, wanted, torch.float32, products(shape), scale=100.0)


# Few, many and ragged images in tiles of rows: (images, rows of a tile).
RAGGED = [(1, 16), (3, 64), (8, 16), (9, 32), (16, 16), (17, 16), (100, 64)]
WINDOWS = {
    "3x3": Conv2dShape(1, 16, 3, 6, 16, 3, 3, padding=(1, 1, 1, 1)),
    "5x5 of 6": Conv2dShape(1, 8, 3, 6, 16, 5, 5, padding=(2, 2, 2, 2)),
    "valid": Conv2dShape(1, 8, 3, 5, 16, 3, 3),
    "padding over the filter": Conv2dShape(1, 8, 2, 3, 16, 3, 3, padding=(4, 4, 4, 4)),
    "dilation": Conv2dShape(1, 8, 5, 6, 16, 3, 3, padding=(2, 2, 2, 2), dilation=(2, 2)),
    "stride": Conv2dShape(1, 8, 5, 7, 16, 3, 3, stride=(2, 2), padding=(1, 1, 1, 1)),
    "groups": Conv2dShape(1, 16, 3, 4, 16, 3, 3, padding=(1, 1, 1, 1), groups=2),
}


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("images", "block_m"), RAGGED)
def test_tiles_of_rows_at_any_batch(window: str, images: int, block_m: int, check: Check) -> None:
    descriptors = images % 2 == 0
    config = Conv2dConfig("rows", block_m, 16, 16, descriptors=descriptors)
    check(replace(WINDOWS[window], N=images), torch.float32, config)


# Bits


@pytest.mark.bits
@pytest.mark.parametrize(
    "problem", [name for name, shape in PROBLEMS.items() if fits(shape, torch.float32)]
)
def test_tilings_agree_bit_for_bit(problem: str, run: Run, generator: torch.Generator) -> None:
    """Skipping a tap and adding zeros for it are the same sum in the same order."""
    shape = PROBLEMS[problem]
    x, weight, bias = random_operands(shape, torch.float32, generator)
    rows, pixels = (
        run(x, weight, bias, shape, Conv2dConfig(tiling, 32, 32, 16)) for tiling in TILINGS
    )
    assert torch.equal(rows, pixels)


@pytest.mark.bits
@each_path
@pytest.mark.parametrize("parts", [1, 3])
def test_an_image_does_not_see_its_neighbours(
    tiling: Tiling,
    descriptors: bool,
    parts: int,
    dtype: torch.dtype,
    run: Run,
    generator: torch.Generator,
) -> None:
    """The same bits wherever in a batch it stands, and from run to run."""
    shape = Conv2dShape(17, 19, 1, 2, 20, 2, 2, padding=(1, 0, 0, 1))
    x, weight, bias = random_operands(shape, dtype, generator)
    config = Conv2dConfig(tiling, 16, 32, 16, descriptors=descriptors, SPLIT_K=parts)
    y = run(x, weight, bias, shape, config, "relu")
    order = torch.randperm(shape.N, generator=generator)
    again = run(x[order], weight, bias, shape, config, "relu")
    assert torch.equal(again, y[order])


@pytest.mark.bits
@pytest.mark.parametrize("images", [1, 2, 7])
def test_batch_invariant_configuration(
    images: int, arch: int | None, run: Run, generator: torch.Generator
) -> None:
    """An image gives the same bits alone and in a batch of any size."""
    batch = Conv2dShape(20, 16, 3, 3, 24, 2, 2, padding=(1, 0, 0, 0))
    x, weight, bias = random_operands(batch, torch.float32, generator)
    part = replace(batch, N=images)
    whole, some = (
        run(
            x[: shape.N],
            weight,
            bias,
            shape,
            conv.default_config(shape, torch.float32, "ieee", arch, batch_invariant=True),
        )
        for shape in (batch, part)
    )
    assert torch.equal(some, whole[:images])


# Shape, work, packing


sizes = st.integers(1, 9)
pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@st.composite
def shapes(draw: st.DrawFn) -> Conv2dShape:
    """Any small convolution that has an output."""
    groups = draw(st.integers(1, 3))
    channels, filters = (groups * draw(st.integers(1, 4)) for _ in range(2))
    padding = draw(st.tuples(*[st.integers(0, 6)] * 4))
    shape = Conv2dShape(
        draw(st.integers(0, 3)),
        channels,
        draw(sizes),
        draw(sizes),
        filters,
        draw(st.integers(1, 5)),
        draw(st.integers(1, 5)),
        draw(pairs),
        padding,
        draw(pairs),
        groups,
    )
    assume(shape.OH > 0 and shape.OW > 0)
    return shape


@given(shapes(), st.sampled_from([torch.float16, torch.float32]))
def test_work_equals_a_count_of_taps(shape: Conv2dShape, dtype: torch.dtype) -> None:
    """A convolution of ones with ones counts, in each output, the products that meet the image."""
    x = torch.ones(shape.N, shape.C, shape.H, shape.W)
    weight = torch.ones(shape.OC, shape.C // shape.groups, shape.KH, shape.KW)
    counts = conv.reference(x, weight, None, shape)
    assert counts.shape == (shape.N, shape.OC, shape.OH, shape.OW)
    work = conv.work(shape, dtype)
    assert work.flops == 2 * int(counts.sum())
    elements = x.numel() + weight.numel() + shape.OC + counts.numel()
    assert work.bytes == elements * dtype.itemsize


# Default configurations


architectures = st.sampled_from([None, 80, 86, 89, 90, 100, 120])
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
precisions = st.sampled_from(["ieee", "tf32"])


@st.composite
def problems(draw: st.DrawFn) -> Conv2dShape:
    """Convolutions as large as networks have them; nothing is run on these."""
    groups = draw(st.sampled_from([1, 2, 3, 32]))
    kernel = draw(st.integers(1, 11))
    side = draw(st.integers(kernel, 300))
    images = draw(st.sampled_from([1, 2, 63, 64, 100, 127, 128, 1024]))
    c, oc = (groups * draw(st.integers(1, 600)) for _ in range(2))
    return Conv2dShape(images, c, side, side, oc, kernel, kernel, groups=groups)


@given(problems(), dtypes, precisions, architectures, st.booleans())
def test_default_configuration(
    shape: Conv2dShape, dtype: torch.dtype, precision: str, arch: int | None, invariant: bool
) -> None:
    config = conv.default_config(shape, dtype, precision, arch, invariant)
    blocks = (config.BLOCK_M, config.BLOCK_N, config.BLOCK_K)
    assert all(block.bit_count() == 1 and block >= 16 for block in blocks)  # what tl.dot wants
    assert all(a * b <= MAX_TILE for a, b in itertools.combinations(blocks, 2))
    assert config.num_warps in (4, 8)
    if config.tiling == "rows":
        assert fits(shape, dtype)
    if config.descriptors:
        assert arch is None or arch >= 90
    if arch is not None:
        rows = config.BLOCK_M + config.BLOCK_M2 + config.BLOCK_N + config.BLOCK_N2
        tile_bytes = rows * config.BLOCK_K * dtype.itemsize
        assert config.num_stages * tile_bytes <= SHARED_MEMORY[arch]
    assert config.SPLIT_K == 1 or not config.BLOCK_M2 + config.BLOCK_N2
    if invariant:
        for n in (1, 65, 5000):
            other = replace(shape, N=n)
            assert config.SPLIT_K == 1, "one order of summation at every batch size"
            assert conv.default_config(other, dtype, precision, arch, invariant) == config


def test_what_would_be_silently_wrong_is_refused() -> None:
    shape = Conv2dShape(64, 6, 5, 5, 4, 3, 3, groups=2)
    x = layout.empty(5, 5, 64, 6, torch.float32, "cpu")
    out = layout.empty(3, 3, 64, 4, torch.float32, "cpu")
    weight = conv.pack_weight(torch.zeros(4, 3, 3, 3))
    rows, pixels = (Conv2dConfig(tiling, 16, 16, 16) for tiling in TILINGS)
    split = Conv2dConfig("rows", 16, 16, 16, descriptors=False, SPLIT_K=2, BLOCK_N2=16)
    crooked, many = torch.zeros(5, 5, 64, 7)[..., :6], Conv2dShape(2**21, 8, 32, 32, 8, 1, 1)
    wide = Conv2dShape(2**21, 8, 1, 1024, 8, 1, 1, stride=(1, 4))
    flat = torch.zeros(8, dtype=torch.half).expand(1, 1024, 2**21, 8)
    for operand, problem, config, activation, message in (
        (x, shape, rows, None, "3 channels a group are no multiple of 16 bytes"),
        (x, shape, pixels, "gelu", r"conv2d: activation must be one of .* got 'gelu'"),
        (x, shape, replace(pixels, BLOCK_N2=16), None, "BLOCK_N2 is for the rows tiling"),
        (x, shape, split, None, "BLOCK_N2 is for the rows tiling and a whole sum"),
        (x, shape, replace(pixels, BLOCK_M2=16), None, "BLOCK_M2 is for the rows tiling"),
        (x, shape, replace(split, BLOCK_M2=16), None, "BLOCK_M2 or BLOCK_N2, not"),
        (crooked, shape, pixels, None, "wanted dense channels and multiples of 8"),
        (x, many, pixels, None, "conv2d: 2147483648 rows .* smaller batch"),
        (flat, wide, rows, None, "conv2d: 1024 columns of 2097152 images .* smaller batch"),
    ):
        with pytest.raises(ValueError, match=message):
            conv.conv2d(operand, weight, None, out, problem, config, activation)
