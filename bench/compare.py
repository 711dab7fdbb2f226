"""Two results files, row by row: what became faster, slower, wrong, or is in one alone.

Medians are compared; where the middles of two sets of times (p20 to p80) do not meet, the
difference is more than noise. Only rows of ours can fail a comparison: a peer that became slower is
somebody else's news.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from typing import Any

from ..engine import table
from . import units
from .records import KEY, OURS, Results, Row, load

SAME_MACHINE = (
    *("gpu name", "gpu driver_version", "gpu clocks.max.sm", "gpu power.limit"),
    *("torch", "triton", "cuda", "cudnn", "python", "cpu"),
)
"""What two environments should share for their times to be compared."""

ROOFS_DIFFER = 0.05  # a card that measures itself so much slower is not in the same state


@dataclass(frozen=True, slots=True)
class Pair:
    """One contestant on one problem by one clock, then and now."""

    old: Row
    new: Row

    @property
    def ratio(self) -> float | None:
        """Old median over new: above 1 it became faster. None where one was not timed."""
        if not self.old.median_us or not self.new.median_us:
            return None
        return self.old.median_us / self.new.median_us

    @property
    def apart(self) -> bool:
        """Whether the middles of both sets of times do not meet."""
        old, new = (_middle(row) for row in (self.old, self.new))
        return bool(old and new and (old[1] < new[0] or new[1] < old[0]))

    @property
    def lost(self) -> bool:
        """Whether it was right and timed, and is not so any more."""
        return self.old.right and not self.new.right

    def slower(self, threshold: float) -> bool:
        """Whether the new median is more than `threshold`, a fraction, above the old."""
        ratio = self.ratio
        return ratio is not None and 1 / ratio > 1 + threshold

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            **{name: getattr(self.new, name) for name in KEY},
            "old_us": self.old.median_us,
            "new_us": self.new.median_us,
            "ratio": self.ratio,
            "apart": self.apart,
            "lost": self.lost,
        }


@dataclass(frozen=True, slots=True)
class Comparison:
    """Rows of both files, rows of one, and what else differs."""

    pairs: tuple[Pair, ...]
    only_old: tuple[Row, ...]
    only_new: tuple[Row, ...]
    differences: tuple[str, ...]
    threshold: float | None  # a fraction; None: being slower is no failure

    @property
    def failures(self) -> tuple[str, ...]:
        """Rows of ours that lost their match or became too slow, one line each."""
        found = []
        for pair in self.pairs:
            if pair.new.contestant != OURS:
                continue
            if pair.lost:
                found.append(f"{named(pair.new)}: {pair.new.note or 'no match any more'}")
            elif self.threshold is not None and pair.slower(self.threshold):
                found.append(
                    f"{named(pair.new)}: {pair.new.median_us:.2f} us, was "
                    f"{pair.old.median_us:.2f} us, more than {self.threshold:.1%} slower"
                )
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "rows": [pair.to_dict() for pair in self.pairs],
            "only_old": [asdict(row) for row in self.only_old],
            "only_new": [asdict(row) for row in self.only_new],
            "differences": list(self.differences),
            "fail_slower": self.threshold,
            "failures": list(self.failures),
        }

    def __str__(self) -> str:
        lines = [*self.differences, *table.columns(self.pairs, COLUMNS)]
        if any(pair.apart for pair in self.pairs):
            lines.append("* the middles of the times (p20 to p80) do not meet")
        for file, rows in (("old", self.only_old), ("new", self.only_new)):
            lines += [f"only in the {file} results: {named(row)}" for row in rows]
        lines += [f"FAILED {failure}" for failure in self.failures]
        return "\n".join(lines)


def compare(old: Results, new: Results, threshold: float | None = None) -> Comparison:
    """Join two results by `Row.key`, in the order of the new one.

    `threshold` is the fraction of the old median by which a row of ours may be slower.
    """
    before = {row.key: row for row in old.rows}
    after = {row.key: row for row in new.rows}
    return Comparison(
        tuple(Pair(before[key], row) for key, row in after.items() if key in before),
        tuple(row for key, row in before.items() if key not in after),
        tuple(row for key, row in after.items() if key not in before),
        tuple(_differences(old, new)),
        threshold,
    )


def named(row: Row) -> str:
    """A row's key in words."""
    problem = row.problem if row.section == "model" else f"{row.network} {row.problem}"
    return f"{problem}, batch {row.batch}, {row.dtype}, {row.contestant}, {row.clock}"


def fraction(text: str) -> float:
    """'5%' is 0.05, and so is '5'. Raises ValueError for anything but a percentage from 0 up."""
    value = float(text.strip().removesuffix("%"))
    if not 0 <= value < float("inf"):
        raise ValueError(text)
    return value / 100


def _middle(row: Row) -> tuple[float, float] | None:
    if row.p20_us is None or row.p80_us is None:
        return None
    return row.p20_us, row.p80_us


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


COLUMNS: table.Columns[Pair] = (
    ("problem", -16, lambda pair: pair.new.problem),
    ("batch", 5, lambda pair: str(pair.new.batch)),
    ("dtype", -5, lambda pair: pair.new.dtype),
    ("contestant", -22, lambda pair: pair.new.contestant),
    ("clock", -5, lambda pair: pair.new.clock),
    ("old us", 11, lambda pair: units.number(pair.old.median_us, ".2f")),
    ("new us", 11, lambda pair: units.number(pair.new.median_us, ".2f")),
    ("old/new", 8, lambda pair: units.number(pair.ratio, ".3f")),
    ("", 0, lambda p: "*" if p.apart else "" if p.ratio else p.new.note or p.old.note),
)


# --- the verb --------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    """Print what changed; 1 if a row of ours became slower or lost its match."""
    comparison = compare(load(options.old), load(options.new), options.fail_slower)
    print(json.dumps(comparison.to_dict(), indent=1) if options.json else comparison)
    return 1 if comparison.failures else 0
