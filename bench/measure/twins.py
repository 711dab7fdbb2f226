"""The main rows for people who live in pytest-benchmark: `pytest bench --benchmark-json out.json`.

Its own clock is the host's, around one run and the synchronisation after it; what the GPU's clock
says goes to `extra_info`, with the match that came before both. Contestants do not take turns
here, so `bench layers` and `bench model` are the better judges between two of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...engine.load import arithmetic, find
from ..records import Row
from .contest import admit, blank_row, inputs, timed
from .contestants import called, contestants
from .model import MODEL
from .options import ROUNDS
from .peers import Peer, libraries
from .problem import Problem, network_problem, problems, tuned_planner
from .timing import Clock

BATCHES = {"cuda": (1, 64, 256), "cpu": (1,)}
KINDS = {"cuda": ("torch", "fused"), "cpu": ("torch",)}
CLOCK: dict[str, Clock] = {"cuda": "graph", "cpu": "host"}
TOLD = (
    *("problem", "network", "batch", "dtype", "contestant", "clock", "median_us"),
    *("tflops", "gbps", "images_per_second", "max_error", "tolerance"),
)
"""What of our row goes to `extra_info`."""


@dataclass(frozen=True, slots=True)
class Twin:
    """One contestant on one layer, or on the whole network, at one batch."""

    problem: Problem
    contestant: Peer

    @property
    def layer(self) -> str:
        """The problem's name; of the whole network "model"."""
        return "model" if self.problem.whole else self.problem.name

    def __str__(self) -> str:
        return f"{self.layer}-{self.problem.batch}-{self.contestant.name.replace(' ', '_')}"


def twins(device: torch.device) -> Iterator[Twin]:
    """All that there are for this device: AlexNet in fp16 on a GPU, the digits in fp32 on a CPU."""
    network, _ = find(MODEL[device.type])
    dtype, meaning = arithmetic(None, device, "triton")
    planner = tuned_planner(network, meaning, device)
    for batch in BATCHES[device.type]:
        whole = network_problem(replace(planner, options=None), dtype, batch)
        for problem in (*problems(planner, dtype, batch), whole):
            for one in contestants(problem, device, KINDS[device.type]):
                if one.prepare is not None:
                    as_called = problem.whole and CLOCK[device.type] == "host"
                    yield Twin(problem, called(one, problem, device) if as_called else one)


def benchmarked(twin: Twin, device: torch.device, benchmark: Any) -> Row:
    """Prove a twin right, then time it by pytest-benchmark's fixture and by our own clock.

    Returns our row. Raises AssertionError, with the reason, if it does not match.
    """
    problem, clock, rounds = twin.problem, CLOCK[device.type], ROUNDS[device.type]
    with libraries(problem.plan.arithmetic), torch.inference_mode():
        copies, compare = inputs(problem, device)
        row = replace(blank_row(problem), clock=clock)
        admitted = admit(twin.contestant, copies, row, compare, device)
        assert admitted.runs, f"{twin}: {admitted.row.note}"
        turn = itertools.cycle(admitted.runs)

        def run() -> None:  # pytest-benchmark does not wait for a GPU
            next(turn)()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        benchmark.group = f"{twin.layer}, batch {problem.batch}"
        benchmark.pedantic(run, rounds=rounds, warmup_rounds=1)
        (row,) = timed([admitted], clock, device, rounds)
    benchmark.extra_info.update({name: getattr(row, name) for name in TOLD})
    return row
