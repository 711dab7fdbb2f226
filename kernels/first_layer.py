"""The first convolution of a network, straight from channels-last images, + epilogue.

    y[oh, ow, n, oc] = act(bias[oc] + sum over kh, kw, c of
                           x[n, oh*sh - ph + kh, ow*sw - pw + kw, c] * w[oc, c, kh, kw])

An image has too few channels for a GEMM of its own a tap, but what a filter row reads of an image
row lies in one piece: KW pixels of `pixel` numbers. So the operand A of filter row kh is one window
of numbers, and K runs over the KH windows. `columns` adjacent outputs share a window and are one
row of the product, columns * OC numbers wide: 2 columns of AlexNet's conv1 read 60 of 64 numbers,
where a tap by itself would fill 3 of 16. The filter lies in the packed weight at the place of each
column, among zeros.

A window starts on a multiple of 8 numbers, which is what tensor descriptors are held to here, so
the filter is packed at every shift that occurs, and group g of columns takes pack g % TURNS; with
four numbers a pixel AlexNet needs one pack. A number that is not finite therefore reaches every
column whose window holds it: zero times infinity is NaN.

Images are rows [N, rows, numbers]: what channels_last.py writes, or the caller's own memory
(`in_place`). The forms differ in what a row of A is:

- `images`: BLOCK_M images at one output row, for batches that fill a tile;
- `rows`: BLOCK_M output rows of one image, for any batch; a descriptor steps over `stride` rows;
- `pointers`: (group of columns, output row, image), images fastest: masked loads, where there is
  no TMA.

A box whose leading sides are 1 goes to Hopper's matrix instruction without passing registers. Rows
and numbers outside an image are read as zeros. All forms add the same products in the same order,
so at equal columns and BLOCK_K they agree bit for bit.

Cost: 2 * N * OH * OW * OC * KH * KW * C FLOPs; images, w and y move once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import conv, cost, layout
from .conv import Conv2dShape, _load_filters
from .epilogue import Activated, check_activation, finish
from .jit import MAX_TILE, Launch, fields_of, jit, power_of_two
from .pdl import begin
from .split_k import at_least_one

# --- shape -----------------------------------------------------------------------------------

Form = Literal["images", "rows", "pointers"]
LARGEST = 64  # numbers of a window that a GPU is given: more would mostly meet zeros


def shifts(shape: Conv2dShape, pixel: int, columns: int) -> list[int]:
    """How far behind a multiple of 8 numbers the pixels of group 0, 1, ... begin; then it repeats.

    They begin at g * columns * stride - padding pixels.
    """
    step = columns * shape.stride[1] * pixel
    return [(t * step - shape.padding[2] * pixel) % 8 for t in range(8 // math.gcd(8, step))]


def window(shape: Conv2dShape, pixel: int, columns: int) -> int:
    """Numbers that `columns` outputs read of an image row, from a multiple of 8 to another."""
    reach = ((columns - 1) * shape.stride[1] + shape.KW) * pixel
    return layout.aligned(max(shifts(shape, pixel, columns)) + reach)


def fits(shape: Conv2dShape, pixel: int) -> bool:
    """Whether a convolution is one for this kernel: not dilated or grouped, and of few channels."""
    whole = shape.dilation == (1, 1) and shape.groups == 1
    return whole and window(shape, pixel, 1) <= LARGEST


def padded(shape: Conv2dShape, pixel: int) -> tuple[int, int]:
    """Rows and columns of images that every form reads, the image's and what makes them whole.

    The stride divides the rows, and a row is a multiple of 16 bytes.
    """
    stride, block = shape.stride[0], 8 // math.gcd(8, pixel)
    return -(-shape.H // stride) * stride, -(-shape.W // block) * block


def in_place(images: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether images [N, C, H, W] can be read where they lie, pixel = C.

    They are `images.permute(0, 2, 3, 1).flatten(2)` then: channels last, dense pixels, all else in
    multiples of 16 bytes. Not expanded: that a descriptor may step by nothing is nowhere written.
    """
    stride_n, stride_c, stride_h, stride_w = images.stride()
    channels, size = images.shape[1], dtype.itemsize
    dense = stride_w == channels and (stride_c == 1 or channels == 1)
    steps = (images.data_ptr(), stride_n * size, stride_h * size)
    aligned = not any(step % 16 for step in steps)
    return images.dtype == dtype and dense and aligned and stride_n > 0 and stride_h > 0


