"""The stem: pixels become the first activation, normalised and in space-to-depth form.

    y[i, j, n, (a*S + b)*C + c] = (image[n, c, i*S+a-pad, j*S+b-pad] / 255 - mean[c]) / std[c]

and zero where that lies outside the image. A convolution of stride S with a KH x KW filter over
the image is then a convolution of stride 1 with a ceil(KH/S) x ceil(KW/S) filter over y: AlexNet's
11x11 stride-4 filter on 3 channels becomes 3x3 on 48, which fills a matrix instruction (84 % of the
products are useful; padding 3 channels to 8 would leave 38 %). Space-to-depth for a strided first
layer: MLPerf TPU ResNet-50 submissions, 2018.

The normalisation happens while loading and is never folded into the weights: padding is zero
AFTER normalisation, so a folded mean would be wrong at the border. float images are taken as
normalised already, which is torchvision's convention for what a model is given. Any strides are
read, so NHWC pixels come in as a permuted view.

Cost: no products; the image and y move once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl

from . import layout
from .conv import Conv2dShape
from .jit import Launch, Work, fields_of, jit, power_of_two
from .pdl import begin


@dataclass(frozen=True, slots=True)
class StemShape:
    """N images [C, H, W] to an activation [OH, OW, N, S*S*C], S pixels folded along each axis."""

    N: int
    C: int
    H: int
    W: int
    OH: int
    OW: int
    S: int
    padding: tuple[int, int]  # top, left


def folds(shape: Conv2dShape) -> bool:
    """Whether a first convolution can be folded: one stride, not dilated, not grouped."""
    same = shape.stride[0] == shape.stride[1]
    return same and shape.dilation == (1, 1) and shape.groups == 1


def fold(shape: Conv2dShape) -> tuple[StemShape, Conv2dShape]:
    """A first convolution as a stem and the convolution that follows it.

    One that does not fold gets a stem that only normalises, and stays as it is.
    """
    s = shape.stride[0]
    if not folds(shape):
        n, c, h, w = shape.N, shape.C, shape.H, shape.W
        return StemShape(n, c, h, w, h, w, 1, (0, 0)), shape
    kh, kw = -(-shape.KH // s), -(-shape.KW // s)
    oh, ow = shape.OH + kh - 1, shape.OW + kw - 1
    top, _, left, _ = shape.padding
    stem = StemShape(shape.N, shape.C, shape.H, shape.W, oh, ow, s, (top, left))
    return stem, Conv2dShape(shape.N, s * s * shape.C, oh, ow, shape.OC, kh, kw)


# --- kernel ----------------------------------------------------------------------------------


@jit(
    do_not_specialize=(
        *("N", "H", "W", "OH", "OW", "stride_n", "stride_c", "stride_h", "stride_w"),
        *("y_h", "y_w", "y_n"),
    )
)
def _stem_kernel(
    image,  # [N, C, H, W] in any strides
    mean,  # float32 [C]
    std,  # float32 [C]
    y,  # [OH, OW, N, S*S*C]
    N,
    H,
    W,
    OH,
    OW,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    y_h,  # strides of y in units of 8 elements
    y_w,
    y_n,
    C: tl.constexpr,
    S: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    PITCH: tl.constexpr = (S * S * C + 7) // 8 * 8
    # (i, n, j), j fastest: neighbours read one row of one image. Whatever can be is worked out for
    # a row or a column of the tile, since there is little else to do for each of its elements.
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    i = row // OW // N
    n = (row // OW % N).to(tl.int64)
    j = row % OW
    there = row < OH * OW * N
    k = tl.arange(0, BLOCK_C)  # (a, b, c), c fastest
    a = k // C // S
    b = k // C % S
    c = k % C
    top = tl.where(there, i * S - PAD_H, H)
    left = j * S - PAD_W
    ih = top[:, None] + tl.where(k < S * S * C, a, H + PAD_H)[None, :]
    iw = left[:, None] + b[None, :]
    inside = (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W)
    of_row = n * stride_n + top.to(tl.int64) * stride_h + left.to(tl.int64) * stride_w
    of_channel = c.to(tl.int64) * stride_c + a.to(tl.int64) * stride_h + b.to(tl.int64) * stride_w
    source = image + of_row[:, None] + of_channel[None, :]
    value = tl.load(source, mask=inside, other=0).to(tl.float32)
    if NORMALIZE:
        # On the scale of 0 to 255 the subtraction is nearly exact, so that a product serves as well
        # as a division by std.
        scale = 1.0 / (255.0 * tl.load(std + c))
        value = (value - 255.0 * tl.load(mean + c)[None, :]) * scale[None, :]
        value = tl.where(inside, value, 0.0)
    start = (i.to(tl.int64) * y_h + j.to(tl.int64) * y_w + n * y_n) * 8
    written = there[:, None] & (k < PITCH)[None, :]
    tl.store(y + start[:, None] + k[None, :], value.to(y.dtype.element_ty), mask=written)


# --- configurations --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StemConfig:
    """Pixels of the output that one tile covers; a tile always holds all their channels."""

    BLOCK_M: int
    num_warps: int = 4


def default_config(shape: StemShape, arch: int | None) -> StemConfig:
    """A configuration that runs without a measurement; `arch` None is the interpreter."""
    channels = power_of_two(shape.S * shape.S * shape.C, 8, 2**20)
    if arch is None:
        return StemConfig(power_of_two(shape.OH * shape.OW * shape.N, 1, max(1, 2**20 // channels)))
    return StemConfig(max(1, 4096 // channels))


# --- packing ---------------------------------------------------------------------------------


def pack_weight(weight: torch.Tensor, stride: int) -> torch.Tensor:
    """[OC, C, KH, KW] to [OC, S*S*C, ceil(KH/S), ceil(KW/S)]: the filter of the folded convolution.

    Taps that the fold adds beyond KH and KW are zero.
    """
    oc, c, kh, kw = weight.shape
    s = stride
    rows, columns = -(-kh // s), -(-kw // s)
    padded = torch.nn.functional.pad(weight, (0, columns * s - kw, 0, rows * s - kh))
    blocks = padded.reshape(oc, c, rows, s, columns, s)
    return blocks.permute(0, 3, 5, 1, 2, 4).reshape(oc, s * s * c, rows, columns)


# --- launcher --------------------------------------------------------------------------------


def stem(
    images: torch.Tensor,
    mean: torch.Tensor,
    std: torch.Tensor,
    out: torch.Tensor,
    shape: StemShape,
    config: StemConfig,
) -> Launch:
    """Bind the stem; calling the result fills `out` [OH, OW, N, S*S*C] from images [N, C, H, W].

    `out` may be any view that `layout.strides` takes, and all channels up to its pitch are written.

    uint8 images are normalised with mean and std (float32 [C], on a scale of 0 to 1); float images
    are taken as they are.
    """
    y_h, y_w, y_n = layout.strides(out)
    layout.check_rows("stem", shape.OH * shape.OW * shape.N, config.BLOCK_M)
    channels = shape.S * shape.S * shape.C
    arguments = {
        "image": images,
        "mean": mean,
        "std": std,
        "y": out,
        **fields_of(shape, "N", "H", "W", "OH", "OW"),
        **dict(zip(("stride_n", "stride_c", "stride_h", "stride_w"), images.stride(), strict=True)),
        "y_h": y_h,
        "y_w": y_w,
        "y_n": y_n,
        **fields_of(shape, "C", "S"),
        "PAD_H": shape.padding[0],
        "PAD_W": shape.padding[1],
        "BLOCK_M": config.BLOCK_M,
        "BLOCK_C": power_of_two(channels, 8, 2**20),
        "NORMALIZE": images.dtype == torch.uint8,
        "PDL": False,
    }
    programs = -(-shape.OH * shape.OW * shape.N // config.BLOCK_M)
    return Launch(_stem_kernel, (programs,), arguments, config.num_warps, num_stages=1)


# --- reference and work ----------------------------------------------------------------------


def reference(
    images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, shape: StemShape
) -> torch.Tensor:
    """The same in float64 by torch: [N, C, H, W] to [N, S*S*C, OH, OW]."""
    x = images.double()
    if images.dtype == torch.uint8:
        x = (x / 255 - mean.double()[:, None, None]) / std.double()[:, None, None]
    (top, left), s = shape.padding, shape.S
    bottom, right = shape.OH * s - shape.H - top, shape.OW * s - shape.W - left
    x = torch.nn.functional.pad(x, (left, right, top, bottom))  # negative: rows no filter reads
    x = x.reshape(shape.N, shape.C, shape.OH, s, shape.OW, s)
    return x.permute(0, 3, 5, 1, 2, 4).reshape(shape.N, s * s * shape.C, shape.OH, shape.OW)


def work(shape: StemShape, image_dtype: torch.dtype, dtype: torch.dtype) -> Work:
    """Two operations per pixel where pixels are normalised; the image and y moved once."""
    pixels = shape.N * shape.C * shape.H * shape.W
    outputs = shape.N * shape.S * shape.S * shape.C * shape.OH * shape.OW
    flops = 2 * pixels if image_dtype == torch.uint8 else 0
    return Work(flops, pixels * image_dtype.itemsize + outputs * dtype.itemsize)
