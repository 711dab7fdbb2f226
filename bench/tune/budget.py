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
from .trial import source_of

ASKED_FOR = (
    *("in_place", "first_layer", "channels_last"),
    *("conv2d", "linear", "max_pool2d", "avg_pool2d"),
)
"""The steps of which a plan asks its table; others run by their defaults whatever it says."""

RATES = 1e15, 5e12  # FLOP/s and byte/s to weigh by: a GPU's 200 FLOPs a byte
LATENCY_US = 3.0  # what a kernel takes however small it is, roughly
LEAST = {"cuda": 4.0, "cpu": 1.0}  # seconds of a search, by type of device


@dataclass(frozen=True, slots=True)
class Search:
    """A step to tune, and its weight beside the others' weights."""

    problem: Problem
    step: Step
    row: tuning.TunedRow  # what the table would have of it if the default were the best
    weight: float

    @property
    def known_by(self) -> tuple[str, int]:
        """What a row of the table for the same problem and batch shares."""
        return self.row.problem, self.row.batch

    def __str__(self) -> str:
        return f"{self.step.name} x{self.problem.batch}"


def searches(
    planner: Planner, dtype: str, batches: Sequence[int], names: Sequence[str] | None = None
) -> list[Search]:
    """A search of each step, or of these, for each batch: what costs a network most comes first.

    The pass over the images, "input", is proved in the problem of the first layer. Raises
    NetworkError, listing the steps there are, for a name of none that a table configures.
    """
    agenda = []
    sources: dict[str, str] = {}  # one kernel has one, whatever its shape
    for place, batch in enumerate(batches):
        steps = planner(batch, image_dtype=planner.arithmetic.dtype).steps  # with the pass
        known = [step.name for step in steps if _op(step) in ASKED_FOR]
        if unknown := [name for name in names or () if name not in known]:
            there = f"{planner.network.name} has no step {unknown[0]!r} to tune"
            raise NetworkError(f"{there}; it has {', '.join(known)}")
        found: list[tuple[Problem, Step]] = []
        reader, first = steps[0].name, steps[1].name
        for name in known if names is None else names:
            proved_in = first if name == reader else name
            (problem,) = problems(planner, dtype, batch, [proved_in], in_place=name != reader)
            found += ((problem, step) for step in problem.plan.steps if step.name == name)
        times = [_time_us(step, dtype) for _, step in found]
        for (problem, step), time_us in zip(found, times, strict=True):
            op, shape = _op(step), tuning.without_batch(step.shape)
            source = sources[op] = sources.get(op) or source_of(problem, step)
            assert step.config is not None  # or no table could configure it
            config = asdict(step.config)
            row = tuning.TunedRow(op, shape, dtype, batch, config, 0.0, "", "", source)
            agenda.append(Search(problem, step, row, time_us / sum(times) / (1 + place / 2)))
    return sorted(agenda, key=lambda search: -search.weight)


def share(rest: Sequence[Search], left: float, least: float) -> float:
    """Seconds for the first of `rest` of those `left` for all; at least `least`, if there are."""
    part = rest[0].weight / sum(search.weight for search in rest)
    return min(left, max(part * left, least))


def rows(table: Path | None, every: Sequence[Search]) -> tuple[list[tuning.TunedRow], list[str]]:
    """Rows of a table that hold for searches like these, and a line for each that does not.

    Refused are rows that no plan asks for, and those of another source or with an unknown field.
    Raises TuningError for a file that is no table.
    """
    holding, refused = [], []
    own = {search.row.op: search.row for search in every}
    for row in tuning.load(table).rows if table is not None and table.exists() else ():
        like = own.get(row.op, row)
        if row.op not in (*ASKED_FOR, "run"):
            why = f"wanted one of {', '.join(ASKED_FOR)}, got what no plan asks for; delete the row"
        elif row.source != like.source:
            why = f"wanted the source {like.source}, got {row.source}; tune it again"
        elif row.config.keys() - like.config.keys():
            odd = ", ".join(row.config.keys() - like.config.keys())
            why = f"wanted no fields but {', '.join(like.config)}, got {odd}; tune it again"
        else:
            holding.append(row)
            continue
        refused.append(f"{table}: {row.problem} x{row.batch} does not count: {why}")
    return holding, refused


def hints(search: Search, known: Sequence[tuning.TunedRow]) -> list[dict[str, Any]]:
    """Winners other than the default for the nearest batches, of the same dtype before others."""
    own = search.row

    def distance(row: tuning.TunedRow) -> tuple[bool, float]:
        return row.dtype != own.dtype, abs(math.log(row.batch / own.batch))

    alike = [row for row in known if (row.op, row.shape) == (own.op, own.shape)]
    starts = [dict(own.config)]
    for row in sorted(alike, key=distance):
        if row.config not in starts:
            starts.append(dict(row.config))
    return starts[1:3]


def _op(step: Step) -> str:
    """The launcher's name, as tables have it."""
    return step.kernel.split()[0]


def _time_us(step: Step, dtype: str) -> float:
    flops, traffic = RATES
    return LATENCY_US + roof_us(step.work, dtype, {dtype: flops, COPY: traffic})
