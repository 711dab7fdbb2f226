"""Convolution + epilogue on [H, W, N, C] activations, as an implicit GEMM.

    y[oh, ow, n, oc] = act(bias[oc] + sum over kh, kw, c of
                           x[oh*sh - ph + kh*dh, ow*sw - pw + kw*dw, n, c] * w[oc, c, kh, kw])

No im2col matrix is ever written: the GEMM's A operand is read straight from the activation, one
filter tap and one block of channels at a time. The two tilings differ in what a row of A is.

- `images`: the rows of a tile are BLOCK_M images at ONE output pixel. A tap is then one contiguous
  box of x, and a tap that falls outside the image is skipped, not multiplied by zero (9 to 10 % of
  AlexNet's conv2 to conv5). Loads are tensor descriptors: TMA on Hopper, plain loads before it.
- `pixels`: the rows of a tile run over (output row, output column, image), for batches too small to
  fill a tile with images. Rows are gathered through pointers, those outside the image masked.

Both take any stride, padding, dilation and number of groups, and add the same products in the same
order, so at equal blocks they agree bit for bit. Cost: 2 * N * OH * OW * OC * KH * KW * C/groups
FLOPs, less the skipped taps; x, w and y move once if the cache does its part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import layout
from .epilogue import activated, check_activation, finish
from .jit import MAX_TILE, Launch, Work, jit, power_of_two

# Integers that vary from layer to layer without needing another binary.
_GEOMETRY = (
    *("N", "H", "W", "OH", "OW", "KH", "KW", "stride_h", "stride_w"),
    *("pad_h", "pad_w", "dilation_h", "dilation_w"),
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
def _store_tile(
    acc,
    y,
    row,
    row_in_range,
    bias,
    scale,
    shift,
    group,
    oc,
    GROUPS,
    OC,
    BLOCK_N: tl.constexpr,
    ACTIVATION,
):
    """The epilogue of a tile whose rows are `row` of y [rows, GROUPS*OC aligned]."""
    channel = oc + tl.arange(0, BLOCK_N)
    acc = finish(acc, bias, scale, shift, group * OC + channel, channel < OC, ACTIVATION)
    target = y + row.to(tl.int64)[:, None] * ((GROUPS * OC + 7) // 8 * 8)
    target += (group * OC + channel)[None, :]
    inside = row_in_range[:, None] & (channel < OC)[None, :]
    tl.store(target, acc.to(y.dtype.element_ty), mask=inside)


@jit(do_not_specialize=_GEOMETRY)
def _conv2d_images_kernel(
    x,  # [H*W, N, GROUPS*C aligned], as a descriptor [H*W, GROUPS, N, C] or a pointer
    w,  # [KH*KW, GROUPS*OC, C aligned], as a descriptor or a pointer
    bias,  # [GROUPS*OC] or None
    scale,  # float32 [GROUPS*OC] or None
    shift,  # float32 [GROUPS*OC] or None
    y,  # [OH*OW, N, GROUPS*OC aligned]
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
    GROUPS: tl.constexpr,
    C: tl.constexpr,  # channels per group
    OC: tl.constexpr,  # filters per group
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Filter blocks run fastest, then pixels, then image blocks: what runs together shares its x.
    OC_BLOCKS: tl.constexpr = (OC + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    oc0 = (program % OC_BLOCKS) * BLOCK_N
    program = program // OC_BLOCKS
    group = program % GROUPS
    program = program // GROUPS
    pixel = program % (OH * OW)
    n0 = (program // (OH * OW)) * BLOCK_M
    image = n0 + tl.arange(0, BLOCK_M)

    # The taps that fall inside the image are a rectangle [kh_lo, kh_hi) x [kw_lo, kw_hi).
    ih0 = (pixel // OW) * stride_h - pad_h
    iw0 = (pixel % OW) * stride_w - pad_w
    kh_lo = tl.maximum(0, (dilation_h - 1 - ih0) // dilation_h)
    kw_lo = tl.maximum(0, (dilation_w - 1 - iw0) // dilation_w)
    kh_hi = tl.minimum(KH, (tl.maximum(H - ih0, 0) + dilation_h - 1) // dilation_h)
    kw_hi = tl.minimum(KW, (tl.maximum(W - iw0, 0) + dilation_w - 1) // dilation_w)
    taps_w = tl.maximum(kw_hi - kw_lo, 0)
    taps = tl.maximum(kh_hi - kh_lo, 0) * taps_w

    C_BLOCKS: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for i in range(taps * C_BLOCKS):
        tap = i // C_BLOCKS
        c0 = (i % C_BLOCKS) * BLOCK_K
        kh = kh_lo + tap // taps_w
        kw = kw_lo + tap % taps_w
        source = (ih0 + kh * dilation_h) * W + iw0 + kw * dilation_w
        if DESCRIPTORS:
            a = x.load([source, group, n0, c0]).reshape(BLOCK_M, BLOCK_K)
        else:
            k = c0 + tl.arange(0, BLOCK_K)
            start = source.to(tl.int64) * N + image
            tile = x + start[:, None] * ((GROUPS * C + 7) // 8 * 8) + (group * C + k)[None, :]
            a = tl.load(tile, mask=(image < N)[:, None] & (k < C)[None, :], other=0.0)
        b = _load_filters(
            w, kh * KW + kw, group * OC + oc0, c0, GROUPS * OC, C, DESCRIPTORS, BLOCK_N, BLOCK_K
        )
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)

    row = pixel.to(tl.int64) * N + image
    _store_tile(
        acc, y, row, image < N, bias, scale, shift, group, oc0, GROUPS, OC, BLOCK_N, ACTIVATION
    )


@jit(do_not_specialize=_GEOMETRY)
def _conv2d_pixels_kernel(
    x,  # [H*W, N, GROUPS*C aligned]
    w,  # [KH*KW, GROUPS*OC, C aligned], as a descriptor or a pointer
    bias,  # [GROUPS*OC] or None
    scale,  # float32 [GROUPS*OC] or None
    shift,  # float32 [GROUPS*OC] or None
    y,  # [OH*OW, N, GROUPS*OC aligned]
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
    GROUPS: tl.constexpr,
    C: tl.constexpr,  # channels per group
    OC: tl.constexpr,  # filters per group
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
):
    OC_BLOCKS: tl.constexpr = (OC + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    oc0 = (program % OC_BLOCKS) * BLOCK_N
    program = program // OC_BLOCKS
    group = program % GROUPS
    row = (program // GROUPS) * BLOCK_M + tl.arange(0, BLOCK_M)  # (oh, ow, n), n fastest

    rows = OH * OW * N
    pixel = row // N
    ih0 = (pixel // OW) * stride_h - pad_h
    iw0 = (pixel % OW) * stride_w - pad_w
    X_PITCH: tl.constexpr = (GROUPS * C + 7) // 8 * 8
    k = tl.arange(0, BLOCK_K)
    # 64-bit: a row may start beyond 2^31 elements; a masked one may even start before the first.
    start = (ih0.to(tl.int64) * W + iw0) * N + row % N
    x_row = x + start[:, None] * X_PITCH + (group * C + k)[None, :]

    C_BLOCKS: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for i in range(KH * KW * C_BLOCKS):
        tap = i // C_BLOCKS
        c0 = (i % C_BLOCKS) * BLOCK_K
        dh = (tap // KW) * dilation_h
        dw = (tap % KW) * dilation_w
        ih = ih0 + dh
        iw = iw0 + dw
        inside = (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W) & (row < rows)
        jump = (dh.to(tl.int64) * W + dw) * N * X_PITCH + c0
        a = tl.load(x_row + jump, mask=inside[:, None] & (c0 + k < C)[None, :], other=0.0)
        b = _load_filters(
            w, tap, group * OC + oc0, c0, GROUPS * OC, C, DESCRIPTORS, BLOCK_N, BLOCK_K
        )
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)

    _store_tile(
        acc, y, row, row < rows, bias, scale, shift, group, oc0, GROUPS, OC, BLOCK_N, ACTIVATION
    )


# --- configurations --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Conv2dConfig:
    """How one convolution is cut into tiles, and what the compiler is told."""

    tiling: Literal["images", "pixels"]
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int = 4
    num_stages: int = 3
    descriptors: bool = True  # operands through tensor descriptors: TMA, so sm_90 and later


def images_tiling_fits(shape: Conv2dShape, dtype: torch.dtype) -> bool:
    """Whether the `images` tiling can address this problem.

    Its descriptor steps from group to group, and such a step must be a multiple of 16 bytes.
    """
    return shape.groups == 1 or (shape.C // shape.groups * dtype.itemsize) % 16 == 0


def default_config(
    shape: Conv2dShape,
    dtype: torch.dtype,
    precision: str,
    arch: int | None,
    batch_invariant: bool = False,
) -> Conv2dConfig:
    """A configuration that runs without a measurement, on compute capability `arch` (80, 90, ...).

    None is the interpreter: every operation costs it about the same whatever its size, so tiles are
    few and as large as Triton takes them, and one tile spans all pixels. With `batch_invariant` the
    choice does not look at the number of images.
    """
    c, oc = shape.C // shape.groups, shape.OC // shape.groups
    if arch is None:
        rows = shape.OH * shape.OW * (1 if batch_invariant else shape.N)
        block_n, block_k = power_of_two(oc, 16, 512), power_of_two(c, 16, 1024)
        block_m = power_of_two(rows, 16, min(MAX_TILE // max(block_n, block_k), 16384))
        return Conv2dConfig("pixels", block_m, block_n, block_k)
    images = shape.N >= 64 and not batch_invariant and images_tiling_fits(shape, dtype)
    tma = arch >= 90
    tiling: Literal["images", "pixels"] = "images" if images else "pixels"
    if dtype == torch.float32 and precision == "ieee":  # no tensor core computes this: plain FMAs
        return Conv2dConfig(tiling, 64, 32, 16, num_warps=4, num_stages=2, descriptors=tma)
    block_k = power_of_two(c, 16, 128 // dtype.itemsize)  # 128 bytes: one swizzled shared row
    if images and shape.N >= 128 and oc % 256 == 0 and 90 <= arch < 120:
        return Conv2dConfig(tiling, 128, 256, block_k, num_warps=8, num_stages=3)
    if images and shape.N >= 128:
        block_n = power_of_two(oc, 16, 128 if oc % 128 == 0 else 64)
        return Conv2dConfig(tiling, 128, block_n, block_k, 8 if block_n > 64 else 4, 3, tma)
    return Conv2dConfig(tiling, 64, power_of_two(oc, 16, 64), block_k, 4, 4, tma)


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
    activation: str | None = None,
    precision: str = "ieee",
    affine: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Launch:
    """Bind one convolution; calling the result fills `out`.

    x is an activation [H, W, N, C], weight what `pack_weight` made, bias [OC] or None, out an
    activation [OH, OW, N, OC]; one dtype for all. `precision` is that of float32 products:
    "ieee" or "tf32". `affine` is a scale and a shift, float32 [OC], after the activation.
    """
    if shape.OH * shape.OW * shape.N >= 2**31:
        raise ValueError(
            f"conv2d: {shape.N} images of {shape.OH}x{shape.OW} outputs are more rows than a "
            "32-bit index counts; use a smaller batch"
        )
    groups, c, oc = shape.groups, shape.C // shape.groups, shape.OC // shape.groups
    if config.tiling == "images" and config.descriptors and not images_tiling_fits(shape, x.dtype):
        raise ValueError(
            f"conv2d: {shape.C // shape.groups} channels a group are no multiple of 16 bytes, as "
            "the images tiling wants for descriptors; use the pixels tiling"
        )
    check_activation("conv2d", activation)
    scale, shift = affine or (None, None)
    x_pitch, _ = layout.pitch(x), layout.pitch(out)
    arguments = {
        "x": x,
        "w": weight,
        "bias": bias,
        "scale": scale,
        "shift": shift,
        "y": out,
        "N": shape.N,
        "H": shape.H,
        "W": shape.W,
        "OH": shape.OH,
        "OW": shape.OW,
        "KH": shape.KH,
        "KW": shape.KW,
        "stride_h": shape.stride[0],
        "stride_w": shape.stride[1],
        "pad_h": shape.padding[0],
        "pad_w": shape.padding[2],
        "dilation_h": shape.dilation[0],
        "dilation_w": shape.dilation[1],
        "GROUPS": groups,
        "C": c,
        "OC": oc,
        "BLOCK_M": config.BLOCK_M,
        "BLOCK_N": config.BLOCK_N,
        "BLOCK_K": config.BLOCK_K,
        "DESCRIPTORS": config.descriptors,
        "ACTIVATION": activation,
        "PRECISION": precision,
    }
    if config.descriptors:
        c_pitch = layout.aligned(c)
        arguments["w"] = TensorDescriptor(
            weight,
            shape=[shape.KH * shape.KW, shape.OC, c],
            strides=[shape.OC * c_pitch, c_pitch, 1],
            block_shape=[1, config.BLOCK_N, config.BLOCK_K],
        )
    programs = groups * -(-oc // config.BLOCK_N)
    if config.tiling == "images":
        kernel = _conv2d_images_kernel
        programs *= shape.OH * shape.OW * -(-shape.N // config.BLOCK_M)
        if config.descriptors:
            arguments["x"] = TensorDescriptor(
                x,
                shape=[shape.H * shape.W, groups, shape.N, c],
                strides=[shape.N * x_pitch, c if groups > 1 else x_pitch, x_pitch, 1],
                block_shape=[1, 1, config.BLOCK_M, config.BLOCK_K],
            )
    else:
        kernel = _conv2d_pixels_kernel
        programs *= -(-shape.OH * shape.OW * shape.N // config.BLOCK_M)
    return Launch(kernel, (programs,), arguments, config.num_warps, config.num_stages)


# --- reference and work ----------------------------------------------------------------------


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    shape: Conv2dShape,
    activation: str | None = None,
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
