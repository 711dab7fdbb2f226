"""Goals, summaries and warnings: the arithmetic over rows, and None where nothing was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from alexnet_triton.bench.measure.summary import enqueue_share, summaries, warnings
from alexnet_triton.bench.records import OURS, Row
from alexnet_triton.bench.report.goals import LAYER_BATCHES, Verdict, verdicts
from alexnet_triton.engine.zoo import network

GFLOP_PER_IMAGE = 1.428377088  # with the taps that meet padding, as everyone counts
ROOFS = {"fp16": 800e12, "copy": 4e12}
WEIGHTS = 122_201_680 + 303_056  # bytes of the parameters, and of one image with its logits
LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")
PEER = "cudnn conv+relu"


def row(
    us: float, contestant: str = OURS, batch: int = 1, clock: str = "graph", **more: object
) -> Row:
    """A right row of the whole network, timed without spread."""
    made = Row("model", "alexnet", "alexnet", batch, "fp16", contestant, clock, 1, WEIGHTS)
    made = replace(made, max_error=1e-4, rms_error=1e-5, tolerance=1e-3)
    made = replace(made, median_us=us, p20_us=us, p80_us=us, runs=25)
    return replace(made, **more)  # type: ignore[arg-type]


def layer(us: float, problem: str, contestant: str = OURS, batch: int = 1) -> Row:
    return row(us, contestant, batch, section="layers", problem=problem)


def judged(rows: Sequence[Row], words: str) -> Verdict:
    (found,) = (verdict for verdict in verdicts(rows, ROOFS) if words in verdict.goal)
    return found


def test_nothing_measured_is_no_verdict() -> None:
    assert [verdict.met for verdict in verdicts((), {})] == [None] * 7
    digits = [row(10, network="digits", problem="digits"), row(10, clock="host")]
    pixels = [row(10, network="alexnet uint8", problem="alexnet uint8")]
    unmatched = [row(10, max_error=1.0), row(10, batch=256, median_us=None)]
    for rows in (digits, pixels, unmatched):
        assert [verdict.met for verdict in verdicts(rows, ROOFS)] == [None] * 7
    assert str(verdicts((), {})[0]).endswith("not measured")


@pytest.mark.parametrize(("peer", "met"), [(1500, True), (1499, False)])
def test_throughput_against_the_best_peer(peer: float, met: bool) -> None:
    rows = [
        *(row(1000, batch=256), row(peer, PEER, 256), row(9000, "torch", 256)),
        *(row(1000, batch=1024), row(1600, PEER, 1024)),
        *(row(1000, batch=64), row(10, PEER, 64)),  # throughput does not count there
        row(1, "torch NCHW", 256, straw_man=True),
    ]
    found = judged(rows, "images/s >=")
    assert found.met is met
    assert "batch 256: 256,000 images/s, 1.50x cudnn conv+relu" in found.figures
    assert "batch 64" not in found.figures
    assert str(found).startswith(f"{found.goal}: {'yes' if met else 'NO'} (batch 256")


def test_share_of_the_measured_matrix_rate() -> None:
    most = 800e12 / (GFLOP_PER_IMAGE * 1e9)
    at = {share: 256e6 / (share * most) for share in (0.59, 0.61)}
    assert judged([row(at[0.61], batch=256)], "matrix rate").met is True
    found = judged([row(at[0.61], batch=256), row(4 * at[0.59], batch=1024)], "matrix rate")
    assert found.met is False
    assert found.figures == f"batch 256: 61%; batch 1024: 59% of {most:,.0f} images/s"


def test_a_single_image() -> None:
    rows = [row(50), row(101, PEER)]
    assert judged(rows, "half the best").met is True
    assert judged([row(50), row(99, PEER)], "half the best").met is False
    stream = WEIGHTS / 4e12 * 1e6
    assert judged([row(1.99 * stream)], "streaming").met is True
    found = judged([row(2.5 * stream)], "streaming")
    assert found.met is False
    assert f"2.50x {stream:.1f} us" in found.figures


def test_every_layer_counts() -> None:
    rows = [
        layer(us, name, who, batch)
        for name in (*LAYERS, "conv1+pool1")
        for batch in LAYER_BATCHES
        for who, us in ((OURS, 10.0), (PEER, 10.5))
    ]
    found = judged(rows, "each layer")
    assert found.met is True
    assert found.figures == f"{9 * 6} of {9 * 6}"
    late = layer(11, "conv4", OURS, 64)
    slow = [late if each.key == late.key else each for each in rows]
    behind = judged(slow, "each layer")
    assert behind.met is False
    assert "behind: conv4 batch 64 0.95x" in behind.figures
    part = judged(rows[:2], "each layer")
    assert part.met is None
    assert part.figures.startswith("1 of 1; not measured: conv1 batch 8")
    assert part.figures.endswith("and 43 more")


def test_other_dtypes_against_fp16() -> None:
    half = [row(100, batch=256), row(50)]
    near = [row(102, batch=256, dtype="bf16"), row(51, dtype="bf16")]
    assert judged([*half, *near], "bf16").met is True
    far = [row(104, batch=256, dtype="bf16"), row(190, batch=256, dtype="tf32")]
    found = judged([*half, *far], "bf16")
    assert found.met is False
    assert found.figures == "bf16 takes 1.04x at batch 256; tf32 takes 1.90x at batch 256"
    assert judged([*half, row(190, dtype="tf32")], "bf16").met is None


@pytest.mark.parametrize(("us", "met"), [(9.9, True), (10.1, False)])
def test_the_host_s_share(us: float, met: bool) -> None:
    rows = [row(90, clock="host", enqueue_us=us), row(30, PEER), row(50), row(70, clock="cold")]
    assert enqueue_share(rows[0], rows) == pytest.approx(us / 50)
    assert judged(rows, "enqueueing").met is met
    assert bool(warnings(rows)) is not met
    assert judged([row(90, clock="host", enqueue_us=us)], "enqueueing").met is None


def test_restless_times_are_warned_of() -> None:
    calm, restless = row(100, p20_us=98, p80_us=102), row(100, batch=8, p20_us=97, p80_us=103)
    (warning,) = warnings([calm, restless, row(9, PEER, p80_us=99)])
    assert warning.startswith("alexnet, batch 8, fp16, graph clock: p80 - p20 is 6%")


def test_summaries() -> None:
    host = row(80, clock="host", enqueue_us=5, workspace=2_000_000)
    rows = [row(50), row(100, PEER), host, row(None, batch=8)]  # type: ignore[arg-type]
    first, second = summaries(rows, ROOFS)
    assert first.images_per_second == pytest.approx(20_000)
    assert first.times_best_peer == 2
    assert first.enqueue_us is None
    assert second.enqueue_share == pytest.approx(0.1)
    assert second.weight_stream_us == pytest.approx(WEIGHTS / 4e6)
    assert second.workspace == 2_000_000
    assert "enqueued in 5.0 us, 10% of the GPU's" in str(second)
    assert "workspace 2.0 MB" in str(second)


def test_the_network_s_weights_are_what_is_streamed() -> None:
    """The bytes above are AlexNet's."""
    net = network("alexnet")
    numbers = sum(map(math.prod, net.parameter_shapes().values()))
    assert 2 * (numbers + math.prod(net.input_shape) + 1000) == WEIGHTS
