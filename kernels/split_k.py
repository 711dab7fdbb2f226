"""Sums cut into parts: what makes one launch of every split-K kernel.

    y[m, oc] = act(bias[oc] + sum over parts of parts[part, m, oc]) * scale[oc] + shift[oc]

A small batch gives a convolution or a linear layer fewer tiles than a GPU has multiprocessors, so
the sum over K is split among programs. Each writes its float32 part of the tile and then counts
itself in; the last to arrive adds the parts and ends with the epilogue. It adds them in their
order, so the result does not depend on who was last, and it sets the counter back to zero for the
next launch. That the parts of others are visible to it takes a barrier (all threads have written)
before an atomic that releases and acquires, and loads past the L1 cache ("threadFenceReduction" in
NVIDIA's CUDA samples; PTX ISA, "Memory Consistency Model").

Cost: SPLIT_K - 1 additions an output; the parts are written and read once, 8 * SPLIT_K bytes an
output, most of it in the L2 cache.
"""

from __future__ import annotations

import torch
import triton.language as tl

from . import layout
from .jit import jit


@jit
def at_least_one(steps):
    """`steps`, which is never less than one, so that the compiler knows it too.

    A loop that might not run leaves its sums zero on a way around it. With Triton 3.6 that can be
    reason enough for ptxas (C7515) to finish every warpgroup product before it starts the next.
    """
    return tl.maximum(steps, 1)


@jit
def arrived_last(counter, SPLIT_K: tl.constexpr):
    """Whether the other programs of this tile have stored their parts; then `counter` is zero."""
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel") == SPLIT_K - 1
    if last:
        tl.store(counter, 0)
    return last


@jit
def add_parts(
    places,  # where the first part of each element lies
    size,  # int64: elements from part to part
    inside,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """The sum of a tile's parts, in their order."""
    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for part in tl.static_range(SPLIT_K):
        acc += tl.load(places + part * size, mask=inside, other=0.0, cache_modifier=".cg")
    return acc


def filled(split: int, steps: int) -> int:
    """How many parts of a sum of `steps` have any, if it is cut into `split` of equal length."""
    return -(-steps // -(-steps // split))


def scratch_size(split: int, rows: int, channels: int) -> int:
    """float32 numbers that `split` parts of [rows, channels] take; none if there is one part."""
    return split * rows * layout.aligned(channels) if split > 1 else 0


def parts_of(
    scratch: torch.Tensor | None, split: int, rows: int, channels: int, device: torch.device
) -> torch.Tensor | None:
    """Room for the parts, float32 [split, rows, channels aligned]: in `scratch` or new.

    None if there is one part.
    """
    if split == 1:
        return None
    size = scratch_size(split, rows, channels)
    if scratch is None:
        scratch = torch.empty(size, dtype=torch.float32, device=device)
    return scratch[:size].view(split, rows, layout.aligned(channels))


def counters_for(split: int, tiles: int, device: torch.device) -> torch.Tensor | None:
    """Zeros, int32, one a tile; None if there is one part.

    Their memory is the launch's own, since what a plan shares is overwritten. Copied from the host,
    which waits for it: a stream other than the current one may launch next.
    """
    return torch.zeros(tiles, dtype=torch.int32).to(device) if split > 1 else None
