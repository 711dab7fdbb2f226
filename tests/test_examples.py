"""The examples do what they say, small and without a download; Ray's is in test_ray.py."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from alexnet_triton import LPIPS
from alexnet_triton.bench.__main__ import main as bench
from alexnet_triton.bench.race import contestant
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"

Capture = pytest.CaptureFixture[str]


def test_lpips_of_two_folders(tmp_path: Path, capsys: Capture) -> None:
    """Two sizes, an image that is the same in both folders, and one that is in one alone."""
    numbers = np.random.default_rng(0)
    made = {}
    for name, side in (("b.png", 40), ("a.png", 33), ("same.png", 40)):
        made[name] = [numbers.integers(0, 256, (side, side, 3), np.uint8) for _ in range(2)]
    made["same.png"][1] = made["same.png"][0]
    for at, folder in enumerate(("first", "second")):
        (tmp_path / folder).mkdir()
        for name, images in made.items():
            Image.fromarray(images[at]).save(tmp_path / folder / name)
    Image.new("L", (9, 9)).save(tmp_path / "second" / "alone.png")
    folders = [str(tmp_path / "first"), str(tmp_path / "second")]
    run = runpy.run_path(str(EXAMPLES / "lpips_folders.py"))["main"]
    run([*folders, "--weights", "random:0", "--backend", "torch"])
    lines = capsys.readouterr().out.splitlines()
    told = {name: distance for distance, name in map(str.split, lines)}
    assert told.keys() == made.keys()
    assert [*told.values()] == sorted(told.values(), reverse=True)
    assert told["same.png"] == "0.0000"
    lpips = LPIPS("random:0", backend="torch")
    for name in ("a.png", "b.png"):
        pair = (torch.from_numpy(image).movedim(-1, 0)[None] for image in made[name])
        a, b = (2 * (image.float() / 255) - 1 for image in pair)
        assert float(told[name]) == pytest.approx(lpips(a, b).item(), abs=1e-4)


def test_a_kernel_of_ones_own_is_right_and_raced(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contestant, "SLACK_US", 1e9)  # a busy machine disqualifies nobody
    small = ["--model", "digits", "--batch", "1", "--peers", "torch", "--seconds", "1", "--json"]
    assert bench(["race", "conv3", "--candidate", str(EXAMPLES / "my_kernel.py"), *small]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["contestant"] for row in rows if row["contestant"] == "my_kernel"]
