"""One device: plans bound to packed weights, the last few batch shapes kept ready.

A card's plan is recorded as a CUDA graph, one for each batch shape. All shapes lie in one block of
memory, the size that the largest of them needs, since they never run at once.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch

from ...kernels import first_layer
from ..bind import Bound, State, bind, pack
from ..plan import Plan
from .graph import Recording, waiting
from .planner import Planner
from .runner import as_nchw, synchronize

BATCH_SHAPES = 8  # as many shapes of batches stay bound; the oldest makes room


@dataclass(frozen=True, slots=True)
class Call:
    """What runs batches of one shape, and where it leaves their outputs, as the caller sees them.

    All that can be decided before a batch comes is decided here: a run only launches.
    """

    launches: Bound | Recording
    outputs: dict[str, torch.Tensor]  # of the steps that are kept


class Single:
    """The Triton kernels on one device."""

    def __init__(self, planner: Planner, state: State, device: torch.device) -> None:
        self.planner = planner
        self.devices = (device,)
        self._packed = pack(planner.network, state, planner.arithmetic, device)
        self._ready: OrderedDict[object, Call] = OrderedDict()
        self._memory = torch.empty(0, dtype=torch.uint8, device=device)

    def run(
        self, images: torch.Tensor, keep: tuple[str, ...], configured_for: int
    ) -> dict[str, torch.Tensor]:
        """Outputs of the steps in `keep`; a new batch shape is planned and bound first."""
        try:
            ready = self.ready(images, keep, configured_for)
            ready.launches.run(images)
        except torch.cuda.OutOfMemoryError:
            self._forget()  # or a smaller batch would find the memory still taken
            raise
        return ready.outputs

    def ready(self, images: torch.Tensor, keep: tuple[str, ...], configured_for: int) -> Call:
        """What runs batches of this shape: planned and bound now, or kept from before."""
        begins = images.data_ptr() % 16  # where other than at zero, images are not read in place
        key = (images.shape, images.stride(), images.dtype, begins, keep, configured_for)
        ready = self._ready.get(key)
        if ready is None:
            shape = tuple(images.shape[1:])
            # A graph may read a copy, dense in the same order, instead of what the caller cropped.
            read = images, torch.empty_like(images, device="meta")
            dtype = self.planner.arithmetic.dtype
            in_place = all(first_layer.in_place(x, dtype) for x in read)
            planned = self.planner(len(images), shape, images.dtype, keep, configured_for, in_place)
            ready = self._ready[key] = self._bind(planned, images, keep)
        self._ready.move_to_end(key)
        return ready

    def _bind(self, planned: Plan, images: torch.Tensor, keep: tuple[str, ...]) -> Call:
        recorded = planned.arch is not None  # a card's plan, whatever runs it
        extra = waiting(planned, images.nbytes) if recorded else 0
        if planned.workspace + extra > len(self._memory):
            self._forget()
            self._memory = self._memory.new_empty(planned.workspace + extra)
        elif len(self._ready) >= BATCH_SHAPES:
            synchronize(self.devices)  # a graph may still run
            self._ready.popitem(last=False)
        bound = bind(planned, self._packed, memory=self._memory[: planned.workspace])
        kept = (step for step in planned.steps if step.name in keep)
        outputs = {step.name: as_nchw(step, bound.outputs[step.name]) for step in kept}
        if not recorded:
            return Call(bound, outputs)
        if not extra:
            return Call(Recording(bound, None), outputs)
        flat = self._memory[planned.workspace :][:extra].view(images.dtype)
        dense = torch.empty_like(images, device="meta")  # no gaps or overlaps, in the same order
        return Call(Recording(bound, flat.as_strided(images.shape, dense.stride())), outputs)

    def _forget(self) -> None:
        """Give the memory back, and all that lies in it."""
        synchronize(self.devices)  # a kernel may still write there
        self._ready.clear()
        self._memory = self._memory.new_empty(0)
