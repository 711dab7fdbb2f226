"""How launches should follow one another, measured: slices of the first layers, and overlap.

What a network gains from running its first layers slice by slice depends on the cache, and what it
gains from kernels that start before their predecessors end on the gaps between them; neither can be
seen on a kernel alone. So each order is a contestant of its own on the whole network, proved like
any other, and the fastest goes into the device's table for the engine to follow.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial

import torch
import triton

from ...engine.devices.planner import Planner, Run
from ...engine.load import arithmetic, at_least_one, find, load_state, resolve
from ...engine.plan import PLAIN, Options
from ...engine.spec import Network
from ...errors import printable
from ...kernels import tuning
from ..measure import network_problem as whole
from ..measure.contest import admit, timed
from ..measure.options import ROUNDS, Effort
from ..measure.peers import Peer, Prepared
from ..measure.problem import Match, Problem, Tensors, match, ready, tensors
from ..measure.timing import CLOCKS, copies_to_overflow
from ..records import Row
from .cache import source_hash
from .tuner import device_name

SLICES = {"cuda": (32, 64, 128), "cpu": (1,)}
OVERLAPS = 90  # the compute capability from which kernels may start early
MOST_COPIES = 4


@dataclass(frozen=True, slots=True)
class Order:
    """One order of launches for one batch, and what came of it."""

    options: Options
    row: Row

    def __str__(self) -> str:
        if self.row.median_us is None:
            return f"{told(self.options):<40} {self.row.note}"
        return (
            f"{told(self.options):<40} {self.row.max_error:>8.1e} {self.row.median_us:>11.2f} "
            f"{self.row.p20_us:>10.2f} {self.row.p80_us:>10.2f}"
        )


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

    By the clock of graph replay on a GPU. `dtype` is a name in NUMBERS.
    """
    effort = effort or Effort(ROUNDS[device.type])
    clock = "graph" if device.type == "cuda" else CLOCKS[device.type][0]
    planner = whole.planner(network, dtype, device)
    tried = candidates(replace(planner, options=PLAIN), batch, device)
    problems = [whole.problem(replace(planner, options=options), dtype, batch) for options in tried]
    with torch.inference_mode():
        _, state = load_state(network, "random:0")
        given = whole.tensors(problems[0], state, device)
        wanted = whole.expected(problems[0], given)
        count = 1
        if device.type == "cuda":
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            count = copies_to_overflow(problems[0].work.bytes, cache, MOST_COPIES)
        copies = whole.copies(given, count)
        work = problems[0].work
        blank = Row(
            *("order", network.name, network.name, batch, dtype, "", clock),
            *(work.flops, work.bytes),
        )
        entries = [
            admit(_contestant(problem), copies, blank, partial(_compare, problem, wanted), device)
            for problem in problems
        ]
        rows = timed(entries, clock, device, effort.rounds, effort.left())
    found = [Order(options, row) for options, row in zip(tried, rows, strict=True)]
    return sorted(found, key=lambda order: order.row.median_us or float("inf"))


def _contestant(problem: Problem) -> Peer:
    def prepare(given: Tensors) -> Prepared:
        return whole.kernels(problem, given)

    return Peer(told(problem.plan.options), prepare)


def _compare(problem: Problem, wanted: torch.Tensor, made: torch.Tensor) -> Match:
    return match(problem, made, wanted)


def tuned_row(found: Sequence[Order], network: Network, device: torch.device) -> tuning.TunedRow:
    """The fastest order as a row of the device's table. Raises ValueError if none was timed."""
    best = found[0]
    if best.row.median_us is None:
        raise ValueError(f"no order of {network.name} could be timed: {best.row.note}")
    planner = replace(whole.planner(network, best.row.dtype, device), options=PLAIN)
    problem = whole.problem(planner, best.row.dtype, best.row.batch)
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

HEAD = f"{'order':<40} {'error':>8} {'median us':>11} {'p20':>10} {'p80':>10}"


def run(options: argparse.Namespace) -> int:
    """Measure orders of launches; the fastest goes into the table. 1 if none was timed."""
    device = resolve(options.device)
    dtype, _ = arithmetic(options.dtype, device, "triton")
    network, _ = find(options.model)
    effort = Effort(ROUNDS[device.type] if options.rounds is None else options.rounds)
    at_least_one("--rounds", effort.rounds)
    table = options.table
    if table is None and device.type == "cuda":
        table = tuning.path_of(device_name(device))
    found: dict[int, list[Order]] = {}
    for batch in options.batch:
        at_least_one("--batch", batch)
        print(f"{network.name}, batch {batch}, {dtype}", file=sys.stderr)
        found[batch] = orders(network, dtype, batch, device, effort)
        if not options.json:
            print("\n".join([f"batch {batch}", HEAD, *map(str, found[batch])]))
        if table is not None and found[batch][0].row.median_us is not None:
            tuning.save(table, device_name(device), [tuned_row(found[batch], network, device)])
            print(printable(f"written: {table}"), file=sys.stderr)
    if options.json:
        told_all = {batch: [asdict(order) for order in several] for batch, several in found.items()}
        print(json.dumps(told_all, indent=1))
    return 0 if all(several[0].row.median_us for several in found.values()) else 1
