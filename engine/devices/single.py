"""One device: plans bound to packed weights, the last few batch shapes kept ready.

A card's plan is recorded as a CUDA graph, one for each batch shape. All shapes lie in one block of
memory, the size that the largest of them needs, since they never run at once.
"""

from __future__ import annotations

from collections import OrderedDict

import torch

from ..bind import Bound, State, bind, pack
from ..plan import Plan
from .graph import Recording, waiting
from .planner import Planner
from .runner import synchronize, to_nchw

BATCH_SHAPES = 8  # as many shapes of batches stay bound; the oldest makes room


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
            return {step.name: to_nchw(step, bound.outputs[step.name]) for step in kept}
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
            synchronize(self.devices)  # a graph may still run
            self._bound.popitem(last=False)
        bound = bind(planned, self._packed, memory=self._memory[: planned.workspace])
        if not recorded:
            return bound
        if not extra:
            return Recording(bound, None)
        flat = self._memory[planned.workspace :][:extra].view(images.dtype)
        dense = torch.empty_like(images, device="meta")  # no gaps or overlaps, in the same order
        return Recording(bound, flat.as_strided(images.shape, dense.stride()))

    def _forget(self) -> None:
        """Give the memory back, and all that lies in it."""
        synchronize(self.devices)  # a kernel may still write there
        self._bound.clear()
        self._memory = self._memory.new_empty(0)
