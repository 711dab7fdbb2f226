"""Two results files, row by row: what became faster, slower, wrong, or is in one alone.

Two runs of one program differ: the machine drifts, and a process has luck of its own with clocks
and memory. Both are seen in the peers, which nobody changed. So their common drift is divided out
of a row of ours, and how they scatter around it (R. DerSimonian, N. Laird, "Meta-analysis in
clinical trials", 1986) is added to what the samples of the row leave open. A row is faster or
slower where the interval of its ratio lies wholly beyond the threshold, and all rows of ours
together err in 1 % of comparisons (S. Holm, "A simple sequentially rejective multiple test
procedure", 1979).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import NormalDist
from typing import Any, Literal

import numpy

from ..engine import table
from . import units
from .ratio import LEAST, Array, resampled
from .records import Results, Row, load, races

SAME_MACHINE = (
    *("gpu name", "gpu driver_version", "gpu clocks.max.sm", "gpu power.limit"),
    *("torch", "triton", "cuda", "cudnn", "python", "cpu", "libraries"),
)
"""What two environments should share for their times to be compared."""

ROOFS_DIFFER = 0.05  # a card that measures itself so much slower is not in the same state
ERR = 0.01  # of comparisons, in which a row of ours is said to have changed that has not
RESAMPLED = 400
TINY = 1e-12  # a variance: no clock is without noise
CONTROLS = 5  # peers by a clock: fewer do not show their scatter well enough

Verdict = Literal["faster", "slower", "inconclusive", "lost", ""]


@dataclass(frozen=True, slots=True)
class Pair:
    """One contestant on one problem by one clock, then and now; a peer has no verdict."""

    old: Row
    new: Row
    verdict: Verdict = ""
    speed: tuple[float, float, float] | None = None  # times as fast, without the drift: low to high
    why: str = ""  # of a verdict without an interval

    @property
    def ratio(self) -> float | None:
        """Old median over new: above 1 it became faster. None where one was not timed."""
        if not self.old.median_us or not self.new.median_us:
            return None
        return self.old.median_us / self.new.median_us


@dataclass(frozen=True, slots=True)
class Drift:
    """What the peers tell by one clock: how many times as fast they became, in common."""

    clock: str
    peers: int
    value: float
    error: float  # standard, of its logarithm, from the peers' scatter
    scatter: float  # standard deviation of a contestant's own luck, of logarithms

    def __str__(self) -> str:
        return (
            f"{self.clock} clock: {self.peers} peers became {self.value:.3f}x as fast, which is "
            f"divided out; they scatter by {self.scatter:.1%}"
        )


@dataclass(frozen=True, slots=True)
class Comparison:
    """Rows of both files, rows of one, and what else differs."""

    pairs: tuple[Pair, ...]
    only_old: tuple[Row, ...]
    only_new: tuple[Row, ...]
    differences: tuple[str, ...]
    drifts: tuple[Drift, ...]
    threshold: float | None  # a fraction; None: being slower is no failure

    @property
    def failures(self) -> tuple[str, ...]:
        """Rows of ours that lost their match or became too slow, one line each."""
        found = []
        for pair in self.pairs:
            if pair.verdict == "lost":
                found.append(f"{pair.new.name}: {pair.why}")
            elif self.threshold is not None and pair.verdict == "slower":
                found.append(
                    f"{pair.new.name}: {pair.new.median_us:.2f} us, was "
                    f"{pair.old.median_us:.2f} us, more than {self.threshold:.1%} slower"
                )
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {**asdict(self), "failures": self.failures}

    def __str__(self) -> str:
        lines = [*self.differences, *map(str, self.drifts), *table.columns(self.pairs, COLUMNS)]
        for file, rows in (("old", self.only_old), ("new", self.only_new)):
            lines += [f"only in the {file} results: {row.name}" for row in rows]
        lines += [f"FAILED {failure}" for failure in self.failures]
        return "\n".join(lines)


def compare(old: Results, new: Results, threshold: float | None = None) -> Comparison:
    """Join two results race by race, in the order of the new one, and judge rows of ours.

    `threshold` is the fraction by which a row of ours may be slower, or faster, and be the same.
    """
    joined = _joined(old.rows, new.rows)
    seen = {id(row) for race in joined for pair in race for row in pair}
    verdicts, drifts = _judged(joined, math.log1p(threshold or 0.0))
    return Comparison(
        tuple(verdicts.values()),
        tuple(row for row in old.rows if id(row) not in seen),
        tuple(row for row in new.rows if id(row) not in seen),
        tuple(_differences(old, new)),
        tuple(drifts),
        threshold,
    )


def fraction(text: str) -> float:
    """'5%' is 0.05, and so is '5'. Raises ValueError for anything but a percentage from 0 up."""
    value = float(text.strip().removesuffix("%"))
    if not 0 <= value < float("inf"):
        raise ValueError(text)
    return value / 100


# --- joined and judged -----------------------------------------------------------------------

Race = list[tuple[Row, Row]]
"""One race, then and now: contestants of both."""


def _joined(old: Sequence[Row], new: Sequence[Row]) -> list[Race]:
    """Each new race with the old one of its measurement that shares most contestants with it."""
    before = list(races(old).values())
    joined = []
    for race in races(new).values():
        there = [
            {row.contestant: row for row in each}
            for each in before
            if each[0].measurement == race[0].measurement
        ]
        names = {row.contestant for row in race}
        one = max(there, key=lambda each: len(names & each.keys()), default={})
        joined.append([(one[row.contestant], row) for row in race if row.contestant in one])
    return joined


@dataclass(frozen=True, slots=True)
class _Change:
    """Logarithms of how many times as fast a row became, as measured and as resampled."""

    pair: Pair
    value: float
    resampled: Array
    rounds: int


def _judged(joined: Sequence[Race], threshold: float) -> tuple[dict[int, Pair], list[Drift]]:
    """Pairs with their verdicts, by the id of the new row, and what the peers show."""
    changes = [change for seed, race in enumerate(joined) for change in _changes(race, seed)]
    verdicts = {id(new): _unjudged(Pair(old, new)) for race in joined for old, new in race}
    drifts, found = [], []
    for clock in dict.fromkeys(change.pair.new.clock for change in changes):
        by = [change for change in changes if change.pair.new.clock == clock]
        peers = [change for change in by if not change.pair.new.ours]
        if len(peers) < CONTROLS:
            continue
        drift, common = _drift(clock, peers)
        drifts.append(drift)
        for change in (change for change in by if change.pair.new.ours):
            own = float(numpy.var(change.resampled - common, ddof=1))
            error = math.sqrt(own + drift.scatter**2 + drift.error**2 + TINY)
            freedom = min(change.rounds, drift.peers) - 1  # few peers hardly show a scatter
            found.append((change, change.value - math.log(drift.value), error, freedom))
    found.sort(key=lambda each: (threshold - abs(each[1])) / each[2])
    sure = True  # Holm's way: the surest first, at the widest, until one is not
    for rank, (change, value, error, freedom) in enumerate(found):
        wide = error * _quantile(1 - ERR / 2 / (len(found) - rank), freedom)
        sure = sure and abs(value) - wide > threshold
        verdict: Verdict = "inconclusive" if not sure else "faster" if value > 0 else "slower"
        speed = (math.exp(value - wide), math.exp(value), math.exp(value + wide))
        verdicts[id(change.pair.new)] = replace(change.pair, verdict=verdict, speed=speed)
    return verdicts, drifts


def _unjudged(pair: Pair) -> Pair:
    """The verdict on a row of ours without an interval, and what would give it one."""
    if not pair.new.ours:
        return pair
    if pair.old.right and not pair.new.right:
        return replace(pair, verdict="lost", why=pair.new.note or "no match any more")
    for file, row in (("old", pair.old), ("new", pair.new)):
        if len(row.samples) < LEAST:
            cure = f"{len(row.samples)} samples, measure again with --rounds {LEAST} or more"
            why = f"{file} results: {row.note if row.median_us is None else cure}"
            return replace(pair, verdict="inconclusive", why=why)
    few = f"fewer than {CONTROLS} peers in both results, measure more problems or --peers"
    return replace(pair, verdict="inconclusive", why=few)


def _changes(race: Race, seed: int) -> list[_Change]:
    """Of those of a race who were right and timed often enough in both files."""
    there = [
        (old, new)
        for old, new in race
        if old.right and new.right and min(old.turns, new.turns) >= LEAST
    ]
    if not there:
        return []
    (then, now), drawn = zip(*there, strict=True), []
    for file, rows in enumerate((then, now)):
        samples = [row.samples for row in rows]
        turns = rows[0].turns
        drawn.append(numpy.log(resampled(samples, RESAMPLED, 2 * seed + file, turns)))
    return [
        _Change(
            Pair(old, new),
            float(numpy.log(numpy.median(old.samples) / numpy.median(new.samples))),
            drawn[0][:, place] - drawn[1][:, place],
            min(old.turns, new.turns),
        )
        for place, (old, new) in enumerate(there)
    ]


def _drift(clock: str, peers: Sequence[_Change]) -> tuple[Drift, Array]:
    """What peers have in common, as measured and as resampled, each weighing what it is sure of."""
    values = numpy.array([peer.value for peer in peers])
    noise = numpy.array([numpy.var(peer.resampled, ddof=1) for peer in peers]) + TINY
    weights = 1 / noise
    spread = weights @ (values - weights @ values / weights.sum()) ** 2
    excess = (spread - (len(peers) - 1)) / (weights.sum() - weights @ weights / weights.sum())
    scatter = max(0.0, float(excess))  # a variance: what the peers' own noise does not explain
    weights = 1 / (noise + scatter)
    weights /= weights.sum()
    common: Array = weights @ numpy.array([peer.resampled for peer in peers])
    error = math.sqrt(scatter * float(weights @ weights))
    drift = math.exp(float(weights @ values))
    return Drift(clock, len(peers), drift, error, math.sqrt(scatter)), common


def _quantile(share: float, freedom: int) -> float:
    """Of Student's t, by D. Wallace, "Bounds on normal approximations to Student's", 1959."""
    z = NormalDist().inv_cdf(share) * (8 * freedom + 3) / (8 * freedom + 1)
    return math.sqrt(freedom * math.expm1(z * z / freedom))


