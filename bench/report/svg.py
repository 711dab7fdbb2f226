"""SVG by hand: elements as text, numbers on scales, labels that keep out of each other's way.

Colours and type come from `charts.css` by class, so one drawing serves a light and a dark page.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files

TYPE = 13
"""Size of the type, as charts.css has it."""

BOLD = 0.7  # of the size of the type: a character of a bold label

CHARACTER = 0.6  # of the size of the type: a wide sans, so that a label is never wider than thought

MARKERS = ("square", "triangle", "diamond", "drop", "circle")

# Viridis, by S. van der Walt and N. Smith (CC0), at five even steps: its lightness rises evenly,
# so that it reads the same in grey and to colour-blind eyes.
RAMP = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


AROUND = [
    *((1, 0), (0, -1), (0, 1), (-1, 0), (1, -1), (1, 1), (-1, -1), (-1, 1)),
    *((0.5, -1), (0.5, 1), (-0.5, -1), (-0.5, 1), (1, 0.5), (1, -0.5), (-1, 0.5), (-1, -0.5)),
]
"""Where a name may go from its point, the best directions first."""


def element(name: str, *children: str, **attributes: object) -> str:
    """One element; `class_` and `data_x` become class and data-x, None is left out.

    Children are markup and stand as they are; attribute values are escaped.
    """
    said = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_short(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inside = "".join(children)
    return f"<{name}{said}>{inside}</{name}>" if inside else f"<{name}{said}/>"


def _short(value: object) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)


def text(x: float, y: float, words: str, **attributes: object) -> str:
    """A line of text, escaped."""
    return element("text", escape(words), x=x, y=y, **attributes)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> str:
    """A straight line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def titled(words: str) -> str:
    """What a pointer that rests on the parent is told."""
    return f"<title>{escape(words)}</title>"


def picture(width: float, height: float, label: str, *children: str, role: str = "img") -> str:
    """A whole drawing that a screen reader calls `label`."""
    box = f"0 0 {_short(float(width))} {_short(float(height))}"
    return element(
        "svg",
        *children,
        xmlns="http://www.w3.org/2000/svg",
        class_="chart",
        viewBox=box,
        role=role,
        aria_label=label,
    )


def standalone(drawing: str) -> str:
    """The same drawing as a file of its own: the style goes in with it."""
    head, end, body = drawing.partition(">")
    style = files(__package__).joinpath("charts.css").read_text("utf-8")
    return f"{head}{end}<style>{style}</style>{body}\n"


@dataclass(frozen=True, slots=True)
class Scale:
    """Numbers from `low` to `high` onto places from `start` to `end`, by logarithm or evenly."""

    low: float
    high: float
    start: float
    end: float
    log: bool = True

    def __call__(self, value: float) -> float:
        """The place of a number, kept within the scale."""
        low, high, value = self.low, self.high, min(max(value, self.low), self.high)
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def inverse(self, place: float) -> float:
        """The number of a place."""
        part = (place - self.start) / (self.end - self.start)
        if self.log:
            return float(self.low * (self.high / self.low) ** part)
        return self.low + part * (self.high - self.low)

    def ticks(self, most: int = 7) -> list[float]:
        """Round numbers within, at most about `most` of them."""
        return _powers(self.low, self.high, most) if self.log else _even(self.low, self.high, most)


def _powers(low: float, high: float, most: int) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for steps in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 5), (1, 3), (1,)):
        found = [
            step * 10.0**p
            for p in range(first, last + 1)
            for step in steps
            if low * (1 - 1e-9) <= step * 10.0**p <= high * (1 + 1e-9)
        ]
        if len(found) <= most:
            return found
    return found[:: math.ceil(len(found) / most)]


def _even(low: float, high: float, most: int) -> list[float]:
    rough = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def around(values: Iterable[float], margin: float = 1.25) -> tuple[float, float]:
    """The ends of a logarithmic scale that holds `values` (positive) with some air."""
    values = list(values)
    return min(values) / margin, max(values) * margin


def spread(places: Sequence[float], sizes: Sequence[float], low: float, high: float) -> list[float]:
    """Centres moved as little as need be so that things of these sizes do not overlap.

    Places must rise. Between `low` and `high` if they fit there; else they run over `low`.
    """
    found: list[float] = []
    for place, size in zip(places, sizes, strict=True):
        least = low + size / 2 if not found else found[-1] + (sizes[len(found) - 1] + size) / 2
        found.append(max(place, least))
    limit = high
    for i in reversed(range(len(found))):
        found[i] = min(found[i], limit - sizes[i] / 2)
        limit = found[i] - sizes[i] / 2
    return found


