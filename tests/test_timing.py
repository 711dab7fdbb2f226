"""The clocks: turns that everyone gets, clocks a device has."""

from __future__ import annotations

import os
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from alexnet_triton.bench.measure import timing
from alexnet_triton.bench.measure.timing import (
    CLOCKS,
    MOST_COPIES,
    _distinct,
    copies_to_overflow,
    measure,
    passes,
    sampler,
    take_turns,
)
from alexnet_triton.bench.ratio import LEAST

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("nbytes", "cache", "copies"),
    [
        (100, 0, 1),
        (1000, 100, 1),
        (200, 100, 1),
        (199, 100, 2),
        (1, 10**9, MOST_COPIES),
        (0, 10, 20),
    ],
)
def test_copies_pass_twice_through_a_cache(nbytes: int, cache: int, copies: int) -> None:
    assert copies_to_overflow(nbytes, cache) == copies


@pytest.mark.parametrize(
    ("us", "copies", "wanted"),
    [(4000, 1, 1), (9000, 3, 1), (1000, 2, 4), (5, 1, 512), (50, 100, 5), (0, 600, 1)],
)
def test_a_replay_lasts_long_enough_and_has_not_too_many_runs(
    us: float, copies: int, wanted: int
) -> None:
    assert passes(us, copies) == wanted


def test_turns_are_even_and_in_no_fixed_order() -> None:
    ran: list[str] = []

    def turn(name: str) -> float:
        ran.append(name)
        return float(len(ran))

    times = take_turns({name: lambda n=name: turn(n) for name in "abc"}, "host", rounds=20)  # type: ignore[misc]
    rounds = [tuple(ran[i : i + 3]) for i in range(0, len(ran), 3)]
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len(set(rounds)) > 3
    assert all(len(taken.us) == 20 for taken in times.values())


def test_time_runs_out_after_rounds_enough_for_an_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(10_000))  # a second passes whenever somebody looks
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: float(next(now))))
    take = {"one": lambda: 1.0}
    assert len(take_turns(take, "host", rounds=1000, seconds=0.0)["one"].us) == LEAST
    assert LEAST < len(take_turns(take, "host", rounds=1000, seconds=9.0)["one"].us) < 20
    assert len(take_turns(take, "host", rounds=5, seconds=900.0)["one"].us) == 5


def test_copies_take_turns_and_a_run_takes_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: Counter[int] = Counter()
    now, length = 0.0, 0.006
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now))

    def copy(number: int) -> None:
        nonlocal now
        ran[number] += 1
        now += length

    runs = [lambda: copy(0), lambda: copy(1), lambda: copy(2)]
    taken = measure({"copies": runs}, "host", CPU, rounds=9)["copies"]
    assert ran == {0: 4, 1: 4, 2: 4}  # warm once, then three times each
    assert taken.clock == "host"
    assert taken.us == pytest.approx([6000] * 9)
    length = 0.001  # a turn is then several calls
    assert measure({"copies": runs}, "host", CPU, rounds=3)["copies"].us == pytest.approx(
        [1000] * 3
    )
    assert ran == {0: 10, 1: 10, 2: 10}


def test_a_clock_that_a_cpu_has_not_is_refused_in_one_line() -> None:
    assert CLOCKS["cpu"] == ("host",)
    with pytest.raises(ValueError, match="clock: wanted host on a cpu, got 'cold'"):
        sampler([lambda: None], "cold", CPU)


def test_a_run_that_cannot_be_hashed_is_warmed_up_once() -> None:
    class Listed(list[int]):  # like what binds launches: equal to another, and not hashable
        def __call__(self) -> None:
            pass

    one, other = Listed(), Listed()
    assert [id(run) for run in _distinct([one, other, one])] == [id(one), id(other)]


@pytest.mark.gpu
@pytest.mark.skipif("PYTEST_XDIST_WORKER" in os.environ, reason="other tests use the same GPU")
def test_all_clocks_of_a_gpu_agree_on_a_long_run() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    a = torch.randn(4096, 4096, device=device)
    out = torch.empty_like(a)

    def product() -> None:
        torch.mm(a, a, out=out)

    medians = {c: measure({"": [product]}, c, device, 5)[""].median for c in CLOCKS["cuda"]}
    assert max(medians.values()) < 1.5 * min(medians.values())
    assert medians["cold"] > 100  # microseconds: no GPU does 137 GFLOP faster
