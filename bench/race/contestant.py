"""One candidate in a process of its own, so that whatever it does, the race goes on.

The parent holds an `Entrant` and asks; the child (`worker.py`) loads the candidate's file and
answers in JSON over a pipe. It proves, binds, and takes times when it is told to, so only one
candidate runs at a time. Every question has a time limit: the child ends itself when it is over,
and is killed if it cannot. Where a candidate hung or crashed is read off the trace that Python's
faulthandler leaves. The candidate's own prints go to standard error.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import torch

from ...engine.load import find
from ...engine.plan import ARITHMETIC
from ..measure.problem import Problem, Tensors, problems, tensors, tuned_planner
from ..measure.timing import Clock, copies_to_overflow
from .candidate import Refused
from .proof import Disqualified

START = 120.0  # seconds that a process may take to import torch and to find the GPU


@dataclass(frozen=True, slots=True)
class Entry:
    """Which candidate on which problem, and how it is timed."""

    file: str
    model: str
    layer: str
    batch: int
    dtype: str
    device: str
    seed: int
    clock: Clock


def find_problem(entry: Entry) -> Problem:
    """The entry's layer; raises NetworkError for a network or a layer that is none."""
    network, _ = find(entry.model)
    planner = tuned_planner(network, ARITHMETIC[entry.dtype], torch.device(entry.device))
    return problems(planner, entry.dtype, entry.batch, [entry.layer])[0]


def copies(problem: Problem, device: torch.device, clock: Clock, seed: int) -> list[Tensors]:
    """The tensors that a contestant rotates through: the same numbers, more than a cache holds.

    One set will do on a CPU, and where the cache is overwritten before each turn.
    """
    first = tensors(problem, device, torch.Generator(device).manual_seed(seed))
    if device.type == "cpu" or clock == "cold":
        return [first]
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    others = copies_to_overflow(problem.work.bytes, cache) - 1
    return [first, *(_clone(first) for _ in range(others))]


def _clone(given: Tensors) -> Tensors:
    state = {name: tensor.clone() for name, tensor in given.state.items()}
    return Tensors(given.x.clone(), state)


def after_a_change(sample: Callable[[], float], device: torch.device) -> Callable[[], float]:
    """A sampler whose turn comes after that of another process: on a GPU its first time is lost."""
    if device.type == "cpu":
        return sample

    def second() -> float:
        sample()
        return sample()

    return second


# --- the parent's side -----------------------------------------------------------------------


class Entrant:
    """A candidate's process, from its start to `close`."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self._connection, theirs = Pipe()
        self._faults = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        passed = (theirs.fileno(), self._faults.fileno())
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.worker", *map(str, passed)],
            pass_fds=passed,
            env=_environment(entry.device),
            stdin=subprocess.DEVNULL,
            stdout=2,
            start_new_session=True,
        )
        theirs.close()

    def start(self) -> None:
        """Wait until the process is ready for questions. Raises Disqualified if it never is."""
        self._ask({"entry": asdict(self.entry)}, START)

    def prove(self, limit: float) -> dict[str, Any]:
        """Its errors, tolerance, configuration and note. Raises Disqualified, or Refused."""
        return self._ask({"do": "prove"}, limit)

    def bind(self, limit: float) -> None:
        """Make it ready to be timed. Raises Disqualified."""
        self._ask({"do": "bind"}, limit)

    def take(self, limit: float) -> float:
        """Its next time, in microseconds a run. Raises Disqualified."""
        return float(self._ask({"do": "take"}, limit)["us"])

    def close(self) -> None:
        """End the process and whatever it started."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._connection.close()
        self._faults.close()

    def _ask(self, question: dict[str, Any], limit: float) -> dict[str, Any]:
        asked = time.monotonic()
        try:
            self._connection.send_bytes(json.dumps(question | {"limit": limit}).encode())
            answered = self._connection.poll(limit + 2)
            answer = json.loads(self._connection.recv_bytes()) if answered else {}
        except (EOFError, OSError):  # it is gone
            answer = {}
        if "refused" in answer:
            raise Refused(answer["refused"])
        if "disqualified" in answer:
            raise Disqualified(answer["disqualified"])
        if answer:
            return dict(answer)
        if time.monotonic() - asked >= limit:
            raise Disqualified(f"no answer within {limit:g} s{self._place()}; killed")
        status = self._process.wait()
        if status < 0:
            name = signal.Signals(-status).name
            raise Disqualified(f"killed by signal {-status}, {name}{self._place()}")
        raise Disqualified(f"ended its process with exit status {status}")

    def _place(self) -> str:
        """Where in the candidate's file it was, as far as the fault handler could tell."""
        self._faults.seek(0)
        trace = self._faults.read().decode(errors="replace")
        found = re.search(rf'File "{re.escape(self.entry.file)}", line (\d+)', trace)
        return f" at {Path(self.entry.file).name}:{found[1]}" if found else ""


def _environment(device: str) -> dict[str, str]:
    """The child's: Triton reads while it is imported whether `@triton.jit` is to interpret."""
    kept = dict(os.environ)
    kept.pop("TRITON_INTERPRET", None)
    if torch.device(device).type == "cpu":
        # One thread for NumPy's products: they are small, and more threads only cost.
        kept.update(TRITON_INTERPRET="1", OPENBLAS_NUM_THREADS="1")
    return kept
