"""What is done to one candidate, in a child process: judged, then proved, then timed.

Judging compiles the step's kernels for an architecture without running them, so it happens in many
processes at once while another has the GPU to itself. The compiler's options and arguments are
those of the launch that follows, so that launch finds the binary in Triton's cache on the disk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...engine.plan import KernelConfig
from ...kernels.jit import Launch
from ..inspect.compiled import compile_for, refusal
from ..measure import timing
from ..measure.problem import Problem, Ready, Tensors, configured, expected, match, ready, tensors
from ..measure.timing import Clock, Times
from .cache import Status

SEED = 0  # every candidate of a problem, also in a new process, sees the same tensors


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the compiler says; `refusal` is empty if nothing speaks against running it."""

    refusal: str = ""
    registers: int | None = None  # per thread, of the kernel that takes most
    shared: int | None = None  # bytes per program


@dataclass(frozen=True, slots=True)
class ToJudge:
    """A configuration of the step of this name, for a compute capability."""

    problem: Problem
    step: str
    config: KernelConfig
    arch: int


@dataclass(frozen=True, slots=True)
class ToRun:
    """Configurations of the step of this name that take turns on the clock."""

    problem: Problem
    step: str
    configs: tuple[KernelConfig, ...]
    clock: Clock
    rounds: int
    seconds: float  # of the clock, for all together; at least three rounds are taken


@dataclass(frozen=True, slots=True)
class Ran:
    """How one configuration did; no times unless `status` is "ok"."""

    status: Status
    reason: str = ""
    max_error: float | None = None
    times: Times | None = None


def judge(task: ToJudge) -> Judgement:
    """Compile every kernel of the step, on tensors without memory.

    Raises whatever Triton's compiler raises.
    """
    try:
        variant = configured(task.problem, task.config, task.step)
        made = ready(variant, tensors(variant, "meta"))
    except ValueError as error:  # the launcher's refusal
        return Judgement(str(error))
    binaries = [compile_for(launch, task.arch) for launch in launches(made, task.step)]
    reasons = [reason for binary in binaries if (reason := refusal(binary))]
    return Judgement(
        reasons[0] if reasons else "",
        max((binary.registers for binary in binaries), default=None),
        max((binary.shared for binary in binaries), default=None),
    )


def launches(made: Ready, step: str) -> tuple[Launch, ...]:
    """The launches of one step."""
    return dict(made.launches)[step]


def judges() -> Callable[[ToJudge], Judgement]:
    """What a judging process does."""
    return judge


class Runner:
    """Proves and times candidates on one device; the last problem's tensors are kept."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._problem: Problem | None = None
        self._given: list[Tensors] = []
        self._wanted = torch.empty(0)

    def __call__(self, task: ToRun) -> list[Ran]:
        """One result a configuration, in their order. Raises whatever running one raises."""
        self._prepare(task.problem, task.step)
        found: dict[int, Ran] = {}
        contestants: dict[str, list[timing.Run]] = {}
        for index, config in enumerate(task.configs):
            try:
                variant = configured(task.problem, config, task.step)
                copies = [ready(variant, given) for given in self._given]
            except ValueError as error:
                found[index] = Ran("refused", str(error))
                continue
            for copy in copies:
                copy()  # also fills what the step reads, where it is not the first
            check = match(variant, copies[0].output(), self._wanted)
            worst = check.max_error if check.max_error < float("inf") else None
            if check.passed:
                found[index] = Ran("ok", "", worst)
                contestants[str(index)] = [_run(copy, task.step) for copy in copies]
            else:
                found[index] = Ran("wrong", _wrong(worst, check.rms_error, check.tolerance), worst)
        taken = timing.measure(
            contestants, task.clock, self._device, task.rounds, seconds=task.seconds
        )
        for name, times in taken.items():
            found[int(name)] = Ran("ok", "", found[int(name)].max_error, times)
        return [found[index] for index in range(len(task.configs))]

    def _prepare(self, problem: Problem, step: str) -> None:
        if problem == self._problem:
            return
        self._given, self._problem = [], None  # what is let go makes room
        generator = torch.Generator(self._device).manual_seed(SEED)
        count = 1
        if self._device.type == "cuda":
            (moved,) = (s.work.bytes for s in problem.plan.steps if s.name == step)
            cache = torch.cuda.get_device_properties(self._device).L2_cache_size
            count = timing.copies_to_overflow(moved, cache)
        self._given = [tensors(problem, self._device, generator) for _ in range(count)]
        self._wanted = expected(problem, self._given[0])
        self._problem = problem


def _run(made: Ready, step: str) -> timing.Run:
    calls = launches(made, step)

    def run() -> None:
        for call in calls:
            call()

    return run


def _wrong(error: float | None, rms: float, tolerance: float) -> str:
    if error is None:
        return "some of the answer is NaN or was never written"
    return f"errors up to {error:.2g}, RMS {rms:.2g}; {tolerance:.2g} and a quarter are allowed"
