"""The order of launches: which are tried, that each is proved, that the engine follows the best."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from alexnet_triton.bench.measure.timing import Effort
from alexnet_triton.bench.records import Row
from alexnet_triton.bench.tune.schedule import (
    candidates,
    orders,
    to_follow,
    told,
    tuned_row,
)
from alexnet_triton.engine.devices.planner import Planner
from alexnet_triton.engine.plan import ARITHMETIC, PLAIN, Options
from alexnet_triton.engine.spec import Conv2d, Flatten, Linear, MaxPool2d, ReLU
from alexnet_triton.engine.zoo import ALEXNET, DIGITS
from alexnet_triton.kernels.tuning import Table

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def test_slices_are_smaller_than_the_batch_and_end_at_a_pool() -> None:
    planner = Planner(ALEXNET, ARITHMETIC["fp16"], 80)
    assert candidates(planner, 1, CUDA) == [PLAIN]
    tried = candidates(planner, 100, CUDA)
    assert tried == [PLAIN, *(Options(n, p) for n in (32, 64) for p in ("pool1", "pool2"))]
    assert told(tried[1]) == "32 images at a time to pool1"


def test_kernels_overlap_where_they_can() -> None:
    hopper = candidates(Planner(ALEXNET, ARITHMETIC["fp16"], 90), 1, CUDA)
    assert hopper == [PLAIN, Options(pdl=True)]
    assert told(hopper[1]) == "all images at once, overlapping"


@pytest.mark.interpreter
def test_every_order_is_proved_and_the_engine_follows_the_winner() -> None:
    layers = (
        *(("conv1", Conv2d(8, 3)), ("relu1", ReLU()), ("pool1", MaxPool2d(3, 2))),
        *(("conv2", Conv2d(8, 3)), ("relu2", ReLU()), ("pool2", MaxPool2d(3, 2))),
        *(("flatten", Flatten()), ("fc3", Linear(10))),
    )
    net = replace(DIGITS, input_shape=(3, 13, 13), layers=layers)
    found = orders(net, "fp32", 2, CPU, Effort(1))
    assert {row.contestant for row in found} == {
        "all images at once",
        "1 images at a time to pool1",
        "1 images at a time to pool2",
    }
    assert all(row.matched for row in found)
    times = [row.median_us or 0.0 for row in found]
    assert times == sorted(times)
    assert min(times) > 0

    def timed(options: Options, us: float) -> Row:
        (row,) = (row for row in found if row.contestant == told(options))
        return replace(row, median_us=us, p20_us=us - 1, p80_us=us + 1)

    plain, sliced = timed(PLAIN, 10.0), Options(1, "pool1")
    assert to_follow([timed(sliced, 8.5), plain]) is plain, "within the spread of both"
    best = timed(sliced, 7.5)
    assert to_follow([best, plain]) is best
    row = tuned_row(best, net, CPU)
    assert (row.op, row.dtype, row.batch) == ("run", "fp32", 2)
    planner = Planner(net, ARITHMETIC["fp32"], None, tuned=Table("cpu", (row,)), options=None)
    assert planner.options_for(2) == planner(2).options == sliced
    assert planner.options_for(5) == PLAIN, "too far from where it was measured"
    assert replace(planner, options=PLAIN)(2).options == PLAIN
