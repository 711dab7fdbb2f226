"""Strategies, the cache of trials, and stored searches replayed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from alexnet_triton.bench.measure.problem import problems, ready, tensors
from alexnet_triton.bench.records import RecordError
from alexnet_triton.bench.tune.cache import Cache, Subject, Trial, source_hash
from alexnet_triton.bench.tune.search import STRATEGIES, follow
from alexnet_triton.bench.tune.simulate import by_subject, replay
from alexnet_triton.bench.tune.space import Config, Space, key
from alexnet_triton.engine.devices.planner import Planner
from alexnet_triton.engine.plan import ARITHMETIC
from alexnet_triton.engine.zoo import network
from alexnet_triton.kernels import conv, epilogue

STORED = Path(__file__).parents[1] / "bench" / "results" / "fc7-interpreted.jsonl"
SUBJECT = Subject("a card", "3.7.1", "abc", "alexnet", "conv4", 8, "fp16")
SPACE = Space({"x": (1, 2, 4, 8, 16, 32), "y": (1, 2, 4, 8, 16, 32), "warps": (4, 8)})
START = {"x": 32, "y": 1, "warps": 4}

each_strategy = pytest.mark.parametrize("strategy", STRATEGIES)


def cost(config: Config) -> float:
    """A bowl around (8, 4) with a wall at x = 16 that fails, and warps that matter little."""
    if config["x"] == 16:
        return float("inf")
    x, y = int(config["x"]).bit_length(), int(config["y"]).bit_length()
    return 10.0 + (x - 4) ** 2 + (y - 3) ** 2 + int(config["warps"]) / 100


def walk(strategy: str, seed: int = 0, start: Config = START) -> list[Config]:
    """What a strategy asks for, in order."""
    asked: list[Config] = []

    def evaluate(configs: Sequence[Config]) -> list[float]:
        asked.extend(configs)
        return [cost(config) for config in configs]

    follow(STRATEGIES[strategy](SPACE, start, seed), evaluate)
    return asked


def trials(space: Space = SPACE) -> list[Trial]:
    """A stored search of the bowl, from START."""
    configs = [START, *(config for config in space.configs() if config != START)]
    return [
        Trial(SUBJECT, config, "failed", "the wall", seconds=2.0)
        if config["x"] == 16
        else Trial(SUBJECT, config, "ok", median_us=cost(config), seconds=1.0)
        for config in configs
    ]


@each_strategy
@pytest.mark.parametrize("start", [START, {"x": 3, "y": 3, "warps": 4}])
def test_everything_is_asked_once_and_the_default_first(strategy: str, start: Config) -> None:
    """Also a default that is outside of the space."""
    asked = walk(strategy, start=start)
    assert asked[0] == start
    rest = [key(config) for config in SPACE.configs() if config != start]
    assert sorted(map(key, asked[1:])) == sorted(rest)


@each_strategy
def test_a_seed_decides(strategy: str) -> None:
    assert walk(strategy, 1) == walk(strategy, 1)
    if strategy != "exhaustive":
        assert walk(strategy, 1) != walk(strategy, 2)


def test_local_climbs_around_the_wall() -> None:
    """Downhill from the far side of a wall that fails, in a fraction of the space."""
    asked = walk("local")
    found = [key(config) for config in asked].index(key({"x": 8, "y": 4, "warps": 4}))
    assert found < len(SPACE.configs()) / 2


# --- the cache -------------------------------------------------------------------------------


def test_trials_are_found_again(tmp_path: Path) -> None:
    """By two searches that share a file, too; of two lines for one trial the later counts."""
    path = tmp_path / "deep" / "cache.jsonl"
    first, second = trials()[:2]
    one, other = Cache(path), Cache(path)
    one.append(replace(first, status="wrong", reason="at first", median_us=None))
    other.append(second)
    one.append(first)
    again = Cache(path)
    assert again.trials == [first, second]
    assert again.find(SUBJECT, dict(reversed(START.items()))) == first, "in any order of fields"
    assert again.find(SUBJECT, {"x": 99}) is None
    for field in SUBJECT.__dataclass_fields__:
        another: dict[str, Any] = {field: "another"}
        assert again.find(replace(SUBJECT, **another), START) is None, field
    wanted = "device triton source network layer batch dtype config status reason median_us p20_us"
    wanted += " p80_us max_error registers shared date"
    assert set(wanted.split()) <= set(json.loads(path.read_text().splitlines()[0]))


def test_a_torn_last_line_is_dropped_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "cache.jsonl"
    first, second, third = trials()[:3]
    for trial in (first, second):
        Cache(path).append(trial)
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    cache = Cache(path)
    assert cache.trials == [first]
    assert path.read_bytes() == whole[:-7], "reading changes nothing"
    cache.append(third)
    assert Cache(path).trials == [first, third]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "Expecting"),
        ("[]", ""),
        ('{"device": "a card"}', "'triton'"),
        ("trial", "Expecting"),
        (json.dumps({**trials()[0].to_dict(), "speed": 1}), "wanted no fields but .*, got .*speed"),
    ],
)
def test_what_is_no_trial_is_refused(tmp_path: Path, line: str, told: str) -> None:
    path = tmp_path / "cache.jsonl"
    Cache(path).append(trials()[0])
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(RecordError, match=rf"cache\.jsonl, line 2: no trial: .*{told}"):
        Cache(path)


def test_trials_of_another_kernel_do_not_count_and_are_told(tmp_path: Path) -> None:
    """In one line, where there are any; those of another search are nobody's business."""
    first, second, *_ = trials()
    for name, wanted, odd in (
        ("older", SUBJECT.source, replace(second, subject=replace(SUBJECT, source="older"))),
        ("columns", "x, y, warps", replace(second, config={**second.config, "columns": 2})),
    ):
        cache = Cache(tmp_path / name)
        cache.append(first)
        assert cache.strangers(SUBJECT, list(START)) == ""
        cache.append(odd)
        line = cache.strangers(SUBJECT, list(START))
        assert f"{name}: 1 trials of {SUBJECT}" in line
        assert f"{wanted}, got {name};" in line
        assert cache.strangers(replace(SUBJECT, batch=9), list(START)) == ""


