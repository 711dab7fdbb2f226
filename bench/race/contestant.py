"""The race's side of a candidate: a process of its own, of which nothing is believed.

Its file runs in a worker (`examiner.py`), every question has a time limit, and its prints go to
standard error. Its timed answers are compared in the race's process, and its times are held against
the race's own clock, which sees how long a question took in which nothing but the run happened.
"""

from __future__ import annotations

import math
import os
import secrets
import time
from dataclasses import dataclass
from typing import Any

import torch

from ..measure.problem import Problem, expected, tensors
from ..units import time as told
from ..worker import Lost, Worker
from .candidate import MOST_TOLERANCE
from .examiner import Examiner, Setup, redraw
from .proof import Disqualified, compare

Contestant = Worker[..., Any]

# Our clock agrees if it saw at most so many times a reported time, and this much more, for the
# question. Whom the machine kept waiting gets other tries, MOST at most, and TRIES after PATIENCE
# seconds: a long run is seldom kept waiting for a quarter of its time.
MARGIN, SLACK_US, MOST, TRIES, PATIENCE = 1.25, 3000.0, 16, 4, 5.0
ROOF = 0.95  # of the time that the measured rates allow at best: what is below is not believed
LAUNCH_US = 10.0  # what a graph's replay may last beyond the run in it
KEEPS = 8  # who is so many times as fast on inputs that it knows keeps answers


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


class TooSlow(Disqualified):
    """No answer in time, which is no proof of a fault."""


def ask(one: Contestant, limit: float, question: str, *numbers: float) -> Any:
    """Prove a candidate right and bind it (a Proof), or one of the steps of a `Turn`.

    Raises Disqualified, TooSlow after `limit` seconds, or Declined.
    """
    try:
        answer = one.ask(limit, question, *numbers)
    except Lost as lost:
        if lost.status == "timeout":
            cure = "--timeout allows more, a smaller --batch or --model wants less"
            raise TooSlow(f"{lost.reason}; {cure}") from None
        raise Disqualified(lost.reason) from None
    if isinstance(answer, Exception):
        raise answer
    return answer


class Judge:
    """Draws the inputs that a candidate draws, and knows their right answer."""

    def __init__(self, setup: Setup, problem: Problem, factor: float) -> None:
        self._problem, self._factor = problem, min(factor, MOST_TOLERANCE)
        drawn = torch.Generator().manual_seed(setup.seed)
        self._given = tensors(problem, torch.device(setup.device), drawn)
        self._right = expected(problem, self._given)

    def draw(self, number: int) -> None:
        """As the candidate does at this number."""
        order, new = redraw(self._given.x, number)
        self._right = self._right[order]
        self._right[new] = expected(self._problem, self._given, new)

    def check(self, made: Any) -> None:
        """Compare the bytes of an answer. Raises Disqualified."""
        answer = torch.from_numpy(made).view(self._problem.plan.arithmetic.dtype)
        try:
            answer = answer.reshape(self._right.shape).to(self._right.device)
            compare(self._factor, self._problem, answer, self._right)
        except Disqualified as error:
            raise Disqualified(f"right while it was proved, and when it is timed {error}") from None


@dataclass(slots=True)
class Turn:
    """The timed runs of a bound candidate.

    A time counts if our clock agrees with it: on a CPU about the run itself, on a GPU, where a run
    is short beside a question, about many of them in the end (`confirm`).
    """

    one: Contestant
    limit: float
    cpu: bool
    judge: Judge
    computes: bool = False  # also on inputs that it knows; a captured graph does

    def __call__(self) -> float:
        """Microseconds of a run on new inputs. Raises as `ask` does."""
        us: float
        patient = time.monotonic() + PATIENCE
        for tries in range(MOST):
            if tries >= TRIES and time.monotonic() > patient:
                break
            number = secrets.randbits(32)
            ask(self.one, self.limit, "draw", number)
            (us, made), waited = self._waited("take")
            self.judge.draw(number)
            self.judge.check(made)
            said = f"its clock says {told(us)} a run, ours {told(waited)}"
            if not 0 < us <= waited or (self.cpu and waited > MARGIN * us + SLACK_US):
                continue
            if self.cpu and not self.computes:
                # The least of three: a machine that keeps it waiting would hide what it remembers.
                again = min(self._waited("repeat", 1)[1] for _ in range(3))
                said = f"keeps answers: {told(us)} on new inputs, {told(again)} on the same again"
                if KEEPS * again + SLACK_US < us:
                    continue
                self.computes = True
            return us
        raise Disqualified(said)

    def confirm(self, us: float, roof_us: float | None) -> None:
        """Hold its median against the roof, and against our clock over many runs.

        Neither is known on a CPU, where an interpreter comes nowhere near a roof. Raises as `ask`.
        """
        if roof_us is not None and us < ROOF * roof_us:
            raise Disqualified(f"{told(us)} is faster than this machine's roof, {told(roof_us)}")
        if self.cpu:
            return
        runs = math.ceil(20_000 / max(us, 4.0))
        waited = min(self._waited("repeat", runs)[1] for _ in range(3)) / runs
        if waited > MARGIN * us + LAUNCH_US + SLACK_US / runs:
            raise Disqualified(f"its clock says {told(us)} a run, ours {told(waited)}")

    def _waited(self, question: str, *numbers: float) -> tuple[Any, float]:
        """The answer, and our microseconds until it came."""
        started = time.perf_counter()
        answer = ask(self.one, self.limit, question, *numbers)
        return answer, (time.perf_counter() - started) * 1e6
