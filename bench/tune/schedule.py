"""How launches should follow one another, measured: slices of the first layers, and overlap.

What a network gains from running its first layers slice by slice depends on the cache, and what it
gains from kernels that start before their predecessors end on the gaps between them; neither can be
seen on a kernel alone. So each order is a contestant of its own on the whole network, proved like
any other, and the winner goes into the device's table for the engine to follow: the fastest that
beats all images at once as `tuner.winner` has it, or else that.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime

import torch
import triton

from ...engine import table
from ...engine.devices.planner import Planner, Run
from ...engine.load import arithmetic, at_least_one, find, resolve
from ...engine.plan import ARITHMETIC, PLAIN, Options
from ...engine.spec import Network
from ...kernels import tuning
from ..env import environment
from ..measure.contest import admit, blank_row, inputs, timed
from ..measure.contestants import kernels
from ..measure.problem import network_problem, ready, tensors, tuned_planner
from ..measure.timing import ROUNDS, Clock, Effort
from ..measure.verb import TIMES, measured, note
from ..records import Results, Row
from .cache import source_hash
from .tuner import device_name, winner

SLICES = {"cuda": (32, 64, 128), "cpu": (1,)}
OVERLAPS = 90  # the compute capability from which kernels may start early


COLUMNS: table.Columns[Row] = (("order", -40, lambda row: row.contestant), *TIMES, ("", 0, note))


def told(options: Options) -> str:
    """An order in words."""
    words = ["all images at once"]
    if options.slice_images:
        words = [f"{options.slice_images} images at a time to {options.slice_until}"]
    return ", ".join([*words, *(["overlapping"] if options.pdl else [])])


def candidates(planner: Planner, batch: int, device: torch.device) -> list[Options]:
    """Every order worth a try: slices smaller than the batch, up to each of the first two pools."""
    pools = [step.name for step in planner(batch).steps if step.kernel == "max_pool2d"][:2]
    slices = [size for size in SLICES[device.type] if size < batch]
    orders = [PLAIN, *(Options(size, pool) for size in slices for pool in pools)]
    if planner.arch is not None and planner.arch >= OVERLAPS:
        orders += [replace(order, pdl=True) for order in orders]
    return orders


def orders(
    network: Network, dtype: str, batch: int, device: torch.device, effort: Effort | None = None
) -> list[Row]:
    """Measure every order for one batch, the fastest first, the unproved and untimed last.

    By the clock of graph replay on a GPU. `dtype` is a name in ARITHMETIC.
    """
    effort = effort or Effort(ROUNDS[device.type])
    clock: Clock = "graph" if device.type == "cuda" else "host"
    planner = tuned_planner(network, ARITHMETIC[dtype], device)
    problems = [
        network_problem(replace(planner, options=options), dtype, batch)
        for options in candidates(planner, batch, device)
    ]
    first = problems[0]
    blank = replace(blank_row(first), section="order", clock=clock)
    with torch.inference_mode():
        copies, compare = inputs(first, device)
        entries = [
            admit(kernels(each, told(each.plan.options)), copies, blank, compare, device)
            for each in problems
        ]
        rows = timed(entries, clock, device, effort.rounds, effort.seconds)
    return sorted(rows, key=lambda row: row.median_us or float("inf"))


def to_follow(rows: Sequence[Row]) -> Row | None:
    """The order to follow of those of one batch, None if none was timed."""
    return winner(rows, next(row for row in rows if row.contestant == told(PLAIN)))


def tuned_row(best: Row, network: Network, device: torch.device) -> tuning.TunedRow:
    """An order that was timed, as a row of the device's table."""
    planner = tuned_planner(network, ARITHMETIC[best.dtype], device)
    options = {told(each): each for each in candidates(planner, best.batch, device)}
    problem = network_problem(planner, best.dtype, best.batch)
    bound = ready(problem, tensors(problem, "meta"))
    assert best.median_us is not None
    return tuning.TunedRow(
        op="run",
        shape=tuning.without_batch(Run(network.name, *network.input_shape)),
        dtype=best.dtype,
        batch=best.batch,
        config=asdict(options[best.contestant]),
        median_us=round(best.median_us, 3),
        triton=triton.__version__,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        source=source_hash(launch for _, several in bound.launches for launch in several),
    )


# --- the verb --------------------------------------------------------------------------------


def lines(rows: Sequence[Row]) -> list[str]:
    """The orders of one batch, and which of them the engine should follow."""
    best = to_follow(rows)
    follow = best.contestant if best else "nothing, none was timed"
    return [f"batch {rows[0].batch}", *table.columns(rows, COLUMNS), f"to follow: {follow}"]


def run(options: argparse.Namespace) -> int:
    """Measure orders of launches; the one to follow goes into the table. 1 if none was timed."""
    device = resolve(options.device)
    dtype, _ = arithmetic(options.dtype, device, "triton")
    network, _ = find(options.model)
    rounds = ROUNDS[device.type] if options.rounds is None else options.rounds
    effort = Effort(rounds, options.seconds)
    at_least_one("--rounds", effort.rounds)
    for batch in options.batch:
        at_least_one("--batch", batch)
    path = options.table
    if path is None and device.type == "cuda":
        path = tuning.path_of(device_name(device))
    untimed = 0

    def race(batch: int) -> Iterator[Row]:
        nonlocal untimed
        yield from (rows := orders(network, dtype, batch, device, effort))
        best = to_follow(rows)
        untimed += best is None
        if path is not None and best is not None:
            tuning.save(path, device_name(device), [tuned_row(best, network, device)])

    races = ((f"{network.name}, batch {batch}, {dtype}", race(batch)) for batch in options.batch)
    measured(options, Results(environment(device), {}, ()), races, lines)
    return 1 if untimed else 0
