"""Programmatic dependent launch: a kernel starts while the one before it still runs.

Between two kernels of a stream lies about a microsecond in which the GPU drains and fills again,
much of a small batch's time. A kernel launched with the attribute may be placed on the
multiprocessors as soon as every program of its predecessor has said so, and waits at its first
line until the predecessor has finished and its writes are visible. Each kernel here says so first
and waits next, before any access to memory, so results pass from kernel to kernel as without it,
also over several: a kernel finishes only after its own predecessor has. CUDA C++ Programming
Guide, "Programmatic Dependent Launch"; compute capability 9.0 and later.
"""

from __future__ import annotations

from dataclasses import replace

import triton.language as tl

from .jit import Launch, jit


@jit
def begin(PDL: tl.constexpr):
    """The first line of every kernel; nothing unless the launch overlaps with the one before."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


def overlapping(launch: Launch) -> Launch:
    """The same launch, starting while the kernel before it on the stream still runs."""
    return replace(launch, arguments={**launch.arguments, "PDL": True}, pdl=True)
