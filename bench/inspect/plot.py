"""Reports as a picture: occupancy as bars, and what each main loop is made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..report.svg import CHARACTER, element, picture, standalone, text, titled
from .inspection import KernelReport, Report
from .limits import arch_name
from .machine_code import KINDS

ROW, TYPE = 26, 13  # pixels: a row, and the size of the type in charts.css

# Matrix products and what feeds them in blue and green, overhead in grey, spills in red.
COLOURS = dict(
    zip(
        KINDS,
        (
            *("#1f6fb4", "#1b8a5a", "#5fb98b", "#8fd3b4", "#c9a227", "#c62828"),
            *("#7aa6d8", "#9aa1ab", "#c3c8cf", "#e3e6ea"),
        ),
        strict=True,
    )
)


def drawing(found: Sequence[Report], width: int = 1100) -> str:
    """A row a kernel: its occupancy at the left, its instruction mix at the right; a whole file."""
    rows = [(_name(one, kernel), kernel) for one in found for kernel in one.kernels]
    left = 14 + _wide(name for name, _ in rows)
    words = left + 90
    middle = words + 20 + _wide(_words(kernel) for _, kernel in rows)
    width = max(width, int(middle) + 300)
    made = [
        text(left, 16, "occupancy", class_="strong"),
        text(middle, 16, "instructions of the main loop", class_="strong"),
    ]
    for i, (name, kernel) in enumerate(rows):
        y = ROW * (i + 1)
        made.append(text(left - 8, y + 15, name, text_anchor="end"))
        made.append(_occupancy(kernel, left, y, words - left - 8))
        made.append(_mix(kernel, middle, y, width - middle - 10))
    y = ROW * (len(rows) + 1) + 14
    made.append(_key(left, y, width))
    return standalone(picture(width, y + 2 * ROW, "Occupancy and instruction mix", *made))


def _wide(names: Iterable[str]) -> float:
    """Pixels that the longest of them takes."""
    return max(map(len, names), default=0) * TYPE * CHARACTER


def _name(one: Report, kernel: KernelReport) -> str:
    config = "" if one.config == "default" else f" {one.config}"
    kernel_name = kernel.binary.kernel.removeprefix("_").removesuffix("_kernel")
    return f"{arch_name(one.arch)} {one.layer}{config} {kernel_name}"


def _words(kernel: KernelReport) -> str:
    held = kernel.occupancy
    return f"{held.share:.0%} {' and '.join(held.limited_by)}" if held.blocks else "no block fits"


def _occupancy(kernel: KernelReport, x: float, y: float, width: float) -> str:
    held = kernel.occupancy
    return element(
        "g",
        titled(f"{held.blocks} blocks, {held.warps} warps at once; {kernel.verdict}"),
        element("rect", x=x, y=y + 2, width=width, height=18, class_="track"),
        element("rect", x=x, y=y + 2, width=width * held.share, height=18, class_="fill"),
        text(x + width + 8, y + 15, _words(kernel), class_="small"),
    )


def _mix(kernel: KernelReport, x: float, y: float, width: float) -> str:
    total = len(kernel.loop.opcodes)
    made = []
    for name, count in kernel.loop.mix.items():
        wide = width * count / total
        words = f"{name}: {count} of {total} ({count / total:.0%})"
        made.append(
            element(
                "g",
                titled(words),
                element("rect", x=x, y=y + 2, width=wide, height=18, fill=COLOURS[name]),
            )
        )
        x += wide
    return "".join(made)


def _key(x: float, y: float, width: float) -> str:
    made = []
    start = x
    for name in KINDS:
        wide = 24 + len(name) * TYPE * CHARACTER
        if x + wide > width:
            x, y = start, y + ROW
        made.append(element("rect", x=x, y=y - 10, width=12, height=12, fill=COLOURS[name]))
        made.append(text(x + 16, y, name, class_="small"))
        x += wide
    return "".join(made)
