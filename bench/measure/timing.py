"""Three clocks, and contestants that take turns.

- `cold`: one run at a time as a CUDA graph, between two events, after the L2 cache was overwritten.
  What a kernel costs whose inputs come from memory.
- `graph`: a CUDA graph of many runs, replayed between two events and divided. What a run costs in
  a steady stream of them, launch gaps included and the host left out.
- `host`: the caller's clock around one call and the synchronisation after it; a turn is the median
  of as many as last a while. What a user sees. It is the only clock of a CPU.

A contestant is a list of copies of the same computation on different tensors, and its runs rotate
through them, so that with copies enough to overflow the cache no input is found there by luck.
Rounds are interleaved in a fresh random order: a drift of the machine meets all alike, and none is
always the one after the slowest. Times are kept one by one; medians and percentiles come last.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..choices import CLOCKS as CLOCKS
from ..choices import Clock as Clock
from ..env import gauge, together
from ..ratio import LEAST
from ..records import DeviceState
from ..records import Times as Times

Run = Callable[[], object]

ROUNDS = {"cuda": 25, "cpu": 3}
WARM_UPS = 3
REPLAY_US = 4e3  # how long a replay by the clock "graph" should last
HOST_US = 5e3  # how long calls by the clock "host" should last, together
MOST_CALLS = 50
MOST_RUNS = 512  # of which one graph is recorded, unless there are more copies than that
FLUSHED = 8  # times the size of the L2 cache is overwritten
OVERFLOW = 2  # times the size of the L2 cache is what copies hold together
MOST_COPIES = 128
"""However small a problem is: each contestant binds every copy, which takes it milliseconds.

One image's conv1, AlexNet's smallest, needs about as many with a cache of 50 MB. What moves less
is bound by its launch, wherever its inputs lie.
"""


@dataclass(frozen=True, slots=True)
class Effort:
    """How long a clock takes: rounds of turns, and after so many seconds no new one but LEAST."""

    rounds: int = 25
    seconds: float | None = None


def measure(
    contestants: Mapping[str, Sequence[Run]],
    clock: Clock,
    device: torch.device,
    rounds: int = 25,
    seconds: float | None = None,
    seed: int = 0,
) -> dict[str, Times]:
    """Time every contestant `rounds` times, or as often as fits into `seconds`, but LEAST times.

    Each contestant is a list of copies, all warm when this returns. Runs must do their work on the
    current stream of `device`; by the clocks of a GPU they are captured, so they must not wait for
    the host. Raises ValueError for a clock that the device has not, and whatever a run raises.
    """
    take = {name: sampler(copies, clock, device) for name, copies in contestants.items()}
    return take_turns(take, clock, rounds, seconds, seed, device)


def take_turns(
    take: Mapping[str, Callable[[], float]],
    clock: Clock,
    rounds: int = 25,
    seconds: float | None = None,
    seed: int = 0,
    device: torch.device | None = None,
) -> dict[str, Times]:
    """What `measure` does with samplers that are there already.

    The state of the device, if it is named, is read after each turn, outside of what is timed.
    """
    us: dict[str, list[float]] = {name: [] for name in take}
    states: dict[str, list[DeviceState]] = {name: [] for name in take}
    look = gauge(device)
    order = list(take)
    shuffle = random.Random(seed).shuffle
    end = None if seconds is None else time.perf_counter() + seconds
    for done in range(rounds):
        if end is not None and done >= LEAST and time.perf_counter() > end:
            break
        shuffle(order)
        for name in order:
            us[name].append(take[name]())
            states[name].append(look())
    return {name: Times(clock, tuple(us[name]), together(states[name])) for name in take}


def sampler(copies: Sequence[Run], clock: Clock, device: torch.device) -> Callable[[], float]:
    """A function that takes one time of a contestant, in microseconds a run; all copies are warm.

    For whoever arranges the turns himself, or must know who cannot be timed; raises as `measure`
    does.
    """
    if clock not in CLOCKS[device.type]:
        raise ValueError(
            f"clock: wanted {' or '.join(CLOCKS[device.type])} on a {device.type}, got {clock!r}"
        )
    clocks: dict[Clock, Callable[[Sequence[Run], torch.device], Callable[[], float]]] = {
        "cold": _cold,
        "graph": _graph,
        "host": _host,
    }
    return clocks[clock](copies, device)


def copies_to_overflow(nbytes: int, cache: int) -> int:
    """How many copies of tensors of `nbytes` pass twice through a cache before one comes again.

    What a run moves is thereby held once, or OVERFLOW caches full of it; MOST_COPIES at most.
    """
    return min(MOST_COPIES, max(1, -(-OVERFLOW * cache // max(nbytes, 1))))


def capture(runs: Sequence[Run], device: torch.device) -> torch.cuda.CUDAGraph:
    """All runs, one after the other, as one CUDA graph; they are warmed up first.

    The first of them more than once: it stands for the others wherever something compiles, or a
    library chooses an algorithm for a shape.
    """
    with torch.cuda.device(device):
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for run in [*[runs[0]] * (WARM_UPS - 1), *_distinct(runs)]:
                run()
        torch.cuda.current_stream(device).wait_stream(side)
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            for run in runs:
                run()
    return graph


def _distinct(runs: Sequence[Run]) -> list[Run]:
    """Each once, in order; told apart by identity, since a run need not be hashable."""
    return list({id(run): run for run in runs}.values())


def _cold(copies: Sequence[Run], device: torch.device) -> Callable[[], float]:
    graphs = [capture([copy], device) for copy in copies]
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    flush = torch.empty(FLUSHED * cache, dtype=torch.uint8, device=device)
    turn = itertools.cycle(graphs)
    for graph in graphs:
        graph.replay()  # the first also uploads it

    def once() -> float:
        graph = next(turn)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()  # keeps the GPU busy while the host enqueues the rest
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(end)) * 1e3

    return once


def _graph(copies: Sequence[Run], device: torch.device) -> Callable[[], float]:
    graph = capture(copies, device)
    rounds = passes(min(_elapsed_us(graph, device) for _ in range(3)), len(copies))
    runs = [*copies] * rounds
    if rounds > 1:
        graph = capture(runs, device)
    return lambda: _elapsed_us(graph, device) / len(runs)


def passes(us: float, copies: int) -> int:
    """How often a graph repeats all copies, which take `us` together once.

    Enough to last REPLAY_US, so that the beginning and the end of a replay do not show.
    """
    return max(1, min(round(REPLAY_US / max(us, 1.0)), MOST_RUNS // copies))


def caller(copies: Sequence[Run], device: torch.device) -> Callable[[], float]:
    """What takes the time of one call by the caller's clock, in us; all copies are warm."""
    for copy in copies:
        copy()
    turn = itertools.cycle(copies)

    def once() -> float:
        run = next(turn)
        _synchronize(device)
        started = time.perf_counter()
        run()
        _synchronize(device)
        return (time.perf_counter() - started) * 1e6

    return once


def _host(copies: Sequence[Run], device: torch.device) -> Callable[[], float]:
    once = caller(copies, device)

    def several() -> float:
        us = [once()]
        while sum(us) < HOST_US and len(us) < MOST_CALLS:
            us.append(once())
        return statistics.median(us)

    return several


def _elapsed_us(graph: torch.cuda.CUDAGraph, device: torch.device) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    graph.replay()  # keeps the GPU busy, and its clocks up, while the host enqueues the rest
    start.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize(device)
    return float(start.elapsed_time(end)) * 1e3


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
