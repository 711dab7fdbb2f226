"""Two devices in a row: the plan cut in two, micro-batches flowing through.

Each stage is bound on its device and runs on a stream of its own. While the second stage computes
one micro-batch, the first computes the next; between them lie two buffers, taken in turn, so that
neither waits for the other's memory. All ordering is by events: the host never waits.

The micro-batch is fixed when the pipeline is built. The last one is padded and its result sliced,
so no batch size can bring back rows of an earlier one. The same device may be named twice.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise

import torch

from ...kernels import layout
from ..bind import Bound, State, allocate, bind, pack
from ..plan import Plan, Step, part
from ..spec import NetworkError
from .cards import CARDS
from .planner import Planner
from .runner import synchronize, to_nchw

_H200 = CARDS["h200"]
RIDGE = _H200.flops["fp16"] / _H200.memory  # half-precision FLOPs in the time of one byte


def cuts(planned: Plan) -> list[str]:
    """The steps that a second stage may start with: any but the pass and the first convolution."""
    return [step.name for step in planned.steps[2:]]


def cut(planned: Plan, at: str, keep: Collection[str] = ()) -> tuple[Plan, Plan]:
    """Both stages of a plan, the second starting with step `at`; its input is the first's output.

    Each gets memory of its own; the outputs in `keep` survive. Raises NetworkError listing the
    legal cuts.
    """
    names = [step.name for step in planned.steps]
    if at not in cuts(planned):
        raise NetworkError(
            f"{planned.network.name} cannot be cut at {at!r}; a second stage may start with "
            f"{', '.join(cuts(planned))}"
        )
    where = names.index(at)
    return part(planned, 0, where, keep), part(planned, where, None, keep)


def cost(step: Step) -> float:
    """Predicted time of a step in FLOPs: its work or its bytes, whichever takes longer."""
    return max(step.work.flops, step.work.bytes * RIDGE)


def balanced_cut(planned: Plan, costs: Sequence[float]) -> str:
    """The cut whose slower stage is fastest; `costs` are the steps' times in any unit."""

    def slower(at: str) -> float:
        where = names.index(at)
        return max(sum(costs[:where]), sum(costs[where:]))

    names = [step.name for step in planned.steps]
    return min(cuts(planned), key=slower)


@dataclass(frozen=True, slots=True)
class _Built:
    """Both stages for one image shape: the second is bound once to each of its input buffers."""

    first: Bound
    second: tuple[Bound, Bound]
    inputs: tuple[torch.Tensor, torch.Tensor]
    images: torch.Tensor  # where a padded micro-batch is put together


