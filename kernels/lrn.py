"""Local response normalisation across channels, as in the 2012 AlexNet (and torch).

    y[c] = x[c] / (k + alpha/size * sum of x[j]^2 for j from c - size//2 to c + (size-1)//2) ^ beta

A tile is BLOCK_M pixels of all channels; the window's neighbours are loaded again at a shift and
found in the cache. Squares and sums are float32, so half precision neither overflows nor loses the
sum. Cost: size multiply-adds and one power per element; x and y move once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl

from . import layout
from .jit import Launch, Work, fields_of, jit, power_of_two
from .pdl import begin


@dataclass(frozen=True, slots=True)
class LRNShape:
    """M pixels (all images together) of C channels, and the window's size.

    A window reaches over the channels of its own group only.
    """

    M: int
    C: int
    size: int
    groups: int = 1


@jit
def _inverse_power(base, beta):
    """base^-beta, with pow's answer for a negative base (alpha or k may be) and for beta = 0."""
    power = tl.exp2(-beta * tl.log2(tl.abs(base)))
    mirrored = tl.where(tl.floor(beta * 0.5) == beta * 0.5, power, -power)
    negative = tl.where(tl.floor(beta) == beta, mirrored, float("nan"))
    return tl.where(beta == 0.0, 1.0, tl.where(base < 0.0, negative, power))


@jit(do_not_specialize=("M", "W", "N", "x_h", "x_w", "y_h", "y_w", "alpha", "beta", "k"))
def _lrn_kernel(
    x,  # [H, W, N, C]: M = H * W * N rows
    y,  # [H, W, N, C]
    M,
    W,
    N,
    x_h,  # strides in units of 8 elements
    x_w,
    y_h,
    y_w,
    alpha,  # already divided by the size
    beta,
    k,
    X_N: tl.constexpr,  # strides from image to image, in elements
    Y_N: tl.constexpr,
    C: tl.constexpr,
    SIZE: tl.constexpr,
    GROUP: tl.constexpr,  # channels of one group
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = (row % N).to(tl.int64)
    w = (row // N % W).to(tl.int64)
    h = (row // N // W).to(tl.int64)
    x += ((h * x_h + w * x_w) * 8 + n * X_N)[:, None]
    y += ((h * y_h + w * y_w) * 8 + n * Y_N)[:, None]
    inside = (row < M)[:, None] & (c < C)[None, :]
    total = tl.full((BLOCK_M, BLOCK_C), 0.0, tl.float32)
    for j in range(SIZE):
        near = c + j - SIZE // 2
        mask = inside & ((near >= 0) & (near < C) & (near // GROUP == c // GROUP))[None, :]
        value = tl.load(x + near[None, :], mask=mask, other=0.0).to(tl.float32)
        total += value * value
    value = tl.load(x + c[None, :], mask=inside, other=0.0).to(tl.float32)
    scale = _inverse_power(k + alpha * total, beta)
    tl.store(y + c[None, :], (value * scale).to(y.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True)
class LRNConfig:
    """Pixels and channels of a tile."""

    BLOCK_M: int
    BLOCK_C: int
    num_warps: int = 4


def default_config(shape: LRNShape, arch: int | None) -> LRNConfig:
    """A configuration that runs without a measurement; `arch` None is the interpreter."""
    if arch is None:
        block_c = power_of_two(shape.C, 1, 4096)
        return LRNConfig(power_of_two(shape.M, 1, max(1, 262144 // block_c)), block_c)
    block_c = power_of_two(shape.C, 16, 256)
    return LRNConfig(2048 // block_c, block_c)


def local_response_norm(
    x: torch.Tensor,
    out: torch.Tensor,
    shape: LRNShape,
    config: LRNConfig,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
) -> Launch:
    """Bind one normalisation; calling the result fills `out` from x, activations [H, W, N, C].

    Both may be views that `layout.strides` takes.
    """
    layout.check_rows("local_response_norm", shape.M, config.BLOCK_M)
    arguments = {
        "x": x,
        "y": out,
        "M": shape.M,
        "W": x.shape[1],
        "N": x.shape[2],
        **layout.addressed("x", x),
        **layout.addressed("y", out),
        "alpha": alpha / shape.size,
        "beta": float(beta),  # an integer would be one in the kernel too
        "k": float(k),
        "C": shape.C,
        "SIZE": shape.size,
        "GROUP": shape.C // shape.groups,
        **fields_of(config, "BLOCK_M", "BLOCK_C"),
        "PDL": False,
    }
    grid = (-(-shape.M // config.BLOCK_M), -(-shape.C // config.BLOCK_C))
    return Launch(_lrn_kernel, grid, arguments, config.num_warps, num_stages=1)


def reference(
    x: torch.Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> torch.Tensor:
    """The same normalisation in float64 by torch: [N, C, ...] to [N, C, ...]."""
    return torch.nn.functional.local_response_norm(x.double(), size, alpha, beta, k)


def work(shape: LRNShape, dtype: torch.dtype) -> Work:
    """A multiply-add per window element, and the scaling; x and y moved once."""
    elements = shape.M * shape.C
    return Work(elements * (2 * shape.size + 4), 2 * elements * dtype.itemsize)
