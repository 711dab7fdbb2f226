"""Convolution + epilogue on [H, W, N, C] activations, as an implicit GEMM.

    y[oh, ow, n, oc] = act(bias[oc] + sum over kh, kw, c of
                           x[oh*sh - ph + kh*dh, ow*sw - pw + kw*dw, n, c] * w[oc, c, kh, kw])

No im2col matrix is ever written: the GEMM's A operand is read straight from the activation, one
filter tap and one block of channels at a time. The two tilings differ in what a row of A is.

- `rows`: the rows of a tile run over (output column, image) of ONE output row, images fastest. At
  stride 1 what a tap wants of them lies KW-fashion in the input row: the same rows moved by
  (kw*dw - pw) * N, one contiguous box of x, and beyond its ends the padding. So any batch fills
  tiles, and a tap that no row of the tile can use is skipped, not multiplied by zero (9 to 10 % of
  AlexNet's conv2 to conv5 where a tile is images of one pixel). At larger strides a tile stays in
  one output column. Loads are tensor descriptors: TMA on Hopper, masked pointers before it.
- `pixels`: the rows of a tile run over (output row, output column, image), for batches too small to
  fill a tile with one output row. Rows are gathered through pointers, those outside the image
  masked.

Both take any stride, padding, dilation and number of groups, and add the same products in the same
order, so at equal blocks they agree bit for bit.

What limits the matrix units of a Hopper GPU is how fast tiles of operands arrive from the L2 cache,
in proportion to 1/BLOCK_M + 1/BLOCK_N; blocks are powers of two, so the `rows` tiling can keep a
second accumulator: of BLOCK_N2 filters that shares the tile of x (192 filters are 128 + 64), or of
BLOCK_M2 rows that shares the tile of w (192 rows of 256 filters fill the registers).
With few images there are few tiles, and the sum over K can be split among SPLIT_K programs, of
which the last to arrive adds the parts (see split_k.py). A split sum skips no taps: which part a
tap belongs to must not depend on the tile, or an image's bits would on its neighbours.

Cost: 2 * N * OH * OW * OC * KH * KW * C/groups
FLOPs, less the skipped taps; x, w and y move once if the cache does its part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import cost, layout
from .epilogue import Activated, activated, check_activation, finish
from .jit import MAX_TILE, Launch, Work, fields_of, jit, power_of_two
from .pdl import announce, begin, first_steps, prefetch, wait
from .split_k import (
    add_parts,
    arrived_last,
    at_least_one,
    counters_for,
    filled,
    parts_of,
    scratch_size,
)

# Integers that vary from layer to layer without needing another binary.
_GEOMETRY = (
    *("N", "H", "W", "OH", "OW", "KH", "KW", "stride_h", "stride_w"),
    *("pad_h", "pad_w", "dilation_h", "dilation_w", "x_h", "x_w", "y_h", "y_w"),
)


@dataclass(frozen=True, slots=True)
class Conv2dShape:
    """One convolution problem; `padding` is (top, bottom, left, right), pairs (height, width)."""

    N: int
    C: int
    H: int
    W: int
    OC: int
    KH: int
    KW: int
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def OH(self) -> int:
        """Output rows."""
        reach = self.dilation[0] * (self.KH - 1) + 1
        return (self.H + self.padding[0] + self.padding[1] - reach) // self.stride[0] + 1

    @property
    def OW(self) -> int:
        """Output columns."""
        reach = self.dilation[1] * (self.KW - 1) + 1
        return (self.W + self.padding[2] + self.padding[3] - reach) // self.stride[1] + 1


# --- kernels ---------------------------------------------------------------------------------


@jit
def _load_filters(
    w, tap, oc, c, OC, C, DESCRIPTORS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Tile [BLOCK_N, BLOCK_K] of the weights [KH*KW, OC, C] at (tap, oc, c); zero beyond."""
    if DESCRIPTORS:
        tile = w.load([tap, oc, c]).reshape(BLOCK_N, BLOCK_K)
    else:
        n = oc + tl.arange(0, BLOCK_N)
        k = c + tl.arange(0, BLOCK_K)
        source = w + (tap * OC + n)[:, None] * ((C + 7) // 8 * 8) + k[None, :]
        tile = tl.load(source, mask=(n < OC)[:, None] & (k < C)[None, :], other=0.0)
    return tile


@jit
def _load_rows(
    x,
    ih,
    group,
    r,
    c,
    H,
    rows,
    x_h,
    X_N: tl.constexpr,
    GROUPS: tl.constexpr,
    C: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Tile [BLOCK_M, BLOCK_K] of x at (ih, r, c), r counting (column, image); zero beyond."""
    if DESCRIPTORS and GROUPS == 1:
        tile = x.load([ih, r, c]).reshape(BLOCK_M, BLOCK_K)
    elif DESCRIPTORS:
        tile = x.load([ih, group, r, c]).reshape(BLOCK_M, BLOCK_K)
    else:
        row = r + tl.arange(0, BLOCK_M)
        k = c + tl.arange(0, BLOCK_K)
        inside = (row >= 0) & (row < rows) & (ih >= 0) & (ih < H)
        source = x + ih.to(tl.int64) * x_h * 8 + row.to(tl.int64)[:, None] * X_N
        source += (group * C + k)[None, :]
        tile = tl.load(source, mask=inside[:, None] & (k < C)[None, :], other=0.0)
    return tile


@jit
def _starts(oh, m, N, y_h, y_w, Y_N: tl.constexpr, DENSE: tl.constexpr):
    """Where rows m, counting (column, image), of output row oh start in y; int64."""
    if DENSE:  # costs fewer registers
        start = oh.to(tl.int64) * y_h * 8 + m.to(tl.int64) * Y_N
    else:
        start = (oh.to(tl.int64) * y_h + (m // N).to(tl.int64) * y_w) * 8
        start += (m % N).to(tl.int64) * Y_N
    return start


@jit
def _store_tile(
    acc,
    y,
    start,  # int64: where each row of the tile starts in y
    row_in_range,
    bias,
    scale,
    shift,
    group,
    oc,
    OC,
    BLOCK_N: tl.constexpr,
    ACTIVATION,
):
    """The epilogue of a tile of filters `oc` and on."""
    channel = oc + tl.arange(0, BLOCK_N)
    acc = finish(acc, bias, scale, shift, group * OC + channel, channel < OC, ACTIVATION)
    target = y + start[:, None] + (group * OC + channel)[None, :]
    inside = row_in_range[:, None] & (channel < OC)[None, :]
    tl.store(target, acc.to(y.dtype.element_ty), mask=inside)


@jit
def _end_tile(
    acc,
    y,
    start,  # int64: where each row of the tile starts in y
    row,  # its number among all, (oh, ow, n)
    rows,  # how many there are
    row_in_range,
    bias,
    scale,
    shift,
    parts,
    counters,
    group,
    oc,
    OC: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_K: tl.constexpr,
    ACTIVATION,
):
    """The end of a tile of filters `oc` and on; of a split one, by the last program to arrive."""
    if SPLIT_K == 1:
        _store_tile(
            acc, y, start, row_in_range, bias, scale, shift, group, oc, OC, BLOCK_N, ACTIVATION
        )
    else:
        channel = oc + tl.arange(0, BLOCK_N)
        inside = row_in_range[:, None] & (channel < OC)[None, :]
        PITCH: tl.constexpr = (GROUPS * OC + 7) // 8 * 8
        places = parts + row.to(tl.int64)[:, None] * PITCH + (group * OC + channel)[None, :]
        size = tl.full((), PITCH, tl.int64) * rows  # rows may be a constant
        tl.store(places + tl.program_id(1) * size, acc, mask=inside)
        if arrived_last(counters + tl.program_id(0), SPLIT_K):
            acc = add_parts(places, size, inside, BLOCK_M, BLOCK_N, SPLIT_K)
            _store_tile(
                acc, y, start, row_in_range, bias, scale, shift, group, oc, OC, BLOCK_N, ACTIVATION
            )


@jit(do_not_specialize=("step", "steps", *_GEOMETRY))
def _conv2d_rows_kernel(
    x,  # [H, W*N, GROUPS*C], as a descriptor (with groups [H, GROUPS, W*N, C]) or a pointer
    x2,  # the same in blocks of BLOCK_M2
    w,  # [KH*KW, GROUPS*OC, C aligned], as a descriptor or a pointer
    w2,  # the same in blocks of BLOCK_N2
    bias,  # [GROUPS*OC] or None
    scale,  # float32 [GROUPS*OC] or None
    shift,  # float32 [GROUPS*OC] or None
    y,  # [OH, OW, N, GROUPS*OC]
    parts,  # float32 [SPLIT_K, OH*OW*N, GROUPS*OC aligned] or None
    counters,  # int32, zero: one a tile, or None
    steps,  # tiles of an output row and a panel of images: see `_tiles`
    step,  # rows from one of them to the next
    N,
    H,
    W,
    OH,
    OW,
    KH,
    KW,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    x_h,  # strides of x and y in units of 8 elements: their alignment is known that way
    y_h,
    y_w,
    X_N: tl.constexpr,  # strides from image to image, in elements
    Y_N: tl.constexpr,
    DENSE: tl.constexpr,  # whether y's pixels lie one after the other
    SPANS: tl.constexpr,  # whether a tile may span output columns: at stride 1
    GROUPS: tl.constexpr,
    C: tl.constexpr,  # channels per group
    OC: tl.constexpr,  # filters per group
    BLOCK_M: tl.constexpr,
    BLOCK_M2: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_N2: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    MEETS: tl.constexpr,  # whether every window meets the image
    DESCRIPTORS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    # Filter blocks run fastest, then the columns of an output row, then output rows, then panels of
    # images: what runs together shares its x.
    ROWS: tl.constexpr = BLOCK_M + BLOCK_M2
    FILTERS: tl.constexpr = BLOCK_N + BLOCK_N2
    OC_BLOCKS: tl.constexpr = (OC + FILTERS - 1) // FILTERS
    program = tl.program_id(0)
    oc0 = (program % OC_BLOCKS) * FILTERS
    program = program // OC_BLOCKS
    group = program % GROUPS
    program = program // GROUPS
    column = program % steps
    program = program // steps
    oh = program % OH
    panel = (program // OH) * ROWS
    m0 = column * step + panel  # (ow, n) of the output row, n fastest
    if SPANS:
        end = OW * N
        first_column = m0 // N
        last_column = (tl.minimum(m0 + ROWS, end) - 1) // N
        r0 = m0 - pad_w * N  # the same of the input row, for the first tap
    else:
        end = (column + 1) * N
        first_column = column
        last_column = column
        r0 = (column * stride_w - pad_w) * N + panel

    # The taps that fall inside the image, for some row, are a rectangle [kh_lo, kh_hi) x
    # [kw_lo, kw_hi).
    ih0 = oh * stride_h - pad_h
    C_BLOCKS: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    if SPLIT_K == 1:
        leftmost = first_column * stride_w - pad_w
        rightmost = last_column * stride_w - pad_w
        kh_lo = tl.maximum(0, (dilation_h - 1 - ih0) // dilation_h)
        kw_lo = tl.maximum(0, (dilation_w - 1 - rightmost) // dilation_w)
        kh_hi = tl.minimum(KH, (tl.maximum(H - ih0, 0) + dilation_h - 1) // dilation_h)
        kw_hi = tl.minimum(KW, (tl.maximum(W - leftmost, 0) + dilation_w - 1) // dilation_w)
        turns = tl.maximum(kh_hi - kh_lo, 0) * tl.maximum(kw_hi - kw_lo, 0) * C_BLOCKS
        if MEETS:
            turns = at_least_one(turns)
        kh = kh_lo
        kw = kw_lo
        c0 = 0
    else:
        all_turns = KH * KW * C_BLOCKS
        per_part = (all_turns + SPLIT_K - 1) // SPLIT_K
        first = tl.program_id(1) * per_part
        turns = at_least_one(tl.minimum(per_part, all_turns - first))
        kw_lo = 0
        kw_hi = KW
        kh = first // C_BLOCKS // KW
        kw = first // C_BLOCKS % KW
        c0 = (first % C_BLOCKS) * BLOCK_K

    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    if BLOCK_M2 > 0:
        acc2 = tl.full((BLOCK_M2, BLOCK_N), 0.0, tl.float32)
    if BLOCK_N2 > 0:
        acc2 = tl.full((BLOCK_M, BLOCK_N2), 0.0, tl.float32)
    for _ in range(turns):
        ih = ih0 + kh * dilation_h
        r = r0 + kw * dilation_w * N
        a = _load_rows(
            x, ih, group, r, c0, H, W * N, x_h, X_N, GROUPS, C, DESCRIPTORS, BLOCK_M, BLOCK_K
        )
        filters = group * OC + oc0
        b = _load_filters(
            w, kh * KW + kw, filters, c0, GROUPS * OC, C, DESCRIPTORS, BLOCK_N, BLOCK_K
        )
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
        if BLOCK_M2 > 0:
            r += BLOCK_M
            a2 = _load_rows(
                x2, ih, group, r, c0, H, W * N, x_h, X_N, GROUPS, C, DESCRIPTORS, BLOCK_M2, BLOCK_K
            )
            acc2 = tl.dot(a2, b.T, acc2, input_precision=PRECISION)
        if BLOCK_N2 > 0:
            filters += BLOCK_N
            b2 = _load_filters(
                w2, kh * KW + kw, filters, c0, GROUPS * OC, C, DESCRIPTORS, BLOCK_N2, BLOCK_K
            )
            acc2 = tl.dot(a, b2.T, acc2, input_precision=PRECISION)
        # Counted on from tap to tap: a division costs some twenty instructions.
        c0 += BLOCK_K
        kw = tl.where(c0 >= C, kw + 1, kw)
        c0 = tl.where(c0 >= C, 0, c0)
        kh = tl.where(kw >= kw_hi, kh + 1, kh)
        kw = tl.where(kw >= kw_hi, kw_lo, kw)

    if BLOCK_M2 > 0:  # first: after the larger one it would spill
        m = m0 + BLOCK_M + tl.arange(0, BLOCK_M2)
        start = _starts(oh, m, N, y_h, y_w, Y_N, DENSE)
        _store_tile(
            acc2, y, start, m < end, bias, scale, shift, group, oc0, OC, BLOCK_N, ACTIVATION
        )
    m = m0 + tl.arange(0, BLOCK_M)
    inside = m < end
    start = _starts(oh, m, N, y_h, y_w, Y_N, DENSE)
    row = oh * (OW * N) + m
    rows = OH * OW * N
    _end_tile(
        acc,
        y,
        start,
        row,
        rows,
        inside,
        bias,
        scale,
        shift,
        parts,
        counters,
        group,
        oc0,
        OC,
        GROUPS,
        BLOCK_M,
        BLOCK_N,
        SPLIT_K,
        ACTIVATION,
    )
    if BLOCK_N2 > 0:
        oc0 += BLOCK_N
        _store_tile(
            acc2, y, start, inside, bias, scale, shift, group, oc0, OC, BLOCK_N2, ACTIVATION
        )


# With few images the way to the first load is a good part of the kernel: what divides is a constant
# here, and so is a single image, though another shape is then another binary.
@jit(do_not_specialize=[n for n in _GEOMETRY if n not in ("N", "OH", "OW", "KH", "KW")])
def _conv2d_pixels_kernel(
    x,  # [H, W, N, GROUPS*C]
    w,  # [KH*KW, GROUPS*OC, C aligned], as a descriptor or a pointer
    w_memory,  # w as a pointer
    bias,  # [GROUPS*OC] or None
    scale,  # float32 [GROUPS*OC] or None
    shift,  # float32 [GROUPS*OC] or None
    y,  # [OH, OW, N, GROUPS*OC]
    parts,  # float32 [SPLIT_K, OH*OW*N, GROUPS*OC aligned] or None
    counters,  # int32, zero: one a tile, or None
    N,
    H,
    W,
    OH: tl.constexpr,
    OW: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    x_h,  # strides of x and y in units of 8 elements: their alignment is known that way
    x_w,
    y_h,
    y_w,
    X_N: tl.constexpr,  # strides from image to image, in elements
    Y_N: tl.constexpr,
    DENSE: tl.constexpr,  # whether y's pixels lie one after the other
    GROUPS: tl.constexpr,
    C: tl.constexpr,  # channels per group
    OC: tl.constexpr,  # filters per group
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    announce(PDL)
    OC_BLOCKS: tl.constexpr = (OC + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    oc0 = (program % OC_BLOCKS) * BLOCK_N
    program = program // OC_BLOCKS
    group = program % GROUPS
    row = (program // GROUPS) * BLOCK_M + tl.arange(0, BLOCK_M)  # (oh, ow, n), n fastest

    rows = OH * OW * N
    pixel = row // N
    image = (row % N).to(tl.int64)
    oh = pixel // OW
    ow = pixel % OW
    ih0 = oh * stride_h - pad_h
    iw0 = ow * stride_w - pad_w
    k = tl.arange(0, BLOCK_K)
    # 64-bit: a row may start beyond 2^31 elements; a masked one may even start before the first.
    start = (ih0.to(tl.int64) * x_h + iw0.to(tl.int64) * x_w) * 8 + image * X_N
    x_row = x + start[:, None] + (group * C + k)[None, :]

    C_BLOCKS: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    steps = KH * KW * C_BLOCKS
    per_part = (steps + SPLIT_K - 1) // SPLIT_K
    part = tl.program_id(1)
    first = part * per_part
    last = tl.minimum(first + per_part, steps)
    if PDL:
        PITCH: tl.constexpr = (C + 7) // 8 * 8
        filters = group * OC + tl.minimum(oc0 + tl.arange(0, BLOCK_N), OC - 1)
        rows_of_w = w_memory + filters * PITCH
        ahead = first_steps(BLOCK_N, BLOCK_K, w_memory)
        for i in range(first, tl.minimum(first + ahead, last)):
            tap = (i // C_BLOCKS).to(tl.int64)
            prefetch(rows_of_w + tap * (GROUPS * OC * PITCH) + (i % C_BLOCKS) * BLOCK_K, BLOCK_K)
    wait(PDL)
    tap = first // C_BLOCKS
    kh = tap // KW
    kw = tap % KW
    c0 = (first % C_BLOCKS) * BLOCK_K
    for _ in range(at_least_one(last - first)):
        dh = kh * dilation_h
        dw = kw * dilation_w
        ih = ih0 + dh
        iw = iw0 + dw
        inside = (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W) & (row < rows)
        jump = (dh.to(tl.int64) * x_h + dw.to(tl.int64) * x_w) * 8 + c0
        a = tl.load(x_row + jump, mask=inside[:, None] & (c0 + k < C)[None, :], other=0.0)
        b = _load_filters(
            w, kh * KW + kw, group * OC + oc0, c0, GROUPS * OC, C, DESCRIPTORS, BLOCK_N, BLOCK_K
        )
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
        c0 += BLOCK_K
        kw = tl.where(c0 >= C, kw + 1, kw)
        c0 = tl.where(c0 >= C, 0, c0)
        kh = tl.where(kw >= KW, kh + 1, kh)
        kw = tl.where(kw >= KW, 0, kw)

    if DENSE:  # costs fewer registers
        start = row.to(tl.int64) * Y_N
    else:
        start = (oh.to(tl.int64) * y_h + ow.to(tl.int64) * y_w) * 8 + image * Y_N
    _end_tile(
        acc,
        y,
        start,
        row,
        rows,
        row < rows,
        bias,
        scale,
        shift,
        parts,
        counters,
        group,
        oc0,
        OC,
        GROUPS,
        BLOCK_M,
        BLOCK_N,
        SPLIT_K,
        ACTIVATION,
    )


# --- configurations --------------------------------------------------------------------------


Tiling = Literal["rows", "pixels"]


@dataclass(frozen=True, slots=True)
class Conv2dConfig:
    """How one convolution is cut into tiles, and what the compiler is told."""

    tiling: Tiling
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int = 4
    num_stages: int = 3
    descriptors: bool = True  # operands through tensor descriptors: TMA, so sm_90 and later
    BLOCK_N2: int = 0  # filters of a second accumulator (rows, unless the sum is split)
    SPLIT_K: int = 1  # parts of the sum
    BLOCK_M2: int = 0  # rows of a second accumulator, likewise

    def __post_init__(self) -> None:
        if self.tiling not in ("rows", "pixels"):
            raise ValueError(f"tiling: wanted 'rows' or 'pixels', got {self.tiling!r}")


def rows_tiling_fits(shape: Conv2dShape, dtype: torch.dtype) -> bool:
    """Whether the `rows` tiling can address this problem.

    Its descriptor steps from group to group, and such a step must be a multiple of 16 bytes.
    """
    return shape.groups == 1 or (shape.C // shape.groups * dtype.itemsize) % 16 == 0


def default_config(
    shape: Conv2dShape,
    dtype: torch.dtype,
    precision: str,
    arch: int | None,
    batch_invariant: bool = False,
    affine: bool = False,
) -> Conv2dConfig:
    """A configuration that runs without a measurement, on compute capability `arch` (80, 90, ...).

    `affine` says that a scale and a shift end it. None is the interpreter: every operation costs it
    about the same whatever its size, so tiles are few and as large as Triton takes them, and one
    tile spans all pixels. With `batch_invariant` the choice does not look at the number of images;
    else it is the cheapest of `candidates`.
    """
    c, oc = shape.C // shape.groups, shape.OC // shape.groups
    if arch is None:
        rows = shape.OH * shape.OW * (1 if batch_invariant else shape.N)
        block_n, block_k = power_of_two(oc, 16, 512), power_of_two(c, 16, 1024)
        block_m = power_of_two(rows, 16, min(MAX_TILE // max(block_n, block_k), 16384))
        return Conv2dConfig("pixels", block_m, block_n, block_k)
    block_k = power_of_two(c, 16, 128 // dtype.itemsize)  # 128 bytes: one swizzled shared row
    if dtype == torch.float32 and precision == "ieee":  # no tensor core computes this: plain FMAs
        tiling: Tiling = "pixels" if batch_invariant or not _fills_rows(shape, dtype) else "rows"
        return Conv2dConfig(tiling, 64, 32, 16, num_warps=4, num_stages=2, descriptors=arch >= 90)
    if batch_invariant:
        return Conv2dConfig(
            "pixels", 64, power_of_two(oc, 16, 64), block_k, 4, 4, descriptors=arch >= 90
        )
    chip = cost.chip_of(arch)
    return cost.cheapest(
        candidates(shape, dtype, arch, affine),
        lambda config: cost.conv_cost(shape, config, dtype, precision, chip),
    )


# Rows and filters of a tile, each of a first and a second accumulator; warps, stages. The first of
# equals is chosen, so those that have been measured to be fast stand before others. Tiles of three
# quarters of a power of two are for 192 and 384 filters.
_HOPPER = (
    *((128, 0, 256, 0, 8, 3), (256, 0, 128, 64, 8, 3), (128, 0, 256, 128, 8, 3)),
    *((128, 64, 256, 0, 8, 3), (256, 0, 128, 0, 8, 3), (128, 0, 128, 64, 4, 2)),
    *((128, 0, 128, 0, 4, 3), (64, 0, 128, 0, 4, 4), (64, 0, 64, 0, 4, 4)),
)
_BLACKWELL = (*_HOPPER[:3], *_HOPPER[5:])  # the two that are left out spill
_OTHERS = (
    *((128, 0, 128, 0, 8, 3), (128, 0, 64, 0, 4, 3), (64, 0, 128, 0, 4, 3), (64, 0, 64, 0, 4, 4)),
)
_OF_PIXELS = ((64, 0, 128, 0, 4, 4), (64, 0, 64, 0, 4, 4))
# Sums of a split tile, and of one that ends in a scale and a shift and is wide or in float32: with
# more, these spill.
_OF_A_THREAD, _OF_AN_AFFINE_THREAD = 64, 128


def candidates(
    shape: Conv2dShape, dtype: torch.dtype, arch: int, affine: bool = False
) -> Iterator[Conv2dConfig]:
    """What a default is chosen from: a dozen tiles, their sums split where they are few.

    For tensor cores, on compute capability `arch`. Blocks are no larger than the filters want.
    """
    c, oc = shape.C // shape.groups, shape.OC // shape.groups
    block_k = power_of_two(c, 16, 128 // dtype.itemsize)
    steps = shape.KH * shape.KW * -(-c // block_k)
    widest = power_of_two(oc, 16, 256)
    tiling: Tiling = "rows" if _fills_rows(shape, dtype) else "pixels"
    blackwell = 100 <= arch < 120
    of_a_thread = _OF_A_THREAD // 2 if arch >= 100 else _OF_A_THREAD
    tiles: tuple[tuple[int, int, int, int, int, int], ...] = _OF_PIXELS
    if tiling == "rows":
        tiles = _BLACKWELL if blackwell else _HOPPER if 90 <= arch < 100 else _OTHERS
    for block_m, block_m2, block_n, block_n2, warps, stages in tiles:
        if (block_n2 and oc % (block_n + block_n2)) or (block_m2 and block_n > widest):
            continue
        if block_n > widest:  # what is cut off takes its warps along
            block_n, warps = widest, max(4, warps * widest // block_n)
        sums = (block_m + block_m2) * (block_n + block_n2) // (32 * warps)
        crowded = affine and (dtype.itemsize > 2 or block_n + block_n2 > 256)
        if crowded and sums > _OF_AN_AFFINE_THREAD:
            continue
        rows, times = shape.OW * shape.N, shape.OH
        if tiling == "pixels":
            rows, times = rows * shape.OH, 1
        programs = times * -(-rows // block_m) * -(-oc // block_n) * shape.groups
        split = 1
        if not block_m2 + block_n2 and sums <= of_a_thread:
            split = cost.parts_to_fill(programs, steps, cost.chip_of(arch), waves=2)
        if blackwell and (split > 1 or block_m * block_n > 8192):
            warps = 8  # four spill there
        yield Conv2dConfig(
            *(tiling, block_m, block_n, block_k, warps, stages),
            *(arch >= 90, block_n2, split, block_m2),
        )


_MANY = 64  # images: from here on a tile of one pixel's images is full


def _fills_rows(shape: Conv2dShape, dtype: torch.dtype) -> bool:
    """Whether the `rows` tiling can address this problem, and finds its tiles rather full."""
    fewest = 8 if shape.stride[1] == 1 else _MANY
    return fewest <= shape.N and rows_tiling_fits(shape, dtype)


# --- packing ---------------------------------------------------------------------------------


def pack_weight(weight: torch.Tensor) -> torch.Tensor:
    """[OC, C, KH, KW] to [KH*KW, OC, C], channels aligned: what both kernels load tiles of.

    The elements between C and its alignment are zero and never read.
    """
    oc, c, kh, kw = weight.shape
    packed = weight.new_zeros((kh * kw, oc, layout.aligned(c)))
    packed[:, :, :c] = weight.permute(2, 3, 0, 1).reshape(kh * kw, oc, c)
    return packed[..., :c]


# --- launcher --------------------------------------------------------------------------------


def conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    shape: Conv2dShape,
    config: Conv2dConfig,
    activation: Activated = None,
    precision: str = "ieee",
    affine: tuple[torch.Tensor, torch.Tensor] | None = None,
    scratch: torch.Tensor | None = None,
) -> Launch:
    """Bind one convolution; calling the result fills `out`.

    x is an activation [H, W, N, C], weight what `pack_weight` made, bias [OC] or None, out an
    activation [OH, OW, N, OC]; one dtype for all, but `out` may be float32. x and out may be views
    that `layout.strides` takes, but the rows tiling wants all images of x's pixels. `precision` is
    that of float32 products: "ieee" or "tf32". `affine` is a scale and a shift, float32 [OC], after
    the activation. `scratch` holds the parts of a split sum, float32 of
    `scratch_numbers(shape, config)` elements; None: the launch owns one.
    """
    rows = shape.OH * shape.OW * shape.N
    layout.check_rows("conv2d", rows, config.BLOCK_M + config.BLOCK_M2)
    groups, c, oc = shape.groups, shape.C // shape.groups, shape.OC // shape.groups
    spans = shape.stride[1] == 1
    by_rows = config.tiling == "rows"
    if by_rows:
        _check_rows_tiling(x, shape, config)
    if config.BLOCK_M2 and config.BLOCK_N2:
        raise ValueError(f"conv2d: wanted BLOCK_M2 or BLOCK_N2, not both, got {config}")
    if (config.BLOCK_M2 or config.BLOCK_N2) and (config.SPLIT_K > 1 or not by_rows):
        name = "BLOCK_M2" if config.BLOCK_M2 else "BLOCK_N2"
        raise ValueError(f"conv2d: {name} is for the rows tiling and a whole sum, got {config}")
    check_activation("conv2d", activation)
    split = filled(config.SPLIT_K, shape.KH * shape.KW * -(-c // config.BLOCK_K))
    scale, shift = affine or (None, None)
    x_strides, y_strides = layout.addressed("x", x), layout.addressed("y", out)
    blocks = groups * -(-oc // (config.BLOCK_N + config.BLOCK_N2))
    if by_rows:
        panels, steps, step = _tiles(shape, config.BLOCK_M + config.BLOCK_M2)
        programs = blocks * steps * shape.OH * panels
        del x_strides["x_w"]
    else:
        programs = blocks * -(-rows // config.BLOCK_M)
    y_h, y_w, y_n = layout.strides(out)
    dense_rows = y_w == shape.N * y_n
    arguments = {
        "x": x,
        "w": weight,
        "bias": bias,
        "scale": scale,
        "shift": shift,
        "y": out,
        "parts": parts_of(scratch, split, rows, shape.OC, x.device),
        "counters": counters_for(split, programs, x.device),
        **fields_of(shape, "N", "H", "W", "OH", "OW", "KH", "KW"),
        "stride_h": shape.stride[0],
        "stride_w": shape.stride[1],
        "pad_h": shape.padding[0],
        "pad_w": shape.padding[2],
        "dilation_h": shape.dilation[0],
        "dilation_w": shape.dilation[1],
        **x_strides,
        **y_strides,
        "GROUPS": groups,
        "C": c,
        "OC": oc,
        **fields_of(config, "BLOCK_M", "BLOCK_N", "BLOCK_K"),
        "SPLIT_K": split,
        "DESCRIPTORS": config.descriptors,
        "ACTIVATION": activation,
        "PRECISION": precision,
        "PDL": False,
    }
    if config.descriptors:
        arguments["w"] = _filter_descriptor(weight, shape, config.BLOCK_N, config.BLOCK_K)
    if by_rows:
        kernel = _conv2d_rows_kernel
        arguments |= fields_of(config, "BLOCK_M2", "BLOCK_N2")
        arguments |= {"x2": x if config.BLOCK_M2 else None}
        arguments |= {"w2": weight if config.BLOCK_N2 else None}
        arguments |= {"steps": steps, "step": step, "SPANS": spans, "DENSE": dense_rows}
        arguments |= {"MEETS": _meets(shape)}
        if config.descriptors:
            arguments["x"] = _row_descriptor(x, shape, config.BLOCK_M, config.BLOCK_K)
            if config.BLOCK_M2:
                arguments["x2"] = _row_descriptor(x, shape, config.BLOCK_M2, config.BLOCK_K)
            if config.BLOCK_N2:
                arguments["w2"] = _filter_descriptor(weight, shape, config.BLOCK_N2, config.BLOCK_K)
    else:
        kernel = _conv2d_pixels_kernel
        dense = dense_rows and y_h == shape.OW * y_w
        arguments |= {"w_memory": weight, "DENSE": dense}
    return Launch(kernel, (programs, split), arguments, config.num_warps, config.num_stages)


def _check_rows_tiling(x: torch.Tensor, shape: Conv2dShape, config: Conv2dConfig) -> None:
    if config.descriptors and not rows_tiling_fits(shape, x.dtype):
        raise ValueError(
            f"conv2d: {shape.C // shape.groups} channels a group are no multiple of 16 bytes, as "
            "the rows tiling wants for descriptors; use the pixels tiling"
        )
    _, x_w, x_n, _ = x.stride()
    if shape.W > 1 and x_w != shape.N * x_n:
        raise ValueError(
            f"conv2d: x has columns {x_w} elements apart, wanted {shape.N * x_n}, since the rows "
            "tiling reads through them; use the pixels tiling"
        )
    if (
        shape.W + shape.padding[2] + shape.padding[3]
    ) * shape.N + config.BLOCK_M + config.BLOCK_M2 >= 2**31:
        raise ValueError(
            f"conv2d: {shape.W} columns of {shape.N} images are more than a 32-bit index counts; "
            "use a smaller batch"
        )


def _tiles(shape: Conv2dShape, block_m: int) -> tuple[int, int, int]:
    """How an output row (ow, n) is tiled: panels of images, tiles of a panel, and their distance.

    Where images fill tiles, or where a tile must stay in one column, a panel is BLOCK_M images and
    its tiles are the columns; otherwise one panel is all images and its tiles follow one another.
    """
    n = shape.N
    if shape.stride[1] > 1 or n % block_m == 0:
        return -(-n // block_m), shape.OW, n
    return 1, -(-shape.OW * n // block_m), block_m


def _meets(shape: Conv2dShape) -> bool:
    """Whether surely every window holds a tap inside the image."""
    (top, bottom, left, right), (kh, kw) = shape.padding, (shape.KH, shape.KW)
    return shape.dilation == (1, 1) and max(top, bottom) < kh and max(left, right) < kw


def scratch_numbers(shape: Conv2dShape, config: Conv2dConfig) -> int:
    """float32 numbers that the parts of a split sum take."""
    return scratch_size(config.SPLIT_K, shape.OH * shape.OW * shape.N, shape.OC)


def _filter_descriptor(
    weight: torch.Tensor, shape: Conv2dShape, block_n: int, block_k: int
) -> TensorDescriptor:
    """Boxes of one tap's filters by channels, from the packed weight."""
    c = shape.C // shape.groups
    pitch = layout.aligned(c)
    return TensorDescriptor(
        weight,
        shape=[shape.KH * shape.KW, shape.OC, c],
        strides=[shape.OC * pitch, pitch, 1],
        block_shape=[1, block_n, block_k],
    )


def _row_descriptor(
    x: torch.Tensor, shape: Conv2dShape, block_m: int, block_k: int
) -> TensorDescriptor:
    """Boxes of one input row's (column, image) by channels; with groups, of one group's."""
    x_h, _, x_n, _ = x.stride()
    c, rows = shape.C // shape.groups, shape.W * shape.N
    box = [block_m, block_k]
    if shape.groups == 1:
        return TensorDescriptor(x, [shape.H, rows, c], [x_h, x_n, 1], [1, *box])
    # Groups before images, against the order of strides: with a side of 1 next to the channels
    # Triton moves the tile through registers on its way to the matrix instruction.
    return TensorDescriptor(x, [shape.H, shape.groups, rows, c], [x_h, c, x_n, 1], [1, 1, *box])


# --- reference and work ----------------------------------------------------------------------


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    shape: Conv2dShape,
    activation: Activated = None,
) -> torch.Tensor:
    """The same in float64 by torch: [N, C, H, W] and [OC, C, KH, KW] to [N, OC, OH, OW]."""
    top, bottom, left, right = shape.padding
    y = torch.nn.functional.conv2d(
        torch.nn.functional.pad(x.double(), (left, right, top, bottom)),
        weight.double(),
        None if bias is None else bias.double(),
        stride=shape.stride,
        dilation=shape.dilation,
        groups=shape.groups,
    )
    return activated(y, activation)


def _taps_inside(size: int, out: int, kernel: int, stride: int, pad: int, dilation: int) -> int:
    """How many (output, tap) pairs along one axis read a real pixel."""
    reads = (o * stride - pad + k * dilation for o in range(out) for k in range(kernel))
    return sum(0 <= r < size for r in reads)


def work(shape: Conv2dShape, dtype: torch.dtype) -> Work:
    """FLOPs without the taps that only meet padding, and x, w, bias and y moved once."""
    rows = _taps_inside(
        shape.H, shape.OH, shape.KH, shape.stride[0], shape.padding[0], shape.dilation[0]
    )
    columns = _taps_inside(
        shape.W, shape.OW, shape.KW, shape.stride[1], shape.padding[2], shape.dilation[1]
    )
    c = shape.C // shape.groups
    elements = shape.N * (shape.C * shape.H * shape.W + shape.OC * shape.OH * shape.OW)
    elements += shape.OC * (c * shape.KH * shape.KW + 1)
    return Work(2 * shape.N * rows * columns * c * shape.OC, elements * dtype.itemsize)
