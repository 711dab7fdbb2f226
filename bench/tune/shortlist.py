"""The closed list that a step's default was chosen from, in the order of what the model says.

A card that is lent for minutes has no time for a space of thousands. What a kernel's `candidates`
yield compiles cleanly, and of it `kernels/cost.py` has chosen the default; what that rests on above
all is how fast operands arrive from the L2 cache, which can be measured in a second.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace

import torch

from ...engine.plan import Arithmetic, KernelConfig, Step
from ...kernels import conv, cost, first_layer, gemm
from ...kernels.jit import power_of_two
from ..measure.predict import estimate
from .space import Config

INTERPRETED = 90  # whose list the interpreter gets


def shortlist(
    step: Step, arithmetic: Arithmetic, arch: int | None, fill: float | None = None
) -> list[Config]:
    """The candidates of a step on compute capability `arch`, the cheapest first.

    `fill` is the card's measured bytes of operands a clock and multiprocessor, None: as the model
    assumes. Empty for a step whose kernel has no such list: pools, the pass over the images, and
    products that no tensor core computes.
    """
    if arch is not None and arithmetic.dtype == torch.float32 and arithmetic.precision == "ieee":
        return []
    target = INTERPRETED if arch is None else arch
    chip = cost.chip_of(target)
    chip = chip if fill is None else replace(chip, fill=fill)

    def us(config: KernelConfig) -> float:
        return estimate(replace(step, config=config), arithmetic, chip).us

    found = dict.fromkeys(_candidates(step, arithmetic.dtype, target))
    return [asdict(config) for config in sorted(found, key=us)]


def _candidates(step: Step, dtype: torch.dtype, arch: int) -> Iterable[KernelConfig]:
    match step.shape, step.config:
        case conv.Conv2dShape() as shape, first_layer.FirstLayerConfig():
            forms: tuple[first_layer.Form, ...] = ("pointers",) if arch < 90 else ("images", "rows")
            pixel = shape.C if step.in_place else power_of_two(shape.C, 1, first_layer.LARGEST)
            return (
                config
                for form in forms
                if not step.in_place or first_layer.whole(shape, form)
                for config in first_layer.candidates(shape, pixel, form, dtype, arch)
            )
        case conv.Conv2dShape() as shape, _:
            return conv.candidates(shape, dtype, arch)
        case gemm.LinearShape() as shape, _:
            return gemm.candidates(shape, dtype, arch)
    return ()
