"""`bench model`: a whole network as a problem, its contestants, its rows and its verb."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from alexnet_triton.bench.__main__ import main
from alexnet_triton.bench.measure import network_problem as whole
from alexnet_triton.bench.measure.endtoend import model_rows
from alexnet_triton.bench.measure.options import Effort
from alexnet_triton.bench.measure.peers import Peer, Prepared, peers
from alexnet_triton.bench.measure.problem import Problem, Tensors, match
from alexnet_triton.bench.records import OURS, Row, load
from alexnet_triton.engine import bind
from alexnet_triton.engine.load import load_state
from alexnet_triton.engine.zoo import network

CPU = torch.device("cpu")
ROOFS = {"fp32": 1e11, "copy": 1e10}
QUICK = Effort(rounds=2)
Capture = pytest.CaptureFixture[str]


def problem_of(name: str = "digits", batch: int = 2, pixels: bool = False) -> Problem:
    return whole.problem(whole.planner(network(name), "fp32", CPU), "fp32", batch, pixels)


def given_to(problem: Problem, generator: torch.Generator) -> Tensors:
    _, state = load_state(problem.network, "random:0")
    return whole.tensors(problem, state, CPU, generator)


# --- the problem -----------------------------------------------------------------------------


def test_layers_are_those_that_torch_must_compute_too() -> None:
    assert [name for name, _ in problem_of("alexnet").layers] == [
        *("conv1", "relu1", "pool1", "conv2", "relu2", "pool2", "conv3", "relu3", "conv4"),
        *("relu4", "conv5", "relu5", "pool5", "flatten", "fc6", "relu6", "fc7", "relu7", "fc8"),
    ]


@pytest.mark.parametrize(("pixels", "size"), [(False, 4), (True, 1)])
def test_bytes_are_images_and_weights_and_logits_once(pixels: bool, size: int) -> None:
    problem = problem_of("alexnet", 3, pixels)
    parameters = sum(map(math.prod, problem.network.parameter_shapes().values()))
    image = math.prod(problem.network.input_shape)
    counted = 3 * image * size + 4 * parameters + 4 * 3 * 1000
    assert problem.work.bytes == counted


def test_pixels_are_normalised_by_the_yardstick(generator: torch.Generator) -> None:
    problem = problem_of(pixels=True)
    given = given_to(problem, generator)
    assert given.x.dtype == torch.uint8
    mean, std = (
        torch.tensor(arithmetic, dtype=torch.float64)[:, None, None]
        for arithmetic in (problem.network.preprocess.mean, problem.network.preprocess.std)
    )
    floats = problem_of()
    same = whole.expected(floats, replace(given, x=(given.x / 255 - mean) / std))
    assert torch.allclose(whole.expected(problem, given), same)


def test_copies_are_equal_and_apart(generator: torch.Generator) -> None:
    given = given_to(problem_of(), generator)
    first, second = whole.copies(given, 2)
    assert first is given
    assert second.x.is_contiguous(memory_format=torch.channels_last)
    assert second.x.data_ptr() != first.x.data_ptr()
    assert torch.equal(second.x, first.x)
    assert all(torch.equal(second.state[name], first.state[name]) for name in first.state)
    assert all(
        second.state[name].data_ptr() != first.state[name].data_ptr() for name in first.state
    )


# --- the contestants -------------------------------------------------------------------------


@pytest.mark.interpreter
@pytest.mark.parametrize("pixels", [False, True])
def test_what_is_captured_is_right(pixels: bool, generator: torch.Generator) -> None:
    """The runs that a GPU's clocks capture, run as they are."""
    problem = problem_of(pixels=pixels)
    given = given_to(problem, generator)
    wanted = whole.expected(problem, given)
    found = whole.contestants(problem, CPU, "graph", ["torch", "nchw"])
    assert [one.name for one in found] == [OURS, "torch channels_last", "torch NCHW"]
    for one in found:
        assert one.prepare is not None
        ready = one.prepare(given)
        ready.run()
        ready.output().fill_(torch.nan)
        ready.run()
        assert match(problem, ready.output(), wanted).passed, one.name


class Replayed:
    """A stand-in for a CUDA graph: it runs again what was captured."""

    def __init__(self, runs: Sequence[Callable[[], object]], device: torch.device) -> None:
        self.runs = runs
        for run in runs:
            run()

    def replay(self) -> None:
        for run in self.runs:
            run()


@pytest.mark.parametrize("pixels", [False, True])
@pytest.mark.parametrize("kind", ["torch", "nchw"])
def test_a_graph_reads_the_images_of_the_call(
    kind: str, pixels: bool, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole, "capture", Replayed)
    problem = problem_of(pixels=pixels)
    given = given_to(problem, generator)
    _, one = whole.contestants(problem, torch.device("cuda"), "host", [kind])
    assert one.prepare is not None
    ready = one.prepare(given)
    given.x.copy_(given.x.flip(0))  # the caller's next batch
    ready.run()
    assert match(problem, ready.output(), whole.expected(problem, given)).passed


# --- the rows --------------------------------------------------------------------------------


def rows_of(pixels: bool = False) -> list[Row]:
    net = network("digits")
    return list(model_rows(net, "fp32", 2, CPU, pixels=pixels, roofs=ROOFS, effort=QUICK))


