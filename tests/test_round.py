"""`bench round`: ends in its time whatever a phase does, keeps what there is, and goes on."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from alexnet_triton.bench import phases, round
from alexnet_triton.bench.__main__ import main
from alexnet_triton.bench.measure.contest import admit
from alexnet_triton.bench.measure.peers import Peer
from alexnet_triton.bench.measure.problem import Match, Tensors
from alexnet_triton.bench.phases import PHASES, Phase, Round, perform, searches, shares
from alexnet_triton.bench.records import Results, Row, load, save
from alexnet_triton.bench.round import begin, watch
from alexnet_triton.engine import EngineError
from alexnet_triton.engine.zoo import network
from alexnet_triton.kernels import tuning

CPU = torch.device("cpu")


def row(contestant: str = "ours", us: float = 1.0, problem: str = "conv1") -> Row:
    said = ("layers", problem, "digits", 1, "fp32", contestant, "host")
    return Row(*said, flops=1, bytes=1, median_us=us)  # type: ignore[arg-type]


class Clock:
    """In the place of `time`: nothing takes any, but to sleep does, until the alarm."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.alarms = (math.inf, 0.0)  # the next, and from one to the next

    def monotonic(self) -> float:
        return self.now

    def setitimer(self, which: int, seconds: float, interval: float = 0.0) -> None:
        self.alarms = (self.now + seconds if seconds else math.inf, interval)

    def sleep(self, seconds: float) -> None:
        alarm, interval = self.alarms
        if alarm > self.now + seconds:
            self.now += seconds
            return
        self.now, self.alarms = alarm, (alarm + interval, interval)
        handler = signal.getsignal(signal.SIGALRM)
        assert callable(handler)
        handler(signal.SIGALRM, None)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The phases' time, which has nothing to do with how long a test takes."""
    made = Clock()
    monkeypatch.setattr(phases, "time", made)
    monkeypatch.setattr(signal, "setitimer", made.setitimer)
    return made


@pytest.fixture
def started(tmp_path: Path, clock: Clock) -> Callable[[float], Round]:
    """A round of so many seconds, without results yet."""

    def make(seconds: float) -> Round:
        begin(tmp_path, CPU)
        return Round(tmp_path, CPU, network("digits"), "fp32", (1,), clock.now + seconds)

    return make


