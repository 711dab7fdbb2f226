"""`bench tune` from end to end: judged, proved, timed, kept, resumed, and replayed."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from alexnet_triton.bench.__main__ import main
from alexnet_triton.bench.measure.problem import Problem, problems, ready, tensors
from alexnet_triton.bench.tune.cache import Cache, Subject, Trial
from alexnet_triton.bench.tune.child import Child, Lost
from alexnet_triton.bench.tune.outcome import reasons, table
from alexnet_triton.bench.tune.trial import Judgement, Runner, ToJudge, ToRun, judges, launches
from alexnet_triton.bench.tune.tune import targets
from alexnet_triton.bench.tune.tuner import Lab, tune
from alexnet_triton.engine import NetworkError
from alexnet_triton.engine.devices.single import Planner
from alexnet_triton.engine.plan import ARITHMETIC
from alexnet_triton.engine.zoo import network
from alexnet_triton.kernels import tuning
from alexnet_triton.kernels.conv import Conv2dConfig
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

SMALL = Conv2dConfig("pixels", 32, 32, 32)


def find(name: str, batch: int = 1, arch: int | None = None, of: str = "digits") -> Problem:
    dtype = "fp32" if arch is None else "fp16"
    (found,) = problems(Planner(network(of), ARITHMETIC[dtype], arch), dtype, batch, [name])
    return found


# --- a process of its own --------------------------------------------------------------------


@pytest.fixture
def child() -> Iterator[Child[str, Any]]:
    """A process that evaluates Python."""
    made: Child[str, Any] = Child(functools.partial(functools.partial, eval))
    yield made
    made.close()


def test_whatever_happens_in_a_child_the_parent_goes_on(child: Child[str, Any]) -> None:
    assert child.ask("1 + 1", 600) == 2
    with pytest.raises(Lost, match="ZeroDivisionError: division by zero") as raised:
        child.ask("1 / 0", 600)
    assert raised.value.status == "failed"
    crash = "(print('last words', flush=True), __import__('os').abort())"
    with pytest.raises(Lost, match="the process died with SIGABRT: last words"):
        child.ask(crash, 600)
    with pytest.raises(Lost, match=r"no answer within 0\.2 s") as slow:
        child.ask("__import__('time').sleep(60)", 0.2)
    assert slow.value.status == "timeout"


# --- judged ----------------------------------------------------------------------------------


class _Driver:
    """As much of a GPU's driver as Triton asks before it would load a binary."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def test_a_judged_kernel_is_not_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a judging process compiles is what the launch looks for in Triton's cache."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    problem = find("fc6", 1, 90, "alexnet")
    child: Child[ToJudge, Judgement] = Child(judges)
    assert problem.step.config is not None
    try:
        judged = child.ask(ToJudge(problem, "fc6", problem.step.config, 90), 120)
    finally:
        child.close()
    assert judged.refusal == ""
    assert judged.registers
    assert judged.shared
    hits: list[bool] = []

    def listen(**told: Any) -> None:
        hits.append(told["cache_hit"])

    monkeypatch.setattr(knobs.compilation, "listener", listen)
    made = launches(ready(problem, tensors(problem, "cpu")), "fc6")
    monkeypatch.setattr(driver, "_active", _Driver())
    for launch in made:
        launch.kernel.run(grid=launch.grid, warmup=True, **launch.arguments, **launch.options)
    assert hits == [True] * len(made)


def test_what_cannot_run_is_never_run(tmp_path: Path) -> None:
    """Planned and judged for sm_90, with the interpreter in the place of the GPU."""
    problem = find("conv5", 64, 90)
    assert problem.step.config is not None
    fixed = {name: [str(value)] for name, value in asdict(problem.step.config).items()}
    values = {**fixed, "num_stages": ["40"]}
    cache = Cache(tmp_path / "cache.jsonl")
    with Lab(torch.device("cpu"), jobs=1) as lab:
        lab.arch = 90
        # Rules leave out operands that are too large; without them only the compiler knows.
        outcome = _tune_without_rules(problem, lab, cache, values)
    default, large = outcome
    assert default.status == "ok"
    assert default.registers
    assert large.status == "refused"
    assert "NOT LAUNCHABLE" in large.reason
    assert large.registers
    assert large.median_us is None


