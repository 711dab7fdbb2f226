"""One candidate in a process of its own, so that whatever it does, the race goes on.

The race holds a `contestant`; in its worker (`bench/worker.py`) an `Examiner` loads the candidate's
file, proves it, binds it and takes times when it is told to, so only one candidate runs at a time.
Every question has a time limit. The candidate's own prints go to standard error.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ...engine.load import find
from ...engine.plan import ARITHMETIC
from ..measure import timing
from ..measure.contest import Compare, inputs
from ..measure.peers import libraries
from ..measure.problem import Match, Problem, Tensors, problems, tensors, tuned_planner
from ..measure.timing import Clock
from ..worker import Lost, Worker, summary
from .candidate import Candidate, CandidateError, Config, Refused, load, pose
from .proof import Case, Disqualified, arrange, case, check_answer, confirm, examine

Question = Literal["prove", "bind", "take"]
Contestant = Worker[[Question, float], Any]
PLAIN = bool | int | float | str | None  # what JSON has


@dataclass(frozen=True, slots=True)
class Setup:
    """Which layer is raced on, and how it is timed."""

    model: str
    layer: str
    batch: int
    dtype: str
    device: str
    seed: int
    clock: Clock


@dataclass(frozen=True, slots=True)
class Proof:
    """What a candidate that is right goes into the race with."""

    match: Match
    factor: float  # the candidate's own on the bound of an ordinary sum
    config: Config
    note: str


def find_problem(setup: Setup) -> Problem:
    """The layer; raises NetworkError for a network or a layer that is none."""
    network, _ = find(setup.model)
    planner = tuned_planner(network, ARITHMETIC[setup.dtype], torch.device(setup.device))
    return problems(planner, setup.dtype, setup.batch, [setup.layer])[0]


def copies(problem: Problem, setup: Setup) -> tuple[list[Tensors], Compare]:
    """Tensors that a contestant rotates through, and what compares an answer to them.

    Where the cache is overwritten before each turn, one set will do.
    """
    given, compare = inputs(problem, torch.device(setup.device), setup.seed)
    return given[:1] if setup.clock == "cold" else given, compare


def after_a_change(sample: Callable[[], float], device: torch.device) -> Callable[[], float]:
    """A sampler whose turn comes after that of another process: on a GPU its first time is lost."""
    if device.type == "cpu":
        return sample

    def second() -> float:
        sample()
        return sample()

    return second


# --- the race's side -------------------------------------------------------------------------


def contestant(setup: Setup, file: str) -> Contestant:
    """A candidate's process; it starts at once. Close it in the end."""
    # Triton reads while it is imported whether `@triton.jit` is to interpret.
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if torch.device(setup.device).type == "cpu":
        # One thread for NumPy's products: they are small, and more threads only cost.
        env.update(TRITON_INTERPRET="1", OPENBLAS_NUM_THREADS="1")
    worker: Contestant = Worker(Examiner(setup, file), file=file, env=env)
    worker.start()
    return worker


def ask(one: Contestant, question: Question, limit: float) -> Any:
    """Prove a candidate right (a Proof), bind it, or take its next time (microseconds a run).

    Raises Disqualified, also after `limit` seconds, or Refused.
    """
    try:
        answer = one.ask(limit, question, limit)
    except Lost as lost:
        raise Disqualified(lost.reason) from None
    if isinstance(answer, Exception):
        raise answer
    return answer


# --- the worker's side -----------------------------------------------------------------------


