"""Results as one page that fetches nothing: panels of figures, each beside its table.

A panel shows what stands for the whole; what else was measured is folded below, and left out where
the page would become too long. One without data says what command fills it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from ...errors import Error
from .. import units
from ..records import OURS, Results, Row, times_best_peer
from . import figures, story
from .figures import Bar, Curve, Point, Rug
from .story import Table, View, right

LONGEST = 300_000  # bytes of a page
FOLDED = (99, 9, 3, 0)  # folded tables of a panel, until the page is short enough
SEARCHES = 48  # that a figure shows, as many as the layers of a network at four batch sizes

WORST = 10.0  # how many times as slow as its best a trial is drawn at most


class PageError(Error, RuntimeError):
    """A page that cannot be made here, and what to install."""


@dataclass(frozen=True, slots=True)
class Part:
    """A table, beside its figure or folded away."""

    table: Table
    figure: str = ""
    folded: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """Parts under a heading; `missing` and `command` are for one without."""

    name: str
    title: str
    note: str
    missing: str
    command: str
    parts: Sequence[Part]
    left_out: int = 0


def page(results: Results) -> str:
    """The whole report, under LONGEST bytes: of what is folded as much as there is room for.

    Raises PageError where matplotlib or jinja2 is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
        from jinja2 import Environment
    except ImportError as error:
        raise PageError(f"a page needs {error.name}: pip install -e '.[plot]'") from None
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        files(__package__).joinpath("page.html").read_text("utf-8")
    )
    networks = dict.fromkeys(row.network.removesuffix(" uint8") for row in results.rows)
    panels = [make(results) for make in (batches, layers, roofline, tuning, order, errors)]
    panels.append(environment(results))
    for most in FOLDED:
        html = template.render(
            title=f"Triton kernels of {', '.join(networks) or 'nothing'}",
            origin=story.origin(results),
            colours=figures.COLOURS,
            ours=OURS,
            figures=story.figures(results),
            checks=checks(results),
            panels=[_shortened(panel, most) for panel in panels],
        )
        if len(html.encode()) <= LONGEST:
            break
    return html


def checks(results: Results) -> list[tuple[str, str]]:
    """Whether the figures may be believed: (good, bad or soft, sentence) each."""
    matched, words = story.match_verdict(results)
    kind = {True: "good", False: "bad", None: "soft"}[matched]
    return [
        (kind, f"{words[0].upper()}{words[1:]}."),
        *(("bad", warning) for warning in story.warnings(results)),
        *(("soft", absence) for absence in story.absences(results)),
    ]


def _shortened(panel: Panel, most: int) -> Panel:
    shown = [part for part in panel.parts if not part.folded]
    folded = [part for part in panel.parts if part.folded]
    left_out = panel.left_out + len(folded[most:])
    parts = [*shown, *folded[:most]]
    return Panel(*(panel.name, panel.title, panel.note, panel.missing), panel.command, parts, left_out)


# --- panel by panel ---------------------------------------------------------------------------


def batches(results: Results) -> Panel:
    """The whole network by batch size, ours and the peers."""
    parts = [
        Part(contestants(view), "" if folded else _network_figure(view), bool(folded))
        for folded, view in enumerate(story.views(results, "model"))
    ]
    return Panel(
        *("batches", "Speed by batch size", "Medians of the whole network's times."),
        *("The whole network was not timed.", "model --json FILE", parts),
    )


def _network_figure(view: View) -> str:
    rows = sorted((r for r in view.rows if right(r)), key=lambda row: row.batch)
    if len({row.batch for row in rows}) == 1:
        rows.sort(key=lambda row: row.median_us or 0.0)
        lines = [
            Bar(
                *(row.contestant, row.median_us),
                (_of_roof(row), units.times(times_best_peer(row, rows))),
                roof_us=row.roof_us,
                colour=_colour(row),
            )
            for row in rows
        ]
        drawn = figures.bars(lines, ("of roof", "x best peer"), ("time", "best peer"))
        return figures.svg(drawn, "batches", f"Times at batch {rows[0].batch}: {view.name}")
    series = []
    for name in sorted(dict.fromkeys(r.contestant for r in rows), key=lambda name: name != OURS):
        own = [row for row in rows if row.contestant == name]
        speeds = [row.images_per_second or 0.0 for row in own]
        series.append(
            Curve(name, [r.batch for r in own], speeds, own[0].straw_man, name == OURS)
        )
    ratios = {d.row.batch: d.ratio for d in view.duels() if d.ratio is not None}
    drawn = figures.curves(series, dict(sorted(ratios.items())))
    return figures.svg(drawn, "batches", f"Images per second by batch size: {view.name}")


def _colour(row: Row) -> str:
    return "ours" if row.contestant == OURS else "soft" if row.straw_man else "peer"


