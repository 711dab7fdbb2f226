"""What plans of one network have in common, whatever the batch, and the last few of them, kept."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from ...kernels.tuning import Table, dtype_name
from ..plan import PLAIN, Arithmetic, Options, Plan, plan
from ..spec import Network, Shape


@dataclass(frozen=True, slots=True)
class Run:
    """What tables of tuned configurations know a whole network by, under the op "run"."""

    network: str
    C: int
    H: int
    W: int


@dataclass(frozen=True, slots=True)
class Planner:
    """Everything about a plan that is the same for every batch.

    `tuned` is the device's table; `options` None means as the table says.
    """

    network: Network
    arithmetic: Arithmetic
    arch: int | None
    batch_invariant: bool = False
    tuned: Table | None = None
    options: Options | None = PLAIN

    def __call__(
        self,
        batch: int,
        image_shape: Shape | None = None,
        image_dtype: torch.dtype = torch.uint8,
        keep: tuple[str, ...] = (),
        configured_for: int | None = None,
        in_place: bool = False,
    ) -> Plan:
        """The plan for this batch; raises NetworkError as `plan` does."""
        return _planned(self, batch, image_shape, image_dtype, keep, configured_for, in_place)

    def options_for(self, batch: int, image_shape: Shape | None = None) -> Options:
        """How launches follow one another for batches of this size."""
        if self.options is not None:
            return self.options
        if self.tuned is None:
            return PLAIN
        run = Run(self.network.name, *(image_shape or self.network.input_shape))
        dtype = dtype_name(self.arithmetic.dtype, self.arithmetic.precision)
        measured = self.tuned.find("run", run, dtype, batch)
        return PLAIN if measured is None else Options(**measured)


@lru_cache(maxsize=64)  # a plan costs the host more than launching it does
def _planned(
    planner: Planner,
    batch: int,
    image_shape: Shape | None,
    image_dtype: torch.dtype,
    keep: tuple[str, ...],
    configured_for: int | None,
    in_place: bool,
) -> Plan:
    return plan(
        planner.network,
        batch,
        planner.arithmetic,
        planner.arch,
        image_shape=image_shape,
        image_dtype=image_dtype,
        in_place=in_place,
        configured_for=configured_for,
        batch_invariant=planner.batch_invariant,
        keep=keep,
        tuned=planner.tuned,
        options=planner.options_for(configured_for or batch, image_shape),
    )
