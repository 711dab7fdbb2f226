"""What is warned of: late hosts, restless times, clocks held down."""

from __future__ import annotations

from dataclasses import replace

import pytest
from alexnet_triton.bench.measure.cautions import cautions
from alexnet_triton.bench.records import OURS, Row

PEER = "cudnn conv+relu"


def row(us: float | None, contestant: str = OURS, clock: str = "graph", **more: object) -> Row:
    """A right row of the whole network, timed without spread."""
    right = Row("model", "alexnet", "alexnet", 1, "fp16", contestant, clock, 1, 1)
    right = replace(right, max_error=1e-4, rms_error=1e-5, tolerance=1e-3)
    right = replace(right, median_us=us, p20_us=us, p80_us=us, runs=25)
    return replace(right, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(("us", "late"), [(44.9, False), (45.1, True)])
def test_the_host_s_share_of_a_call(us: float, late: bool) -> None:
    host = row(90, clock="host", enqueue_us=us)
    assert bool(cautions([host, row(30, PEER, enqueue_us=29), row(None)])) is late
    assert not cautions([replace(host, batch=8)]), "whose next call waits anyway"


def test_restless_times_are_warned_of() -> None:
    calm, restless = row(100, p20_us=98, p80_us=102), row(100, batch=8, p20_us=97, p80_us=103)
    (warning,) = cautions([calm, restless, row(9, PEER, p80_us=99)])
    assert warning.startswith("alexnet, batch 8, fp16, alexnet-triton, graph: p80 - p20 is 6%")


def test_what_held_the_clocks_down_is_told_once() -> None:
    rows = [row(1), row(2, throttled="power cap"), row(3, PEER, throttled="power cap")]
    assert cautions(rows) == ("its clocks held down by power cap, in 2 rows",)
    unknown = row(1, throttled="not known: a cpu")
    assert cautions([unknown]) == ("the device's state is not known: a cpu, in 1 row",)
