"""`bench compare`: rows joined by their key, ratios, noise, and what fails."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from alexnet_triton.bench.__main__ import main
from alexnet_triton.bench.compare import compare, fraction
from alexnet_triton.bench.records import OURS, Results, Row, save

Capture = pytest.CaptureFixture[str]

ENVIRONMENT: dict[str, str | None] = {"gpu name": "H200", "torch": "2.11", "triton": "3.6"}


def row(us: float | None = 100.0, contestant: str = OURS, batch: int = 1, **more: object) -> Row:
    kept = Row("layers", "conv4", "alexnet", batch, "fp16", contestant, "graph", 10**9, 10**6)
    if us is not None:
        kept = replace(kept, max_error=1e-4, rms_error=1e-5, tolerance=1e-3)
        kept = replace(kept, median_us=us, p20_us=0.99 * us, p80_us=1.01 * us, runs=25)
    return replace(kept, **more)  # type: ignore[arg-type]


def results(*rows: Row, **environment: str | None) -> Results:
    return Results(ENVIRONMENT | environment, {"fp16": 7e14, "copy": 4e12}, rows)


def test_ratio_and_noise() -> None:
    found = compare(results(row(100), row(100, "cudnn")), results(row(80), row(101, "cudnn")))
    ours, peer = found.pairs
    assert ours.ratio == pytest.approx(1.25)
    assert ours.apart
    assert peer.ratio == pytest.approx(100 / 101)
    assert not peer.apart, "99 to 101 meets 100 to 102"
    lines = str(found).splitlines()
    assert [line.endswith("1.250 *") for line in lines if OURS in line] == [True]
    assert [line.endswith("0.990") for line in lines if "cudnn" in line] == [True]


@pytest.mark.parametrize(
    ("us", "threshold", "fails"),
    [
        (104.9, 0.05, False),
        (105.1, 0.05, True),
        (300.0, None, False),
        (100.1, 0.0, True),
        (90.0, 0.0, False),
    ],
)
def test_slower_by_more_than_the_threshold_fails(
    us: float, threshold: float | None, fails: bool
) -> None:
    assert bool(compare(results(row()), results(row(us)), threshold).failures) is fails


def test_a_slower_peer_fails_nothing() -> None:
    assert not compare(results(row(50, "cudnn")), results(row(70, "cudnn")), 0.05).failures


@pytest.mark.parametrize(
    "now",
    [
        row(None, note="NO MATCH, so not timed", max_error=0.5, tolerance=1e-3),
        row(50, max_error=0.5),
        row(None, note="RuntimeError: out of memory"),
    ],
)
def test_a_lost_match_fails_without_a_threshold(now: Row) -> None:
    (failure,) = compare(results(row()), results(now)).failures
    assert failure.startswith("alexnet conv4, batch 1, fp16")
    assert (now.note or "no match any more") in failure
    assert not compare(results(now), results(row())).failures, "found again"
    assert not compare(results(now), results(now)).failures, "it had none before"


def test_rows_of_one_file_are_named() -> None:
    old = results(row(), row(batch=8))
    new = results(row(), row(batch=64), row(contestant="cudnn"))
    found = compare(old, new)
    assert found.only_old == (row(batch=8),)
    assert found.only_new == (row(batch=64), row(contestant="cudnn"))
    assert "only in the old results: alexnet conv4, batch 8, fp16, " + OURS in str(found)
    assert "only in the new results: alexnet conv4, batch 1, fp16, cudnn, graph" in str(found)


def test_other_machines_are_said() -> None:
    new = replace(results(row(), torch="2.12"), roofs={"fp16": 6e14, "copy": 4.1e12})
    assert compare(results(row()), new).differences == (
        "environments differ: torch was 2.11, is 2.12",
        "measured roofs differ: fp16 is 0.86x what it was",
    )
    assert compare(results(row()), results(row())).differences == ()


@pytest.mark.parametrize(
    ("text", "value"), [("5%", 0.05), ("5", 0.05), ("0%", 0), ("12.5 %", 0.125)]
)
def test_percentages(text: str, value: float) -> None:
    assert fraction(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["five", "-1%", "nan", "inf", "%", ""])
def test_other_words_are_no_percentage(text: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        fraction(text)


def files(folder: Path, *both: Sequence[Row]) -> list[str]:
    paths = [folder / "old.json", folder / "new.json"]
    for path, rows in zip(paths, both, strict=True):
        save(results(*rows), path)
    return [str(path) for path in paths]


def test_the_verb(capsys: Capture, tmp_path: Path) -> None:
    paths = files(tmp_path, [row(100), row(batch=8)], [row(107)])
    assert main(["compare", *paths]) == 0
    assert main(["compare", *paths, "--fail-slower", "10%"]) == 0
    assert "FAILED" not in capsys.readouterr().out
    assert main(["compare", *paths, "--fail-slower", "5%"]) == 1
    assert "was 100.00 us, more than 5.0% slower" in capsys.readouterr().out
    assert main(["compare", *paths, "--fail-slower", "5%", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["rows"][0]["ratio"] == pytest.approx(100 / 107)
    assert [each["batch"] for each in found["only_old"]] == [8]
    assert len(found["failures"]) == 1


def test_refusals(capsys: Capture, tmp_path: Path) -> None:
    (path, _) = files(tmp_path, [row()], [row()])
    with pytest.raises(SystemExit):
        main(["compare", path, path, "--fail-slower", "five"])
    assert "wanted a percentage like 5%, got 'five'" in capsys.readouterr().err
