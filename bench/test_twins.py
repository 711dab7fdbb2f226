"""`pytest bench --benchmark-json out.json`: the main rows for people who live in pytest-benchmark.

Its own clock is the host's, around one run and the synchronisation after it; what the GPU's clock
says goes to `extra_info`, with the match that came before both. Contestants do not take turns
here, so `bench layers` and `bench model` are the better judges between two of them.

pytest names this file after the folder that the checkout lies in. Relative imports would then make
a second package of that name, so the modules are asked for by the name that everyone else uses.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from alexnet_triton.bench.measure.contest import admit, blank_row, inputs, timed
from alexnet_triton.bench.measure.contestants import called, contestants
from alexnet_triton.bench.measure.model import MODEL
from alexnet_triton.bench.measure.peers import Peer, libraries
from alexnet_triton.bench.measure.problem import (
    Problem,
    network_problem,
    problems,
    tuned_planner,
)
from alexnet_triton.bench.measure.timing import ROUNDS, Clock
from alexnet_triton.engine.load import arithmetic, find, resolve
from alexnet_triton.kernels.jit import interpreter_problem

pytestmark = pytest.mark.skipif(
    find_spec("pytest_benchmark") is None, reason="needs pytest-benchmark"
)
BATCHES = {"cuda": (1, 64, 256), "cpu": (1,)}
KINDS = {"cuda": ("torch", "fused"), "cpu": ("torch",)}
CLOCK: dict[str, Clock] = {"cuda": "graph", "cpu": "host"}
TOLD = (
    *("problem", "network", "batch", "dtype", "contestant", "clock", "median_us"),
    *("tflops", "gbps", "images_per_second", "max_error", "tolerance"),
)
"""What of our row goes to `extra_info`."""


def twins(device: torch.device) -> Iterator[tuple[str, Problem, Peer]]:
    """A group to compare, and one of its contestants: AlexNet in fp16, on a CPU digits in fp32."""
    network, _ = find(MODEL[device.type])
    dtype, meaning = arithmetic(None, device, "triton")
    planner = tuned_planner(network, meaning, device)
    for batch in BATCHES[device.type]:
        whole = network_problem(replace(planner, options=None), dtype, batch)
        for problem in (*problems(planner, dtype, batch), whole):
            group = f"{'model' if problem.whole else problem.name}, batch {batch}"
            for one in contestants(problem, device, KINDS[device.type]):
                as_called = problem.whole and CLOCK[device.type] == "host"
                if one.prepare is not None:
                    yield group, problem, called(one, problem, device) if as_called else one


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a twin, for the GPU if there is one."""
    device = resolve(None)
    metafunc.parametrize("device", [device], ids=str)
    every = list(twins(device))
    ids = [
        f"{group}-{one.name}".replace(", batch ", "-").replace(" ", "_") for group, _, one in every
    ]
    metafunc.parametrize(("group", "problem", "contestant"), every, ids=ids)


def test_twin(
    group: str, problem: Problem, contestant: Peer, device: torch.device, benchmark: Any
) -> None:
    """Right, then timed, by pytest-benchmark's fixture and by our own clock."""
    if device.type == "cpu" and (reason := interpreter_problem()):
        pytest.skip(reason)
    clock, rounds = CLOCK[device.type], ROUNDS[device.type]
    with libraries(problem.plan.arithmetic), torch.inference_mode():
        copies, compare = inputs(problem, device)
        row = replace(blank_row(problem), clock=clock)
        admitted = admit(contestant, copies, row, compare, device)
        assert admitted.runs, admitted.row.note
        turn = itertools.cycle(admitted.runs)

        def run() -> None:  # pytest-benchmark does not wait for a GPU
            next(turn)()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        benchmark.group = group
        benchmark.pedantic(run, rounds=rounds, warmup_rounds=1)
        (row,) = timed([admitted], clock, device, rounds)
    benchmark.extra_info.update({name: getattr(row, name) for name in TOLD})