def beside(
    points: Sequence[tuple[float, float]],
    names: Sequence[str],
    size: float,
    box: tuple[float, float, float, float],
    taken: Sequence[tuple[float, float]] = (),
) -> list[tuple[float, float]]:
    """Where each point's name goes (its middle), clear of points and of one another.

    The nearest free place that is nearer to its own point than to any other; failing that, one that
    a line can join to the point without crossing others. `box` is left, top, right, bottom; `taken`
    are more points to keep clear of.
    """
    marks = [*points, *taken]
    placed: list[tuple[float, float, float]] = []
    found = []
    for (x, y), name in zip(points, names, strict=True):
        half = len(name) * size * CHARACTER / 2
        free = [
            (cx, cy)
            for ring in range(10, 130, 6)
            for dx, dy in AROUND
            for cx, cy in [(x + dx * (ring + half), y + dy * ring)]
            if box[0] + half <= cx <= box[2] - half
            and box[1] + size / 2 <= cy <= box[3] - size / 2
            and all(abs(cx - px) > half + 5 or abs(cy - py) > size / 2 + 5 for px, py in marks)
            and all(abs(cx - px) > half + h + 4 or abs(cy - py) > size for px, py, h in placed)
        ]
        others = [point for point in points if point != (x, y)]
        blocking = [*others, *((px, py) for px, py, _ in placed)]

        def cost(at: tuple[float, float]) -> float:
            own = gap(at, half, (x, y))  # noqa: B023, used at once
            if own <= min((gap(at, half, p) for p in others), default=own):  # noqa: B023
                return own / 1000
            return own + 40 * sum(_from_line(p, (x, y), at) < 8 for p in blocking)  # noqa: B023

        cx, cy = min(free, key=cost, default=(x + 10 + half, y))
        placed.append((cx, cy, half))
        found.append((cx, cy))
    return found


def _from_line(
    point: tuple[float, float], start: tuple[float, float], end: tuple[float, float]
) -> float:
    """How far a point is from the line between two others."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    along = ((point[0] - start[0]) * dx + (point[1] - start[1]) * dy) / (dx * dx + dy * dy)
    along = min(max(along, 0.0), 1.0)
    return math.hypot(point[0] - start[0] - along * dx, point[1] - start[1] - along * dy)


def gap(middle: tuple[float, float], half: float, point: tuple[float, float]) -> float:
    """How far a point is from a name of that half width."""
    return math.hypot(max(0.0, abs(middle[0] - point[0]) - half), middle[1] - point[1])


def colour(style: int | str) -> str:
    """The class of a contestant's colour."""
    return f"s-{1 + (style - 1) % 5 if isinstance(style, int) and style else style}"


def dots(places: Sequence[tuple[float, float]]) -> str:
    """Many small marks of ours that have nothing to say, as one path."""
    path = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in places)
    return element("path", class_="dots s-0", d=path) if places else ""


def mark(style: int | str, x: float, y: float, title: str, size: float = 5) -> str:
    """A marker of a contestant: colour and shape by its style, so that neither stands alone.

    Style 0, ours, is the blue circle; words are crosses; peers have a pair of their own each, up to
    25 of them.
    """
    shape, s = "cross", size
    if isinstance(style, int):
        turn = (style - 1) // len(MARKERS)
        shape = MARKERS[(style - 1 + turn) % len(MARKERS)] if style else "circle"
    paths = {
        "circle": f"M{-s} 0a{s} {s} 0 1 0 {2 * s} 0a{s} {s} 0 1 0 {-2 * s} 0z",
        "square": f"M{-s} {-s}h{2 * s}v{2 * s}h{-2 * s}z",
        "triangle": f"M0 {-1.2 * s}L{1.2 * s} {s}H{-1.2 * s}z",
        "diamond": f"M0 {-1.3 * s}L{1.3 * s} 0L0 {1.3 * s}L{-1.3 * s} 0z",
        "drop": f"M0 {1.2 * s}L{1.2 * s} {-s}H{-1.2 * s}z",
        "cross": f"M{-s} {-s}L{s} {s}M{-s} {s}L{s} {-s}",
    }
    return element(
        "path",
        titled(title),
        class_=f"mark {shape} {colour(style)}",
        d=paths[shape],
        transform=f"translate({_short(float(x))} {_short(float(y))})",
    )


def shade(part: float) -> tuple[str, str]:
    """A colour of the ramp for 0 (dark) to 1 (bright), and the ink that is read on it."""
    part = min(max(part, 0.0), 1.0) * (len(RAMP) - 1)
    left = min(int(part), len(RAMP) - 2)
    mixed = [
        round(a + (b - a) * (part - left)) for a, b in zip(RAMP[left], RAMP[left + 1], strict=True)
    ]
    linear = [(c / 255) ** 2.2 for c in mixed]
    bright = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#" + "".join(f"{c:02x}" for c in mixed), "#000" if bright > 0.18 else "#fff"


def ramp_key(x: float, y: float, width: float, low: str, high: str) -> str:
    """The ramp as a bar with words at its ends."""
    steps = 20
    bar = "".join(
        element(
            "rect",
            x=x + i * width / steps,
            y=y,
            width=width / steps + 0.3,
            height=10.0,
            fill=shade(i / (steps - 1))[0],
        )
        for i in range(steps)
    )
    return (
        text(x - 6, y + 9, low, class_="small", text_anchor="end")
        + bar
        + text(x + width + 6, y + 9, high, class_="small")
    )
