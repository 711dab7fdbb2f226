"""What the verbs `layers` and `model` do alike: race after race, told and kept as rows come."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from ...engine import table
from .. import units
from ..records import OURS, Results, Row, times_best_peer
from .contest import ContextLost
from .options import keep, tell, tell_kept

Races = Iterable[tuple[str, Iterable[Row]]]
"""Of each race what to say before it, and its rows as they come."""


def note(row: Row) -> str:
    """What is behind a row's numbers, or why it has none."""
    return ", ".join(filter(None, ["straw man" if row.straw_man else "", row.note]))


TIMES: table.Columns[Row] = (
    ("error", 8, lambda row: _number(row.error, ".1e")),
    ("median us", 11, lambda row: _number(row.median_us, ".2f")),
    ("p20", 11, lambda row: _number(row.p20_us, ".2f")),
    ("p80", 11, lambda row: _number(row.p80_us, ".2f")),
)
"""A row's match beside its times."""


def columns(
    problem: str, rows: Sequence[Row] = (), images_per_second: bool = False
) -> table.Columns[Row]:
    """Of a row of any problem; ours says how it stands to the best peer among `rows`."""

    def ahead(row: Row) -> str:
        times = times_best_peer(row, rows) if row.contestant == OURS else None
        return units.three(times) if times else ""

    images = ("images/s", 10, lambda row: units.whole(row.images_per_second))
    return (
        (problem, -16, lambda row: row.problem),
        ("batch", 5, lambda row: str(row.batch)),
        ("contestant", -24, lambda row: row.contestant),
        ("clock", -5, lambda row: row.clock),
        *TIMES,
        *([images] if images_per_second else []),
        ("TFLOP/s", 8, lambda row: units.whole(row.tflops)),
        ("GB/s", 7, lambda row: units.whole(row.gbps)),
        ("% roof", 6, lambda row: _number(row.percent_of_roof, ".1f")),
        ("x peer", 6, ahead),
        ("", 0, note),
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def measured(
    options: argparse.Namespace,
    results: Results,
    races: Races,
    lines: Callable[[Sequence[Row]], Sequence[str]],
    more: Callable[[Results], dict[str, Any]] = lambda results: {},
) -> Results:
    """Hold the races, printing a race's `lines` and keeping its rows as soon as it is over.

    With `--json` alone the results are printed at the end, with what `more` says. A GPU that can do
    no more ends it: the rows so far are kept and printed first. Raises ContextLost then.
    """
    printed, lost = options.json != "-", None
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
        print(json.dumps(results.to_dict() | more(results), indent=1))
    tell_kept(options)
    if lost:
        raise lost
    return results
