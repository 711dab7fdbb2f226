"""The report's figures, drawn by matplotlib: bars under their roofs, and curves over batches.

By its object interface alone, as in `engine/pictures`. A figure is for half a page or a phone. Its
colours are those of COLOURS, also in a file of its own; in a page they follow light and dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .. import units
from ..records import OURS
from .story import Duel, View

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {
    **{"ink": "#1a1d22", "soft": "#59616c", "thin": "#e3e6ea", "ours": "#0059b3"},
    **{"peer": "#c44500", "c2": "#00785a", "c3": "#a03a86", "c4": "#7d6200", "c5": "#4b5a8a"},
}
"""What the figures draw with, by the names of the page's style sheet."""

ROW = 22  # points: a line of a figure that has lines


def style() -> Any:
    """matplotlib's settings, under which figures are made and written, and which end with that."""
    import matplotlib

    ink, soft = COLOURS["ink"], COLOURS["soft"]
    return matplotlib.rc_context(
        {
            **{"font.family": ["DejaVu Sans"], "font.size": 10.5, "axes.titlesize": "medium"},
            **{"text.color": ink, "text.parse_math": False, "svg.fonttype": "none"},
            **dict.fromkeys(("axes.labelcolor", "axes.edgecolor", "axes.titlecolor"), soft),
            **{"axes.facecolor": "none", "figure.facecolor": "none"},
            **{"xtick.color": soft, "ytick.color": soft, "ytick.labelcolor": ink},
            **{"axes.grid": True, "axes.axisbelow": True, "grid.color": COLOURS["thin"]},
            **{"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False},
        }
    )


def svg(figure: Figure, name: str, words: str) -> str:
    """The figure as an element of a page, the same for the same figure.

    name: its own in that page, since ids are made of it. words: for who does not see it.
    """
    import matplotlib

    file = io.StringIO()
    told = {"Title": words, **dict.fromkeys(("Creator", "Date", "Format", "Type"))}
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(file, format="svg", metadata=told)
    text = file.getvalue()
    for what, instead in (
        (r"(?s)^.*?(?=<svg)|<!--.*?-->|<style.*?</style>|<metadata.*?</metadata>", ""),
        (r'(?<=<g) id="[^"]*"|(?<=\.\d\d)\d+(?=[^<>]*>)', ""),  # coordinates, not what is said
        (r"\s*\n\s*", "\n"),
        *((value, f"var(--{colour}, {value})") for colour, value in COLOURS.items()),
        ("<svg ", '<svg role="img" '),
    ):
        text = re.sub(what, instead, text)
    return text


def bars(lines: Mapping[str, Duel]) -> Figure:
    """Times as bars, ours above the best peer's, and their roofs across them."""
    words = [
        units.percent(duel.row.percent_of_roof) + (f"  {_short(duel)}" if duel.ratio else "")
        for duel in lines.values()
    ]
    figure, axes = _figure(90 + 1.2 * ROW * len(lines))
    beside = axes.twinx()
    for side, labels in ((axes, list(lines)), (beside, words)):  # from the top down
        side.set_ylim(len(lines) - 0.4, -0.6)
        side.set_yticks(range(len(lines)), labels)
        side.tick_params(axis="y", length=0)
        side.grid(visible=False, axis="y")
    beside.set_title("of roof, x best peer", loc="right")
    for kind, label, offset, height in (("ours", "ours", 0.0, 0.5), ("peer", "peer", 0.35, 0.2)):
        rows = {y: row for y, d in enumerate(lines.values()) if (row := getattr(d, kind))}
        times = [row.median_us for row in rows.values()]
        if rows:
            axes.barh([y + offset for y in rows], times, height, color=COLOURS[kind], label=label)
    roofs = {y: us for y, duel in enumerate(lines.values()) if (us := duel.row.roof_us)}
    low, high = ([y + half for y in roofs] for half in (-0.45, 0.45))
    axes.vlines(list(roofs.values()), low, high, color=COLOURS["ink"], label="roof")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda us, _: units.trim(units.time(us)) if us else "0")
    axes.locator_params(axis="x", nbins=5)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def curves(view: View) -> Figure:
    """Images per second over the batch size; on ours, how many times as fast as the best peer."""
    from matplotlib.ticker import LogLocator, NullLocator

    rows = sorted(view.right, key=lambda row: row.batch)
    names = dict.fromkeys(row.contestant for row in (*view.ours, *rows))
    figure, axes = _figure(330 + ROW * len(names) / 2)
    for i, name in enumerate(names):
        own = list({row.batch: row for row in rows if row.contestant == name}.values())
        ours, straw = name == OURS, own[0].straw_man
        colour = "ours" if ours else "soft" if straw else ("peer", "c2", "c3", "c4", "c5")[i % 5]
        axes.plot(
            [row.batch for row in own],
            [row.images_per_second or 0 for row in own],
            f"{'osD^vPX'[i % 7]}{'--' if straw else '-'}",
            color=COLOURS[colour],
            linewidth=2.5 if ours else 1.2,
            label=name,
        )
    for duel in view.duels():
        if duel.ours and duel.ratio:
            at = (duel.row.batch, duel.ours.images_per_second or 0)
            axes.annotate(_short(duel), at, (0, 8), textcoords="offset points", ha="center")
    speeds = [row.images_per_second or 0 for row in rows]
    low, high = min(speeds) / 1.5, max(speeds) * 1.7
    axes.set(yscale="log", ylim=(low, high))
    subs = (1,) if high / low > 200 else (1, 1.5, 2, 3, 5, 7)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: units.trim(units.whole(value)))
    batches = sorted({row.batch for row in rows})
    axes.set(title="images per second", xlabel="batch", xscale="log")
    axes.set_xticks([], minor=True)
    axes.set_xticks(batches, [f"{batch:,}" for batch in batches])
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _short(duel: Duel) -> str:
    """How many times as fast as the best peer, without the interval."""
    return units.times(duel.ratio.value if duel.ratio else None)


def _figure(height: float) -> tuple[Figure, Axes]:
    """Axes on 480 points by `height`, for half a page or a phone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(480 / 72, height / 72), layout="constrained")
    return figure, figure.add_subplot()