def _tune_without_rules(
    problem: Problem, lab: Lab, cache: Cache, values: dict[str, list[str]]
) -> tuple[Trial, ...]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("alexnet_triton.bench.tune.space._matrix_rules", lambda *_: ())
        return tune(problem, lab, cache, strategy="exhaustive", values=values).trials


# --- proved and timed ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runner(device: torch.device) -> Runner:
    return Runner(str(device))


def run(problem: Problem, *configs: Conv2dConfig) -> ToRun:
    clock = "graph" if torch.cuda.is_available() else "host"
    return ToRun(problem, problem.step.name, configs, clock, 3, 0.2)  # type: ignore[arg-type]


def test_right_ones_take_turns_on_the_clock(runner: Runner) -> None:
    problem = find("conv5")
    first, second = runner(run(problem, SMALL, replace(SMALL, BLOCK_K=16)))
    for ran in (first, second):
        assert ran.status == "ok"
        assert ran.max_error is not None
        assert ran.max_error <= problem.tolerance
        assert ran.times is not None
        assert len(ran.times.us) == 3


def test_what_a_launcher_refuses_is_refused(runner: Runner) -> None:
    (ran,) = runner(run(find("conv5"), replace(SMALL, BLOCK_N2=16)))
    assert (ran.status, ran.times) == ("refused", None)
    assert "BLOCK_N2 for images" in ran.reason


def test_a_wrong_answer_is_not_timed(runner: Runner) -> None:
    problem = find("conv5")
    runner(run(problem, SMALL))
    runner._wanted += 1
    try:
        (ran,) = runner(run(problem, SMALL))
    finally:
        runner._problem = None
    assert (ran.status, ran.times) == ("wrong", None)
    assert ran.reason.startswith("errors up to ")
    assert ran.max_error is not None
    assert ran.max_error > problem.tolerance


# --- searched --------------------------------------------------------------------------------


def test_targets_are_the_steps_with_a_kernel() -> None:
    planner = Planner(network("digits"), ARITHMETIC["fp32"], None)
    every = targets(planner, "fp32", 1)
    assert [step for _, step in every][:3] == ["input", "conv1", "pool1"]
    assert [problem.name for problem, _ in every][:3] == ["conv1", "conv1", "pool1"]
    with pytest.raises(NetworkError, match="digits has no step 'conv9' to tune; it has input, "):
        targets(planner, "fp32", 1, ["conv9"])


