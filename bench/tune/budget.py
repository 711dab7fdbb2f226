"""Which searches to make, in which order, and how many seconds each gets.

A search is worth what its step costs: by the roofs, of its batch's whole time. Batches named first
count more. The costliest comes first and gets its part of what is left, so a budget that runs out
leaves out what matters least.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...engine import NetworkError
from ...engine.devices.planner import Planner
from ...engine.plan import Step
from ...kernels import tuning
from ..measure.problem import Problem, problems
from ..measure.roofline import COPY, roof_us

ASKED_FOR = (
    *("in_place", "first_layer", "channels_last"),
    *("conv2d", "linear", "max_pool2d", "avg_pool2d"),
)
"""What a plan asks its table for; other steps run by their defaults whatever the table says."""

RATES = 1e15, 5e12  # FLOP/s and byte/s to weigh by: a GPU's 200 FLOPs a byte
LATENCY_US = 3.0  # what a kernel takes however small it is, roughly
LEAST = {"cuda": 4.0, "cpu": 1.0}  # seconds of a search, by type of device


@dataclass(frozen=True, slots=True)
class Search:
    """A step to tune, and its weight beside the others' weights."""

    problem: Problem
    step: Step
    row: tuning.TunedRow  # what the table will know it by; without a configuration
    weight: float

    @property
    def known_by(self) -> tuple[str, int]:
        """What a row of the table for the same problem and batch shares."""
        return self.row.problem, self.row.batch

    def __str__(self) -> str:
        return f"{self.step.name} x{self.problem.batch}"


def targets(
    planner: Planner, dtype: str, batch: int, names: Sequence[str] | None = None
) -> list[tuple[Problem, Step]]:
    """Steps to tune, each with the problem it is proved in; None: every step that has a kernel.

    The pass over the images, "input", is proved in the problem of the first layer. Raises
    NetworkError, listing the steps there are, for a name that is none.
    """
    steps = planner(batch, image_dtype=planner.arithmetic.dtype).steps  # with the pass
    known = {step.name: step for step in steps if step.config is not None}
    chosen = list(known) if names is None else names
    if unknown := [name for name in chosen if name not in known]:
        raise NetworkError(
            f"{planner.network.name} has no step {unknown[0]!r} to tune; it has {', '.join(known)}"
        )
    reader, first = steps[0].name, steps[1].name
    found = []
    for name in chosen:
        proved_in = first if name == reader else name
        (problem,) = problems(planner, dtype, batch, [proved_in], in_place=name != reader)
        found.append((problem, next(s for s in problem.plan.steps if s.name == name)))
    return found


def searches(
    planner: Planner, dtype: str, batches: Sequence[int], names: Sequence[str] | None = None
) -> list[Search]:
    """What a network gains most from first; without `names` every step that tables are asked for.

    Raises NetworkError as `targets` does.
    """
    agenda = []
    for place, batch in enumerate(batches):
        work = targets(planner, dtype, batch, names)
        times = [_time_us(step, dtype) for _, step in work]
        for (problem, step), time_us in zip(work, times, strict=True):
            op, shape = step.kernel.split()[0], tuning.without_batch(step.shape)
            row = tuning.TunedRow(op, shape, dtype, batch, {}, 0.0, "", "", "")
            if names is not None or op in ASKED_FOR:
                weight = time_us / sum(times) / (1 + place / 2)
                agenda.append(Search(problem, step, row, weight))
    return sorted(agenda, key=lambda search: -search.weight)


def share(rest: Sequence[Search], left: float, least: float) -> float:
    """Seconds for the first of `rest` of those `left` for all; at least `least`, if there are."""
    part = rest[0].weight / sum(search.weight for search in rest)
    return min(left, max(part * left, least))


def rows(table: Path | None) -> tuple[tuning.TunedRow, ...]:
    """What a table has so far. Raises TuningError for a file that is none."""
    return tuning.load(table).rows if table is not None and table.exists() else ()


def hints(search: Search, known: Sequence[tuning.TunedRow]) -> list[dict[str, Any]]:
    """Winners other than the default for the nearest batches, of the same dtype before others."""
    own, default = search.row, search.step.config

    def distance(row: tuning.TunedRow) -> tuple[bool, float]:
        return row.dtype != own.dtype, abs(math.log(row.batch / own.batch))

    alike = [row for row in known if (row.op, row.shape) == (own.op, own.shape)]
    assert default is not None  # or it were no search
    starts = [asdict(default)]
    for row in sorted(alike, key=distance):
        if row.config not in starts:
            starts.append(dict(row.config))
    return starts[1:3]


def _time_us(step: Step, dtype: str) -> float:
    flops, traffic = RATES
    return LATENCY_US + roof_us(step.work, dtype, {dtype: flops, COPY: traffic})
