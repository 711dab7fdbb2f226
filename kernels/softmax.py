"""Softmax over the channels of each image: the output of networks that give probabilities.

    y[m, c] = exp(x[m, c] - max of x[m]) / sum over j of exp(x[m, j] - max of x[m])

A tile is BLOCK_M rows of all C channels, in float32; subtracting the row's largest keeps the
exponentials finite. Cost: about four operations per element; x and y move once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl

from . import layout
from .jit import MAX_TILE, Launch, Work, jit, power_of_two
from .pdl import begin


@dataclass(frozen=True, slots=True)
class SoftmaxShape:
    """M rows of C channels."""

    M: int
    C: int


@jit(do_not_specialize=("M",))
def _softmax_kernel(
    x,  # [M, C aligned]
    y,  # [M, C aligned]
    M,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_C)
    offset = row.to(tl.int64)[:, None] * ((C + 7) // 8 * 8) + c[None, :]
    inside = (row < M)[:, None] & (c < C)[None, :]
    value = tl.load(x + offset, mask=inside, other=float("-inf")).to(tl.float32)
    # tl.max and tl.sum are jit functions (see jit.py); what they reduce with is at hand.
    largest = tl.reduce(value, 1, tl.standard._elementwise_max)
    largest = tl.where(row < M, largest, 0.0)  # not inf - inf in rows that are not there
    power = tl.exp(value - largest[:, None])
    total = tl.reduce(power, 1, tl.standard._sum_combine)
    tl.store(y + offset, (power / total[:, None]).to(y.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True)
class SoftmaxConfig:
    """Rows of a tile, which holds all channels."""

    BLOCK_M: int
    num_warps: int = 4


def default_config(shape: SoftmaxShape, arch: int | None) -> SoftmaxConfig:
    """A configuration that runs without a measurement; `arch` None is the interpreter."""
    block_c = power_of_two(shape.C, 16, MAX_TILE)
    if arch is None:
        return SoftmaxConfig(power_of_two(shape.M, 1, max(1, 262144 // block_c)))
    return SoftmaxConfig(max(1, 2048 // block_c))


def softmax(
    x: torch.Tensor, out: torch.Tensor, shape: SoftmaxShape, config: SoftmaxConfig
) -> Launch:
    """Bind one softmax; calling the result fills `out` from x, activations [H, W, N, C].

    Raises ValueError for more channels than one tile holds.
    """
    if shape.C > MAX_TILE:
        raise ValueError(f"softmax: wanted at most {MAX_TILE} channels, got {shape.C}")
    layout.check_rows("softmax", shape.M, config.BLOCK_M)
    layout.pitch(x)
    layout.pitch(out)
    arguments = {
        "x": x,
        "y": out,
        "M": shape.M,
        "C": shape.C,
        "BLOCK_M": config.BLOCK_M,
        "BLOCK_C": power_of_two(shape.C, 16, MAX_TILE),
        "PDL": False,
    }
    grid = (-(-shape.M // config.BLOCK_M),)
    return Launch(_softmax_kernel, grid, arguments, config.num_warps, num_stages=1)


def reference(x: torch.Tensor) -> torch.Tensor:
    """The same in float64 by torch: [N, C, ...] to [N, C, ...]."""
    return x.double().softmax(1)


def work(shape: SoftmaxShape, dtype: torch.dtype) -> Work:
    """Four operations per element; x and y moved once."""
    elements = shape.M * shape.C
    return Work(4 * elements, 2 * elements * dtype.itemsize)
