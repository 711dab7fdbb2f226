"""Results as one page that fetches nothing: panels of figures, each beside its table.

A panel shows what stands for the whole; what else was measured is folded below, and left out where
the page would become too long. `page.html` has the words around it.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from importlib.resources import files
from importlib.util import find_spec
from itertools import accumulate
from typing import Any

from jinja2 import Environment

from ...engine.pictures.canvas import PictureError
from .. import units
from ..choices import SCENARIOS
from ..ratio import to_best_peer
from ..records import OURS, Results, Row, best_peer
from . import figures, story
from .story import Duel, Exhibit, View

FOLDED = 600  # lines of folded tables, which keep a page under 300 kB
SEARCHES = 48  # that are shown, as many as the layers of a network at four batch sizes


def page(results: Results) -> str:
    """The whole report. Raises PictureError where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise PictureError("the page needs matplotlib: pip install -e '.[plot]'")
    makers = (network, layers, tuning, order, origin)
    matched, words = story.match_verdict(results)
    networks = dict.fromkeys(row.network.removesuffix(" uint8") for row in results.rows)
    source = files(__package__).joinpath("page.html").read_text("utf-8")
    jinja = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    with figures.style():
        panels = {make.__name__: make(results) for make in makers}
        folded = [(parts, part) for parts in panels.values() for part in parts if part.folded]
        sizes = accumulate(len(part.rows) for _, part in folded)
        for (parts, part), lines in zip(folded, sizes, strict=True):
            if lines > FOLDED:
                parts.remove(part)
        return jinja.from_string(source).render(
            title=f"Triton kernels of {', '.join(networks) or 'nothing'}",
            origin=story.origin(results),
            colours=figures.COLOURS,
            ours=OURS,
            strip=story.figures(results),
            checks={
                {True: "good", False: "bad", None: "soft"}[matched]: [f"{words}."],
                "warn": story.warnings(results),
                "absent": story.absences(results),
            },
            panels=panels,
            svg=figures.svg,
            left_out=sum(len(part.rows) for _, part in folded) > FOLDED,
        )


# --- panel by panel ---------------------------------------------------------------------------


def network(results: Results) -> list[Exhibit]:
    """The whole network by batch size, ours and the peers."""
    parts = [contestants(view, folded=True) for view in story.views(results, "model")]
    for view in story.views(results, "model")[:1]:
        rows = sorted(view.right, key=lambda row: row.median_us or 0.0)
        if len({row.batch for row in rows}) > 1:
            drawn = figures.curves(view)
        else:
            ours = {row.contestant: Duel(row, row, best_peer(row, rows)) for row in view.ours}
            drawn = figures.bars({r.contestant: Duel(r, None, r) for r in rows} | ours)
        parts[0] = replace(parts[0], figure=drawn, folded=False)
    scenarios = [view for section in SCENARIOS for view in story.views(results, section)]
    return [*parts, *map(contestants, scenarios)]


def layers(results: Results) -> list[Exhibit]:
    """The layers at the largest and the smallest batch against their roofs and best peers."""
    parts = []
    views = story.views(results, "layers")
    for view in views[:1]:
        for batch in dict.fromkeys((view.batches[-1], view.batches[0])):
            duels = {duel.row.problem: duel for duel in view.duels(batch)}
            parts.append(replace(story.layers_table(view, batch), figure=figures.bars(duels)))
    shown = {part.caption for part in parts}
    for view in views:
        tables = [story.layers_table(view, batch) for batch in view.batches]
        parts += [replace(table, folded=True) for table in tables if table.caption not in shown]
        parts.append(contestants(view, folded=True))
    return parts


