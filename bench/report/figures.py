"""The report's figures, drawn by matplotlib: bars, roofline, curves over batches, rugs of values.

Its object interface alone, as in `engine/pictures`. A figure is for half a page or a whole phone.
Its colours are those of COLOURS; in a page they follow the reader's light or dark. Roofline after
S. Williams, A. Waterman and D. Patterson, "Roofline: an insightful visual performance model", CACM
52(4), 2009.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .. import units

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {
    **{"ink": "#1a1d22", "soft": "#59616c", "thin": "#e3e6ea", "ours": "#0059b3"},
    **{"peer": "#c44500", "c2": "#00785a", "c3": "#a03a86", "c4": "#7d6200", "c5": "#4b5a8a"},
}
"""What the figures draw with, by the names of the page's style sheet."""

PEERS = ("peer", "c2", "c3", "c4", "c5")
MARKERS = "sD^vPX"
WIDTH, ROW = 480, 20  # points: a figure, and a line of one that has lines


def style() -> Any:
    """matplotlib's settings while a figure is made, measured or written, and no longer."""
    import matplotlib

    ink, soft = COLOURS["ink"], COLOURS["soft"]
    return matplotlib.rc_context(
        {
            **{"font.family": ["DejaVu Sans"], "font.size": 10.5, "text.parse_math": False},
            **{"text.color": ink, "axes.labelcolor": soft, "axes.edgecolor": soft},
            **dict.fromkeys(("xtick.color", "ytick.color"), soft),
            **{"ytick.labelcolor": ink, "grid.color": COLOURS["thin"], "axes.axisbelow": True},
            **{"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False},
            **{"axes.grid": True, "svg.fonttype": "none", "axes.titlesize": "medium"},
        }
    )


@contextmanager
def _sheet(height: float) -> Iterator[Figure]:
    with style():
        from matplotlib.figure import Figure

        yield Figure(figsize=(WIDTH / 72, height / 72), layout="constrained", facecolor="none")


def svg(figure: Figure, name: str, words: str) -> str:
    """The figure as an element of a page, the same for the same figure.

    name: a figure's own in its page, since ids are made of it. words: for who does not see it.
    """
    import matplotlib

    file = io.StringIO()
    unsaid = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with style(), matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(file, format="svg", metadata=unsaid)
    text = re.sub(r"<!--.*?-->|<style.*?</style>|<metadata.*?</metadata>", "", file.getvalue())
    text = re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :])
    text = re.sub(r"(\.\d\d)\d+", r"\1", re.sub(r"\s*\n\s*", "\n", text))
    for colour, value in COLOURS.items():
        text = text.replace(value, f"var(--{colour}, {value})")
    label = words.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


@dataclass(frozen=True, slots=True)
class Bar:
    """One line of bars: a time, what it is held against, and words for two columns beside."""

    name: str
    us: float | None
    words: tuple[str, str]
    peer_us: float | None = None
    roof_us: float | None = None
    colour: str = "ours"


def bars(rows: Sequence[Bar], head: tuple[str, str], names: tuple[str, str]) -> Figure:
    """Times as bars, with their best peers' below and roofs across them.

    head: of the two columns of words. names: what a bar and the bar below it are.
    """
    with _sheet(90 + 1.3 * ROW * len(rows)) as figure:
        axes = _lined(figure, [row.name for row in rows], [row.words for row in rows], head)
        for kind, offset, height in (("us", 0.0, 0.5), ("peer_us", 0.35, 0.2)):
            at = [(y, t) for y, row in enumerate(rows) if (t := getattr(row, kind)) is not None]
            colours = [rows[y].colour if kind == "us" else "peer" for y, _ in at]
            axes.barh(
                [y + offset for y, _ in at],
                [us for _, us in at],
                height=height,
                color=[COLOURS[colour] for colour in colours],
                label=names[0] if kind == "us" else names[1],
            )
        roofs = [(y, row.roof_us) for y, row in enumerate(rows) if row.roof_us is not None]
        xs = [x for _, us in roofs for x in (us, us, math.nan)]
        ys = [y for at, _ in roofs for y in (at - 0.4, at + 0.45, math.nan)]
        axes.plot(xs, ys, color=COLOURS["ink"], linewidth=2, label="roof")
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(lambda us, _: units.trim(units.time(us)) if us else "0")
        axes.locator_params(axis="x", nbins=5)
        shown = {"roof": bool(roofs), names[0]: True, names[1]: any(r.peer_us for r in rows)}
        handles, labels = axes.get_legend_handles_labels()
        kept = [(h, one) for h, one in zip(handles, labels, strict=True) if shown[one]]
        if len(kept) > 1:
            figure.legend(*zip(*kept, strict=True), loc="outside lower center", ncols=3)
    return figure


