"""The race's side of a candidate: a process of its own, of which nothing is believed.

Its file runs in a worker (`examiner.py`), every question has a time limit, and its prints go to
standard error. Its times are held against the race's own clock, which sees how long a question took
in which nothing but the run happened.
"""

from __future__ import annotations

import math
import os
import secrets
import time
from dataclasses import dataclass
from typing import Any

import torch

from ..units import time as told
from ..worker import Lost, Worker
from .examiner import Examiner, Setup
from .proof import Disqualified

Contestant = Worker[..., Any]

# Our clock agrees if it saw at most so many times a reported time, and this much more, for the
# question. Whom the machine kept waiting gets other tries.
MARGIN, SLACK_US, TRIES = 1.25, 3000.0, 4
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


@dataclass(slots=True)
class Turn:
    """The timed runs of a bound candidate.

    A time counts if our clock agrees with it: on a CPU about the run itself, on a GPU, where a run
    is short beside a question, about many of them in the end (`confirm`).
    """

    one: Contestant
    limit: float
    cpu: bool
    computes: bool = False  # also on inputs that it knows; a captured graph does

    def __call__(self) -> float:
        """Microseconds of a run on new inputs. Raises as `ask` does."""
        for _ in range(TRIES):
            ask(self.one, self.limit, "draw", secrets.randbits(32))
            us, waited = self._waited("take")
            ask(self.one, self.limit, "check")
            said = f"its clock says {told(us)} a run, ours {told(waited)}"
            if not 0 < us <= waited or (self.cpu and waited > MARGIN * us + SLACK_US):
                continue
            if self.cpu and not self.computes:
                _, again = self._waited("repeat", 1)
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

    def _waited(self, question: str, *numbers: float) -> tuple[float, float]:
        """The answer, and our microseconds until it came."""
        started = time.perf_counter()
        answer = ask(self.one, self.limit, question, *numbers)
        return answer, (time.perf_counter() - started) * 1e6
