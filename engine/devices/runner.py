"""A runner is what `Engine` hands each piece of a batch to: one way to run a network.

Its `planner` plans the whole network; images go in at the first of its `devices`, and outputs come
from the last. `run(images, keep, configured_for)` gives those of the steps in `keep` for images
[N, C, H, W], N at least 1, as the caller sees them: [N, C, H, W] or [N, features], of any floating
dtype. They may lie where the next run will write, so they are copied before that.
"""

from __future__ import annotations

import torch

from ...kernels.jit import ALONE
from ..plan import Step


def as_nchw(step: Step, activation: torch.Tensor) -> torch.Tensor:
    """A step's activation [H, W, N, C] as the caller sees it: a view, NCHW or [N, features]."""
    flat = step.block is not None and len(step.block.output) == 1
    return activation[0, 0] if flat else activation.permute(2, 3, 0, 1)


def to_nchw(step: Step, activation: torch.Tensor) -> torch.Tensor:
    """The same as a dense float32 copy."""
    view = as_nchw(step, activation)
    return view.to(torch.float32, memory_format=torch.contiguous_format, copy=True)


def synchronize(devices: tuple[torch.device, ...]) -> None:
    """Wait for everything queued on these devices, but not while a graph is being recorded."""
    with ALONE:
        for device in devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
