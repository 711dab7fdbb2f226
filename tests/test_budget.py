"""Which searches are made, in which order, and how long each may take."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from alexnet_triton.bench.__main__ import main
from alexnet_triton.bench.tune.budget import Search, hints, rows, searches, share, targets
from alexnet_triton.engine import NetworkError
from alexnet_triton.engine.devices.planner import Planner
from alexnet_triton.engine.plan import ARITHMETIC
from alexnet_triton.engine.zoo import network
from alexnet_triton.kernels import tuning

DIGITS = Planner(network("digits"), ARITHMETIC["fp32"], None)


@pytest.fixture(scope="module")
def found() -> list[Search]:
    return searches(DIGITS, "fp32", (1, 2))


def test_targets_are_the_steps_with_a_kernel() -> None:
    every = targets(DIGITS, "fp32", 1)
    assert [step.name for _, step in every][:3] == ["input", "conv1", "pool1"]
    assert [problem.name for problem, _ in every][:3] == ["conv1", "conv1", "pool1"]
    with pytest.raises(NetworkError, match="digits has no step 'conv9' to tune; it has input, "):
        targets(DIGITS, "fp32", 1, ["conv9"])


def test_steps_whose_table_nobody_reads_are_searched_only_by_name() -> None:
    planner = Planner(network("alexnet2012"), ARITHMETIC["fp16"], 90)
    (norm,) = searches(planner, "fp16", [1], ["norm1"])
    assert norm.step.name not in [search.step.name for search in searches(planner, "fp16", [1])]


def test_what_costs_most_is_searched_first_and_longest(found: list[Search]) -> None:
    assert len({search.known_by for search in found}) == len(found)
    assert [each.weight for each in found] == sorted([e.weight for e in found], reverse=True)
    for batch, weight in ((1, 1), (2, 1 / 1.5)):
        assert sum(e.weight for e in found if e.problem.batch == batch) == pytest.approx(weight)
    left, given = 100.0, []
    for turn in range(len(found)):
        given.append(share(found[turn:], left, 0.1))
        left -= given[-1]
    assert left == pytest.approx(0, abs=1e-6)
    assert given == sorted(given, reverse=True)
    assert share(found[:1], 7.0, 9.0) == 7.0
    assert share(found, 100.0, 90.0) == 90.0


def test_hints_are_the_winners_of_the_nearest_batches(found: list[Search], tmp_path: Path) -> None:
    """Each once, and the default, from which every search starts, is none."""
    search, other = found[0], next(each for each in found if each.row.op != found[0].row.op)
    assert hints(search, rows(tmp_path / "none.json")) == []
    assert search.step.config is not None
    near, same, default, far, half, none = (
        replace(search.row, config={"BLOCK_M": 1}, batch=4),
        replace(search.row, config={"BLOCK_M": 1}, batch=8),
        replace(search.row, config=asdict(search.step.config), batch=2),
        replace(search.row, config={"BLOCK_M": 2}, batch=1000),
        replace(search.row, config={"BLOCK_M": 3}, batch=1, dtype="fp16"),
        replace(other.row, config={"BLOCK_M": 4}),
    )
    tuning.save(tmp_path / "table.json", "here", [half, far, near, same, default, none])
    assert hints(search, rows(tmp_path / "table.json")) == [{"BLOCK_M": 1}, {"BLOCK_M": 2}]


@pytest.mark.parametrize(
    ("given", "skipped"),
    [(["--all"], 1), (["--all", "--again"], 0), (["--all", "--no-write"], 0), (["fc8"], 0)],
)
def test_all_skips_what_has_a_row(
    given: Sequence[str],
    skipped: int,
    found: list[Search],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Unless it is asked for by name or --again, or the table is not to be written."""
    monkeypatch.chdir(tmp_path)
    own = [each.row for each in found if each.step.name == "fc8" and each.problem.batch == 1]
    tuning.save(tmp_path / "won.json", "here", own)
    common = ["--model", "digits", "--device", "cpu", "--table", "won.json", "--budget", "0"]
    assert main(["tune", *given, *common, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["skipped"] == ["fc8 x1"][:skipped]
    assert "fc8 x1" in [*told["skipped"], *told["not_reached"]]
    assert len(told["not_reached"]) == (1 if given == ["fc8"] else len(found) / 2 - skipped)