@pytest.fixture
def does(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replace what some phases do."""

    def replaced(**given: Callable[[Round], object]) -> None:
        for name, do in given.items():
            phase = Phase(do, 1.0)  # type: ignore[arg-type]
            monkeypatch.setitem(PHASES, name, phase)

    return replaced


def fails(run: Round) -> None:
    raise ZeroDivisionError("by nothing")


@pytest.fixture
def sleeps(clock: Clock) -> Callable[[Round], None]:
    """A phase that finds one row and then nothing for a minute."""

    def phase(run: Round) -> None:
        run.add([row()])
        clock.sleep(60)

    return phase


# --- a phase and its time --------------------------------------------------------------------


def test_a_phase_that_fails_is_a_note_and_the_others_go_on(
    started: Callable[[float], Round], does: Callable[..., None]
) -> None:
    does(roofs=fails, layers=lambda run: run.add([row()]))
    run = started(30)
    perform(run, ["roofs", "layers"])
    kept = load(run.out / "results.json")
    assert "roofs: failed, ZeroDivisionError: by nothing" in kept.notes
    assert kept.rows == (row(),)
    assert (run.out / "results.csv").exists()


def test_a_phase_that_sleeps_is_cut_short_and_leaves_what_it_had(
    started: Callable[[float], Round],
    does: Callable[..., None],
    sleeps: Callable[[Round], None],
    clock: Clock,
) -> None:
    does(layers=sleeps, model=sleeps, order=lambda run: run.add([row("other")]))
    run = started(60)
    perform(run, ["layers", "order", "model", "roofs"])
    assert clock.now == run.end
    notes = load(run.out / "results.json").notes
    assert {"layers: cut short", "model: cut short", "roofs: not reached"} <= {*notes}
    assert {each.contestant for each in run.results.rows} == {"ours", "other"}


def test_no_contestant_can_swallow_that_the_time_is_up(
    started: Callable[[float], Round], does: Callable[..., None], clock: Clock
) -> None:
    def slow(given: object) -> None:
        clock.sleep(60)

    def races(run: Round) -> None:
        one, given = Peer("slow", slow), Tensors(torch.empty(1), {})  # type: ignore[arg-type]
        for _ in range(3):
            admit(one, [given], row(), lambda made: Match(0, 0, 1), CPU)

    does(layers=races)
    run = started(5)
    perform(run, ["layers"])
    assert clock.now == run.end
    assert "layers: cut short" in run.results.notes


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_is_raised_where_it_is_lost_is_raised_again(clock: Clock) -> None:
    class Deaf:
        def __del__(self) -> None:
            clock.sleep(3)

    def work() -> None:
        deaf = Deaf()
        del deaf
        clock.sleep(60)

    before = clock.now
    with pytest.raises(phases.TimeUp), phases.until(before + 2):
        work()
    assert clock.now == before + 3


def test_an_alarm_ends_a_real_sleep() -> None:
    with pytest.raises(phases.TimeUp), phases.until(time.monotonic()):
        time.sleep(600)


def test_phases_share_the_time_by_their_parts(
    started: Callable[[float], Round], does: Callable[..., None]
) -> None:
    left: list[float] = []
    does(tests=lambda run: left.append(run.left), roofs=lambda run: left.append(run.left))
    perform(started(40), ["tests", "roofs"])
    assert left == [20, 40]  # what the first did not take is the second's


def gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has asked for its status since has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_command_ends_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    pid = tmp_path / "pid"
    child = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    log = tmp_path / "log.txt"

    class Late(subprocess.Popen[bytes]):
        """Its time is up when the child is there."""

        def wait(self, timeout: float | None = None) -> int:
            if timeout is None:
                return super().wait()
            while not (pid.exists() and pid.read_text()):
                time.sleep(0.01)
            raise subprocess.TimeoutExpired(self.args, timeout)

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", Late)
        assert phases._logged([sys.executable, "-c", script, child], log, 1) is None
    deadline = time.monotonic() + 300  # half of what the child would sleep
    while not gone(int(pid.read_text())) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert gone(int(pid.read_text()))
    assert phases._logged([sys.executable, "-c", "print(1); exit(3)"], log, 600) == 3
    assert log.read_text() == "1\n"


# --- searches --------------------------------------------------------------------------------


def test_what_costs_most_is_searched_first_and_longest(started: Callable[[float], Round]) -> None:
    run = started(60)
    run.batches = (1, 2)
    found = searches(run, run.out / "none.json")
    assert len({(each.problem.batch, each.step.name) for each in found}) == len(found)
    assert [each.weight for each in found] == sorted([e.weight for e in found], reverse=True)
    assert sum(e.weight for e in found if e.problem.batch == 1) == pytest.approx(1)
    assert sum(e.weight for e in found if e.problem.batch == 2) == pytest.approx(1 / 1.5)
    left, given = 100.0, []
    for _, seconds in shares(found, 0.1):
        given.append(seconds(left))
        left -= given[-1]
    assert left == pytest.approx(0, abs=1e-6)
    assert given == sorted(given, reverse=True)
    assert [seconds(7.0) for _, seconds in shares(found[:1], 9.0)] == [7.0]


def test_searches_skip_what_has_a_row_and_take_hints_from_it(
    started: Callable[[float], Round],
) -> None:
    run = started(60)
    table = run.out / "table.json"
    (first, *rest) = searches(run, table)
    won = replace(first.row, config={"BLOCK_M": 1}, batch=4)
    far = replace(first.row, config={"BLOCK_M": 2}, batch=1000)
    other = replace(first.row, config={"BLOCK_M": 3}, batch=1, dtype="fp16")
    tuning.save(table, "here", [won, far, other])
    assert first.hints(table) == [{"BLOCK_M": 1}, {"BLOCK_M": 2}]
    assert len(searches(run, table)) == len(rest) + 1  # its own batch has none yet
    tuning.save(table, "here", [replace(won, batch=1)])
    assert first.step.name not in [each.step.name for each in searches(run, table)]
    run.again = True
    assert first.step.name in [each.step.name for each in searches(run, table)]


# --- earlier rounds --------------------------------------------------------------------------


def test_an_earlier_rounds_rows_stay_until_they_are_measured_again(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    begin_in(old)
    stored = load(old / "results.json")
    rows = (row("ours", 9.0), row("theirs", 8.0), row("ours", 7.0, "conv2"))
    save(replace(stored, rows=rows, roofs={"fp32": 1.0}), old / "results.json")
    (old / "searches.jsonl").write_text("")
    begin_in(new, old)
    run = Round(new, CPU, network("digits"), "fp32", (1,), time.monotonic() + 60)
    run.add([row("ours", 1.0)])
    run.keep()
    found = load(new / "results.json")
    assert {(r.problem, r.contestant): r.median_us for r in found.rows} == {
        ("conv1", "ours"): 1.0,
        ("conv1", "theirs"): 8.0,
        ("conv2", "ours"): 7.0,
    }
    assert found.roofs == {"fp32": 1.0}
    assert any(stored.environment["date"] in note for note in found.notes)  # type: ignore[operator]
    assert (new / "searches.jsonl").exists()


def begin_in(out: Path, earlier: Path | None = None) -> None:
    out.mkdir()
    begin(out, CPU, earlier)


def test_another_gpus_round_is_refused(tmp_path: Path) -> None:
    other = Results({"gpu name": "another"}, {}, ())
    save(other, tmp_path / "results.json")
    with pytest.raises(EngineError, match=r"wanted a round on None, got one on another"):
        begin(tmp_path, CPU, tmp_path)


def test_the_commit_can_be_told_where_there_is_no_git(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(round, "environment", lambda device: {"commit": None, "gpu name": None})
    begin(tmp_path, CPU, commit="1234")
    assert load(tmp_path / "results.json").environment["commit"] == "1234"


# --- the watcher -----------------------------------------------------------------------------


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Callable[[str], list[str]]]:
    """A command that is at the phase `name` of those it was given, and then does as told.

    It may `promise` to be done with it sooner than at the end.
    """
    begin(tmp_path, CPU)

    def make(then: str) -> list[str]:
        script = f"""
            import json, os, sys, time
            rest = sys.argv[2 : sys.argv.index("--until")]
            end = float(sys.argv[-1])

            def promise(until):
                with open({str(tmp_path / round.UNDER_WAY)!r}, "w") as at:
                    json.dump([name, until], at)

            for name in rest:
                with open({str(tmp_path / "ran.txt")!r}, "a") as ran:
                    print(name, os.getpid(), file=ran)
                promise(end)
                {then}
        """
        return [sys.executable, "-c", textwrap.dedent(script)]

    yield make
    for line in (tmp_path / "ran.txt").read_text().splitlines():
        assert gone(int(line.split()[1]))


def ran(tmp_path: Path) -> list[str]:
    return [line.split()[0] for line in (tmp_path / "ran.txt").read_text().splitlines()]


@pytest.mark.parametrize(
    ("then", "how"),
    [
        ("if name == 'tune': os.abort()", "its process died with SIGABRT"),
        ("if name == 'tune': sys.exit(1)", "its process died with status 1"),
        (
            "if name == 'tune': promise(-1e9); time.sleep(600)",
            "no answer, so its process was ended",
        ),
    ],
)
def test_a_process_that_is_lost_is_replaced_for_the_phases_after(
    then: str,
    how: str,
    worker: Callable[[str], list[str]],
    tmp_path: Path,
) -> None:
    watch(worker(then), tmp_path, ["roofs", "tune", "layers"], time.monotonic() + 600)
    assert ran(tmp_path) == ["roofs", "tune", "layers"]
    assert f"tune: failed, {how}" in load(tmp_path / "results.json").notes


def test_a_process_that_cannot_begin_is_not_started_again(
    worker: Callable[[str], list[str]], tmp_path: Path
) -> None:
    (tmp_path / "ran.txt").write_text("")
    watch([sys.executable, "-c", "exit(1)"], tmp_path, ["roofs", "tune"], time.monotonic() + 600)
    notes = load(tmp_path / "results.json").notes
    assert [note for note in notes if "failed" in note] == [
        "round: failed, its process died with status 1"
    ]


# --- the whole -------------------------------------------------------------------------------


@pytest.mark.interpreter
def test_a_round_on_a_cpu_runs_to_its_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    wanted = ["--phases", "roofs", "order", "layers", "--minutes", "60", "--device", "cpu"]
    assert main(["round", "--out", str(out), *wanted]) == 0
    found = load(out / "results.json")
    assert {row.section for row in found.rows} == {"order", "layers"}
    assert found.roofs.keys() == {"fp32", "copy"}
    assert not [note for note in found.notes if "failed" in note or "not reached" in note]
    (table,) = (path for path in out.glob("*.json") if path.name != "results.json")
    assert {each["op"] for each in json.loads(table.read_text())["rows"]} == {"run"}
    assert "<svg" in (out / "report.html").read_text()
    assert not (out / round.UNDER_WAY).exists()
    assert str(out / "report.html") in capsys.readouterr().out


@pytest.mark.interpreter
def test_a_round_cut_short_has_results_and_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever that is: on a slow machine before it has begun."""
    monkeypatch.setattr(round, "SILENCE", 600.0)
    minutes = (round.RESERVE + 9) / 60
    wanted = ["--minutes", str(minutes), "--phases", "tune", "layers", "--device", "cpu"]
    main(["round", "--out", str(tmp_path), *wanted])
    notes = load(tmp_path / "results.json").notes
    assert any("cut short" in note or "not reached" in note for note in notes)
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (["--minutes", "0.1"], "--minutes: wanted more than 0.33, got 0.1"),
        (["--batch", "0"], "--batch: wanted 1 or more, got 0"),
        (["--earlier", "nowhere"], "nowhere/results.json: No such file"),
    ],
)
def test_refusals_are_one_line(
    wanted: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["round", "--out", str(tmp_path), "--device", "cpu", *wanted]) == 1
    assert said in capsys.readouterr().err
