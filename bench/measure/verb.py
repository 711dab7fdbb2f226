"""What the verbs `layers` and `model` do alike.

They hear what a user says, measure the roofs, and hold race after race, told and kept as rows come.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ...engine import table
from ...engine.load import at_least_one, one_of
from ...errors import printable
from .. import units
from ..env import environment
from ..ratio import to_best_peer
from ..records import Results, Row, save, save_csv
from .contest import ContextLost
from .peers import KINDS, SWITCHES
from .roofline import COPY, measure_roofs
from .timing import CLOCKS, ROUNDS, Clock, Effort

BATCHES = {"cuda": (1, 8, 64, 256, 1024, 4096), "cpu": (1,)}
INTERPRETED = "a CPU: Triton's interpreter, whose times say nothing of a GPU's"
Races = Iterable[tuple[str, Iterable[Row]]]
"""Of each race what to say before it, and its rows as they come."""

Lines = Callable[[Sequence[Row]], Sequence[str]]


def asked(
    options: argparse.Namespace, device: torch.device
) -> tuple[Sequence[int], Sequence[Clock], Effort]:
    """Batches, clocks and effort. Raises EngineError for what cannot be measured."""
    batches: Sequence[int] = options.batch or BATCHES[device.type]
    clocks: Sequence[Clock] = options.clock or CLOCKS[device.type]
    rounds = ROUNDS[device.type] if options.rounds is None else options.rounds
    at_least_one("--rounds", rounds)
    for batch in batches:
        at_least_one("--batch", batch)
    for clock in clocks:
        one_of(f"--clock on a {device.type}", clock, CLOCKS[device.type])
    for kind in options.peers or ():
        one_of("--peers", kind, KINDS)
    return batches, clocks, Effort(rounds, options.seconds)


def begun(options: argparse.Namespace, device: torch.device, dtypes: Sequence[str]) -> Results:
    """Results without rows yet: where they are made, and the roofs, measured now.

    They are kept at once, so that a file that cannot be written is refused before the rest.
    """
    tell(f"measuring the roofs of {device}")
    notes = (INTERPRETED,) if device.type == "cpu" else ()
    pinned: dict[str, str | None] = {
        "libraries": ", ".join(f"{name}={value}" for name, value in SWITCHES.items())
    }
    roofs = measure_roofs(device, dtypes)
    results = Results(environment(device) | pinned, roofs, (), notes=notes)
    keep(results, options)
    return results


def keep(results: Results, options: argparse.Namespace) -> None:
    """Whatever there is so far, so that a run cut short leaves it."""
    if options.json not in (None, "-"):
        save(results, Path(options.json))
    if options.csv is not None:
        save_csv(results.rows, options.csv)


def title(results: Results) -> str:
    """Where it is measured, and the roofs."""
    where = results.environment["gpu name"] or results.environment["cpu"]
    rates = ", ".join(
        f"{rate / 1e9:,.0f} GB/s copied" if name == COPY else f"{rate / 1e12:.3g} TFLOP/s {name}"
        for name, rate in results.roofs.items()
    )
    roofs = [f"measured roofs: {rates}"] if rates else []
    return "\n".join([f"on {where}", *roofs, *results.notes])


def note(row: Row) -> str:
    """What is behind a row's numbers, or why it has none."""
    words = ["straw man" if row.straw_man else "", row.note]
    if row.enqueue_us is not None:
        words.append(f"enqueued in {row.enqueue_us:.1f} us")
    if row.workspace is not None:
        words.append(f"workspace {row.workspace / 1e6:.1f} MB")
    return ", ".join(filter(None, words))


def times(*percents: int) -> table.Columns[Row]:
    """A row's match beside its median and these percentiles."""

    def percentile(percent: int) -> Callable[[Row], str]:
        return lambda row: units.number(row.percentile(percent), ".2f")

    return (
        ("error", 8, lambda row: units.number(row.error, ".1e")),
        ("median us", 11, lambda row: units.number(row.median_us, ".2f")),
        *((f"p{percent}", 11, percentile(percent)) for percent in percents),
    )


TIMES = times(20, 80)


def columns(
    problem: str, rows: Sequence[Row] = (), percents: Sequence[int] = (20, 80)
) -> table.Columns[Row]:
    """Of a row of any problem; ours says how it stands to the best peer among `rows`."""

    images = ("images/s", 10, lambda row: units.whole(row.images_per_second))
    return (
        (problem, -16, lambda row: row.problem),
        ("batch", 5, lambda row: str(row.batch)),
        ("contestant", -24, lambda row: row.contestant),
        ("clock", -5, lambda row: row.clock),
        *times(*percents),
        *([images] if problem != "layer" else []),
        ("TFLOP/s", 8, lambda row: units.whole(row.tflops)),
        ("GB/s", 7, lambda row: units.whole(row.gbps)),
        ("% roof", 6, lambda row: units.number(row.percent_of_roof, ".1f")),
        (" x peer", -19, lambda row: f" {to_best_peer(row, rows) or ''}" if row.ours else ""),
        ("", 0, note),
    )


def as_table(
    problem: str,
    results: Results,
    order: Callable[[Sequence[Row]], Sequence[Row]] = list,
    percents: Sequence[int] = (20, 80),
) -> tuple[Lines, Sequence[str]]:
    """What prints the rows of a race, in this order, as `columns`; and what stands above all."""

    def lines(rows: Sequence[Row]) -> Sequence[str]:
        told = columns(problem, rows, percents)
        return [table.line(row, told) for row in order(rows)]

    return lines, [title(results), table.heading(columns(problem, (), percents))]


def measured(
    options: argparse.Namespace,
    results: Results,
    races: Races,
    lines: Lines,
    head: Sequence[str] = (),
) -> Results:
    """Hold the races, printing a race's `lines` and keeping its rows as soon as it is over.

    With `--json` alone the results are printed at the end. A GPU that can do no more ends it: the
    rows so far are kept and printed first. Raises ContextLost then.
    """
    printed, lost = options.json != "-", None
    if printed and head:
        print("\n".join(head))
    for what, race in races:
        tell(what)
        rows: list[Row] = []
        try:
            rows.extend(race)  # what comes before an error is kept
        except ContextLost as error:
            lost = error
        results = replace(results, rows=(*results.rows, *rows))
        if printed and rows:
            print("\n".join(lines(rows)), flush=True)
        keep(results, options)
        if lost:
            break
    if not printed:
        print(results.to_json())
    for path in (options.json, options.csv):
        if path not in (None, "-"):
            tell(f"written: {path}")
    if lost:
        raise lost
    return results


def tell(what: str) -> None:
    """Progress, on standard error."""
    print(printable(what), file=sys.stderr, flush=True)
