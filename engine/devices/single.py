"""One device: plans bound to packed weights, the last few batch shapes kept ready.

A card's plan is recorded as a CUDA graph, one for each batch shape. All shapes lie in one block of
memory, the size that the largest of them needs, since they never run at once.

A runner is what `Engine` hands each piece of a batch to. It says where images go in, and gives back
the outputs that were asked for, as the caller sees them: float32 copies, [N, C, H, W] or
[N, features], on its device.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch

from ...kernels import layout
from ...kernels.jit import ALONE
from ...kernels.tuning import Table, dtype_name
from .. import reference
from ..bind import Bound, bind, pack
from ..plan import PLAIN, Arithmetic, Options, Plan, Step, plan
from ..spec import Network, Shape
from .graph import Recording, waiting

BATCH_SHAPES = 8  # as many shapes of batches stay bound; the oldest makes room

State = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Run:
    """What tables of tuned configurations know a whole network by, under the op "run"."""

    network: str
    C: int
    H: int
    W: int


@dataclass(frozen=True, slots=True)
class Planner:
    """Everything about a plan that is the same for every batch.

    `tuned` is the device's table; `options` None means as the table says.
    """

    network: Network
    arithmetic: Arithmetic
    arch: int | None
    batch_invariant: bool = False
    tuned: Table | None = None
    options: Options | None = PLAIN

    def __call__(
        self,
        batch: int,
        image_shape: Shape | None = None,
        image_dtype: torch.dtype = torch.uint8,
        keep: tuple[str, ...] = (),
        configured_for: int | None = None,
    ) -> Plan:
        """The plan for this batch; raises NetworkError as `plan` does."""
        return _planned(self, batch, image_shape, image_dtype, keep, configured_for)

    def options_for(self, batch: int, image_shape: Shape | None = None) -> Options:
        """How launches follow one another for batches of this size."""
        if self.options is not None:
            return self.options
        if self.tuned is None:
            return PLAIN
        run = Run(self.network.name, *(image_shape or self.network.input_shape))
        dtype = dtype_name(self.arithmetic.dtype, self.arithmetic.precision)
        found = self.tuned.find("run", run, dtype, batch)
        return PLAIN if found is None else Options(**found)


@lru_cache(maxsize=64)  # a plan costs the host more than launching it does
def _planned(
    planner: Planner,
    batch: int,
    image_shape: Shape | None,
    image_dtype: torch.dtype,
    keep: tuple[str, ...],
    configured_for: int | None,
) -> Plan:
    return plan(
        planner.network,
        batch,
        planner.arithmetic,
        planner.arch,
        image_shape=image_shape,
        image_dtype=image_dtype,
        configured_for=configured_for,
        batch_invariant=planner.batch_invariant,
        keep=keep,
        tuned=planner.tuned,
        options=planner.options_for(configured_for or batch, image_shape),
    )


class Runner(Protocol):
    """One way to run a network."""

    @property
    def planner(self) -> Planner:
        """Plans of the whole network."""
        ...

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Images go in at the first, outputs come from the last."""
        ...

    def run(
        self, images: torch.Tensor, keep: tuple[str, ...], configured_for: int
    ) -> dict[str, torch.Tensor]:
        """Outputs of the steps in `keep` for images [N, C, H, W], N at least 1."""
        ...


