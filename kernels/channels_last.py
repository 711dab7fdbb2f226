"""Images, channels last: the one pass over a batch that comes otherwise.

    y[n, h, w, c] = (image[n, c, h, w] / 255 - mean[c]) / std[c]

for uint8 images; float images are taken as they are, which is torchvision's convention for what a
model is given. A pixel of y is `pixel` numbers, dense: its channels, then zeros. What of y lies
beyond the image is written as zeros, too, so that no number of y is undefined. Any strides are read
and written: y is images in rows [N, rows, columns, 4] for the first layer (see first_layer.py), or
an activation [H, W, N, C], seen as [N, H, W, aligned C], for an ordinary convolution.

Four numbers for RGB make every pixel 8 bytes in half precision, which is stored at once, and put
the windows of a first layer where the tensor memory accelerator finds them; a pixel of three is not
a power of two, and took 17 instructions an element to gather.

The normalisation is never folded into the weights: padding is zero AFTER normalisation, so a folded
mean would be wrong at the border.

Cost: no products; the images and y move once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton.language as tl

from . import layout
from .jit import MAX_TILE, Launch, Work, jit, power_of_two
from .pdl import begin


@dataclass(frozen=True, slots=True)
class ChannelsLastShape:
    """N images [C, H, W] to [rows, columns] pixels of `pixel` numbers each."""

    N: int
    C: int
    H: int
    W: int
    rows: int
    columns: int
    pixel: int


# --- kernel ----------------------------------------------------------------------------------


@jit(do_not_specialize=("M", "H", "W", "rows", "stride_n", "stride_h", "y_n", "y_h"))
def _channels_last_kernel(
    image,  # [N, C, H, W] in any strides
    mean,  # float32 [C]
    std,  # float32 [C]
    y,  # [N, rows, columns, PIXEL]
    M,  # N * rows
    H,
    W,  # in units of UNIT elements, as are the strides of `image` but that of a column
    rows,
    columns,
    stride_n,
    stride_c,
    stride_h,
    y_n,  # strides of y in units of PIXEL elements
    y_h,
    y_w,
    STRIDE_W: tl.constexpr,
    UNIT: tl.constexpr,
    C: tl.constexpr,
    PIXEL: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PADDED: tl.constexpr,  # whether y has pixels beyond the image
    NORMALIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    column_blocks = (columns + BLOCK_W - 1) // BLOCK_W
    program = tl.program_id(0)
    row = (program // column_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)  # (n, h), h fastest
    n = (row // rows).to(tl.int64)
    h = row % rows
    # The corner of the tile is added by itself, once for all: the rest of an address is small.
    w0 = program % column_blocks * BLOCK_W
    w = tl.arange(0, BLOCK_W)
    c = tl.arange(0, BLOCK_C)
    image += w0.to(tl.int64) * STRIDE_W
    y += w0.to(tl.int64) * y_w * PIXEL

    there = (row < M)[:, None, None]
    inside = there & (h < H)[:, None, None] & (w < W * UNIT - w0)[None, :, None]
    of_row = (n * stride_n + h.to(tl.int64) * stride_h) * UNIT
    of_channel = c.to(tl.int64) * stride_c * UNIT
    source = image + of_row[:, None, None] + of_channel[None, None, :]
    source += (w.to(tl.int64) * STRIDE_W)[None, :, None]
    value = tl.load(source, mask=inside & (c < C)[None, None, :], other=0)
    if NORMALIZE:
        # On the scale of 0 to 255 the subtraction is nearly exact, so that a product serves as well
        # as a division by std. A channel that is not there is zero times zero.
        offset = 255.0 * tl.load(mean + c, mask=c < C, other=0.0)
        scale = 1.0 / (255.0 * tl.load(std + c, mask=c < C, other=float("inf")))
        value = (value.to(tl.float32) - offset[None, None, :]) * scale[None, None, :]
        if PADDED:
            value = tl.where(inside, value, 0.0)
    of_row = (n * y_n + h.to(tl.int64) * y_h) * PIXEL
    target = y + of_row[:, None, None] + c[None, None, :]
    target += (w.to(tl.int64) * y_w * PIXEL)[None, :, None]
    written = there & (w < columns - w0)[None, :, None] & (c < PIXEL)[None, None, :]
    tl.store(target, value.to(y.dtype.element_ty), mask=written)


# --- configurations --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ChannelsLastConfig:
    """Pixels that one tile covers, of one row or of several; it holds all their numbers."""

    BLOCK: int
    num_warps: int = 4


def default_config(shape: ChannelsLastShape, arch: int | None) -> ChannelsLastConfig:
    """A configuration that runs without a measurement; `arch` None is the interpreter."""
    numbers = power_of_two(shape.pixel, 1, MAX_TILE)
    pixels = shape.N * shape.rows * shape.columns
    if arch is None:
        return ChannelsLastConfig(power_of_two(pixels, 1, MAX_TILE // numbers))
    # 64 numbers a thread, and fewer where that leaves multiprocessors idle.
    most = max(16, 8192 // numbers)
    return ChannelsLastConfig(power_of_two(pixels // 256, min(256, most), most))


# --- launcher --------------------------------------------------------------------------------


def channels_last(
    images: torch.Tensor,
    mean: torch.Tensor,
    std: torch.Tensor,
    out: torch.Tensor,
    shape: ChannelsLastShape,
    config: ChannelsLastConfig,
) -> Launch:
    """Bind the pass; calling the result fills `out` [N, rows, columns, pixel].

    images is [N, C, H, W] in any strides: uint8, normalised with mean and std (float32 [C], on a
    scale of 0 to 1), or floats, taken as they are. out is a float tensor or view whose pixels are
    dense and whose other strides are multiples of `pixel`, which must hold the channels; rows and
    columns are no fewer than the image's. Raises ValueError for another `out`.
    """
    height, width, rows, columns = shape.H, shape.W, shape.rows, shape.columns
    wanted = (shape.N, rows, columns, shape.pixel)
    *steps, dense = out.stride()
    held = shape.pixel >= shape.C and rows >= height and columns >= width
    if tuple(out.shape) != wanted or not held or dense != 1 or any(s % shape.pixel for s in steps):
        raise ValueError(
            f"channels_last: out {tuple(out.shape)} has strides {out.stride()}, wanted {wanted} "
            f"with dense pixels, no smaller than images {tuple(images.shape)}, in steps of "
            f"{shape.pixel}"
        )
    stride_n, stride_c, stride_h, stride_w = images.stride()
    y_n, y_h, y_w = (step // shape.pixel for step in steps)
    padded = rows > height or columns > width
    if not padded and stride_h == width * stride_w and y_h == width * y_w:
        height, width, rows, columns = 1, height * width, 1, height * width  # one row is as good
    block_w = power_of_two(columns, 1, config.BLOCK)
    # What all these have in common is what a load may be aligned to.
    unit = math.gcd(16, width, stride_n, stride_c, stride_h if rows > 1 else 0)
    arguments = {
        "image": images,
        "mean": mean,
        "std": std,
        "y": out,
        "M": shape.N * rows,
        "H": height,
        "W": width // unit,
        "rows": rows,
        "columns": columns,
        "stride_n": stride_n // unit,
        "stride_c": stride_c // unit,
        "stride_h": stride_h // unit,
        "y_n": y_n,
        "y_h": y_h,
        "y_w": y_w,
        "STRIDE_W": stride_w,
        "UNIT": unit,
        "C": shape.C,
        "PIXEL": shape.pixel,
        "BLOCK_H": config.BLOCK // block_w,
        "BLOCK_W": block_w,
        "BLOCK_C": power_of_two(shape.pixel, 1, MAX_TILE),
        "PADDED": padded,
        "NORMALIZE": images.dtype == torch.uint8,
        "PDL": False,
    }
    layout.check_rows("channels_last", shape.N * rows, config.BLOCK)
    programs = -(-columns // block_w) * -(-shape.N * rows // (config.BLOCK // block_w))
    return Launch(_channels_last_kernel, (programs,), arguments, config.num_warps, num_stages=1)


# --- reference and work ----------------------------------------------------------------------


def reference(
    images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, shape: ChannelsLastShape
) -> torch.Tensor:
    """The same in float64 by torch: [N, C, H, W] to [N, rows, columns, pixel]."""
    x = images.double()
    if images.dtype == torch.uint8:
        x = (x / 255 - mean.double()[:, None, None]) / std.double()[:, None, None]
    beyond = (shape.pixel - shape.C, shape.columns - shape.W, shape.rows - shape.H)
    padding = [side for size in beyond for side in (0, size)]
    return torch.nn.functional.pad(x.permute(0, 2, 3, 1), padding)


def work(shape: ChannelsLastShape, image_dtype: torch.dtype, dtype: torch.dtype) -> Work:
    """Two operations a number where pixels are normalised; the images and y moved once."""
    numbers = shape.N * shape.C * shape.H * shape.W
    written = shape.N * shape.rows * shape.columns * shape.pixel
    flops = 2 * numbers if image_dtype == torch.uint8 else 0
    return Work(flops, numbers * image_dtype.itemsize + written * dtype.itemsize)
