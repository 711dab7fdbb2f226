"""Stored results as a page to look at, as lines for a terminal, and as README's table.

The page is one file that fetches nothing: drawings are inline SVG, and light and dark follow the
reader's setting.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

from ...errors import printable
from .. import units
from ..records import RecordError, Results, best_peer, load, times_best_peer
from . import landscape, panels, speed_panels, story, tuning_panel
from .goals import verdicts
from .page import document, paragraph
from .readme import rewrite
from .svg import standalone

LONGEST = 300_000  # bytes of a page
ROOMS = (1, 0.6, 0.3, 0)  # shares of what its packed views may take, until it fits

PANELS = {
    "verdict": "Verdict",
    "layers": "Layers",
    "roofline": "Roofline",
    "batches": "Batch sizes",
    "tuning": "Tuning",
    "errors": "Errors",
    "environment": "Environment",
}


WORDS = {True: "yes", False: "NO", None: "not known"}


def goals(results: Results) -> list[panels.Check]:
    """What was to be reached; nothing for results without a GPU, of which the goals are."""
    if story.gpu(results) is None:
        return []
    return [
        (one.met, f"{one.goal}{f': {one.figures}' if one.figures else ''}.")
        for one in verdicts(results.rows, results.roofs)
    ]


def page(results: Results) -> str:
    """The whole report, under LONGEST bytes: what can be left out is, until it fits."""
    for room in ROOMS:
        made = _page(results, room)
        if len(made.encode()) <= LONGEST:
            break
    return made


def _page(results: Results, room: float) -> str:
    networks = dict.fromkeys(story.network(row) for row in results.rows)
    title = f"Triton kernels of {', '.join(networks)}" if networks else "Triton kernels"
    links = "".join(f'<li><a href="#{name}">{words}</a></li>' for name, words in PANELS.items())
    return document(
        f"{title}: {story.origin(results)}",
        f'<header><h1>{escape(title)}</h1><p class="stored"><b>stored results</b> '
        f"{escape(story.origin(results))}</p></header>",
        f'<nav aria-label="Panels"><ul>{links}</ul></nav>',
        "<main>",
        paragraph(story.NO_GPU, "banner") if story.gpu(results) is None else "",
        panels.verdict(results, goals(results)),
        speed_panels.layers(results, room),
        speed_panels.roofline(results, room),
        speed_panels.batches(results, room),
        tuning_panel.tuning(results.searches, room=room),
        panels.errors(results, room),
        panels.environment(results, room),
        "</main>",
    )


def search_page(lines: Sequence[landscape.Line], x: str | None = None, y: str | None = None) -> str:
    """A page of searches alone, from the tuner's cache lines.

    x, y: the two parameters of the first heat map, the most telling ones if None. Raises
    RecordError for a parameter that the first search has not.
    """
    title = "Searches of kernel configurations"
    devices = ", ".join(dict.fromkeys(str(at["device"]) for at in lines)) or "no device"
    return document(
        title,
        f"<header><h1>{title}</h1>{paragraph(devices, 'stored')}</header><main>",
        tuning_panel.tuning(lines, x, y),
        "</main>",
    )


def search_svg(lines: Sequence[landscape.Line], x: str | None = None, y: str | None = None) -> str:
    """The first search as one SVG file: heat map, scatter, registers. As `search_page` otherwise.

    Raises RecordError where there are no lines.
    """
    found = landscape.searches(lines)
    if not found:
        raise RecordError("no configuration was searched: there is nothing to draw")
    return standalone(landscape.drawing(found[0], x, y))


def text(results: Results, width: int = 100) -> str:
    """The verdict and the row of blocks for a terminal."""
    lines = [f"stored results: {story.origin(results)}", ""]
    lines += [f"{what:<24} {value:>10}  {remark}" for what, value, remark in story.figures(results)]
    matched, words = story.match_verdict(results)
    lines.append(f"{'match':<24} {WORDS[matched]:>10}  {words}")
    lines += [f"{'goal':<24} {WORDS[met]:>10}  {words}" for met, words in goals(results)]
    lines += [f"! {warning}" for warning in story.warnings(results)]
    for view in story.views(results, "layers")[:1]:
        batch = story.main_batch(results, view)
        lines += ["", f"time by layer, batch {batch}, {view.name}"]
        lines += _bars(view, batch, max(10, width - 70))
    return "\n".join(lines)


def _bars(view: story.View, batch: int, width: int) -> list[str]:
    rows = story.apart(view.ours(batch))
    total = sum(row.median_us or 0.0 for row in rows)
    made = []
    for row in rows:
        share = (row.median_us or 0.0) / total
        roof = f"{units.percent(row.percent_of_roof)} of roof" if row.roof_us else "no roof"
        peer = best_peer(row, view.rows)
        against = (
            f"{units.times(times_best_peer(row, view.rows))} {peer.contestant}" if peer else "-"
        )
        bar = "█" * max(1, round(share * width))
        line = f"{row.problem:<14} {units.time(row.median_us):>9} {units.percent(100 * share):>6} "
        made.append(f"{line} {bar:<{width}} {roof:>13}  {against}")
    return made


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
        "images_per_second": top.fast.images_per_second if top else None,
        "latency_us": top.quick.median_us if top else None,
        "matched": matched,
        "match": words,
        "goals": [{"met": met, "goal": goal} for met, goal in goals(results)],
        "warnings": story.warnings(results),
    }


# --- the verb --------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    """Write or print what results say."""
    results = load(options.results)
    if options.readme:
        rewrite(options.readme, options.results)
        print(printable(f"{options.readme}: table of {options.results} written"), file=sys.stderr)
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
