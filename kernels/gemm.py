"""Fully connected layer + epilogue: a GEMM, and its skinny form for small batches.

    y[n, oc] = act(bias[oc] + sum over p, c of x[p, n, c] * w[oc, p, c])

x is an activation [P, N, C]: P pixels of C channels an image, so that the first linear layer reads
a pooled activation [H, W, N, C] where it lies (P = H*W) and no flattened copy is made; a plain
matrix has P = 1. The weights are permuted once, when they are packed.

With few images the layer is a stream of weights through the chip, 2 * OC * P * C bytes in half
precision, and the tile's long side belongs to the weights. TRANSPOSED computes y^T = w x^T: filters
on the M side of the matrix instruction, which has at least 64 rows, images on its N side. SPLIT_K
cuts the sum into parts so that every multiprocessor streams, and the last program to arrive adds
them (see split_k.py).

Cost: 2 * N * OC * P * C FLOPs; x, w and y move once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import cost, layout
from .epilogue import Activated, activated, check_activation, finish
from .jit import Launch, Work, fields_of, jit, power_of_two
from .pdl import announce, first_steps, prefetch, wait
from .split_k import (
    add_parts,
    arrived_last,
    at_least_one,
    counters_for,
    filled,
    parts_of,
    scratch_size,
)


@dataclass(frozen=True, slots=True)
class LinearShape:
    """One linear problem: N images of P pixels with C channels each, to OC outputs."""

    N: int
    P: int
    C: int
    OC: int


# --- kernels ---------------------------------------------------------------------------------


@jit(do_not_specialize=("N", "P"))
def _linear_kernel(
    x,  # [P, N, C aligned], as a descriptor or a pointer
    w,  # [P, OC, C aligned], as a descriptor or a pointer
    w_memory,  # w as a pointer
    bias,  # [OC] or None
    scale,  # float32 [OC] or None
    shift,  # float32 [OC] or None
    y,  # [N, OC aligned]
    parts,  # float32 [SPLIT_K, N, OC aligned] or None
    counters,  # int32, zero: one a tile, or None
    N,
    P,
    C: tl.constexpr,
    OC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    announce(PDL)
    # Image blocks run fastest: programs that run together share their weights, the larger operand.
    n_blocks = (N + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0)
    n0 = (program % n_blocks) * BLOCK_M
    oc0 = (program // n_blocks) * BLOCK_N
    part = tl.program_id(1)
    image = n0 + tl.arange(0, BLOCK_M)
    channel = oc0 + tl.arange(0, BLOCK_N)

    C_BLOCKS: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    PITCH: tl.constexpr = (C + 7) // 8 * 8
    steps = P * C_BLOCKS
    per_part = (steps + SPLIT_K - 1) // SPLIT_K
    first = part * per_part
    last = tl.minimum(first + per_part, steps)
    if PDL:
        rows = w_memory + tl.minimum(channel, OC - 1).to(tl.int64) * PITCH
        ahead = first_steps(BLOCK_N, BLOCK_K, w_memory)
        for i in range(first, tl.minimum(first + ahead, last)):
            step = (i // C_BLOCKS).to(tl.int64) * (OC * PITCH) + (i % C_BLOCKS) * BLOCK_K
            prefetch(rows + step, BLOCK_K)
    wait(PDL)
    if TRANSPOSED:
        acc = tl.full((BLOCK_N, BLOCK_M), 0.0, tl.float32)
    else:
        acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for turn in range(at_least_one(last - first)):
        i = first + turn
        p = i // C_BLOCKS
        c0 = (i % C_BLOCKS) * BLOCK_K
        if DESCRIPTORS:
            a = x.load([p, n0, c0]).reshape(BLOCK_M, BLOCK_K)
            b = w.load([p, oc0, c0]).reshape(BLOCK_N, BLOCK_K)
        else:
            k = c0 + tl.arange(0, BLOCK_K)
            x_row = x + (p.to(tl.int64) * N + image)[:, None] * PITCH
            w_row = w + (p.to(tl.int64) * OC + channel)[:, None] * PITCH
            a = tl.load(x_row + k[None, :], mask=(image < N)[:, None] & (k < C)[None, :], other=0.0)
            b = tl.load(
                w_row + k[None, :], mask=(channel < OC)[:, None] & (k < C)[None, :], other=0.0
            )
        if TRANSPOSED:
            acc = tl.dot(b, a.T, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)

    if TRANSPOSED:
        acc = tl.trans(acc)
    offset = image.to(tl.int64)[:, None] * ((OC + 7) // 8 * 8) + channel[None, :]
    inside = (image < N)[:, None] & (channel < OC)[None, :]
    if SPLIT_K == 1:
        acc = finish(acc, bias, scale, shift, channel, channel < OC, ACTIVATION)
        tl.store(y + offset, acc.to(y.dtype.element_ty), mask=inside)
    else:
        size = N.to(tl.int64) * ((OC + 7) // 8 * 8)
        tl.store(parts + offset + part * size, acc, mask=inside)
        if arrived_last(counters + tl.program_id(0), SPLIT_K):
            acc = add_parts(parts + offset, size, inside, BLOCK_M, BLOCK_N, SPLIT_K)
            acc = finish(acc, bias, scale, shift, channel, channel < OC, ACTIVATION)
            tl.store(y + offset, acc.to(y.dtype.element_ty), mask=inside)


# --- configurations --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LinearConfig:
    """How one linear layer is cut into tiles, and what the compiler is told."""

    BLOCK_M: int  # images
    BLOCK_N: int  # output channels
    BLOCK_K: int
    SPLIT_K: int = 1
    transposed: bool = False
    num_warps: int = 4
    num_stages: int = 3
    descriptors: bool = True  # operands through tensor descriptors: TMA, so sm_90 and later


def default_config(
    shape: LinearShape,
    dtype: torch.dtype,
    precision: str,
    arch: int | None,
    batch_invariant: bool = False,
    affine: bool = False,
) -> LinearConfig:
    """A configuration that runs without a measurement, on compute capability `arch` (80, 90, ...).

    `affine` says that a scale and a shift end it. None is the interpreter: few, large tiles. With
    `batch_invariant` the choice does not look at the number of images and the sum is never split;
    else it is the cheapest of `candidates`.
    """
    if arch is None:
        rows = 256 if batch_invariant else power_of_two(shape.N, 16, 1024)
        return LinearConfig(rows, power_of_two(shape.OC, 16, 1024), power_of_two(shape.C, 16, 1024))
    tma = arch >= 90
    if dtype == torch.float32 and precision == "ieee":  # no tensor core computes this: plain FMAs
        return LinearConfig(64, 32, 16, num_warps=4, num_stages=2, descriptors=tma)
    if batch_invariant:
        block_k = power_of_two(shape.C, 16, 128 // dtype.itemsize)
        return LinearConfig(64, 64, block_k, num_warps=4, num_stages=4, descriptors=tma)
    chip = cost.chip_of(arch)
    return cost.cheapest(
        candidates(shape, dtype, arch, affine),
        lambda config: cost.linear_cost(shape, config, dtype, precision, chip),
    )


# Images and outputs of a tile, how many times 128 bytes of K, warps, stages. The first of equals is
# chosen, so those that have been measured to be fast stand before others.
_HOPPER = (
    *((128, 256, 1, 8, 3), (128, 128, 2, 8, 3), (256, 128, 1, 8, 3), (64, 128, 1, 4, 4)),
    (64, 64, 1, 4, 4),
)
_OTHERS = ((128, 128, 1, 8, 3), (64, 64, 1, 4, 4))
_FEW = 128  # images: as many fit on the short side of a tile of weights
# Sums of a split tile, and of all its parts: with more, adding the parts spills.
_OF_A_THREAD, _PARTS_OF_A_THREAD = 64, 256


def candidates(
    shape: LinearShape, dtype: torch.dtype, arch: int, affine: bool = False
) -> Iterator[LinearConfig]:
    """What a default is chosen from: a dozen tiles and splits of their sums.

    For tensor cores, on compute capability `arch`. Blocks are no larger than the layer wants.
    """
    chip = cost.chip_of(arch)
    tiles = [(*tile, False) for tile in (_HOPPER if 90 <= arch < 120 else _OTHERS)]
    if shape.N <= _FEW:
        images = power_of_two(shape.N, 16, _FEW)
        tiles = [(images, 64, 1, 4, 4, True), (images, 64, 2, 4, 3, True)]
    for block_m, block_n, wide, warps, stages, transposed in tiles:
        # Where C is shallow, so is the deeper tile; large ones spill at their ends.
        spills = (block_m > 128 and (affine or arch >= 100)) or (
            block_n > 128 and affine and arch >= 100
        )
        if spills or (wide > 1 and shape.C * dtype.itemsize <= 128):
            continue
        block_k = power_of_two(shape.C, 16, wide * 128 // dtype.itemsize)
        block_n = block_n if transposed else min(block_n, power_of_two(shape.OC, 16, 256))
        programs = -(-shape.N // block_m) * -(-shape.OC // block_n)
        steps = shape.P * -(-shape.C // block_k)
        splits, sums = {1}, block_m * block_n // (32 * warps)
        shallow = block_k * dtype.itemsize < 128
        spills = shallow if arch >= 100 else sums >= 32 and dtype.itemsize > 2 and arch < 90
        spills |= arch >= 100 and sums >= 32 and steps <= 8
        if sums <= _OF_A_THREAD and not spills:
            most = _PARTS_OF_A_THREAD // sums
            fill = (cost.parts_to_fill(programs, steps, chip, waves) for waves in (1, 2))
            splits = {min(split, most) for split in fill}
        for split in sorted(splits):
            yield LinearConfig(
                *(block_m, block_n, block_k, split, transposed, warps, stages),
                descriptors=arch >= 90,
            )


# --- packing ---------------------------------------------------------------------------------


def pack_weight(weight: torch.Tensor, pixels: int = 1) -> torch.Tensor:
    """[OC, C*P] to [P, OC, C], channels aligned, where the input was flattened from [C, P].

    torch flattens [C, H, W], so a weight's columns run over channels first; here they run over
    pixels first, as activations do.
    """
    oc, features = weight.shape
    c = features // pixels
    packed = weight.new_zeros((pixels, oc, layout.aligned(c)))
    packed[..., :c] = weight.reshape(oc, c, pixels).permute(2, 0, 1)
    return packed[..., :c]


# --- launcher --------------------------------------------------------------------------------


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    config: LinearConfig,
    activation: Activated = None,
    precision: str = "ieee",
    affine: tuple[torch.Tensor, torch.Tensor] | None = None,
    scratch: torch.Tensor | None = None,
) -> Launch:
    """Bind one linear layer; calling the result fills `out`.

    x is an activation [H, W, N, C], weight what `pack_weight` made of it [H*W, OC, C], bias [OC]
    or None, out an activation [1, 1, N, OC]; one dtype for all, but `out` may be float32.
    `precision` is that of float32 products: "ieee" or "tf32". `affine` is a scale and a shift,
    float32 [OC], after the activation. `scratch` holds the parts of a split sum, float32 of
    `scratch_numbers(shape, config)` elements; None: the launches own one.
    """
    height, width, n, c = x.shape
    pixels, oc, _ = weight.shape
    pitch = layout.pitch(x)
    layout.pitch(out)
    layout.check_rows("linear", n, config.BLOCK_M)
    check_activation("linear", activation)
    scale, shift = affine or (None, None)
    split = filled(config.SPLIT_K, pixels * -(-c // config.BLOCK_K))
    blocks = -(-n // config.BLOCK_M) * -(-oc // config.BLOCK_N)
    arguments = {
        "x": x,
        "w": weight,
        "w_memory": weight,
        "bias": bias,
        "scale": scale,
        "shift": shift,
        "y": out,
        "parts": parts_of(scratch, split, n, oc, x.device),
        "counters": counters_for(split, blocks, x.device),
        "N": n,
        "P": height * width,
        "C": c,
        "OC": oc,
        **fields_of(config, "BLOCK_M", "BLOCK_N", "BLOCK_K"),
        "SPLIT_K": split,
        "TRANSPOSED": config.transposed,
        "DESCRIPTORS": config.descriptors,
        "ACTIVATION": activation,
        "PRECISION": precision,
        "PDL": False,
    }
    if config.descriptors:
        arguments["x"] = TensorDescriptor(
            x,
            shape=[pixels, n, c],
            strides=[n * pitch, pitch, 1],
            block_shape=[1, config.BLOCK_M, config.BLOCK_K],
        )
        arguments["w"] = TensorDescriptor(
            weight,
            shape=[pixels, oc, c],
            strides=[oc * pitch, pitch, 1],
            block_shape=[1, config.BLOCK_N, config.BLOCK_K],
        )
    return Launch(_linear_kernel, (blocks, split), arguments, config.num_warps, config.num_stages)


def scratch_numbers(shape: LinearShape, config: LinearConfig) -> int:
    """float32 numbers that the parts of a split sum take."""
    return scratch_size(config.SPLIT_K, shape.N, shape.OC)


# --- reference and work ----------------------------------------------------------------------


def reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: Activated = None
) -> torch.Tensor:
    """The same layer in float64 by torch: [N, C*P] and [OC, C*P] to [N, OC]."""
    y = torch.nn.functional.linear(
        x.double(), weight.double(), None if bias is None else bias.double()
    )
    return activated(y, activation)


def work(shape: LinearShape, dtype: torch.dtype) -> Work:
    """FLOPs of the product; x, w, bias and y moved once."""
    features = shape.P * shape.C
    elements = shape.N * (features + shape.OC) + shape.OC * (features + 1)
    return Work(2 * shape.N * features * shape.OC, elements * dtype.itemsize)