@dataclass(frozen=True, slots=True)
class Rug:
    """One line of ticks: values by the colour they are drawn in, and words beside."""

    name: str
    values: Mapping[str, Sequence[float]]
    words: str


def rugs(rows: Sequence[Rug], label: str, head: str, low: float, high: float) -> Figure:
    """Values as ticks on a logarithmic scale from `low` to `high`; beyond it they stand at its end.

    A line marks 1. Ticks nearer to each other than can be seen are one.
    """
    with _sheet(80 + 0.8 * ROW * len(rows)) as figure:
        words = [(row.words, "") for row in rows]
        axes = _lined(figure, [row.name for row in rows], words, (head, ""))
        _logarithmic(axes, "x", low, high, lambda value: f"{value:g}x")
        axes.axvline(1, color=COLOURS["ink"], linewidth=1)
        for colour in dict.fromkeys(colour for row in rows for colour in row.values):
            half = 0.4 if colour == "ours" else 0.25
            ticks = dict.fromkeys(
                (round(math.log10(min(max(value, low), high)), 2), y)
                for y, row in enumerate(rows)
                for value in row.values.get(colour, ())
            )
            xs = [x for at, _ in ticks for x in (10**at, 10**at, math.nan)]
            ys = [y for _, at in ticks for y in (at - half, at + half, math.nan)]
            wide = 2.5 if colour == "ours" else 1.2
            axes.plot(xs, ys, color=COLOURS[colour], linewidth=wide, solid_capstyle="butt")
        axes.set_xlabel(label)
    return figure


@dataclass(frozen=True, slots=True)
class Point:
    """One layer under the roof: FLOP/byte, and FLOP/s of ours and of its best peer."""

    name: str
    intensity: float
    rate: float | None
    peer: float | None = None


def roofline(points: Sequence[Point], compute: float | None, memory: float | None) -> Figure:
    """Rates over intensities under the roofs, in FLOP/s and byte/s; None where none was measured.

    Names stand in a column at the right, each led to its point.
    """
    rates = [rate for p in points for rate in (p.rate, p.peer) if rate]
    xs = [p.intensity for p in points]
    low, high = min(rates) / 3, max([*rates, compute or 0]) * 2
    left, right = min(xs) / 3, max([*xs, compute / memory if compute and memory else 0]) * 3
    with _sheet(max(360, 17 * len(points))) as figure:
        axes = figure.add_subplot()
        _logarithmic(axes, "x", left, right, units.three)
        _logarithmic(axes, "y", low, high, lambda rate: units.si(rate, "FLOP/s"))
        if compute and memory:
            ridge = compute / memory
            axes.plot([left, ridge, right], [memory * left, compute, compute], color=COLOURS["ink"])
            rates_of_roofs = f"{units.si(memory, 'B/s')} and {units.si(compute, 'FLOP/s')}"
            axes.set_title(f"roofs of {rates_of_roofs}", loc="left", color=COLOURS["soft"])
        for p in points:
            if p.rate and p.peer:
                axes.plot([p.intensity] * 2, [p.rate, p.peer], color=COLOURS["soft"], linewidth=1)
        for kind, marker, words in (("peer", "D", "best peer"), ("rate", "o", "ours")):
            at = [(p.intensity, rate) for p in points if (rate := getattr(p, kind))]
            colour = COLOURS["ours" if kind == "rate" else "peer"]
            if at:
                axes.plot(*zip(*at, strict=True), marker, color=colour, ms=6, label=words)
        ordered = sorted(points, key=lambda p: p.rate or p.peer or 0)
        shares = [math.log((p.rate or p.peer or 0) / low) / math.log(high / low) for p in ordered]
        for p, height in zip(ordered, spread(shares, 0.055 * min(1, 18 / len(points))), strict=True):
            axes.annotate(
                *(p.name, (p.intensity, p.rate or p.peer or 0), (1.05, height)),
                textcoords="axes fraction",
                va="center",
                arrowprops={"arrowstyle": "-", "color": COLOURS["soft"], "lw": 0.5, "shrinkA": 1},
            )
        axes.set_xlabel("FLOP per byte")
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Places from 0 to 1, in rising order, moved no more than it takes to be `gap` apart."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + gap) if moved else place)
    ceiling = 1.0
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], ceiling)
        ceiling = moved[i] - gap
    return moved