class Single:
    """The Triton kernels on one device."""

    def __init__(self, planner: Planner, state: State, device: torch.device) -> None:
        self.planner = planner
        self.devices = (device,)
        self._packed = pack(planner.network, state, planner.arithmetic, device)
        self._bound: OrderedDict[object, Bound | Recording] = OrderedDict()
        self._memory = torch.empty(0, dtype=torch.uint8, device=device)

    def run(
        self, images: torch.Tensor, keep: tuple[str, ...], configured_for: int
    ) -> dict[str, torch.Tensor]:
        """Outputs of the steps in `keep`; a new batch shape is planned and bound first."""
        try:
            ready = self.ready(images, keep, configured_for)
            ready.run(images)
            bound = ready.bound if isinstance(ready, Recording) else ready
            kept = [step for step in bound.plan.steps if step.name in keep]
            return {step.name: outside(step, bound.outputs[step.name]) for step in kept}
        except torch.cuda.OutOfMemoryError:
            self._forget()  # or a smaller batch would find the memory still taken
            raise

    def ready(
        self, images: torch.Tensor, keep: tuple[str, ...], configured_for: int
    ) -> Bound | Recording:
        """What runs batches of this shape: planned and bound now, or kept from before."""
        key = (images.shape, images.stride(), images.dtype, keep, configured_for)
        if key not in self._bound:
            shape = tuple(images.shape[1:])
            planned = self.planner(len(images), shape, images.dtype, keep, configured_for)
            self._bound[key] = self._bind(planned, images)
        self._bound.move_to_end(key)
        return self._bound[key]

    def _bind(self, planned: Plan, images: torch.Tensor) -> Bound | Recording:
        recorded = planned.arch is not None  # a card's plan, whatever runs it
        extra = waiting(planned, images.nbytes) if recorded else 0
        if planned.workspace + extra > len(self._memory):
            self._forget()
            self._memory = self._memory.new_empty(planned.workspace + extra)
        elif len(self._bound) >= BATCH_SHAPES:
            finish(self.devices)  # a graph may still run
            self._bound.popitem(last=False)
        bound = bind(planned, self._packed, memory=self._memory[: planned.workspace])
        if not recorded:
            return bound
        if not extra:
            return Recording(bound, None)
        flat = self._memory[planned.workspace :][:extra].view(images.dtype)
        return Recording(bound, flat.as_strided(images.shape, dense_strides(images)))

    def _forget(self) -> None:
        """Give the memory back, and all that lies in it."""
        finish(self.devices)  # a kernel may still write there
        self._bound.clear()
        self._memory = self._memory.new_empty(0)


class Torch:
    """The same network by torch.nn.functional: cuDNN on a GPU, oneDNN on a CPU."""

    def __init__(self, planner: Planner, state: State, device: torch.device) -> None:
        self.planner = planner
        self.devices = (device,)
        self._state = {name: self._ready(tensor) for name, tensor in state.items()}

    def run(
        self, images: torch.Tensor, keep: tuple[str, ...], configured_for: int
    ) -> dict[str, torch.Tensor]:
        """Outputs of the layers that the kernels would fuse into the steps in `keep`."""
        network, arithmetic = self.planner.network, self.planner.arithmetic
        planned = self.planner(len(images), tuple(images.shape[1:]))  # refuses what does not fit
        x = reference.normalise(images, network.preprocess, arithmetic.dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        with _tf32(arithmetic.precision == "tf32"):
            outputs = reference.forward(network, self._state, x)
        made = {step.name: step.layers[-1] for step in planned.steps if step.block}
        return {name: outputs[made[name]].float().contiguous() for name in keep}

    def _ready(self, tensor: torch.Tensor) -> torch.Tensor:
        """On the device, and channels last where there are four axes: cuDNN need not convert."""
        ready = tensor.to(self.devices[0], self.planner.arithmetic.dtype)
        return ready.contiguous(memory_format=torch.channels_last) if ready.ndim == 4 else ready


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """float32 products as asked for: by default torch allows TF32 in convolutions only."""
    switches: tuple[Any, Any] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = allowed
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value


def outside(step: Step, activation: torch.Tensor) -> torch.Tensor:
    """A step's activation [H, W, N, C] for the caller: a float32 copy, NCHW or [N, features]."""
    flat = step.block is not None and len(step.block.output) == 1
    copy = activation[0, 0].clone() if flat else layout.unpack(activation)
    return copy.float()


def dense_strides(images: torch.Tensor) -> tuple[int, ...]:
    """Strides of images [N, C, H, W] without gaps or overlaps, in the order that they lie in."""
    return torch.empty_like(images, device="meta").stride()


def finish(devices: tuple[torch.device, ...]) -> None:
    """Wait for everything queued on these devices, but not while a graph is being recorded."""
    with ALONE:
        for device in devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
