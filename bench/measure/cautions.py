"""What a reader of measured times should know, told by the rows alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..records import Row

ENQUEUE_SHARE = 0.5  # of a call: beyond it the GPU may wait for the host
SPREAD = 0.05  # p80 - p20, of the median
UNKNOWN = "not known"


def cautions(rows: Sequence[Row]) -> tuple[str, ...]:
    """What should be known about these times, one line each."""
    ours = [row for row in rows if row.ours and row.median_us is not None]
    return (*_late_hosts(ours), *_restless(ours), *_throttled(rows))


def _late_hosts(ours: Sequence[Row]) -> Iterator[str]:
    for row in ours:
        share = (row.enqueue_us or 0.0) / (row.median_us or 1.0)
        if row.batch == 1 and share > ENQUEUE_SHARE:
            yield (
                f"{row.name}: the host takes {row.enqueue_us:.1f} us to enqueue a run, "
                f"{share:.0%} of the call: the GPU may wait for the host"
            )


def _restless(ours: Sequence[Row]) -> Iterator[str]:
    for row in ours:
        if row.median_us is None or row.p20_us is None or row.p80_us is None:
            continue
        spread = (row.p80_us - row.p20_us) / row.median_us
        if spread > SPREAD:
            yield (
                f"{row.name}: p80 - p20 is {spread:.0%} of the median: "
                "clocks move, or the machine is shared"
            )


def _throttled(rows: Sequence[Row]) -> Iterator[str]:
    """By what the device was held down, and in how many rows."""
    for limits in dict.fromkeys(row.throttled for row in rows if row.throttled):
        held = sum(row.throttled == limits for row in rows)
        what = "the device's state is" if limits.startswith(UNKNOWN) else "its clocks held down by"
        yield f"{what} {limits}, in {held} row{'' if held == 1 else 's'}"