def whole(shape: Conv2dShape, form: Form) -> bool:
    """Whether images without rows beyond their own do: the form `rows` steps over `stride` rows."""
    return form != "rows" or shape.H % shape.stride[0] == 0


# --- kernels ---------------------------------------------------------------------------------


@jit
def _store_columns(
    acc,
    y,
    start,  # int64: where each row of the tile starts in y, at the first column of the group
    limit,  # of each row, how many columns are stored
    bias,
    scale,
    shift,
    y_w,  # numbers from one column to the next
    first,
    COLUMNS: tl.constexpr,
    OC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """The epilogue of a tile of (column, filter), filter fastest, from number `first` on."""
    number = first + tl.arange(0, BLOCK_N)
    column = number // OC
    channel = number % OC
    in_range = column < COLUMNS
    acc = finish(acc, bias, scale, shift, channel, in_range, ACTIVATION)
    target = y + start[:, None] + (column * y_w + channel)[None, :]
    tl.store(target, acc.to(y.dtype.element_ty), mask=column[None, :] < limit[:, None])


@jit(
    do_not_specialize=(
        *("N", "H", "OH", "OW", "KH", "stride_h", "pad_h", "x_n", "x_h", "y_h", "y_w"),
    )
)
def _first_layer_kernel(
    x,  # images: [H, N, NUMBERS], rows: [stride, N, rows / stride, NUMBERS], or a pointer
    w,  # [TURNS*KH, COLUMNS*OC, WINDOW], as a descriptor or a pointer
    w2,  # the same in blocks of BLOCK_N2
    bias,  # [OC] or None
    scale,  # float32 [OC] or None
    shift,  # float32 [OC] or None
    y,  # [OH, OW, N, OC]
    N,
    H,
    OH,
    OW,
    KH,
    stride_h,
    pad_h,
    x_n,  # strides of x in units of 16 bytes, of y in units of 8 elements
    x_h,
    y_h,
    y_w,
    Y_N: tl.constexpr,  # stride from image to image, in elements
    NUMBERS: tl.constexpr,  # of an image row
    STEP: tl.constexpr,  # numbers from one group of columns to the next
    LEFT: tl.constexpr,  # numbers of the padding before an image row
    TURNS: tl.constexpr,
    WINDOW: tl.constexpr,
    COLUMNS: tl.constexpr,
    OC: tl.constexpr,
    FORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_N2: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    # Blocks of filters run fastest, then groups of columns, then rows: neighbours share images.
    DESCRIPTORS: tl.constexpr = FORM != "pointers"
    FILTERS: tl.constexpr = COLUMNS * OC
    BLOCKS: tl.constexpr = (FILTERS + BLOCK_N + BLOCK_N2 - 1) // (BLOCK_N + BLOCK_N2)
    program = tl.program_id(0)
    first = (program % BLOCKS) * (BLOCK_N + BLOCK_N2)
    program = program // BLOCKS
    m = tl.arange(0, BLOCK_M)
    if DESCRIPTORS:
        groups = (OW + COLUMNS - 1) // COLUMNS
        group = program % groups
        program = program // groups
        turn = group % TURNS
    if FORM == "images":
        oh = program % OH
        n0 = program // OH * BLOCK_M
        image = n0 + m
        ih = oh * stride_h - pad_h
    elif FORM == "rows":
        row_blocks = (OH + BLOCK_M - 1) // BLOCK_M
        oh0 = program % row_blocks * BLOCK_M
        oh = oh0 + m
        image = program // row_blocks
        # Input rows are counted as (quotient, remainder) of the stride: one step of the quotient is
        # one output row.
        back = (pad_h + stride_h - 1) // stride_h
        quotient = oh0 - back
        remainder = back * stride_h - pad_h
    else:
        turn = program % TURNS  # all rows of a tile take the same pack
        row = program // TURNS * BLOCK_M + m
        group = row // N // OH * TURNS + turn
        oh = row // N % OH
        image = row % N
        ih = oh * stride_h - pad_h
    there = (image < N) & (oh < OH)

    start = ((group * STEP - LEFT) >> 3) * 8  # rounded down, also below zero
    if not DESCRIPTORS:
        UNIT: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth
        row_step = x_h.to(tl.int64) * UNIT
        number = start[:, None] + tl.arange(0, BLOCK_K)[None, :]
        x_tile = x + (image.to(tl.int64) * x_n * UNIT + ih * row_step)[:, None] + number

    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    if BLOCK_N2 > 0:
        acc2 = tl.full((BLOCK_M, BLOCK_N2), 0.0, tl.float32)
    for kh in range(at_least_one(KH)):
        for k0 in tl.static_range(0, WINDOW, BLOCK_K):
            if FORM == "images":
                a = x.load([ih + kh, n0, start + k0]).reshape(BLOCK_M, BLOCK_K)
            elif FORM == "rows":
                a = x.load([remainder, image, quotient, start + k0]).reshape(BLOCK_M, BLOCK_K)
            else:
                inside = (there & (ih + kh >= 0) & (ih + kh < H))[:, None]
                inside &= (number + k0 >= 0) & (number + k0 < NUMBERS)
                a = tl.load(x_tile + (kh * row_step + k0), mask=inside, other=0.0)
            b = _load_filters(
                w, turn * KH + kh, first, k0, FILTERS, WINDOW, DESCRIPTORS, BLOCK_N, BLOCK_K
            )
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
            if BLOCK_N2 > 0:
                second = first + BLOCK_N
                b2 = _load_filters(
                    w2, turn * KH + kh, second, k0, FILTERS, WINDOW, DESCRIPTORS, BLOCK_N2, BLOCK_K
                )
                acc2 = tl.dot(a, b2.T, acc2, input_precision=PRECISION)
        if FORM == "rows":
            remainder += 1
            quotient = tl.where(remainder == stride_h, quotient + 1, quotient)
            remainder = tl.where(remainder == stride_h, 0, remainder)

    ow = group * COLUMNS
    start = (oh.to(tl.int64) * y_h + ow.to(tl.int64) * y_w) * 8 + image.to(tl.int64) * Y_N
    limit = tl.where(there, tl.minimum(OW - ow, COLUMNS), 0)  # below 0 behind the last group
    y_w *= 8
    _store_columns(
        acc, y, start, limit, bias, scale, shift, y_w, first, COLUMNS, OC, BLOCK_N, ACTIVATION
    )
    if BLOCK_N2 > 0:
        first += BLOCK_N
        _store_columns(
            acc2, y, start, limit, bias, scale, shift, y_w, first, COLUMNS, OC, BLOCK_N2, ACTIVATION
        )


# --- configurations --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FirstLayerConfig:
    """How a first convolution is cut into tiles, and what the compiler is told."""

    form: Form
    columns: int
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_N2: int  # (column, filter) pairs of a second accumulator
    BLOCK_K: int
    num_warps: int = 4
    num_stages: int = 3


def default_config(
    shape: Conv2dShape,
    pixel: int,
    dtype: torch.dtype,
    precision: str,
    arch: int | None,
    batch_invariant: bool = False,
    affine: bool = False,
) -> FirstLayerConfig:
    """A configuration that runs without a measurement, on compute capability `arch` (80, 90, ...).

    `affine` says that a scale and a shift end it. None is the interpreter: every operation costs it
    about the same whatever its size, so tiles are few and large. With `batch_invariant` the choice
    does not look at the number of images; else it is the cheapest of `candidates`.
    """
    if arch is None:
        columns = max(c for c in range(1, 9) if window(shape, pixel, c) <= LARGEST)
        block_k = power_of_two(window(shape, pixel, columns), 16, LARGEST)
        block_n = power_of_two(columns * shape.OC, 16, 1024)
        rows = -(-shape.OW // columns) * shape.OH * (1 if batch_invariant else shape.N)
        block_m = power_of_two(rows, 16, MAX_TILE // max(block_n, block_k))
        return FirstLayerConfig("pointers", columns, block_m, block_n, 0, block_k)
    form: Form = "pointers" if arch < 90 else "rows"
    if form == "rows" and not batch_invariant and _idle(shape.N) <= _idle(shape.OH):
        form = "images"
    if dtype == torch.float32 and precision == "ieee":  # no tensor core computes this: plain FMAs
        return FirstLayerConfig(form, 1, 64, 32, 0, 16, num_warps=4, num_stages=2)
    chip, like = cost.chip_of(arch), replace(shape, N=64) if batch_invariant else shape
    return cost.cheapest(
        candidates(shape, pixel, form, dtype, arch, affine),
        lambda config: cost.first_layer_cost(like, pixel, config, dtype, precision, chip),
    )


def candidates(
    shape: Conv2dShape,
    pixel: int,
    form: Form,
    dtype: torch.dtype,
    arch: int,
    affine: bool = False,
) -> Iterator[FirstLayerConfig]:
    """What a default is chosen from: a dozen tiles of one form; for tensor cores."""
    of_a_thread = _OF_AN_AFFINE_THREAD if affine and dtype.itemsize > 2 else _OF_A_THREAD
    possible = [c for c in range(1, 9) if window(shape, pixel, c) <= LARGEST]
    largest = max(c for c in possible if c == 1 or c * shape.OC <= 256)
    hopper = 90 <= arch < 100
    widest = 256 if hopper else 128  # elsewhere the ends of wider tiles spill
    rows = (64,) if form == "rows" else (256, 128, 64) if hopper else (128, 64)
    if arch < 90 and dtype.itemsize > 2:
        rows = (64,)  # taller tiles of gathered rows spill
    room = cost.chip_of(arch).shared_memory - cost.RESERVED
    for columns, block_m, stages in itertools.product({largest, 1}, rows, (3, 2)):
        _, block_n, block_n2 = _cut(columns * shape.OC, widest)
        block_k = power_of_two(window(shape, pixel, columns), 16, LARGEST)
        few = block_m == 64 or (hopper and block_m == 128 and block_n + block_n2 <= 192)
        warps = 4 if few else 8
        taken = stages * (block_m + block_n + block_n2) * block_k * dtype.itemsize
        if block_m * (block_n + block_n2) <= of_a_thread * 32 * warps and taken < room:
            yield FirstLayerConfig(
                *(form, columns, block_m, block_n, block_n2, block_k, warps, stages)
            )


# Sums of a tile, and of one in float32 that ends in a scale and a shift: with more, these spill.
_OF_A_THREAD, _OF_AN_AFFINE_THREAD = 192, 128


def _idle(size: int) -> float:
    """The share of rows that do nothing where tiles of 64 cover `size`."""
    return -size % 64 / max(size, 1)


def _cut(numbers: int, widest: int) -> tuple[int, int, int]:
    """Blocks of one or two accumulators that cover so many (column, filter) pairs."""
    blocks = -(-numbers // widest)
    size = power_of_two(-(-numbers // blocks), 16, widest)
    if size >= 64 and blocks * (size // 4 * 3) >= numbers:
        return blocks, size // 2, size // 4
    return blocks, size, 0


# --- packing ---------------------------------------------------------------------------------


def pack_weight(weight: torch.Tensor, shape: Conv2dShape, pixel: int, columns: int) -> torch.Tensor:
    """[OC, C, KH, KW] to [TURNS*KH, columns*OC, window]: each column's filter at its place."""
    oc, c, kh, kw = weight.shape
    behind = shifts(shape, pixel, columns)
    taps = weight.new_zeros((kh, oc, kw, pixel))
    taps[..., :c] = weight.permute(2, 0, 3, 1)
    taps = taps.reshape(kh, oc, kw * pixel)
    packed = weight.new_zeros((len(behind), kh, columns, oc, window(shape, pixel, columns)))
    for turn, shift in enumerate(behind):
        for column in range(columns):
            first = shift + column * shape.stride[1] * pixel
            packed[turn, :, column, :, first : first + kw * pixel] = taps
    return packed.reshape(len(behind) * kh, columns * oc, -1)


# --- launcher --------------------------------------------------------------------------------


def first_layer(
    images: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    shape: Conv2dShape,
    pixel: int,
    config: FirstLayerConfig,
    activation: Activated = None,
    precision: str = "ieee",
    affine: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Launch:
    """Bind one first convolution; calling the result fills `out`.

    images is [N, rows, numbers], rows of pixels of `pixel` numbers, of which any beyond the image
    are zeros; numbers are dense, rows and images multiples of 16 bytes apart. The form `rows` wants
    a multiple of the stride of rows. weight is what `pack_weight` made for the same columns, bias
    [OC] or None, out an activation [OH, OW, N, OC] or a view that `layout.strides` takes; one dtype
    for all, but out may be float32. `precision` is that of float32 products: "ieee" or "tf32".
    `affine` is a scale and a shift, float32 [OC], after the activation. Raises ValueError for what
    this kernel cannot compute or read.
    """
    if not fits(shape, pixel):
        raise ValueError(
            f"first_layer: {shape} with {pixel} numbers a pixel is dilated, grouped or wider than "
            f"{LARGEST} numbers; use conv2d"
        )
    turns, columns = len(shifts(shape, pixel, config.columns)), config.columns
    packed = (turns * shape.KH, columns * shape.OC, window(shape, pixel, columns))
    if tuple(weight.shape) != packed:
        raise ValueError(
            f"first_layer: weight {tuple(weight.shape)}, wanted {packed} for {columns} columns and "
            f"{pixel} numbers a pixel; make it with pack_weight"
        )
    unit = 16 // images.dtype.itemsize
    rows, numbers = images.shape[1:]
    step_n, step_h, dense = images.stride()
    stride_h, stride_w = shape.stride
    enough = rows // stride_h * stride_h if config.form == "rows" else rows
    if any((dense != 1, step_n % unit, step_h % unit, enough < shape.H, numbers < shape.W * pixel)):
        raise ValueError(
            f"first_layer: images {tuple(images.shape)} have strides {images.stride()}, wanted "
            f"[{shape.N}, {shape.H}, {shape.W * pixel}] or more, dense numbers, other strides "
            f"multiples of {unit}, and for the form rows a multiple of {stride_h} rows; make them "
            "with channels_last"
        )
    if columns * out.stride(1) >= 2**31:
        raise ValueError(
            f"first_layer: {columns} columns of an output {out.stride(1)} numbers apart are more "
            "than a 32-bit index counts; use a smaller batch"
        )
    layout.check_rows("first_layer", shape.OH * shape.OW * shape.N, config.BLOCK_M)
    check_activation("first_layer", activation)
    scale, shift = affine or (None, None)
    arguments = {
        "x": images,
        "w": weight,
        "w2": weight if config.BLOCK_N2 else None,
        "bias": bias,
        "scale": scale,
        "shift": shift,
        "y": out,
        **fields_of(shape, "N", "H", "OH", "OW", "KH"),
        "stride_h": stride_h,
        "pad_h": shape.padding[0],
        "x_n": step_n // unit,
        "x_h": step_h // unit,
        **layout.addressed("y", out),
        "NUMBERS": numbers,
        "STEP": columns * stride_w * pixel,
        "LEFT": shape.padding[2] * pixel,
        "TURNS": turns,
        "WINDOW": packed[2],
        "COLUMNS": columns,
        "OC": shape.OC,
        "FORM": config.form,
        **fields_of(config, "BLOCK_M", "BLOCK_N", "BLOCK_N2", "BLOCK_K"),
        "ACTIVATION": activation,
        "PRECISION": precision,
        "PDL": False,
    }
    if config.form != "pointers":
        arguments["x"] = _image_descriptor(images, shape, config)
        for name, block in (("w", config.BLOCK_N), ("w2", config.BLOCK_N2)):
            if block:
                box = [1, block, config.BLOCK_K]
                arguments[name] = TensorDescriptor(
                    weight, list(weight.shape), list(weight.stride()), box
                )
    groups, block_m = -(-shape.OW // columns), config.BLOCK_M
    tiles = {
        "images": groups * shape.OH * -(-shape.N // block_m),
        "rows": groups * -(-shape.OH // block_m) * shape.N,
        "pointers": turns * -(-(-(-groups // turns) * shape.OH * shape.N) // block_m),
    }
    blocks = -(-packed[1] // (config.BLOCK_N + config.BLOCK_N2))
    grid = (blocks * tiles[config.form],)
    return Launch(_first_layer_kernel, grid, arguments, config.num_warps, config.num_stages)


def _image_descriptor(
    images: torch.Tensor, shape: Conv2dShape, config: FirstLayerConfig
) -> TensorDescriptor:
    """Boxes of one window: of one row of many images, or of many rows of one image."""
    (_, rows, numbers), (step_n, step_h, _) = images.shape, images.stride()
    if config.form == "images":
        sizes, steps = [shape.H, shape.N, numbers], [step_h, step_n, 1]
        box = [1, config.BLOCK_M, config.BLOCK_K]
    else:
        s = shape.stride[0]
        sizes, steps = [s, shape.N, rows // s, numbers], [step_h, step_n, s * step_h, 1]
        box = [1, 1, config.BLOCK_M, config.BLOCK_K]
    return TensorDescriptor(images, sizes, steps, box)


# --- reference and work ----------------------------------------------------------------------

reference = conv.reference
work = conv.work
