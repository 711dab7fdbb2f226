"""`bench layers`: which layers there are, the verb's table, files and refusals."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from alexnet_triton.bench.__main__ import main
from alexnet_triton.bench.measure import contest, contestants, verb
from alexnet_triton.bench.measure.contest import race
from alexnet_triton.bench.measure.layers import default_names
from alexnet_triton.bench.measure.peers import Peer, Prepared
from alexnet_triton.bench.measure.problem import Problem, Tensors, problems
from alexnet_triton.bench.measure.timing import Effort
from alexnet_triton.bench.records import OURS, load
from alexnet_triton.engine.devices.planner import Planner
from alexnet_triton.engine.plan import ARITHMETIC
from alexnet_triton.engine.zoo import network
from alexnet_triton.kernels.jit import architecture

pytestmark = pytest.mark.interpreter
Capture = pytest.CaptureFixture[str]
COMMON = ["--model", "digits", "--device", "cpu", "--rounds", "2"]


@pytest.fixture(autouse=True)
def roofs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told at once: to measure them takes a second, and test_roofline.py does."""
    monkeypatch.setattr(verb, "measure_roofs", lambda *_: {"fp32": 1e11, "copy": 1e10})


def planner(model: str = "digits") -> Planner:
    return Planner(network(model), ARITHMETIC["fp32"], None)


def test_every_step_and_every_convolution_with_its_pool() -> None:
    assert default_names(planner("alexnet")) == [
        *("conv1", "pool1", "conv2", "pool2", "conv3", "conv4", "conv5", "pool5"),
        *("fc6", "fc7", "fc8", "conv1+pool1", "conv2+pool2", "conv5+pool5"),
    ]
    assert default_names(planner("alexnet2012"))[-1] == "conv5+pool5"  # others have a norm between


