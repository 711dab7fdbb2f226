"""What a round's measurements say of the hypotheses in bench/results/NOTES.md, by their numbers."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from .records import OURS, Results
from .units import three

Question = tuple[str, Callable[[Results], float | None]]
"""What is asked, and the number that answers it; None where nothing was measured."""


def row(
    problem: str,
    batch: int,
    clock: str = "graph",
    section: str = "layers",
    field: str = "median_us",
    each: bool = False,
) -> Question:
    """A number of ours in fp16; `each`: divided by the images."""

    def find(results: Results) -> float | None:
        asked = (section, problem, batch, "fp16", clock, OURS)
        for one in reversed(results.rows):
            if one.right and asked == (
                *(one.section, one.problem, one.batch, one.dtype, one.clock, one.contestant),
            ):
                value = getattr(one, field)
                return value / batch if each and value is not None else value
        return None

    unit = "us an image" if each else "us"
    what = "to enqueue " if field == "enqueue_us" else ""
    return f"{what}{problem} x{batch:,}, {unit}", find


def tried(layer: str, batch: int, tile: str = "", **config: Any) -> Question:
    """The fastest right trial of a search with these values; `tile` is how they are called."""

    def find(results: Results) -> float | None:
        times = [
            trial["median_us"]
            for trial in results.searches
            if (trial["layer"], trial["batch"], trial["status"]) == (layer, batch, "ok")
            if trial["median_us"] is not None and config.items() <= trial["config"].items()
        ]
        return min(times, default=None)

    return f"{layer} x{batch:,}{tile and f' at {tile}'}, us", find


def noted(pattern: str, what: str) -> Question:
    """A number in the last note that has it."""

    def find(results: Results) -> float | None:
        found = [match for note in results.notes if (match := re.search(pattern, note))]
        return float(found[-1][1]) if found else None

    return what, find


def _tile(layer: str, batch: int, *blocks: int) -> Question:
    names = ("BLOCK_M", "BLOCK_M2", "BLOCK_N", "BLOCK_N2")
    rows, filters = (f"({a}+{b})" if b else str(a) for a, b in (blocks[:2], blocks[2:4]))
    return tried(layer, batch, f"{rows}x{filters}", **dict(zip(names, blocks, strict=True)))


FILL = noted(r"^fill: ([\d.]+) bytes", "operand fill, bytes a clock and multiprocessor")
QUESTIONS: dict[int, tuple[Question, ...]] = {
    1: (FILL, _tile("conv4", 256, 128, 0, 256, 0), _tile("conv4", 256, 128, 0, 128, 0)),
    12: (row("conv1", 1024, each=True),),
    13: (tried("input", 1024), row("alexnet uint8", 1024, section="model")),
    14: tuple(row(f"conv{n}", 64) for n in (2, 3, 4, 5)),
    15: (
        *(_tile("conv2", batch, 256, 0, 128, 64) for batch in (256, 1024)),
        *(row("conv2", batch) for batch in (256, 1024)),
    ),
    16: (_tile("conv2", 1024, 128, 0, 128, 64), _tile("conv2", 1024, 256, 0, 128, 64)),
    17: tuple(row(f"fc{n}", 256) for n in (6, 7, 8)),
    18: (row("alexnet", 1, section="model"),),
    19: tuple(row(name, 1) for name in ("conv3", "conv4", "conv5", "fc6", "fc7", "fc8")),
    20: (row("alexnet", 256, section="model", field="max_error"),),
    21: (row("alexnet", 1, "host", "model", "enqueue_us"),),
    22: (FILL, *(row("alexnet", batch, section="model") for batch in (64, 1024))),
    23: tuple(
        _tile(layer, batch, *blocks)
        for layer in ("conv4", "conv5")
        for batch in (256, 1024)
        for blocks in ((128, 64, 256, 0), (256, 0, 128, 0))
    ),
}


def found(results: Results) -> str:
    """A line of Markdown a hypothesis; "not measured" for what nothing answers."""
    lines = []
    for number, questions in QUESTIONS.items():
        answers = ((what, find(results)) for what, find in questions)
        said = (f"{what}: {'not measured' if n is None else three(n)}" for what, n in answers)
        lines.append(f"- {number}: {'; '.join(said)}")
    return "\n".join(["What the rows say of the hypotheses in NOTES.md.", "", *lines, ""])
