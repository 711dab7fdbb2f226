"""A bound plan recorded as a CUDA graph: one launch a batch.

Launching a Triton kernel from Python takes the host some ten microseconds and AlexNet has a dozen
kernels, so at small batch the GPU would wait for the host. A graph is enqueued at once. It reads
the images from a place of its own, into which each batch is copied first.
"""

from __future__ import annotations

import torch

from ..kernels.jit import ALONE
from .bind import Bound


class Recording:
    """One bound plan, run by replaying its graph; recorded on the first run.

    `images` [N, C, H, W] is where the graph finds its batch: it belongs to the recording.
    """

    def __init__(self, bound: Bound, images: torch.Tensor) -> None:
        self.bound = bound
        self._images = images
        self._graph: torch.cuda.CUDAGraph | None = None

    def run(self, images: torch.Tensor) -> None:
        """Fill the outputs from images [N, C, H, W] on the same device."""
        self._images.copy_(images, non_blocking=True)
        if self._graph is None:
            self._graph = self._record()
        self._graph.replay()

    def _record(self) -> torch.cuda.CUDAGraph:
        device = self._images.device
        # Nobody may wait for the whole device during a recording, as each does before it begins.
        with ALONE, torch.cuda.device(device):
            self.bound.run(self._images)  # compiles, which a recording must not
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            # torch's own stream for recordings is on whichever device recorded first. Another
            # thread may allocate meanwhile: that is not this recording's business.
            stream = torch.cuda.Stream(device)
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self.bound.run(self._images)
        return graph
