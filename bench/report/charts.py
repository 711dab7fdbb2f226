"""The report's charts: pure functions from numbers to an SVG drawing, each with its own words.

Times are in microseconds and rates in FLOP/s or byte/s. A contestant's `style` is a small number
(0 is ours) or "straw" for the straw man, and means the same colour and marker in every chart.
Roofline after S. Williams, A. Waterman and D. Patterson, "Roofline: an insightful visual
performance model", CACM 52(4), 2009.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .. import units
from .svg import (
    CHARACTER,
    TYPE,
    Scale,
    around,
    beside,
    colour,
    element,
    gap,
    line,
    mark,
    picture,
    text,
    titled,
)


@dataclass(frozen=True, slots=True)
class Point:
    """One layer under the roof, and its best peer."""

    name: str
    intensity: float  # FLOP/byte
    rate: float  # FLOP/s
    peer: tuple[str, int | str, float] | None  # contestant, style, FLOP/s


@dataclass(frozen=True, slots=True)
class Curve:
    """One contestant over batch sizes: (batch, low, middle, high) each."""

    name: str
    style: int | str
    points: tuple[tuple[int, float, float, float], ...]


@dataclass(frozen=True, slots=True)
class Errors:
    """One layer's errors, relative to the largest number: (contestant, style, error) each."""

    name: str
    tolerance: float | None
    found: tuple[tuple[str, int | str, float], ...]


@dataclass(frozen=True, slots=True)
class Bar:
    """A value out of what it could be at most, and both in words."""

    name: str
    value: float
    full: float
    words: str


