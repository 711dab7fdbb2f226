"""The report's figures, drawn by matplotlib: bars, roofline, curves over batches, rugs of ticks.

By its object interface alone, as in `engine/pictures`. A figure is for half a page or a phone. Its
colours are those of COLOURS, also in a file of its own; in a page they follow light and dark.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .. import units
from ..records import OURS, Row
from .story import Duel, View, right

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {
    **{"ink": "#1a1d22", "soft": "#59616c", "thin": "#e3e6ea", "ours": "#0059b3"},
    **{"peer": "#c44500", "c2": "#00785a", "c3": "#a03a86", "c4": "#7d6200", "c5": "#4b5a8a"},
}
"""What the figures draw with, by the names of the page's style sheet."""

PEERS = ("peer", "c2", "c3", "c4", "c5")
WIDTH, ROW = 480, 22  # points: a figure, and a line of one that has lines


def style() -> Any:
    """matplotlib's settings while a figure is made, measured or written, and no longer."""
    import matplotlib

    ink, soft = COLOURS["ink"], COLOURS["soft"]
    return matplotlib.rc_context(
        {
            **{"font.family": ["DejaVu Sans"], "font.size": 10.5, "axes.titlesize": "medium"},
            **{"text.color": ink, "text.parse_math": False, "svg.fonttype": "none"},
            **{"axes.labelcolor": soft, "axes.edgecolor": soft, "axes.titlecolor": soft},
            **{"xtick.color": soft, "ytick.color": soft, "ytick.labelcolor": ink},
            **{"axes.grid": True, "axes.axisbelow": True, "grid.color": COLOURS["thin"]},
            **{"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False},
        }
    )


@contextmanager
def _sheet(height: float) -> Iterator[Figure]:
    with style():
        from matplotlib.figure import Figure

        yield Figure(figsize=(WIDTH / 72, height / 72), layout="constrained", facecolor="none")


def svg(figure: Figure, name: str, words: str) -> str:
    """The figure as an element of a page, the same for the same figure.

    name: its own in that page, since ids are made of it. words: for who does not see it.
    """
    import matplotlib

    file = io.StringIO()
    unsaid = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with style(), matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(file, format="svg", metadata={"Title": words, **unsaid})
    text = re.sub(
        r"<!--.*?-->|<style.*?</style>|<metadata.*?</metadata>", "", file.getvalue(), flags=re.S
    )
    text = re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :])
    text = re.sub(r"(\.\d\d)\d+", r"\1", re.sub(r"\s*\n\s*", "\n", text))
    for colour, value in COLOURS.items():
        text = text.replace(value, f"var(--{colour}, {value})")
    return text.replace("<svg ", '<svg role="img" ', 1)


def bars(lines: Sequence[tuple[str, Row | None, Row | None, float | None]]) -> Figure:
    """Times as bars, each with its best peer's below and its roof across them.

    lines: a name, its row, the peer's, and how many times as fast as the peer it is.
    """
    rows = [(y, row or peer) for y, (_, row, peer, _) in enumerate(lines)]
    words = [
        f"{units.percent(row.percent_of_roof if row else None)}   {units.times(ratio)}"
        for _, row, _, ratio in lines
    ]
    with _sheet(90 + 1.2 * ROW * len(lines)) as figure:
        axes = _lined(figure, [name for name, *_ in lines], words, "of roof   x best peer")
        for column, offset, height in ((1, 0.0, 0.5), (2, 0.35, 0.2)):
            drawn = [(y + offset, row) for y, line in enumerate(lines) if (row := line[column])]
            for colour, label in (("ours", "ours"), ("peer", "best peer"), ("soft", "straw man")):
                of_colour = [(y, row.median_us) for y, row in drawn if _colour(row) == colour]
                if of_colour:
                    label = "" if column == 1 and colour == "peer" else label
                    axes.barh(*zip(*of_colour), height, color=COLOURS[colour], label=label)
        roofs = [(y, row.roof_us) for y, row in rows if row and row.roof_us]
        if roofs:
            _ticks(axes, [(us, y) for y, us in roofs], 0.45, color=COLOURS["ink"], label="roof")
        axes.set_xlim(left=0)
        axes.xaxis.set_major_formatter(lambda us, _: units.trim(units.time(us)) if us else "0")
        axes.locator_params(axis="x", nbins=5)
        figure.legend(loc="outside lower center", ncols=4)
    return figure


