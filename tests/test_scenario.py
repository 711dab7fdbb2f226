"""`bench model --scenario`: a sample a call, and streams of pixels and of files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
from alexnet_triton.bench.__main__ import main
from alexnet_triton.bench.measure import scenario, verb
from alexnet_triton.bench.records import OURS, load
from alexnet_triton.engine.run import Engine
from PIL import Image

pytestmark = pytest.mark.interpreter
Capture = pytest.CaptureFixture[str]
COMMON = ["model", "digits", "--device", "cpu"]


@pytest.fixture(autouse=True)
def roofs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told at once: to measure them takes a second, and test_roofline.py does."""
    monkeypatch.setattr(verb, "measure_roofs", lambda *_: {"fp32": 1e11, "copy": 1e10})


def test_single_stream_keeps_every_call(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scenario, "BLOCKS", 2)
    kept = tmp_path / "kept.json"
    arguments = ["--scenario", "single-stream", "--calls", "2", "--peers", "torch"]
    assert main([*COMMON, *arguments, "--json", str(kept)]) == 0
    ours, peer = load(kept).rows
    assert (ours.section, ours.batch, ours.race) == ("single-stream", 1, peer.race)
    assert ours.right
    assert ours.contestant == OURS
    assert len(ours.samples) == ours.runs == len(peer.samples) == 2
    (line,) = (line for line in capsys.readouterr().out.splitlines() if f" {OURS} " in line)
    assert f" {numpy.percentile(ours.samples, 99):.2f} " in line


def test_offline_streams_pixels_and_files(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[str, int]] = []
    stream = Engine.stream

    def watched(self: Engine, source: Iterator[object], **how: Any) -> Iterator[object]:
        items = list(source)
        sizes.append((type(items[0]).__name__, len(items)))
        return stream(self, items, **how)

    monkeypatch.setattr(Engine, "stream", watched)
    monkeypatch.setattr(scenario, "PASSES", 2)
    monkeypatch.setattr(scenario, "STREAMED", {"torch, same stream": "torch"})
    arguments = ["--scenario", "offline", "--calls", "5", "--batch", "2", "--json"]
    assert main([*COMMON, *arguments]) == 0
    pixels, files = json.loads(capsys.readouterr().out)["rows"]
    assert [row["problem"] for row in (pixels, files)] == ["digits pixels", "digits jpeg"]
    assert pixels["race"] != files["race"]
    assert {("Tensor", 5), ("PosixPath", 5)} == set(sizes)
    assert len(pixels["samples"]) == 2
    assert pixels["max_error"] < pixels["tolerance"]


def test_a_stream_that_loses_an_image_is_not_timed(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(folder: Path) -> list[Path]:
        (path,) = real(folder)[:1]
        path.write_bytes(b"no picture")
        return [path]

    real = scenario.pictures
    monkeypatch.setattr(scenario, "pictures", spoiled)
    monkeypatch.setattr(scenario, "STREAMED", {"torch, same stream": "torch"})
    assert main([*COMMON, "--scenario", "offline", "--calls", "2", "--json"]) == 0
    pixels, files = json.loads(capsys.readouterr().out)["rows"]
    assert pixels["median_us"] > 0
    assert files["median_us"] is None
    assert files["note"].startswith("ImageError: ")


def test_pictures_are_the_same_for_the_same_seed(tmp_path: Path) -> None:
    first = [path.read_bytes() for path in scenario.pictures(tmp_path)]
    assert len(set(first)) == len(first) == scenario.FILES
    assert [path.read_bytes() for path in scenario.pictures(tmp_path)] == first
    assert Image.open(tmp_path / "0.jpg").size == scenario.SIZE
