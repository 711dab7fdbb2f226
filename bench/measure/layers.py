"""`bench layers`: the engine's kernels, layer by layer, beside everything that computes the same.

Each layer is a race of its own (`contest.py`), and one problem is in memory at a time.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import torch

from ...engine import foretell
from ...engine.devices.planner import Planner
from ...engine.load import aim, arithmetic, find, resolve
from ..env import environment
from ..records import OURS, Results, Row
from .contest import blank_row, matched, race
from .problem import Problem, expected, match, problems, ready, tensors, tuned_planner
from .verb import Races, as_table, asked, begun, measured


def default_names(planner: Planner) -> list[str]:
    """Every step of the network, and every convolution with the pool right after it."""
    _, *steps = planner(1, image_dtype=planner.arithmetic.dtype).steps
    pooled = [
        f"{step.name}+{after.name}"
        for step, after in pairwise(steps)
        if step.kernel.startswith(("conv2d", "first_layer")) and after.kernel.endswith("pool2d")
    ]
    return [*(step.name for step in steps), *pooled]


def match_rows(problem: Problem, card: str, seed: int = 0) -> Iterator[Row]:
    """A row of ours alone, from the plan of a `card` in the interpreter: a match and no times."""
    given = tensors(problem, "cpu", torch.Generator().manual_seed(seed))
    bound = ready(problem, given)
    launches = (launch for _, several in bound.launches for launch in several)
    foretell.say(launches, f"{problem.name}, {problem.batch} images")
    bound.poison()
    bound()
    note = f"{card} interpreted: no time"
    row = replace(blank_row(problem), contestant=OURS, clock="-", note=note)
    yield matched(row, match(problem, bound.output(), expected(problem, given)))


def fastest_first(rows: Sequence[Row]) -> list[Row]:
    """By each clock."""
    clocks = list(dict.fromkeys(row.clock for row in rows))
    return sorted(rows, key=lambda r: (clocks.index(r.clock), r.median_us or math.inf))


def run(options: argparse.Namespace) -> int:
    """Measure layer by layer, telling rows as they come; 1 if one of ours was not timed.

    With a target, nothing is timed: 1 if one of ours does not match.
    """
    device = resolve(options.device or (options.target and "cpu"))
    card = aim(options.target, device).name
    dtype, meaning = arithmetic(options.dtype, device, "triton", options.target)
    network, _ = find(options.model)
    planner = tuned_planner(network, meaning, device, options.target)
    batches, clocks, effort = asked(options, device)
    names = options.layers or default_names(planner)
    problems(planner, dtype, batches[0], names)  # refuses what is no layer before it measures

    if card is None:
        results = begun(options, device, [dtype])
    else:
        notes = (f"The plan of {card} in Triton's interpreter: matches, no times.",)
        results = Results(environment(device), {}, (), notes=notes)

    def races() -> Races:
        for batch in batches:
            for problem in problems(planner, dtype, batch, names):
                rows = (
                    race(
                        *(problem, device, clocks),
                        kinds=options.peers,
                        roofs=results.roofs,
                        effort=effort,
                        seed=options.seed,
                    )
                    if card is None
                    else match_rows(problem, card, options.seed)
                )
                yield f"{network.name} {problem.name}, batch {batch}, {dtype}", rows

    results = measured(options, results, races(), *as_table("layer", results, fastest_first))
    ours = [row for row in results.rows if row.contestant == OURS]
    return 0 if all(row.matched if card else row.median_us for row in ours) else 1
