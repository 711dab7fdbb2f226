"""The linear layer against float64: whole and split sums, both orientations, and its packing.

Tensors lie between fences and are filled with NaN first, padding channels too, so that what is
read or written where it should not be, or not written at all, shows.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from alexnet_triton.kernels import gemm, layout
from alexnet_triton.kernels.driver import SHARED_MEMORY
from alexnet_triton.kernels.gemm import LinearConfig, LinearShape
from alexnet_triton.kernels.jit import MAX_TILE
from hypothesis import given
from hypothesis import strategies as st

Fenced = Callable[[Sequence[int], torch.dtype], torch.Tensor]
Close = Callable[..., None]
Run = Callable[..., torch.Tensor]
Check = Callable[..., None]
Affine = tuple[torch.Tensor, torch.Tensor]

each_form = pytest.mark.parametrize(
    ("transposed", "descriptors"), list(itertools.product((False, True), (False, True)))
)

TILE = (16, 32, 16)
PROBLEMS = {
    "multiples of the tile": LinearShape(32, 1, 32, 64),
    "multiples of nothing": LinearShape(19, 3, 21, 37),
    "one of everything": LinearShape(1, 1, 1, 1),
    "one image": LinearShape(1, 4, 24, 40),
    "many pixels": LinearShape(3, 36, 5, 10),
}


def answer(
    fenced: Fenced,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    config: LinearConfig,
    activation: str | None = None,
    precision: str = "ieee",
    affine: Affine | None = None,
) -> torch.Tensor:
    """The kernel's answer [N, OC] to images [N, C, H, W] and a weight [OC, C*H*W]."""
    n, c, height, width = x.shape
    packed = gemm.pack_weight(weight, height * width)
    image = fenced((height, width, n, c), x.dtype).copy_(layout.pack(x))
    filters = fenced(packed.shape, x.dtype).copy_(packed)
    offsets = None if bias is None else fenced(bias.shape, x.dtype).copy_(bias)
    if affine is not None:
        scale, shift = (fenced(t.shape, t.dtype).copy_(t) for t in affine)
        affine = (scale, shift)
    out = fenced((1, 1, n, len(weight)), x.dtype)
    gemm.linear(image, filters, offsets, out, config, activation, precision, affine)()
    return out[0, 0].cpu()


