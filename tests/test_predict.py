"""`bench model --predict CARD`: a roofline from counted FLOPs and bytes, and said to be one."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from alexnet_triton.bench.__main__ import main
from alexnet_triton.bench.measure.predict import RooflinePrediction, estimate, predict
from alexnet_triton.bench.measure.problem import network_problem, ready, tensors
from alexnet_triton.engine.devices.cards import CARDS
from alexnet_triton.engine.devices.planner import Planner
from alexnet_triton.engine.plan import ARITHMETIC
from alexnet_triton.engine.zoo import network
from alexnet_triton.kernels.cost import A100, H200
from alexnet_triton.kernels.lrn import LRNShape
from alexnet_triton.kernels.softmax import SoftmaxShape

Capture = pytest.CaptureFixture[str]


def prediction(card: str = "h200", dtype: str = "fp16", batch: int = 256) -> RooflinePrediction:
    return predict(network("alexnet"), CARDS[card], dtype, batch)


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("dtype", ["fp16", "tf32", "fp32"])
def test_a_step_takes_as_long_as_its_slower_roof(card: str, dtype: str) -> None:
    found = prediction(card, dtype)
    assert [step.name for step in found.steps] == [
        *("conv1", "pool1", "conv2", "pool2", "conv3", "conv4", "conv5", "pool5"),
        *("fc6", "fc7", "fc8"),
    ], "images in the arithmetic's dtype, channels last, are read in place"
    for step in found.steps:
        assert step.compute_us == pytest.approx(step.flops / CARDS[card].flops[dtype] * 1e6)
        assert step.memory_us == pytest.approx(step.bytes / CARDS[card].memory * 1e6)
        assert step.us == max(step.compute_us, step.memory_us)
        assert step.us == (step.compute_us if step.roof == "compute" else step.memory_us)
        assert step.us <= step.estimate_us < math.inf
        assert step.launches >= 1
    assert found.estimate_us == pytest.approx(sum(step.estimate_us for step in found.steps))
    assert found.launches == sum(step.launches for step in found.steps)
    assert found.us == pytest.approx(sum(step.us for step in found.steps))
    assert found.images_per_second == pytest.approx(256e6 / found.us)
    assert sum(map(found.share, found.steps)) == pytest.approx(1)
    assert found.fused_us < found.us


def test_one_image_waits_for_its_weights() -> None:
    found = {step.name: step for step in prediction(batch=1).steps}
    assert found["fc6"].roof == found["fc7"].roof == found["fc8"].roof == "memory"
    weights = 4096 * 9216 + 4096
    assert found["fc6"].bytes == 2 * (weights + 9216 + 4096)
    assert found["fc6"].flops == 2 * 4096 * 9216
    assert {step.name: step.roof for step in prediction(batch=256).steps}["fc6"] == "compute"


@pytest.mark.parametrize("batch", [1, 100, 256])
@pytest.mark.parametrize("name", ["alexnet", "alexnet2012", "vgg11"])
def test_estimates_are_of_the_programs_that_are_launched(name: str, batch: int) -> None:
    """Launch by launch, against what is bound; a stream's programs are nobody's."""
    planner = Planner(network(name), ARITHMETIC["fp16"], 90)
    problem = network_problem(planner, "fp16", batch)
    bound = dict(ready(problem, tensors(problem, "meta")).launches)
    chip = H200
    for step in problem.plan.steps:
        found, launches = estimate(step, planner.arithmetic, chip), bound[step.name]
        assert found.launches == len(found.tiles) == len(launches), step.name
        for cut, launch in zip(found.tiles, launches, strict=True):
            if not isinstance(step.shape, LRNShape | SoftmaxShape):
                assert cut.programs == math.prod(launch.grid), step.name
            assert cut.warps == launch.num_warps, step.name
            if cut.columns:
                assert cut.stages == launch.num_stages, step.name
    told = predict(network(name), CARDS["h200"], "fp16", batch)
    assert told.launches == sum(map(len, bound.values()))


def test_a_launch_in_the_tail_of_another_costs_less() -> None:
    planner = Planner(network("alexnet"), ARITHMETIC["fp16"], 90)
    chip = H200
    pool = next(step for step in planner(1).steps if step.name == "pool5")
    alone, after = (
        estimate(pool, planner.arithmetic, each)
        for each in (chip, replace(chip, launch_us=chip.dependent_us))
    )
    assert alone.us - after.us == pytest.approx(chip.launch_us - chip.dependent_us)


def test_pixels_take_a_pass_of_their_own() -> None:
    net, card = network("alexnet"), CARDS["h200"]
    floats, pixels = (predict(net, card, "fp16", 8, kind) for kind in (False, True))
    read, *rest = pixels.steps
    assert (read.name, read.bytes) == ("input", 8 * 224 * 224 * (3 + 2 * 4))
    assert [step.name for step in rest] == [step.name for step in floats.steps]
    assert "uint8" in pixels.input


def test_the_heading_says_that_nothing_was_measured(capsys: Capture) -> None:
    assert main(["model", "--predict", "h200", "--batch", "1", "64"]) == 0
    out = capsys.readouterr().out
    assert out.count("PREDICTION, not a measurement: alexnet") == 2
    assert "on H200" in out
    assert "predicted: " in out
    assert "estimated: " in out
    assert "limited by" in out
    for assumed in ("132 multiprocessors", "1.755 GHz", "2,048", "32 bytes", "4,500", "1.3 us"):
        assert out.count(assumed) == 2


def test_json_alone_and_in_a_file(capsys: Capture, tmp_path: Path) -> None:
    common = ["model", "vgg11", "--predict", "a100", "--batch", "2", "--dtype", "bf16", "fp32"]
    assert main([*common, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    kept = tmp_path / "prediction.json"
    assert main([*common, "--json", str(kept)]) == 0
    assert capsys.readouterr().out == ""
    assert json.loads(kept.read_text()) == printed
    first, second = printed["predictions"]
    assert first["prediction"] is True
    assert (first["card"], first["dtype"], second["dtype"]) == ("A100 80GB", "bf16", "fp32")
    assert first["us"] == pytest.approx(sum(step["us"] for step in first["steps"]))
    assert second["us"] > first["us"]
    assert first["assumed"]["fill"] == A100.fill
    assert first["estimate_us"] == pytest.approx(sum(s["estimate_us"] for s in first["steps"]))
    assert first["launches"] == sum(step["launches"] for step in first["steps"])
    assert {"operand fill", "memory"} & {step["limit"] for step in first["steps"]}
