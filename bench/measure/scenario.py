"""`bench model --scenario`: what MLPerf Inference calls single-stream and offline.

Single-stream is one image a call, the next when the call before has returned: percentiles of its
latency by the host's clock. Offline has all images at once: images a second of the engine's stream,
from pixels in memory and from JPEG files that it decodes, beside the same stream on torch's
kernels. V. Reddi et al., "MLPerf Inference Benchmark", 2020.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy
import torch
from PIL import Image

from ...engine import table
from ...engine.load import arithmetic, at_least_one, find, resolve
from ...engine.plan import ARITHMETIC
from ...engine.run import Engine
from .. import units
from ..ratio import to_best_peer
from ..records import OURS, Row, Times
from .contest import Admitted, Compare, admit, blank_row, inputs, timed
from .contestants import called, contestants
from .peers import Peer, Prepared, kept, libraries
from .problem import Problem, Tensors, network_problem, tuned_planner
from .timing import Run, caller
from .verb import begun, measured, note, title

CALLS = {"cuda": 2048, "cpu": 16}  # or images
BATCH = {"cuda": 256, "cpu": 2}  # of the stream
BLOCKS = 8  # turns, each of calls one after the other
FILES = 16  # that are read again and again
SIZE = (500, 375)  # of a picture, as most of ImageNet's are
STREAMED = {OURS: "triton", "torch, same stream": "torch"}  # backends

Rows = Iterator[tuple[str, list[Row]]]


def single_stream(
    problem: Problem, device: torch.device, kinds: Sequence[str] | None, calls: int, seed: int = 0
) -> list[Row]:
    """Rows with a sample for every call. Raises ContextLost."""
    taken: dict[int, list[float]] = {}

    def blocks(runs: Sequence[Run], *_: object) -> Callable[[], float]:
        once, us = caller(runs, device), taken.setdefault(id(runs[0]), [])

        def block() -> float:
            us.extend(once() for _ in range(-(-calls // BLOCKS)))
            return us[-1]

        return block

    with libraries(problem.plan.arithmetic), torch.inference_mode():
        (given, *_), compare = inputs(problem, device, seed)
        blank = replace(blank_row(problem), section="single-stream", clock="host")
        everyone = [called(one, problem, device) for one in contestants(problem, device, kinds)]
        admitted = [admit(one, [given], blank, compare, device) for one in everyone]
        rows = timed(admitted, "host", device, BLOCKS, make=blocks)
    return [
        row.timed(Times("host", tuple(taken[id(one.runs[0])]))) if row.right else row
        for row, one in zip(rows, admitted, strict=True)
    ]


def offline(
    problem: Problem, device: torch.device, images: int, folder: Path, rounds: int, seed: int = 0
) -> Rows:
    """A race on pixels and one on files, a run being a batch of a stream. Raises ContextLost."""
    with torch.inference_mode():
        (given, *_), compare = inputs(problem, device, seed)
    pixels, files = given.x.cpu(), pictures(folder, seed)
    sources = {
        "pixels": lambda: itertools.islice(itertools.cycle(pixels), images),
        "jpeg": lambda: itertools.islice(itertools.cycle(files), images),
    }
    blank = replace(blank_row(problem), section="offline", clock="host")
    for kind, source in sources.items():
        row = replace(blank, problem=f"{problem.network.name} {kind}")
        with libraries(problem.plan.arithmetic), torch.inference_mode():
            admitted = [
                _streamed(name, backend, problem, given, source, row, compare, device)
                for name, backend in STREAMED.items()
            ]

            def batches(runs: Sequence[Run], *_: object) -> Callable[[], float]:
                once = caller(runs, device)
                return lambda: once() * problem.batch / images

            yield (
                f"{row.problem}, batch {row.batch}",
                timed(admitted, "host", device, rounds, make=batches),
            )


def _streamed(
    name: str,
    backend: str,
    problem: Problem,
    given: Tensors,
    source: Callable[[], Iterator[Any]],
    row: Row,
    compare: Compare,
    device: torch.device,
) -> Admitted:
    """An engine, proved on a batch, whose run is a stream of all that a source has."""
    made: list[Engine] = []

    def prepare(given: Tensors) -> Prepared:
        how = {"backend": backend, "max_batch": problem.batch}
        made.append(Engine.load(problem.network, given.state, device, problem.dtype, **how))
        return kept(lambda: made[0](given.x))

    def stream() -> None:
        for found in made[0].stream(source(), batch_size=problem.batch, top=1):
            if isinstance(found, Exception):
                raise found

    admitted = admit(Peer(name, prepare), [given], row, compare, device)
    return replace(admitted, runs=(stream,)) if admitted.runs else admitted


def pictures(folder: Path, seed: int = 0) -> list[Path]:
    """JPEG files of blurred noise, about as large as photographs."""
    noise = numpy.random.default_rng(seed).integers(0, 256, (FILES, 24, 32, 3), dtype=numpy.uint8)
    paths = [folder / f"{number}.jpg" for number in range(FILES)]
    for path, coarse in zip(paths, noise, strict=True):
        Image.fromarray(coarse).resize(SIZE, Image.Resampling.BICUBIC).save(path, quality=90)
    return paths


def _percentile(percent: float) -> Callable[[Row], str]:
    return lambda row: (
        units.number(float(numpy.percentile(row.samples, percent)), ".2f") if row.samples else "-"
    )


def columns(rows: Sequence[Row] = ()) -> table.Columns[Row]:
    """Percentiles of a call, or of a batch of the stream."""
    return (
        ("scenario", -14, lambda row: row.section),
        ("network", -16, lambda row: row.problem),
        ("batch", 5, lambda row: str(row.batch)),
        ("contestant", -24, lambda row: row.contestant),
        ("error", 8, lambda row: units.number(row.error, ".1e")),
        *((f"p{percent} us", 11, _percentile(percent)) for percent in (50, 90, 99)),
        ("images/s", 10, lambda row: units.whole(row.images_per_second)),
        (" x peer", -19, lambda row: f" {to_best_peer(row, rows) or ''}" if row.ours else ""),
        ("", 0, note),
    )


# --- the verb --------------------------------------------------------------------------------


def run(options: argparse.Namespace, model: str) -> int:
    """Measure the scenarios asked for; 1 if a row of ours was not timed."""
    device = resolve(options.device)
    network, _ = find(options.model or model)
    dtypes = [arithmetic(name, device, "triton")[0] for name in options.dtype or [None]]
    calls = CALLS[device.type] if options.calls is None else options.calls
    rounds = 3 if options.rounds is None else options.rounds
    for name, value in (("--calls", calls), ("--rounds", rounds)):
        at_least_one(name, value)
    results = begun(options, device, dtypes)

    def races(folder: Path) -> Rows:
        for dtype, scenario in itertools.product(dtypes, options.scenario):
            planner = tuned_planner(network, ARITHMETIC[dtype], device, options=None)
            if scenario == "single-stream":
                problem = network_problem(planner, dtype, 1)
                found = single_stream(problem, device, options.peers, calls, options.seed)
                yield f"{network.name}, {calls} calls, {dtype}, {scenario}", found
                continue
            for batch in options.batch or [BATCH[device.type]]:
                problem = network_problem(planner, dtype, batch, pixels=True)
                yield from offline(problem, device, calls, folder, rounds, options.seed)

    if options.json != "-":
        print(title(network.name, device, results))
        print(table.heading(columns()))
    with TemporaryDirectory() as folder:
        results = measured(
            *(options, results, races(Path(folder))),
            lambda rows: [table.line(row, columns(rows)) for row in rows],
        )
    return 0 if all(row.median_us for row in results.rows if row.ours) else 1