def test_the_source_is_known_by_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every jit function of the kernel's module counts, and those it imports; nothing else."""
    planner = Planner(network("digits"), ARITHMETIC["fp32"], None)

    def name(layer: str, batch: int = 1) -> str:
        (problem,) = problems(planner, "fp32", batch, [layer])
        made = ready(problem, tensors(problem, "meta"))
        return source_hash(dict(made.launches)[layer])

    before = name("conv2")
    assert before == name("conv3") == name("conv2", batch=2)
    assert before != name("fc7")
    for function in (conv._conv2d_rows_kernel, epilogue.finish):
        with monkeypatch.context() as patch:
            patch.setattr(function, "_src", function.src + "# another")
            assert name("conv2") != before, function
    assert name("conv2") == before


# --- simulation ------------------------------------------------------------------------------


def test_a_replay_counts_what_a_search_would_have_cost() -> None:
    found = replay(trials(), "exhaustive")
    order = [START, *(config for config in SPACE.configs() if config != START)]
    place = order.index({"x": 8, "y": 4, "warps": 4}) + 1
    walls = sum(config["x"] == 16 for config in order[:place])
    assert found.to_best == place
    assert found.seconds_to_best == place + walls
    near = next(n for n, c in enumerate(order, 1) if cost(c) <= 1.05 * 10.04)
    assert found.to_near == near
    silent = [replace(trial, seconds=None) for trial in trials()]
    assert replay(silent, "exhaustive") == replace(found, seconds_to_best=None)


def test_a_seed_replays_from_elsewhere() -> None:
    """A climb from next to the best is short; from anywhere it is not."""
    near = {"x": 8, "y": 2, "warps": 4}
    stored = sorted(trials(), key=lambda trial: trial.config != near)
    assert replay(stored, "local").to_best < 12
    assert len({replay(stored, "local", seed).to_best for seed in range(1, 9)}) > 3


def test_a_search_without_a_right_answer_is_refused() -> None:
    with pytest.raises(RecordError, match="no configuration that was right"):
        replay([trial for trial in trials() if trial.status == "failed"], "random")


def test_the_stored_search_is_whole_and_can_be_replayed() -> None:
    ((_, stored),) = by_subject(Cache(STORED)).items()
    assert len(stored) >= 300
    assert "interpreter" in stored[0].subject.device
    assert {trial.status for trial in stored} == {"ok", "refused"}
    assert all((trial.median_us is None) == (trial.status != "ok") for trial in stored)
    assert all(trial.reason for trial in stored if trial.status != "ok")
    replayed = replay(stored, "local")
    assert 1 <= replayed.to_near <= replayed.to_best <= len(stored)


def test_a_layer_that_was_not_searched_is_refused() -> None:
    with pytest.raises(RecordError, match=r"wanted fc6, got fc7"):
        by_subject(Cache(STORED), ["fc6"])