@pytest.mark.interpreter
@pytest.mark.parametrize("pixels", [False, True])
def test_every_contestant_matches_and_is_timed(pixels: bool) -> None:
    found = rows_of(pixels)
    assert [row.contestant for row in found] == [OURS, "torch channels_last", "torch NCHW"]
    assert [row.straw_man for row in found] == [False, False, True]
    for row in found:
        assert (row.section, row.batch, row.dtype, row.clock) == ("model", 2, "fp32", "host")
        assert row.problem == row.network == ("digits uint8" if pixels else "digits")
        assert row.matched
        assert row.median_us is not None
        assert row.runs == 2
        assert row.roof_us == pytest.approx(1e6 * max(row.flops / 1e11, row.bytes / 1e10))
    assert (found[0].workspace or 0) > 0
    assert found[1].workspace is None


@pytest.mark.interpreter
def test_who_is_wrong_or_fails_is_not_timed_and_the_others_are(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def spoiled(*arguments: object, **named: object) -> bind.Packed:
        packed = bind.pack(*arguments, **named)  # type: ignore[arg-type]
        packed.bias["fc8"] += 1
        return packed

    def raises(given: Tensors) -> Prepared:
        raise RuntimeError("out of patience\nand much more")

    def found(*arguments: object) -> list[Peer]:
        return [
            Peer("raises", raises),
            Peer("nan", lambda given: nothing(given)),
            Peer("absent", None, note="not installed"),
            *peers(*arguments),  # type: ignore[arg-type]
        ]

    def nothing(given: Tensors) -> Prepared:
        kept = torch.zeros(len(given.x), 10)
        return Prepared(lambda: None, lambda: kept)

    monkeypatch.setattr("alexnet_triton.engine.devices.single.pack", spoiled)
    monkeypatch.setattr(whole, "peers", found)
    rows = {row.contestant: row for row in rows_of()}
    assert {name: row.note for name, row in rows.items() if row.median_us is None} == {
        OURS: "NO MATCH, so not timed",
        "raises": "RuntimeError: out of patience",
        "nan": "NO MATCH, so not timed",
        "absent": "not installed",
    }
    assert not rows[OURS].matched
    assert rows["nan"].max_error is None  # what was never written stays NaN
    assert rows["torch channels_last"].median_us is not None
    assert main(["model", "digits", "--device", "cpu", "--batch", "1", "--rounds", "1"]) == 1
    assert "NO MATCH" in capsys.readouterr().out


# --- the verb --------------------------------------------------------------------------------


@pytest.mark.interpreter
def test_the_verb_prints_a_table_and_keeps_results(capsys: Capture, tmp_path: Path) -> None:
    kept, sheet = tmp_path / "model.json", tmp_path / "model.csv"
    common = ["model", "--device", "cpu", "--batch", "1", "--rounds", "1", "--peers", "torch"]
    assert main([*common, "--json", str(kept), "--csv", str(sheet)]) == 0
    out, err = capsys.readouterr()
    assert "digits on" in out
    assert "Triton's interpreter" in out
    assert "torch channels_last" in out
    assert "the best peer" in out
    assert "digits, batch 1, fp32, float" in err
    results = load(kept)
    assert [row.contestant for row in results.rows] == [OURS, "torch channels_last"]
    with sheet.open() as file:
        assert [row["contestant"] for row in csv.DictReader(file)] == [
            row.contestant for row in results.rows
        ]


@pytest.mark.interpreter
def test_json_is_all_that_is_printed(capsys: Capture) -> None:
    common = ["model", "digits", "--device", "cpu", "--batch", "1", "--rounds", "1"]
    assert main([*common, "--input", "float", "uint8", "--peers", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["network"] for row in found["rows"]] == ["digits", "digits uint8"]
    assert [each["network"] for each in found["summaries"]] == ["digits", "digits uint8"]
    assert set(found["roofs"]) == {"fp32", "copy"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["lenet"], "unknown network 'lenet'"),
        (["--batch", "0"], "--batch: wanted 1 or more, got 0"),
        (["--rounds", "0"], "--rounds: wanted 1 or more, got 0"),
        (["--clock", "graph"], "--clock on a cpu: wanted one of host, got 'graph'"),
        (["--peers", "tensorrt"], "--peers: wanted one of torch, fused"),
        (["--dtype", "bf16"], "dtype bf16 on a CPU"),
        (["--dtype", "fp8"], "dtype: wanted one of fp32"),
    ],
)
def test_refusals_are_one_line(arguments: list[str], said: str, capsys: Capture) -> None:
    assert main(["model", *arguments, "--device", "cpu"]) == 1
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.gpu
def test_all_clocks_of_a_gpu(capsys: Capture) -> None:
    common = ["model", "digits", "--batch", "1", "5", "--dtype", "fp16", "--rounds", "3"]
    kinds = ["--peers", "torch", "fused", "nchw"]
    assert main([*common, *kinds, "--input", "float", "uint8", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["clock"] for row in rows} == {"cold", "graph", "host"}
    shown = ("problem", "batch", "contestant", "clock", "max_error", "note")
    for row in rows:
        assert row["median_us"] is not None, [row[key] for key in shown]
        assert (row["enqueue_us"] is not None) == (row["clock"] == "host")
