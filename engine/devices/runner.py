"""A runner is what `Engine` hands each piece of a batch to: one way to run a network.

It says where images go in, and gives back the outputs that were asked for, as the caller sees them:
float32 copies, [N, C, H, W] or [N, features], on its device.
"""

from __future__ import annotations

from typing import Protocol

import torch

from ...kernels import layout
from ...kernels.jit import ALONE
from ..plan import Step
from .planner import Planner


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


def to_nchw(step: Step, activation: torch.Tensor) -> torch.Tensor:
    """A step's activation [H, W, N, C] for the caller: a float32 copy, NCHW or [N, features]."""
    flat = step.block is not None and len(step.block.output) == 1
    copy = activation[0, 0].clone() if flat else layout.unpack(activation)
    return copy.float()


def synchronize(devices: tuple[torch.device, ...]) -> None:
    """Wait for everything queued on these devices, but not while a graph is being recorded."""
    with ALONE:
        for device in devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