def contestants(view: View, **shown: Any) -> Exhibit:
    """Every row of a view with all that was measured of it; no speed without a match."""
    low, high = (90, 99) if view.rows[0].section in SCENARIOS else (20, 80)
    timing = ("time", f"p{low} to p{high}", "rate", "of roof", "x best peer")
    proof = ("error (tolerance)", "race", "device", "match")
    head = ("problem", "contestant", "batch", *timing, *proof)
    cells = []
    for row in sorted(view.rows, key=lambda r: (r.problem, r.batch, r.median_us or math.inf)):
        timed: tuple[str, ...] = ("not shown" if row.median_us else "not timed", *"----")
        if row.shown:
            flops, ratio = (row.tflops or 0.0) * 1e12, to_best_peer(row, view.rows)
            rate = f"{units.whole(row.images_per_second)} images/s"
            rate = units.si(flops, "FLOP/s") if row.section == "layers" else rate
            span = units.span(row.percentile(low), row.percentile(high))
            roof = units.percent(row.percent_of_roof)
            timed = (units.time(row.median_us), span, rate, roof, str(ratio or "-"))
        error = f"{units.power(row.error)} ({units.power(row.tolerance)})"
        match = "-" if row.error is None else "yes" if row.matched else "NO"
        match += f", {row.note}" if row.note else ""
        name = row.contestant + (" (straw man)" if row.straw_man else "")
        proof = (error, row.race or "-", _state(row), match)
        cells.append((row.problem, name, f"{row.batch:,}", *timed, *proof))
    return Exhibit(f"Every contestant ({view.name})", head, cells, words=2, **shown)


def _state(row: Row) -> str:
    """How its device was while it ran."""
    read = (("MHz", row.sm_mhz), ("W", row.watts), ("°C", row.celsius))
    words = [f"{value:.0f} {unit}" for unit, value in read if value is not None]
    return ", ".join(filter(None, [*words, row.throttled])) or "-"


def tuning(results: Results) -> list[Exhibit]:
    """Every search: its best trial, and why others failed."""
    searches: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for trial in sorted(results.searches, key=lambda trial: int(trial["batch"])):
        named = ("layer", "batch", "dtype", "network", "device", "clock", "triton", "source")
        searches.setdefault(tuple(str(trial.get(n)) for n in named), []).append(trial)
    rows, reasons = [], Counter[tuple[str, str]]()
    for (layer, batch, dtype, *_), trials in list(searches.items())[:SEARCHES]:
        timed = [trial for trial in trials if trial["status"] == "ok" and trial.get("median_us")]
        best = min(timed, key=lambda t: (not t.get("won"), float(t["median_us"])), default={})
        config = [f"{name}={units.pretty(at)}" for name, at in best.get("config", {}).items()]
        counts = (str(len(trials)), str(len(timed)), units.time(best.get("median_us")))
        rows.append((layer, batch, dtype, *counts, ", ".join(config) or "-"))
        lost = (trial for trial in trials if trial["status"] != "ok")
        reasons.update((trial["status"], str(trial.get("reason") or "-")) for trial in lost)
    parts = []
    if rows:
        caption = f"The best of each search, {len(rows)} of {len(searches)} searches"
        head = ("layer", "batch", "dtype", "trials", "right", "best", "its configuration")
        parts.append(Exhibit(caption, head, rows))
    if reasons:
        lines = [(*kind, str(count)) for kind, count in reasons.most_common(10)]
        caption = f"Why {sum(reasons.values())} failed: the most frequent reasons"
        parts.append(Exhibit(caption, ("status", "reason", "trials"), lines, words=2))
    return parts


def order(results: Results) -> list[Exhibit]:
    """Orders of launches by batch size."""
    return [contestants(view) for view in story.views(results, "order")]


def origin(results: Results) -> list[Exhibit]:
    """Where it was measured, the roofs, and notes."""
    facts = [(name, value or "-") for name, value in results.environment.items()]
    for name, rate in results.roofs.items():
        facts.append((f"measured {name}", units.si(rate, "B/s" if name == "copy" else "FLOP/s")))
    notes = [(note,) for note in results.notes]
    tables = (
        Exhibit("Environment", ("what", "found"), facts, words=2),
        Exhibit("Notes of the run", ("note",), notes),
    )
    return [table for table in tables if table.rows]
