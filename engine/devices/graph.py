"""A card's plan, recorded as a CUDA graph: one launch a batch.

Launching a Triton kernel from Python takes the host some ten microseconds and AlexNet has a dozen
kernels, so at small batch the GPU would wait for the host. A graph is enqueued at once. It reads
the images from a place of its own, into which each batch is copied first. For many images that copy
would cost the GPU more than a launch costs the host: then the first step is launched as it is, on
the caller's images, and the graph is what follows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ...kernels.jit import ALONE, Launch
from ..bind import Bound
from ..plan import Plan

COPIED = 8 * 2**20  # bytes of images: as many are copied in the time of two launches


def waiting(planned: Plan, size: int) -> int:
    """Bytes that a recording wants for a batch of images of `size` bytes to wait in."""
    return size if planned.sliced or size <= COPIED else 0


class Recording:
    """One bound plan, run by replaying its graph; recorded on the first run.

    `images` [N, C, H, W] is where the graph finds its batch: it belongs to the recording. None: the
    first step is no part of the graph and reads the caller's. On a CPU, where the interpreter runs
    what a card would, the launches themselves are what is replayed.
    """

    def __init__(self, bound: Bound, images: torch.Tensor | None) -> None:
        self.bound = bound
        self.images = images
        self._replay: Callable[[], None] | None = None

    def run(self, images: torch.Tensor) -> None:
        """Fill the outputs from images [N, C, H, W] on the same device."""
        if self._replay is None:  # now: recording runs all once, over the first step's output
            cpu = images.device.type == "cpu"
            self._replay = self._launch if cpu else record(self._launch, images.device)
        if self.images is None:
            self.bound.first(images)()
        else:
            self.images.copy_(images, non_blocking=True)
        self._replay()

    def every_launch(self, images: torch.Tensor) -> Iterator[Launch]:
        """All that `run` runs on these images, in order."""
        return self.bound.every_launch(images)

    def _launch(self) -> None:
        """What the graph holds."""
        if self.images is None:
            self.bound.run_after_first()
        else:
            self.bound.run(self.images)


def record(launch: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """What `launch` queues on a GPU, recorded as a graph; calling the result replays it."""
    # Nobody may wait for the whole device during a recording, as each does before it begins.
    with ALONE, torch.cuda.device(device):
        launch()  # compiles, which a recording must not
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # torch's own stream for recordings is on whichever device recorded first. Another thread
        # may allocate meanwhile: that is not this recording's business.
        stream = torch.cuda.Stream(device)
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            launch()
    return graph.replay
