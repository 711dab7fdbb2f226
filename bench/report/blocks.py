"""The network as a row of blocks: how long each layer takes, how near to the roof it is, who wins.

A block is a button: the page shows the rows of the layer that is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from .. import units
from .svg import (
    BOLD,
    CHARACTER,
    TYPE,
    Scale,
    element,
    picture,
    ramp_key,
    shade,
    spread,
    text,
    titled,
)


@dataclass(frozen=True, slots=True)
class Block:
    """One layer in the row of blocks."""

    name: str
    us: float
    roof: float | None  # percent of the roof
    ratio: float | None  # times as fast as the best peer


def blocks(layers: Sequence[Block], width: int = 1040) -> str:
    """The layers as a row: a block's width is its share of the time, its colour its % of the roof.

    Every block is a button with `data-layer`.
    """
    total = sum(layer.us for layer in layers)
    starts = [0.0, *accumulate(layer.us / total * width for layer in layers)]
    sizes = [TYPE * (1 + BOLD * max(len(b.name), len(_ratio(b)))) for b in layers]
    middles = [(a + b) / 2 for a, b in pairwise(starts)]
    places = spread(middles, sizes, 0, width)
    made = []
    for layer, start, end, middle, place in zip(
        layers, starts, starts[1:], middles, places, strict=False
    ):
        wide = max(end - start - 2, 1.0)
        fill, ink = _colour(layer.roof)
        inside = [units.percent(100 * layer.us / total), _of_roof(layer.roof)]
        shown = (
            "".join(
                text(middle, 86 + 20 * i, words, text_anchor="middle", style=f"fill:{ink}")
                for i, words in enumerate(inside)
            )
            if wide > 10 * TYPE * CHARACTER
            else ""
        )
        made.append(
            _button(
                layer,
                total,
                text(place, 14, layer.name, class_="strong", text_anchor="middle"),
                text(place, 31, _ratio(layer), class_=_won(layer.ratio), text_anchor="middle"),
                element("path", class_="lead", d=f"M{place:.1f} 37L{middle:.1f} 50v8"),
                element(
                    "rect", x=start + 1, y=58, width=wide, height=64, rx=3, class_="cell", fill=fill
                ),
                shown,
            )
        )
    key = ramp_key(width - 240, 136, 140, "0", "100 % of roof")
    return picture(width, 152, "Layers by share of time", *made, key, role="group")


def steps(layers: Sequence[Block], width: int = 380) -> str:
    """The same blocks one below the other, each starting where the one above ends."""
    total = sum(layer.us for layer in layers)
    left, right = 58 + max(len(b.name) for b in layers) * TYPE * BOLD, 120
    place = Scale(0, total, left, width - right, log=False)
    made = []
    start = 0.0
    for i, layer in enumerate(layers):
        y = 28 * i
        wide = max(place(start + layer.us) - place(start) - 1, 1.5)
        share = units.percent(100 * layer.us / total)
        x = place(start)
        made.append(
            _button(
                layer,
                total,
                element("rect", x=0, y=y, width=width, height=28, fill="none", class_="hit"),
                text(4, y + 19, layer.name, class_="strong"),
                text(left - 8, y + 19, share, class_="small", text_anchor="end"),
                element(
                    "rect",
                    x=x,
                    y=y + 4,
                    width=wide,
                    height=20,
                    rx=2,
                    class_="cell",
                    fill=_colour(layer.roof)[0],
                ),
                text(width - 70, y + 19, units.percent(layer.roof), text_anchor="end"),
                text(width - 2, y + 19, _ratio(layer), class_=_won(layer.ratio), text_anchor="end"),
            )
        )
        start += layer.us
    y = 28 * len(layers)
    key = ramp_key(left + 30, y + 12, 100, "0", "100 % of roof")
    return picture(width, y + 32, "Layers by share of time", *made, key, role="group")


def _button(layer: Block, total: float, *children: str) -> str:
    words = (
        f"{layer.name}: {units.time(layer.us)}, {units.percent(100 * layer.us / total)} of the time"
    )
    if layer.roof is not None:
        words += f", {units.percent(layer.roof)} of the roof"
    if layer.ratio is not None:
        words += f", {units.times(layer.ratio)} the best peer's speed"
    return element(
        "g",
        titled(words),
        *children,
        class_="block",
        role="button",
        tabindex=0,
        aria_label=words,
        data_layer=layer.name,
    )


def _ratio(layer: Block) -> str:
    if layer.ratio is None:
        return "-"
    return f"{'▲' if layer.ratio >= 1 else '▼'} {units.times(layer.ratio)}"


def _won(ratio: float | None) -> str:
    return "small" if ratio is None else "small good" if ratio >= 1 else "small bad"


def _colour(roof: float | None) -> tuple[str, str]:
    return ("#9aa1ab", "#000") if roof is None else shade(roof / 100)


def _of_roof(roof: float | None) -> str:
    return "no roof" if roof is None else f"{units.percent(roof)} roof"
