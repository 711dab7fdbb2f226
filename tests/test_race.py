"""The race: right candidates are timed, every other is named with its reason, and none stops it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from alexnet_triton.bench.__main__ import main
from alexnet_triton.bench.measure.problem import expected, tensors
from alexnet_triton.bench.race import contestant
from alexnet_triton.bench.race.contestant import Contestant, Judge, Turn
from alexnet_triton.bench.race.examiner import Setup, find_problem, redraw
from alexnet_triton.bench.race.proof import Disqualified
from alexnet_triton.bench.race.race import League, Standing
from alexnet_triton.bench.race.tiles import IMAGES
from alexnet_triton.bench.records import OURS, Results, Row, load
from alexnet_triton.bench.worker import Lost

LIMIT = 120.0  # seconds for a question to a candidate: a busy machine must do an honest one in it

# torch's convolution, and ReLU in plain Triton behind it. Nothing is touched of what the first asks
# for: three quarters of the device's memory.
SPACE = """
import os
import torch
import triton
import triton.language as tl

SPACE = {"how": ["hoard", "wrong", "slow", "fast"]}
TOLERANCE = 2.0


@triton.jit
def relu(x, size, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < size, other=0.0)
    tl.store(x + i, tl.maximum(value, 0.0), mask=i < size)


