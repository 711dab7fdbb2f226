"""Two devices, measured: one engine, a pipeline, towers, and each device with half of the batch.

Every way gets the same images and is compared with the single device before it is timed; rounds
are interleaved, so that a drift of the machine hits all alike. The clock is the host's, around a
call and the synchronisation of both devices.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ...engine import table
from ...engine.devices.pipeline import Pipeline
from ...engine.load import find, load_state
from ...engine.run import Engine
from ...engine.spec import NetworkError
from ...engine.verify import errors, finite
from .. import units
from ..env import environment
from ..records import Times

MATCH = {"fp32": 1e-4, "tf32": 2e-2, "fp16": 2e-2, "bf16": 1e-1}
"""Largest difference from the single device, relative to its largest output, that is a match."""


@dataclass(frozen=True, slots=True)
class SplitRow:
    """One way: its difference from the single device and its times, None if it was not timed."""

    way: str
    difference: float | None = None
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    images_per_second: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class SplitComparison:
    """All ways for one batch."""

    network: str
    dtype: str
    devices: tuple[str, str]
    batch: int
    repeats: int
    rows: tuple[SplitRow, ...]

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
        lines += table.columns(self.rows, COLUMNS)
        return "\n".join(lines)


COLUMNS: table.Columns[SplitRow] = (
    ("way", -16, lambda row: row.way),
    ("match", 9, lambda row: units.number(row.difference, ".1e")),
    ("median ms", 10, lambda row: units.number(row.median_ms, ".2f")),
    ("p20", 9, lambda row: units.number(row.p20_ms, ".2f")),
    ("p80", 9, lambda row: units.number(row.p80_ms, ".2f")),
    ("images/s", 10, lambda row: units.number(row.images_per_second, ",.0f")),
    ("", 0, lambda row: row.note),
)


def compare(
    model: str,
    weights: str,
    devices: tuple[str, str],
    batch: int,
    dtype: str,
    at: str = "auto",
    micro_batch: int = 64,
    repeats: int = 9,
) -> SplitComparison:
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
        halved = [engine(part) for engine, part in zip(halves, parts, strict=False)]
        return torch.cat([output.to(single.device) for output in halved])

    ways: dict[str, Callable[[], torch.Tensor]] = {
        "one device": lambda: single(images),
        "half the batch": half_each,
        "pipeline": lambda: pipeline(images),
    }
    notes = {"pipeline": f"cut at {pipeline._runner.at}, micro-batch {micro_batch}"}
    refused: list[SplitRow] = []
    try:
        towers = Engine.load(network, state, devices=devices, split="towers", **common)
        ways["towers"] = lambda: towers(images)
    except NetworkError as error:
        refused.append(SplitRow("towers", note=f"not possible: {error}"))

    expected = single(images).double()
    differences = {
        name: errors(way().to(single.device).double(), expected)[0] for name, way in ways.items()
    }
    matching = {name: way for name, way in ways.items() if differences[name] <= MATCH[dtype]}
    taken: dict[str, list[float]] = {name: [] for name in matching}
    for _ in range(repeats):
        for name, way in matching.items():
            _synchronize(devices)
            started = time.perf_counter()
            way()
            _synchronize(devices)
            taken[name].append((time.perf_counter() - started) * 1e6)
    rows = []
    for name, difference in differences.items():
        if name not in matching:
            rows.append(SplitRow(name, difference, note="NO MATCH, so not timed"))
            continue
        times = Times("host", tuple(taken[name]))
        median, p20, p80 = (us / 1e3 for us in (times.median, times.p20, times.p80))
        speed = batch / median * 1e3
        rows.append(SplitRow(name, difference, median, p20, p80, speed, notes.get(name, "")))
    return SplitComparison(network.name, dtype, devices, batch, repeats, (*rows, *refused))


def _synchronize(devices: tuple[str, str]) -> None:
    for device in devices:
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)


# --- the verb --------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    """Measure two devices; 1 if a way does not match the single device."""
    dtype = options.dtype or ("fp32" if options.devices[0] == "cpu" else "fp16")
    comparison = compare(
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
        where = environment(torch.device(comparison.devices[0]))
        print(json.dumps({"environment": where, **comparison.to_dict()}, indent=2))
    else:
        print(comparison)
    return 0 if comparison.passed else 1
