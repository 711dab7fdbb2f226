"""Stored results as a page to look at, as lines for a terminal, and as README's table."""

from __future__ import annotations

import argparse
import json
import sys
from collections import ChainMap
from collections.abc import Sequence
from pathlib import Path

from ...errors import printable
from ..records import RecordError, Results, Row, load
from . import story
from .page import page
from .readme import rewrite

__all__ = ["combined", "page", "summary", "text"]

MATCHED = {True: "yes", False: "NO", None: "not known"}


def combined(runs: Sequence[Results]) -> Results:
    """Several runs on one device as one; a race is whole, and of the first run that has it.

    Raises RecordError for runs on different devices, whose times are no race.
    """
    devices = {story.gpu(run) or run.environment.get("cpu") or "-": None for run in runs}
    if len(devices) > 1:
        raise RecordError(f"wanted results of one device, got {', '.join(devices)}")
    rows: list[Row] = []
    for run in runs:
        races = {row.race for row in rows}
        rows += [row for row in run.rows if row.race not in races]
    facts = {
        name: dict.fromkeys(filter(None, (run.environment.get(name) for run in runs)))
        for name in runs[0].environment
    }
    return Results(
        {name: ", ".join(values) or None for name, values in facts.items()},
        dict(ChainMap(*(run.roofs for run in runs))),
        tuple(rows),
        tuple(trial for run in runs for trial in run.searches),
        tuple(note for run in runs for note in run.notes),
    )


def text(results: Results) -> str:
    """The verdict and the layers for a terminal."""
    matched, words = story.match_verdict(results)
    strip = [*story.figures(results), ("match", MATCHED[matched], words)]
    lines = [f"stored results: {story.origin(results)}", ""]
    lines += [f"{what:<24} {value:>10}  {remark}" for what, value, remark in strip]
    lines += [f"! {warning}" for warning in story.warnings(results)]
    lines += story.absences(results)
    for table in story.tables(results):
        widths = [max(map(len, column)) for column in zip(table.head, *table.rows, strict=True)]
        lines += ["", table.caption]
        for row in (table.head, *table.rows):
            lines.append(
                "  ".join(cell.rjust(wide) for cell, wide in zip(row, widths, strict=True))
            )
    return "\n".join(lines)


def summary(results: Results) -> dict[str, object]:
    """What the verdict strip says, for a machine."""
    matched, words = story.match_verdict(results)
    top = story.headline(results)
    return {
        "origin": story.origin(results),
        "figures": [
            {"what": what, "value": value, "remark": remark}
            for what, value, remark in story.figures(results)
        ],
        "images_per_second": top[1].images_per_second if top else None,
        "latency_us": top[2].median_us if top else None,
        "matched": matched,
        "match": words,
        "warnings": [*story.warnings(results), *story.absences(results)],
    }


# --- the verb ---------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    """Write or print what results say."""
    results = combined([load(path) for path in options.results])
    if options.readme:
        for path in options.results:
            rewrite(options.readme, path)
            print(printable(f"{options.readme}: table of {path} written"), file=sys.stderr)
    output = options.output
    if output is None and not (options.text or options.readme or options.json):
        output = Path("report.html")
    if output:
        try:
            output.write_text(page(results), encoding="utf-8")
        except OSError as error:
            raise RecordError(f"{output}: {error.strerror}") from None
        print(
            printable(f"report: {output}"),
            file=sys.stderr if options.json or options.text else sys.stdout,
        )
    if options.text:
        print(text(results))
    if options.json:
        print(json.dumps(summary(results), indent=2))
    return 0