class Pipeline:
    """The Triton kernels over two devices, cut at one step."""

    def __init__(
        self,
        planner: Planner,
        state: State,
        devices: tuple[torch.device, torch.device],
        at: str,
        micro_batch: int,
    ) -> None:
        self.devices = devices
        self.planner = planner
        self.micro_batch = micro_batch
        sample = planner(micro_batch)
        if at == "auto":
            at = balanced_cut(sample, step_costs(sample, planner, state, devices[0]))
        stages = cut(sample, at)
        self.at = at
        arithmetic = planner.arithmetic
        self._packed = tuple(
            pack(planner.network, state, arithmetic, device, {step.name for step in stage.steps})
            for stage, device in zip(stages, devices, strict=True)
        )
        self._streams = tuple(
            torch.cuda.Stream(device) if device.type == "cuda" else None for device in devices
        )
        self._built: dict[object, _Built] = {}

    def run(
        self, images: torch.Tensor, keep: tuple[str, ...], configured_for: int
    ) -> dict[str, torch.Tensor]:
        """Outputs of the steps in `keep`, micro-batch by micro-batch."""
        built = self._build(images, keep)
        size, count = self.micro_batch, len(images)
        parts: dict[str, list[torch.Tensor]] = {name: [] for name in keep}
        consumed: list[torch.cuda.Event | None] = [None, None]
        self._enter()
        for turn, start in enumerate(range(0, count, size)):
            rows = min(size, count - start)
            buffer = turn % 2
            with self._on(0):
                piece = images[start : start + rows].to(self.devices[0], non_blocking=True)
                built.images[:rows].copy_(piece, non_blocking=True)
                built.first.run(built.images)
                self._collect(built.first, rows, parts)
                self._wait(0, consumed[buffer])  # the second stage has read what lies there
                boundary = built.first.plan.steps[-1].name
                built.inputs[buffer].copy_(built.first.outputs[boundary], non_blocking=True)
                filled = self._record(0)
            with self._on(1):
                self._wait(1, filled)
                built.second[buffer].run(None)
                self._collect(built.second[buffer], rows, parts)
                consumed[buffer] = self._record(1)
        self._leave()
        outputs = {name: torch.cat(pieces) for name, pieces in parts.items()}
        assert all(len(output) == count for output in outputs.values())
        return outputs

    def _build(self, images: torch.Tensor, keep: tuple[str, ...]) -> _Built:
        shape = tuple(images.shape[1:])
        key = (shape, images.dtype, keep)
        if key not in self._built:
            planned = self.planner(self.micro_batch, shape, images.dtype, keep)
            first, second = cut(planned, self.at, keep)
            synchronize(self.devices)  # a kernel may still write what is about to be freed
            self._built = {}  # one image shape at a time keeps its memory
            height, width, n, channels = first.steps[-1].output
            inputs = tuple(
                layout.empty(height, width, n, channels, planned.arithmetic.dtype, self.devices[1])
                for _ in range(2)
            )
            pixels = torch.zeros(
                (self.micro_batch, *shape), dtype=images.dtype, device=self.devices[0]
            )
            memory = allocate(second, self.devices[1])  # both take turns on one stream
            ahead, behind = (bind(second, self._packed[1], source, memory) for source in inputs)
            head = bind(first, self._packed[0])
            self._built[key] = _Built(head, (ahead, behind), (inputs[0], inputs[1]), pixels)
        return self._built[key]

    def _collect(self, bound: Bound, rows: int, parts: dict[str, list[torch.Tensor]]) -> None:
        for step in bound.plan.steps:
            if step.name in parts:
                kept = to_nchw(step, bound.outputs[step.name])[:rows]
                parts[step.name].append(kept.to(self.devices[1], non_blocking=True))

    # --- streams and events; on a CPU everything happens in order and these do nothing -------

    def _on(self, stage: int) -> AbstractContextManager[object]:
        stream = self._streams[stage]
        return nullcontext() if stream is None else torch.cuda.stream(stream)

    def _record(self, stage: int) -> torch.cuda.Event | None:
        stream = self._streams[stage]
        return None if stream is None else stream.record_event()

    def _wait(self, stage: int, event: torch.cuda.Event | None) -> None:
        stream = self._streams[stage]
        if stream is not None and event is not None:
            stream.wait_event(event)

    def _enter(self) -> None:
        """Both streams start after what the caller has queued so far, on either device."""
        for stream in self._streams:
            if stream is not None:
                for device in self.devices:
                    stream.wait_stream(torch.cuda.current_stream(device))

    def _leave(self) -> None:
        """What the caller queues from here on, on either device, comes after both streams."""
        for stream in self._streams:
            if stream is not None:
                for device in self.devices:
                    torch.cuda.current_stream(device).wait_stream(stream)


def step_costs(planned: Plan, planner: Planner, state: State, device: torch.device) -> list[float]:
    """The time of every step: measured in milliseconds on a GPU, predicted from its work elsewhere.

    Measured with events around each step, the median of five runs after one that compiles.
    """
    if device.type != "cuda":
        return [cost(step) for step in planned.steps]
    bound = bind(planned, pack(planner.network, state, planner.arithmetic, device))
    shape = (planned.batch, *planned.image_shape)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    runs = []
    for _ in range(1 + 5):
        marks = [_now(device)]
        for _, launches in [("input", (bound.first(images),)), *bound.launches]:
            for launch in launches:
                launch()
            marks.append(_now(device))
        synchronize((device,))
        runs.append([a.elapsed_time(b) for a, b in pairwise(marks)])
    return torch.tensor(runs[1:]).median(dim=0).values.tolist()


def _now(device: torch.device) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event