@pytest.mark.interpreter
def test_a_search_is_kept_resumed_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The stem and a layer, each cut short, then gone on with: nothing is tried twice."""
    cache, winners = (tmp_path / name for name in ("cache.jsonl", "won.json"))
    common = ["tune", "fc8", "input", "--model", "digits", "--batch", "2", "--device", "cpu"]
    common += ["--set", "num_warps=4,8", "--json"]
    common += ["--cache", str(cache), "--table", str(winners)]
    assert main([*common, "--limit", "2"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert [search["new"] for search in first["searches"]] == [2, 2]
    assert main(common) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["environment"]["torch"] == torch.__version__
    for search in found["searches"]:
        assert search["new"] == search["tried"] - 2 == search["space"] - 2
        assert search["statuses"] == {"ok": search["space"]}
        assert search["ratio"] >= 0.999, "the default takes part in the final"
        assert search["best"]["max_error"] < 1e-4
    lines = [json.loads(line) for line in cache.read_text().splitlines()]
    assert len(lines) == sum(search["space"] for search in found["searches"])
    assert {line["clock"] for line in lines} == {"host"}
    rows = {row.op: row for row in tuning.load(winners).rows}
    assert set(rows) == {"linear", "stem"}
    assert rows["linear"].batch == 2
    assert rows["linear"].config == found["searches"][0]["best"]["config"]
    assert rows["linear"].source == found["searches"][0]["source"]

    assert main(["tune", "fc8", "--simulate", str(cache), "--repeats", "2"]) == 0
    told = capsys.readouterr().out
    assert "digits fc8 x2 fp32" in told
    assert all(name in told for name in ("exhaustive", "random", "local"))


@pytest.mark.interpreter
def test_a_search_starts_from_the_best_of_its_hints() -> None:
    """Each is tried once, and what is outside the space is passed over."""
    problem = find("fc7")
    assert problem.step.config is not None
    default = asdict(problem.step.config)
    half, quarter = ({**default, "BLOCK_K": default["BLOCK_K"] // cut} for cut in (2, 4))
    strange = [{**default, "BLOCK_K": 24}, {"tiling": "images"}]
    hints = [half, *strange, quarter]
    tried: list[dict[str, Any]] = []
    with Lab(torch.device("cpu"), jobs=1) as lab:
        told = functools.partial(_kept, tried)
        outcome = tune(problem, lab, Cache(None), limit=4, resume=False, told=told, hints=hints)
    assert tried[:3] == [default, half, quarter]
    assert len(tried) == 4
    best = min(outcome.trials[:3], key=lambda trial: trial.time).config
    assert len([name for name in best if tried[3][name] != best[name]]) == 1, "its neighbour"
    assert outcome.default.config == default


def _kept(tried: list[dict[str, Any]], trial: Trial) -> None:
    tried.append(trial.config)


def test_failures_are_kept_with_their_reason(tmp_path: Path) -> None:
    """A tile that is no power of two, and a process that does not answer in time."""
    problem, path = find("fc8"), tmp_path / "cache.jsonl"
    values = {"BLOCK_N": ["24"], "BLOCK_K": ["512"], "descriptors": ["false"]}
    with Lab(torch.device("cpu"), jobs=1) as lab:
        outcome = tune(problem, lab, Cache(path), strategy="random", values=values)
        assert [trial.status for trial in outcome.trials] == ["ok", "failed"]
        other = Cache(None)
        other.append(replace(outcome.trials[0], clock="cold"))
        again = tune(problem, lab, other, strategy="random", values=values, limit=1)
        assert again.fresh == 1, "another clock's times are not these"
        lab.timeout = 0.0
        late = tune(problem, lab, Cache(None), strategy="random", values=values, limit=1)
    kept = Cache(path).trials[1]
    assert "power of 2" in kept.reason
    assert late.best is None
    assert late.default.status == "timeout"
    told = table([outcome, late])
    assert f"fc8 x1: 1 failed: {kept.reason}" in told
    assert "nothing was right" in told


def test_reasons_that_differ_in_numbers_are_one() -> None:
    subject = Subject("a card", "3.7.1", "abc", "alexnet", "conv4", 8, "fp16")
    alike = [
        Trial(subject, {"x": n}, "refused", f"{n}00,000 bytes, {n} over the limit") for n in (2, 3)
    ]
    other = Trial(subject, {"x": 4}, "failed", "another")
    assert reasons([other, *alike]) == [
        ("refused", "200,000 bytes, 2 over the limit", 2),
        ("failed", "another", 1),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "wanted layers or --all"),
        (["conv9"], "has no step 'conv9' to tune"),
        (["conv5", "--set", "BLOCK_M"], "--set: wanted NAME=VALUE,VALUE, got 'BLOCK_M'"),
        (["conv5", "--set", "BLOCK_Q=1"], "no parameter 'BLOCK_Q'"),
        (["conv5", "--device", "cpu", "--clock", "graph"], "clock: wanted host on cpu"),
        (["--simulate", "nowhere.jsonl"], "nowhere.jsonl: No such file or directory"),
    ],
)
def test_refusals_are_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["tune", "--model", "digits", "--device", "cpu", *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not list(tmp_path.iterdir())


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    """Compiled ahead, proved and timed by graph replay; the best is not behind the default."""
    device = torch.device("cuda")
    with Lab(device, jobs=2) as lab:
        planner = Planner(network("digits"), ARITHMETIC["fp16"], lab.arch)
        (problem,) = problems(planner, "fp16", 64, ["conv3"])
        outcome = tune(problem, lab, Cache(tmp_path / "cache.jsonl"), limit=6)
    assert outcome.default.status == "ok"
    assert outcome.default.clock == "graph"
    assert outcome.default.registers
    assert outcome.best is not None
    assert outcome.ratio is not None
    assert outcome.ratio >= 1
    assert outcome.row is not None
    assert outcome.row.op == "conv2d"
