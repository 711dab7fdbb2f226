"""Winograd F(2x2, 3x3): four outputs from 16 products instead of 36.

An output tile of 2x2 pixels sees 4x4 inputs d. With the transforms B, G and A of the source,

    y = A^T [ sum over c of (G g G^T) * (B^T d B) ] A

where * is element by element: 16 independent GEMMs of [tiles, C] x [C, OC]. Only 3x3 filters at
stride 1 in one group can be computed so; an odd output size wastes part of the last tiles.

Layout: x and y channels last; in between V = B^T d B [16, tiles, C] and M [16, tiles, OC] float32.
Cost: 16/36 of the convolution's multiplications, padding included; V is 4 times x, and V and M are
each written and read once.

Rounding: a number of V is a sum of four inputs, so for random ones it is twice as large as they
are, and what rounds it and the products that it enters is twice as large as in an ordinary sum.
Hence TOLERANCE.

Source: A. Lavin, S. Gray, "Fast Algorithms for Convolutional Neural Networks", arXiv:1509.09308
(2015).
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ....kernels.epilogue import finish
from ....kernels.jit import MAX_TILE, Launch, jit, power_of_two
from ..candidate import Config, Conv2dProblem, Declined
from ._gemm import configs as gemm_configs
from ._gemm import gemm, pitch, pitched

OPERATION = "conv2d"
TOLERANCE = 2.0

G = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))


# --- kernels ---------------------------------------------------------------------------------


@jit
def _input_pixel(at, ih, inside, H):
    mask = inside & (ih >= 0)[:, None] & (ih < H)[:, None]
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@jit
def _input_column(x, ih, iw, wanted, H, W, C: tl.constexpr):
    """Column iw of B^T d: four rows from the inputs at rows ih to ih + 3."""
    inside = wanted & (iw >= 0)[:, None] & (iw < W)[:, None]
    at = x + (ih.to(tl.int64) * W + iw)[:, None] * C
    rise = W * C
    d0 = _input_pixel(at, ih, inside, H)
    d1 = _input_pixel(at + rise, ih + 1, inside, H)
    d2 = _input_pixel(at + 2 * rise, ih + 2, inside, H)
    d3 = _input_pixel(at + 3 * rise, ih + 3, inside, H)
    return d0 - d2, d1 + d2, d2 - d1, d1 - d3


@jit
def _input_row(v, t0, t1, t2, t3, wanted, step):
    """One row of (B^T d) B, stored to four of the 16 planes of V."""
    tl.store(v, (t0 - t2).to(v.dtype.element_ty), mask=wanted)
    tl.store(v + step, (t1 + t2).to(v.dtype.element_ty), mask=wanted)
    tl.store(v + 2 * step, (t2 - t1).to(v.dtype.element_ty), mask=wanted)
    tl.store(v + 3 * step, (t1 - t3).to(v.dtype.element_ty), mask=wanted)


@jit
def _input_kernel(
    x,  # [N, H, W, C]
    v,  # [16, N*TH*TW, C], rows PITCH apart
    tiles,  # N*TH*TW
    H,
    W,
    TH,
    TW,
    pad,
    C: tl.constexpr,
    PITCH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tile = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    wanted = (tile < tiles)[:, None] & (c < C)[None, :]
    ih = tile // TW % TH * 2 - pad
    iw = tile % TW * 2 - pad
    image = x + (tile // (TH * TW)).to(tl.int64)[:, None] * (H * W * C) + c[None, :]
    t00, t10, t20, t30 = _input_column(image, ih, iw, wanted, H, W, C)
    t01, t11, t21, t31 = _input_column(image, ih, iw + 1, wanted, H, W, C)
    t02, t12, t22, t32 = _input_column(image, ih, iw + 2, wanted, H, W, C)
    t03, t13, t23, t33 = _input_column(image, ih, iw + 3, wanted, H, W, C)
    step = tiles.to(tl.int64) * PITCH
    target = v + tile.to(tl.int64)[:, None] * PITCH + c[None, :]
    _input_row(target, t00, t01, t02, t03, wanted, step)
    _input_row(target + 4 * step, t10, t11, t12, t13, wanted, step)
    _input_row(target + 8 * step, t20, t21, t22, t23, wanted, step)
    _input_row(target + 12 * step, t30, t31, t32, t33, wanted, step)


@jit
def _output_column(m, wanted, step):
    """One column of A^T M: two rows from the four planes of M that make it up."""
    m0 = tl.load(m, mask=wanted, other=0.0)
    m1 = tl.load(m + 4 * step, mask=wanted, other=0.0)
    m2 = tl.load(m + 8 * step, mask=wanted, other=0.0)
    m3 = tl.load(m + 12 * step, mask=wanted, other=0.0)
    return m0 + m1 + m2, m1 - m2 - m3


@jit
def _output_pixel(y, value, bias, channel, in_range, wanted, ACTIVATION: tl.constexpr):
    value = finish(value, bias, None, None, channel, in_range, ACTIVATION)
    tl.store(y, value.to(y.dtype.element_ty), mask=wanted)


@jit
def _output_kernel(
    m,  # float32 [16, N*TH*TW, OC]
    bias,  # [OC]
    y,  # [N, OH, OW, OC]
    tiles,  # N*TH*TW
    OH,
    OW,
    TH,
    TW,
    OC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    tile = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    here = c < OC
    wanted = (tile < tiles)[:, None] & here[None, :]
    step = tiles.to(tl.int64) * OC
    source = m + tile.to(tl.int64)[:, None] * OC + c[None, :]
    a0, b0 = _output_column(source, wanted, step)
    a1, b1 = _output_column(source + step, wanted, step)
    a2, b2 = _output_column(source + 2 * step, wanted, step)
    a3, b3 = _output_column(source + 3 * step, wanted, step)
    oh = tile // TW % TH * 2
    ow = tile % TW * 2
    pixel = ((tile // (TH * TW)).to(tl.int64) * OH + oh) * OW + ow
    target = y + pixel[:, None] * OC + c[None, :]
    right = wanted & (ow + 1 < OW)[:, None]
    below = wanted & (oh + 1 < OH)[:, None]
    _output_pixel(target, a0 + a1 + a2, bias, c, here, wanted, ACTIVATION)
    _output_pixel(target + OC, a1 - a2 - a3, bias, c, here, right, ACTIVATION)
    target += OW * OC
    _output_pixel(target, b0 + b1 + b2, bias, c, here, below, ACTIVATION)
    _output_pixel(target + OC, b1 - b2 - b3, bias, c, here, right & below, ACTIVATION)


# --- the candidate ---------------------------------------------------------------------------


def _tiles(problem: Conv2dProblem) -> tuple[int, int]:
    """Rows and columns of output tiles."""
    return -(-problem.OH // 2), -(-problem.OW // 2)


def configs(problem: Conv2dProblem) -> list[dict[str, Any]]:
    """Tiles of the GEMM to try."""
    p, (th, tw) = problem, _tiles(problem)
    if (p.KH, p.KW, p.stride, p.dilation, p.groups) != (3, 3, 1, 1, 1):
        raise Declined(
            f"wants 3x3 filters at stride 1 and dilation 1 in one group, got {p.KH}x{p.KW} at "
            f"stride {p.stride} and dilation {p.dilation} in {p.groups}"
        )
    return gemm_configs(p.N * th * tw, p.OC, p.C, p.dtype, p.precision, p.arch)


def prepare(problem: Conv2dProblem, weight: Tensor, config: Config) -> Tensor:
    """The filters transformed, U = G g G^T [16, OC, C], rows padded."""
    transform = torch.tensor(G, dtype=torch.float64, device=weight.device)
    u = torch.einsum("ik,ockl,jl->ijoc", transform, weight.double(), transform)
    return pitched(u.reshape(16, *weight.shape[:2]).to(weight.dtype))


def run(
    problem: Conv2dProblem, x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, config: Config
) -> None:
    """Fill out."""
    p, (th, tw) = problem, _tiles(problem)
    tiles = p.N * th * tw
    v = x.new_empty((16, tiles, pitch(p.C)))[..., : p.C]
    m = x.new_empty((16, tiles, p.OC), dtype=torch.float32)
    places = {"tiles": tiles, "TH": th, "TW": tw}
    into = {"x": x, "v": v, "H": p.H, "W": p.W, "pad": p.padding, "C": p.C, "PITCH": pitch(p.C)}
    _over_tiles(_input_kernel, problem, p.C, tiles, places | into)()
    gemm(v, weight, None, m, config, p.arch, None, p.precision)()
    back = {"m": m, "bias": bias, "y": out, "OH": p.OH, "OW": p.OW, "OC": p.OC}
    _over_tiles(
        _output_kernel, problem, p.OC, tiles, places | back | {"ACTIVATION": p.activation}
    )()


def _over_tiles(
    kernel: Any, problem: Conv2dProblem, channels: int, tiles: int, arguments: dict[str, Any]
) -> Launch:
    """Bind a transform to blocks of tiles and channels."""
    block_c = power_of_two(channels, 16, 512 if problem.arch is None else 64)
    block_p = power_of_two(tiles, 1, MAX_TILE // block_c if problem.arch is None else 8)
    grid = (-(-tiles // block_p), -(-channels // block_c))
    sizes = {"BLOCK_P": block_p, "BLOCK_C": block_c}
    return Launch(kernel, grid, arguments | sizes, num_warps=4, num_stages=1)
