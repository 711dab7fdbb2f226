"""`pytest bench` from the root: the twins are found, proved, timed, and told in the JSON file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from alexnet_triton.bench import test_twins as twins
from alexnet_triton.bench.measure.peers import Peer, Prepared
from alexnet_triton.bench.measure.timing import ROUNDS

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def test_every_layer_and_the_network_have_twins() -> None:
    groups = Counter(group for group, _, _ in twins.twins(CPU))
    layers = "conv1 pool1 conv2 pool2 conv3 conv4 conv5 pool5 avgpool fc6 fc7 fc8 model"
    assert list(groups) == [f"{layer}, batch 1" for layer in layers.split()]
    assert min(groups.values()) >= 2


@pytest.mark.interpreter
def test_pytest_runs_them(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    kept = tmp_path / "out.json"
    mine = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    options = ["-k", "fc8 or (model and torch)", "-p", "no:xdist", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "bench", "--benchmark-json", str(kept), *options],
        cwd=ROOT,
        env=mine | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    found = {
        (each["extra_info"]["problem"], each["extra_info"]["contestant"]): each
        for each in json.loads(kept.read_text())["benchmarks"]
    }
    assert set(found) == {
        *(("fc8", name) for name in ("alexnet-triton", "torch linear", "torch addmv")),
        ("digits", "torch channels_last"),
    }
    for (problem, _), each in found.items():
        info = each["extra_info"]
        assert each["group"] == f"{'model' if problem == 'digits' else problem}, batch 1"
        assert info["max_error"] <= info["tolerance"]
        assert info["images_per_second"] == pytest.approx(1e6 / info["median_us"])
        assert info["tflops"] > 0
        assert each["stats"]["rounds"] == ROUNDS["cpu"]


@pytest.mark.interpreter
def test_a_twin_that_is_wrong_is_not_timed() -> None:
    answer = torch.zeros(1, 10)
    zeros = Peer("zeros", lambda given: Prepared(answer.zero_, lambda: answer))
    group, problem, _ = next(twin for twin in twins.twins(CPU) if twin[0].startswith("fc8"))
    with pytest.raises(AssertionError, match="NO MATCH"):
        twins.test_twin(group, problem, zeros, CPU, benchmark=None)
