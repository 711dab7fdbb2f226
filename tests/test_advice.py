"""Advice on two devices: its arithmetic, and that it ranks by it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from alexnet_triton.engine.__main__ import main
from alexnet_triton.engine.devices.advice import Advice, Way, advise
from alexnet_triton.engine.devices.cards import CARDS
from alexnet_triton.engine.devices.planner import Planner
from alexnet_triton.engine.plan import ARITHMETIC
from alexnet_triton.engine.zoo import network

H200 = CARDS["h200"]


def advice(name: str, batch: int, **card: float) -> dict[str, Way]:
    planner = Planner(network(name), ARITHMETIC["fp16"], 90)
    found = advise(planner, "fp16", batch, replace(H200, **card))  # type: ignore[arg-type]
    assert isinstance(found, Advice)
    return {way.name: way for way in found.ways} | {"best": found.best}


def test_one_image_is_a_stream_of_weights_that_towers_halve() -> None:
    ways = advice("alexnet2012", 1)
    one = ways["one device"].seconds
    assert one == pytest.approx(2 * 60_965_224 / H200.memory, rel=0.1)
    assert ways["towers"].seconds == pytest.approx(one / 2, rel=0.1)
    assert ways["best"].name == "towers"
    assert sum(ways["towers"].weights) == pytest.approx(2 * 60_965_224, rel=1e-3)


def test_many_images_are_best_halved() -> None:
    ways = advice("alexnet", 4096)
    assert ways["half the batch"].seconds == pytest.approx(ways["one device"].seconds / 2, rel=0.02)
    assert ways["best"].name == "half the batch"
    pipeline = ways["pipeline"]
    assert pipeline.seconds > ways["half the batch"].seconds
    assert 0 < pipeline.bubble < 0.5
    assert sum(pipeline.weights) == sum(ways["one device"].weights)


def test_a_pipeline_of_one_micro_batch_leaves_a_device_idle_half_the_time() -> None:
    ways = advice("alexnet", 32)
    assert ways["pipeline"].bubble == pytest.approx(0.5, abs=0.05)
    assert ways["pipeline"].note.endswith("1 x 32 images")


def test_a_slow_link_speaks_against_exchange() -> None:
    fast, slow = advice("alexnet2012", 64), advice("alexnet2012", 64, link=1e9)
    moved = fast["towers"].moved
    assert moved == slow["towers"].moved == 2 * 2 * 64 * (256 * 169 + 256 * 36 + 9192) // 2
    assert slow["towers"].seconds - fast["towers"].seconds == pytest.approx(
        moved / 2 * (1 / 1e9 - 1 / H200.link)
    )
    assert slow["best"].name != "towers"


def test_towers_that_cannot_be_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "alexnet2012_caffe", "--devices", "2", "--batch", "8"]) == 0
    out = capsys.readouterr().out
    assert "towers           not possible: alexnet2012_caffe in two towers, layer norm1" in out
    assert "use: " in out


def test_plan_verb_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "alexnet2012", "--devices", "2", "--batch", "64", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["advice"]["best"] in {way["name"] for way in found["advice"]["ways"]}
    assert found["plan"]["steps"][0]["name"] == "input"
    assert main(["plan", "digits", "--batch", "4"]) == 0
    assert "digits: 4 images" in capsys.readouterr().out
