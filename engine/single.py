"""One device: plans bound to packed weights, the last few batch shapes kept ready.

A runner is what `Engine` hands each piece of a batch to. It says where images go in, and gives back
the outputs that were asked for, as the caller sees them: float32 copies, [N, C, H, W] or
[N, features], on its device.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

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
        return plan(
            self.network,
            batch,
            self.numbers,
            self.arch,
            image_shape=image_shape,
            image_dtype=image_dtype,
            configured_for=configured_for,
            batch_invariant=self.batch_invariant,
            keep=keep,
        )


class Runner(Protocol):
    """One way to run a network."""

    device: torch.device  # where images are wanted and outputs come
    planner: Planner

    def run(
        self, images: torch.Tensor, keep: tuple[str, ...], configured_for: int
    ) -> dict[str, torch.Tensor]:
        """Outputs of the steps in `keep` for images [N, C, H, W], N at least 1."""
        ...


class Single:
    """The Triton kernels on one device."""

    def __init__(self, planner: Planner, state: State, device: torch.device) -> None:
        self.device = device
        self.planner = planner
        self._packed = pack(planner.network, state, planner.numbers, device)
        self._bound: OrderedDict[object, Bound] = OrderedDict()

    def run(
        self, images: torch.Tensor, keep: tuple[str, ...], configured_for: int
    ) -> dict[str, torch.Tensor]:
        """Outputs of the steps in `keep`; a new batch shape is planned and bound first."""
        shape = tuple(images.shape[1:])
        key = (images.shape, images.dtype, keep, configured_for)
        bound = self._bound.pop(key, None)
        if bound is None:
            planned = self.planner(len(images), shape, images.dtype, keep, configured_for)
            bound = bind(planned, self._packed)
        self._bound[key] = bound
        if len(self._bound) > BATCH_SHAPES:
            self._bound.popitem(last=False)
        bound.run(images)
        kept = [step for step in bound.plan.steps if step.name in keep]
        return {step.name: outside(step, bound.outputs[step.name]) for step in kept}


class Torch:
    """The same network by torch.nn.functional: cuDNN on a GPU, oneDNN on a CPU."""

    def __init__(self, planner: Planner, state: State, device: torch.device) -> None:
        self.device = device
        self.planner = planner
        self._state = {
            name: tensor.to(device, planner.numbers.dtype) for name, tensor in state.items()
        }

    def run(
        self, images: torch.Tensor, keep: tuple[str, ...], configured_for: int
    ) -> dict[str, torch.Tensor]:
        """Outputs of the layers that the kernels would fuse into the steps in `keep`."""
        network = self.planner.network
        planned = self.planner(len(images), tuple(images.shape[1:]))  # refuses what does not fit
        x = reference.normalise(images, network.preprocess, self.planner.numbers.dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        outputs = reference.forward(network, self._state, x)
        made = {step.name: step.layers[-1] for step in planned.steps if step.block}
        return {name: outputs[made[name]].float().contiguous() for name in keep}


def outside(step: Step, activation: torch.Tensor) -> torch.Tensor:
    """A step's activation [H, W, N, C] for the caller: a float32 copy, NCHW or [N, features]."""
    flat = step.block is not None and len(step.block.output) == 1
    copy = activation[0, 0].clone() if flat else layout.unpack(activation)
    return copy.float()
