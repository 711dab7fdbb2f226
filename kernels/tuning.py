"""Which configuration a kernel gets: the one measured best on this device, if there is one.

One JSON file a device in `tuned/`, one row a problem: the kernel, its shape without the batch, the
dtype, the batch it was measured at, the winning configuration and where it comes from. `bench tune`
writes them, one row a line, sorted, so that a change can be read.

A row serves batches around its own, up to the geometric mean with its neighbours' and by a factor
of two at either end. Beyond that there is no answer: a configuration is never stretched to a batch
far from where it was measured (vLLM, issue 52192: snapping to the nearest row made large batches
slower). The caller then takes the kernel's `default_config`.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from ..errors import Error

TUNED = Path(__file__).parent / "tuned"


class TuningError(Error, ValueError):
    """A table that cannot be read, in one line."""


@dataclass(frozen=True, slots=True)
class TunedRow:
    """One measured winner, the default where nothing tried was clear of it."""

    op: str  # "conv2d", "linear", "max_pool2d", ...: the launcher's name
    shape: Mapping[str, Any]  # the fields of the kernel's shape, N left out
    dtype: str  # "fp16", "bf16", "tf32" or "fp32"
    batch: int
    config: Mapping[str, Any]  # the fields of the kernel's configuration
    median_us: float
    triton: str  # version
    date: str
    source: str  # hash of the kernel's source

    @property
    def problem(self) -> str:
        """What rows for other batches share, as text."""
        return f"{self.op} {json.dumps(_plain(self.shape), sort_keys=True)} {self.dtype}"


@dataclass(frozen=True, eq=False)
class Table:
    """All rows of one device."""

    device: str
    rows: tuple[TunedRow, ...]

    def find(self, op: str, shape: Any, dtype: str, batch: int) -> Mapping[str, Any] | None:
        """The configuration measured for `batch` or near it, None if there is none.

        `shape` is the kernel's shape, a dataclass. bf16 takes what was measured in fp16 where it
        has nothing of its own: same bytes, same instructions, same speed.
        """
        problem = f"{op} {json.dumps(without_batch(shape), sort_keys=True)}"
        for name in (dtype, "fp16") if dtype == "bf16" else (dtype,):
            if row := nearest(self._by_problem.get(f"{problem} {name}", ()), batch):
                return row.config
        return None

    @functools.cached_property
    def _by_problem(self) -> dict[str, list[TunedRow]]:
        found: dict[str, list[TunedRow]] = {}
        for row in self.rows:
            found.setdefault(row.problem, []).append(row)
        return found


def nearest(rows: Iterable[TunedRow], batch: int) -> TunedRow | None:
    """The row whose range of batches holds `batch`; all rows are of one problem."""
    ordered = sorted(rows, key=lambda row: row.batch)
    for row, after in itertools.zip_longest(ordered, ordered[1:]):
        end = 2 * row.batch if after is None else math.sqrt(row.batch * after.batch)
        if batch <= end:
            return row if row is not ordered[0] or 2 * batch >= row.batch else None
    return None


def without_batch(shape: Any) -> dict[str, Any]:
    """A kernel's shape as a dictionary without the number of images."""
    return {name: value for name, value in _plain(asdict(shape)).items() if name != "N"}


def dtype_name(dtype: torch.dtype, precision: str) -> str:
    """What tables call a dtype and the precision of its products: "fp16", "tf32", ..."""
    names = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
    return "tf32" if dtype == torch.float32 and precision == "tf32" else names[dtype]


def path_of(device: str, folder: Path = TUNED) -> Path:
    """The file of a device by its name: "NVIDIA H200" is nvidia-h200.json."""
    return folder / (re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json")


@functools.cache
def table(device: str) -> Table | None:
    """The shipped table of a device by its name, None if there is none.

    Read once a process. Raises TuningError for a file that is no table.
    """
    path = path_of(device)
    return load(path) if path.exists() else None


def table_of(device: torch.device) -> Table | None:
    """The shipped table of the device at hand; None for a CPU, which interprets."""
    return table(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def load(path: Path) -> Table:
    """Read a table. Raises TuningError, naming the file, for one that is none."""
    wanted = [field.name for field in fields(TunedRow)]
    try:
        found = json.loads(path.read_text())
        for number, row in enumerate(found["rows"], 1):
            if set(row) != set(wanted):
                raise ValueError(
                    f"row {number}: wanted the fields {', '.join(wanted)}, got {', '.join(row)}; "
                    "delete the row and tune again"
                )
        return Table(found["device"], tuple(TunedRow(**row) for row in found["rows"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TuningError(f"{path}: no table of tuned configurations: {error}") from None


def save(path: Path, device: str, rows: Iterable[TunedRow]) -> None:
    """Write `rows`, over those of the same problem and batch and beside the others there.

    Raises TuningError if the file there is no table or another device's.
    """
    before = load(path) if path.exists() else Table(device, ())
    if before.device != device:
        raise TuningError(f"{path}: wanted a table of {device}, got one of {before.device}")
    kept = {(row.problem, row.batch): row for row in (*before.rows, *rows)}
    ordered = [kept[key] for key in sorted(kept)]
    names = [field.name for field in fields(TunedRow)]
    lines = [
        json.dumps({name: _plain(getattr(row, name)) for name in names}, sort_keys=False)
        for row in ordered
    ]
    text = f'{{"device": {json.dumps(device)}, "rows": [\n' + ",\n".join(lines) + "\n]}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def _plain(value: Any) -> Any:
    """The same as JSON would give it back: tuples are lists."""
    return json.loads(json.dumps(value, default=dict))
