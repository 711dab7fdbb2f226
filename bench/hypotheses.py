"""What a round's measurements say of the hypotheses in bench/results/NOTES.md, by their numbers."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

from .records import OURS, Results
from .units import three

Question = tuple[str, Callable[[Results], float | None]]
"""What is asked, and what finds the number that answers it; None where nothing was measured."""


def row(
    problem: str,
    batch: int,
    unit: str = "us",
    section: str = "layers",
    clock: str = "graph",
    field: str = "median_us",
) -> Question:
    """A number of the last right row of ours in fp16."""
    asked = section, problem, batch, "fp16", OURS, clock

    def find(results: Results) -> float | None:
        rows = [one for one in results.rows if one.right and (*one.key[:2], *one.key[3:]) == asked]
        value: float | None = getattr(rows[-1], field) if rows else None
        return value / batch if value is not None and unit == "us an image" else value

    return f"{problem} x{batch:,}, {unit}", find


def tried(layer: str, batch: int, *blocks: int) -> Question:
    """The fastest right trial of a search, with these rows and filters of both accumulators."""
    names = ("BLOCK_M", "BLOCK_M2", "BLOCK_N", "BLOCK_N2")[: len(blocks)]
    tile = dict(zip(names, blocks, strict=True)).items()

    def find(results: Results) -> float | None:
        right = (one for one in results.searches if one["status"] == "ok" and one["median_us"])
        of_it = (one for one in right if (one["layer"], one["batch"]) == (layer, batch))
        return min((t["median_us"] for t in of_it if tile <= t["config"].items()), default=None)

    shape = " at {}+{} rows by {}+{}".format(*blocks).replace("+0", "") if blocks else ""
    return f"{layer} x{batch:,}{shape}, us", find


def fill(results: Results) -> float | None:
    """As the last note has it."""
    notes = (re.match(r"fill: ([\d.]+) bytes", note) for note in reversed(results.notes))
    return next((float(note[1]) for note in notes if note), None)


FILL: Question = "operands, bytes a clock and multiprocessor", fill
whole = partial(row, "alexnet", section="model")
QUESTIONS: dict[int, tuple[Question, ...]] = {
    1: (FILL, tried("conv4", 256, 128, 0, 256, 0), tried("conv4", 256, 128, 0, 128, 0)),
    12: (row("conv1", 1024, "us an image"),),
    13: (tried("input", 1024), row("alexnet uint8", 1024, section="model"), whole(1024)),
    14: tuple(row(f"conv{n}", 64) for n in (2, 3, 4, 5)),
    15: tuple(tried("conv2", batch, 256, 0, 128, 64) for batch in (256, 1024)),
    16: tuple(tried("conv2", 1024, rows, 0, 128, 64) for rows in (128, 256)),
    17: tuple(row(f"fc{n}", 256) for n in (6, 7, 8)),
    18: (whole(1),),
    19: tuple(row(name, 1) for name in ("conv3", "conv4", "conv5", "fc6", "fc7", "fc8")),
    20: (whole(256, "largest error", field="max_error"),),
    21: (whole(1, "us to enqueue", clock="host", field="enqueue_us"),),
    22: (FILL, whole(64), whole(1024)),
    23: tuple(
        tried(layer, batch, *blocks)
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
        lines.append(f"- {number}: {'; '.join(said)}\n")
    return "".join(lines)
