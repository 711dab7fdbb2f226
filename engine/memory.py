"""Where in one block of memory each buffer lies: those alive at the same time never overlap.

Greedy by size (Y. Pisarchyk and J. Lee, "Efficient Memory Management for Deep Neural Net
Inference", 2020): the largest buffer first, each at the lowest place that is free for as long as it
lives. For the networks here this reaches the best there is, the largest sum of what is alive;
there are chains for which it does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT = 256  # bytes: what torch's own allocator gives, and more than any load wants


@dataclass(frozen=True, slots=True)
class Buffer:
    """So many bytes, written in step `first` and read for the last time in step `last`."""

    size: int
    first: int
    last: int


def arrange(buffers: Sequence[Buffer]) -> tuple[list[int], int]:
    """An offset for every buffer, and the bytes of the whole block."""
    offsets = [0] * len(buffers)
    placed: list[int] = []
    for i in sorted(range(len(buffers)), key=lambda i: -buffers[i].size):
        mine = buffers[i]
        alive = [
            (offsets[j], offsets[j] + _aligned(buffers[j].size))
            for j in placed
            if buffers[j].first <= mine.last and mine.first <= buffers[j].last
        ]
        for start, end in sorted(alive):
            if offsets[i] + mine.size <= start:
                break
            offsets[i] = max(offsets[i], end)
        placed.append(i)
    ends = (offset + _aligned(b.size) for offset, b in zip(offsets, buffers, strict=True))
    return offsets, max(ends, default=0)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
