"""One device: plans bound to packed weights, the last few batch shapes kept ready.

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

from ..kernels import layout
from . import reference
from .bind import Bound, bind, pack
from .plan import Numbers, Plan, Step, plan
from .spec import Network, Shape

BATCH_SHAPES = 4  # as many shapes of batches keep their memory and launches; the oldest makes room

State = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Planner:
    """Everything about a plan that is the same for every batch."""

    network: Network
    numbers: Numbers
    arch: int | None
    batch_invariant: bool = False

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
        planner.numbers,
        planner.arch,
        image_shape=image_shape,
        image_dtype=image_dtype,
        configured_for=configured_for,
        batch_invariant=planner.batch_invariant,
        keep=keep,
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
        self._packed = pack(planner.network, state, planner.numbers, device)
        self._bound: OrderedDict[object, Bound] = OrderedDict()

    def run(
        self, images: torch.Tensor, keep: tuple[str, ...], configured_for: int
    ) -> dict[str, torch.Tensor]:
        """Outputs of the steps in `keep`; a new batch shape is planned and bound first."""
        key = (images.shape, images.dtype, keep, configured_for)
        try:
            bound = self._bound.get(key) or self._bind(key, images, keep, configured_for)
            self._bound.move_to_end(key)
            bound.run(images)
            kept = [step for step in bound.plan.steps if step.name in keep]
            return {step.name: outside(step, bound.outputs[step.name]) for step in kept}
        except torch.cuda.OutOfMemoryError:
            self._bound.clear()  # or a smaller batch would find the memory still taken
            raise

    def _bind(
        self, key: object, images: torch.Tensor, keep: tuple[str, ...], configured_for: int
    ) -> Bound:
        if len(self._bound) >= BATCH_SHAPES:
            finish(self.devices)  # a kernel may still write what is about to be freed
            self._bound.popitem(last=False)
        shape = tuple(images.shape[1:])
        planned = self.planner(len(images), shape, images.dtype, keep, configured_for)
        bound = self._bound[key] = bind(planned, self._packed)
        return bound


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
        network, numbers = self.planner.network, self.planner.numbers
        planned = self.planner(len(images), tuple(images.shape[1:]))  # refuses what does not fit
        x = reference.normalise(images, network.preprocess, numbers.dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        with _tf32(numbers.precision == "tf32"):
            outputs = reference.forward(network, self._state, x)
        made = {step.name: step.layers[-1] for step in planned.steps if step.block}
        return {name: outputs[made[name]].float().contiguous() for name in keep}

    def _ready(self, tensor: torch.Tensor) -> torch.Tensor:
        """On the device, and channels last where there are four axes: cuDNN need not convert."""
        ready = tensor.to(self.devices[0], self.planner.numbers.dtype)
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


def finish(devices: tuple[torch.device, ...]) -> None:
    """Wait for everything queued on these devices."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
