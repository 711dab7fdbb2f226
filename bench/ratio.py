"""How many times as fast, and how sure that is: medians over the same rounds, resampled together.

Turns of one round are neighbours in time, so what disturbs one contestant there disturbs all, and a
resampled round takes all of its turns along: the paired bootstrap (B. Efron, R. Tibshirani, "An
introduction to the bootstrap", 1993), seeded, so that the same samples tell the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from . import units
from .records import Row, best_peer

Array = NDArray[numpy.float64]

LEVEL = 95  # percent of intervals, one by one
LEAST = 6  # rounds: the range of fewer holds a median with less than LEVEL


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times as fast one is as another, and the interval of LEVEL; None: too few rounds."""

    value: float
    interval: tuple[float, float] | None = None

    def __str__(self) -> str:
        if self.interval is None:
            return units.times(self.value)
        ends = ", ".join(units.times(end).removesuffix("x") for end in self.interval)
        return f"{units.times(self.value)} [{ends}]"


def resampled(
    samples: Sequence[Sequence[float]], count: int, seed: int = 0, rounds: int | None = None
) -> Array:
    """Medians [count, contestants] over resampled rounds of `samples` [contestants, times].

    `rounds` is their number where a turn took more than one time, of equally many each.
    """
    taken = numpy.asarray(samples, dtype=float)
    rounds = rounds or taken.shape[1]
    each = taken.shape[1] // rounds
    taken = taken[:, : rounds * each].reshape(-1, rounds, each)
    drawn = numpy.random.default_rng(seed).integers(rounds, size=(count, rounds))
    drawn_times = taken[:, drawn].reshape(len(taken), count, rounds * each)
    ordered = numpy.sort(drawn_times, axis=2)  # three times as fast as numpy.median
    size = rounds * each
    medians: Array = (ordered[..., (size - 1) // 2] + ordered[..., size // 2]).T / 2
    return medians


def ratio(row: Row, other: Row) -> Ratio | None:
    """How many times as fast `row` is as another of its race; None where one was not timed."""
    if not row.median_us or not other.median_us:
        return None
    value = other.median_us / row.median_us
    if len(row.samples) != len(other.samples) or row.turns < LEAST:
        return Ratio(value)
    medians = resampled((other.samples, row.samples), 1000, rounds=row.turns)
    tail = (100 - LEVEL) / 2
    low, high = numpy.percentile(medians[:, 0] / medians[:, 1], (tail, 100 - tail))
    return Ratio(value, (float(low), float(high)))


def to_best_peer(row: Row, rows: Iterable[Row]) -> Ratio | None:
    """How many times as fast as the best peer of its race; None where one was not timed."""
    peer = best_peer(row, rows)
    return ratio(row, peer) if peer else None
