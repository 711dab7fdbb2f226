"""Which way to use two devices: pipeline, towers, or each with half of the batch.

A prediction from counted work alone: a step takes as long as its FLOPs at the card's matrix rate or
its bytes at its memory rate, whichever is longer, and what moves between cards moves at the link's
rate. Launch overhead and cache reuse are left out, so it ranks the ways and does not time them;
`alexnet-triton-bench pipeline` does that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..plan import Plan, Step
from ..spec import NetworkError
from ..table import Columns, heading, line
from .cards import Card
from .pipeline import balanced_cut, cut
from .planner import Planner
from .towers import exchanged, half


@dataclass(frozen=True, slots=True)
class Way:
    """One way to use the devices, for one batch; a `refusal` says why it is none."""

    name: str
    seconds: float = math.inf
    balance: float = 0.5  # the first device's share of the work
    bubble: float = 0.0  # the share of both devices' time in which one of them waits
    moved: int = 0  # bytes between the devices, for the whole batch
    weights: tuple[int, ...] = ()  # bytes on each device
    note: str = ""
    refusal: str = ""


@dataclass(frozen=True, slots=True)
class Advice:
    """All ways, and the fastest."""

    network: str
    batch: int
    card: Card
    ways: tuple[Way, ...]

    @property
    def best(self) -> Way:
        """The way with the least predicted time."""
        return min(self.ways, key=lambda way: way.seconds)

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints; a way that is none has no seconds."""
        found = asdict(self) | {"card": self.card.name, "best": self.best.name}
        for way in found["ways"]:
            way["seconds"] = way["seconds"] if math.isfinite(way["seconds"]) else None
        return found

    def __str__(self) -> str:
        columns: Columns[Way] = (
            ("way", -16, lambda way: way.name),
            ("ms", 9, lambda way: f"{way.seconds * 1e3:.3f}"),
            ("images/s", 10, lambda way: f"{self.batch / way.seconds:,.0f}"),
            (
                "balance",
                9,
                lambda way: (
                    f"{way.balance:.0%}/{1 - way.balance:.0%}" if len(way.weights) > 1 else "-"
                ),
            ),
            ("bubble", 7, lambda way: f"{way.bubble:.0%}"),
            ("moved MB", 9, lambda way: f"{way.moved / 1e6:.2f}"),
            (
                "weights MB a device",
                20,
                lambda way: " + ".join(f"{size / 1e6:.1f}" for size in way.weights),
            ),
            ("", 0, lambda way: f" {way.note}"),
        )
        refused = "{0.name:<16} not possible: {0.refusal}"
        return "\n".join(
            (
                f"{self.network}, {self.batch} images, predicted for {self.card.name} from counted "
                "work",
                heading(columns),
                *(refused.format(way) if way.refusal else line(way, columns) for way in self.ways),
                f"use: {self.best.name}",
            )
        )


def advise(planner: Planner, dtype: str, batch: int, card: Card, micro_batch: int = 64) -> Advice:
    """Compare one device with two of `card`, used in each of three ways, for `batch` images.

    `dtype` is one of NUMBERS, the planner's.
    """
    rate = card.flops[dtype]

    def time(steps: Sequence[Step]) -> float:
        return sum(max(s.work.flops / rate, s.work.bytes / card.memory) for s in steps)

    itemsize = planner.arithmetic.dtype.itemsize
    whole, halved = planner(batch), planner(-(-batch // 2))
    everything = _weights(planner, whole)
    ways = [
        Way("one device", time(whole.steps), weights=(everything,)),
        Way("half the batch", time(halved.steps), weights=(everything, everything)),
    ]

    size = min(micro_batch, batch)
    micro = planner(size)
    at = balanced_cut(micro, [time([step]) for step in micro.steps])
    stages = cut(micro, at)
    first, second = (time(stage.steps) for stage in stages)
    height, width, images, channels = stages[0].steps[-1].output
    boundary = height * width * images * channels * itemsize
    count = -(-batch // size)
    seconds = first + second + (count - 1) * max(first, second) + boundary / card.link
    ways.append(
        Way(
            "pipeline",
            seconds,
            balance=first / (first + second),
            bubble=1 - count * (first + second) / (2 * seconds),
            moved=boundary * count,
            weights=tuple(_weights(planner, stage) for stage in stages),
            note=f"cut at {at}, {count} x {size} images",
        )
    )
    try:
        tower = Planner(half(planner.network), planner.arithmetic, planner.arch)
    except NetworkError as error:
        ways.append(Way("towers", refusal=str(error)))
        return Advice(planner.network.name, batch, card, tuple(ways))
    steps = tower(batch)
    per_image = exchanged(planner.network, itemsize)
    moved = per_image * batch
    kernels = [step for step in steps.steps if step.kernel != "exchange"]
    each = _weights(tower, steps)
    seconds = time(kernels) + moved / 2 / card.link  # both directions at once
    note = f"{per_image:,} bytes exchanged an image"
    ways.append(Way("towers", seconds, moved=moved, weights=(each, each), note=note))
    return Advice(planner.network.name, batch, card, tuple(ways))


def _weights(planner: Planner, planned: Plan) -> int:
    """Bytes of the weights that a plan's steps read."""
    layers = {name for step in planned.steps for name in step.layers}
    shapes = planner.network.parameter_shapes().items()
    count = sum(math.prod(shape) for name, shape in shapes if name.split(".")[0] in layers)
    return count * planner.arithmetic.dtype.itemsize
