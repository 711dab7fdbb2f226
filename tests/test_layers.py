"""`bench layers`: nothing timed that does not match, one failure is one row, the verb's outputs."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from alexnet_triton.bench.__main__ import main
from alexnet_triton.bench.measure import layers
from alexnet_triton.bench.measure.layers import default_names, layer_rows
from alexnet_triton.bench.measure.options import Effort
from alexnet_triton.bench.measure.peers import Peer, Prepared, peers
from alexnet_triton.bench.measure.problem import Problem, Tensors, ready
from alexnet_triton.bench.records import OURS, Row, load
from alexnet_triton.engine import NetworkError
from alexnet_triton.engine.devices.planner import Planner
from alexnet_triton.engine.plan import ARITHMETIC
from alexnet_triton.engine.zoo import network
from alexnet_triton.kernels.jit import architecture

pytestmark = pytest.mark.interpreter
CPU = torch.device("cpu")
ROOFS = {"fp32": 1e11, "copy": 1e10}
QUICK = Effort(rounds=2)


def planner(model: str = "digits") -> Planner:
    return Planner(network(model), ARITHMETIC["fp32"], None)


def rows_of(name: str, **options: object) -> dict[str, Row]:
    arguments: dict[str, object] = {"roofs": ROOFS, "effort": QUICK} | options
    found = layer_rows(planner(), "fp32", 2, CPU, [name], **arguments)  # type: ignore[arg-type]
    return {row.contestant: row for row in found}


def test_every_step_and_every_convolution_with_its_pool() -> None:
    assert default_names(planner("alexnet")) == [
        *("conv1", "pool1", "conv2", "pool2", "conv3", "conv4", "conv5", "pool5"),
        *("fc6", "fc7", "fc8", "conv1+pool1", "conv2+pool2", "conv5+pool5"),
    ]
    assert default_names(planner("alexnet2012"))[-1] == "conv5+pool5"  # others have a norm between


@pytest.mark.parametrize("name", ["conv1+pool1", "fc7"])
def test_all_contestants_match_and_are_timed(name: str) -> None:
    found = rows_of(name)
    assert next(iter(found)) == OURS
    assert len(found) > 1
    for row in found.values():
        assert (row.section, row.problem, row.network) == ("layers", name, "digits")
        assert (row.batch, row.dtype, row.clock) == (2, "fp32", "host")
        assert row.matched
        assert row.p20_us is not None
        assert row.p80_us is not None
        assert row.median_us is not None
        assert 0 < row.p20_us <= row.median_us <= row.p80_us
        assert row.runs == 2
        assert row.roof_us == pytest.approx(1e6 * max(row.flops / 1e11, row.bytes / 1e10))
    assert found[OURS].note == ("stem included" if name.startswith("conv1") else "")


def test_an_unknown_layer_is_refused_at_the_first_row() -> None:
    with pytest.raises(NetworkError, match="no step 'fc9'"):
        rows_of("fc9")


def constant(given: Tensors, value: float) -> Prepared:
    shape = len(given.x), len(given.state["fc7.bias"])
    return Prepared(lambda: None, lambda: torch.full(shape, value))


class Fades:
    """Right once, and never again."""

    def __init__(self, given: Tensors) -> None:
        self.given = given
        self.runs = 0

    def __call__(self) -> None:
        self.runs += 1
        if self.runs > 1:
            raise ZeroDivisionError("sampling\nis too much")

    def output(self) -> torch.Tensor:
        weight, bias = self.given.state["fc7.weight"], self.given.state["fc7.bias"]
        return (self.given.x @ weight.t() + bias).relu()


@pytest.fixture
def odd_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(given: Tensors) -> Prepared:
        raise RuntimeError("CUDA out of patience\nand much more")

    def fades(given: Tensors) -> Prepared:
        made = Fades(given)
        return Prepared(made, made.output)

    def found(problem: Problem, device: torch.device, kinds: object = None) -> Iterator[Peer]:
        yield Peer("raises", raises)
        yield Peer("zeros", lambda given: constant(given, 0.0))
        yield Peer("nan", lambda given: constant(given, torch.nan))
        yield Peer("absent", None, note="not installed")
        yield Peer("fades", fades)
        yield from peers(problem, device)

    monkeypatch.setattr(layers, "peers", found)


@pytest.mark.usefixtures("odd_peers")
def test_who_fails_has_a_row_that_says_so_and_the_others_go_on() -> None:
    found = rows_of("fc7")
    notes = {name: row.note for name, row in found.items() if row.median_us is None}
    assert notes == {
        "raises": "RuntimeError: CUDA out of patience",
        "zeros": "NO MATCH, so not timed",
        "nan": "NO MATCH, so not timed",
        "absent": "not installed",
        "fades": "ZeroDivisionError: sampling",
    }
    assert not found["zeros"].matched
    assert found["zeros"].max_error == pytest.approx(1, abs=0.01)
    assert found["nan"].max_error is None  # JSON has no infinity
    assert found["fades"].matched
    assert found[OURS].median_us is not None
    assert found["torch linear"].median_us is not None


def test_the_engine_itself_is_not_timed_if_it_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(problem: Problem, given: Tensors) -> object:
        state = {name: tensor * 1.01 for name, tensor in given.state.items()}
        return ready(problem, Tensors(given.x, state))

    monkeypatch.setattr(layers, "ready", broken)
    row = rows_of("fc8")[OURS]
    assert row.median_us is None
    assert row.note == "NO MATCH, so not timed"
    assert row.max_error is not None
    assert row.tolerance is not None
    assert row.max_error > row.tolerance
    common = ["--model", "digits", "--device", "cpu", "--rounds", "1"]
    assert main(["layers", "fc8", *common]) == 1
    assert "NO MATCH" in capsys.readouterr().out


def test_rows_come_problem_by_problem_until_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        over = iter([False, False, True])  # as the deadline passes in the second problem
        patch.setattr(Effort, "over", property(lambda effort: next(over)))
        found = list(layer_rows(planner(), "fp32", 1, CPU, ["pool5"] * 100, effort=QUICK))
    assert sum(row.contestant == OURS for row in found) == 2
    assert all(row.roof_us is None for row in found)
    late = Effort(deadline=time.monotonic())
    assert not list(layer_rows(planner(), "fp32", 1, CPU, ["pool5"], effort=late))


def test_switches_are_as_before_between_rows() -> None:
    before = torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32
    rows = layer_rows(planner(), "fp32", 1, CPU, ["pool5"], effort=QUICK)
    next(rows)
    assert before == (torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32)
    assert not torch.is_inference_mode_enabled()


# --- the verb --------------------------------------------------------------------------------

COMMON = ["--model", "digits", "--device", "cpu", "--rounds", "2"]


def test_json_alone_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["layers", "pool5", "fc8", *COMMON, "--batch", "1", "2", "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert "fc8, batch 2" in printed.err
    assert set(found["roofs"]) == {"fp32", "copy"}
    assert found["environment"]["torch"] == torch.__version__
    assert any("say nothing of a GPU" in note for note in found["notes"])
    places = {(row["problem"], row["batch"]) for row in found["rows"]}
    assert places == {("pool5", 1), ("pool5", 2), ("fc8", 1), ("fc8", 2)}


def test_table_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept, sheet = tmp_path / "layers.json", tmp_path / "layers.csv"
    files = ["--json", str(kept), "--csv", str(sheet)]
    assert main(["layers", "conv3", *COMMON, "--peers", "torch", "nchw", "fused", *files]) == 0
    out = capsys.readouterr().out.splitlines()
    assert sum("say nothing of a GPU" in line for line in out) == 1
    head = next(i for i, line in enumerate(out) if line.startswith("layer "))
    assert len(out[head + 1 :]) == 4
    by_name = {row.contestant: row for row in load(kept).rows}
    for line in out[head + 1 :]:
        name = next(name for name in by_name if f" {name} " in line)
        median = by_name[name].median_us
        assert f"{median:.2f}" in line if median else "needs a GPU" in line
    assert any("straw man" in line for line in out if "NCHW" in line)
    with sheet.open(newline="") as file:
        assert [row["contestant"] for row in csv.DictReader(file)] == list(by_name)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fc9"], "digits has no step 'fc9'"),
        (["fc8", "--peers", "cublas"], "--peers: wanted one of torch, fused"),
        (["fc8", "--clock", "cold"], "--clock on a cpu: wanted one of host, got 'cold'"),
        (["fc8", "--batch", "0"], "--batch: wanted 1 or more, got 0"),
        (["fc8", "--rounds", "0"], "--rounds: wanted 1 or more, got 0"),
        (["fc8", "--dtype", "bf16"], "dtype bf16 on a CPU"),
        (["fc8", "--json", "{folder}"], "{folder}: Is a directory"),
    ],
)
def test_refusals_are_one_line(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [argument.format(folder=tmp_path) for argument in arguments]
    assert main(["layers", *COMMON, *given]) == 1
    *_, last = capsys.readouterr().err.splitlines()
    assert f"error: {said.format(folder=tmp_path)}" in last


@pytest.mark.gpu
def test_every_clock_of_a_gpu() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    plans = Planner(network("alexnet"), ARITHMETIC["fp16"], architecture(device))
    kinds = ["torch", "fused", "nchw"]
    found = list(
        layer_rows(
            *(plans, "fp16", 8, device, ["conv1+pool1", "conv4", "fc8"]),
            kinds=kinds,
            effort=Effort(rounds=3),
        )
    )
    assert {row.clock for row in found} == {"cold", "graph", "host"}
    assert all(row.median_us and row.matched for row in found), found
