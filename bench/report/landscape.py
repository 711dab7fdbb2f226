"""A tuner's search as pictures: two parameters as a heat map, every configuration as a dot.

A search is the cache lines of one problem: dictionaries with `layer`, `batch`, `dtype`, `device`,
`config`, `status` ("ok", or "refused", "wrong", "failed", "timeout" with a `reason`), and, where
the status is ok, `median_us` and `registers`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from .. import units
from ..records import RecordError
from .svg import (
    CHARACTER,
    TYPE,
    Scale,
    around,
    dots,
    element,
    line,
    mark,
    picture,
    ramp_key,
    shade,
    text,
    titled,
)

Line = dict[str, Any]

FAILURES = ("refused", "wrong", "failed", "timeout")
"""The ways to lose, and the order of their lanes."""


TOLD = 30
"""How many of the fastest say their configuration when pointed at; the failed ones all do."""


@dataclass(frozen=True, slots=True)
class Search:
    """All lines of one problem on one device, in the order they were tried."""

    layer: str
    batch: int
    dtype: str
    device: str
    lines: tuple[Line, ...]

    @property
    def name(self) -> str:
        """As a reader chooses it."""
        return f"{self.layer}, batch {self.batch}, {self.dtype}"

    @property
    def right(self) -> list[Line]:
        """What was proved and timed, fastest first."""
        found = [at for at in self.lines if at["status"] == "ok" and at.get("median_us")]
        return sorted(found, key=lambda at: float(at["median_us"]))

    @property
    def failures(self) -> Counter[tuple[str, str]]:
        """How many were lost by each status and reason.

        Of reasons that differ only in their numbers, the first stands for all.
        """
        found: dict[tuple[str, str], list[str]] = {}
        for at in self.lines:
            if at["status"] != "ok":
                reason = str(at.get("reason") or "")
                kind = (str(at["status"]), re.sub(r"\d+", "0", reason))
                found.setdefault(kind, []).append(reason)
        return Counter({(status, at[0]): len(at) for (status, _), at in found.items()})

    @property
    def parameters(self) -> list[str]:
        """What was varied, the most telling first: whose values' best times differ the most."""
        names = dict.fromkeys(name for at in self.lines for name in at["config"])
        varied = [n for n in names if len({self.value(at, n) for at in self.lines}) > 1]
        return sorted(varied, key=lambda n: -self._effect(n))

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Every two parameters, the most telling first."""
        return list(combinations(self.parameters, 2))

    def chosen(self, x: str | None, y: str | None) -> tuple[str, str]:
        """Two parameters for a picture: those asked for, filled up with the most telling others."""
        known = self.parameters or list(self.lines[0]["config"])
        x = x or next((name for name in known if name != y), known[0])
        return x, y or next((name for name in known if name != x), known[0])

    @staticmethod
    def value(at: Line, name: str) -> str:
        """A configuration's value in words; a dash where it has no such parameter."""
        return units.pretty(at["config"].get(name))

    def values(self, name: str) -> list[str]:
        """Every value that was tried, numbers in their order."""
        found = {self.value(at, name) for at in self.lines}
        try:
            return sorted(found, key=float)
        except ValueError:
            return sorted(found)

    def best(self, names: Sequence[str]) -> dict[tuple[str, ...], Line]:
        """The fastest right line for every combination of these parameters' values."""
        found: dict[tuple[str, ...], Line] = {}
        for at in self.right:
            found.setdefault(tuple(self.value(at, n) for n in names), at)
        return found

    def _effect(self, name: str) -> float:
        best = [at["median_us"] for at in self.best([name]).values()]
        return max(best) / min(best) if best else 0.0


def searches(lines: Iterable[Line]) -> list[Search]:
    """The lines by problem, in the order of their first lines."""
    found: dict[tuple[str, int, str, str], list[Line]] = {}
    for at in lines:
        key = (str(at["layer"]), int(at["batch"]), str(at["dtype"]), str(at["device"]))
        found.setdefault(key, []).append(at)
    return [Search(*key, tuple(grouped)) for key, grouped in found.items()]


def said(config: dict[str, Any]) -> str:
    """A configuration in one line."""
    return ", ".join(f"{name}={units.pretty(value)}" for name, value in config.items())