def random_operands(
    shape: LinearShape, dtype: torch.dtype, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images [N, C, P, 1], weight [OC, C*P] and bias [OC], rounded to `dtype`."""
    sizes = ((shape.N, shape.C, shape.P, 1), (shape.OC, shape.C * shape.P), (shape.OC,))
    x, weight, bias = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    return x, weight, bias


@pytest.fixture
def check(run: Run, generator: torch.Generator, assert_close: Close) -> Check:
    """`check(shape, dtype, config, precision)`: one random problem with a bias against float64.

    The input is flattened as torch flattens it.
    """

    def check(
        shape: LinearShape, dtype: torch.dtype, config: LinearConfig, precision: str = "ieee"
    ) -> None:
        x, weight, bias = random_operands(shape, dtype, generator)
        y = run(x, weight, bias, config, precision=precision)
        scale = gemm.reference(x.flatten(1).abs(), weight.abs(), bias.abs())
        wanted = gemm.reference(x.flatten(1), weight, bias)
        assert_close(y, wanted, dtype, shape.P * shape.C, precision, scale)

    return check


# Numbers


NUMBERS = [
    *((problem, torch.float32, "ieee") for problem in PROBLEMS),
    ("multiples of nothing", torch.float16, "ieee"),
    pytest.param("multiples of nothing", torch.bfloat16, "ieee", marks=pytest.mark.gpu),
    pytest.param("multiples of nothing", torch.float32, "tf32", marks=pytest.mark.gpu),
]


@pytest.mark.parametrize(("problem", "dtype", "precision"), NUMBERS)
@pytest.mark.parametrize("split", [1, 3])
@each_form
def test_equals_float64(
    problem: str,
    dtype: torch.dtype,
    precision: str,
    split: int,
    transposed: bool,
    descriptors: bool,
    check: Check,
) -> None:
    tile = (64, 64, 32) if precision == "tf32" else TILE
    config = LinearConfig(*tile, split, transposed, descriptors=descriptors)
    check(PROBLEMS[problem], dtype, config, precision)


@pytest.mark.parametrize("split", [1, 2])
def test_scale_and_shift_follow_the_activation(
    split: int, run: Run, generator: torch.Generator, assert_close: Close
) -> None:
    """Each output its own, once, in float32 whatever the rest."""
    x, weight, bias = random_operands(LinearShape(5, 2, 12, 9), torch.float16, generator)
    scale, shift = torch.randn(2, 9, generator=generator)
    config = LinearConfig(16, 16, 16, split)
    y = run(x, weight, bias, config, "relu", affine=(scale, shift))
    wanted = gemm.reference(x.flatten(1), weight, bias, "relu") * scale + shift
    size = gemm.reference(x.flatten(1).abs(), weight.abs(), bias.abs())
    assert_close(y, wanted, torch.float16, 26, scale=size * scale.abs() + shift.abs())


def test_split_sums_are_kept_in_single_precision(
    run: Run, generator: torch.Generator, assert_close: Close
) -> None:
    """Parts that half precision could not hold still make a sum that it can."""
    x = torch.full((2, 32, 1, 1), 100.0, dtype=torch.float16)
    weight = torch.full((8, 32), 100.0, dtype=torch.float16)
    weight[:, 16:] = -100.0
    bias = torch.arange(8, dtype=torch.float16)
    y = run(x, weight, bias, LinearConfig(16, 16, 16, SPLIT_K=2))
    assert_close(y, bias.double().expand(2, 8), torch.float16, 32)


# Bits


@pytest.mark.bits
@pytest.mark.parametrize("split", [1, 4])
@each_form
def test_an_image_does_not_see_its_neighbours(
    split: int, transposed: bool, descriptors: bool, run: Run, generator: torch.Generator
) -> None:
    """The same bits wherever in a batch it stands, and from run to run."""
    shape = LinearShape(21, 4, 19, 37)
    x, weight, bias = random_operands(shape, torch.float32, generator)
    config = LinearConfig(*TILE, split, transposed, descriptors=descriptors)
    y = run(x, weight, bias, config, "relu")
    order = torch.randperm(shape.N, generator=generator)
    assert torch.equal(run(x[order], weight, bias, config, "relu"), y[order])


@pytest.mark.bits
@pytest.mark.parametrize("images", [1, 2, 70])
def test_batch_invariant_configuration(
    images: int, arch: int | None, run: Run, generator: torch.Generator
) -> None:
    """An image gives the same bits alone and in a batch of any size."""
    batch = LinearShape(300, 4, 40, 90)
    x, weight, bias = random_operands(batch, torch.float32, generator)
    whole, some = (
        run(
            x[: shape.N],
            weight,
            bias,
            gemm.default_config(shape, torch.float32, "ieee", arch, batch_invariant=True),
        )
        for shape in (batch, dataclasses.replace(batch, N=images))
    )
    assert torch.equal(some, whole[:images])


# Packing, work, default configurations


@given(st.builds(LinearShape, *[st.integers(0, 4)] + [st.integers(1, 5)] * 3))
def test_work_equals_a_count(shape: LinearShape) -> None:
    """A product of ones with ones counts, in each output, its multiplications."""
    x = torch.ones(shape.N, shape.C * shape.P)
    weight = torch.ones(shape.OC, shape.C * shape.P)
    y = gemm.reference(x, weight, None)
    work = gemm.work(shape, torch.float16)
    assert work.flops == 2 * int(y.sum())
    assert work.bytes == 2 * (x.numel() + weight.numel() + shape.OC + y.numel())


architectures = st.sampled_from([None, 80, 86, 89, 90, 100, 120])
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
precisions = st.sampled_from(["ieee", "tf32"])
problems = st.builds(
    LinearShape,
    st.sampled_from([1, 5, 64, 65, 100, 1024, 2000]),
    st.sampled_from([1, 4, 36, 49]),
    st.integers(1, 5000),
    st.integers(1, 20000),
)


@given(problems, dtypes, precisions, architectures, st.booleans())
def test_default_configuration(
    shape: LinearShape, dtype: torch.dtype, precision: str, arch: int | None, invariant: bool
) -> None:
    config = gemm.default_config(shape, dtype, precision, arch, invariant)
    blocks = (config.BLOCK_M, config.BLOCK_N, config.BLOCK_K)
    assert all(block.bit_count() == 1 and block >= 16 for block in blocks)  # what tl.dot wants
    assert all(a * b <= MAX_TILE for a, b in itertools.combinations(blocks, 2))
    assert config.num_warps in (4, 8)
    assert 1 <= config.SPLIT_K <= max(1, shape.P * -(-shape.C // config.BLOCK_K))
    if config.descriptors:
        assert arch is None or arch >= 90
    if arch is not None:
        tile_bytes = (config.BLOCK_M + config.BLOCK_N) * config.BLOCK_K * dtype.itemsize
        assert config.num_stages * tile_bytes <= SHARED_MEMORY[arch]
    if invariant:
        assert config.SPLIT_K == 1
        for n in (1, 65, 5000):
            other = dataclasses.replace(shape, N=n)
            assert gemm.default_config(other, dtype, precision, arch, invariant) == config
