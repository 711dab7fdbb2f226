"""A runner is what `Engine` hands each piece of a batch to: one way to run a network.

Its `planner` plans the whole network; images go in at the first of its `devices`, and outputs come
from the last. `run(images, keep, configured_for)` gives those of the steps in `keep` for images
[N, C, H, W], N at least 1, as the caller sees them: float32 copies, [N, C, H, W] or [N, features].
"""

from __future__ import annotations

import torch

from ...kernels import layout
from ...kernels.jit import ALONE
from ..plan import Step


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
