"""One device by torch alone: cuDNN on a GPU, oneDNN on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .. import reference
from ..bind import State
from .planner import Planner


class Torch:
    """The same network by torch.nn.functional."""

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
        with (
            _tf32(arithmetic.precision == "tf32"),
            torch.autocast(self.devices[0].type, enabled=False),  # what was asked for at load
        ):
            outputs = reference.forward(network, self._state, x)
        ends = {step.name: step.layers[-1] for step in planned.steps if step.block}
        return {name: outputs[ends[name]].float().contiguous() for name in keep}

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
