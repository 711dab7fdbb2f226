"""`bench round`: its verbs run in processes of their own, and whatever they do, it goes on."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from alexnet_triton.bench import round
from alexnet_triton.bench.__main__ import main, parser
from alexnet_triton.bench.choices import PHASES
from alexnet_triton.bench.records import Results, Row, load, save
from alexnet_triton.bench.round import FOUND, Round, begin, commands, keep, watch
from alexnet_triton.bench.tune.budget import searches
from alexnet_triton.bench.tune.tuner import device_name
from alexnet_triton.engine import EngineError
from alexnet_triton.engine.devices.planner import Planner
from alexnet_triton.engine.plan import ARITHMETIC
from alexnet_triton.engine.zoo import network
from alexnet_triton.kernels import tuning

Script = Callable[..., None]
Capture = pytest.CaptureFixture[str]


def row(contestant: str = "ours", us: float = 1.0, problem: str = "conv1") -> Row:
    said = ("layers", problem, "digits", 1, "fp32", contestant, "host")
    return Row(*said, flops=1, bytes=1, median_us=us)  # type: ignore[arg-type]


def asked(out: Path, device: str = "cpu", **more: object) -> Round:
    made = Round(out, torch.device(device), "digits", "fp32", (1, 2, 4, 8), out / "table.json")
    return replace(made, **more)  # type: ignore[arg-type]


def ends(pid: int) -> bool:
    """Whether a process ends soon; one that nobody has asked for its status since has."""
    deadline = time.monotonic() + 300  # half of what it would sleep
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.01)
    return False


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    """Replace what phases run by lines of the shell; `$FOUND` has a row, `$KEPT` is its place.

    Each line is a command of its own.
    """
    save(Results({}, {"fp32": 2.0}, (row(),)), tmp_path / "found.json")
    names = {"FOUND": tmp_path / "found.json", "KEPT": tmp_path / "out" / FOUND}

    def replaced(**lines: str) -> None:
        start = "; ".join(f"{name}={shlex.quote(str(path))}" for name, path in names.items())
        made = {
            phase: [["sh", "-c", f"{start}; {line}"] for line in several.split("\n")]
            for phase, several in lines.items()
        }
        monkeypatch.setattr(round, "commands", lambda phase, asked, seconds: made[phase])

    return replaced


def run(tmp_path: Path, *phases: str) -> tuple[int, Results]:
    out = tmp_path / "out"
    status = main(["round", "--out", str(out), "--device", "cpu", "--phases", *phases])
    assert not (out / FOUND).exists()
    assert "</html>" in (out / "report.html").read_text()
    return status, load(out / "results.json")


# --- phases ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "note"),
    [
        ("echo 'verb: error: by nothing' >&2; exit 1", "layers: failed, verb: error: by nothing"),
        ("echo 'a row was not timed'; exit 1", "layers: failed, status 1"),
        ("kill -ABRT $$", "layers: failed, its process died with SIGABRT"),
    ],
)
def test_a_phase_that_fails_is_a_note_and_the_others_go_on(
    line: str, note: str, scripts: Script, tmp_path: Path, capsys: Capture
) -> None:
    """What it had found by then stays."""
    scripts(layers=f"cp $FOUND $KEPT; {line}", model="echo fine")
    status, results = run(tmp_path, "layers", "model")
    assert status == 1
    assert note in results.notes
    assert not [other for other in results.notes if "model: failed" in other]
    assert results.rows == (row(),)
    assert results.roofs == {"fp32": 2.0}
    said = capsys.readouterr().err
    assert said.splitlines()[-1] == note
    assert "fine" in said, "what a verb says is progress"
    assert (tmp_path / "out" / "model.txt").read_text() == "fine\n"
    assert (tmp_path / "out" / "results.csv").read_text().count("conv1") == 1


def test_all_commands_of_a_phase_are_kept(scripts: Script, tmp_path: Path) -> None:
    """One fails, and the next goes on; tests that fail say how many."""
    scripts(
        tests="echo 'E  ValueError: x'; echo '== 1 failed, 2 passed ==='; exit 1",
        model="cp $FOUND $KEPT; exit 1\nsed s/conv1/conv2/ $FOUND > $KEPT\ntrue",
    )
    status, results = run(tmp_path, "tests", "model")
    assert status == 1
    assert [each.problem for each in results.rows] == ["conv1", "conv2"]
    assert {"tests: failed, 1 failed, 2 passed", "model: failed, status 1"} <= {*results.notes}


def test_the_tests_of_a_checkout_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = {name for names in round.TESTS.values() for name in names}
    assert all((round.ROOT / "tests" / f"test_{name}.py").exists() for name in named)
    monkeypatch.setattr(round, "TESTS", {"cpu": ("table",)})
    status, results = run(tmp_path, "tests")
    assert status == 0, (tmp_path / "out" / "tests.txt").read_text()
    assert any(note.startswith("tests: passed, ") for note in results.notes)


def test_a_round_that_is_ended_tells_what_there_is(scripts: Script, tmp_path: Path) -> None:
    """By a signal, as a scheduler sends it; the child of the phase's child ends too."""
    pid = tmp_path / "pid"
    sleeper = f"sleep 600 & echo $! > {shlex.quote(str(pid))}"
    scripts(layers=f"cp $FOUND $KEPT; {sleeper}; kill -TERM $PPID; wait", model="exit 3")
    status, results = run(tmp_path, "layers", "model")
    assert status == 130
    assert results.rows == (row(),)
    assert any(note.startswith("interrupted") for note in results.notes)
    assert not [note for note in results.notes if note.startswith("model")]
    assert ends(int(pid.read_text()))


