"""What a named card would take for a network, worked out from its plan: no card, no run.

Twice, step after step. The bound: as long as the slower of its arithmetic and its traffic at the
card's rates (S. Williams, A. Waterman, D. Patterson, "Roofline", 2009), which knows no launches and
no tiles. And the estimate of `kernels/cost.py`, which is made of them. Neither knows a cache that
keeps what passes between two steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from ...engine import table
from ...engine.devices.cards import Card
from ...engine.devices.planner import Planner
from ...engine.load import at_least_one, one_of
from ...engine.plan import ARITHMETIC, Arithmetic, GatherShape, Step
from ...engine.spec import Network
from ...kernels import channels_last, conv, cost, first_layer, gemm, pool
from ...kernels.jit import power_of_two
from .problem import network_problem


@dataclass(frozen=True, slots=True)
class PredictedStep:
    """One step: its work, the time of each roof in microseconds, and what its launches cost."""

    name: str
    kernel: str
    flops: int
    bytes: int
    compute_us: float
    memory_us: float
    estimate_us: float
    limit: str  # what limits its launches, as cost.Cost has it
    launches: int

    @property
    def us(self) -> float:
        """The slower of the two."""
        return max(self.compute_us, self.memory_us)

    @property
    def roof(self) -> Literal["compute", "memory"]:
        """Which of the two that is."""
        return "compute" if self.compute_us >= self.memory_us else "memory"


@dataclass(frozen=True, slots=True)
class RooflinePrediction:
    """All steps of a network for one batch on one card."""

    network: str
    card: str
    dtype: str
    batch: int
    input: str
    flops_rate: float  # FLOP/s
    memory_rate: float  # byte/s
    steps: tuple[PredictedStep, ...]
    fused_us: float  # if nothing that passes between steps went through memory
    assumed: cost.Chip  # what estimates are made with

    @property
    def flops(self) -> int:
        """Of all steps."""
        return sum(step.flops for step in self.steps)

    @property
    def bytes(self) -> int:
        """Of all steps."""
        return sum(step.bytes for step in self.steps)

    @property
    def us(self) -> float:
        """One step after the other."""
        return sum(step.us for step in self.steps)

    @property
    def images_per_second(self) -> float:
        """Images a second, one batch after the other."""
        return self.batch / self.us * 1e6

    @property
    def estimate_us(self) -> float:
        """One step after the other."""
        return sum(step.estimate_us for step in self.steps)

    @property
    def launches(self) -> int:
        """Of all steps."""
        return sum(step.launches for step in self.steps)

    def share(self, step: PredictedStep) -> float:
        """A step's part of the whole time."""
        return step.us / self.us

    def _columns(self) -> table.Columns[PredictedStep | RooflinePrediction]:
        """Of a step, or of the whole for the total."""

        def of_step(value: Callable[[PredictedStep], str]) -> Callable[..., str]:
            return lambda item: value(item) if isinstance(item, PredictedStep) else ""

        return (
            ("step", -8, lambda item: item.name if isinstance(item, PredictedStep) else "total"),
            ("kernel", -20, of_step(lambda step: step.kernel)),
            ("GFLOP", 10, lambda item: f"{item.flops / 1e9:.3f}"),
            ("MB", 10, lambda item: f"{item.bytes / 1e6:.2f}"),
            ("compute us", 11, of_step(lambda step: f"{step.compute_us:.2f}")),
            ("memory us", 11, of_step(lambda step: f"{step.memory_us:.2f}")),
            ("us", 11, lambda item: f"{item.us:.2f}"),
            ("share", 6, of_step(lambda step: f"{self.share(step):.1%}")),
            ("roof", -8, of_step(lambda step: step.roof)),
            ("estimate us", 12, lambda item: f"{item.estimate_us:.2f}"),
            ("launches", 8, lambda item: str(item.launches)),
            (" limited by", 0, of_step(lambda step: f" {step.limit}")),
        )

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        steps = [
            asdict(step) | {"us": step.us, "roof": step.roof, "share": self.share(step)}
            for step in self.steps
        ]
        return {
            "prediction": True,
            **asdict(self),
            "steps": steps,
            "us": self.us,
            "images_per_second": self.images_per_second,
            "estimate_us": self.estimate_us,
            "estimated_images_per_second": self.batch / self.estimate_us * 1e6,
            "launches": self.launches,
        }

    def __str__(self) -> str:
        rows: list[PredictedStep | RooflinePrediction] = [*self.steps, self]
        lines = [
            f"PREDICTION, not a measurement: {self.network}, {self.batch} images ({self.input}), "
            f"{self.dtype}, on {self.card}",
            f"from counted FLOPs and bytes at {self.flops_rate / 1e12:.3g} TFLOP/s and "
            f"{self.memory_rate / 1e12:.3g} TB/s; a bound that no launch or tile is counted in",
            *_assumed(self.assumed),
            *table.columns(rows, self._columns()),
        ]
        lines.append(
            f"predicted: {self.images_per_second:,.0f} images/s; if nothing between the steps went "
            f"through memory, {self.fused_us:.2f} us and "
            f"{self.batch / self.fused_us * 1e6:,.0f} images/s"
        )
        lines.append(
            f"estimated: {self.batch / self.estimate_us * 1e6:,.0f} images/s in {self.launches} "
            "launches"
        )
        return "\n".join(lines)