def heat_map(search: Search, x: str, y: str, width: int = 480) -> str:
    """The best time over the rest for every value of `x` (across) and `y` (down).

    Brighter is nearer to the best. Where all failed stands a cross; where nothing was tried,
    nothing. Raises RecordError for a parameter that the search has not.
    """
    known = list(dict.fromkeys(name for at in search.lines for name in at["config"]))
    for name in (x, y):
        if name not in known:
            raise RecordError(f"no parameter {name!r} in {search.name}; it has {', '.join(known)}")
    xs, ys, best = search.values(x), search.values(y), search.best([x, y])
    times = [float(at["median_us"]) for at in best.values()]
    fastest = min(times, default=1.0)
    unit, part = ("ms", 1e3) if fastest >= 1e3 else ("µs", 1.0)
    left = 34 + max(len(v) for v in ys) * TYPE * CHARACTER
    wide, high = (width - left - 6) / len(xs), min(max(230 / len(ys), 32), 64)
    made = []
    for j, down in enumerate(ys):
        for i, across in enumerate(xs):
            made.append(
                _cell(
                    search,
                    best.get((across, down)),
                    {x: across, y: down},
                    fastest,
                    part,
                    (left + i * wide, j * high, wide - 2, high - 2),
                )
            )
        made.append(text(left - 8, (j + 0.5) * high + 4, down, class_="small", text_anchor="end"))
    bottom = len(ys) * high
    made += [
        text(left + (i + 0.5) * wide, bottom + 15, across, class_="small", text_anchor="middle")
        for i, across in enumerate(xs)
    ]
    made.append(text(left + (width - left) / 2, bottom + 35, x, text_anchor="middle"))
    turned = f"rotate(-90 12 {bottom / 2})"
    made.append(text(12, bottom / 2, y, text_anchor="middle", transform=turned))
    made.append(ramp_key(left + 70, bottom + 52, 110, "slower", f"best, {unit}"))
    title = f"Best time of {search.name} by {x} and {y}"
    return picture(width, bottom + 70, title, *made)


def _cell(
    search: Search,
    at: Line | None,
    place: dict[str, str],
    fastest: float,
    part: float,
    box: tuple[float, float, float, float],
) -> str:
    x, y, width, height = box
    where = ", ".join(f"{name}={value}" for name, value in place.items())
    middle, base = x + width / 2, y + height / 2 + 4
    if at is None:
        tried = [
            line
            for line in search.lines
            if all(search.value(line, name) == value for name, value in place.items())
        ]
        if not tried:
            return ""
        reason, _ = Counter(
            f"{line['status']}: {line.get('reason')}" for line in tried
        ).most_common(1)[0]
        lost = titled(f"{where}: all {len(tried)} failed; {reason}")
        cell = element("rect", x=x, y=y, width=width, height=height, rx=2, class_="lost")
        return element(
            "g", lost, cell, text(middle, base, "x", class_="small", text_anchor="middle")
        )
    us = float(at["median_us"])
    fill, ink = shade((fastest / us - 0.25) / 0.75)
    cell = element("rect", x=x, y=y, width=width, height=height, rx=2, class_="cell", fill=fill)
    words = units.three(us / part)
    shown = ""
    if width > len(words) * 8:
        style = f"fill:{ink}"
        shown = text(middle, base, words, style=style, class_="small", text_anchor="middle")
    return element("g", titled(f"{where}: {units.time(us)} with {said(at['config'])}"), cell, shown)