def roofline(
    points: Sequence[Point],
    compute: float | None,
    memory: float | None,
    width: int = 1040,
    height: int = 430,
) -> str:
    """Useful FLOP/s over FLOP/byte, both by logarithm, under the measured roofs.

    compute, memory: the roofs' FLOP/s and byte/s. A layer's line ends at its best peer.
    """
    rates = [p.rate for p in points] + [p.peer[2] for p in points if p.peer]
    reach = [p.intensity for p in points]
    if compute and memory:
        reach.append(compute / memory)
    left, top, right, bottom = 64, 12, width - 14, height - 46
    x = Scale(*around(reach, 2), left, right)
    y = Scale(*around(rates + ([compute] if compute else []), 1.6), bottom, top)
    axes = _grid(
        x,
        y,
        [(v, f"{v:g}") for v in x.ticks(width // 90)],
        [(v, units.trim(units.si(v, ""))) for v in y.ticks(8)],
        "FLOP per byte, at the least that must be moved",
        "FLOP/s",
    )
    spots = [(x(p.intensity), y(p.rate)) for p in points]
    rivals = [(x(p.intensity), y(p.peer[2])) for p in points if p.peer]
    names = [p.name for p in points]
    ends = [left + i * (right - left) / 39 for i in range(40)] if memory or compute else []
    taken = [*rivals, *((at, y(_roof(x.inverse(at), compute, memory))) for at in ends)]
    made, leads = [], []
    for point, (px, py), (nx, ny) in zip(
        points,
        spots,
        beside(spots, names, TYPE, (left, top + 18, right, bottom), taken),
        strict=True,
    ):
        words = f"{point.name}: {units.si(point.rate, 'FLOP/s')} at {units.three(point.intensity)} "
        ours = mark(0, px, py, f"{words}FLOP/byte", 6)
        if point.peer:
            who, style, rate = point.peer
            made.append(line(px, py, px, y(rate), "joint"))
            made.append(
                mark(style, px, y(rate), f"{point.name}, {who}: {units.si(rate, 'FLOP/s')}")
            )
        made.append(ours)
        if gap((nx, ny), len(point.name) * TYPE * CHARACTER / 2, (px, py)) > 12:
            leads.append(line(px, py, nx, ny, "lead"))
        leads.append(text(nx, ny + 4, point.name, class_="halo", text_anchor="middle"))
    roofs = _roofs(x, y, compute, memory)
    return picture(width, height, "Roofline of the layers", axes, *roofs, *made, *leads)


def _roof(intensity: float, compute: float | None, memory: float | None) -> float:
    return min(compute or math.inf, memory * intensity if memory else math.inf)


def _roofs(x: Scale, y: Scale, compute: float | None, memory: float | None) -> list[str]:
    made = []
    ridge = compute / memory if compute and memory else None
    if compute:
        start = ridge or x.low
        made.append(line(x(start), y(compute), x(x.high), y(compute), "roof"))
        words = units.si(compute, "FLOP/s")
        made.append(text(x(x.high) - 4, y(compute) - 7, words, class_="small", text_anchor="end"))
    if memory:
        # The slope, cut where the drawing ends.
        first = max(x.low, y.low / memory)
        last = min(ridge or x.high, y.high / memory)
        if first < last:
            x1, y1, x2, y2 = x(first), y(first * memory), x(last), y(last * memory)
            made.append(line(x1, y1, x2, y2, "roof"))
            cx, cy = x1 + (x2 - x1) * 0.5, y1 + (y2 - y1) * 0.5
            turn = math.degrees(math.atan2(y2 - y1, x2 - x1))
            made.append(
                text(
                    cx,
                    cy - 7,
                    units.si(memory, "B/s"),
                    class_="small",
                    text_anchor="middle",
                    transform=f"rotate({turn:.1f} {cx:.1f} {cy:.1f})",
                )
            )
    return made


def curves(
    series: Sequence[Curve],
    y_name: str,
    unit: str,
    width: int = 480,
    height: int = 330,
) -> str:
    """Something over the batch size, both by logarithm, with a band from low to high.

    unit: "time" writes the numbers as times, anything else as counts of it.
    """
    batches = sorted({p[0] for s in series for p in s.points})
    values = [v for s in series for p in s.points for v in p[1:]]
    left, top, right, bottom = 78, 12, width - 14, height - 46
    x = Scale(*around(batches, 1.3), left, right)
    y = Scale(*around(values, 1.4), bottom, top)
    say = units.time if unit == "time" else lambda v: units.si(v, unit)
    ticks = [(v, units.trim(say(v))) for v in y.ticks(8)]
    made = []
    for s in reversed(series):  # ours last, on top
        low = [f"{x(b):.1f} {y(lo):.1f}" for b, lo, _, _ in s.points]
        high = [f"{x(b):.1f} {y(hi):.1f}" for b, _, _, hi in s.points]
        middle = [f"{x(b):.1f} {y(mid):.1f}" for b, _, mid, _ in s.points]
        band = "M" + "L".join([*low, *reversed(high)]) + "z"
        made.append(element("path", class_=f"band {colour(s.style)}", d=band))
        made.append(element("path", class_=f"curve {colour(s.style)}", d="M" + "L".join(middle)))
        made += [
            mark(
                s.style,
                x(b),
                y(mid),
                f"{s.name}, batch {b}: {say(mid)} ({say(lo)} to {say(hi)})",
                4,
            )
            for b, lo, mid, hi in s.points
        ]
    axes = _grid(x, y, [(b, f"{b}") for b in batches], ticks, "batch", y_name)
    return picture(width, height, f"{y_name} over the batch size", axes, *made)


def errors(layers: Sequence[Errors], width: int = 480) -> str:
    """One line a layer: errors by logarithm, and the tolerance as a bar across it.

    An error that is not finite stands at the right edge.
    """
    finite = [e for row in layers for _, _, e in row.found if math.isfinite(e) and e > 0]
    finite += [row.tolerance for row in layers if row.tolerance]
    left, high = 12 + max(len(row.name) for row in layers) * TYPE * CHARACTER, 32
    bottom = high * len(layers) + 8
    x = Scale(*around(finite or [1e-4], 2), left, width - 24)
    made = []
    for i, row in enumerate(layers):
        middle = high * i + high / 2 + 4
        made.append(text(left - 10, middle + 4, row.name, text_anchor="end"))
        made.append(line(left, middle, width - 24, middle, "grid"))
        if row.tolerance:
            edge = x(row.tolerance)
            beyond = element(
                "rect", x=edge, y=middle - 13, width=width - 24 - edge, height=26, class_="beyond"
            )
            made += [beyond, line(edge, middle - 13, edge, middle + 13, "limit")]
        step = 18 / max(len(row.found), 4)  # a line of its own for each contestant
        for k, (who, style, error) in reversed(list(enumerate(row.found))):
            wrong = row.tolerance is None or not error <= row.tolerance
            said = f"{who}, {row.name}: {units.power(error)}{', WRONG' if wrong else ''}"
            said += f", tolerance {units.power(row.tolerance)}"
            place = x(max(error, x.low)) if math.isfinite(error) else width - 24.0
            down = middle + step * (k - (len(row.found) - 1) / 2)
            made.append(mark(style, place, down, said, 4))
            if wrong:
                made.append(element("circle", cx=place, cy=down, r=9.0, class_="wrong"))
    ticks = "".join(
        line(x(v), bottom, x(v), bottom + 4, "axis")
        + text(x(v), bottom + 19, units.trim(units.power(v)), class_="small", text_anchor="middle")
        for v in x.ticks(6)
    )
    words = "largest error / largest number, against float64"
    name = text(width / 2, bottom + 38, words, class_="small", text_anchor="middle")
    axis = line(left, bottom, width - 24, bottom, "axis")
    return picture(width, bottom + 46, "Errors by layer", *made, axis, ticks, name)


def bars(rows: Sequence[Bar], width: int = 560, title: str = "Bars") -> str:
    """One bar a row, each against what it could be at most, with its words at the right."""
    left = 14 + max((len(row.name) for row in rows), default=0) * TYPE * CHARACTER
    right = width - 10 - max((len(row.words) for row in rows), default=0) * TYPE * CHARACTER
    right = max(right, left + 80)
    end = right + 10 + max((len(row.words) for row in rows), default=0) * TYPE * CHARACTER
    made = []
    for i, row in enumerate(rows):
        y = 26 * i + 4
        part = min(max(row.value / row.full, 0), 1) if row.full > 0 else 0
        made.append(
            element(
                "g",
                titled(f"{row.name}: {row.words}"),
                text(left - 8, y + 15, row.name, text_anchor="end"),
                element("rect", x=left, y=y + 2, width=right - left, height=18, class_="track"),
                element(
                    "rect", x=left, y=y + 2, width=(right - left) * part, height=18, class_="fill"
                ),
                text(right + 8, y + 15, row.words),
            )
        )
    return picture(max(width, end), 26 * len(rows) + 8, title, *made)


def _grid(
    x: Scale,
    y: Scale,
    x_ticks: Sequence[tuple[float, str]],
    y_ticks: Sequence[tuple[float, str]],
    x_name: str,
    y_name: str,
) -> str:
    """Axes with ticks, thin lines across, and names: x below, y along."""
    made = []
    after = -math.inf
    for value, words in x_ticks:
        half = len(words) * TYPE * CHARACTER / 2
        made.append(line(x(value), y.start, x(value), y.end, "grid"))
        if x(value) - half > after:  # a label that would touch the one before is left out
            made.append(text(x(value), y.start + 17, words, class_="small", text_anchor="middle"))
            after = x(value) + half + 2
    for value, words in y_ticks:
        made.append(line(x.start, y(value), x.end, y(value), "grid"))
        made.append(text(x.start - 7, y(value) + 4, words, class_="small", text_anchor="end"))
    made.append(
        element("path", class_="axis", d=f"M{x.start} {y.end:.1f}V{y.start:.1f}H{x.end:.1f}")
    )
    middle = (x.start + x.end) / 2
    made.append(text(middle, y.start + 37, x_name, class_="small", text_anchor="middle"))
    made.append(
        text(
            12,
            (y.start + y.end) / 2,
            y_name,
            class_="small",
            text_anchor="middle",
            transform=f"rotate(-90 12 {(y.start + y.end) / 2:.1f})",
        )
    )
    return "".join(made)
