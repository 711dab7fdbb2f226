"""Panels that say whether to believe it: verdict, errors, environment.

Every panel goes from results to HTML, and one without data says what command fills it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import Any

from .. import units
from ..records import Results, Row
from . import charts, story
from .page import (
    details,
    either,
    figure,
    hidden,
    legend,
    missing,
    packed,
    paragraph,
    section,
    switch,
    table,
)

# Bytes that what is packed of a panel may take in a page with all its room.
ERRORS, RAW = 10_000, 60_000

Check = tuple[bool | None, str]
"""Met, missed or not known, and the sentence."""


def verdict(results: Results, goals: Sequence[Check]) -> str:
    """Figures, whether they may be believed, what was reached, and warnings.

    That there was no GPU stands above the panels.
    """
    figures = "".join(
        f"<div><dt>{escape(what)}</dt><dd>{escape(value)}</dd><dd>{escape(remark)}</dd></div>"
        for what, value, remark in story.figures(results)
    )
    strip = (
        f'<dl class="figures">{figures}</dl>'
        if figures
        else missing(
            "The whole network was not timed. To fill this:",
            "alexnet-triton-bench model --json FILE",
        )
    )
    kinds = {True: "good", False: "bad", None: "unknown"}
    spoken = {True: "Met: ", False: "Missed: ", None: "Not known: "}
    matched, words = story.match_verdict(results)
    lines = [(kinds[matched], words[0].upper() + words[1:] + ".")]
    lines += [(kinds[met], spoken[met] + words) for met, words in goals]
    lines += [("warn", words) for words in story.warnings(results) if words != story.NO_GPU]
    items = "".join(f'<li class="{kind}">{escape(words)}</li>' for kind, words in lines)
    return section("verdict", "Verdict", strip, f'<ul class="checks">{items}</ul>')


def errors(results: Results, room: float = 1) -> str:
    """The largest error of every contestant by layer, over the batch sizes, with the tolerance."""
    title = "Errors against float64"
    checked = [row for row in results.rows if row.max_error is not None]
    if not checked:
        said = "Nothing was compared with float64. To fill this:"
        return section("errors", title, missing(said, "alexnet-triton-bench layers --json FILE"))
    found: dict[str, list[Row]] = {}
    for row in checked:
        found.setdefault(f"{story.network(row)}, {row.dtype}", []).append(row)
    main = [f"{story.network(v.rows[0])}, {v.dtype}" for v in story.views(results, "layers")]
    ordered = [name for name in dict.fromkeys([*main, *found]) if name in found]
    drawn = {name: [_errors(results, found[name])] for name in ordered}
    return section("errors", title, switch("errors", "Shown:", drawn, ERRORS * room))


def _errors(results: Results, rows: Sequence[Row]) -> str:
    styles = story.styles(results)
    worst: dict[tuple[str, str], Row] = {}
    for row in rows:
        kept = worst.setdefault((row.problem, row.contestant), row)
        if not (row.max_error or 0.0) <= (kept.max_error or 0.0):
            worst[row.problem, row.contestant] = row
    made = []
    for problem in dict.fromkeys(name for name, _ in worst):
        at = [row for (name, _), row in worst.items() if name == problem]
        limits = [row.tolerance for row in at if row.tolerance is not None]
        shown = tuple((r.contestant, styles[r.contestant], r.max_error or 0.0) for r in at)
        made.append(charts.Errors(problem, min(limits, default=None), shown))
    names = [name for name in styles if any(name == who for _, who in worst)]
    head = ["layer", "contestant", "error", "RMS", "tolerance", "match"]
    cells = [
        [
            row.problem,
            row.contestant,
            units.power(row.max_error),
            units.power(row.rms_error),
            units.power(row.tolerance),
            "yes" if row.matched else "NO",
        ]
        for row in worst.values()
    ]
    return (
        legend(names, styles)
        + figure(
            "The worst over the batch sizes. Shaded is out of tolerance; a ring marks what is.",
            either(charts.errors(made, 1040), charts.errors(made, 400)),
        )
        + details("The same as a table", table("Worst errors", head, cells, words=2))
    )


def environment(results: Results, room: float = 1) -> str:
    """Where it was measured, notes, and the raw results."""
    facts = [[name, value or "-"] for name, value in results.environment.items()]
    roofs = [
        [f"measured {name}", units.si(rate, "B/s" if name == "copy" else "FLOP/s")]
        for name, rate in results.roofs.items()
    ]
    notes = "".join(f"<li>{escape(note)}</li>" for note in results.notes)
    found = table("Environment", ["what", "found"], [*facts, *roofs], words=2)
    body = [
        f'<div class="facts">{found}</div>'
        if facts or roofs
        else missing("No environment was stored. This prints one:", "alexnet-triton-bench env"),
        f"<h3>Notes</h3><ul>{notes}</ul>" if notes else "",
        _raw(results, RAW * room),
    ]
    return section("environment", "Where it was measured", *body)


def _raw(results: Results, limit: float) -> str:
    kept = _rounded(results.to_dict())
    said = "Raw results (JSON, numbers to six digits)"
    if len(packed(json.dumps(kept))) > limit:
        kept.pop("searches")
        said += ", without the searches: those are in the results file"
    if len(packed(json.dumps(kept))) > limit:
        return paragraph("The raw results are too long for this page: see their file.", "note")
    store = hidden(json.dumps(kept, indent=1))
    return (
        f'<details class="raw"><summary>{escape(said)}</summary>{store}'
        "<pre>JavaScript brings them out.</pre></details>"
    )


def _rounded(value: Any) -> Any:
    """The same with six significant digits: more than any clock has, and half as long."""
    match value:
        case dict():
            return {key: _rounded(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_rounded(inner) for inner in value]
        case float():
            return float(f"{value:.6g}")
    return value
