"""What a measurement leaves behind: rows, each with its match beside its speed, and their origin.

One results file is one machine: its environment, its measured roofs, and rows. A row is one
contestant on one problem by one clock, with every time that was taken. Rows of one race were
measured in turns by one clock in one process, and only they are ever divided by one another. JSON
is for keeping (`bench report` and `bench compare` read it), CSV is for a spreadsheet.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
import uuid
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

EMPTY = "empty kernel"
"""A contestant that computes nothing: what the clock itself takes."""

COPY = "copy"
"""The name of the byte rate among the roofs."""

SCHEMA = 2
BLOCKS = 8  # turns of "single-stream", each of calls one after the other
DIGITS = 5  # significant, of a sample


class RecordError(Error, ValueError):
    """A results file that cannot be read, in one line."""


@dataclass(frozen=True, slots=True)
class DeviceState:
    """How the device was while a contestant took its turns: medians, and a line for what limits."""

    sm_mhz: float | None = None
    watts: float | None = None
    celsius: float | None = None
    throttled: str = ""  # by what, "" if by nothing; or that it is not known, and why


@dataclass(frozen=True, slots=True)
class Times:
    """Times of one contestant by one clock, in microseconds a run, in the order they were taken."""

    clock: Clock
    us: tuple[float, ...]
    state: DeviceState | None = None  # while they were taken

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

    `problem` is a layer ("conv4", "conv1+pool1") or, in the sections of a whole network, its name;
    in section "order" the contestants are ours, by the order of their launches. A contestant
    that was not timed has no times and a note that says why. `flops` and `bytes` are what the
    problem at least needs, so rates are those of useful work.
    """

    section: Literal["layers", "model", "order", "single-stream", "offline"]
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
    race: str = ""  # whose rows were measured together, by one clock in one process
    sm_mhz: float | None = None  # this and the next three as in DeviceState
    watts: float | None = None
    celsius: float | None = None
    throttled: str = ""
    samples: tuple[float, ...] = ()  # us a run, turn by turn; turns of one race are rounds

    @property
    def turns(self) -> int:
        """Of how many turns the samples are; calls of one turn share its luck."""
        count = len(self.samples)
        return min(BLOCKS, count) if self.section == "single-stream" else count

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
    def shown(self) -> bool:
        """Whether a reader may see its time: it is right, or nothing is computed."""
        return self.right or (self.contestant == EMPTY and self.median_us is not None)

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

    def percentile(self, percent: int) -> float | None:
        """Microseconds that so many percent do not exceed; without samples only 20 and 80 are."""
        if not self.samples:
            return getattr(self, f"p{percent}_us", None)
        return float(numpy.percentile(self.samples, percent))

    @property
    def images_per_second(self) -> float | None:
        """Images a second, one batch after the other."""
        return None if self.median_us is None else self.batch / self.median_us * 1e6

    @property
    def key(self) -> tuple[object, ...]:
        """What two runs of the same measurement share."""
        return tuple(getattr(self, name) for name in KEY)

    @property
    def name(self) -> str:
        """What is measured of whom, in words."""
        subject = f"{self.network} {self.problem}" if self.section == "layers" else self.problem
        return f"{subject}, batch {self.batch}, {self.dtype}, {self.contestant}, {self.clock}"

    @property
    def ours(self) -> bool:
        """Whether the engine ran: in "order" every contestant is the engine."""
        return self.contestant == OURS or self.section == "order"

    @property
    def measurement(self) -> tuple[object, ...]:
        """What is measured, by whichever contestant and in whichever race."""
        return tuple(getattr(self, name) for name in KEY if name != "contestant")

    def timed(self, times: Times) -> Row:
        """The same row with these times, rounded to DIGITS, and the state of the device."""
        times = replace(times, us=tuple(float(f"{us:.{DIGITS}g}") for us in times.us))
        return replace(
            self,
            clock=times.clock,
            median_us=times.median,
            p20_us=times.p20,
            p80_us=times.p80,
            runs=len(times.us),
            samples=times.us,
            **(asdict(times.state) if times.state else {}),
        )


