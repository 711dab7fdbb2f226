"""The main rows for people who live in pytest-benchmark: `pytest bench --benchmark-json out.json`.

Its own clock is the host's, around one run and the synchronisation after it; what the GPU's clock
says goes to `extra_info`, with the match that came before both. Contestants do not take turns
here, so `bench layers` and `bench model` are the better judges between two of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...engine.load import arithmetic, find, load_state
from ...engine.plan import PLAIN
from ..records import OURS, Row
from . import network_problem as whole
from .contest import Entry, admit
from .peers import Peer, Prepared, libraries, peers
from .problem import Match, Problem, Tensors, expected, match, problems, ready, tensors
from .timing import Clock, Run, copies_to_overflow, measure

NETWORK = {"cuda": "alexnet", "cpu": "digits"}
BATCHES = {"cuda": (1, 64, 256), "cpu": (1,)}
KINDS = {"cuda": ("torch", "fused"), "cpu": ("torch",)}
CLOCK: dict[str, Clock] = {"cuda": "graph", "cpu": "host"}
ROUNDS = {"cuda": 25, "cpu": 3}
MOST_COPIES = 8
WHOLE = "model"
TOLD = (
    *("problem", "network", "batch", "dtype", "contestant", "clock", "median_us"),
    *("tflops", "gbps", "images_per_second", "max_error", "tolerance"),
)
"""What of our row goes to `extra_info`."""


@dataclass(frozen=True, slots=True)
class Twin:
    """One contestant on one layer, or on the whole network, at one batch."""

    layer: str  # WHOLE is the network
    batch: int
    contestant: str

    @property
    def group(self) -> str:
        """What is compared with one another."""
        return f"{self.layer}, batch {self.batch}"

    def __str__(self) -> str:
        return f"{self.layer}-{self.batch}-{self.contestant.replace(' ', '_')}"


def twins(device: torch.device) -> Iterator[Twin]:
    """All that there are for this device: AlexNet in fp16 on a GPU, the digits in fp32 on a CPU."""
    for batch in BATCHES[device.type]:
        for problem in _problems(device, batch):
            for one in _contestants(problem, device):
                yield Twin(WHOLE if _is_whole(problem) else problem.name, batch, one.name)


def benchmarked(twin: Twin, device: torch.device, benchmark: Any) -> Row:
    """Prove a twin right, then time it by pytest-benchmark's fixture and by our own clock.

    Returns our row. Raises AssertionError, with the reason, if it does not match.
    """
    (problem,) = _problems(device, twin.batch, twin.layer)
    (one,) = (one for one in _contestants(problem, device) if one.name == twin.contestant)
    clock, rounds = CLOCK[device.type], ROUNDS[device.type]
    with libraries(problem.plan.arithmetic), torch.inference_mode():
        entry = _admitted(problem, one, clock, device)
        assert entry.runs, f"{twin}: {entry.row.note}"
        benchmark.group = twin.group
        benchmark.pedantic(_synchronised(entry.runs, device), rounds=rounds, warmup_rounds=1)
        times = measure({one.name: entry.runs}, clock, device, rounds)[one.name]
    row = entry.row.timed(times)
    benchmark.extra_info.update({name: getattr(row, name) for name in TOLD})
    return row


def _problems(device: torch.device, batch: int, name: str | None = None) -> list[Problem]:
    """Every layer, then the whole network; or the one of that name."""
    network, _ = find(NETWORK[device.type])
    dtype, _ = arithmetic(None, device, "triton")
    planner = whole.planner(network, dtype, device)
    found: list[Problem] = []
    if name != WHOLE:
        layers = replace(planner, options=PLAIN)  # a layer alone follows nothing
        found += problems(layers, dtype, batch, None if name is None else [name])
    if name in (None, WHOLE):
        found.append(whole.problem(planner, dtype, batch))
    return found


def _is_whole(problem: Problem) -> bool:
    return problem.name == problem.network.name


def _contestants(problem: Problem, device: torch.device) -> list[Peer]:
    """The engine, then who can run here."""
    kinds = KINDS[device.type]
    if _is_whole(problem):
        found = whole.contestants(problem, device, CLOCK[device.type], kinds)
    else:
        found = [Peer(OURS, lambda given: _bound(problem, given)), *peers(problem, device, kinds)]
    return [one for one in found if one.prepare is not None]


def _bound(problem: Problem, given: Tensors) -> Prepared:
    made = ready(problem, given)
    return Prepared(made, made.output)


def _admitted(problem: Problem, one: Peer, clock: Clock, device: torch.device) -> Entry:
    """The contestant on copies enough to overflow the cache, each compared with float64."""
    first = _tensors(problem, device)
    count = 1
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        count = copies_to_overflow(problem.work.bytes, cache, MOST_COPIES)
    copies = whole.copies(first, count)
    right = whole.expected if _is_whole(problem) else expected
    wanted = right(problem, first)

    def compare(made: torch.Tensor) -> Match:
        return match(problem, made, wanted)

    row = Row(
        "model" if _is_whole(problem) else "layers",
        *(problem.name, problem.network.name, problem.batch, problem.dtype, one.name, clock),
        *(problem.work.flops, problem.work.bytes),
    )
    return admit(one, copies, row, compare, device)


def _tensors(problem: Problem, device: torch.device) -> Tensors:
    generator = torch.Generator(device).manual_seed(0)
    if not _is_whole(problem):
        return tensors(problem, device, generator)
    _, state = load_state(problem.network, "random:0")
    return whole.tensors(problem, state, device, generator)


def _synchronised(runs: tuple[Run, ...], device: torch.device) -> Callable[[], None]:
    """One run after the other, each waited for: pytest-benchmark does not wait for a GPU."""
    turn = itertools.cycle(runs)

    def run() -> None:
        next(turn)()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run
