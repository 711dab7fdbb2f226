"""A measured network in the figures that people ask for, and what a reader of them should know.

Worked out from rows and roofs alone, so that a stored run tells the same as a fresh one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from .. import units
from ..records import COPY, OURS, Row, times_best_peer

ENQUEUE_SHARE = 0.2  # of the GPU's time: beyond it the GPU may wait for the host
SPREAD = 0.05  # p80 - p20, of the median


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """One row of ours; None where its clock does not tell."""

    network: str
    batch: int
    dtype: str
    clock: str
    images_per_second: float
    times_best_peer: float | None
    enqueue_us: float | None  # the host's part of a call
    enqueue_share: float | None  # of the GPU's time for it
    weight_stream_us: float | None  # reading what a single image needs, at the rate of a copy
    workspace: int | None  # bytes of activations

    def __str__(self) -> str:
        words = [f"{units.whole(self.images_per_second)} images/s"]
        if self.times_best_peer is not None:
            words.append(f"{self.times_best_peer:.2f}x the best peer")
        if self.enqueue_us is not None:
            share = f", {self.enqueue_share:.0%} of the GPU's" if self.enqueue_share else ""
            words.append(f"enqueued in {self.enqueue_us:.1f} us{share}")
        if self.weight_stream_us is not None:
            words.append(f"weights streamed once take {self.weight_stream_us:.1f} us")
        if self.workspace is not None:
            words.append(f"workspace {self.workspace / 1e6:.1f} MB")
        head = f"{self.network}, batch {self.batch}, {self.dtype}, {self.clock}"
        return f"{head}: {', '.join(words)}"


def summaries(rows: Sequence[Row], roofs: Mapping[str, float]) -> tuple[ModelSummary, ...]:
    """A summary of every row of ours for a whole network that was right and timed."""
    return tuple(
        ModelSummary(
            *(row.network, row.batch, row.dtype, row.clock),
            row.images_per_second or 0.0,
            times_best_peer(row, rows),
            row.enqueue_us,
            enqueue_share(row, rows),
            row.bytes / roofs[COPY] * 1e6 if row.batch == 1 and COPY in roofs else None,
            row.workspace,
        )
        for row in rows
        if row.section == "model" and row.contestant == OURS and row.median_us is not None
    )


def warnings(rows: Sequence[Row]) -> tuple[str, ...]:
    """What should be known about these times of ours, one line each."""
    ours = [row for row in rows if row.contestant == OURS and row.median_us is not None]
    return (*_late_hosts(ours), *_restless(ours))


def enqueue_share(row: Row, rows: Iterable[Row]) -> float | None:
    """The host's time to enqueue a run, as a share of what the GPU takes for it by graph replay."""
    replayed = replace(row, clock="graph").key  # the host has no part in it
    gpu = next((other.median_us for other in rows if other.key == replayed), None)
    return row.enqueue_us / gpu if row.enqueue_us is not None and gpu else None


def _late_hosts(ours: Sequence[Row]) -> Iterator[str]:
    for row in ours:
        share = enqueue_share(row, ours)
        if row.batch == 1 and share is not None and share > ENQUEUE_SHARE:
            yield (
                f"{_where(row)}: the host takes {row.enqueue_us:.1f} us to enqueue a run, "
                f"{share:.0%} of the GPU's time for it: the GPU may wait for the host"
            )


def _restless(ours: Sequence[Row]) -> Iterator[str]:
    for row in ours:
        if row.median_us is None or row.p20_us is None or row.p80_us is None:
            continue
        spread = (row.p80_us - row.p20_us) / row.median_us
        if spread > SPREAD:
            yield (
                f"{_where(row)}, {row.clock} clock: p80 - p20 is {spread:.0%} of the median: "
                "clocks move, or the machine is shared"
            )


def _where(row: Row) -> str:
    names = (row.network,) if row.section == "model" else (row.network, row.problem)
    return f"{' '.join(names)}, batch {row.batch}, {row.dtype}"