def rugs(
    lines: Sequence[tuple[str, str, Mapping[str, Sequence[float]]]],
    *,
    head: str,
    ends: tuple[float, float],
    label: str,
) -> Figure:
    """Values as ticks on a logarithmic scale between `ends`, a line at 1; what is beyond is there.

    lines: a name, words to stand beside it under `head`, and values by colour. Ticks too near to
    be told apart are one.
    """
    low, high = ends
    with _sheet(80 + 0.75 * ROW * len(lines)) as figure:
        axes = _lined(figure, [line[0] for line in lines], [line[1] for line in lines], head)
        _logarithmic(axes, "x", low, high, lambda value: f"{value:g}")
        axes.axvline(1, color=COLOURS["ink"], linewidth=1)
        for colour, half, wide in (("soft", 0.25, 1.2), ("ours", 0.4, 2.5)):
            ticks = dict.fromkeys(
                (10 ** round(math.log10(min(max(value, low), high)), 2), y)
                for y, (_, _, values) in enumerate(lines)
                for value in values.get(colour, ())
            )
            _ticks(axes, list(ticks), half, color=COLOURS[colour], linewidth=wide)
        axes.set_xlabel(label)
    return figure


def roofline(duels: Sequence[Duel], compute: float | None, memory: float | None) -> Figure:
    """Rates over intensities under the roofs, in FLOP/s and byte/s; None where none was measured.

    Names stand in a column at the right, each led to its point. After S. Williams, A. Waterman and
    D. Patterson, "Roofline: an insightful visual performance model", CACM 52(4), 2009.
    """
    places = {duel.row.problem: (_intensity(duel.row), _rate(duel.row)) for duel in duels}
    xs = [x for x, _ in places.values()]
    rates = [_rate(row) for duel in duels for row in (duel.ours, duel.peer) if row]
    low, high = min(rates) / 3, max([*rates, compute or 0]) * 2
    left, right = min(xs) / 3, max([*xs, compute / memory if compute and memory else 0]) * 3
    with _sheet(max(360, 0.9 * ROW * len(duels))) as figure:
        axes = figure.add_subplot()
        _logarithmic(axes, "x", left, right, units.three)
        _logarithmic(axes, "y", low, high, lambda rate: units.si(rate, "FLOP/s"))
        if compute and memory:
            ridge = [left, compute / memory, right]
            axes.plot(ridge, [memory * left, compute, compute], color=COLOURS["ink"])
            roofs = f"roofs: {units.si(memory, 'B/s')}, {units.si(compute, 'FLOP/s')}"
            axes.set_title(roofs, loc="left")
        for duel in duels:
            both = [_rate(row) for row in (duel.ours, duel.peer) if row]
            axes.plot([_intensity(duel.row)] * len(both), both, color=COLOURS["soft"], linewidth=1)
        for kind, marker, label in (("peer", "D", "best peer"), ("ours", "o", "ours")):
            dots = [(_intensity(row), _rate(row)) for d in duels if (row := getattr(d, kind))]
            if dots:
                axes.plot(*zip(*dots), marker, color=COLOURS[kind], label=label)
        ordered = sorted(places, key=lambda name: places[name][1])
        shares = [math.log(places[name][1] / low) / math.log(high / low) for name in ordered]
        for name, height in zip(ordered, spread(shares, min(0.055, 1 / len(duels))), strict=True):
            axes.annotate(
                *(name, places[name], (1.05, height)),
                textcoords="axes fraction",
                va="center",
                arrowprops={"arrowstyle": "-", "color": COLOURS["soft"], "lw": 0.5, "shrinkA": 1},
            )
        axes.set_xlabel("FLOP per byte")
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def curves(view: View) -> Figure:
    """Images per second over the batch size, and below how many times as fast as the best peer."""
    rows = sorted(filter(right, view.rows), key=lambda row: row.batch)
    names = dict.fromkeys(row.contestant for row in (*view.ours, *rows))
    batches = sorted({row.batch for row in rows})
    with _sheet(400 + ROW * len(names) / 2) as figure:
        top, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.4))
        for i, name in enumerate(names):
            own = [row for row in rows if row.contestant == name]
            colour = _colour(own[0])
            top.plot(
                [row.batch for row in own],
                [row.images_per_second or 0 for row in own],
                color=COLOURS[PEERS[i % len(PEERS)] if colour == "peer" else colour],
                marker="osD^vPX"[i % 7],
                markersize=4.5,
                linewidth=2.5 if colour == "ours" else 1.2,
                linestyle="--" if colour == "soft" else "-",
                label=name,
            )
        speeds = [row.images_per_second or 0 for row in rows]
        ratios = {duel.row.batch: ratio for duel in view.duels() if (ratio := duel.ratio)}
        points = sorted(ratios.items())
        xs, ys = [batch for batch, _ in points], [ratio for _, ratio in points]
        below.plot(xs, ys, "o-", color=COLOURS["ours"], linewidth=2.5)
        below.axhline(1, color=COLOURS["ink"], linewidth=1)
        for axes, values, words, title in (
            (top, speeds, units.whole, "images per second"),
            (below, [1.0, *ratios.values()], units.times, "times as fast as the best peer"),
        ):
            _logarithmic(axes, "y", min(values) / 1.3, max(values) * 1.3, words)
            axes.set_title(title, loc="left")
        below.set_xscale("log")
        below.set_xticks([], minor=True)
        below.set_xticks(batches, [f"{batch:,}" for batch in batches])
        below.set_xlabel("batch")
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Places in rising order, moved apart until `gap` is between them, none of them beyond 1."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + gap) if moved else place)
    ceiling = 1.0
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], ceiling)
        ceiling = moved[i] - gap
    return moved


