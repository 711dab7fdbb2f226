"""A search on one device: configurations are judged in many processes and run in one.

A configuration goes through judging (compiled for the device, never run if it cannot win), proving
(against float64, outputs poisoned) and timing, and ends as one line in the cache. Compiling runs
ahead of the GPU in processes of its own. In the end the best few and the default take turns on the
clock: what was measured minutes apart, and was the luckiest of hundreds, is not yet a winner. The
fastest of those whose 80th percentile lies below the default's 20th wins; if none does, the default
stays: it is the winner told, kept in the cache and written to the table.
"""

from __future__ import annotations

import heapq
import math
import os
import queue
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, TypeVar

import torch
import triton

from ...engine.plan import Step
from ...kernels import tuning
from ...kernels.jit import architecture
from ..env import environment
from ..measure.problem import Problem
from ..measure.timing import Clock
from ..records import Row
from ..worker import Lost, Worker
from .budget import Search
from .cache import Cache, Subject, Trial
from .search import STRATEGIES, follow
from .space import Config, key, listed, space
from .trial import TrialRunner, judge

ROUNDS = 9  # of a first look; at most LOOK seconds of them
LOOK = 0.5
FINALISTS = 3  # and the default
FINAL_ROUNDS = 15  # at most FINAL seconds of them
FINAL = 2.0

Judge = Worker[[Problem, Step, Trial, int], Trial]


class Tuner(AbstractContextManager["Tuner"]):
    """The processes that search on one device. Close it, or use it as a context.

    `jobs` processes judge (default: one a core, but for one), none on a CPU, where nothing is
    compiled; all of them start at once. A trial that has not answered after `timeout` seconds is
    given up. A GPU's clock is "graph", what a kernel costs in a steady stream of them: rows of a
    table do not say theirs, so all have the same.
    """

    def __init__(
        self, device: torch.device, jobs: int | None = None, timeout: float = 60.0
    ) -> None:
        self.device = device
        self.arch = architecture(device)
        self.name = device_name(device)
        self.clock: Clock = "graph" if device.type == "cuda" else "host"
        self.timeout = timeout
        self._jobs = jobs or max(1, (os.cpu_count() or 1) - 1)
        self._runner = Worker(TrialRunner(device), quiet=True)
        judges = [Worker(judge, quiet=True) for _ in range(self._jobs)]
        self._workers: list[Worker[..., Any]] = [self._runner, *judges]
        # To import torch and Triton takes each of them seconds: not one after the other.
        for worker in self._workers if self.arch else [self._runner]:
            worker.start()
        self._idle: queue.SimpleQueue[Judge] = queue.SimpleQueue()
        for each in judges:
            self._idle.put(each)
        self._threads = ThreadPoolExecutor(self._jobs)

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End all processes."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.close()
        self._threads.shutdown()

    def judge(self, search: Search, trials: Iterable[Trial]) -> Generator[Trial, None, None]:
        """Each with what the compiler says, in their order, some of them compiled ahead."""
        ahead: deque[Future[Trial]] = deque()
        try:
            for trial in trials:
                if self.arch is None:
                    yield trial
                    continue
                ahead.append(self._threads.submit(self._judge, search, trial, self.arch))
                if len(ahead) > 2 * self._jobs:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()

    def _judge(self, search: Search, trial: Trial, arch: int) -> Trial:
        worker = self._idle.get()
        try:
            return worker.ask(self.timeout, search.problem, search.step, trial, arch)
        except Lost as lost:
            return replace(trial, status=lost.status, reason=f"compiling: {lost.reason}")
        finally:
            self._idle.put(worker)

    def run(
        self, search: Search, trials: Sequence[Trial], rounds: int = ROUNDS, seconds: float = LOOK
    ) -> list[Trial]:
        """Prove and time configurations that take turns. Raises Lost."""
        what = search.problem, search.step, trials
        return self._runner.ask(self.timeout * len(trials), *what, self.clock, rounds, seconds)


