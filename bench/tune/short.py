"""The closed list of a step: what its kernel would choose a default from, the likeliest first.

Each kernel lists a dozen configurations that are worth a try on an architecture, and
`kernels/cost.py` expects a time of each. A search of the list alone takes seconds, not minutes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace

from ...engine.plan import Arithmetic, KernelConfig, Step
from ...kernels import conv, cost, first_layer, gemm
from ...kernels.conv import Conv2dShape
from ...kernels.first_layer import LARGEST, FirstLayerConfig
from ...kernels.gemm import LinearShape
from ...kernels.jit import power_of_two
from ..measure.predict import estimate
from .space import Config


def short_list(
    step: Step, arithmetic: Arithmetic, arch: int | None, chip: cost.Chip
) -> list[Config]:
    """Configurations of a step, by what they cost on `chip`; none where a kernel lists none."""
    configs: Iterable[KernelConfig] = ()
    if arch is None or (arithmetic.precision == "ieee" and arithmetic.dtype.itemsize == 4):
        return []  # nothing is compiled, or no tensor core computes it
    how = arithmetic.dtype, arch, step.block is not None and step.block.affine is not None
    match step.shape, step.config:
        case Conv2dShape() as shape, FirstLayerConfig(form=form):
            pixel = shape.C if step.in_place else power_of_two(shape.C, 1, LARGEST)
            configs = first_layer.candidates(shape, pixel, form, *how)
        case Conv2dShape() as shape, _:
            configs = conv.candidates(shape, *how)
        case LinearShape() as shape, _:
            configs = gemm.candidates(shape, *how)

    def us(config: KernelConfig) -> float:
        return estimate(replace(step, config=config), arithmetic, chip).us

    return [asdict(config) for config in sorted(dict.fromkeys(configs), key=us)]
