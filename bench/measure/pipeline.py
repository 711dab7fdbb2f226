"""Two devices, measured: one engine, a pipeline, towers, and each device with half of the batch.

Every way gets the same images and is compared with the single device before it is timed; rounds
are interleaved, so that a drift of the machine hits all alike. The clock is the host's, around a
call and the synchronisation of both devices.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ...engine.devices.pipeline import Pipeline
from ...engine.load import find, load_state
from ...engine.run import Engine
from ...engine.spec import NetworkError
from ...engine.verify import errors, finite
from ..env import environment

MATCH = {"fp32": 1e-4, "tf32": 2e-2, "fp16": 2e-2, "bf16": 1e-1}
"""Largest difference from the single device, relative to its largest output, that is a match."""


@dataclass(frozen=True, slots=True)
class Row:
    """One way: its difference from the single device and its times, None if it was not timed."""

    way: str
    difference: float | None
    median_ms: float | None
    p20_ms: float | None
    p80_ms: float | None
    images_per_second: float | None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Comparison:
    """All ways for one batch."""

    network: str
    dtype: str
    devices: tuple[str, str]
    batch: int
    repeats: int
    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        """Whether every way that ran matched."""
        return all(row.difference is None or row.median_ms is not None for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        rows = [
            asdict(row) | {"difference": row.difference and finite(row.difference)}
            for row in self.rows
        ]
        return asdict(self) | {"rows": rows}

    def __str__(self) -> str:
        lines = [
            f"{self.network}, {self.batch} images, {self.dtype}, on {' and '.join(self.devices)}, "
            f"{self.repeats} interleaved rounds, host clock"
        ]
        if self.devices[0] == "cpu":
            lines.append("Triton's interpreter: these times say nothing of a GPU's")
        lines.append(
            f"{'way':<16} {'match':>9} {'median ms':>10} {'p20':>9} {'p80':>9} {'images/s':>10}"
        )
        for row in self.rows:
            if row.median_ms is None:
                lines.append(f"{row.way:<16} {row.note}")
                continue
            lines.append(
                f"{row.way:<16} {row.difference:>9.1e} {row.median_ms:>10.2f} {row.p20_ms:>9.2f} "
                f"{row.p80_ms:>9.2f} {row.images_per_second:>10,.0f}  {row.note}"
            )
        return "\n".join(lines)


def compare(
    model: str,
    weights: str,
    devices: tuple[str, str],
    batch: int,
    dtype: str,
    at: str = "auto",
    micro_batch: int = 64,
    repeats: int = 9,
) -> Comparison:
    """Measure all four ways. Raises what `Engine.load` raises, except for towers that cannot be."""
    network, _ = find(model)
    network, state = load_state(network, weights)
    common: dict[str, Any] = {"dtype": dtype, "max_batch": batch}
    single = Engine.load(network, state, devices[0], **common)
    halves = [Engine.load(network, state, device, **common) for device in devices]
    pipeline = Engine.load(
        network, state, devices=devices, split="pipeline", at=at, micro_batch=micro_batch, **common
    )
    assert isinstance(pipeline._runner, Pipeline)
    images = torch.randint(0, 256, (batch, *network.input_shape), dtype=torch.uint8)
    images = images.to(single.device)
    parts = images.chunk(2)

    def half_each() -> torch.Tensor:
        made = [engine(part) for engine, part in zip(halves, parts, strict=False)]
        return torch.cat([output.to(single.device) for output in made])

    ways: dict[str, Callable[[], torch.Tensor]] = {
        "one device": lambda: single(images),
        "half the batch": half_each,
        "pipeline": lambda: pipeline(images),
    }
    notes = {"pipeline": f"cut at {pipeline._runner.at}, micro-batch {micro_batch}"}
    refused: list[Row] = []
    try:
        towers = Engine.load(network, state, devices=devices, split="towers", **common)
        ways["towers"] = lambda: towers(images)
    except NetworkError as error:
        refused.append(Row("towers", None, None, None, None, None, f"not possible: {error}"))

    wanted = single(images).double()
    differences = {
        name: errors(way().to(single.device).double(), wanted)[0] for name, way in ways.items()
    }
    matching = {name: way for name, way in ways.items() if differences[name] <= MATCH[dtype]}
    times: dict[str, list[float]] = {name: [] for name in matching}
    for _ in range(repeats):
        for name, way in matching.items():
            _synchronize(devices)
            started = time.perf_counter()
            way()
            _synchronize(devices)
            times[name].append((time.perf_counter() - started) * 1e3)
    rows = [
        _row(name, differences[name], times[name], batch, notes.get(name, ""))
        if name in matching
        else Row(name, differences[name], None, None, None, None, "NO MATCH, so not timed")
        for name in ways
    ]
    return Comparison(network.name, dtype, devices, batch, repeats, (*rows, *refused))


def _row(way: str, difference: float, times: list[float], batch: int, note: str) -> Row:
    median = statistics.median(times)
    p20, *_, p80 = statistics.quantiles(times, n=5) if len(times) > 1 else (median, median)
    return Row(way, difference, median, p20, p80, batch / median * 1e3, note)


def _synchronize(devices: tuple[str, str]) -> None:
    for device in devices:
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)


# --- the verb --------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    """Measure two devices; 1 if a way does not match the single device."""
    dtype = options.dtype or ("fp32" if options.devices[0] == "cpu" else "fp16")
    found = compare(
        options.model,
        options.weights,
        (options.devices[0], options.devices[1]),
        options.batch,
        dtype,
        options.at,
        options.micro_batch,
        options.repeats,
    )
    if options.json:
        where = environment(torch.device(found.devices[0]))
        print(json.dumps({"environment": where, **found.to_dict()}, indent=2))
    else:
        print(found)
    return 0 if found.passed else 1