def scatter(search: Search, width: int = 480, height: int = 330) -> str:
    """Every configuration in the order it was tried: its time, or the lane of its failure."""
    right = search.right
    lanes = [status for status in FAILURES if any(at["status"] == status for at in search.lines)]
    left, bottom = 76.0, height - 46.0 - 22 * len(lanes)
    x = Scale(0, max(len(search.lines) - 1, 1), left + 6, width - 14, log=False)
    y = Scale(*around([float(at["median_us"]) for at in right] or [1.0], 1.15), bottom, 10)
    made = _frame(x, y, bool(right))
    for i, status in enumerate(lanes):
        middle = bottom + 22 * i + 18
        made.append(line(left, middle, width - 14, middle, "grid"))
        made.append(text(left - 7, middle + 4, status, class_="small", text_anchor="end"))
    told = search.right[:TOLD]
    untold = []
    for i, at in enumerate(search.lines):
        words = f"{i + 1}: {said(at['config'])}"
        if at["status"] in lanes:
            middle = bottom + 22 * lanes.index(at["status"]) + 18
            reason = f"{at['status']}, {at.get('reason')}: {words}"
            made.append(mark("lost", x(i), middle, reason, 3.5))
        elif at in told:
            us = float(at["median_us"])
            made.append(mark(0, x(i), y(us), f"{units.time(us)}: {words}", 3.5))
        elif at.get("median_us"):
            untold.append((x(i), y(float(at["median_us"]))))
    made.append(dots(untold))
    if right:
        made += _best(x(search.lines.index(right[0])), y(float(right[0]["median_us"])), right[0], x)
    last = height - 46
    made += [
        text(x(v), last + 17, f"{v + 1:.0f}", class_="small", text_anchor="middle")
        for v in (x.low, x.high)
    ]
    middle = (left + width) / 2
    order = "configuration, in the order tried"
    made.append(text(middle, last + 37, order, class_="small", text_anchor="middle"))
    return picture(width, height, f"All configurations of {search.name}", *made)


def by_registers(search: Search, width: int = 480, height: int = 330) -> str:
    """The right ones: time over registers a thread."""
    known = [at for at in search.right if at.get("registers")]
    registers = [float(at["registers"]) for at in known] or [32.0]
    x = Scale(min(registers) - 8, max(registers) + 8, 82, width - 14, log=False)
    times = [float(at["median_us"]) for at in known] or [1.0]
    y = Scale(*around(times, 1.15), height - 46, 10)
    made = _frame(x, y, bool(known))
    made.append(dots([(x(int(at["registers"])), y(float(at["median_us"]))) for at in known]))
    if known:
        made += _best(x(int(known[0]["registers"])), y(float(known[0]["median_us"])), known[0], x)
    for v in x.ticks(6):
        made.append(text(x(v), height - 29, f"{v:g}", class_="small", text_anchor="middle"))
    made.append(
        text(
            (82 + width) / 2, height - 9, "registers a thread", class_="small", text_anchor="middle"
        )
    )
    return picture(width, height, f"Time over registers of {search.name}", *made)


def _frame(x: Scale, y: Scale, times: bool) -> list[str]:
    ticks = y.ticks(7) if times else []
    made = []
    for v in ticks:
        made.append(line(x.start - 6, y(v), x.end, y(v), "grid"))
        words = units.trim(units.time(v))
        made.append(text(x.start - 13, y(v) + 4, words, class_="small", text_anchor="end"))
    left = x.start - 6
    made.append(element("path", class_="axis", d=f"M{left:.1f} 10V{y.start:.1f}H{x.end:.1f}"))
    return made


def _best(px: float, py: float, at: Line, x: Scale) -> list[str]:
    """A ring around the best, and its time beside it on the side with more room."""
    words = f"best {units.time(float(at['median_us']))}"
    near = px < (x.start + x.end) / 2
    anchor, step = ("start", 11) if near else ("end", -11)
    return [
        element("circle", cx=px, cy=py, r=7, class_="best"),
        text(px + step, py + 4, words, class_="halo small", text_anchor=anchor),
    ]


def drawing(search: Search, x: str | None = None, y: str | None = None) -> str:
    """Heat map, scatter and registers in one drawing, one below the other.

    x, y: the two parameters of the heat map, the most telling ones if None.
    """
    parts = [heat_map(search, *search.chosen(x, y)), scatter(search)]
    if any(at.get("registers") for at in search.right):
        parts.append(by_registers(search))
    heights = [float(part.split('viewBox="0 0 480 ')[1].split('"')[0]) for part in parts]
    made = [text(8, 22, search.name, class_="strong")]
    top = 36.0
    for part, height in zip(parts, heights, strict=True):
        made.append(
            part.replace("<svg ", f'<svg y="{math.ceil(top)}" width="480" height="{height}" ', 1)
        )
        top += height + 16
    return picture(480, math.ceil(top), f"The search of {search.name}", *made)
