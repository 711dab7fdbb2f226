"""Which searches are made, in which order, and how long each may take."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from alexnet_triton.bench.__main__ import main
from alexnet_triton.bench.tune.budget import (
    ASKED_FOR,
    Search,
    hints,
    rows,
    searches,
    share,
)
from alexnet_triton.engine import NetworkError
from alexnet_triton.engine.devices.planner import Planner
from alexnet_triton.engine.plan import ARITHMETIC
from alexnet_triton.engine.zoo import network
from alexnet_triton.kernels import tuning

DIGITS = Planner(network("digits"), ARITHMETIC["fp32"], None)


@pytest.fixture(scope="module")
def found() -> list[Search]:
    return searches(DIGITS, "fp32", (1, 2))


def test_the_pass_is_proved_in_the_first_layer(found: list[Search]) -> None:
    proved_in = {search.step.name: search.problem.name for search in found}
    assert proved_in.pop("input") == "conv1"
    assert all(name == problem for name, problem in proved_in.items())
    assert {"conv1", "pool1", "avgpool", "fc8"} <= proved_in.keys()
    with pytest.raises(NetworkError, match="digits has no step 'conv9' to tune; it has input, "):
        searches(DIGITS, "fp32", [1], ["conv9"])


class Asked(tuning.Table):
    """A table that notes what it is asked for, and has nothing."""

    def find(self, op: str, shape: Any, dtype: str, batch: int) -> None:
        self.rows.append((op, batch))  # type: ignore[attr-defined]


def test_searched_is_what_a_plan_looks_up() -> None:
    """Of networks with every kind of layer, images read in place or not."""
    asked, searched = set(), set()
    for name in ("alexnet2012", "digits", "alexnet_keras_bn"):
        noted: list[tuple[str, int]] = []
        planner = Planner(network(name), ARITHMETIC["fp16"], 90)
        for in_place in (False, True):
            table = Asked("a card", noted)  # type: ignore[arg-type]
            replace(planner, tuned=table)(1, image_dtype=torch.float16, in_place=in_place)
        asked |= {op for op, _ in noted}
        searched |= {search.row.op for search in searches(planner, "fp16", [1])}
    assert asked == set(ASKED_FOR)
    assert searched <= asked, searched - asked
    with pytest.raises(NetworkError, match="has no step 'norm1' to tune"):
        searches(Planner(network("alexnet2012"), ARITHMETIC["fp16"], 90), "fp16", [1], ["norm1"])


def test_rows_that_do_not_hold_are_refused_in_a_line_each(
    found: list[Search], tmp_path: Path
) -> None:
    """Those of other shapes and of whole networks are as good as before."""
    row, path = found[0].row, tmp_path / "table.json"
    good = [row, replace(row, op="run", source="many"), replace(row, batch=8, shape={})]
    for odd, wanted, got in (
        (replace(row, batch=2, source="another"), row.source, "another"),
        (replace(row, batch=2, config={**row.config, "speed": 9}), ", ".join(row.config), "speed"),
        (replace(row, batch=2, op="softmax"), "conv2d", "no plan asks for"),
    ):
        path.unlink(missing_ok=True)
        tuning.save(path, "here", [*good, odd])
        holding, (line,) = rows(path, found)
        assert len(holding) == len(good)
        assert odd not in holding
        assert all(told in line for told in (str(path), odd.op, "x2", wanted, got))


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
    assert hints(search, rows(tmp_path / "none.json", found)[0]) == []
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
    known, _ = rows(tmp_path / "table.json", found)
    assert hints(search, known) == [{"BLOCK_M": 1}, {"BLOCK_M": 2}]


@pytest.mark.parametrize(
    ("given", "source", "skipped"),
    [
        (["--all"], None, 1),
        (["--all"], "another", 0),
        (["--all", "--again"], None, 0),
        (["fc8"], None, 0),
    ],
)
def test_all_skips_what_has_a_row(
    given: Sequence[str],
    source: str | None,
    skipped: int,
    found: list[Search],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Unless it is asked for by name or --again, or the row is of another kernel's source."""
    monkeypatch.chdir(tmp_path)
    (own,) = (e.row for e in found if e.step.name == "fc8" and e.problem.batch == 1)
    tuning.save(tmp_path / "won.json", "here", [replace(own, source=source or own.source)])
    common = ["--model", "digits", "--device", "cpu", "--table", "won.json", "--budget", "0"]
    assert main(["tune", *given, *common, "--json"]) == 0
    said = capsys.readouterr()
    told = json.loads(said.out)
    assert said.err.splitlines() == told["refused"]
    assert len(told["refused"]) == (source is not None)
    assert told["skipped"] == ["fc8 x1"][:skipped]
    assert "fc8 x1" in [*told["skipped"], *told["not_reached"]]
    assert len(told["not_reached"]) == (1 if given == ["fc8"] else len(found) / 2 - skipped)
