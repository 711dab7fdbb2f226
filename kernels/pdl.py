"""Programmatic dependent launch: a kernel starts while the one before it still runs.

Between two kernels of a stream lies about a microsecond in which the GPU drains and fills again,
much of a small batch's time. A kernel launched with the attribute may be placed on the
multiprocessors as soon as every program of its predecessor has said so, and waits at its first
line until the predecessor has finished and its writes are visible. Each kernel here says so first
and waits next, before any access to memory, so results pass from kernel to kernel as without it,
also over several: a kernel finishes only after its own predecessor has. CUDA C++ Programming
Guide, "Programmatic Dependent Launch"; compute capability 9.0 and later.

Weights do not depend on the predecessor, so kernels that stream them ask for the first of them
before they wait (`prefetch`): memory is idle at that time, and they are in the L2 cache when they
are wanted. Only the first, since a launch takes a few microseconds and the cache holds less than a
large layer has.
"""

from __future__ import annotations

from dataclasses import replace

import triton.language as tl

from .jit import Launch, jit


@jit
def announce(PDL: tl.constexpr):
    """From here on the next kernel may be placed; nothing unless launches overlap."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@jit
def wait(PDL: tl.constexpr):
    """From here on memory holds what the kernel before has written; nothing without overlap."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@jit
def begin(PDL: tl.constexpr):
    """The first line of a kernel that has nothing to do before it may read."""
    announce(PDL)
    wait(PDL)


@jit
def first_steps(BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, weights):
    """How many steps of K a program asks for ahead: 32 KB of the weights it will read."""
    BITS: tl.constexpr = BLOCK_N * BLOCK_K * weights.dtype.element_ty.primitive_bitwidth
    return 8 * 32768 // BITS


@jit
def prefetch(rows, BLOCK_K: tl.constexpr):
    """Ask for BLOCK_K elements from each of the pointers `rows`, line by line, for the L2 cache."""
    LINE: tl.constexpr = 1024 // rows.dtype.element_ty.primitive_bitwidth  # 128 bytes
    for k in tl.static_range(0, BLOCK_K, LINE):
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [rows + k],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


def overlapping(launch: Launch) -> Launch:
    """The same launch, starting while the kernel before it on the stream still runs."""
    return replace(launch, arguments={**launch.arguments, "PDL": True}, pdl=True)
