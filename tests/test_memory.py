"""Buffers in one block of memory: never two at one place at one time."""

from __future__ import annotations

import itertools

from alexnet_triton.engine.memory import ALIGNMENT, Buffer, arrange
from hypothesis import given
from hypothesis import strategies as st


@st.composite
def buffers(draw: st.DrawFn) -> Buffer:
    first = draw(st.integers(0, 12))
    return Buffer(draw(st.integers(0, 5000)), first, first + draw(st.integers(0, 12)))


@given(st.lists(buffers(), max_size=14))
def test_buffers_alive_together_lie_apart(some: list[Buffer]) -> None:
    offsets, total = arrange(some)
    for (a, at), (b, bt) in itertools.combinations(zip(some, offsets, strict=True), 2):
        if a.first <= b.last and b.first <= a.last:
            assert at + a.size <= bt or bt + b.size <= at
    for buffer, offset in zip(some, offsets, strict=True):
        assert offset % ALIGNMENT == 0
        assert offset + buffer.size <= total


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12))
def test_a_chain_reuses_memory(sizes: list[int]) -> None:
    """It takes what is alive at once, here two neighbours, and never as much as all together."""
    chain = [Buffer(size * ALIGNMENT, i, i + 1) for i, size in enumerate(sizes)]
    _, total = arrange(chain)
    alive = max(a + b for a, b in itertools.pairwise([0, *sizes])) * ALIGNMENT
    assert alive <= total <= sum(sizes) * ALIGNMENT
    assert len(sizes) < 3 or total < sum(sizes) * ALIGNMENT


def test_nothing_takes_nothing() -> None:
    assert arrange([]) == ([], 0)
