"""What a measurement leaves behind: rows, each with its match beside its speed, and their origin.

One results file is one run on one machine: its environment, the roofs measured in the same run, and
rows. A row is one contestant on one problem by one clock. JSON is for keeping (`bench report` and
`bench compare` read it), CSV is for a spreadsheet.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy

from ..engine.verify import within
from ..errors import Error
from .choices import Clock

OURS = "alexnet-triton"
"""The contestant that every other is a peer of."""

COPY = "copy"
"""The name of the byte rate among the roofs."""

SCHEMA = 1


class RecordError(Error, ValueError):
    """A results file that cannot be read, in one line."""


@dataclass(frozen=True, slots=True)
class Times:
    """Times of one contestant by one clock, in microseconds a run, in the order they were taken."""

    clock: Clock
    us: tuple[float, ...]

    @property
    def median(self) -> float:
        """Half of the runs were faster."""
        return self._percentile(50)

    @property
    def p20(self) -> float:
        """A fifth of the runs were faster."""
        return self._percentile(20)

    @property
    def p80(self) -> float:
        """Four fifths of the runs were faster."""
        return self._percentile(80)

    def _percentile(self, percent: float) -> float:
        return float(numpy.percentile(self.us, percent))


@dataclass(frozen=True, slots=True)
class Row:
    """One contestant on one problem by one clock.

    `problem` is a layer ("conv4", "conv1+pool1") or, in section "model", a network; in section
    "order" the contestants are ours, by the order of their launches. A contestant
    that was not timed has no times and a note that says why. `flops` and `bytes` are what the
    problem at least needs, so rates are those of useful work.
    """

    section: Literal["layers", "model", "order"]
    problem: str
    network: str
    batch: int
    dtype: str
    contestant: str
    clock: str
    flops: int
    bytes: int
    # Against float64, relative to the largest number. None: not compared, or, beside a tolerance,
    # not finite, for which JSON has no number: see `error`.
    max_error: float | None = None
    rms_error: float | None = None
    tolerance: float | None = None
    median_us: float | None = None
    p20_us: float | None = None
    p80_us: float | None = None
    runs: int = 0
    roof_us: float | None = None  # what the machine's measured rates allow at best
    straw_man: bool = False  # shown, and not a peer to beat
    note: str = ""
    enqueue_us: float | None = None  # the host's part of a run, until the call returns; clock host
    workspace: int | None = None  # bytes of the engine's activations

    @property
    def error(self) -> float | None:
        """The largest error, infinite where no number came; None where nothing was compared."""
        if self.max_error is None and self.tolerance is not None:
            return math.inf
        return self.max_error

    @property
    def matched(self) -> bool:
        """Whether it was compared with float64 and found right."""
        if self.max_error is None or self.tolerance is None:
            return False
        return within(self.max_error, self.rms_error or 0.0, self.tolerance)

    @property
    def right(self) -> bool:
        """Whether its time may be shown: proved, and timed."""
        return self.matched and self.median_us is not None

    @property
    def tflops(self) -> float | None:
        """Useful TFLOP/s."""
        return None if self.median_us is None else self.flops / self.median_us / 1e6

    @property
    def gbps(self) -> float | None:
        """Useful GB/s."""
        return None if self.median_us is None else self.bytes / self.median_us / 1e3

    @property
    def percent_of_roof(self) -> float | None:
        """How near it comes to what the machine allows."""
        if self.median_us is None or self.roof_us is None:
            return None
        return 100 * self.roof_us / self.median_us

    @property
    def images_per_second(self) -> float | None:
        """Images a second, one batch after the other."""
        return None if self.median_us is None else self.batch / self.median_us * 1e6

    @property
    def key(self) -> tuple[object, ...]:
        """What two runs of the same measurement share."""
        return tuple(getattr(self, name) for name in KEY)

    @property
    def race(self) -> tuple[object, ...]:
        """What the contestants that may be compared share."""
        return (self.section, self.problem, self.network, self.batch, self.dtype, self.clock)

    def timed(self, times: Times) -> Row:
        """The same row with these times."""
        return replace(
            self,
            clock=times.clock,
            median_us=times.median,
            p20_us=times.p20,
            p80_us=times.p80,
            runs=len(times.us),
        )


KEY = ("section", "problem", "network", "batch", "dtype", "contestant", "clock")


@dataclass(frozen=True, slots=True)
class Results:
    """One run on one machine.

    `roofs` are rates measured in the same run: FLOP/s by dtype name, and byte/s of a large copy
    under "copy". `searches` are the tuner's cache lines, `notes` one line each.
    """

    environment: dict[str, str | None]
    roofs: dict[str, float]
    rows: tuple[Row, ...]
    searches: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """What the JSON file holds."""
        return {"schema": SCHEMA, **asdict(self)}


def best_peer(row: Row, rows: Iterable[Row]) -> Row | None:
    """The fastest right contestant of the same race that is neither ours nor a straw man."""
    peers = [
        other
        for other in rows
        if other.race == row.race and other.contestant != OURS
        if other.right and not other.straw_man
    ]
    return min(peers, key=lambda other: other.median_us or 0.0, default=None)


def times_best_peer(row: Row, rows: Iterable[Row]) -> float | None:
    """How many times as fast as the best peer; None where one of them was not timed."""
    peer = best_peer(row, rows)
    if peer is None or peer.median_us is None or row.median_us is None:
        return None
    return peer.median_us / row.median_us


def save(results: Results, path: Path) -> None:
    """Write JSON, whole or not at all: a run that is cut short leaves the file before it.

    Raises RecordError where that cannot be.
    """
    unfinished = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(results.to_dict(), indent=1) + "\n")
        os.replace(unfinished, path)
    except OSError as error:
        raise RecordError(f"{path}: {error.strerror}") from None


def load(path: Path) -> Results:
    """Read what `save` wrote. Raises RecordError, naming the file, for anything else."""
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise RecordError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise RecordError(f"{path}: no JSON: {error}") from None
    schema = found.get("schema") if isinstance(found, dict) else None
    if schema != SCHEMA:
        raise RecordError(f"{path}: wanted results of schema {SCHEMA}, got {schema!r}")
    try:
        return Results(
            found["environment"],
            found["roofs"],
            tuple(Row(**row) for row in found["rows"]),
            tuple(found["searches"]),
            tuple(found["notes"]),
        )
    except (KeyError, TypeError) as error:
        raise RecordError(f"{path}: no results of schema {SCHEMA}: {error}") from None


def merge(before: Results, found: Results) -> Results:
    """`before` with what was measured since: rows over those of the same measurement, and roofs."""
    rows = {row.key: row for row in (*before.rows, *found.rows)}
    roofs = {**before.roofs, **found.roofs}
    return replace(before, rows=tuple(rows.values()), roofs=roofs)


DERIVED = ("tflops", "gbps", "percent_of_roof", "images_per_second")


def save_csv(rows: Sequence[Row], path: Path) -> None:
    """One line a row, with the rates worked out and `times_best_peer` last.

    Raises RecordError where that cannot be.
    """
    names = [f.name for f in fields(Row)]
    races: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        races.setdefault(row.race, []).append(row)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*names, *DERIVED, "times_best_peer"])
            for row in rows:
                values = [getattr(row, name) for name in (*names, *DERIVED)]
                writer.writerow([*values, times_best_peer(row, races[row.race])])
    except OSError as error:
        raise RecordError(f"{path}: {error.strerror}") from None