def _assumed(chip: cost.Chip) -> tuple[str, ...]:
    """Every number of a Chip, in lines."""
    return (
        f"estimates assume {chip.multiprocessors} multiprocessors at {chip.clock / 1e9:.3f} GHz, "
        f"memory at {chip.memory / 1e12:.3g} TB/s, {chip.launch_us:g} us a launch and "
        f"{chip.dependent_us:g} where they overlap;",
        f"of a multiprocessor in a clock {chip.matrix:,g} multiply-accumulates of halves, half as "
        f"many in tf32, {chip.fma:g} in fp32, {chip.fill:g} bytes from the L2 cache, up to "
        f"{chip.port:g} if few ask,",
        f"{chip.shared:g} bytes of its {chip.shared_memory // 1024} KB of shared memory and "
        f"{chip.issue:g} instructions of warps, each of which loses {chip.barriers:g} in a step;",
        f"of a program {chip.around:,g} clocks of prologue and epilogue, and {chip.latency:,g} "
        "from asking for a tile to having it",
    )


def estimate(
    step: Step, arithmetic: Arithmetic, chip: cost.Chip, images: torch.dtype | None = None
) -> cost.Cost:
    """What the launches of a step cost; `images` is the dtype of those that the pass reads."""
    dtype, precision = arithmetic.dtype, arithmetic.precision
    match step.shape, step.config:
        case conv.Conv2dShape() as shape, first_layer.FirstLayerConfig() as config:
            pixel = shape.C if step.in_place else power_of_two(shape.C, 1, first_layer.LARGEST)
            return cost.first_layer_cost(shape, pixel, config, dtype, precision, chip)
        case conv.Conv2dShape() as shape, config:
            return cost.conv_cost(shape, config, dtype, precision, chip)
        case gemm.LinearShape() as shape, config:
            return cost.linear_cost(shape, config, dtype, precision, chip)
        case pool.PoolShape() as shape, config:
            return cost.pool_cost(shape, config, dtype, chip)
        case channels_last.ChannelsLastShape() as shape, config:
            return cost.channels_last_cost(shape, config, images or dtype, dtype, chip)
        case GatherShape(), _:
            return cost.NOTHING
    return cost.stream_cost(step.work.bytes, chip)


def predict(
    network: Network, card: Card, dtype: str, batch: int, pixels: bool = False
) -> RooflinePrediction:
    """Bounds and estimates for the plan that `card` would get untuned; `pixels`: uint8 images.

    Raises EngineError for a dtype that is none or a batch below 1.
    """
    one_of("dtype", dtype, ARITHMETIC)
    at_least_one("batch", batch)
    planner = Planner(network, ARITHMETIC[dtype], card.arch)
    problem = network_problem(planner, dtype, batch, pixels)
    rate, chip, plan = card.flops[dtype], cost.CHIPS[card.name], problem.plan
    if plan.options.pdl:
        chip = replace(chip, launch_us=chip.dependent_us)
    steps = []
    for step in plan.steps:
        compute, memory = (step.work.flops / rate * 1e6, step.work.bytes / card.memory * 1e6)
        found = estimate(step, plan.arithmetic, chip, torch.uint8 if pixels else None)
        steps.append(
            PredictedStep(
                *(step.name, step.kernel, step.work.flops, step.work.bytes, compute, memory),
                # Rates are the best that was measured, but a multiprocessor multiplies faster.
                estimate_us=max(compute, memory, found.us),
                limit=found.limit if found.us >= compute else "matrix",
                launches=found.launches,
            )
        )
    least, images = problem.work, str(problem.plan.arithmetic.dtype).removeprefix("torch.")
    return RooflinePrediction(
        *(network.name, card.name, dtype, batch, "uint8 pixels" if pixels else f"{images} images"),
        *(rate, card.memory, tuple(steps)),
        fused_us=1e6 * max(least.flops / rate, least.bytes / card.memory),
        assumed=chip,
    )