class Examiner:
    """Proves, binds and times one candidate; made in the race's process, called in its own."""

    def __init__(self, setup: Setup, file: str) -> None:
        self._setup, self._file = setup, file
        self._device = torch.device(setup.device)

    def __call__(self, question: Question, limit: float) -> Proof | float | Exception | None:
        """What is asked, or the exception with which the candidate is out."""
        try:
            match question:
                case "prove":
                    return self._prove(time.monotonic() + limit / 2)
                case "take":
                    return self._take()
            self._bind()
            return None
        except Refused as refusal:
            return Refused(str(refusal))
        except (Disqualified, CandidateError) as error:
            return Disqualified(str(error))

    def _prove(self, search_until: float) -> Proof:
        seed = self._setup.seed
        self._problem = find_problem(self._setup)
        self._posed = pose(self._problem)
        # Set, for good, what holds in the whole process.
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        self._switches = ExitStack()  # which they last as long as
        self._switches.enter_context(libraries(self._problem.plan.arithmetic))
        torch.set_grad_enabled(False)
        np.seterr(all="ignore")  # infinities and NaNs are results, in the interpreter as on a GPU
        candidate = load(Path(self._file))
        configs = candidate.configs(self._posed)
        first = case(self._problem, self._device, seed, candidate.layout)
        config, seen, search = self._choose(candidate, configs, first, search_until)
        worst = confirm(candidate, config, seen, first, seed)
        self._chosen = candidate, config
        note = "; ".join(filter(None, [candidate.note(self._posed), search]))
        shown = {
            key: value if isinstance(value, PLAIN) else str(value) for key, value in config.items()
        }
        return Proof(worst, candidate.tolerance, shown, str(note))

    def _choose(
        self, candidate: Candidate, configs: Sequence[Config], first: Case, until: float
    ) -> tuple[Config, Match, str]:
        """The fastest configuration that is right, its match, and a word about the others."""
        if len(configs) == 1:
            return configs[0], examine(candidate, configs[0], first), ""
        given = tensors(self._problem, self._device)
        right: list[tuple[float, Config, Match]] = []
        failures: list[str] = []
        for config in configs:
            if (right or failures) and time.monotonic() > until:
                break
            try:
                seen = examine(candidate, config, first)
                run = self._copy(candidate, config, given)
                times = timing.measure({"": [run]}, self._setup.clock, self._device, rounds=5)
            except Refused:
                raise
            except (Disqualified, CandidateError) as error:
                failures.append(str(error))
            except Exception as error:
                failures.append(summary(error, self._file))
            else:
                right.append((times[""].median, config, seen))
        if not right:
            raise Disqualified(failures[0])
        _, config, seen = min(right, key=lambda one: one[0])
        chosen = ", ".join(f"{name}={value}" for name, value in config.items())
        note = f"{chosen}, best of {len(right)} configurations"
        if failures:
            note += f", {len(failures)} fell out, the first: {failures[0]}"
        if (left := len(configs) - len(right) - len(failures)) > 0:
            note += f", {left} left untried for want of time"
        return config, seen, note

    def _bind(self) -> None:
        candidate, config = self._chosen
        clock, device = self._setup.clock, self._device
        torch.cuda.empty_cache()  # other processes want the memory of the proof
        given, compare = copies(self._problem, self._setup)
        runs = [self._copy(candidate, config, each) for each in given]
        sample = timing.sampler(runs, clock, device)
        # What was captured must compute: a kernel on another stream would be missing from it.
        for run in runs:
            run.answer.fill_(torch.nan)
        for _ in runs:
            sample()
        for run in runs:
            found = compare(run.answer)
            if not replace(found, tolerance=found.tolerance * candidate.tolerance).passed:
                raise Disqualified(
                    "wrong when it is timed: is all its work on the current stream, and none left "
                    "out because it was done before?"
                )
        self._take = after_a_change(sample, device)

    def _copy(self, candidate: Candidate, config: Config, given: Tensors) -> _Copy:
        inputs, out = arrange(given, self._posed, candidate.layout)
        weight = candidate.prepare(self._posed, inputs["weight"], config)

        def run() -> torch.Tensor:
            made = candidate.run(self._posed, inputs["x"], weight, inputs["bias"], out, config)
            return check_answer(made, out)

        return _Copy(run, out)


class _Copy:
    """A candidate bound to one set of tensors; `answer` is where its last run leaves the result."""

    def __init__(self, run: Callable[[], torch.Tensor], out: torch.Tensor) -> None:
        self._run = run
        self.answer = out

    def __call__(self) -> None:
        self.answer = self._run()