def contestants(view: View) -> Table:
    """Every row of a view with all that was measured of it; no speed without a match."""
    head = ("problem", "contestant", "batch", "time", "p20 to p80", "rate", "of roof")
    head += ("x best peer", "error (tolerance)", "match")
    cells = []
    for row in sorted(view.rows, key=lambda r: (r.problem, r.batch, r.median_us or math.inf)):
        timed = ("not shown" if row.median_us else "not timed", *["-"] * 4)
        if right(row):
            images, flops = units.whole(row.images_per_second), (row.tflops or 0.0) * 1e12
            rate = f"{images} images/s" if row.section == "model" else units.si(flops, "FLOP/s")
            span, ratio = units.span(row.p20_us, row.p80_us), times_best_peer(row, view.rows)
            timed = (units.time(row.median_us), span, rate, _of_roof(row), units.times(ratio))
        error = f"{units.power(row.max_error)} ({units.power(row.tolerance)})"
        match = "-" if row.max_error is None else "yes" if row.matched else "NO"
        match += f", {row.note}" if row.note else ""
        name = row.contestant + (" (straw man)" if row.straw_man else "")
        cells.append((row.problem, name, f"{row.batch:,}", *timed, error, match))
    return Table(f"Every contestant: {view.name}", head, tuple(cells), words=2)


def _of_roof(row: Row | None) -> str:
    return units.percent(row.percent_of_roof if row else None)


def layers(results: Results) -> Panel:
    """The layers of the network against their roofs and their best peers."""
    views = story.views(results, "layers")
    parts = []
    for view, batch in _main(results, views):
        lines = []
        for duel in story.apart(view.duels(batch)):
            times = [row.median_us if row else None for row in (duel.ours, duel.peer)]
            words = (_of_roof(duel.ours), units.times(duel.ratio))
            lines.append(Bar(duel.row.problem, times[0], words, times[1], duel.row.roof_us))
        drawn = figures.bars(lines, ("of roof", "x best peer"), ("ours", "best peer"))
        said = f"Layers at batch {batch} against their roofs: {view.name}"
        parts.append(Part(story.layers_table(view, batch), figures.svg(drawn, f"l{batch}", said)))
    shown = _main(results, views)
    rest = [(v, b) for v in views for b in v.batches if (v, b) not in shown]
    parts += [Part(story.layers_table(view, batch), folded=True) for view, batch in rest]
    parts += [Part(contestants(view), folded=True) for view in views]
    return Panel(
        *("layers", "Layers against their roofs", "Each layer timed alone, right ones only."),
        *("No layer was timed.", "layers --json FILE", parts),
    )


def _main(results: Results, views: Sequence[View]) -> list[tuple[View, int]]:
    """The view that stands for the whole at its main and at its smallest batch."""
    return [
        (view, batch)
        for view in views[:1]
        for batch in dict.fromkeys((story.main_batch(results, view), view.batches[0]))
    ]


def roofline(results: Results) -> Panel:
    """The layers and their best peers under the measured roofs."""
    head, parts = ("layer", "FLOP per byte", "ours", "best peer"), []
    for view, batch in _main(results, story.views(results, "layers")):
        points = []
        for duel in story.apart(view.duels(batch)):
            rates = [row.tflops * 1e12 if row and row.tflops else None for row in (duel.ours, duel.peer)]
            if any(rates):
                points.append(Point(duel.row.problem, duel.row.flops / duel.row.bytes, *rates))
        if points:
            drawn = figures.roofline(points, results.roofs.get(view.dtype), results.roofs.get("copy"))
            said = f"Rates of layers under the roofs, batch {batch}: {view.name}"
            cells = [
                (p.name, units.three(p.intensity), *(units.si(r, "FLOP/s") for r in (p.rate, p.peer)))
                for p in points
            ]
            parts.append(Part(Table(said, head, tuple(cells)), figures.svg(drawn, f"r{batch}", said)))
    note = "Useful FLOP/s under the rates that this machine reached in the same run."
    return Panel(
        *("roofline", "Roofline", note, "No layer was timed.", "layers --json FILE", parts)
    )


