"""Max, average and adaptive average pooling on [H, W, N, C] activations.

    max:       y[oh, ow] = max of x[oh*s - p + kh*d, ow*s - p + kw*d] over the taps inside the image
    average:   y[oh, ow] = sum of the same / (taps inside, or all taps that padding covers)
    adaptive:  y[oh, ow] = mean of x[oh*H//OH : ceil((oh+1)*H/OH), the same for columns]

Pooling never mixes images or channels, so each pixel is one flat vector of N * C numbers and a tap
is a vector load at another pixel: a tile is BLOCK_P output pixels by BLOCK_R numbers. In a view
whose images do not lie one after the other, the vector has gaps between images. Sums are
float32. Cost: KH * KW comparisons or additions per output; x and y move once if neighbouring
windows find their overlap in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl

from . import layout
from .jit import Kernel, Launch, Work, fields_of, jit, power_of_two
from .pdl import begin


@dataclass(frozen=True, slots=True)
class PoolShape:
    """One pooling problem; pairs are (height, width).

    OH and OW are given, since `ceil_mode` decides them; adaptive pooling has no kernel.
    """

    N: int
    C: int
    H: int
    W: int
    OH: int
    OW: int
    kernel: tuple[int, int] = (0, 0)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def adaptive(self) -> bool:
        """Whether the windows divide the image evenly instead of sliding over it."""
        return self.kernel == (0, 0)


# --- kernels ---------------------------------------------------------------------------------


@jit
def _numbers(r, IMAGE: tl.constexpr, PITCH: tl.constexpr):
    """Where the numbers r of a pixel lie, whose images of PITCH numbers are IMAGE apart."""
    offset = r
    if IMAGE != PITCH:
        offset = (r // PITCH).to(tl.int64) * IMAGE + r % PITCH
    return offset


@jit(do_not_specialize=("H", "W", "OH", "OW", "x_h", "x_w", "y_h", "y_w"))
def _max_pool2d_kernel(
    x,  # [H, W, N, C]: R = N * PITCH numbers a pixel
    y,  # [OH, OW, N, C]
    R,
    H,
    W,
    OH,
    OW,
    x_h,  # strides in units of 8 elements
    x_w,
    y_h,
    y_w,
    X_N: tl.constexpr,  # strides from image to image, in elements
    Y_N: tl.constexpr,
    PITCH: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    r_blocks = (R + BLOCK_R - 1) // BLOCK_R
    program = tl.program_id(0)
    r = (program % r_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    pixel = (program // r_blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = (pixel < OH * OW)[:, None] & (r < R)[None, :]
    oh = pixel // OW
    ow = pixel % OW
    ih0 = oh * STRIDE_H - PAD_H
    iw0 = ow * STRIDE_W - PAD_W
    x += _numbers(r, X_N, PITCH)[None, :]
    best = tl.full((BLOCK_P, BLOCK_R), float("-inf"), x.dtype.element_ty)
    # Unrolled, a window's loads are all under way at once, but a large one compiles for minutes.
    UNROLL: tl.constexpr = KH * KW if KH * KW <= 16 else 4
    for tap in tl.range(KH * KW, loop_unroll_factor=UNROLL):
        ih = ih0 + tap // KW * DILATION_H
        iw = iw0 + tap % KW * DILATION_W
        valid = (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W)
        start = (ih.to(tl.int64) * x_h + iw.to(tl.int64) * x_w) * 8
        value = tl.load(x + start[:, None], mask=inside & valid[:, None], other=float("-inf"))
        best = tl.maximum(best, value, propagate_nan=tl.PropagateNan.ALL).to(best.dtype)
    start = (oh.to(tl.int64) * y_h + ow.to(tl.int64) * y_w) * 8
    tl.store(y + _numbers(r, Y_N, PITCH)[None, :] + start[:, None], best, mask=inside)


@jit(do_not_specialize=("H", "W", "OH", "OW", "x_h", "x_w", "y_h", "y_w"))
def _avg_pool2d_kernel(
    x,  # [H, W, N, C]
    y,  # [OH, OW, N, C]
    R,
    H,
    W,
    OH,
    OW,
    x_h,
    x_w,
    y_h,
    y_w,
    X_N: tl.constexpr,
    Y_N: tl.constexpr,
    PITCH: tl.constexpr,
    KH,
    KW,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    COUNT_PADDING: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    r_blocks = (R + BLOCK_R - 1) // BLOCK_R
    program = tl.program_id(0)
    r = (program % r_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    pixel = (program // r_blocks) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = (pixel < OH * OW)[:, None] & (r < R)[None, :]
    oh = pixel // OW
    ow = pixel % OW
    if ADAPTIVE:  # KH and KW are the largest windows
        ih0 = oh * H // OH
        iw0 = ow * W // OW
        ih1 = ((oh + 1) * H + OH - 1) // OH
        iw1 = ((ow + 1) * W + OW - 1) // OW
        count = (ih1 - ih0) * (iw1 - iw0)
    else:
        ih0 = oh * STRIDE_H - PAD_H
        iw0 = ow * STRIDE_W - PAD_W
        # torch: padding counts, but not what ceil_mode adds beyond the padding.
        ih1 = tl.minimum(ih0 + KH, H + PAD_H)
        iw1 = tl.minimum(iw0 + KW, W + PAD_W)
        count = (ih1 - ih0) * (iw1 - iw0)
        ih1 = tl.minimum(ih1, H)
        iw1 = tl.minimum(iw1, W)
        if not COUNT_PADDING:
            count = (ih1 - tl.maximum(ih0, 0)) * (iw1 - tl.maximum(iw0, 0))
    x += _numbers(r, X_N, PITCH)[None, :]
    total = tl.full((BLOCK_P, BLOCK_R), 0.0, tl.float32)
    for tap in range(KH * KW):
        ih = ih0 + tap // KW
        iw = iw0 + tap % KW
        valid = (ih >= 0) & (ih < ih1) & (iw >= 0) & (iw < iw1)
        start = (ih.to(tl.int64) * x_h + iw.to(tl.int64) * x_w) * 8
        value = tl.load(x + start[:, None], mask=inside & valid[:, None], other=0.0)
        total += value.to(tl.float32)
    mean = total / count.to(tl.float32)[:, None]
    start = (oh.to(tl.int64) * y_h + ow.to(tl.int64) * y_w) * 8
    target = y + _numbers(r, Y_N, PITCH)[None, :] + start[:, None]
    tl.store(target, mean.to(y.dtype.element_ty), mask=inside)


# --- configurations --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PoolConfig:
    """Output pixels and numbers per pixel of a tile."""

    BLOCK_P: int
    BLOCK_R: int
    num_warps: int = 4


def default_config(shape: PoolShape, arch: int | None) -> PoolConfig:
    """A configuration that runs without a measurement; `arch` None is the interpreter."""
    numbers = shape.N * layout.aligned(shape.C)
    if arch is None:
        block_r = power_of_two(numbers, 1, 65536)
        return PoolConfig(power_of_two(shape.OH * shape.OW, 1, max(1, 262144 // block_r)), block_r)
    block_r = power_of_two(numbers, 64, 1024)
    return PoolConfig(1024 // block_r, block_r)


# --- launchers -------------------------------------------------------------------------------


def max_pool2d(x: torch.Tensor, out: torch.Tensor, shape: PoolShape, config: PoolConfig) -> Launch:
    """Bind one max-pool; calling the result fills `out` [OH, OW, N, C] from x [H, W, N, C].

    Both may be views that `layout.strides` takes.
    """
    extra = {
        "KH": shape.kernel[0],
        "KW": shape.kernel[1],
        "DILATION_H": shape.dilation[0],
        "DILATION_W": shape.dilation[1],
    }
    return _bind(_max_pool2d_kernel, x, out, shape, config, extra)


def avg_pool2d(
    x: torch.Tensor,
    out: torch.Tensor,
    shape: PoolShape,
    config: PoolConfig,
    count_include_pad: bool = True,
) -> Launch:
    """Bind one average-pool, sliding or adaptive; calling the result fills `out` [OH, OW, N, C].

    x [H, W, N, C] and out may be views that `layout.strides` takes.
    """
    kernel = shape.kernel
    if shape.adaptive:  # a window covers ceil(H / OH) rows, and one more where it straddles
        kernel = (_largest_window(shape.H, shape.OH), _largest_window(shape.W, shape.OW))
    extra = {
        "KH": kernel[0],
        "KW": kernel[1],
        "ADAPTIVE": shape.adaptive,
        "COUNT_PADDING": count_include_pad,
    }
    return _bind(_avg_pool2d_kernel, x, out, shape, config, extra)


def _largest_window(size: int, out: int) -> int:
    return max(-(-(o + 1) * size // out) - o * size // out for o in range(out))


def _bind(
    kernel: Kernel,
    x: torch.Tensor,
    out: torch.Tensor,
    shape: PoolShape,
    config: PoolConfig,
    extra: dict[str, int | bool],
) -> Launch:
    numbers = shape.N * layout.aligned(shape.C)
    layout.check_rows("pooling", max(numbers, shape.OH * shape.OW), config.BLOCK_R)
    arguments = {
        "x": x,
        "y": out,
        "R": numbers,
        **fields_of(shape, "H", "W", "OH", "OW"),
        **layout.addressed("x", x),
        **layout.addressed("y", out),
        "PITCH": layout.aligned(shape.C),
        "STRIDE_H": shape.stride[0],
        "STRIDE_W": shape.stride[1],
        "PAD_H": shape.padding[0],
        "PAD_W": shape.padding[1],
        **fields_of(config, "BLOCK_P", "BLOCK_R"),
        "PDL": False,
        **extra,
    }
    programs = -(-shape.OH * shape.OW // config.BLOCK_P) * -(-numbers // config.BLOCK_R)
    return Launch(kernel, (programs,), arguments, config.num_warps, num_stages=1)


# --- references and work ---------------------------------------------------------------------


def max_reference(x: torch.Tensor, shape: PoolShape, ceil_mode: bool = False) -> torch.Tensor:
    """Max-pooling in float64 by torch: [N, C, H, W] to [N, C, OH, OW]."""
    return torch.nn.functional.max_pool2d(
        x.double(), shape.kernel, shape.stride, shape.padding, shape.dilation, ceil_mode
    )


def avg_reference(
    x: torch.Tensor, shape: PoolShape, ceil_mode: bool = False, count_include_pad: bool = True
) -> torch.Tensor:
    """Average-pooling in float64 by torch, sliding or adaptive: [N, C, H, W] to [N, C, OH, OW]."""
    if shape.adaptive:
        return torch.nn.functional.adaptive_avg_pool2d(x.double(), (shape.OH, shape.OW))
    return torch.nn.functional.avg_pool2d(
        x.double(), shape.kernel, shape.stride, shape.padding, ceil_mode, count_include_pad
    )


def work(shape: PoolShape, dtype: torch.dtype) -> Work:
    """One operation per tap and output; x and y moved once."""
    taps = shape.kernel[0] * shape.kernel[1]
    if shape.adaptive:
        taps = _largest_window(shape.H, shape.OH) * _largest_window(shape.W, shape.OW)
    pixels = shape.H * shape.W + shape.OH * shape.OW
    flops = shape.N * shape.C * shape.OH * shape.OW * taps
    return Work(flops, shape.N * shape.C * pixels * dtype.itemsize)
