"""What a candidate may not do, each done on purpose and found; and what its file must declare."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from alexnet_triton.bench.measure.problem import Match, Problem, problems
from alexnet_triton.bench.race import proof
from alexnet_triton.bench.race.candidate import (
    CandidateError,
    Conv2dProblem,
    Declined,
    LinearProblem,
    load,
    locate,
    pose,
)
from alexnet_triton.bench.race.proof import Disqualified
from alexnet_triton.engine.devices.planner import Planner
from alexnet_triton.engine.plan import ARITHMETIC
from alexnet_triton.engine.zoo import network
from alexnet_triton.kernels.jit import architecture

Prove = Callable[..., Match]

RIGHT = """
import torch

def answer(problem, x, weight, bias):
    return torch.conv2d(x, weight, bias, problem.stride, problem.padding).relu()

def run(problem, x, weight, bias, out, config):
"""


def find(layer: str, device: torch.device, batch: int = 2) -> Problem:
    planner = Planner(network("digits"), ARITHMETIC["fp32"], architecture(device))
    return problems(planner, "fp32", batch, [layer])[0]


@pytest.fixture
def prove(tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Prove:
    """`prove(body, extra="")`: the match of a candidate with this body of `run`, on conv3."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)

    def match(body: str, extra: str = "") -> Match:
        path = tmp_path / "tried.py"
        path.write_text(f"{RIGHT}    {body}\n{extra}")
        problem, candidate = find("conv3", device), load(path)
        (config,) = candidate.configs(pose(problem))
        first = proof.case(problem, device, 0, candidate.layout)
        return proof.confirm(candidate, config, proof.examine(candidate, config, first), first, 0)

    return match


@pytest.mark.parametrize(
    "body",
    ["out.copy_(answer(problem, x, weight, bias))", "return answer(problem, x, weight, bias)"],
)
@pytest.mark.parametrize("layout", ["NHWC", "HWNC"])
def test_the_right_answer_is_right(prove: Prove, body: str, layout: str) -> None:
    found = prove(body, f"LAYOUT = {layout!r}")
    assert found.passed
    assert 0 < found.max_error < 1e-5


COPY = "out.copy_(answer(problem, x, weight, bias))"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (f"{COPY}; x[0, 0, 0, 0] = 0", "changes its input x"),
        (f"{COPY}; bias += 1", "changes its input bias"),
        (
            f"{COPY}; out.as_strided((1,), (1,), out.storage_offset() - 1).zero_()",
            "writes outside its output",
        ),
        (
            f"{COPY}; weight.as_strided((1,), (1,), weight.storage_offset() - 1).zero_()",
            "writes outside its input weight",
        ),
        (
            f"{COPY}; out += 0 * x.as_strided((1,), (1,), x.storage_offset() - 1)",
            "reads outside its input x: it shows in all filters, all pixels, all images",
        ),
        (
            f"{COPY}; out[1, 2] += bias.as_strided((1,), (1,), bias.storage_offset() + len(bias))",
            "reads outside its input bias: it shows in filter 2, all pixels, image 1",
        ),
        (
            "out[:, 1:] = answer(problem, x, weight, bias)[:, 1:]",
            "18 of 864 outputs unwritten: filter 0, ",
        ),
        ("out *= 0; out += answer(problem, x, weight, bias)", "reads its output"),
        (f"{COPY}; out += 1e-7 * torch.rand_like(out)", "other bits the second time"),
        (
            f"{COPY}; out[1, 3, 2, 1] += 1",
            "1 of 864 values are off, in filter 3, row 2, column 1, image 1",
        ),
        (
            f"{COPY}; out[:, 32:] += 1; out[:, 40] -= 1",
            "270 of 864 values are off, in filters 32 to 47, all pixels, all images",
        ),
        (f"{COPY}; out[..., 1:] += 1", "all filters, all rows, columns 1 to 2, all images"),
        (
            f"{COPY}; out[0, 5, 1, 1] = torch.nan",
            "NaN or infinity in filter 5, row 1, column 1, image 0",
        ),
        ("return answer(problem, x, weight, bias).double()", "returns torch.float64"),
        ("return answer(problem, x, weight, bias)[:1]", "(1, 48, 3, 3), wanted torch.float32"),
        ("return 1", "run returns a int, wanted None or a tensor"),
        (
            "return torch.nn.Parameter(answer(problem, x, weight, bias))",
            "returns a Parameter, wanted",
        ),
    ],
)
def test_each_fault_is_named(prove: Prove, body: str, said: str) -> None:
    with pytest.raises(Disqualified) as error:
        prove(body)
    assert said in str(error.value)


