"""`bench model --scenario`: what MLPerf Inference calls single-stream and offline.

Single-stream is one image a call, the next when the call before has returned: percentiles of its
latency by the host's clock. Offline has all images at once: images a second of the engine's stream,
from pixels in memory and from JPEG files that it decodes, beside the same stream on torch's
kernels. V. Reddi et al., "MLPerf Inference Benchmark", 2020.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy
import torch
from PIL import Image

from ...engine.load import at_least_one
from ...engine.plan import ARITHMETIC
from ...engine.run import Engine
from ...engine.spec import Network
from ..records import BLOCKS as BLOCKS
from ..records import OURS, Row, Times
from .contest import admit, blank_row, inputs, timed
from .contestants import called, contestants
from .peers import Peer, Prepared, libraries
from .problem import Problem, Tensors, network_problem, tuned_planner
from .timing import Run, caller
from .verb import Races, as_table, begun, measured

CALLS = {"cuda": 2048, "cpu": 16}
IMAGES = {"cuda": 512, "cpu": 16}  # of the stream: a core decodes a few hundred in a second
BATCH = {"cuda": 256, "cpu": 2}  # of the stream
PASSES = 6  # over all images
FILES = 16  # that are read again and again
SIZE = (500, 375)  # of a picture, as most of ImageNet's are
STREAMED = {OURS: "triton", "torch, same stream": "torch"}  # backends


def single_stream(
    problem: Problem, device: torch.device, kinds: Sequence[str] | None, calls: int, seed: int = 0
) -> Iterator[Row]:
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
    for row, one in zip(rows, admitted, strict=True):
        yield row.timed(Times("host", tuple(taken[id(one.runs[0])]))) if row.right else row


def offline(
    problem: Problem, device: torch.device, kind: str, source: Iterable[Any], images: int, seed: int
) -> Iterator[Row]:
    """Rows of a stream of so many of a source, again and again; a run is a batch of it.

    Raises ContextLost.
    """

    def batches(runs: Sequence[Run], *_: object) -> Callable[[], float]:
        once = caller(runs, device)
        return lambda: once() * problem.batch / images

    with libraries(problem.plan.arithmetic), torch.inference_mode():
        (given, *_), compare = inputs(problem, device, seed)
        name = f"{problem.network.name} {kind}"
        blank = replace(blank_row(problem), section="offline", problem=name, clock="host")
        everyone = [_streamed(name, problem, source, images) for name in STREAMED]
        admitted = [admit(one, [given], blank, compare, device) for one in everyone]
        rows = timed(admitted, "host", device, PASSES, make=batches)
    yield from rows


def _streamed(name: str, problem: Problem, source: Iterable[Any], images: int) -> Peer:
    """An engine that streams, proved by what it makes of one batch."""

    def prepare(given: Tensors) -> Prepared:
        how: dict[str, Any] = {"backend": STREAMED[name], "max_batch": problem.batch}
        engine = Engine.load(problem.network, given.state, given.x.device, problem.dtype, **how)

        def run() -> None:
            items = itertools.islice(itertools.cycle(source), images)
            for found in engine.stream(items, batch_size=problem.batch, top=1):
                if isinstance(found, Exception):
                    raise found

        return Prepared(run, lambda: engine(given.x), poison=lambda: None)

    return Peer(name, prepare)


def pictures(folder: Path, seed: int = 0) -> list[Path]:
    """JPEG files of blurred noise, about as large as photographs."""
    noise = numpy.random.default_rng(seed).integers(0, 256, (FILES, 24, 32, 3), dtype=numpy.uint8)
    paths = [folder / f"{number}.jpg" for number in range(FILES)]
    for path, coarse in zip(paths, noise, strict=True):
        Image.fromarray(coarse).resize(SIZE, Image.Resampling.BICUBIC).save(path, quality=90)
    return paths


def run(
    options: argparse.Namespace, network: Network, device: torch.device, dtypes: Sequence[str]
) -> int:
    """Measure the scenarios asked for; 1 if a row of ours was not timed."""
    if options.calls is not None:
        at_least_one("--calls", options.calls)
    pixels = torch.randint(0, 256, (FILES, *network.input_shape), dtype=torch.uint8)

    def races(folder: Path) -> Races:
        for dtype, scenario in itertools.product(dtypes, options.scenario):
            planner = tuned_planner(network, ARITHMETIC[dtype], device, options=None)
            default = CALLS if scenario == "single-stream" else IMAGES
            calls = options.calls or default[device.type]
            what = f"{network.name}, {calls} images, {dtype}, {scenario}"
            if scenario == "single-stream":
                problem = network_problem(planner, dtype, 1)
                yield what, single_stream(problem, device, options.peers, calls, options.seed)
                continue
            for batch in options.batch or [BATCH[device.type]]:
                problem = network_problem(planner, dtype, batch, pixels=True)
                sources: dict[str, Iterable[Any]] = {"pixels": pixels, "jpeg": pictures(folder)}
                for kind, source in sources.items():
                    rows = offline(problem, device, kind, source, calls, options.seed)
                    yield f"{what}, batch {batch}, {kind}", rows

    with TemporaryDirectory() as folder:
        results = begun(options, device, dtypes)
        printed = as_table("scenario", results, percents=(90, 99))
        results = measured(options, results, races(Path(folder)), *printed)
    return 0 if all(row.median_us for row in results.rows if row.ours) else 1