def _colour(row: Row) -> str:
    return "ours" if row.contestant == OURS else "soft" if row.straw_man else "peer"


def _intensity(row: Row) -> float:
    return row.flops / row.bytes


def _rate(row: Row) -> float:
    return (row.tflops or 0.0) * 1e12


def _lined(figure: Figure, names: Sequence[str], words: Sequence[str], head: str) -> Axes:
    """Axes with a line a name, from the top down, and words at the right under a heading."""
    axes = figure.add_subplot()
    beside = axes.twinx()
    for side, labels in ((axes, names), (beside, words)):
        side.set_ylim(len(names) - 0.4, -0.6)
        side.set_yticks(range(len(names)), labels)
        side.tick_params(axis="y", length=0)
        side.grid(visible=False, axis="y")
    beside.set_title(head, loc="right")
    return axes


def _ticks(axes: Axes, places: Sequence[tuple[float, float]], half: float, **drawn: Any) -> None:
    """Upright strokes through (x, y), all in one line, which makes a short file."""
    xs = [x for at, _ in places for x in (at, at, math.nan)]
    ys = [y for _, at in places for y in (at - half, at + half, math.nan)]
    axes.plot(xs, ys, solid_capstyle="butt", **drawn)


def _logarithmic(
    axes: Axes, which: str, low: float, high: float, words: Callable[[float], str]
) -> None:
    """A logarithmic "x" or "y" with ticks at powers of ten, on a short one also between."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set(**{f"{which}scale": "log", f"{which}lim": (low, high)})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1,) if high / low > 200 else (1, 1.5, 2, 3, 5, 7)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: units.trim(words(value)))
