"""Two devices, measured: one engine, a pipeline, towers, and each device with half of the batch.

Every way is a contestant on the whole network, by the host's clock as its user would see it, with
images and logits on the first device.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from ...engine.load import arithmetic, at_least_one, find, resolve
from ...engine.run import Engine
from ..records import Row
from .contest import admit, blank_row, inputs, timed
from .peers import Peer, Prepared, kept, libraries
from .problem import Problem, Tensors, network_problem, tuned_planner
from .verb import as_table, begun, measured, tell


def ways(problem: Problem, devices: Sequence[str], **split: Any) -> list[Peer]:
    """Every way; `split` is what the pipeline is told, as `Engine.load` knows it."""

    def engine(given: Tensors, **how: Any) -> Engine:
        how |= {"dtype": problem.dtype, "max_batch": problem.batch}
        return Engine.load(problem.network, given.state, **how)

    def single(given: Tensors) -> Callable[[], torch.Tensor]:
        one = engine(given, device=devices[0])
        return lambda: one(given.x)

    def halves(given: Tensors) -> Callable[[], torch.Tensor]:
        engines = [engine(given, device=device) for device in devices]
        parts = given.x.chunk(2)

        def run() -> torch.Tensor:
            made = [one(part) for one, part in zip(engines, parts, strict=False)]
            return torch.cat([output.to(given.x.device) for output in made])

        return run

    def both(given: Tensors, **how: Any) -> Callable[[], torch.Tensor]:
        two = engine(given, devices=devices, **how)
        if how["split"] == "pipeline":
            tell(f"pipeline: cut at {two._runner.at}")  # type: ignore[union-attr]
        return lambda: two(given.x).to(given.x.device)

    def way(name: str, make: Callable[..., Callable[[], torch.Tensor]], **how: Any) -> Peer:
        def prepare(given: Tensors) -> Prepared:
            return kept(make(given, **how))

        return Peer(name, prepare)

    return [
        way("one device", single),
        way("half the batch", halves),
        way("pipeline", both, split="pipeline", **split),
        way("towers", both, split="towers"),
    ]


def race(
    problem: Problem, everyone: Sequence[Peer], device: torch.device, rounds: int
) -> Iterator[Row]:
    """Rows of section "order", since all are the engine. Raises ContextLost."""
    blank = replace(blank_row(problem), section="order", clock="host")
    with libraries(problem.plan.arithmetic), torch.inference_mode():
        copies, compare = inputs(problem, device)
        admitted = [admit(one, copies[:1], blank, compare, device) for one in everyone]
        rows = timed(admitted, "host", device, rounds)
    yield from rows


# --- the verb --------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    """Measure two devices; 1 if a way that runs does not match float64."""
    device = resolve(options.devices[0])
    network, _ = find(options.model)
    dtype, meaning = arithmetic(options.dtype, device, "triton")
    for name in ("batch", "rounds"):
        at_least_one(f"--{name}", getattr(options, name))
    problem = network_problem(
        tuned_planner(network, meaning, device, options=None), dtype, options.batch
    )
    everyone = ways(problem, options.devices, at=options.at, micro_batch=options.micro_batch)
    results = begun(options, device, [dtype])
    what = f"{network.name}, batch {options.batch}"
    races = [(what, race(problem, everyone, device, options.rounds))]
    results = measured(options, results, races, *as_table("network", results))
    return 0 if all(row.right or row.error is None for row in results.rows) else 1
