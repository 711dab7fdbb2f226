"""Result rows: rates, who is the best peer, and files that come back as they went."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from alexnet_triton.bench.records import (
    OURS,
    DeviceState,
    RecordError,
    Results,
    Row,
    Times,
    best_peer,
    load,
    merge,
    save,
    save_csv,
    times_best_peer,
)


def row(us: float | None = 100.0, contestant: str = OURS, batch: int = 1, **more: object) -> Row:
    kept = Row("layers", "conv4", "alexnet", batch, "fp16", contestant, "graph", 10**9, 10**6)
    kept = replace(kept, max_error=1e-4, rms_error=1e-5, tolerance=1e-3)
    if us is not None:
        kept = replace(kept, median_us=us, p20_us=0.99 * us, p80_us=1.01 * us, runs=25)
    return replace(kept, **more)  # type: ignore[arg-type]


def test_rates_are_those_of_useful_work() -> None:
    it = row(batch=64, roof_us=40.0)
    assert it.tflops == pytest.approx(10)
    assert it.gbps == pytest.approx(10)
    assert it.percent_of_roof == pytest.approx(40)
    assert it.images_per_second == pytest.approx(640_000)
    untimed = row(None, roof_us=40.0)
    assert untimed.tflops is untimed.gbps is untimed.percent_of_roof is None
    assert untimed.images_per_second is None
    assert row().percent_of_roof is None


def test_the_best_peer_is_the_fastest_right_one_of_the_same_race() -> None:
    ours = row()
    rows = [
        ours,
        row(300.0, "slow"),
        row(150.0, "best"),
        row(10.0, "straw", straw_man=True),
        row(10.0, "wrong", max_error=2e-3),
        row(10.0, "wrong in the mean", rms_error=3e-4),
        row(10.0, "unproved", max_error=None),
        row(None, "untimed"),
        row(10.0, "another batch", batch=8),
        row(10.0, "another dtype", dtype="bf16"),
        row(10.0, "another clock", clock="cold"),
        row(10.0, "another layer", problem="conv5"),
        row(10.0, "another network", network="vgg16"),
        row(10.0, "another section", section="model"),
        row(10.0, "another race", race="later"),
        row(1.0),
    ]
    peer = best_peer(ours, rows)
    assert peer is not None
    assert peer.contestant == "best"
    assert times_best_peer(ours, rows) == pytest.approx(1.5)
    assert times_best_peer(row(300.0, "slow"), rows) == pytest.approx(0.5)
    assert best_peer(ours, [ours]) is None
    assert times_best_peer(ours, [ours]) is None
    assert times_best_peer(row(None), [row(50.0, "peer")]) is None


def test_times_become_the_rows() -> None:
    timed = row(None).timed(Times("cold", (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)))
    assert (timed.clock, timed.median_us, timed.p20_us, timed.p80_us) == ("cold", 3.5, 2.0, 5.0)
    assert timed.runs == 6
    state = DeviceState(sm_mhz=1980.0, watts=612.0, celsius=54.0, throttled="power cap")
    timed = row(None).timed(Times("graph", (1.00000049, 123456.7), state))
    assert timed.samples == (1.0, 123460.0)
    assert timed.median_us == 61730.5
    assert (timed.sm_mhz, timed.throttled) == (1980.0, "power cap")


def results(*rows: Row) -> Results:
    return Results({"gpu name": "H200", "cuda": None}, {"fp16": 7e14, "copy": 4e12}, rows)


def test_json_comes_back_as_it_went(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    wrong = row(None, "wrong", max_error=None, rms_error=None, note="NO MATCH, so not timed")
    absent = row(None, "peer", max_error=None, tolerance=None, note="needs a GPU")
    timed = row().timed(Times("graph", (99.0, 100.0, 1e-7)))
    given = replace(results(timed, wrong, absent), notes=("by hand [1,\n 2]",))
    save(given, path)
    assert len(path.read_text().splitlines()) < 120, "samples lie in one line"
    json.loads(path.read_text(), parse_constant=pytest.fail)  # infinity is no JSON
    assert load(path) == given
    assert [each.error for each in load(path).rows] == [1e-4, math.inf, None]
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


def test_the_schema_before_had_no_samples_and_a_race_a_measurement(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    save(replace(results(row(), row(9.0, "peer")), environment={"date": "2026-01-02"}), path)
    old = json.loads(path.read_text()) | {"schema": 1}
    for each in old["rows"]:
        del each["samples"], each["race"]
    path.write_text(json.dumps(old))
    rows = load(path).rows
    assert [(each.samples, each.race) for each in rows] == [((), "2026-01-02")] * 2
    assert times_best_peer(rows[0], rows) == pytest.approx(0.09)


def test_a_race_is_replaced_as_a_whole_by_one_of_all_whom_it_timed() -> None:
    first = [row(race="a"), row(150.0, "torch", race="a"), row(None, "absent", race="a")]
    whole = [row(90.0, race="b"), row(140.0, "torch", race="b"), row(80.0, "new", race="b")]
    other = [row(95.0, race="c"), row(70.0, "compile", race="c")]
    before = results(*first, row(batch=8, race="d"))
    assert merge(before, results(*whole)).rows == (before.rows[-1], *whole)
    both = merge(before, results(*other))
    assert both.rows == (*before.rows, *other), "torch was not measured again: both races stand"
    ratios = [times_best_peer(each, both.rows) for each in (first[0], other[0])]
    assert ratios == pytest.approx([1.5, 70 / 95]), "each within its race"
    assert merge(both, results(*other)).rows == both.rows, "a race that goes on is the same"
    assert merge(both, results(*whole)).rows == (before.rows[-1], *other, *whole)
    assert merge(before, results(replace(row(race="b"), clock="cold"))).rows[:3] == tuple(first)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
        ("{", "no JSON"),
        ("[]", "wanted results of schema 2, got None"),
        ('{"schema": 7}', "wanted results of schema 2, got 7"),
        ('{"schema": 2, "roofs": {}}', "no results of schema 2"),
        (
            '{"schema": 2, "environment": {}, "roofs": {}, "rows": [{"speed": 9}], "searches": [],'
            ' "notes": []}',
            "no results of schema 2.*speed",
        ),
        (b"\xff\xfe\x00", "no JSON"),
        (
            '{"schema": 2, "environment": {}, "roofs": [], "rows": [], "searches": [],'
            ' "notes": []}',
            "no results of schema 2",
        ),
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


@pytest.mark.parametrize("odd", [{"median_us": "9"}, {"samples": [1.0, math.nan]}, {"p20_us": 0}])
def test_a_time_that_is_none_is_refused(tmp_path: Path, odd: dict[str, Any]) -> None:
    path = tmp_path / "results.json"
    save(results(row(100.0, **odd)), path)
    with pytest.raises(RecordError, match="no results of schema 2"):
        load(path)


def test_a_folder_in_the_way_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="directory"):
        save(results(), tmp_path)
    with pytest.raises(RecordError, match="directory"):
        save_csv([row()], tmp_path)


def test_csv_has_the_rates_and_the_comparison(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    later = row(50.0, race="later")
    save_csv([row(), row(150.0, "peer"), row(None, "broken", note="OOM, sadly"), later], path)
    with path.open(newline="") as file:
        ours, peer, broken, alone = csv.DictReader(file)
    assert alone["race"] == "later"
    assert alone["times_best_peer"] == "", "its peers were another race"
    assert float(ours["tflops"]) == pytest.approx(10)
    assert float(ours["times_best_peer"]) == pytest.approx(1.5)
    assert float(peer["times_best_peer"]) == pytest.approx(1)
    assert broken["median_us"] == broken["times_best_peer"] == ""
    assert broken["note"] == "OOM, sadly"
