"""Where the time of a call goes: the milliseconds of each step, of the copies and of the host.

On a GPU every step stands between two CUDA events. They are queued behind runs that keep the GPU
busy until all is queued, so that no step waits for the host. A step by itself takes a little longer
than in the one graph that a call replays, which is timed beside them.

On a CPU the interpreter runs the steps, by the host's clock: these times say nothing of a GPU's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from .devices.graph import Recording
from .devices.runner import synchronize
from .devices.single import Call, Single
from .plan import Plan
from .spec import Shape
from .table import Columns, columns, line

Run = Callable[[], object]
Clock = Callable[[Sequence[Run]], list[float]]  # milliseconds of each

REPEATS = {"cuda": 20, "cpu": 3}
MOST_AHEAD = 256  # runs that keep the GPU busy while the host queues what is timed


@dataclass(frozen=True, slots=True)
class ProfileRow:
    """A step of the plan, or a copy; a step that runs in slices has the time of all of them."""

    step: str
    ms: float
    kernel: str
    flops: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Profile:
    """Medians of `repeats` runs, in milliseconds. `str` is the table, `to_dict` the JSON.

    call_ms: from the call to its logits, by the host's clock. On a GPU also at_once_ms: all parts
    with the steps in one graph, as a call runs them; and host_ms: until a call returns whose images
    are on the GPU, which computes meanwhile. On a CPU these are None: the host is what computes.
    """

    network: str
    images: int
    image_shape: Shape
    where: str  # "fp16 on sm_90"
    device: str
    repeats: int
    parts: tuple[ProfileRow, ...]
    call_ms: float
    at_once_ms: float | None = None
    host_ms: float | None = None

    @property
    def sum_ms(self) -> float:
        """All parts, one after the other."""
        return sum(part.ms for part in self.parts)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A dictionary a part, for `pandas.DataFrame`; `share` is of the sum."""
        return [asdict(part) | {"share": part.ms / self.sum_ms} for part in self.parts]

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for `json.dumps`."""
        return asdict(self) | {"sum_ms": self.sum_ms, "parts": self.rows}

    def __str__(self) -> str:
        size, gpu = "x".join(map(str, self.image_shape)), self.host_ms is not None
        clock = "CUDA events" if gpu else "the host's clock, which say nothing of a GPU"
        share = ("share", 7, lambda part: f"{part.ms / self.sum_ms:.1%}")
        ends = (
            ("sum", self.sum_ms, "one after the other"),
            ("at once", self.at_once_ms, "the same, as one graph"),
            ("call", self.call_ms, "until the logits are there"),
            ("host", self.host_ms, "until the call returns"),
        )
        whole = [ProfileRow(name, ms, told, 0, 0) for name, ms, told in ends if ms is not None]
        lines = [
            f"{self.network}: {self.images:,} images {size}, {self.where}",
            f"{self.device}: medians of {self.repeats} by {clock}",
            *columns(self.parts, [*_COLUMNS, share, *(_RATES if gpu else ())]),
            *(line(row, _COLUMNS) for row in whole),
        ]
        return "\n".join(lines)


_COLUMNS: Columns[ProfileRow] = [
    ("step", -8, lambda row: row.step),
    ("kernel", -26, lambda row: row.kernel),
    ("ms", 10, lambda row: f"{row.ms:.4f}"),
]
_RATES: Columns[ProfileRow] = [
    ("TFLOP/s", 8, lambda row: f"{row.flops / row.ms / 1e9:.1f}" if row.flops else ""),
    ("GB/s", 8, lambda row: f"{row.bytes / row.ms / 1e6:,.0f}" if row.bytes else ""),
]


def profile(
    call: Callable[[torch.Tensor], torch.Tensor],
    turn: AbstractContextManager[object],
    runner: Single,
    images: torch.Tensor,
    last: str,
    repeats: int | None = None,
) -> Profile:
    """Time an engine's `call` on images [N, C, H, W], and in its `turn`, alone, the call's parts.

    `last` is the step whose output is the logits.
    """
    (device,) = runner.devices
    gpu = device.type == "cuda"
    repeats = REPEATS[device.type] if repeats is None else repeats
    out = call(images)  # plans and compiles
    at_once = host = None
    with turn, torch.inference_mode(), torch.cuda.device(device) if gpu else nullcontext():
        synchronize(runner.devices)
        sent = images.to(device)
        ready = runner.ready(sent, (last,), len(sent))
        run = partial(ready.launches.run, sent)
        clock: Clock = partial(by_events, run) if gpu else by_clock
        planned, parts = _parts(ready, sent, out, last)
        spent = dict.fromkeys((name for name, _ in parts), 0.0)
        each = _medians([part for _, part in parts], clock, repeats)
        for (name, _), ms in zip(parts, each, strict=True):
            spent[name] += ms
        if gpu:
            at_once = sum(_medians([run, parts[-1][1]], clock, repeats))
        if images.device != device:
            (ms,) = _medians([partial(images.to, device)], by_clock, repeats)  # waits for the copy
            spent = {"copy in": ms + spent.pop("copy in", 0.0)} | spent
            at_once = None if at_once is None else at_once + ms
    called = statistics.median(_call(call, images, device)[1] for _ in range(repeats))
    if gpu:
        host = statistics.median(_call(call, sent, device)[0] for _ in range(repeats))
    steps = {step.name: (step.kernel, step.work.flops, step.work.bytes) for step in planned.steps}
    return Profile(
        network=planned.network.name,
        images=planned.batch,
        image_shape=planned.image_shape,
        where=planned.where,
        device=torch.cuda.get_device_name(device) if gpu else "CPU, Triton's interpreter",
        repeats=repeats,
        parts=tuple(
            ProfileRow(name, ms, *steps.get(name, ("copy", 0, 0))) for name, ms in spent.items()
        ),
        call_ms=called,
        at_once_ms=at_once,
        host_ms=host,
    )


def _parts(
    ready: Call, images: torch.Tensor, out: torch.Tensor, last: str
) -> tuple[Plan, list[tuple[str, Run]]]:
    """The plan of a call, and what it does on its device: by name, in order."""
    parts: list[tuple[str, Run]] = []
    bound = ready.launches
    if isinstance(bound, Recording):
        if bound.images is not None:
            parts.append(("copy in", partial(bound.images.copy_, images)))
        bound = bound.bound
    for name, launches in bound.by_step(images):
        parts += ((name, launch) for launch in launches)
    made = ready.outputs[last]
    parts.append(("copy out", partial(out.view(made.shape).copy_, made)))
    return bound.plan, parts


def _medians(runs: Sequence[Run], clock: Clock, repeats: int) -> list[float]:
    rounds = [clock(runs) for _ in range(repeats)]
    return [statistics.median(ms) for ms in zip(*rounds, strict=True)]


def by_clock(runs: Sequence[Run]) -> list[float]:
    """Milliseconds of each run, one after the other, by the host's clock."""
    times = [time.perf_counter()]
    for run in runs:
        run()
        times.append(time.perf_counter())
    return [1e3 * (end - start) for start, end in pairwise(times)]


def by_events(busy: Run, runs: Sequence[Run]) -> list[float]:
    """Milliseconds of each run on the current GPU, without what the host takes to queue it.

    `busy` keeps the GPU at work meanwhile: as often as that takes, or MOST_AHEAD times.
    """
    ahead = 1
    while True:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(runs) + 1)]
        for _ in range(ahead):
            busy()
        events[0].record()
        for run, event in zip(runs, events[1:], strict=True):
            run()
            event.record()
        late = events[0].query()  # the GPU was here before all was queued
        events[-1].synchronize()
        if not late or ahead >= MOST_AHEAD:
            return [start.elapsed_time(end) for start, end in pairwise(events)]
        ahead *= 4


def _call(
    call: Callable[[torch.Tensor], object], images: torch.Tensor, device: torch.device
) -> tuple[float, float]:
    """Milliseconds until a call returns, and until it is done."""
    synchronize((device,))
    started = time.perf_counter()
    call(images)
    returned = time.perf_counter()
    synchronize((device,))
    return 1e3 * (returned - started), 1e3 * (time.perf_counter() - started)
