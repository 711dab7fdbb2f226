"""Where the time goes: every part of a call is run and named, and no step waits for the host."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from alexnet_triton import Engine, Error, ImageError
from alexnet_triton.engine import profile as module
from alexnet_triton.engine.plan import Options
from alexnet_triton.engine.profile import Profile, ProfileRow, by_clock, by_events
from alexnet_triton.engine.spec import Conv2d, Flatten, Linear, MaxPool2d, Network, Preprocess, ReLU

SMALL = Network(
    "small",
    (3, 8, 8),
    (
        ("conv1", Conv2d(8, 3)),
        ("relu1", ReLU()),
        ("pool1", MaxPool2d(2, stride=2)),
        ("flatten", Flatten()),
        ("fc2", Linear(8)),
    ),
    Preprocess(8, 8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    classes="",
)

load = partial(Engine.load, SMALL, "random:0", "cpu")


def noise(images: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (images, 3, 8, 8), dtype=torch.uint8, generator=generator)


def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock by which each run takes a millisecond."""

    def clock(runs: Sequence[Callable[[], object]]) -> list[float]:
        return [float(run() is run) + 1.0 for run in runs]

    monkeypatch.setattr(module, "by_clock", clock)


@pytest.mark.interpreter
@pytest.mark.parametrize("target", [None, "sm_90"])
def test_the_parts_make_the_logits_of_a_call(target: str | None) -> None:
    """In a card's plan the graph's own images are filled, too, by nothing but the parts."""
    engine = load(target=target)
    runner: Any = engine._runner
    logits = engine(noise(3))
    images, out = noise(3).flip(0), torch.full_like(logits, torch.nan)
    with torch.inference_mode():
        ready = runner.ready(images, (engine._last,), 3)
        ready.outputs[engine._last].fill_(torch.nan)
        planned, parts = module._parts(ready, images, out, engine._last)
        for _, run in parts:
            run()
    assert out.equal(logits.flip(0))
    names = [step.name for step in planned.steps]
    assert [name for name, _ in parts] == [*(["copy in"] if target else []), *names, "copy out"]


@pytest.mark.interpreter
def test_a_profile_names_the_steps_of_a_call() -> None:
    engine = load()
    seen = engine.profile(noise(1), repeats=1)
    steps = engine._runner.planner(1).steps
    assert [row.step for row in seen.parts] == [*(step.name for step in steps), "copy out"]
    assert [row["flops"] for row in seen.rows[:-1]] == [step.work.flops for step in steps]
    assert sum(row["share"] for row in seen.rows) == pytest.approx(1)
    assert all(row["ms"] > 0 for row in seen.rows)
    assert (seen.images, seen.repeats, seen.at_once_ms, seen.host_ms) == (1, 1, None, None)
    assert "interpreter" in seen.device
    assert json.loads(json.dumps(seen.to_dict()))["sum_ms"] == seen.sum_ms
    assert [line.split()[0] for line in str(seen).splitlines()[-2:]] == ["sum", "call"]


@pytest.mark.interpreter
def test_a_step_in_slices_has_the_time_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    counted(monkeypatch)
    engine = load(options=Options(slice_images=2, slice_until="pool1"), max_batch=3)
    times = {row.step: row.ms for row in engine.profile(noise(3), repeats=1).parts}
    sliced = [step.name for step in engine.plan.steps[: engine.plan.sliced]]
    assert sliced[-1] == "pool1"
    assert times == {name: 2.0 if name in sliced else 1.0 for name in times}


def test_medians_are_of_a_part_over_all_rounds() -> None:
    rounds = iter([[1.0, 9.0], [5.0, 2.0], [3.0, 4.0]])
    assert module._medians([], lambda runs: next(rounds), 3) == [3.0, 4.0]


def test_the_hosts_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def run(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now))
    assert by_clock([partial(run, 0.25), partial(run, 0.5)]) == [250.0, 500.0]


