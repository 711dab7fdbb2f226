"""The whole network, end to end, beside everything else that computes it.

One race is one batch in one dtype by one clock: the engine and its peers on the same images, each
compared with float64 and then timed in turns. Copies of weights and images enough to pass twice
through the L2 cache are rotated through, so that at small batches the weights come from memory, as
they do where something else runs between two images.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from ...engine.load import load_state
from ...engine.spec import Network
from ..records import OURS, Row
from . import network_problem as whole
from .contest import Entry, admit, reason, timed
from .options import ROUNDS, Effort
from .peers import libraries
from .problem import Match, Problem, Tensors, match
from .roofline import roof_us
from .timing import CLOCKS, Clock, Run, copies_to_overflow

MOST_COPIES = 8  # of a whole network, each with its packed weights and its activations
WEIGHTS = "random:0"


def model_rows(
    network: Network,
    dtype: str,
    batch: int,
    device: torch.device,
    clocks: Sequence[Clock] | None = None,
    *,
    pixels: bool = False,
    kinds: Sequence[str] | None = None,
    roofs: Mapping[str, float] | None = None,
    effort: Effort | None = None,
    seed: int = 0,
) -> Iterator[Row]:
    """Rows of one batch: each contestant by each clock in turn, ours first.

    `dtype` is a name in NUMBERS; `clocks` default to all that the device has; `pixels` gives uint8
    images, which the peers normalise first, instead of floats; `kinds` are those of `peers`;
    `roofs` what `measure_roofs` gave, without which rows have no roof. Who cannot run, does not
    match or fails while it is timed has a row without times and with a note. Raises EngineError
    for an unknown kind of peer.
    """
    effort = effort or Effort(ROUNDS[device.type])
    if effort.over:
        return
    problem = whole.problem(whole.planner(network, dtype, device), dtype, batch, pixels)
    blank = Row(
        *("model", problem.name, problem.name, batch, dtype, "", ""),
        *(problem.work.flops, problem.work.bytes),
        roof_us=roof_us(problem.work, dtype, roofs) if roofs else None,
    )
    clocks = clocks or CLOCKS[device.type]
    try:
        rows = _rows(problem, blank, clocks, device, kinds, effort, seed)
    except torch.cuda.OutOfMemoryError as error:
        note = reason(error)
        rows = [replace(blank, contestant=OURS, clock=clock, note=note) for clock in clocks]
    _free(device)
    yield from rows


def _rows(
    problem: Problem,
    blank: Row,
    clocks: Sequence[Clock],
    device: torch.device,
    kinds: Sequence[str] | None,
    effort: Effort,
    seed: int,
) -> list[Row]:
    """All rows of one batch; nothing of it stays in memory."""
    with libraries(problem.plan.arithmetic), torch.inference_mode():
        copies = _copies(problem, device, seed)
        wanted = whole.expected(problem, copies[0])
        captured = tuple(clock for clock in clocks if clock != "host")
        called = tuple(clock for clock in clocks if clock == "host")
        rows: list[Row] = []
        for group in filter(None, (captured, called)):
            rows += _race(problem, blank, group, copies, wanted, device, kinds, effort)
            _free(device)
        return rows


def _race(
    problem: Problem,
    blank: Row,
    clocks: Sequence[Clock],
    copies: Sequence[Tensors],
    wanted: torch.Tensor,
    device: torch.device,
    kinds: Sequence[str] | None,
    effort: Effort,
) -> list[Row]:
    """Every contestant's rows by clocks that time the same runs."""

    def compare(made: torch.Tensor) -> Match:
        return match(problem, made, wanted)

    entries = []
    for one in whole.contestants(problem, device, clocks[0], kinds):
        entry = admit(one, copies, replace(blank, clock=clocks[0]), compare, device)
        if one.name == OURS:
            entry = replace(entry, row=replace(entry.row, workspace=problem.plan.workspace))
        entries.append(entry)
    rows: list[Row] = []
    for clock in clocks:
        if effort.over:
            break
        found = timed(entries, clock, device, effort.rounds, effort.left())
        if clock == "host" and device.type == "cuda":
            pairs = zip(found, entries, strict=True)
            found = [_with_enqueue(row, entry, device) for row, entry in pairs]
        rows += found
    return rows


def _copies(problem: Problem, device: torch.device, seed: int) -> list[Tensors]:
    """Tensors to rotate through, the same numbers in each."""
    generator = torch.Generator(device).manual_seed(seed)
    _, state = load_state(problem.network, WEIGHTS)
    given = whole.tensors(problem, state, device, generator)
    if device.type == "cpu":
        return [given]
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    count = copies_to_overflow(problem.work.bytes, cache, MOST_COPIES)
    return whole.copies(given, count)


def _with_enqueue(row: Row, entry: Entry, device: torch.device) -> Row:
    """The row with the host's part of a run, if it was timed."""
    if row.median_us is None:
        return row
    return replace(row, enqueue_us=enqueue_us(entry.runs, device, row.runs))


def enqueue_us(runs: Sequence[Run], device: torch.device, rounds: int) -> float:
    """Median of the host's microseconds until a run returns, with nothing queued before it."""
    taken = []
    for turn in range(rounds):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        runs[turn % len(runs)]()
        taken.append((time.perf_counter() - started) * 1e6)
    torch.cuda.synchronize(device)
    return statistics.median(taken)


def _free(device: torch.device) -> None:
    gc.collect()  # compiled graphs are cycles, and hold tensors
    if device.type == "cuda":
        torch.cuda.empty_cache()
