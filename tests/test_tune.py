"""`bench tune` from end to end: judged, proved, timed, kept, resumed, and replayed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from alexnet_triton.bench.__main__ import main
from alexnet_triton.bench.measure.problem import Problem, Tensors, problems, ready, tensors
from alexnet_triton.bench.measure.timing import Clock
from alexnet_triton.bench.records import Results
from alexnet_triton.bench.report import page
from alexnet_triton.bench.tune.budget import Search, searches
from alexnet_triton.bench.tune.cache import Cache, Subject, Trial
from alexnet_triton.bench.tune.short import short_list
from alexnet_triton.bench.tune.space import key
from alexnet_triton.bench.tune.trial import TrialRunner, launches
from alexnet_triton.bench.tune.tune import table
from alexnet_triton.bench.tune.tuner import Outcome, Tuner, reasons, tune, winner
from alexnet_triton.bench.worker import Lost, Worker
from alexnet_triton.engine.devices.planner import Planner
from alexnet_triton.engine.plan import ARITHMETIC
from alexnet_triton.engine.zoo import network
from alexnet_triton.kernels import cost, tuning
from alexnet_triton.kernels.conv import Conv2dConfig
from alexnet_triton.kernels.jit import Launch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

SMALL = Conv2dConfig("pixels", 32, 32, 32)
SUBJECT = Subject("a card", "3.7.1", "abc", "alexnet", "conv4", 8, "fp16")


def blank(problem: Problem, **config: Any) -> Trial:
    """A trial of the default, or of another configuration, of which nothing bad is known yet."""
    assert problem.step.config is not None
    return Trial(SUBJECT, asdict(problem.step.config) | config, "ok")


def search(name: str, batch: int = 1, arch: int | None = None) -> Search:
    dtype = "fp32" if arch is None else "fp16"
    planner = Planner(network("digits"), ARITHMETIC[dtype], arch)
    (found,) = searches(planner, dtype, [batch], [name])
    return found


def find(name: str) -> Problem:
    (found,) = problems(Planner(network("digits"), ARITHMETIC["fp32"], None), "fp32", 1, [name])
    return found


@pytest.fixture(scope="module")
def tuner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tuner]:
    """On a CPU; its processes start once. Triton's cache is new, in them and here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        with Tuner(torch.device("cpu"), jobs=1, timeout=600.0) as made:
            yield made


# --- judged ----------------------------------------------------------------------------------