def test_json_alone_on_standard_output(capsys: Capture) -> None:
    assert main(["layers", "pool5", "fc8", *COMMON, "--batch", "1", "2", "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert "fc8, batch 2" in printed.err
    assert set(found["roofs"]) == {"fp32", "copy"}
    assert found["environment"]["torch"] == torch.__version__
    assert any("say nothing of a GPU" in note for note in found["notes"])
    places = {(row["problem"], row["batch"]) for row in found["rows"]}
    assert places == {("pool5", 1), ("pool5", 2), ("fc8", 1), ("fc8", 2)}


def test_table_and_files(tmp_path: Path, capsys: Capture) -> None:
    kept, sheet = tmp_path / "layers.json", tmp_path / "layers.csv"
    files = ["--json", str(kept), "--csv", str(sheet)]
    assert main(["layers", "conv3", *COMMON, "--peers", "torch", "nchw", "fused", *files]) == 0
    out = capsys.readouterr().out.splitlines()
    assert sum("say nothing of a GPU" in line for line in out) == 1
    place = next(i for i, line in enumerate(out) if line.startswith("layer "))
    head, lines = out[place], out[place + 1 :]
    by_name = {row.contestant: row for row in load(kept).rows}
    assert len(lines) == len(by_name) == 4
    for line in lines:
        row = next(row for name, row in by_name.items() if f" {name} " in line)
        for heading, value in (("median us", row.median_us), ("p80", row.p80_us)):
            end = head.index(heading) + len(heading)
            assert line[:end].endswith(f" {value:.2f}" if value else " -"), "under its heading"
        assert value or line.endswith("needs a GPU")
    assert any(line.endswith("straw man") for line in lines if "NCHW" in line)
    with sheet.open(newline="") as file:
        assert [row["contestant"] for row in csv.DictReader(file)] == list(by_name)


def test_who_does_not_match_shows_its_error(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def spoiled(value: float) -> Peer:
        def prepare(given: Tensors) -> Prepared:
            shape = len(given.x), len(given.state["fc8.bias"])
            return Prepared(lambda: None, lambda: torch.full(shape, value))

        return Peer(f"all {value}", prepare)

    monkeypatch.setattr(contestants, "peers", lambda *_: [spoiled(0.0), spoiled(torch.nan)])
    assert main(["layers", "fc8", *COMMON]) == 0
    zeros, nans = (line for line in capsys.readouterr().out.splitlines() if " all " in line)
    assert "1.0e+00" in zeros
    assert " inf " in nans
    assert zeros.endswith("NO MATCH, so not timed")
    assert nans.endswith("NO MATCH, so not timed")


def test_ours_without_a_match_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(contest, "matched", lambda row, _: replace(row, note=contest.NO_MATCH))
    assert main(["layers", "fc8", *COMMON]) == 1
    assert "NO MATCH" in capsys.readouterr().out


@pytest.mark.parametrize("printed", [False, True])
def test_a_broken_context_ends_it_with_what_there_is(
    printed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def breaks(given: Tensors) -> Prepared:
        raise contest.ContextLost("a peer", RuntimeError("illegal memory access"))

    def found(problem: Problem, *_: object) -> list[Peer]:
        return [Peer("a peer", breaks if problem.name == "fc7" else None)]

    monkeypatch.setattr(contestants, "peers", found)
    monkeypatch.setattr(contest, "survived", lambda one, error, device: fail(error))
    kept = tmp_path / "layers.json"
    assert main(["layers", "fc8", "fc7", "fc6", *COMMON, "--json", *[str(kept)][printed:]]) == 1
    out, err = capsys.readouterr()
    rows = json.loads(out if printed else kept.read_text())["rows"]
    assert [(row["problem"], row["contestant"], bool(row["median_us"])) for row in rows] == [
        ("fc8", OURS, True),
        ("fc8", "a peer", False),
        ("fc7", OURS, False),
        ("fc7", "a peer", False),
    ]
    assert "context is broken" in rows[-1]["note"]
    *_, last = err.splitlines()
    assert "error: a peer: RuntimeError: illegal memory access: the GPU's context is broken" in last


def fail(error: Exception) -> str:
    raise error


LAYER = ["layers", "fc8", "--model", "digits", "--device", "cpu"]
MODEL = ["model", "--device", "cpu"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["layers", "fc9", *COMMON], "digits has no step 'fc9'"),
        ([*LAYER, "--peers", "cublas"], "--peers: wanted one of torch, fused"),
        ([*LAYER, "--batch", "0"], "--batch: wanted 1 or more, got 0"),
        ([*LAYER, "--json", "{folder}"], "{folder}: Is a directory"),
        ([*MODEL, "lenet"], "unknown network 'lenet'"),
        ([*MODEL, "--rounds", "0"], "--rounds: wanted 1 or more, got 0"),
        ([*MODEL, "--clock", "graph"], "--clock on a cpu: wanted one of host, got 'graph'"),
        ([*MODEL, "--dtype", "bf16"], "dtype bf16 on a CPU"),
        ([*MODEL, "--dtype", "fp8"], "dtype: wanted one of fp32"),
        ([*MODEL, "--predict", "h200", "--dtype", "fp8"], "dtype: wanted one of fp32"),
        ([*MODEL, "--predict", "h200", "--batch", "0"], "batch: wanted 1 or more, got 0"),
        (["pipeline", "lenet", "--devices", "cpu", "cpu"], "unknown network 'lenet'"),
    ],
)
def test_refusals_are_one_line(
    arguments: list[str], said: str, tmp_path: Path, capsys: Capture
) -> None:
    assert main([argument.format(folder=tmp_path) for argument in arguments]) == 1
    *progress, last = capsys.readouterr().err.splitlines()
    assert said.format(folder=tmp_path) in last
    assert progress in ([], ["measuring the roofs of cpu"])


@pytest.mark.gpu
def test_every_clock_of_a_gpu() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    plans = Planner(network("alexnet"), ARITHMETIC["fp16"], architecture(device))
    kinds = ["torch", "fused", "nchw"]
    found = [
        row
        for problem in problems(plans, "fp16", 8, ["conv1+pool1", "conv4", "fc8"])
        for row in race(problem, device, kinds=kinds, effort=Effort(rounds=3))
    ]
    assert {row.clock for row in found} == {"cold", "graph", "host"}
    assert all(row.median_us and row.matched for row in found), found
