"""A search on one device: configurations are judged in many processes and run in one.

A configuration goes through judging (compiled for the device, never run if it cannot win), proving
(against float64, outputs poisoned) and timing, and ends as one line in the cache. Compiling runs
ahead of the GPU in processes of its own. In the end the best few and the default take turns on the
clock: what was measured minutes apart, and was the luckiest of hundreds, is not yet a winner.
"""

from __future__ import annotations

import heapq
import math
import os
import queue
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import torch
import triton

from ...engine.load import one_of
from ...engine.plan import Step
from ...kernels import tuning
from ...kernels.jit import architecture
from ..env import environment
from ..measure.problem import Problem, ready, tensors
from ..measure.timing import CLOCKS, Clock
from ..worker import Lost, Worker
from .cache import Cache, Subject, Trial, source_hash
from .search import STRATEGIES, follow
from .space import Config, Space, key, space, within
from .trial import TrialRunner, judge, launches

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
    given up. `clock` is one of the device's, by default "graph" on a GPU: what a kernel costs in a
    steady stream of them.
    """

    def __init__(
        self,
        device: torch.device,
        clock: Clock | None = None,
        jobs: int | None = None,
        timeout: float = 60.0,
    ) -> None:
        self.device = device
        self.arch = architecture(device)
        self.name = device_name(device)
        self.clock: Clock = clock or ("graph" if device.type == "cuda" else "host")
        one_of(f"--clock on a {device.type}", self.clock, CLOCKS[device.type])
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

    def judge(
        self, problem: Problem, step: Step, trials: Iterable[Trial]
    ) -> Generator[Trial, None, None]:
        """Each with what the compiler says, in their order, some of them compiled ahead."""
        ahead: deque[Future[Trial]] = deque()
        try:
            for trial in trials:
                if self.arch is None:
                    yield trial
                    continue
                ahead.append(self._threads.submit(self._judge, problem, step, trial, self.arch))
                if len(ahead) > 2 * self._jobs:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()

    def _judge(self, problem: Problem, step: Step, trial: Trial, arch: int) -> Trial:
        worker = self._idle.get()
        try:
            return worker.ask(self.timeout, problem, step, trial, arch)
        except Lost as lost:
            return replace(trial, status=lost.status, reason=f"compiling: {lost.reason}")
        finally:
            self._idle.put(worker)

    def run(
        self,
        problem: Problem,
        step: Step,
        trials: Sequence[Trial],
        rounds: int = ROUNDS,
        seconds: float = LOOK,
    ) -> list[Trial]:
        """Prove and time configurations that take turns. Raises Lost."""
        limit = self.timeout * len(trials)
        return self._runner.ask(limit, problem, step, trials, self.clock, rounds, seconds)


@dataclass(frozen=True, slots=True)
class Outcome:
    """A search, over or cut short. The times of `default` and `best` are from the final."""

    subject: Subject
    op: str  # the launcher's name, as tables of tuned configurations have it
    shape: Any  # the kernel's, a dataclass
    trials: tuple[Trial, ...]  # in the order of the search, those from the cache included
    fresh: int  # how many were not in the cache
    size: int  # configurations in the space
    default: Trial  # what the engine would take without this search
    best: Trial | None  # None if nothing was right

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
        return tuning.TunedRow(
            op=self.op,
            shape=tuning.without_batch(self.shape),
            dtype=self.subject.dtype,
            batch=self.subject.batch,
            config=self.best.config,
            median_us=round(self.best.median_us, 3),
            triton=self.subject.triton,
            date=self.best.date,
            source=self.subject.source,
        )

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints: how the trials ended, the default and the best."""
        return {
            **asdict(self.subject),
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


def tune(
    problem: Problem,
    tuner: Tuner,
    cache: Cache,
    *,
    step: Step | None = None,
    strategy: str = "local",
    seed: int = 0,
    seconds: float | None = None,
    limit: int | None = None,
    values: Mapping[str, Sequence[str]] | None = None,
    resume: bool = True,
    told: Callable[[Trial], None] = lambda trial: None,
    hints: Sequence[Config] = (),
) -> Outcome:
    """Search the space of one step of a problem, by default its last.

    The search starts from the default or, if one is faster, from one of `hints`: winners of
    problems like this one, of which those outside this space are passed over. Without a strategy
    these are all that is tried, in their order.

    Ends when the strategy does, after about `seconds` (the final and a trial under way may
    take a little longer), or after `limit` trials that were not in the cache. With `resume` the
    cache's trials by the same clock count as this search's own; without, all are made anew.
    `values` are other values of parameters (`space.within`). `told` sees each trial as it ends.
    Raises SpaceError.
    """
    step = step or problem.step
    known_as = subject(problem, step, tuner.name)
    end = math.inf
    if seconds is not None:
        end = time.perf_counter() + seconds - min(FINAL, seconds / 2)
    search = _Search(problem, step, tuner, cache, known_as, limit, resume, told, end)
    searched = within(space(step, problem.plan.arithmetic, tuner.arch), values or {})
    assert step.config is not None  # space() has refused it
    default = asdict(step.config)
    starts = [default, *(hint for hint in hints if hint.keys() == default.keys())]
    starts = [start for start in starts if start == default or searched.has(start)]
    if (times := search.evaluate(starts)) is not None and strategy:
        _, best = min(zip(times, starts, strict=True), key=lambda pair: pair[0])
        follow(STRATEGIES[strategy](searched, best, seed), search.evaluate)
    return search.outcome(searched, default)


@dataclass(slots=True)
class _Search:
    """The trials of one search as they come in."""

    problem: Problem
    step: Step
    tuner: Tuner
    cache: Cache
    subject: Subject
    limit: int | None
    resume: bool
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
        judged = self.tuner.judge(self.problem, self.step, blanks)
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

    def outcome(self, searched: Space, start: Config) -> Outcome:
        """The final: the best few and the default take turns."""
        default = self.trials[key(start)]
        right = [trial for trial in self.trials.values() if trial.status == "ok"]
        finalists = heapq.nsmallest(FINALISTS, right, key=lambda trial: trial.time)
        if default.status == "ok" and default not in finalists:
            finalists.append(default)
        if finalists:
            finalists = self._final(finalists)
        default = next((trial for trial in finalists if trial.config == start), default)
        standing = [trial for trial in finalists if trial.status == "ok"]
        return Outcome(
            self.subject,
            self.step.kernel.split()[0],
            self.step.shape,
            tuple(self.trials.values()),
            self.fresh,
            len(searched.configs()),
            default,
            min(standing, key=lambda trial: trial.time, default=None),
        )

    def _known(self, config: Config) -> Trial | None:
        trial = self.cache.find(self.subject, config) if self.resume else None
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
                (trial,) = self.tuner.run(self.problem, self.step, [trial])
            except Lost as lost:
                trial = replace(trial, status=lost.status, reason=lost.reason)
        date = datetime.now(UTC).isoformat(timespec="seconds")
        return replace(trial, date=date, seconds=round(time.perf_counter() - started, 4))

    def _final(self, finalists: list[Trial]) -> list[Trial]:
        """The same with their times from the final.

        One that fails now though it was right before is no winner, and the cache is told. If the
        final itself is lost, say because the finalists do not fit in memory together, the times of
        the search stand.
        """
        untimed = [replace(one, median_us=None, p20_us=None, p80_us=None) for one in finalists]
        try:
            final = self.tuner.run(self.problem, self.step, untimed, FINAL_ROUNDS, FINAL)
        except Lost:
            return finalists
        for trial in final:
            if trial.status != "ok":
                self.cache.append(replace(trial, reason=f"right at first, then {trial.reason}"))
        return final


def subject(problem: Problem, step: Step, device: str) -> Subject:
    """What the cache knows the trials of a step by."""
    bound = ready(problem, tensors(problem, "meta"))
    return Subject(
        device=device,
        triton=triton.__version__,
        source=source_hash(launches(bound, step)),
        network=problem.network.name,
        layer=step.name,
        batch=problem.batch,
        dtype=problem.dtype,
    )


def device_name(device: torch.device) -> str:
    """A GPU by its driver's name; a CPU by its own, and that it interprets."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{environment(device)['cpu']}, Triton's interpreter"