def test_a_bound_of_its_own_admits_what_another_forbids(prove: Prove) -> None:
    worse = f"{COPY}; out *= 1 + 4e-6"
    with pytest.raises(Disqualified, match=r"^wrong: "):
        prove(worse)
    found = prove(worse, "TOLERANCE = 5")
    assert found.tolerance == pytest.approx(5 * prove(COPY).tolerance)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("", "tried.py has no function run(problem, x, weight, bias, out, config)"),
        ("def run(x, out): ...", "wanted run(problem, x, weight, bias, out, config), got run(x, "),
        (RIGHT + "    ...\nLAYOUT = 'CHWN'", "LAYOUT: wanted 'NHWC' or 'HWNC', got 'CHWN'"),
        (RIGHT + "    ...\nTOLERANCE = 0", "wanted a number above 0 and up to 16, got 0"),
        (RIGHT + "    ...\nTOLERANCE = 1e30", "wanted a number above 0 and up to 16, got 1e+30"),
        (RIGHT + "    ...\nOPERATION = 'pool'", "OPERATION: wanted 'conv2d' or 'linear', got"),
        (RIGHT + "    ...\nSPACE = {'BLOCK': 64}", "SPACE: wanted a dictionary of lists"),
        (RIGHT + "    ...\ndef prepare(weight): ...", "wanted prepare(problem, weight, config)"),
    ],
)
def test_what_is_no_candidate_is_told_why(tmp_path: Path, source: str, said: str) -> None:
    path = tmp_path / "tried.py"
    path.write_text(source)
    with pytest.raises(CandidateError) as error:
        load(path)
    assert said in str(error.value)


def test_a_space_is_every_combination(tmp_path: Path, device: torch.device) -> None:
    posed = pose(find("conv3", device))
    path = tmp_path / "tried.py"
    path.write_text(RIGHT + "    ...\nSPACE = {'M': [1, 2], 'N': (3, 4)}")
    found = load(path).configs(posed)
    assert found == [{"M": m, "N": n} for m in (1, 2) for n in (3, 4)]
    path.write_text(RIGHT + "    ...\ndef configs(problem): return [{'M': problem.OC}]")
    assert load(path).configs(posed) == [{"M": 48}]
    without_end = "    while True: yield {}"
    path.write_text(RIGHT + f"    ...\ndef configs(problem):\n{without_end}")
    with pytest.raises(
        CandidateError, match="wanted 1 to 512 configurations, each a dictionary, got 513"
    ):
        load(path).configs(posed)
    path.write_text(RIGHT + "    ...\ndef configs(problem): return []")
    with pytest.raises(
        CandidateError, match="wanted 1 to 512 configurations, each a dictionary, got 0"
    ):
        load(path).configs(posed)
    path.write_text(RIGHT + "    ...\nOPERATION = 'linear'")
    with pytest.raises(Declined, match="solves a linear alone"):
        load(path).configs(posed)


def test_a_copy_of_one_that_ships_works_where_it_lies(tmp_path: Path) -> None:
    copy = tmp_path / "winograd-2.py"
    copy.write_text(locate("winograd").read_text())
    assert load(copy).tolerance == 2
    (tmp_path / "mine.py").write_text("WIDTH = 3")
    beside = tmp_path / "beside.py"
    beside.write_text("import mine\n" + RIGHT + "    ...\nSPACE = {'M': [mine.WIDTH]}")
    assert load(beside)


def test_problems_are_posed_in_full(device: torch.device) -> None:
    arch = architecture(device)
    conv = pose(find("conv1", device))
    arithmetic = ("relu", torch.float32, "ieee", arch)
    assert conv == Conv2dProblem(2, 3, 64, 64, 8, 11, 11, 4, 2, 1, 1, *arithmetic)
    assert (conv.OH, conv.OW) == (15, 15)
    assert pose(find("fc6", device)) == LinearProblem(2, 1152, 512, *arithmetic)
    assert pose(find("fc8", device)).activation is None
    for layer, said in (("pool1", "is a MaxPool2d"), ("conv1+pool1", "wanted one layer")):
        with pytest.raises(CandidateError, match=said):
            pose(find(layer, device))
