"""What was to be reached, held against what was measured.

Worked out from rows and roofs alone, so that a stored run can be judged as well as a fresh one. The
goals are AlexNet's on a GPU; the clock is that of graph replay, in which the host has no part.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ...engine.spec import Conv2d, Linear
from ...engine.zoo import network as network_named
from ..measure.roofline import COPY
from ..measure.summary import ENQUEUE_SHARE, GPU_CLOCK, enqueue_share, gpu_us
from ..records import OURS, Row, best_peer, times_best_peer

NETWORK = "alexnet"
LARGE = 256  # images, from where throughput counts
TIMES_PEER_LARGE = 1.5
SHARE_OF_ROOF = 0.6
TIMES_PEER_SINGLE = 2.0
TIMES_WEIGHT_STREAM = 2.0
LAYER_BATCHES = (1, 8, 64, 256, 1024, 4096)
BF16_SLOWER = 0.03


@dataclass(frozen=True, slots=True)
class Verdict:
    """One goal: whether it was reached, None where it was not measured, and the figures."""

    goal: str
    met: bool | None
    figures: str

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        return asdict(self)

    def __str__(self) -> str:
        word = {True: "yes", False: "NO", None: "not measured"}[self.met]
        return f"{self.goal}: {word}" + (f" ({self.figures})" if self.figures else "")


def verdicts(rows: Sequence[Row], roofs: Mapping[str, float]) -> tuple[Verdict, ...]:
    """The goals one by one, on fp16 images given as floats where a goal says no other."""
    found = _ours(rows, "model", "fp16")
    large = [row for row in found if row.batch >= LARGE]
    single = [row for row in found if row.batch == 1]
    return (
        _ahead(f"images/s >= {TIMES_PEER_LARGE}x best peer", large, rows, TIMES_PEER_LARGE),
        _near_the_roof(large, roofs),
        _ahead("batch 1 in half the best peer's time", single, rows, TIMES_PEER_SINGLE),
        _streams(single, roofs),
        _layers(rows),
        _bf16(found, rows),
        _enqueue(single, rows),
    )


# --- goal by goal ----------------------------------------------------------------------------


def _ahead(goal: str, mine: Sequence[Row], rows: Sequence[Row], wanted: float) -> Verdict:
    """Each of these rows against the best peer of its race."""
    ratios = {row.batch: times_best_peer(row, rows) for row in mine}
    known = {batch: ratio for batch, ratio in ratios.items() if ratio is not None}
    words = []
    for row in mine:
        peer = best_peer(row, rows)
        if row.batch in known and peer is not None:
            words.append(
                f"batch {row.batch}: {_speed(row)}, {known[row.batch]:.2f}x {peer.contestant}"
            )
    return Verdict(goal, _all(ratio >= wanted for ratio in known.values()), "; ".join(words))


def _near_the_roof(large: Sequence[Row], roofs: Mapping[str, float]) -> Verdict:
    """Images a second against the measured matrix rate over the products of one image."""
    goal = f"batch {LARGE} and up at {SHARE_OF_ROOF:.0%} of the card's own fp16 matrix rate"
    if "fp16" not in roofs:
        return Verdict(goal, None, "")
    possible = roofs["fp16"] / _flops_per_image()
    shares = {row.batch: (row.images_per_second or 0.0) / possible for row in large}
    words = [f"batch {batch}: {share:.0%}" for batch, share in shares.items()]
    met = _all(share >= SHARE_OF_ROOF for share in shares.values())
    return Verdict(goal, met, f"{'; '.join(words)} of {possible:,.0f} images/s" if words else "")


def _streams(single: Sequence[Row], roofs: Mapping[str, float]) -> Verdict:
    """Latency against one reading of what a run must read, nearly all of it weights."""
    goal = f"batch 1 within {TIMES_WEIGHT_STREAM:g}x of streaming the weights once"
    if COPY not in roofs or not single:
        return Verdict(goal, None, "")
    (row, *_) = single
    stream = row.bytes / roofs[COPY] * 1e6
    ratio = (row.median_us or 0.0) / stream
    figures = f"{row.median_us:.1f} us, {ratio:.2f}x {stream:.1f} us"
    return Verdict(goal, ratio <= TIMES_WEIGHT_STREAM, figures)


def _layers(rows: Sequence[Row]) -> Verdict:
    """Every convolution and linear layer at every batch, alone or with what is fused to it."""
    goal = "each layer at least as fast as the best peer"
    network = network_named(NETWORK)
    names = [name for name, layer in network.layers if isinstance(layer, Conv2d | Linear)]
    ratios: dict[tuple[str, int], float] = {}
    for row in _ours(rows, "layers", "fp16"):
        ratio = times_best_peer(row, rows)
        if ratio is not None and row.problem.split("+")[0] in names:
            ratios[row.problem, row.batch] = ratio
    missing = [
        f"{name} batch {batch}"
        for name in names
        for batch in LAYER_BATCHES
        if not any(p.split("+")[0] == name and b == batch for p, b in ratios)
    ]
    behind = [f"{p} batch {b} {ratio:.2f}x" for (p, b), ratio in ratios.items() if ratio < 1]
    words = [f"{len(ratios) - len(behind)} of {len(ratios)}"] if ratios else []
    words += [f"behind: {', '.join(behind)}"] if behind else []
    words += [f"not measured: {_listed(missing)}"] if ratios and missing else []
    met = False if behind else (None if missing else True)
    return Verdict(goal, met, "; ".join(words))


def _bf16(half: Sequence[Row], rows: Sequence[Row]) -> Verdict:
    """The same batches in bfloat16; the other dtypes are reported."""
    goal = f"bf16 within {BF16_SLOWER:.0%} of fp16"
    fp16 = {row.batch: row.median_us for row in half if row.median_us}
    ratios: dict[str, dict[int, float]] = {}
    for dtype in ("bf16", "tf32", "fp32"):
        taken = {row.batch: row.median_us for row in _ours(rows, "model", dtype) if row.median_us}
        ratios[dtype] = {b: us / fp16[b] for b, us in taken.items() if b in fp16}
    words = [
        f"{dtype} takes " + ", ".join(f"{ratio:.2f}x at batch {b}" for b, ratio in of.items())
        for dtype, of in ratios.items()
        if of
    ]
    met = _all(ratio <= 1 + BF16_SLOWER for ratio in ratios["bf16"].values())
    return Verdict(goal, met, "; ".join(words))


def _enqueue(single: Sequence[Row], rows: Sequence[Row]) -> Verdict:
    """The host's share of a single image."""
    goal = f"enqueueing takes under {ENQUEUE_SHARE:.0%} of the GPU's time at batch 1"
    for row in rows:
        if any(row.race[:-1] == mine.race[:-1] for mine in single) and row.contestant == OURS:
            share = enqueue_share(row, rows)
            if share is not None:
                figures = f"{row.enqueue_us:.1f} us of {gpu_us(row, rows):.1f} us, {share:.0%}"
                return Verdict(goal, share < ENQUEUE_SHARE, figures)
    return Verdict(goal, None, "")


# --- words and rows --------------------------------------------------------------------------


def _ours(rows: Iterable[Row], section: str, dtype: str) -> list[Row]:
    """Our right and timed rows of the network by the goals' clock, small batches first."""
    found = [
        row
        for row in rows
        if row.section == section
        and row.network == NETWORK
        and row.dtype == dtype
        and row.contestant == OURS
        and row.clock == GPU_CLOCK
        and row.matched
        and row.median_us is not None
    ]
    return sorted(found, key=lambda row: row.batch)


def _flops_per_image() -> int:
    """Products of one image as everyone counts them, taps that meet padding included."""
    return 2 * sum(
        layer.macs(came)
        for _, layer, came, _ in network_named(NETWORK).walk()
        if isinstance(layer, Conv2d | Linear)
    )


def _all(reached: Iterable[bool]) -> bool | None:
    """Whether all were reached; None if there are none."""
    each = list(reached)
    return all(each) if each else None


def _speed(row: Row) -> str:
    if row.batch == 1:
        return f"{row.median_us:.1f} us"
    return f"{row.images_per_second:,.0f} images/s"


def _listed(names: Sequence[str], shown: int = 4) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
