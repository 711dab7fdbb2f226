"""`bench round`: its verbs run in processes of their own, and whatever they do, it goes on.

Killed at any point it leaves what can be read and gone on with; without a card it is rehearsed.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from alexnet_triton.bench import agenda, hypotheses, round
from alexnet_triton.bench.__main__ import main, parser
from alexnet_triton.bench.agenda import BATCHES, LEAST, OTHERS, FakeClock, over, turns
from alexnet_triton.bench.choices import PHASES
from alexnet_triton.bench.env import environment
from alexnet_triton.bench.records import OURS, Results, Row, load, save
from alexnet_triton.bench.round import Round, begin, command, keep, put, watch
from alexnet_triton.bench.tune.budget import searches
from alexnet_triton.bench.tune.cache import Cache
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


def asked(out: Path, device: str = "cpu") -> Round:
    return Round(out, torch.device(device), "digits", "fp32", out / "table.json")


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
    """Replace what phases run by a line of the shell; `$FOUND` has a row, `$KEPT` is its place."""
    found = tmp_path / "found.json"
    save(Results({}, {"fp32": 2.0}, (row(),)), found)

    def replaced(**lines: str) -> None:
        def scripted(phase: str, asked: Round, seconds: float) -> list[str]:
            places = {"FOUND": found, "KEPT": asked.rows(phase)}
            start = "; ".join(f"{name}={shlex.quote(str(path))}" for name, path in places.items())
            return ["sh", "-c", f"{start}; {lines[phase]}"]

        monkeypatch.setattr(round, "command", scripted)

    return replaced


def run(tmp_path: Path, *phases: str) -> tuple[int, Results]:
    out = tmp_path / "out"
    status = main(["round", "--out", str(out), "--device", "cpu", "--phases", *phases])
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


def test_rows_of_two_phases_are_kept_and_tests_that_fail_are_counted(
    scripts: Script, tmp_path: Path
) -> None:
    scripts(
        tests="echo 'E  ValueError: x'; echo '== 1 failed, 2 passed ==='; exit 1",
        model="cp $FOUND $KEPT; exit 1",
        layers="sed s/conv1/conv2/ $FOUND > $KEPT",
    )
    status, results = run(tmp_path, "tests", "model", "layers")
    assert status == 1
    assert [each.problem for each in results.rows] == ["conv1", "conv2"]
    assert {"tests: failed, 1 failed, 2 passed", "model: failed, status 1"} <= {*results.notes}


class Found:
    """A plugin of pytest that knows what was collected."""

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.names = [item.nodeid for item in session.items]


def test_the_chosen_tests_are_there_and_need_no_interpreter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By pytest itself: a name that is none would cost a card all of them."""
    chosen = agenda.tests()
    said = command("tests", asked(tmp_path, "cuda"), 60.0)
    assert said[-len(chosen) :] == chosen
    assert "-v" in said, "a line for each as it ends"
    # Here, where torch and most of these files have been imported.
    monkeypatch.chdir(agenda.ROOT)
    collect = ["--collect-only", "-q", "-m", "not interpreter", "-p", "no:faulthandler"]
    assert pytest.main([*collect, *chosen], plugins=[found := Found()]) == 0
    assert sorted(found.names) == sorted(chosen)
    assert 35 <= len(chosen) <= 45
    kernels = ("conv", "gemm", "first_layer", "pool", "lrn", "channels_last", "epilogue", "run")
    assert {f"tests/test_{name}.py" for name in kernels} <= {
        name.partition("::")[0] for name in chosen
    }


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


def test_an_interrupt_while_a_command_starts_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, before = [], signal.getsignal(signal.SIGINT)
    start = subprocess.Popen

    def interrupted(*args: Any, **options: Any) -> Any:
        started.append(start(*args, **options))
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)  # where the handler runs
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    with pytest.raises(KeyboardInterrupt):
        round.watch(["sleep", "600"], tmp_path / "log", math.inf)
    assert started[0].poll() is not None
    assert signal.getsignal(signal.SIGINT) is before


