"""Stored results as a page to look at, as lines for a terminal, and as README's table."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from operator import itemgetter
from pathlib import Path

from ...engine import table
from ...errors import printable
from ..records import RecordError, Results, load, merge
from . import story
from .page import page

__all__ = ["combined", "markdown", "page", "summary", "text"]

END = "<!-- results:end -->"
MATCHED = {True: "yes", False: "NO", None: "not known"}


def combined(runs: Sequence[Results]) -> Results:
    """Several runs on one device as one, later ones over earlier ones as `merge` does.

    Raises RecordError for runs on different devices, whose times are no race.
    """
    devices = {story.gpu(run) or run.environment.get("cpu") or "-": None for run in runs}
    if len(devices) > 1:
        raise RecordError(f"wanted results of one device, got {', '.join(devices)}")
    facts = {
        name: dict.fromkeys(filter(None, (run.environment.get(name) for run in runs)))
        for name in runs[0].environment
    }
    return replace(
        reduce(merge, runs),
        environment={name: ", ".join(values) or None for name, values in facts.items()},
        searches=tuple(trial for run in runs for trial in run.searches),
        notes=tuple(note for run in runs for note in run.notes),
    )


def text(results: Results) -> str:
    """The verdict and the layers for a terminal."""
    matched, words = story.match_verdict(results)
    strip = [*story.figures(results), ("match", MATCHED[matched], words)]
    lines = [f"stored results: {story.origin(results)}", ""]
    lines += [f"{what:<24} {value:>10}  {remark}" for what, value, remark in strip]
    lines += [f"! {warning}" for warning in story.warnings(results)]
    lines += story.absences(results)
    for part in story.tables(results):
        widths = [max(map(len, column)) for column in zip(part.head, *part.rows, strict=True)]
        cells = [
            (*each, itemgetter(i)) for i, each in enumerate(zip(part.head, widths, strict=True))
        ]
        lines += ["", part.caption, *table.columns(part.rows, cells)]
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


def markdown(results: Results) -> str:
    """The whole network by batch size, then the layers at one; origin below. Ends in a newline."""
    parts = []
    for part in story.tables(results):
        lines = [part.head, ("---", *["---:"] * (len(part.head) - 1)), *part.rows]
        cells = [" | ".join(cell.replace("|", "/") for cell in line) for line in lines]
        parts.append("\n".join([f"{part.caption}:\n", *(f"| {line} |" for line in cells), ""]))
    said = f"Stored results: {story.origin(results)}."
    if story.gpu(results) is None:
        said += " Times of Triton's interpreter say nothing of a GPU."
    nothing = "Nothing was right and timed in these results.\n"
    return "\n".join([*(parts or [nothing]), f"{said}\n"])


def rewrite(readme: Path, results: Path) -> None:
    """Generate the table of stored `results` anew in `readme`, between its two marks.

    `<!-- results:begin FILE -->` names the results, as seen from README's folder. Raises
    RecordError where the file cannot be read or has no marks that name these results.
    """
    begin = f"<!-- results:begin {os.path.relpath(results, readme.parent)} -->"
    generated = f"{begin}\n{markdown(load(results))}{END}"
    try:
        text = readme.read_text(encoding="utf-8")
    except OSError as error:
        raise RecordError(f"{readme}: {error.strerror}") from None
    between = re.compile(f"{re.escape(begin)}\n.*?{END}", re.DOTALL)
    text, hits = between.subn(lambda _: generated, text)
    if not hits:
        raise RecordError(
            f"{readme}: no `{begin}` in it; put that line and `{END}` where the table should stand"
        )
    readme.write_text(text, encoding="utf-8")


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
