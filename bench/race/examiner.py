"""The worker's side of a candidate: its file is loaded, proved, bound and timed as it is told.

Before each timed run the inputs are new, drawn from a number that the race sends then, and the
output is poison, outside the clock; after it the race gets the answer, and compares all of it. So
what remembers an answer, or computes only while it is proved, is wrong, and nothing in this process
knows a right answer to find. By the clocks of both devices a sample is one run: in a graph of many
all but the first would meet inputs that they know.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...engine.load import find
from ...engine.plan import ARITHMETIC
from ..measure import timing
from ..measure.peers import libraries
from ..measure.problem import Match, Problem, Tensors, problems, tensors, tuned_planner
from ..measure.timing import Clock
from ..worker import summary
from . import proof
from .candidate import Candidate, CandidateError, Config, Declined, load, pose
from .proof import Disqualified
from .tiles import TILES

CLOCK: dict[str, Clock] = {"cuda": "cold", "cpu": "host"}
NEW = 32  # images that a GPU gets anew for each timed run; the others change places. A CPU: all


@dataclass(frozen=True, slots=True)
class Setup:
    """Which layer is raced on, and how it is timed."""

    model: str
    layer: str
    batch: int
    dtype: str
    device: str
    seed: int

    @property
    def clock(self) -> Clock:
        """What times are taken by."""
        return CLOCK[torch.device(self.device).type]


@dataclass(frozen=True, slots=True)
class Proof:
    """What a candidate that is right goes into the race with."""

    match: Match
    factor: float  # the candidate's own on the bound of an ordinary sum
    config: Config
    note: str


def find_problem(setup: Setup) -> Problem:
    """The layer; raises NetworkError for a network or a layer that is none."""
    network = TILES if setup.model == TILES.name else find(setup.model)[0]
    planner = tuned_planner(network, ARITHMETIC[setup.dtype], torch.device(setup.device))
    return problems(planner, setup.dtype, setup.batch, [setup.layer])[0]


def redraw(x: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw images of x [N, ...] anew, and shuffle all: where each was, and which now are new."""
    generator = torch.Generator().manual_seed(number)
    count = len(x) if x.device.type == "cpu" else min(NEW, len(x))
    x[:count] = torch.randn(x[:count].shape, generator=generator).to(x)
    order = torch.randperm(len(x), generator=generator).to(x.device)
    x.copy_(x[order])
    return order, (order < count).nonzero().flatten()


class Entrant:
    """A candidate on tensors of its own; `answer` is where its last run left the result."""

    def __init__(
        self, candidate: Candidate, config: Config, problem: Problem, given: Tensors
    ) -> None:
        own = {name: tensor.clone() for name, tensor in given.state.items()}
        self._candidate, self._config, self._posed = candidate, config, pose(problem)
        inputs, self._out = proof.arrange(
            Tensors(given.x.clone(), own), self._posed, candidate.layout
        )
        self._x, self._bias = inputs["x"], inputs["bias"]
        self._weight = candidate.prepare(self._posed, inputs["weight"], config)
        self.answer = self._out

    def __call__(self) -> None:
        made = self._candidate.run(
            self._posed, self._x, self._weight, self._bias, self._out, self._config
        )
        self.answer = proof.check_answer(made, self._out)

    def renew(self, x: torch.Tensor) -> None:
        """Other inputs, and poison where the answer belongs."""
        self._out.fill_(torch.nan)
        self.answer.fill_(torch.nan)
        self._x.copy_(x)


class Examiner:
    """Proves, binds and times one candidate; made in the race's process, called in its own."""

    def __init__(self, setup: Setup, file: str) -> None:
        self._setup, self._file = setup, file
        self._device = torch.device(setup.device)

    def __call__(self, question: str, *numbers: float) -> Any:
        """What the method of this name returns, or the exception that ends the candidate."""
        try:
            return getattr(self, question)(*numbers)
        except Declined as error:
            return Declined(str(error))
        except (Disqualified, CandidateError) as error:
            return Disqualified(str(error))

    def prove(self, limit: float) -> Proof:
        """Load and prove it, then bind it; half of the limit's seconds are for choosing."""
        until, seed = time.monotonic() + limit / 2, self._setup.seed
        self._problem = find_problem(self._setup)
        # Set, for good, what holds in the whole process.
        self._limit_memory()
        self._switches = ExitStack()  # which they last as long as
        self._switches.enter_context(libraries(self._problem.plan.arithmetic))
        torch.set_grad_enabled(False)
        np.seterr(all="ignore")  # infinities and NaNs are results, in the interpreter as on a GPU
        self._candidate = load(Path(self._file))
        configs = self._candidate.configs(pose(self._problem))
        first = proof.case(self._problem, self._device, seed, self._candidate.layout)
        config, seen, note = self._choose(configs, first, until)
        worst = proof.confirm(self._candidate, config, seen, first, seed)
        del first  # a GPU's memory is wanted
        self._bind(config)
        plain = (int, float, str)  # what JSON has
        shown = {key: v if isinstance(v, plain) else str(v) for key, v in config.items()}
        return Proof(worst, self._candidate.tolerance, shown, note)

    def draw(self, number: int) -> None:
        """Other inputs."""
        if self._device.type == "cuda":
            self._sample()  # the first time after another process's turn is lost
        redraw(self._given.x, number)

    def take(self) -> tuple[float, Any]:
        """Microseconds of a run on them, which the candidate sees only now, and its answer's bytes.

        They are taken at once, so that nothing has time to compute after the clock.
        """
        self._run.renew(self._given.x)
        us = self._sample()
        return us, self._run.answer.cpu().contiguous().view(torch.uint8).numpy()

    def repeat(self, runs: int) -> None:
        """Nothing but so many runs."""
        for _ in range(runs):
            self._again()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _limit_memory(self) -> None:
        """Half of the device's memory is for this process; it gets an error beyond that."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
            torch.cuda.set_per_process_memory_fraction(0.5, self._device)
        else:
            half = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
            resource.setrlimit(resource.RLIMIT_DATA, (half, half))

    def _bind(self, config: Config) -> None:
        gpu = self._device.type == "cuda"
        if gpu:
            torch.cuda.empty_cache()  # other processes want the memory of the proof
        drawn = torch.Generator().manual_seed(self._setup.seed)
        self._given = tensors(self._problem, self._device, drawn)
        self._run = Entrant(self._candidate, config, self._problem, self._given)
        self._sample: Callable[[], float] = self._host
        self._again: Callable[[], object] = self._run
        if gpu:
            self._sample = timing.sampler([self._run], self._setup.clock, self._device)
            self._again = timing.capture([self._run], self._device).replay

    def _host(self) -> float:
        """One run by the clock of a CPU, which else may take the median of several."""
        started = time.perf_counter()
        self._run()
        return (time.perf_counter() - started) * 1e6

    def _choose(
        self, configs: Sequence[Config], first: proof.Case, until: float
    ) -> tuple[Config, Match, str]:
        """The fastest configuration that is right, its match, and a word about the others."""
        candidate = self._candidate
        if len(configs) == 1:
            return configs[0], proof.examine(candidate, configs[0], first), ""
        given = tensors(self._problem, self._device)
        right: list[tuple[float, Config, Match]] = []
        failures: list[str] = []
        for config in configs:
            if (right or failures) and time.monotonic() > until:
                break
            try:
                seen = proof.examine(candidate, config, first)
                run = Entrant(candidate, config, self._problem, given)
                times = timing.measure({"": [run]}, self._setup.clock, self._device, rounds=5)
            except Declined:
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
