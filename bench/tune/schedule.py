"""How launches should follow one another, measured: slices of the first layers, and overlap.

What a network gains from running its first layers slice by slice depends on the cache, and what it
gains from kernels that start before their predecessors end on the gaps between them; neither can be
seen on a kernel alone. So each order is a contestant of its own on the whole network, proved like
any other, and the winner goes into the device's table for the engine to follow: the fastest that
beats all images at once as `tuner.winner` has it, or else that.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
import triton

from ...engine import table
from ...engine.devices.planner import Planner, Run
from ...engine.load import arithmetic, at_least_one, find, resolve
from ...engine.plan import ARITHMETIC, PLAIN, Options
from ...engine.spec import Network
from ...errors import printable
from ...kernels import tuning
from ..env import environment
from ..measure.contest import admit, blank_row, inputs, timed
from ..measure.contestants import kernels
from ..measure.problem import network_problem, ready, tensors, tuned_planner
from ..measure.timing import ROUNDS, Clock, Effort
from ..measure.verb import TIMES, note
from ..records import Results, Row, save
from .cache import source_hash
from .tuner import device_name, winner

SLICES = {"cuda": (32, 64, 128), "cpu": (1,)}
OVERLAPS = 90  # the compute capability from which kernels may start early


@dataclass(frozen=True, slots=True)
class Order:
    """One order of launches for one batch, and what came of it."""

    options: Options
    row: Row


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
) -> list[Order]:
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
    orders = [Order(each.plan.options, row) for each, row in zip(problems, rows, strict=True)]
    return sorted(orders, key=lambda order: order.row.median_us or float("inf"))


def kept(tried: Sequence[Order]) -> Order | None:
    """The order to follow, None if none was timed."""
    (plain,) = (order.row for order in tried if order.options == PLAIN)
    won = winner([order.row for order in tried], plain)
    return next((order for order in tried if order.row is won), None)


def tuned_row(best: Order, network: Network, device: torch.device) -> tuning.TunedRow:
    """An order that was timed, as a row of the device's table."""
    assert best.row.median_us is not None
    planner = tuned_planner(network, ARITHMETIC[best.row.dtype], device)
    problem = network_problem(planner, best.row.dtype, best.row.batch)
    bound = ready(problem, tensors(problem, "meta"))
    return tuning.TunedRow(
        op="run",
        shape=tuning.without_batch(Run(network.name, *network.input_shape)),
        dtype=best.row.dtype,
        batch=best.row.batch,
        config=asdict(best.options),
        median_us=round(best.row.median_us, 3),
        triton=triton.__version__,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        source=source_hash(launch for _, several in bound.launches for launch in several),
    )


# --- the verb --------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    """Measure orders of launches; the one to follow goes into the table. 1 if none was timed."""
    device = resolve(options.device)
    dtype, _ = arithmetic(options.dtype, device, "triton")
    network, _ = find(options.model)
    rounds = ROUNDS[device.type] if options.rounds is None else options.rounds
    effort = Effort(rounds, options.seconds)
    at_least_one("--rounds", effort.rounds)
    path = options.table
    if path is None and device.type == "cuda":
        path = tuning.path_of(device_name(device))
    measured: dict[int, list[Order]] = {}
    for batch in options.batch:
        at_least_one("--batch", batch)
        print(f"{network.name}, batch {batch}, {dtype}", file=sys.stderr)
        measured[batch] = tried = orders(network, dtype, batch, device, effort)
        best = kept(tried)
        if options.json != "-":
            lines = table.columns([order.row for order in tried], COLUMNS)
            follow = told(best.options) if best else "nothing, none was timed"
            print("\n".join([f"batch {batch}", *lines, f"to follow: {follow}"]))
        if path is not None and best is not None:
            tuning.save(path, device_name(device), [tuned_row(best, network, device)])
            print(printable(f"written: {path}"), file=sys.stderr)
        if options.json not in (None, "-"):
            rows = tuple(order.row for tried in measured.values() for order in tried)
            save(Results(environment(device), {}, rows), Path(options.json))
    if options.json == "-":
        told_all = {batch: [asdict(order) for order in tried] for batch, tried in measured.items()}
        print(json.dumps(told_all, indent=1))
    return 0 if all(kept(tried) for tried in measured.values()) else 1