def test_a_judged_kernel_is_not_compiled_again(
    tuner: Tuner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a judging process compiles is what the launch looks for in Triton's cache."""
    made = search("fc8", 1, 90)
    problem = made.problem
    monkeypatch.setattr(tuner, "arch", 90)
    (judged,) = tuner.judge(made, [blank(problem)])
    assert judged.status == "ok"
    assert judged.registers
    assert judged.shared
    hits: list[bool] = []
    monkeypatch.setattr(
        knobs.compilation, "listener", lambda **told: hits.append(told["cache_hit"])
    )
    bound = launches(ready(problem, tensors(problem, "cpu")), problem.step)
    # As much of a GPU's driver as Triton asks before it would load a binary.
    gpu = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    monkeypatch.setattr(driver, "_active", gpu)
    for launch in bound:
        launch.kernel.run(grid=launch.grid, warmup=True, **launch.arguments, **launch.options)
    assert hits == [True] * len(bound)


def test_what_cannot_run_is_never_run(tuner: Tuner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planned and judged for sm_90, with the interpreter in the place of the GPU."""
    found = search("fc8", 1, 90)
    monkeypatch.setattr(tuner, "arch", 90)
    outcome = tune(found, tuner, Cache(None), only=[{**found.row.config, "num_stages": 200}])
    default, large = outcome.trials
    assert default.status == "ok"
    assert default.registers
    assert large.status == "refused"
    assert "NOT LAUNCHABLE" in large.reason
    assert large.registers
    assert large.median_us is None


def test_no_search_waits_for_one_process_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them start with the tuner; on a CPU there is nothing to judge."""
    started: list[Worker[..., Any]] = []
    monkeypatch.setattr(Worker, "start", lambda worker: started.append(worker))
    for arch, count in ((90, 4), (None, 1)):
        monkeypatch.setattr("alexnet_triton.bench.tune.tuner.architecture", lambda _, a=arch: a)
        started.clear()
        Tuner(torch.device("cpu"), jobs=3).close()
        assert len(started) == count


# --- proved and timed ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runner(device: torch.device) -> TrialRunner:
    return TrialRunner(device)


def run(runner: TrialRunner, problem: Problem, *configs: dict[str, Any]) -> list[Trial]:
    clock: Clock = "graph" if torch.cuda.is_available() else "host"
    trials = [blank(problem, **{**asdict(SMALL), **config}) for config in configs]
    return runner(problem, problem.step, trials, clock, 3, 0.2)


def test_right_ones_take_turns_and_what_a_launcher_refuses_is_refused(runner: TrialRunner) -> None:
    problem = find("conv5")
    *right, refused = run(runner, problem, {}, {"BLOCK_K": 16}, {"BLOCK_N2": 16})
    assert (refused.status, refused.median_us) == ("refused", None)
    assert "BLOCK_N2 is for the rows tiling" in refused.reason
    for trial in right:
        assert trial.status == "ok"
        assert trial.max_error is not None
        assert trial.max_error <= problem.tolerance
        assert trial.p20_us is not None
        assert trial.p80_us is not None
        assert 0 < trial.p20_us <= trial.time <= trial.p80_us


def test_tensors_are_made_once_for_the_trials_of_a_step(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many copies as pass through the cache of what this step moves, not its problem."""
    moved: list[int] = []

    def rotation(given: Tensors, nbytes: int, device: torch.device) -> list[Tensors]:
        moved.append(nbytes)
        return [given]

    monkeypatch.setattr("alexnet_triton.bench.tune.trial.rotation", rotation)
    runner, problem = TrialRunner(device), find("conv1+pool1")
    conv, pool = problem.plan.steps
    for step in (conv, pool, pool):
        assert runner(problem, step, [], "host", 3, 0.1) == []
    assert moved == [conv.work.bytes, pool.work.bytes]


def test_a_wrong_answer_is_not_timed(runner: TrialRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = find("conv5")
    run(runner, problem, {})
    monkeypatch.setattr(runner, "_expected", runner._expected + 1)
    (trial,) = run(runner, problem, {})
    assert (trial.status, trial.median_us) == ("wrong", None)
    assert trial.reason.startswith("errors up to ")
    assert trial.max_error is not None
    assert trial.max_error > problem.tolerance


# --- searched --------------------------------------------------------------------------------


@pytest.mark.interpreter
def test_a_search_is_kept_resumed_and_written(
    tuner: Tuner,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A layer and the pass, each cut short, then gone on with: nothing is tried twice."""
    monkeypatch.setattr("alexnet_triton.bench.tune.tune.Tuner", lambda *_: nullcontext(tuner))
    cache, winners = tmp_path / "cache.jsonl", tmp_path / "won.json"
    common = ["tune", "fc8", "input", "--model", "digits", "--batch", "2", "--device", "cpu"]
    common += ["--json", "--cache", str(cache), "--table", str(winners)]
    assert main([*common, "--limit", "2"]) == 0
    first = json.loads(capsys.readouterr().out)
    before = {search["layer"]: search["new"] for search in first["searches"]}
    assert before == {"input": 1, "fc8": 2}
    assert main(common) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["environment"]["torch"] == torch.__version__
    for search in found["searches"]:
        assert search["tried"] == search["space"]
        assert search["new"] == search["space"] - before[search["layer"]]
        assert search["statuses"] == {"ok": search["space"]}
        assert search["ratio"] >= 1
        assert search["best"]["max_error"] < 1e-4
    trials = Cache(cache).trials
    assert len(trials) == sum(search["space"] for search in found["searches"])
    assert {trial.clock for trial in trials} == {"host"}
    rows = {row.op: row for row in tuning.load(winners).rows}
    assert set(rows) == {"linear", "channels_last"}
    assert rows["linear"].batch == 2
    (fc8,) = (search for search in found["searches"] if search["layer"] == "fc8")
    assert rows["linear"].config == fc8["best"]["config"]
    assert rows["linear"].source == fc8["source"]

    assert main(["tune", "fc8", "--simulate", str(cache)]) == 0
    told = capsys.readouterr().out
    assert "digits fc8 x2 fp32" in told
    assert all(name in told for name in ("exhaustive", "random", "local"))


def took(x: int, *us: float) -> Trial:
    """A trial by three percentiles of its times, the median in the middle; none: it is wrong."""
    times: dict[str, Any] = dict(zip(("p20_us", "median_us", "p80_us"), us, strict=False))
    return Trial(SUBJECT, {"x": x}, "ok" if us else "wrong", **times)


@pytest.mark.parametrize(
    ("default", "entrants", "wins"),
    [
        ((9.0, 10.0, 11.0), [], 0),
        ((9.0, 10.0, 11.0), [took(1, 8.0, 9.0, 10.0)], 0),  # a tenth faster, and spread as wide
        ((9.0, 10.0, 11.0), [took(1, 8.0, 8.5, 8.9)], 1),
        ((9.0, 10.0, 11.0), [took(1, 7.0, 8.0, 9.5), took(2, 8.5, 8.6, 8.7)], 2),
        ((9.0, 10.0, 11.0), [took(1)], 0),
        ((), [took(1, 8.0, 9.0, 9.5), took(2, 7.0, 8.9, 12.0)], 2),
        ((), [took(1)], None),
    ],
)
def test_a_winner_is_clear_of_the_default(
    default: tuple[float, ...], entrants: list[Trial], wins: int | None
) -> None:
    """Where the default is wrong the fastest wins, if any is right."""
    found = winner([took(0, *default), *entrants], took(0, *default))
    assert (found and found.config["x"]) == wins


def test_text_cache_row_and_page_tell_the_same_winner(
    tuner: Tuner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The luckiest of the first looks loses the final, and so does who won an earlier one."""
    found = search("fc8")
    default = dict(found.row.config)
    one, two = ({**default, "BLOCK_K": default["BLOCK_K"] // cut} for cut in (2, 4))
    looks = {key(default): 100.0, key(one): 30.0, key(two): 40.0}
    finals = {key(default): 100.0, key(one): 200.0}

    def run(of: Search, given: list[Trial], *limits: float) -> list[Trial]:
        us = finals if len(given) > 1 else looks
        times = [us[key(trial.config)] for trial in given]
        return [
            replace(trial, median_us=t, p20_us=t * 0.99, p80_us=t * 1.01)
            for trial, t in zip(given, times, strict=True)
        ]

    monkeypatch.setattr(tuner, "run", run)
    cache = Cache(tmp_path / "cache.jsonl")
    older = Subject(tuner.name, triton.__version__, "older", "digits", "fc8", 1, "fp32")
    cache.append(Trial(older, {"BLOCK_K": 1}, "ok", median_us=1.0))
    for us, wins in ((50.0, two), (99.9, default)):
        finals[key(two)] = us
        outcome = tune(found, tuner, cache, only=[one, two])
        assert outcome.best is not None
        assert outcome.row is not None
        assert outcome.best.config == outcome.row.config == wins
        assert outcome.row.median_us == finals[key(wins)]
        assert ("the default, " in table([outcome])) == (wins == default)
        assert "1 trials of digits fc8 x1 fp32" in table([outcome])
        kept = Cache(cache.path).trials
        assert [trial for trial in kept if trial.won] == [outcome.best]
        results = Results({}, {}, (), tuple(trial.to_dict() for trial in kept))
        (shown, *_) = page.tuning(results)
        assert [f"BLOCK_K={wins['BLOCK_K']}, " in told[-1] for told in shown.rows] == [False, True]


def test_a_short_search_tries_what_kernels_list_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a card, whose model knows the measured operand fill; the others keep what they have."""
    asked: dict[str, list[Any]] = {}

    def tune(search: Search, *_: object, only: list[Any], **how: Any) -> Outcome:
        asked[search.step.name] = only
        assert how["hints"] == []
        trial = replace(took(0, 1.0, 1.0, 1.0), config=dict(search.row.config))
        return Outcome(search, (trial,), 1, len(only), trial, trial, "")

    verb = "alexnet_triton.bench.tune.tune"
    card = SimpleNamespace(arch=90, name="a card")
    monkeypatch.setattr(f"{verb}.resolve", lambda _: torch.device("cuda"))
    monkeypatch.setattr(f"{verb}.Tuner", lambda *_: nullcontext(card))
    monkeypatch.setattr(f"{verb}.tune", tune)
    options = ["--all", "--short", "--fill", "8", "--batch", "256", "--dtype", "fp16"]
    files = ["--table", str(tmp_path / "won.json"), "--cache", str(tmp_path / "cache.jsonl")]
    assert main(["tune", *options, *files]) == 0
    assert asked.keys() == {"conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8"}
    planner = Planner(network("alexnet"), ARITHMETIC["fp16"], 90)
    (conv3,) = searches(planner, "fp16", [256], ["conv3"])
    chip = replace(cost.H200, fill=8.0)
    assert asked["conv3"] == short_list(conv3.step, planner.arithmetic, 90, chip)
    assert "4 steps have no short list" in capsys.readouterr().err
    assert main(["tune", *options, *files]) == 0
    assert "8 have a row in the table already" in capsys.readouterr().out


@pytest.mark.interpreter
def test_what_touches_memory_that_is_not_its_own_is_wrong(
    runner: TrialRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, where the answer is right all the same; told with its line, and not timed."""
    problem = find("conv5")
    launched = Launch.__call__

    def reads_beyond(launch: Launch) -> None:
        launched(
            replace(launch, arguments={**launch.arguments, "bias": launch.arguments["bias"][:1]})
        )

    monkeypatch.setattr(Launch, "__call__", reads_beyond)
    (trial,) = run(runner, problem, {})
    assert (trial.status, trial.median_us) == ("wrong", None)
    assert "load of bias" in trial.reason
    assert "\n" not in trial.reason


@pytest.mark.interpreter
def test_a_search_starts_from_the_best_of_its_hints(
    tuner: Tuner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is tried once, and what is outside the space is passed over."""
    for rounds in ("ROUNDS", "FINAL_ROUNDS"):
        monkeypatch.setattr(f"alexnet_triton.bench.tune.tuner.{rounds}", 2)
    found = search("fc7")
    default = dict(found.row.config)
    half, quarter = ({**default, "BLOCK_K": default["BLOCK_K"] // cut} for cut in (2, 4))
    strange = [{**default, "BLOCK_K": 24}, {"tiling": "rows"}]
    hints = [half, *strange, quarter]
    tried: list[dict[str, Any]] = []
    outcome = tune(
        *(found, tuner, Cache(None)),
        limit=4,
        told=lambda trial: tried.append(trial.config),
        hints=hints,
    )
    assert tried[:3] == [default, half, quarter]
    assert len(tried) == 4
    best = min(outcome.trials[:3], key=lambda trial: trial.time).config
    assert len([name for name in best if tried[3][name] != best[name]]) == 1, "its neighbour"
    assert outcome.default.config == default


def test_failures_are_kept_with_their_reason(
    tuner: Tuner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tile that is no power of two, and a process that does not answer in time."""
    found, path = search("fc8"), tmp_path / "cache.jsonl"
    odd = [{**found.row.config, "BLOCK_N": 24, "BLOCK_K": 512, "descriptors": False}]
    first = tune(found, tuner, Cache(path), only=odd, limit=1)
    other = Cache(None)
    other.append(replace(first.default, clock="cold"))
    again = tune(found, tuner, other, only=odd, limit=1)
    clocks = [trial.clock for trial in again.trials]
    assert clocks == ["host"], "another clock's times are not these"
    outcome = tune(found, tuner, Cache(path), only=odd)
    assert [trial.status for trial in outcome.trials] == ["ok", "failed"]

    def ask(seconds: float, *_: object) -> None:
        raise Lost("timeout", f"no answer within {seconds:g} s")

    monkeypatch.setattr(tuner._runner, "ask", ask)
    late = tune(found, tuner, Cache(None), only=odd, limit=1)
    kept = Cache(path).trials[1]
    assert "power of 2" in kept.reason
    assert late.best is None
    assert (late.default.status, late.default.reason) == ("timeout", "no answer within 600 s")
    told = table([outcome, late])
    assert f"fc8 x1: 1 failed: {kept.reason}" in told
    assert "nothing was right" in told


def test_reasons_that_differ_in_numbers_are_one() -> None:
    alike = [
        Trial(SUBJECT, {"x": n}, "refused", f"{n}00,000 bytes, {n} over the limit") for n in (2, 3)
    ]
    other = Trial(SUBJECT, {"x": 4}, "failed", "another")
    assert reasons([other, *alike]) == [
        ("refused", "200,000 bytes, 2 over the limit", 2),
        ("failed", "another", 1),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "wanted layers or --all"),
        (["conv9"], "has no step 'conv9' to tune"),
        (["conv5", "--short"], "--short: wanted a GPU"),
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
    with Tuner(device, jobs=2) as tuner:
        found = search("conv3", 64, tuner.arch)
        outcome = tune(found, tuner, Cache(tmp_path / "cache.jsonl"), limit=6)
    assert outcome.default.status == "ok"
    assert outcome.default.clock == "graph"
    assert outcome.default.registers
    assert outcome.best is not None
    assert outcome.ratio is not None
    assert outcome.ratio >= 1
    assert outcome.row is not None
    assert outcome.row.op == "conv2d"