def tuning(results: Results) -> Panel:
    """Every search: how its trials spread, the best of them, and why others failed."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for trial in sorted(results.searches, key=lambda trial: int(trial["batch"])):
        names = ("device", "network", "layer", "batch", "dtype", "clock")
        groups.setdefault(tuple(str(trial.get(n, "")) for n in names), []).append(trial)
    rugs, cells, reasons = [], [], Counter[tuple[str, str]]()
    for (_, _, layer, batch, dtype, _), trials in groups.items():
        timed = [t for t in trials if t["status"] == "ok" and t.get("median_us")]
        reasons.update((t["status"], str(t.get("reason") or "-")) for t in trials if t not in timed)
        times = [float(trial["median_us"]) for trial in timed]
        best = min(timed, key=lambda trial: float(trial["median_us"]), default=None)
        config = best["config"].items() if best else ()
        took = units.time(min(times, default=None))
        cells.append(
            (layer, batch, dtype, str(len(trials)), str(len(timed)), took)
            + (", ".join(f"{name}={units.pretty(value)}" for name, value in config) or "-",)
        )
        rugs.append(Rug(f"{layer} x{batch}", {"ours": [us / min(times) for us in times]}, took))
    head = ("layer", "batch", "dtype", "trials", "right", "best", "its configuration")
    parts = []
    if groups:
        drawn = figures.rugs(rugs[:SEARCHES], "time of a trial over the best", "best", 1, WORST)
        said = "Trials of each search, by their time over that of the best"
        parts.append(Part(Table(said, head, tuple(cells)), figures.svg(drawn, "tuning", said)))
    if reasons:
        failed = tuple((*kind, str(count)) for kind, count in reasons.most_common(10))
        said = f"Why {sum(reasons.values())} failed, the ten most frequent reasons"
        parts.append(Part(Table(said, ("status", "reason", "trials"), failed, words=2)))
    note = f"A line a search, a tick a trial; slower than {WORST:g}x stands at the end."
    return Panel(
        *("tuning", "Tuning", note, "No configuration was searched.", "round --out DIR"),
        *(parts, len(rugs[SEARCHES:])),
    )


def order(results: Results) -> Panel:
    """Orders of launches by batch size, against the fastest."""
    rugs, cells = [], []
    for view in story.views(results, "order"):
        for batch in view.batches:
            rows = [row for row in view.rows if row.batch == batch and right(row)]
            rows.sort(key=lambda row: row.median_us or 0.0)
            times = [row.median_us or 0.0 for row in rows]
            name = f"{view.subject} x{batch} {view.dtype}"
            rugs.append(Rug(name, {"ours": [us / times[0] for us in times]}, units.time(times[0])))
            for row, us in zip(rows, times, strict=True):
                span = units.span(row.p20_us, row.p80_us)
                over = units.times(us / times[0])
                cells.append((name, row.contestant, units.time(us), span, over))
    parts = []
    if rugs:
        drawn = figures.rugs(rugs, "time over that of the fastest", "fastest", 1, 2)
        said = "Orders of launches, by their time over that of the fastest"
        head = ("network", "order", "time", "p20 to p80", "of the fastest")
        table = Table(said, head, tuple(cells), words=2)
        parts.append(Part(table, figures.svg(drawn, "order", said)))
    note = "Slices of the first layers, and kernels that overlap, on the whole network."
    return Panel(
        *("order", "Order of launches", note, "No order was timed.", "order --json", parts)
    )


def errors(results: Results) -> Panel:
    """The largest errors of ours and of peers by problem, as shares of what is allowed."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in results.rows:
        if row.max_error is not None and row.tolerance:
            groups.setdefault((row.problem, row.dtype), []).append(row)
    rugs, cells = [], []
    for (problem, dtype), rows in groups.items():
        shares: dict[str, list[float]] = {"soft": [], "ours": []}
        for row in rows:
            error, limit = row.max_error or 0.0, row.tolerance or 1.0
            own = row.contestant == OURS or row.section == "order"
            share = error / limit if math.isfinite(error) else math.inf
            shares["ours" if own else "soft"].append(share)
        worst = [units.power(max(shares[who], default=None)) for who in ("ours", "soft")]
        wrong = dict.fromkeys(row.contestant for row in rows if not row.matched)
        tolerance = units.power(min(row.tolerance or 0.0 for row in rows))
        cells.append((problem, dtype, *worst, tolerance, ", ".join(wrong) or "none"))
        rugs.append(Rug(f"{problem} {dtype}", shares, tolerance))
    parts = []
    if rugs:
        said = "Largest errors over what is allowed"
        drawn = figures.rugs(rugs, "error over tolerance", "tolerance", 1e-4, 10)
        head = ("problem", "dtype", "ours", "peers", "tolerance", "wrong")
        table = Table(said, head, tuple(cells), words=2)
        parts.append(Part(table, figures.svg(drawn, "errors", said)))
    note = "Against float64, relative to the largest number: ours thick, peers thin."
    return Panel(
        *("errors", "Errors", note, "Nothing was compared.", "layers --json FILE", parts)
    )


def environment(results: Results) -> Panel:
    """Where it was measured, the roofs, and notes."""
    facts = [(name, value or "-") for name, value in results.environment.items()]
    facts += [
        (f"measured {name}", units.si(rate, "B/s" if name == "copy" else "FLOP/s"))
        for name, rate in results.roofs.items()
    ]
    parts = [Part(Table("Environment", ("what", "found"), tuple(facts), words=2))] if facts else []
    if results.notes:
        notes = tuple((note,) for note in results.notes)
        parts.append(Part(Table("Notes of the run", ("note",), notes)))
    return Panel(
        *("environment", "Where it was measured", "Versions, rates of this machine, notes."),
        *("No environment was stored.", "env", parts),
    )
