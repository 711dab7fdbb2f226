"""Summaries and warnings: the arithmetic over rows, and None where nothing was measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
from alexnet_triton.bench.measure.summary import enqueue_share, summaries, warnings
from alexnet_triton.bench.records import OURS, Row

ROOFS = {"fp16": 800e12, "copy": 4e12}
BYTES = 122_504_736  # AlexNet's parameters in fp16, one image and its logits
PEER = "cudnn conv+relu"


def row(
    us: float | None, contestant: str = OURS, batch: int = 1, clock: str = "graph", **more: object
) -> Row:
    """A right row of the whole network, timed without spread."""
    made = Row("model", "alexnet", "alexnet", batch, "fp16", contestant, clock, 1, BYTES)
    made = replace(made, max_error=1e-4, rms_error=1e-5, tolerance=1e-3)
    made = replace(made, median_us=us, p20_us=us, p80_us=us, runs=25)
    return replace(made, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(("us", "calm"), [(9.9, True), (10.1, False)])
def test_the_host_s_share(us: float, calm: bool) -> None:
    rows = [row(90, clock="host", enqueue_us=us), row(30, PEER), row(50), row(70, clock="cold")]
    assert enqueue_share(rows[0], rows) == pytest.approx(us / 50)
    assert bool(warnings(rows)) is not calm
    assert enqueue_share(rows[0], rows[:1]) is None


def test_restless_times_are_warned_of() -> None:
    calm, restless = row(100, p20_us=98, p80_us=102), row(100, batch=8, p20_us=97, p80_us=103)
    (warning,) = warnings([calm, restless, row(9, PEER, p80_us=99)])
    assert warning.startswith("alexnet, batch 8, fp16, graph clock: p80 - p20 is 6%")


def test_summaries() -> None:
    host = row(80, clock="host", enqueue_us=5, workspace=2_000_000)
    first, second = summaries([row(50), row(100, PEER), host, row(None, batch=8)], ROOFS)
    assert first.images_per_second == pytest.approx(20_000)
    assert first.times_best_peer == 2
    assert first.enqueue_us is None
    assert second.enqueue_share == pytest.approx(0.1)
    assert second.weight_stream_us == pytest.approx(BYTES / 4e6)
    assert second.workspace == 2_000_000
    assert "enqueued in 5.0 us, 10% of the GPU's" in str(second)
    assert "workspace 2.0 MB" in str(second)