KEY = ("section", "problem", "network", "batch", "dtype", "contestant", "clock")


def race_id() -> str:
    """A name for a race, unlike that of any other."""
    return uuid.uuid4().hex[:10]


def races(rows: Iterable[Row]) -> dict[tuple[object, ...], list[Row]]:
    """Rows by race: only those of one list may be divided by one another."""
    found: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        found.setdefault((row.race, *row.measurement), []).append(row)
    return found


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

    def to_json(self) -> str:
        """The file's text, the samples of a row on one line."""
        text = json.dumps(self.to_dict(), indent=1)
        return re.sub(r"\[\n[\d\s.,e+-]+\]", lambda found: " ".join(found[0].split()), text)


def best_peer(row: Row, rows: Iterable[Row]) -> Row | None:
    """The fastest right contestant of the same race that is neither ours nor a straw man."""
    peers = [
        other
        for other in rows
        if other.race == row.race and other.measurement == row.measurement
        if other.right and not other.straw_man and not other.ours
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
        unfinished.write_text(results.to_json() + "\n")
        os.replace(unfinished, path)
    except OSError as error:
        raise RecordError(f"{path}: {error.strerror}") from None


def load(path: Path) -> Results:
    """Read what `save` wrote. Raises RecordError, naming the file, for anything else.

    Schema 1 kept no samples and no races: what one of its files tells of one measurement is taken
    for one race, named by the file's date.
    """
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise RecordError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise RecordError(f"{path}: no JSON: {error}") from None
    schema = found.get("schema") if isinstance(found, dict) else None
    if schema not in (1, SCHEMA):
        raise RecordError(f"{path}: wanted results of schema {SCHEMA}, got {schema!r}")
    try:
        date = found["environment"].get("date") or "undated"
        old: dict[str, Any] = {} if schema == SCHEMA else {"race": date}
        rows = (Row(**old, **row) for row in found["rows"])
        return Results(
            found["environment"],
            {name: float(rate) for name, rate in found["roofs"].items()},
            tuple(replace(_sane(row), samples=tuple(row.samples)) for row in rows),
            tuple(found["searches"]),
            tuple(found["notes"]),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RecordError(f"{path}: no results of schema {SCHEMA}: {error}") from None


def _sane(row: Row) -> Row:
    """Raises TypeError or ValueError for a time that is none."""
    for us in (*row.samples, row.median_us, row.p20_us, row.p80_us):
        if us is not None and not 0 < us < math.inf:
            raise ValueError(f"a time of {us} us in {row.name}")
    return row


def merge(before: Results, found: Results) -> Results:
    """`before` with what was measured since: its races and roofs, and facts that were missing.

    A race of `before` goes, as a whole, where a new one of the same measurement has everybody whom
    it timed. Otherwise both stand, and a contestant of both has two rows.
    """
    new = races(found.rows)
    seats: dict[tuple[object, ...], list[set[str]]] = {}  # of each new race, by its measurement
    for (_, *measurement), rows in new.items():
        seats.setdefault(tuple(measurement), []).append({row.contestant for row in rows})
    kept: list[Row] = []
    for named, rows in races(before.rows).items():
        timed = {row.contestant for row in rows if row.median_us is not None}
        if named not in new and not any(timed <= seat for seat in seats.get(named[1:], ())):
            kept += rows
    return replace(
        before,
        environment=found.environment | before.environment,
        rows=(*kept, *found.rows),
        roofs=before.roofs | found.roofs,
    )


DERIVED = ("tflops", "gbps", "percent_of_roof", "images_per_second")


def save_csv(rows: Sequence[Row], path: Path) -> None:
    """One line a row, without samples, with the rates worked out and `times_best_peer` last.

    Raises RecordError where that cannot be.
    """
    names = [f.name for f in fields(Row) if f.name != "samples"]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow([*names, *DERIVED, "times_best_peer"])
            for race in races(rows).values():
                for row in race:
                    values = [getattr(row, name) for name in (*names, *DERIVED)]
                    writer.writerow([*values, times_best_peer(row, race)])
    except OSError as error:
        raise RecordError(f"{path}: {error.strerror}") from None
