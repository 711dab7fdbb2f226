"""The distance of two images in one layer: LPIPS (Zhang et al., CVPR 2018, eq. 1).

    unit(x)[c] = x[c] / (sqrt(sum over j of x[j]^2) + 1e-10)
    y[p] = sum over c of weight[c] * (unit(a[p])[c] - unit(b[p])[c])^2
    distance = mean of y over the pixels p of a pair

A tile is BLOCK_M pixels of all C channels, of a and of b, in float32: both are read once, where the
convolution left them, [H, W, N, C], in any strides that `layout.strides` takes, so one image may
stand against many. y is [H, W, N], an image's pixels N apart; a second kernel means them, a
program a pair, in the same order for every pair. So a pair has the same bits wherever it stands,
and nothing is added by atomics. Cost: ten operations a channel; a and b move once, and y, which is
C times smaller, twice.

The 1e-10 stands outside of the root, as in LPIPS 0.1: a pixel of zeros is zeros, and one whose norm
is near 1e-10 is shorter than one. torchmetrics 1.9 adds 1e-8 under the root.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl

from . import layout
from .jit import MAX_TILE, Launch, Work, jit, power_of_two


@dataclass(frozen=True, slots=True)
class DistanceShape:
    """N pairs of activations of C channels on H x W pixels."""

    N: int
    C: int
    H: int
    W: int


@jit
def _unit(x):
    """Pixels [BLOCK_M, BLOCK_C], each divided by its norm over the channels."""
    norm = tl.sqrt(tl.reduce(x * x, 1, tl.standard._sum_combine))
    return x * (1.0 / (norm + 1e-10))[:, None]


@jit(do_not_specialize=("M", "W", "N", "a_h", "a_w", "a_n", "b_h", "b_w", "b_n"))
def _distance_kernel(
    a,  # [H, W, N, C]: M = H * W * N rows
    b,
    weight,  # float32 [C]
    y,  # float32 [M]
    M,
    W,
    N,
    a_h,  # strides in units of 8 elements
    a_w,
    a_n,
    b_h,
    b_w,
    b_n,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_C)
    n = (row % N).to(tl.int64)
    w = (row // N % W).to(tl.int64)
    h = (row // N // W).to(tl.int64)
    a += ((h * a_h + w * a_w + n * a_n) * 8)[:, None] + c[None, :]
    b += ((h * b_h + w * b_w + n * b_n) * 8)[:, None] + c[None, :]
    inside = (row < M)[:, None] & (c < C)[None, :]
    unit_a = _unit(tl.load(a, mask=inside, other=0.0).to(tl.float32))
    unit_b = _unit(tl.load(b, mask=inside, other=0.0).to(tl.float32))
    # Not the difference itself: fused with one of the products it would not be zero for equals.
    apart = tl.maximum(unit_a, unit_b, tl.PropagateNan.ALL)
    apart -= tl.minimum(unit_a, unit_b, tl.PropagateNan.ALL)
    weights = tl.load(weight + c, mask=c < C, other=0.0)
    total = tl.reduce(weights[None, :] * (apart * apart), 1, tl.standard._sum_combine)
    tl.store(y + row, total, mask=row < M)


@jit(do_not_specialize=("M", "N"))
def _mean_kernel(
    x,  # float32 [M, N]
    y,  # float32 [N]
    M,
    N,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0)
    total = tl.full((BLOCK,), 0.0, tl.float32)
    for start in range(0, M, BLOCK):
        pixel = start + tl.arange(0, BLOCK)
        total += tl.load(x + pixel.to(tl.int64) * N + n, mask=pixel < M, other=0.0)
    tl.store(y + n, tl.reduce(total, 0, tl.standard._sum_combine) / M)


@dataclass(frozen=True, slots=True)
class DistanceConfig:
    """Pixels of a tile, which holds all channels, and those that a mean reads at a time."""

    BLOCK_M: int
    BLOCK: int
    num_warps: int = 4


def default_config(shape: DistanceShape, arch: int | None) -> DistanceConfig:
    """A configuration that runs without a measurement; `arch` None is the interpreter."""
    block_c = power_of_two(shape.C, 16, MAX_TILE)
    pixels = shape.H * shape.W
    if arch is None:
        rows = power_of_two(pixels * shape.N, 1, max(1, 262144 // block_c))
        return DistanceConfig(rows, power_of_two(pixels, 1, 8192))
    return DistanceConfig(max(1, 2048 // block_c), 512)


def distances(
    a: torch.Tensor,
    b: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    shape: DistanceShape,
    config: DistanceConfig,
) -> Launch:
    """Bind the distances of every pixel; calling the result fills `out`, float32 [H, W, N], dense.

    a and b are activations [H, W, N, C], or views that `layout.strides` takes; weight is float32
    [C]. Raises ValueError for more channels than one tile holds.
    """
    if shape.C > MAX_TILE:
        raise ValueError(f"distances: wanted at most {MAX_TILE} channels, got {shape.C}")
    rows = shape.H * shape.W * shape.N
    layout.check_rows("distances", rows, config.BLOCK_M)
    strides = {
        f"{name}_{axis}": step
        for name, x in (("a", a), ("b", b))
        for axis, step in zip("hwn", layout.strides(x), strict=True)
    }
    arguments = {
        **{"a": a, "b": b, "weight": weight, "y": out},
        **{"M": rows, "W": shape.W, "N": shape.N},
        **strides,
        "C": shape.C,
        "BLOCK_M": config.BLOCK_M,
        "BLOCK_C": power_of_two(shape.C, 16, MAX_TILE),
    }
    grid = (-(-rows // config.BLOCK_M),)
    return Launch(_distance_kernel, grid, arguments, config.num_warps, num_stages=1)


def means(
    x: torch.Tensor, out: torch.Tensor, shape: DistanceShape, config: DistanceConfig
) -> Launch:
    """Bind the mean over pixels; calling the result fills `out`, float32 [N], from x [H, W, N]."""
    arguments = {"x": x, "y": out, "M": shape.H * shape.W, "N": shape.N, "BLOCK": config.BLOCK}
    return Launch(_mean_kernel, (shape.N,), arguments, config.num_warps, num_stages=1)


def reference(a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The same distances of pixels in float64 by torch: [N, C, H, W] twice to [N, H, W]."""
    a, b = (x.double() / (x.double().norm(dim=1, keepdim=True) + 1e-10) for x in (a, b))
    return torch.einsum("nchw,c->nhw", (a - b) ** 2, weight.double())


def work(shape: DistanceShape, dtype: torch.dtype) -> Work:
    """Per channel two squares, two sums, two divisions and four for what is apart; a and b move
    once, and y is written and read.
    """
    rows = shape.N * shape.H * shape.W
    moved = 2 * rows * shape.C * dtype.itemsize + 2 * 4 * rows
    return Work(10 * rows * shape.C, moved)
