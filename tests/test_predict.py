"""`bench model --predict CARD`: a roofline from counted FLOPs and bytes, and said to be one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from alexnet_triton.bench.__main__ import main
from alexnet_triton.bench.measure.predict import RooflinePrediction, predict
from alexnet_triton.engine.devices.cards import CARDS
from alexnet_triton.engine.zoo import network

Capture = pytest.CaptureFixture[str]


def prediction(card: str = "h200", dtype: str = "fp16", batch: int = 256) -> RooflinePrediction:
    return predict(network("alexnet"), CARDS[card], dtype, batch)


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("dtype", ["fp16", "tf32", "fp32"])
def test_a_step_takes_as_long_as_its_slower_roof(card: str, dtype: str) -> None:
    found = prediction(card, dtype)
    assert [step.name for step in found.steps] == [
        *("input", "conv1", "pool1", "conv2", "pool2", "conv3", "conv4", "conv5", "pool5"),
        *("fc6", "fc7", "fc8"),
    ]
    for step in found.steps:
        assert step.compute_us == pytest.approx(step.flops / CARDS[card].flops[dtype] * 1e6)
        assert step.memory_us == pytest.approx(step.bytes / CARDS[card].memory * 1e6)
        assert step.us == max(step.compute_us, step.memory_us)
        assert step.us == (step.compute_us if step.roof == "compute" else step.memory_us)
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


def test_pixels_are_fewer_bytes() -> None:
    net, card = network("alexnet"), CARDS["h200"]
    floats, pixels = (predict(net, card, "fp16", 8, kind) for kind in (False, True))
    image = 8 * 3 * 224 * 224
    assert floats.steps[0].bytes - pixels.steps[0].bytes == image
    assert "uint8" in pixels.input


def test_the_heading_says_that_nothing_was_measured(capsys: Capture) -> None:
    assert main(["model", "--predict", "h200", "--batch", "1", "64"]) == 0
    out = capsys.readouterr().out
    assert out.count("PREDICTION, not a measurement: alexnet") == 2
    assert "on H200" in out
    assert "predicted: " in out


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


def test_refusals_are_one_line(capsys: Capture) -> None:
    for wrong in (["--dtype", "fp8"], ["--batch", "0"]):
        assert main(["model", "--predict", "h200", *wrong]) == 1
        assert "wanted" in capsys.readouterr().err