@pytest.mark.parametrize(("host", "least"), [(0.0, 1), (30.0, 4), (1e6, 256)])
def test_events_have_no_part_of_the_hosts_time(
    host: float, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU that works off its queue, and a host that takes its time to fill it."""
    now = free = 0.0
    ahead: list[int] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = max(now, free)

        def query(self) -> bool:
            return now >= self.at

        def synchronize(self) -> None:
            nonlocal now
            now = max(now, self.at)
            ahead.append(0)

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    def run(takes: float, host: float = host) -> None:
        nonlocal now, free
        now += host
        free = max(now, free) + takes

    def busy() -> None:
        ahead[-1] += 1
        run(20.0, 1.0)

    ahead.append(0)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    times = by_events(busy, [partial(run, 5.0), partial(run, 7.0)])
    assert ahead[-2] == least
    if host < 1e6:
        assert times == [5.0, 7.0]


class Card(str):
    """A CPU that passes for a GPU, and for another device than a CPU."""

    type = "cuda"


@pytest.mark.interpreter
def test_on_a_card_copies_the_graph_and_the_host_are_timed_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = load(target="sm_90")
    runner: Any = engine._runner
    logits = engine(noise(2))  # bound, and from here on at what passes for a card
    runner.devices = (Card("cpu"),)
    ran = 0

    def events(busy: Callable[[], object], runs: Sequence[Callable[[], object]]) -> list[float]:
        nonlocal ran
        ran += len(runs)
        busy()
        return [float(run() is run) + 1.0 for run in runs]

    counted(monkeypatch)
    monkeypatch.setattr(module, "by_events", events)
    monkeypatch.setattr(module, "synchronize", lambda devices: None)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A card")
    seen = engine.profile(noise(2), repeats=1)
    assert [(row.step, row.ms) for row in seen.parts] == [
        ("copy in", 2.0),  # from the host, and to where the graph reads it
        *((step.name, 1.0) for step in engine._runner.planner(2).steps),
        ("copy out", 1.0),
    ]
    assert ran == len(seen.parts) + 2, "the graph and the copy out once more"
    assert seen.at_once_ms == 3.0, "from the host, the graph, and the copy out"
    assert seen.host_ms is not None
    assert seen.host_ms > 0
    assert seen.device == "A card"
    assert engine(noise(2)).equal(logits)


def test_a_gpus_profile_has_rates_the_graph_and_the_host() -> None:
    parts = (
        ProfileRow("copy in", 0.5, "copy", 0, 0),
        ProfileRow("conv1", 0.25, "conv2d", 10**9, 10**6),
    )
    seen = Profile("net", 4, (3, 8, 8), "fp16 on sm_90", "A card", 20, parts, 0.9, 0.7, 0.1)
    lines = [line.split() for line in str(seen).splitlines()]
    assert lines[2] == ["step", "kernel", "ms", "share", "TFLOP/s", "GB/s"]
    assert lines[3] == ["copy", "in", "copy", "0.5000", "66.7%"]
    assert lines[4] == ["conv1", "conv2d", "0.2500", "33.3%", "4.0", "4"]
    assert [line[-1] for line in lines[5:]] == ["0.7500", "0.7000", "0.9000", "0.1000"]


def test_what_cannot_be_profiled_is_refused() -> None:
    engine = load(max_batch=2)
    for images in (noise(3), noise(0)):
        with pytest.raises(Error, match="profile: wanted 1 to 2 images"):
            engine.profile(images)
    with pytest.raises(Error, match="repeats"):
        engine.profile(noise(1), repeats=0)
    with pytest.raises(ImageError):
        engine.profile("nowhere.png")
    with pytest.raises(Error, match=r"profile: .*'torch'"):
        load(backend="torch").profile(noise(1))
    halves = Engine.load("digits", devices=("cpu", "cpu"), split="pipeline")
    with pytest.raises(Error, match=r"profile: .*two devices"):
        halves.profile(noise(1))


@pytest.mark.gpu
def test_the_parts_make_the_whole_on_a_gpu() -> None:
    engine = Engine.load("alexnet", "random:0", max_batch=64)
    images = torch.randint(0, 256, (64, 3, 224, 224), dtype=torch.uint8)
    seen = engine.profile(images)
    assert [seen.parts[0].step, seen.parts[-1].step] == ["copy in", "copy out"]
    assert all(row.ms > 0 for row in seen.parts)
    assert seen.at_once_ms is not None
    assert seen.host_ms is not None
    assert seen.sum_ms / 3 < seen.at_once_ms < 3 * seen.sum_ms
    assert seen.at_once_ms / 3 < seen.call_ms < 10 * seen.at_once_ms
    assert 0 < seen.host_ms < 10 * seen.call_ms
    there = engine.profile(images.to(engine.device))
    assert there.sum_ms < seen.sum_ms, "no copy from the host"