@dataclass(frozen=True, slots=True)
class Curve:
    """One contestant over batch sizes."""

    name: str
    batches: Sequence[int]
    images_per_second: Sequence[float]
    straw_man: bool = False
    ours: bool = False


def curves(series: Sequence[Curve], ratios: Mapping[int, float]) -> Figure:
    """Images per second over the batch size, and below how many times as fast as the best peer."""
    batches = sorted({batch for curve in series for batch in curve.batches})
    rates = [rate for curve in series for rate in curve.images_per_second]
    with _sheet(400 + ROW * math.ceil(len(series) / 2)) as figure:
        top, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.4))
        colours, markers = (PEERS[i % len(PEERS)] for i in range(99)), iter(MARKERS * 20)
        for curve in series:
            colour = "ours" if curve.ours else "soft" if curve.straw_man else next(colours)
            top.plot(
                *(curve.batches, curve.images_per_second),
                color=COLOURS[colour],
                marker="o" if curve.ours else next(markers),
                ms=4.5,
                linewidth=2.5 if curve.ours else 1.2,
                linestyle="--" if curve.straw_man else "-",
                zorder=3 if curve.ours else 2,
                label=curve.name,
            )
        _logarithmic(top, "y", min(rates) / 1.3, max(rates) * 1.3, units.whole)
        top.set_title("images per second", loc="left")
        below.plot(list(ratios), list(ratios.values()), "o-", color=COLOURS["ours"], lw=2.5)
        below.axhline(1, color=COLOURS["ink"], linewidth=1)
        values = [1.0, *ratios.values()]
        _logarithmic(below, "y", min(values) / 1.2, max(values) * 1.2, units.times)
        below.set_title("times as fast as the best peer", loc="left")
        below.set_xscale("log")
        below.set_xticks(batches, [f"{batch:,}" for batch in batches])
        below.set_xticks([], minor=True)
        below.set_xlabel("batch")
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def _lined(
    figure: Figure, names: Sequence[str], words: Sequence[tuple[str, str]], head: tuple[str, str]
) -> Axes:
    """Axes of a line a name, from the top down, with one or two columns of words at the right."""
    axes = figure.add_subplot()
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    across = axes.get_yaxis_transform()
    for place, column in ((1.16 if any(head[1:]) else 1.03, 0), (1.34, 1)):
        side = "right" if any(head[1:]) else "left"
        for y, text in ((-0.9, head[column]), *((y, w[column]) for y, w in enumerate(words))):
            colour = COLOURS["soft" if y < 0 else "ink"]
            if text:
                axes.text(place, y, text, transform=across, ha=side, va="center", color=colour)
    return axes


def _logarithmic(
    axes: Axes, which: str, low: float, high: float, words: Callable[[float], str]
) -> None:
    """A logarithmic "x" or "y" with at most seven ticks, at 1, 2 and 5 or at powers of ten."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    if len(ticks) > 7:
        ticks = [10.0**power for power in powers if low <= 10.0**power <= high]
    ticks = ticks[:: math.ceil(len(ticks) / 7)]
    axes.set(**{f"{which}scale": "log", f"{which}lim": (low, high)})
    set_ticks = axes.set_xticks if which == "x" else axes.set_yticks
    set_ticks([], minor=True)
    set_ticks(ticks, [units.trim(words(tick)) for tick in ticks])