def test_results_stand_without_what_draws_them(
    scripts: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setitem(sys.modules, "alexnet_triton.bench.report.report", None)
    scripts(layers="cp $FOUND $KEPT")
    assert main(["round", "--out", str(tmp_path / "out"), "--phases", "layers"]) == 0
    assert load(tmp_path / "out" / "results.json").rows == (row(),)
    assert [line for line in capsys.readouterr().err.splitlines() if "report: none, " in line]


class Until:
    """In the place of a time: it has come when a file is there, and something in a list."""

    def __init__(self, path: Path, there: list[None]) -> None:
        self.path, self.there = path, there

    def __gt__(self, now: float) -> bool:
        return not (self.path.exists() and self.there)


def test_a_command_that_takes_too_long_ends_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those in sessions of their own, too, which only it knows: it is interrupted first.

    What it finds meanwhile can be kept.
    """
    monkeypatch.setattr(round, "SAVED", 0.0)
    pids, ticks = tmp_path / "pids", list[None]()
    place = shlex.quote(str(pids))
    line = (
        "setsid sleep 600 & theirs=$!; sleep 600 & ours=$!; trap 'kill $theirs; exit' INT; "
        f"echo $theirs $ours > {place}.part; mv {place}.part {place}; wait"
    )
    end: float = Until(pids, ticks)  # type: ignore[assignment]
    assert watch(["sh", "-c", line], tmp_path / "log", end, lambda: ticks.append(None)) is None
    assert all(ends(int(pid)) for pid in pids.read_text().split())


def test_there_is_an_end_to_a_round(tmp_path: Path) -> None:
    """What cannot begin is told; a phase that is cut short fails if it had nothing."""
    made = asked(tmp_path)
    begin(made)
    round.perform(made, ["layers"], time.monotonic() + 0.01)
    round.perform(made, ["layers", "model"], time.monotonic() - 1)
    notes = load(tmp_path / "results.json").notes
    assert {
        "layers: failed, cut short with nothing",
        "layers: not reached",
        "model: not reached",
    } <= {*notes}


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_every_command_is_one_that_the_verbs_take(device: str, tmp_path: Path) -> None:
    made = asked(tmp_path, device, limit=7, again=True)
    dtypes = []
    for phase in list(PHASES)[1:]:
        for command in commands(phase, made, 60.4):
            assert command[:3] == [sys.executable, "-m", "alexnet_triton.bench"]
            options = parser().parse_args(command[3:])
            assert options.device == device
            if phase == "tune":
                assert (options.all, options.again, options.limit) == (True, True, 7)
                assert (options.budget, options.cache) == (60, tmp_path / "searches.jsonl")
            else:
                assert options.json == str(tmp_path / FOUND)
            if phase in ("tune", "order"):
                assert options.table == (made.table if device == "cpu" else None)
            if phase == "model":
                dtypes.append((options.dtype, options.batch))
    others = [(["bf16"], [1, 2, 4]), (["tf32"], [1, 2]), (["fp32"], [1, 2])]
    assert dtypes == [(["fp32"], [1, 2, 4, 8]), *(others if device == "cuda:0" else [])]


# --- earlier rounds --------------------------------------------------------------------------


def test_an_earlier_rounds_rows_stay_until_they_are_measured_again(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    new.mkdir()
    begin(asked(old))
    stored = load(old / "results.json")
    rows = (row("ours", 9.0), row("theirs", 8.0), row("ours", 7.0, "conv2"))
    before = replace(stored, rows=rows, roofs={"fp32": 1.0, "copy": 3.0})
    save(before, old / "results.json")
    (old / "searches.jsonl").write_text("")
    begin(asked(new), old)
    save(Results({}, {"fp32": 2.0}, (row("ours", 1.0), row("theirs", 5.0))), new / FOUND)
    keep(asked(new), "a note")
    found = load(new / "results.json")
    assert {(r.problem, r.contestant): r.median_us for r in found.rows} == {
        ("conv1", "ours"): 1.0,
        ("conv1", "theirs"): 5.0,
        ("conv2", "ours"): 7.0,
    }
    assert found.roofs == {"fp32": 2.0, "copy": 3.0}
    assert found.environment["cpu"] == stored.environment["cpu"]
    assert any(stored.environment["date"] in note for note in found.notes)  # type: ignore[operator]
    assert found.notes[-1] == "a note"
    assert (new / "searches.jsonl").exists()


def test_searches_that_only_the_results_hold_are_gone_on_with(tmp_path: Path) -> None:
    """As stored results do, which come without the cache."""
    old = Path(__file__).parents[1] / "bench" / "results" / "cpu-digits"
    assert not (old / "searches.jsonl").exists()
    begin(asked(tmp_path), old)
    keep(asked(tmp_path))
    found = load(tmp_path / "results.json").searches
    assert len(found) == 39
    assert found == load(old / "results.json").searches


def test_another_gpus_round_is_refused(tmp_path: Path) -> None:
    save(Results({"gpu name": "another"}, {}, ()), tmp_path / "results.json")
    with pytest.raises(EngineError, match=r"wanted a round on None, got one on another"):
        begin(asked(tmp_path), tmp_path)


def test_the_commit_can_be_told_where_there_is_no_git(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(round, "environment", lambda device: {"commit": None, "gpu name": None})
    begin(asked(tmp_path), commit="1234")
    assert load(tmp_path / "results.json").environment["commit"] == "1234"


# --- the whole -------------------------------------------------------------------------------


@pytest.mark.interpreter
def test_a_round_on_a_cpu_runs_to_its_end(tmp_path: Path, capsys: Capture) -> None:
    """The search of the one step that the table has no row for, and an order."""
    table = tmp_path / tuning.path_of(device_name(torch.device("cpu"))).name
    every = searches(Planner(network("digits"), ARITHMETIC["fp32"], None), "fp32", [1])
    rows = [search.row for search in every if search.step.name != "fc8"]
    tuning.save(table, device_name(torch.device("cpu")), rows)
    wanted = ["--phases", "tune", "order", "--limit", "1", "--minutes", "60"]
    assert main(["round", "--out", str(tmp_path), "--device", "cpu", *wanted]) == 0
    found = load(tmp_path / "results.json")
    assert {row.section for row in found.rows} == {"order"}
    assert not [note for note in found.notes if "failed" in note or "not reached" in note]
    assert [line["layer"] for line in found.searches] == ["fc8"]
    assert len((tmp_path / "searches.jsonl").read_text().splitlines()) == 1
    won = [each for each in json.loads(table.read_text())["rows"] if each["config"]]
    assert {each["op"] for each in won} == {"linear", "run"}
    assert "<svg" in (tmp_path / "report.html").read_text()
    assert str(tmp_path / "report.html") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (["--minutes", "0.1"], "--minutes: wanted more than 0.33, got 0.1"),
        (["--batch", "0"], "--batch: wanted 1 or more, got 0"),
        (["--earlier", "nowhere"], "nowhere/results.json: No such file"),
    ],
)
def test_refusals_are_one_line(
    wanted: list[str], said: str, tmp_path: Path, capsys: Capture
) -> None:
    assert main(["round", "--out", str(tmp_path), "--device", "cpu", *wanted]) == 1
    assert said in capsys.readouterr().err