def _differences(old: Results, new: Results) -> list[str]:
    """What makes the machines two, one line each."""
    found = []
    for name in SAME_MACHINE:
        before, after = old.environment.get(name), new.environment.get(name)
        if before != after:
            found.append(f"environments differ: {name} was {before or '-'}, is {after or '-'}")
    for name in old.roofs.keys() & new.roofs.keys():
        ratio = new.roofs[name] / old.roofs[name]
        if abs(ratio - 1) > ROOFS_DIFFER:
            found.append(f"measured roofs differ: {name} is {ratio:.2f}x what it was")
    return found


def _told(pair: Pair) -> str:
    """A pair's verdict with its interval, or with what it lacks."""
    if pair.speed is None:
        return f"{pair.verdict}: {pair.why}" if pair.verdict else pair.new.note or pair.old.note
    low, value, high = pair.speed
    return f"{pair.verdict}, {value:.3f}x [{low:.3f}, {high:.3f}]"


COLUMNS: table.Columns[Pair] = (
    ("problem", -16, lambda pair: pair.new.problem),
    ("batch", 5, lambda pair: str(pair.new.batch)),
    ("dtype", -5, lambda pair: pair.new.dtype),
    ("contestant", -22, lambda pair: pair.new.contestant),
    ("clock", -5, lambda pair: pair.new.clock),
    ("old us", 11, lambda pair: units.number(pair.old.median_us, ".2f")),
    ("new us", 11, lambda pair: units.number(pair.new.median_us, ".2f")),
    ("old/new", 8, lambda pair: units.number(pair.ratio, ".3f")),
    ("", 0, _told),
)


# --- the verb --------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    """Print what changed; 1 if a row of ours became slower or lost its match."""
    comparison = compare(load(options.old), load(options.new), options.fail_slower)
    print(json.dumps(comparison.to_dict(), indent=1) if options.json else comparison)
    return 1 if comparison.failures else 0
