"""What a named card would take for a network, worked out from FLOPs and bytes: no card, no run.

Each step takes as long as the slower of its arithmetic and its traffic at the card's rates (S.
Williams, A. Waterman, D. Patterson, "Roofline", 2009), and steps follow one another. That is a
bound, not a forecast: nothing here knows launches, tiles that do not fill the card, or a cache that
keeps what passes between two steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ...engine import table
from ...engine.devices.cards import Card
from ...engine.devices.planner import Planner
from ...engine.load import at_least_one, one_of
from ...engine.plan import ARITHMETIC
from ...engine.spec import Network
from .problem import network_problem


@dataclass(frozen=True, slots=True)
class PredictedStep:
    """One step: its work and the time of each roof, in microseconds."""

    name: str
    kernel: str
    flops: int
    bytes: int
    compute_us: float
    memory_us: float

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

    def share(self, step: PredictedStep) -> float:
        """A step's part of the whole time."""
        return step.us / self.us

    def _columns(self) -> table.Columns[PredictedStep | RooflinePrediction]:
        """Of a step, or of the whole for the total."""

        def of_step(value: Callable[[PredictedStep], str]) -> Callable[..., str]:
            return lambda item: value(item) if isinstance(item, PredictedStep) else ""

        return (
            ("step", -8, lambda item: item.name if isinstance(item, PredictedStep) else "total"),
            ("kernel", -15, of_step(lambda step: step.kernel)),
            ("GFLOP", 10, lambda item: f"{item.flops / 1e9:.3f}"),
            ("MB", 10, lambda item: f"{item.bytes / 1e6:.2f}"),
            ("compute us", 11, of_step(lambda step: f"{step.compute_us:.2f}")),
            ("memory us", 11, of_step(lambda step: f"{step.memory_us:.2f}")),
            ("us", 11, lambda item: f"{item.us:.2f}"),
            ("share", 6, of_step(lambda step: f"{self.share(step):.1%}")),
            ("roof", 0, of_step(lambda step: step.roof)),
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
        }

    def __str__(self) -> str:
        rows: list[PredictedStep | RooflinePrediction] = [*self.steps, self]
        lines = [
            f"PREDICTION, not a measurement: {self.network}, {self.batch} images ({self.input}), "
            f"{self.dtype}, on {self.card}",
            f"from counted FLOPs and bytes at {self.flops_rate / 1e12:.3g} TFLOP/s and "
            f"{self.memory_rate / 1e12:.3g} TB/s; a bound that no launch or tile is counted in",
            *table.columns(rows, self._columns()),
        ]
        lines.append(
            f"predicted: {self.images_per_second:,.0f} images/s; if nothing between the steps went "
            f"through memory, {self.fused_us:.2f} us and "
            f"{self.batch / self.fused_us * 1e6:,.0f} images/s"
        )
        return "\n".join(lines)


def predict(
    network: Network, card: Card, dtype: str, batch: int, pixels: bool = False
) -> RooflinePrediction:
    """The roofline of every step of the plan that `card` would get; `pixels`: uint8 images.

    Raises EngineError for a dtype that is none or a batch below 1.
    """
    one_of("dtype", dtype, ARITHMETIC)
    at_least_one("batch", batch)
    planner = Planner(network, ARITHMETIC[dtype], card.arch)
    problem = network_problem(planner, dtype, batch, pixels)
    rate = card.flops[dtype]
    steps = tuple(
        PredictedStep(
            *(step.name, step.kernel, step.work.flops, step.work.bytes),
            compute_us=step.work.flops / rate * 1e6,
            memory_us=step.work.bytes / card.memory * 1e6,
        )
        for step in problem.plan.steps
    )
    least, images = problem.work, str(problem.plan.arithmetic.dtype).removeprefix("torch.")
    return RooflinePrediction(
        *(network.name, card.name, dtype, batch, "uint8 pixels" if pixels else f"{images} images"),
        *(rate, card.memory, steps),
        fused_us=1e6 * max(least.flops / rate, least.bytes / card.memory),
    )
