"""`bench compare`: races joined, verdicts by intervals, the peers as control, and what fails."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
from alexnet_triton.bench.__main__ import main
from alexnet_triton.bench.compare import _quantile, compare, fraction
from alexnet_triton.bench.ratio import ratio
from alexnet_triton.bench.records import OURS, Results, Row, Times, load, save

Capture = pytest.CaptureFixture[str]

ENVIRONMENT: dict[str, str | None] = {"gpu name": "H200", "torch": "2.11", "triton": "3.6"}
STORED = Path(__file__).parents[1] / "bench" / "results" / "cpu-digits" / "layers.json"
NOISE = (0.99, 1.0, 1.01, 1.0, 0.995, 1.005, 1.0, 0.998, 1.002, 1.0)


def row(us: float | None = 100.0, contestant: str = OURS, batch: int = 1, **more: object) -> Row:
    kept = Row("layers", "conv4", "alexnet", batch, "fp16", contestant, "graph", 10**9, 10**6)
    if us is not None:
        kept = replace(kept, max_error=1e-4, rms_error=1e-5, tolerance=1e-3)
        turn = sum(map(ord, contestant)) % len(NOISE)  # no two have the same luck
        noise = (*NOISE[turn:], *NOISE[:turn])
        kept = kept.timed(Times("graph", tuple(us * each for each in noise)))
    return replace(kept, **more)  # type: ignore[arg-type]


def results(*rows: Row, **environment: str | None) -> Results:
    return Results(ENVIRONMENT | environment, {"fp16": 7e14, "copy": 4e12}, rows)


def race(us: float, *peers: float) -> Results:
    """Ours and its peers, a to z, in one race."""
    names = (OURS, *"abcdefgh")
    return results(*(row(each, name) for each, name in zip((us, *peers), names, strict=False)))


# --- what a comparison finds -----------------------------------------------------------------


def drawn(stored: Results, generator: numpy.random.Generator, slower: float = 1.0) -> Results:
    """The same run as it might have been: rounds of each race drawn again; ours so much slower."""
    rounds: dict[str, numpy.ndarray[tuple[int], numpy.dtype[numpy.int64]]] = {}
    rows = []
    for each in stored.rows:
        count = len(each.samples)
        taken = rounds.setdefault(each.race, generator.integers(count, size=count))
        us = numpy.array(each.samples)[taken] * (slower if each.ours else 1.0)
        rows.append(each.timed(Times("host", tuple(us.tolist()))))
    return replace(stored, rows=tuple(rows))


def test_one_commit_is_not_slower_than_itself_and_a_tenth_is_found() -> None:
    stored = load(STORED)
    generator = numpy.random.default_rng(0)
    wrong = found = 0
    for _ in range(200):
        before = drawn(stored, generator)
        same, slow = (compare(before, drawn(stored, generator, by), 0.0) for by in (1.0, 1.1))
        wrong += bool(same.failures)
        found += bool(slow.failures)
    assert wrong <= 2
    assert found >= 190


@pytest.mark.parametrize(
    ("freedom", "share", "wanted"), [(24, 0.995, 2.797), (9, 0.995, 3.250), (14, 0.9995, 4.140)]
)
def test_quantiles_are_student_s(freedom: int, share: float, wanted: float) -> None:
    assert _quantile(share, freedom) == pytest.approx(wanted, rel=0.01)


@pytest.mark.parametrize(
    ("us", "threshold", "verdict"),
    [
        (80, None, "faster"),
        (120, None, "slower"),
        (100.1, None, "inconclusive"),
        (120, 0.15, "slower"),
        (120, 0.198, "inconclusive"),
        (120, 0.25, "inconclusive"),
        (80, 0.25, "inconclusive"),
    ],
)
def test_an_interval_beyond_the_threshold_is_a_verdict(
    us: float, threshold: float | None, verdict: str
) -> None:
    found = compare(
        race(100, 150, 200, 210, 220, 230), race(us, 150, 200, 210, 220, 230), threshold
    )
    ours, *peers = found.pairs
    assert ours.verdict == verdict
    assert ours.speed is not None
    assert ours.speed[0] < 100 / us < ours.speed[2]
    assert {peer.verdict for peer in peers} == {""}
    assert bool(found.failures) is (verdict == "slower" and threshold is not None)


def test_what_peers_share_is_the_machine_s() -> None:
    ours, *_ = compare(
        race(100, 150, 200, 210, 220, 230), race(120, 180, 240, 252, 264, 276), 0.05
    ).pairs
    assert ours.verdict == "inconclusive", "the machine became slower"
    assert ours.speed is not None
    assert ours.speed[1] == pytest.approx(1)
    ours, *_ = compare(
        race(100, 150, 200, 210, 220, 230), race(100, 180, 240, 252, 264, 276), 0.05
    ).pairs
    assert ours.verdict == "faster", "and so we became faster"


def test_what_peers_do_not_share_is_luck_that_ours_may_have_too() -> None:
    found = compare(race(100, 150, 200, 90, 80, 70), race(110, 165, 180, 95, 88, 63))
    assert found.pairs[0].verdict == "inconclusive"
    assert found.drifts[0].scatter > 0.05
    assert "5 peers" in str(found)


def test_the_more_rows_the_surer_each_must_be() -> None:
    """Holm: of one change among many rows the interval is wider than if it stood alone."""

    def files(rows: int) -> tuple[Results, Results]:
        old = [
            replace(each, batch=b)
            for b in range(rows)
            for each in race(100, 150, 200, 210, 220, 230).rows
        ]
        new = [
            replace(r, batch=b)
            for b in range(rows)
            for r in race(102, 150, 200, 210, 220, 230).rows
        ]
        return results(*old), results(*new)

    widths = []
    for rows in (2, 40):  # either has peers enough
        first = compare(*files(rows)).pairs[0]
        assert first.speed is not None
        widths.append(first.speed[2] - first.speed[0])
    assert widths[1] > 1.1 * widths[0]


def test_what_cannot_be_judged_says_what_would_cure_it() -> None:
    bare = race(100, 150, 200, 210, 220, 230)
    bare = replace(bare, rows=tuple(replace(each, samples=()) for each in bare.rows))
    for old, new, why in (
        (
            bare,
            race(300, 150, 200, 210, 220, 230),
            "old results: 0 samples, measure again with --rounds 6",
        ),
        (race(100, 150, 200, 210, 220, 230), bare, "new results: 0 samples"),
        (race(100, 150), race(300, 150), "measure more problems or --peers"),
    ):
        found = compare(old, new, 0.05)
        assert found.pairs[0].verdict == "inconclusive"
        assert why in found.pairs[0].why
        assert why in str(found)
        assert not found.failures


def test_calls_of_one_turn_are_one_witness() -> None:
    luck = numpy.linspace(1.0, 1.07, 8)
    ours, peer = (
        replace(row(None, name), section="single-stream", max_error=0.0, tolerance=1.0).timed(
            Times("host", tuple(numpy.repeat(turns, 64).tolist()))
        )
        for name, turns in ((OURS, luck), ("a", luck[::-1]))
    )
    found = ratio(ours, peer)
    assert found is not None
    assert found.interval is not None
    assert found.interval[0] < 0.97 < 1.03 < found.interval[1]
    both = results(ours, *(replace(peer, contestant=name) for name in "abcde"))
    judged, *_ = compare(both, both).pairs
    assert judged.speed is not None
    assert judged.speed[0] < 0.9


def test_races_are_joined_with_those_of_the_same_peers() -> None:
    def of(race: str, us: float, *names: str) -> list[Row]:
        return [row(us, name, race=race) for name in (OURS, *names)]

    old = results(*of("a", 100, "torch", "cudnn"), *of("b", 200, "compile", "torch"))
    new = results(*of("c", 200, "compile", "torch"), *of("d", 100, "torch", "cudnn"))
    found = compare(old, new)
    assert [(pair.old.race, pair.new.race) for pair in found.pairs] == [("b", "c")] * 3 + [
        ("a", "d")
    ] * 3
    assert {pair.ratio for pair in found.pairs} == {1.0}


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


def files(folder: Path, *both: Results) -> list[str]:
    paths = [folder / "old.json", folder / "new.json"]
    for path, each in zip(paths, both, strict=True):
        save(each, path)
    return [str(path) for path in paths]


def test_the_verb(capsys: Capture, tmp_path: Path) -> None:
    before = race(100, 150, 200, 210, 220, 230)
    before = replace(before, rows=(*before.rows, row(batch=8)))
    paths = files(tmp_path, before, race(110, 150, 200, 210, 220, 230))
    assert main(["compare", *paths]) == 0
    assert main(["compare", *paths, "--fail-slower", "15%"]) == 0
    assert "FAILED" not in capsys.readouterr().out
    assert main(["compare", *paths, "--fail-slower", "5%"]) == 1
    out = capsys.readouterr().out
    assert "slower, 0.909x [0." in out
    assert "was 100.00 us, more than 5.0% slower" in out
    assert main(["compare", *paths, "--fail-slower", "5%", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["pairs"][0]["verdict"] == "slower"
    assert found["pairs"][0]["speed"][1] == pytest.approx(100 / 110)
    assert [each["batch"] for each in found["only_old"]] == [8]
    assert len(found["failures"]) == 1


def test_refusals(capsys: Capture, tmp_path: Path) -> None:
    (path, _) = files(tmp_path, results(), results())
    with pytest.raises(SystemExit):
        main(["compare", path, path, "--fail-slower", "five"])
    assert "wanted a percentage like 5%, got 'five'" in capsys.readouterr().err