@dataclass(frozen=True, slots=True)
class Outcome:
    """A search, over or cut short. `default` and `best` are as the final left them."""

    search: Search
    trials: tuple[Trial, ...]  # in the order of the search, those from the cache included
    fresh: int  # how many were not in the cache
    size: int  # configurations in the space
    default: Trial  # what the engine would take without this search
    best: Trial | None  # the winner, maybe the default; None if nothing was right
    strangers: str  # a line on trials of the cache that do not count

    @property
    def ratio(self) -> float | None:
        """How many times as fast as the default the best is."""
        if self.best is None or self.best.median_us is None or self.default.median_us is None:
            return None
        return self.default.median_us / self.best.median_us

    @property
    def row(self) -> tuning.TunedRow | None:
        """The winner, for the table that the engine reads."""
        if self.best is None or self.best.median_us is None:
            return None
        return replace(
            self.search.row,
            config=self.best.config,
            median_us=round(self.best.median_us, 3),
            triton=self.best.subject.triton,
            date=self.best.date,
        )

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints: how the trials ended, the default and the best."""
        return {
            **asdict(self.default.subject),
            "space": self.size,
            "tried": len(self.trials),
            "new": self.fresh,
            "statuses": dict(Counter(trial.status for trial in self.trials)),
            "reasons": [
                {"status": status, "reason": reason, "count": count}
                for status, reason, count in reasons(self.trials)
            ],
            "default": self.default.to_dict(),
            "best": self.best.to_dict() if self.best else None,
            "ratio": self.ratio,
            "strangers": self.strangers,
        }


def reasons(trials: Sequence[Trial]) -> list[tuple[str, str, int]]:
    """(status, reason, how many), most frequent first.

    Reasons that differ in numbers alone count as one, for which the first stands.
    """
    counts: Counter[tuple[str, str]] = Counter()
    example: dict[tuple[str, str], str] = {}
    for trial in trials:
        if trial.status != "ok":
            kind = trial.status, re.sub(r"[\d.,e+-]+", "#", trial.reason)
            counts[kind] += 1
            example.setdefault(kind, trial.reason)
    return [(kind[0], example[kind], count) for kind, count in counts.most_common()]


Timed = TypeVar("Timed", Trial, Row)


def winner(entrants: Iterable[Timed], default: Timed | None) -> Timed | None:
    """The fastest whose 80th percentile lies below the default's 20th; without one the default.

    Their times are of the same turns. If the default has none, the fastest wins, if any.
    """
    stays = None if default is None or default.median_us is None else default
    ahead = [
        one
        for one in entrants
        if one.median_us is not None
        and (stays is None or (one.p80_us or 0.0) < (stays.p20_us or 0.0))
    ]
    return min(ahead, key=lambda one: one.median_us or 0.0, default=stays)


def tune(
    search: Search,
    tuner: Tuner,
    cache: Cache,
    *,
    strategy: str = "local",
    seed: int = 0,
    seconds: float | None = None,
    limit: int | None = None,
    told: Callable[[Trial], None] = lambda trial: None,
    hints: Sequence[Config] = (),
    only: Sequence[Config] = (),
) -> Outcome:
    """Try the configurations of a step: those of its space, or `only` these, in order.

    The search starts from the default or, if one is faster, from one of `hints`: winners of
    problems like this one, of which those outside this space are passed over.

    Ends when the strategy does, after about `seconds` (the final and a trial under way may
    take a little longer), or after `limit` trials that were not in the cache: what is there of the
    same kernel by the same clock counts as this search's own. `told` sees each trial as it ends.
    Raises SpaceError.
    """
    problem, default = search.problem, dict(search.row.config)
    end = math.inf
    if seconds is not None:
        end = time.perf_counter() + seconds - min(FINAL, seconds / 2)
    if only:
        searched, strategy = listed([default, *only]), "exhaustive"
    else:
        searched = space(search.step, problem.plan.arithmetic, tuner.arch)
    known_as = Subject(
        *(tuner.name, triton.__version__, search.row.source, problem.network.name),
        *(search.step.name, problem.batch, problem.dtype),
    )
    trials = _Trials(search, tuner, cache, known_as, limit, told, end)
    starts = [default, *(hint for hint in hints if hint.keys() == default.keys())]
    starts = [start for start in starts if start == default or searched.has(start)]
    if (times := trials.evaluate(starts)) is not None:
        _, best = min(zip(times, starts, strict=True), key=lambda pair: pair[0])
        follow(STRATEGIES[strategy](searched, best, seed), trials.evaluate)
    return trials.outcome(len(searched.configs()), default)


@dataclass(slots=True)
class _Trials:
    """The trials of one search as they come in."""

    search: Search
    tuner: Tuner
    cache: Cache
    subject: Subject
    limit: int | None
    told: Callable[[Trial], None]
    end: float  # on time.perf_counter's clock
    trials: dict[str, Trial] = field(default_factory=dict)  # by `key`
    fresh: int = 0

    def evaluate(self, configs: Sequence[Config]) -> list[float] | None:
        """Their times, from the cache or measured; None once time or trials are up."""
        known = [self.trials.get(key(config)) or self._known(config) for config in configs]
        # Nothing bad is known of these yet.
        blanks = (
            Trial(self.subject, config, "ok", clock=self.tuner.clock)
            for config, trial in zip(configs, known, strict=True)
            if trial is None
        )
        judged = self.tuner.judge(self.search, blanks)
        times = []
        try:
            for config, trial in zip(configs, known, strict=True):
                if trial is None:
                    if self._over():
                        return None
                    trial = self._try(judged)
                    self.cache.append(trial)
                    self.fresh += 1
                if key(config) not in self.trials:
                    self.trials[key(config)] = trial
                    self.told(trial)
                times.append(trial.time)
        finally:
            judged.close()
        return times

    def outcome(self, size: int, start: Config) -> Outcome:
        """The final: the best few and the default take turns, and the cache hears who won."""
        default = self.trials[key(start)]
        others = [trial for trial in self.trials.values() if trial.config != start]
        right = [trial for trial in others if trial.status == "ok"]
        finalists = heapq.nsmallest(FINALISTS, right, key=lambda trial: trial.time)
        final = self._final([default, *finalists] if default.status == "ok" else finalists)
        default = next((trial for trial in final if trial.config == start), default)
        before = [t for t in self.cache.trials if t.won and t.subject == self.subject]
        for trial in (*before, *final):
            self.cache.append(replace(trial, won=False))
        if (best := winner(final, default)) is not None:
            best = replace(best, won=True)
            self.cache.append(best)
        strangers = self.cache.strangers(self.subject, start.keys())
        tried = tuple(self.trials.values())
        return Outcome(self.search, tried, self.fresh, size, default, best, strangers)

    def _known(self, config: Config) -> Trial | None:
        trial = self.cache.find(self.subject, config)
        return None if trial is None or trial.clock != self.tuner.clock else trial

    def _over(self) -> bool:
        late = time.perf_counter() > self.end
        enough = self.limit is not None and self.fresh >= self.limit
        return bool(self.trials) and (late or enough)  # the default is always tried

    def _try(self, judged: Iterator[Trial]) -> Trial:
        started = time.perf_counter()
        trial = next(judged)
        if trial.status == "ok":
            try:
                (trial,) = self.tuner.run(self.search, [trial])
            except Lost as lost:
                trial = replace(trial, status=lost.status, reason=lost.reason)
        date = datetime.now(UTC).isoformat(timespec="seconds")
        return replace(trial, date=date, seconds=round(time.perf_counter() - started, 4))

    def _final(self, finalists: list[Trial]) -> list[Trial]:
        """The same with their times from the final; one that fails now is no winner.

        If the final itself is lost, say because the finalists do not fit in memory together, there
        are no times to compare: the default stands alone, or if it was wrong the fastest.
        """
        if len(finalists) < 2:
            return finalists
        untimed = [replace(one, median_us=None, p20_us=None, p80_us=None) for one in finalists]
        try:
            final = self.tuner.run(self.search, untimed, FINAL_ROUNDS, FINAL)
        except Lost:
            return finalists[:1]
        return [
            one if one.status == "ok" else replace(one, reason=f"right at first, then {one.reason}")
            for one in final
        ]


def device_name(device: torch.device) -> str:
    """A GPU by its driver's name; a CPU by its own, and that it interprets."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{environment(device)['cpu']}, Triton's interpreter"