def test_results_stand_without_what_draws_them(
    scripts: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setitem(sys.modules, "alexnet_triton.bench.report.report", None)
    scripts(layers="cp $FOUND $KEPT")
    assert main(["round", "--out", str(tmp_path / "out"), "--phases", "layers"]) == 0
    assert load(tmp_path / "out" / "results.json").rows == (row(),)
    assert [
        line for line in capsys.readouterr().err.splitlines() if "report.html: left out, " in line
    ]


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


def test_a_phase_that_is_cut_short_with_nothing_has_failed(tmp_path: Path) -> None:
    made = asked(tmp_path)
    begin(made)
    round.perform(made, ["layers"], time.monotonic() + 0.01)
    assert "layers: failed, cut short with nothing" in load(tmp_path / "results.json").notes


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_every_command_is_one_that_the_verbs_take(device: str, tmp_path: Path) -> None:
    made, cuda = asked(tmp_path, device), device == "cuda:0"
    put(made.rows("fill"), '{"fill": 51.26}')
    for phase in PHASES if cuda else LEAST:
        if phase == "tests":
            continue
        said = command(phase, made, 60.4)
        assert said[:3] == [sys.executable, "-m", "alexnet_triton.bench"]
        options = parser().parse_args(said[3:])
        assert options.device == device
        if phase in BATCHES:
            assert tuple(options.batch) == (BATCHES[phase] if cuda else (1,))
        if options.verb == "tune":
            assert (options.all, options.again) == (True, phase == "climb")
            assert (options.short, options.limit) == (
                cuda and phase != "climb",
                None if cuda else 3,
            )
            assert options.fill == (51.3 if options.short else None)
            assert (options.budget, options.cache) == (60, tmp_path / "searches.jsonl")
        else:
            assert options.json == str(made.rows(phase))
        if options.verb in ("tune", "order"):
            assert options.table == (None if cuda else made.table)
        if options.verb == "model":
            assert ("compile" in options.peers) == (phase == "compile")
            assert options.dtype == ([*OTHERS] if phase == "dtypes" else ["fp32"])


# --- calls -----------------------------------------------------------------------------------


def test_phases_have_their_part_of_what_is_left_until_the_next_does_not_fit() -> None:
    now, phases = FakeClock(), ["fill", "roofs", "short", "model"]  # 12, 10, 160 and 40 s
    given = []
    for phase, share, left in turns(phases, 200, now):
        given.append((phase, share, left))
        now.seconds += {"fill": 30, "roofs": 10}.get(phase, 125)
    assert given == [
        ("fill", 200 * 12 / 182, 200),
        ("roofs", 10, 170),
        ("short", 160, 160),
    ], "35 s are too few for the last"
    assert [phase for phase, _, _ in turns(["short"], 20, FakeClock())] == ["short"]


def test_what_ran_to_its_end_is_over() -> None:
    notes = ["fill: 50.1 bytes", "fill: took 9 s", "first: failed, status 1", "first: took 3 s"]
    notes += ["short: 3 not reached", "short: took 160 s", "layers: cut short", "layers: took 9 s"]
    assert over(notes) == {"fill", "first"}
    assert over([*notes, "layers: took 80 s"]) == {"fill", "first", "layers"}


def test_a_call_goes_on_where_the_one_before_ended(scripts: Script, tmp_path: Path) -> None:
    """In another folder; a phase that was cut short comes again, with the rows that it left."""
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    begin(asked(old))
    rows = (row("ours", 9.0), row("theirs", 8.0, "conv3"))
    before = replace(load(old / "results.json"), rows=rows, roofs={"fp32": 1.0, "copy": 3.0})
    done = tuple(f"{phase}: took 1 s" for phase in LEAST if phase not in ("model", "layers"))
    save(replace(before, notes=(*done, "layers: failed, status 1")), old / "results.json")
    save(Results({}, {}, (row("ours", 7.0, "conv2"),)), old / "model.json")  # killed before its end
    table = tuning.path_of(device_name(torch.device("cpu"))).name
    won = tuning.TunedRow("linear", {"P": 1}, "fp32", 1, {"BLOCK_M": 16}, 1.0, "", "", "")
    tuning.save(old / table, device_name(torch.device("cpu")), [won])
    put(old / "fill.json", '{"fill": 50}')
    scripts(model="cp $FOUND $KEPT", layers="true")
    assert main(["round", "--out", str(new), "--device", "cpu", "--continue", str(old)]) == 0
    found = load(new / "results.json")
    took = [note.split(":")[0] for note in found.notes[len(done) :] if ": took" in note]
    assert took == ["model", "layers"]
    assert {(each.problem, each.contestant): each.median_us for each in found.rows} == {
        ("conv1", "ours"): 1.0,
        ("conv3", "theirs"): 8.0,
        ("conv2", "ours"): 7.0,
    }
    assert found.roofs == {"fp32": 2.0, "copy": 3.0}
    assert any(str(before.environment["date"]) in note for note in found.notes)
    assert tuning.load(new / table).rows == (won,)
    assert json.loads((new / "fill.json").read_text()) == {"fill": 50}


def test_searches_that_only_the_results_hold_are_gone_on_with(tmp_path: Path) -> None:
    """As stored results do, which come without the cache."""
    old = Path(__file__).parents[1] / "bench" / "results" / "cpu-digits"
    assert not (old / "searches.jsonl").exists()
    begin(asked(tmp_path), old)
    keep(asked(tmp_path), "short")
    found, stored = (load(each / "results.json").searches for each in (tmp_path, old))
    assert len(found) == 39
    assert [one["config"] for one in found] == [one["config"] for one in stored]


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


# --- killed ----------------------------------------------------------------------------------


def killed(point: int, work: Callable[[], None]) -> bool:
    """Whether a process that did `work` was killed as it wrote a file for the so-manieth time.

    A text is on the disk by half then; a new file has not yet taken the old one's place, or has.
    """
    if pid := os.fork():
        return os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    count = 0

    def reached() -> bool:
        nonlocal count
        count += 1
        return count == point

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    text, move = Path.write_text, os.replace

    def write_text(self: Path, data: str, **how: str) -> int:
        if reached():
            text(self, data[: len(data) // 2])
            die()
        return text(self, data, **how)

    def put_in_place(source: Path, target: Path) -> None:
        if reached():
            die()
        move(source, target)
        if reached():
            die()

    Path.write_text, os.replace = write_text, put_in_place  # type: ignore[assignment]
    try:
        work()
    finally:
        os._exit(0)


def test_what_cannot_be_read_does_not_end_a_round(scripts: Script, tmp_path: Path) -> None:
    scripts(model="echo '{' > $KEPT; cp $KEPT $KEPT.part", layers="cp $FOUND $KEPT")
    status, results = run(tmp_path, "model", "layers")
    assert status == 0
    assert results.rows == (row(),)
    assert over(results.notes) == {"model", "layers"}


def test_killed_at_any_point_it_leaves_what_can_be_gone_on_with(
    scripts: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = environment(torch.device("cpu"))
    monkeypatch.setattr(round, "environment", lambda device: here)
    scripts(model="cp $FOUND $KEPT", layers="sed s/conv1/conv2/ $FOUND > $KEPT")
    won = tuning.TunedRow("linear", {"P": 1}, "fp32", 1, {"BLOCK_M": 16}, 1.0, "", "", "")
    tuning.save(tmp_path / "won.json", "a card", [won])

    def call(out: Path, *phases: str, before: Path | None = None) -> None:
        made = replace(asked(out), table=tmp_path / "won.json")
        begin(replace(made, table=out / "none.json"), before)
        done = over(load(out / "results.json").notes)
        left = [phase for phase in phases if phase not in done]
        round.perform(made, left, time.monotonic() + 600)

    point, lost = 0, True
    while lost:
        point += 1
        out = tmp_path / str(point)
        out.mkdir()
        lost = killed(point, lambda out=out: call(out, "model"))  # type: ignore[misc]
        begun = (out / "results.json").exists()
        assert begun or not (out / "model.json").exists()
        assert not (table := out / "won.json").exists() or tuning.load(table).rows == (won,)
        call(out, "model", "layers", before=out if begun else None)
        assert {each.problem for each in load(out / "results.json").rows} == {"conv1", "conv2"}
        assert over(load(out / "results.json").notes) == {"model", "layers"}
        assert Cache(out / "searches.jsonl").trials == []
    assert point > 15


def test_what_a_killed_round_runs_ends_with_it(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    line = f"echo $$ > {shlex.quote(str(pid))}.part; mv {shlex.quote(str(pid))}.part "
    line += f"{shlex.quote(str(pid))}; exec sleep 600"
    if not (child := os.fork()):
        watch(["sh", "-c", line], tmp_path / "log", time.monotonic() + 600)
        os._exit(1)
    while not pid.exists():
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert ends(int(pid.read_text()))


# --- rehearsed -------------------------------------------------------------------------------


def test_three_calls_fit_by_a_clock_of_their_own(capsys: Capture) -> None:
    assert main(["round", "--dry"]) == 0
    said = capsys.readouterr().out.splitlines()
    calls = [line for line in said if line.startswith("call ")]
    assert 1 <= len(calls) <= 3
    assert all(re.match(r"call \d: \d+ binaries, the last at \d+ s", line) for line in calls)
    assert [line.split()[0] for line in said if line.startswith("  ") and "report" not in line] == [
        *PHASES
    ]


def test_what_takes_too_long_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """As an earlier call noted it; or in calls that are too short, or too many."""
    monkeypatch.setattr(agenda, "binaries", lambda *rest: iter(()))
    dry = ["round", "--dry", "--phases", "first", "layers"]
    assert main(dry) == 0
    save(Results({}, {}, (), notes=("first: took 500 s",)), tmp_path / "results.json")
    assert main([*dry, "--continue", str(tmp_path)]) == 1
    assert "first        at   0 s: 500 of 173 s,  0 binaries, TOO LATE" in capsys.readouterr().out
    assert main([*dry, "--minutes", "0.4"]) == 1, "the first takes longer"
    monkeypatch.setattr(agenda, "CALLS", 1)
    assert main([*dry, "--minutes", "3"]) == 0
    assert main([*dry, "--minutes", "1.7"]) == 1, "two calls"


def test_hypotheses_are_answered_from_rows_trials_and_notes() -> None:
    ours = [
        replace(row(OURS, 440.0), batch=1024, dtype="fp16", clock="graph", tolerance=1e-2),
        replace(row(OURS, 55.0, "conv2"), batch=64, dtype="fp16", clock="graph", tolerance=1e-2),
    ]
    rows = [replace(each, max_error=1e-3, rms_error=1e-4) for each in ours]
    rows[1] = replace(rows[1], max_error=1.0)  # no match
    tile = {"BLOCK_M": 256, "BLOCK_M2": 0, "BLOCK_N": 128, "BLOCK_N2": 64}
    trial = {"layer": "conv2", "batch": 256, "status": "ok", "config": tile | {"num_warps": 8}}
    tried = [trial | {"median_us": us} for us in (160.0, 157.0)]
    tried += [trial | {"median_us": 1.0, "config": tile | {"BLOCK_N2": 0}}]
    notes = ("fill: 51.3 bytes a clock and multiprocessor", "fill: took 9 s")
    said = hypotheses.found(Results({}, {}, tuple(rows), tuple(tried), notes))
    lines = dict(line[2:].split(": ", 1) for line in said.splitlines() if line.startswith("- "))
    assert lines["12"] == "conv1 x1,024, us an image: 0.430"
    assert lines["14"].startswith("conv2 x64, us: not measured; ")
    assert lines["15"].startswith("conv2 x256 at 256 rows by 128+64, us: 157; ")
    assert lines["22"].startswith("operands, bytes a clock and multiprocessor: 51.3; ")
    table = (Path(round.__file__).parent / "results" / "NOTES.md").read_text()
    assert {f"| {number} |" for number in hypotheses.QUESTIONS} <= {
        *re.findall(r"\| \d+ \|", table)
    }


# --- the whole -------------------------------------------------------------------------------


@pytest.mark.interpreter
def test_a_round_on_a_cpu_runs_to_its_end(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search of the one step that the table has no row for, and an order."""
    table = tmp_path / tuning.path_of(device_name(torch.device("cpu"))).name
    every = searches(Planner(network("digits"), ARITHMETIC["fp32"], None), "fp32", [1])
    rows = [search.row for search in every if search.step.name != "fc8"]
    tuning.save(table, device_name(torch.device("cpu")), rows)
    monkeypatch.setattr(round, "TRIALS", 1)
    wanted = ["--phases", "short", "order", "--minutes", "60"]
    assert main(["round", "--out", str(tmp_path), "--device", "cpu", *wanted]) == 0
    found = load(tmp_path / "results.json")
    assert {row.section for row in found.rows} == {"order"}
    assert not [note for note in found.notes if "failed" in note or "not reached" in note]
    assert [line["layer"] for line in found.searches] == ["fc8"]
    assert len(Cache(tmp_path / "searches.jsonl").trials) == 1
    won = [each for each in json.loads(table.read_text())["rows"] if each["median_us"]]
    assert {each["op"] for each in won} == {"linear", "run"}
    assert "all images at once" in (tmp_path / "report.html").read_text()
    assert str(tmp_path / "report.html") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (["--minutes", "0.1"], "--minutes: wanted more than 0.33, got 0.1"),
        (["--continue", "nowhere"], "nowhere/results.json: No such file"),
        (["--model", "none"], "none"),
    ],
)
def test_refusals_are_one_line(
    wanted: list[str], said: str, tmp_path: Path, capsys: Capture
) -> None:
    assert main(["round", "--out", str(tmp_path), "--device", "cpu", *wanted]) == 1
    assert said in capsys.readouterr().err
