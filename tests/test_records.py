"""Result rows: rates, who is the best peer, and files that come back as they went."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from alexnet_triton.bench.records import (
    OURS,
    RecordError,
    Results,
    Row,
    Times,
    best_peer,
    load,
    save,
    save_csv,
    times_best_peer,
)


def row(contestant: str = OURS, median: float | None = 100.0, **fields: object) -> Row:
    made = Row(
        *("layers", "conv4", "alexnet", 64, "fp16", contestant, "graph"),
        *(2_000_000_000, 50_000_000),
        max_error=1e-4,
        rms_error=1e-5,
        tolerance=1e-3,
        median_us=median,
        p20_us=None if median is None else median * 0.9,
        p80_us=None if median is None else median * 1.1,
        runs=0 if median is None else 25,
        roof_us=40.0,
    )
    return replace(made, **fields)  # type: ignore[arg-type]


def test_rates_are_those_of_useful_work() -> None:
    it = row()
    assert it.tflops == pytest.approx(20)
    assert it.gbps == pytest.approx(500)
    assert it.percent_of_roof == pytest.approx(40)
    assert it.images_per_second == pytest.approx(640_000)
    untimed = row(median=None)
    assert untimed.tflops is untimed.gbps is untimed.percent_of_roof is None
    assert untimed.images_per_second is None
    assert row(roof_us=None).percent_of_roof is None


def test_the_best_peer_is_the_fastest_right_one_of_the_same_race() -> None:
    ours = row()
    rows = [
        ours,
        row("slow", 300.0),
        row("best", 150.0),
        row("straw", 10.0, straw_man=True),
        row("wrong", 10.0, max_error=2e-3),
        row("wrong in the mean", 10.0, rms_error=3e-4),
        row("unproved", 10.0, max_error=None),
        row("untimed", None),
        row("another batch", 10.0, batch=8),
        row("another dtype", 10.0, dtype="bf16"),
        row("another clock", 10.0, clock="cold"),
        row("another layer", 10.0, problem="conv5"),
        row("another network", 10.0, network="vgg16"),
        row("another section", 10.0, section="model"),
        row(OURS, 1.0),
    ]
    peer = best_peer(ours, rows)
    assert peer is not None
    assert peer.contestant == "best"
    assert times_best_peer(ours, rows) == pytest.approx(1.5)
    assert times_best_peer(row("slow", 300.0), rows) == pytest.approx(0.5)


def test_no_peer_and_no_time_give_no_figure() -> None:
    ours = row()
    assert best_peer(ours, [ours]) is None
    assert times_best_peer(ours, [ours]) is None
    assert times_best_peer(row(median=None), [row("peer", 50.0)]) is None


def test_times_become_the_rows() -> None:
    timed = row(median=None).timed(Times("cold", (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)))
    assert (timed.clock, timed.median_us, timed.p20_us, timed.p80_us) == ("cold", 3.5, 2.0, 5.0)
    assert timed.runs == 6


def results(*rows: Row) -> Results:
    return Results({"gpu name": "H200", "cuda": None}, {"fp16": 7e14, "copy": 4e12}, rows)


def test_json_comes_back_as_it_went(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    wrong = row("wrong", None, max_error=None, rms_error=None, note="NO MATCH, so not timed")
    absent = row("peer", None, max_error=None, tolerance=None, note="needs a GPU")
    given = replace(results(row(), wrong, absent), notes=("by hand",))
    save(given, path)
    assert load(path) == given
    assert [each.error for each in load(path).rows] == [1e-4, math.inf, None]
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
        ("{", "no JSON"),
        ("[]", "wanted results of schema 1, got None"),
        ('{"schema": 7}', "wanted results of schema 1, got 7"),
        ('{"schema": 1, "roofs": {}}', "no results of schema 1"),
        (
            '{"schema": 1, "environment": {}, "roofs": {}, "rows": [{"speed": 9}], "searches": [],'
            ' "notes": []}',
            "no results of schema 1.*speed",
        ),
        (b"\xff\xfe\x00", "no JSON"),
    ],
)
def test_other_files_are_refused_in_one_line(
    tmp_path: Path, content: str | bytes | None, said: str
) -> None:
    path = tmp_path / "results.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RecordError, match=said) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_in_the_way_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="directory"):
        save(results(), tmp_path)
    with pytest.raises(RecordError, match="directory"):
        save_csv([row()], tmp_path)


def test_csv_has_the_rates_and_the_comparison(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    save_csv([row(), row("peer", 150.0), row("broken", None, note="OOM, sadly")], path)
    with path.open(newline="") as file:
        ours, peer, broken = csv.DictReader(file)
    assert float(ours["tflops"]) == pytest.approx(20)
    assert float(ours["times_best_peer"]) == pytest.approx(1.5)
    assert float(peer["times_best_peer"]) == pytest.approx(1)
    assert broken["median_us"] == broken["times_best_peer"] == ""
    assert broken["note"] == "OOM, sadly"


def test_json_is_plain(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    save(results(row()), path)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    found = json.loads(path.read_text(), parse_constant=refuse)
    assert found["rows"][0]["contestant"] == OURS