def run(problem, x, weight, bias, out, config):
    if config["how"] == "hoard":
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if x.is_cuda:
            size = torch.cuda.get_device_properties(x.device).total_memory
        x.new_empty(size // 16 * 3, dtype=torch.float32)
    for _ in range({"slow": 200}.get(config["how"], 1)):
        out.copy_(torch.conv2d(x, weight, bias, problem.stride, problem.padding))
    if config["how"] != "wrong":
        relu[(triton.cdiv(out.numel(), 256),)](out, out.numel(), BLOCK=256)
"""
CRASHES = "import ctypes\ndef run(problem, x, weight, bias, out, config): ctypes.string_at(0)\n"
# Right until it was proved, and then no more.
TIRES = """
import torch
done = 0
def run(problem, x, weight, bias, out, config):
    global done
    done += 1
    if done > 6:
        raise RuntimeError("tired")
    y = torch.conv2d(x, weight, bias, problem.stride, problem.padding)
    out.copy_(y.relu())
"""

Race = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def race(
    tmp_path: Path,
    device: torch.device,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Race:
    """`race({name: source}, *arguments)`: exit status and JSON of a race on a small layer.

    The race waits as long as it takes: on a busy machine its clock would disqualify who is right.
    """
    monkeypatch.setattr(contestant, "SLACK_US", 1e9)

    def run(sources: dict[str, str], *arguments: str) -> tuple[int, dict[str, Any]]:
        common = ["--model", "digits", "--device", str(device), "--peers", "torch", "--json"]
        for name, source in sources.items():
            path = tmp_path / f"{name}.py"
            path.write_text(source)
            common += ["--candidate", str(path)]
        status = main(["race", *common, "--timeout", str(LIMIT), *arguments])
        return status, json.loads(capsys.readouterr().out)

    return run


def test_the_fastest_that_is_right_is_timed_and_each_other_is_told_why(race: Race) -> None:
    """Of a file's configurations as of files, and whenever one goes wrong."""
    sources = {"space": SPACE, "crashes": CRASHES, "tires": TIRES}
    status, found = race(sources, "conv3")
    assert status == 1
    assert not found["passed"]

    rows = {row["contestant"]: Row(**row) for row in found["rows"]}
    assert set(rows) == {OURS, "torch channels_last", *sources}
    for name in ("space", OURS, "torch channels_last"):
        row = rows[name]
        assert row.matched
        assert row.median_us is not None
        assert row.p20_us is not None
        assert 0 < row.p20_us <= row.median_us
    verdicts = {verdict["candidate"]: verdict for verdict in found["verdicts"]}
    assert verdicts["space"]["outcome"] == "raced"
    assert verdicts["space"]["config"] == {"how": "fast"}
    assert verdicts["space"]["factor"] == 2
    assert rows["space"].tolerance == pytest.approx(2 * (rows[OURS].tolerance or 0))
    asks = next(i for i, line in enumerate(SPACE.splitlines(), 1) if "new_empty" in line)
    chosen, _, fell = rows["space"].note.partition("the first: ")
    assert chosen == "how=fast, best of 2 configurations, 2 fell out, "
    assert "memory" in fell
    assert fell.endswith(f" at space.py:{asks}")
    for name in ("crashes", "tires"):
        assert verdicts[name]["outcome"] == "disqualified"
        assert rows[name].median_us is None
        assert rows[name].note == verdicts[name]["reason"]
    assert verdicts["crashes"]["reason"] == "the process died with SIGSEGV at crashes.py:2"
    assert verdicts["tires"]["reason"] == "RuntimeError: tired at tires.py:8"


def test_a_time_is_held_against_our_clock_and_the_roof() -> None:
    """On a GPU: of many runs, each of which is said to last a millisecond."""

    class Sleeps:
        def ask(self, limit: float, question: str, *numbers: float) -> None:
            time.sleep(0.1)

    turn = Turn(cast("Contestant", Sleeps()), LIMIT, cpu=False, judge=cast("Judge", None))
    turn.confirm(1e9, roof_us=1.05e9)
    with pytest.raises(Disqualified, match=r"its clock says 1.00 ms a run, ours "):
        turn.confirm(1e3, roof_us=None)
    with pytest.raises(Disqualified, match=r"900 ms is faster than this machine's roof, 1.00 s"):
        turn.confirm(0.9e6, roof_us=1e6)


def test_whom_the_machine_keeps_waiting_gets_other_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of 100 us, for which the machine takes a slice of 4 ms in all tries but the ninth."""

    class Honest:
        now, tries = 0.0, 0

        def ask(self, limit: float, question: str, *numbers: float) -> object:
            self.tries += question == "take"
            self.now += 2e-4 if self.tries == 9 else 4e-3
            return (100.0, None) if question == "take" else None

    class Content:
        def draw(self, number: int) -> None: ...
        def check(self, made: object) -> None: ...

    honest = Honest()
    monkeypatch.setattr(time, "perf_counter", lambda: honest.now)
    turn = Turn(cast("Contestant", honest), LIMIT, cpu=True, judge=cast("Judge", Content()))
    assert turn() == 100.0
    assert honest.tries == 9


def test_every_timed_answer_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of who is right at first, and then gives the answer to the inputs before."""
    setup = Setup("digits", "fc8", 2, "fp32", "cpu", 0)
    problem = find_problem(setup)
    given = tensors(problem, torch.device("cpu"), torch.Generator().manual_seed(setup.seed))

    class Late:
        made = torch.empty(0)
        late = False

        def ask(self, limit: float, question: str, number: int = 0) -> object:
            if question == "draw":
                redraw(given.x, number)
                self.made = self.made if self.late else expected(problem, given).float()
            return 1e-3, self.made.view(torch.uint8).numpy()

    monkeypatch.setattr(contestant, "SLACK_US", 1e9)
    one, judge = Late(), Judge(setup, problem, 1.0)
    turn = Turn(cast("Contestant", one), LIMIT, cpu=True, judge=judge, computes=True)
    assert [turn(), turn()] == [1e-3, 1e-3]
    one.late = True
    with pytest.raises(Disqualified, match="right while it was proved, and when it is timed wrong"):
        turn()


def test_slow_is_not_wrong(race: Race, monkeypatch: pytest.MonkeyPatch) -> None:
    """`tests/test_worker.py` has processes that sleep; here nobody waits for one."""

    class Sleeps:
        def close(self) -> None: ...

        def ask(self, seconds: float, question: str, *numbers: float) -> None:
            raise Lost("timeout", f"no answer within {seconds:g} s")

    monkeypatch.setattr("alexnet_triton.bench.race.race.contestant", lambda *_: Sleeps())
    status, found = race({"sleeps": CRASHES}, "conv3", "--timeout", "0.5")
    assert status == 1
    (verdict,) = found["verdicts"]
    assert verdict["outcome"] == "too slow"
    assert verdict["reason"].startswith("no answer within 0.5 s")
    assert "--timeout" in verdict["reason"]


def test_to_decline_is_no_fault_and_the_json_is_a_results_file(race: Race, tmp_path: Path) -> None:
    status, found = race({}, "fc8", "--candidate", "matrix_vector", "--candidate", "winograd")
    assert status == 0
    assert found["passed"]
    verdicts = {verdict["candidate"]: verdict for verdict in found["verdicts"]}
    assert verdicts["winograd"]["outcome"] == "declined"
    assert "solves a conv2d alone" in verdicts["winograd"]["reason"]
    (tmp_path / "race.json").write_text(json.dumps(found))
    results: Results = load(tmp_path / "race.json")
    rows = {row.contestant: row for row in results.rows}
    assert rows["matrix_vector"].matched
    assert results.environment["torch"] == torch.__version__


def test_the_table_ranks_and_explains() -> None:
    setup = Setup("digits", "conv3", 1, "fp32", "cpu", 0)
    blank = Row("layers", "conv3", "digits", 1, "fp32", "", "host", 1, 1)
    rows = (
        replace(blank, contestant=OURS, max_error=1e-7, tolerance=1e-6, median_us=20.0),
        replace(blank, contestant="torch", max_error=1e-7, tolerance=1e-6, median_us=40.0),
        replace(blank, contestant="fast", median_us=10.0, note="BLOCK=64"),
        replace(blank, contestant="matrix_vector", note="solves a linear alone"),
        replace(blank, contestant="mine", note="wrong"),
    )
    standings = (
        Standing("fast", "fast.py", factor=2.0),
        Standing("matrix_vector", "m.py", "declined", "solves a linear alone"),
        Standing("mine", "mine.py", "disqualified", "wrong"),
    )
    told = str(League(setup, rows, standings)).splitlines()
    *_, fast, ours, torchs, declined, disqualified = told
    assert fast.split()[:2] == ["1", "fast"]
    assert fast.endswith(" 2.00x  bound x2; BLOCK=64")
    assert ours.split()[:2] == ["2", OURS]
    assert torchs.endswith("best peer")
    assert declined.split(maxsplit=2) == ["-", "matrix_vector", "declined: solves a linear alone"]
    assert disqualified.endswith(" disqualified: wrong")
    assert any("interpreter" in line for line in told)


@pytest.mark.interpreter
def test_without_a_gpu_it_is_a_layer_of_two_to_three_tiles(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["race", "conv9", "--candidate", "im2col", "--device", "cpu"]) == 1
    assert "tiles has no step 'conv9'; it has conv1, conv3, " in capsys.readouterr().err
    for layer in ("conv3", "fc6"):
        block = find_problem(Setup("tiles", layer, IMAGES, "fp32", "cpu", 0)).step.block
        assert block is not None
        for size in (IMAGES, block.came[0], block.output[0]):
            assert 128 < size < 192
            assert size % 64


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["conv3"], "wanted --candidate FILE or --all-shipped, got neither; these ship: im2col"),
        (["conv3", "--candidate", "no.py"], "no.py: no such file, and no candidate that ships"),
        (["pool1", "--candidate", "im2col"], "got pool1, which is a MaxPool2d"),
        (["conv9", "--candidate", "im2col"], "digits has no step 'conv9'"),
        (["conv3", "--candidate", "im2col", "--batch", "0"], "--batch: wanted 1 or more, got 0"),
        (
            ["conv3", "--candidate", "im2col", "--timeout", "0"],
            "--timeout: wanted more than 0 seconds",
        ),
    ],
)
def test_refusals_are_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["race", *arguments, "--model", "digits"]) == 1
    told = capsys.readouterr()
    assert said in told.err
    assert not told.out
