"""What is done to one configuration, in a worker process: judged, then proved, then timed.

Judging compiles the step's kernels for an architecture without running them, so it happens in many
processes at once while another has the GPU to itself. The compiler's options and arguments are
those of the launch that follows, so that launch finds the binary in Triton's cache on the disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch

from ...engine.plan import Step
from ...kernels.jit import Launch
from ..inspect.compiled import compile_for, refusal
from ..measure import timing
from ..measure.problem import (
    Match,
    Problem,
    Ready,
    Tensors,
    configured,
    expected,
    match,
    ready,
    rotation,
    tensors,
)
from ..measure.timing import Clock
from ..race.sanitizer import sanitized
from .cache import Trial, source_hash
from .space import Config

SEED = 0  # every configuration of a problem, also in a new process, sees the same tensors


def judge(problem: Problem, step: Step, trial: Trial, arch: int) -> Trial:
    """The trial with what the compiler says: registers and shared memory, or that it is refused.

    Compiles every kernel of the step for compute capability `arch`, on tensors without memory.
    Raises whatever Triton's compiler raises.
    """
    try:
        variant = _variant(problem, step, trial.config)
        bound = ready(variant, tensors(variant, "meta"))
    except ValueError as error:  # the launcher's refusal
        return replace(trial, status="refused", reason=str(error))
    binaries = [compile_for(launch, arch) for launch in launches(bound, step)]
    trial = replace(
        trial,
        registers=max((binary.registers for binary in binaries), default=None),
        shared=max((binary.shared for binary in binaries), default=None),
    )
    reason = next(filter(None, map(refusal, binaries)), "")
    return replace(trial, status="refused", reason=reason) if reason else trial


def launches(bound: Ready, step: Step) -> tuple[Launch, ...]:
    """The launches of one step."""
    return dict(bound.launches)[step.name]


def source_of(problem: Problem, step: Step) -> str:
    """The name of the code that a step runs."""
    return source_hash(launches(ready(problem, tensors(problem, "meta")), step))


class TrialRunner:
    """Proves and times configurations on one device; the last problem's tensors are kept."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._prepared: tuple[Problem, str] | None = None
        self._copies: list[Tensors] = []
        self._expected = torch.empty(0)

    def __call__(
        self,
        problem: Problem,
        step: Step,
        trials: Sequence[Trial],
        clock: Clock,
        rounds: int,
        seconds: float,
    ) -> list[Trial]:
        """The trials with their errors and, of those that are right, times: they take turns.

        On a CPU the first run of a configuration is under the sanitizer, and one that reads or
        writes where it must not is wrong. `seconds` is of the clock, for all together, as
        `timing.measure` has it. Raises whatever running one raises.
        """
        self._prepare(problem, step)
        proved: list[Trial] = []
        contestants: dict[str, list[timing.Run]] = {}
        for index, trial in enumerate(trials):
            try:
                variant = _variant(problem, step, trial.config)
                copies = [ready(variant, given) for given in self._copies]
            except ValueError as error:
                proved.append(replace(trial, status="refused", reason=str(error)))
                continue
            watched = self._device.type == "cpu" and trial.max_error is None
            with ExitStack() as stack:
                violations = stack.enter_context(sanitized()) if watched else []
                for copy in copies:
                    copy()  # also fills what the step reads, where it is not the first
            if violations:
                proved.append(replace(trial, status="wrong", reason=str(violations[0])))
                continue
            proved.append(_compared(trial, match(variant, copies[0].output(), self._expected)))
            if proved[-1].status == "ok":
                contestants[str(index)] = [partial(_run, launches(copy, step)) for copy in copies]
        times = timing.measure(contestants, clock, self._device, rounds, seconds)
        for name, taken in times.items():
            proved[int(name)] = replace(
                proved[int(name)],
                median_us=round(taken.median, 3),
                p20_us=round(taken.p20, 3),
                p80_us=round(taken.p80, 3),
            )
        return proved

    def _prepare(self, problem: Problem, step: Step) -> None:
        if (problem, step.name) == self._prepared:
            return
        self._copies, self._prepared = [], None  # what is let go makes room
        given = tensors(problem, self._device, torch.Generator(self._device).manual_seed(SEED))
        self._copies = rotation(given, step.work.bytes, self._device)
        self._expected = expected(problem, given)
        self._prepared = problem, step.name


def _variant(problem: Problem, step: Step, config: Config) -> Problem:
    assert step.config is not None
    return configured(problem, replace(step.config, **config), step.name)


def _run(calls: Sequence[Launch]) -> None:
    for call in calls:
        call()


def _compared(trial: Trial, found: Match) -> Trial:
    """The trial, right or wrong."""
    if found.passed:
        return replace(trial, status="ok", max_error=found.max_error)
    if found.max_error == float("inf"):
        reason = "some of the answer is NaN or was never written"
        return replace(trial, status="wrong", reason=reason, max_error=None)
    reason = (
        f"errors up to {found.max_error:.2g}, RMS {found.rms_error:.2g}; "
        f"{found.tolerance:.2g} and a quarter are allowed"
    )
    return replace(trial, status="wrong", reason=reason, max_error=found.max_error)
