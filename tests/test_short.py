"""Closed lists: what a default is chosen from, by what the model expects of the fill measured."""

from __future__ import annotations

from dataclasses import asdict

import pytest
from alexnet_triton.bench.measure.fill import assumed
from alexnet_triton.bench.tune.short import short_list
from alexnet_triton.engine.devices.planner import Planner
from alexnet_triton.engine.plan import ARITHMETIC, Step
from alexnet_triton.engine.zoo import ALEXNET

FP16 = ARITHMETIC["fp16"]


def step(name: str, batch: int, dtype: str = "fp16") -> Step:
    planner = Planner(ALEXNET, ARITHMETIC[dtype], 90)
    return next(each for each in planner(batch).steps if each.name == name)


@pytest.mark.parametrize("name", ["conv1", "conv2", "conv4", "fc6"])
@pytest.mark.parametrize("batch", [1, 256])
def test_the_default_stands_first_until_the_fill_is_measured(name: str, batch: int) -> None:
    tuned = step(name, batch)
    assert tuned.config is not None
    listed = short_list(tuned, FP16, 90, assumed(90, ""))
    assert listed[0] == asdict(tuned.config)
    assert 1 < len(listed) <= 12
    keys = [sorted(config.items()) for config in listed]
    assert all(keys.count(key) == 1 for key in keys)
    measured = short_list(tuned, FP16, 90, assumed(90, "", 56.0))
    assert sorted(sorted(config.items()) for config in measured) == sorted(keys)


def test_a_faster_fill_changes_the_order() -> None:
    """Tiles that save operands are no longer worth what they cost."""
    slow, fast = (short_list(step("conv2", 256), FP16, 90, assumed(90, "", f)) for f in (32, 64))
    assert slow != fast


def test_what_has_no_list() -> None:
    chip = assumed(90, "")
    assert short_list(step("pool1", 1), FP16, 90, chip) == []
    assert short_list(step("conv4", 1, "fp32"), ARITHMETIC["fp32"], 90, chip) == []
    assert short_list(step("conv4", 1), FP16, None, chip) == []
