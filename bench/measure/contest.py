"""From a contestant to a row: proved right the way it will be timed, timed in turns, or explained.

All contestants of a problem stand in one process with the same inputs, and rotate through copies of
them enough to overflow the L2 cache twice: so weights come from memory, as they do where something
else runs between two calls, and only the clock "cold" need overwrite the cache. Who cannot run, is
wrong, or fails while it is timed leaves a row that says so; the others go on.
"""

from __future__ import annotations

import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest

import torch

from ...errors import Error
from ..records import EMPTY, OURS, Row, race_id
from .contestants import called, contestants
from .peers import Peer, Prepared, libraries
from .problem import Match, Problem, Tensors, expected, match, rotation, tensors
from .roofline import roof_us
from .timing import CLOCKS, ROUNDS, Clock, Effort, Run, capture, sampler, take_turns

Compare = Callable[[torch.Tensor], Match]

COMPARED = 8  # copies of each contestant, at most: a layer may have a hundred, all alike
NO_MATCH = "NO MATCH, so not timed"


class ContextLost(Error, RuntimeError):
    """A contestant has broken the GPU's context: nothing more can be measured in this process."""

    def __init__(self, contestant: str, error: Exception) -> None:
        super().__init__(
            f"{contestant}: {reason(error)}: the GPU's context is broken, so nothing more can be "
            "measured in this process; --peers can leave it out"
        )


@dataclass(frozen=True, slots=True)
class Admitted:
    """A contestant's row and the runs of its copies, none if it may not be timed."""

    row: Row
    runs: tuple[Run, ...] = ()


# --- the road --------------------------------------------------------------------------------


def race(
    problem: Problem,
    device: torch.device,
    clocks: Sequence[Clock] | None = None,
    *,
    kinds: Sequence[str] | None = None,
    roofs: Mapping[str, float] | None = None,
    effort: Effort | None = None,
    seed: int = 0,
) -> Iterator[Row]:
    """Rows of one problem as they come: each contestant by each clock, ours first.

    `clocks` default to all that the device has; `kinds` are those of `peers`; `roofs` what
    `measure_roofs` gave, without which rows have no roof. Who cannot run, does not match or fails
    while it is timed has rows without times and with a note. Raises EngineError for an unknown
    kind of peer, ContextLost once nothing more can be measured.
    """
    everyone = contestants(problem, device, kinds)
    effort = effort or Effort(ROUNDS[device.type])
    blank, clocks = blank_row(problem, roofs), clocks or CLOCKS[device.type]
    try:
        try:
            with torch.inference_mode():
                copies, compare = inputs(problem, device, seed)
        except torch.cuda.OutOfMemoryError as error:
            row = replace(blank, note=reason(error))
            for clock in clocks:
                yield from (replace(row, contestant=one.name, clock=clock) for one in everyone)
            return
        for group in _groups(clocks):
            takers = everyone
            if problem.whole and group == ("host",):
                takers = [called(one, problem, device) for one in everyone]
            yield from _heat(problem, device, takers, copies, group, blank, compare, effort)
            free(device)
            everyone = [replace(one, slow="") for one in everyone]  # what compiles has done so
        del copies, compare
        free(device)
    except torch.AcceleratorError as error:  # of which no contestant was aware
        raise ContextLost("a contestant", error) from error


def _groups(clocks: Sequence[Clock]) -> list[tuple[Clock, ...]]:
    """Clocks that time the same runs, together: those of a GPU capture them, the host's calls."""
    captured = tuple(clock for clock in clocks if clock != "host")
    host = tuple(clock for clock in clocks if clock == "host")
    return [group for group in (captured, host) if group]


def _heat(
    problem: Problem,
    device: torch.device,
    everyone: Sequence[Peer],
    copies: Sequence[Tensors],
    clocks: Sequence[Clock],
    blank: Row,
    compare: Compare,
    effort: Effort,
) -> Iterator[Row]:
    """Those who take turns with one another, by clocks that time the same runs."""
    rows = [replace(blank, contestant=one.name, clock=clocks[0]) for one in everyone]
    try:
        with libraries(problem.plan.arithmetic), torch.inference_mode():
            admitted = [admit(one, copies, rows[0], compare, device) for one in everyone]
        for clock in clocks:
            rows = [replace(one.row, clock=clock) for one in admitted]
            with libraries(problem.plan.arithmetic), torch.inference_mode():
                empty = [_empty(blank, device)] if clock == "cold" else []
                rows = timed([*admitted, *empty], clock, device, effort.rounds, effort.seconds)
                if problem.whole:
                    pairs = zip_longest(rows, admitted)
                    rows = [_as_a_call(row, one, problem, device) for row, one in pairs]
            yield from rows
    except (ContextLost, torch.AcceleratorError) as error:
        yield from (replace(row, note=str(error).partition("\n")[0]) for row in rows)
        raise


def _empty(blank: Row, device: torch.device) -> Admitted:
    """A kernel that writes one number: what the clock itself takes, and no peer."""
    number = torch.zeros(1, device=device)
    row = replace(blank, contestant=EMPTY, flops=0, bytes=0, roof_us=None, note="the clock itself")
    return Admitted(row, (lambda: number.fill_(1.0),))


def inputs(problem: Problem, device: torch.device, seed: int = 0) -> tuple[list[Tensors], Compare]:
    """Tensors to rotate through, the same numbers in each, and what compares an answer to them."""
    given = tensors(problem, device, torch.Generator(device).manual_seed(seed))
    right = expected(problem, given)
    return rotation(given, problem.work.bytes, device), partial(match, problem, wanted=right)


def blank_row(problem: Problem, roofs: Mapping[str, float] | None = None) -> Row:
    """A row of a problem without a contestant and a clock; without `roofs` it has no roof."""
    return Row(
        "model" if problem.whole else "layers",
        problem.name,
        problem.name if problem.whole else problem.network.name,
        *(problem.batch, problem.dtype, "", ""),
        *(problem.work.flops, problem.work.bytes),
        roof_us=roof_us(problem.work, problem.dtype, roofs) if roofs else None,
        race=race_id(),
    )


# --- proved ----------------------------------------------------------------------------------


def admit(
    one: Peer, copies: Sequence[Tensors], row: Row, compare: Compare, device: torch.device
) -> Admitted:
    """Prepare a contestant on every copy of the tensors and compare what it makes of the first.

    Of the first `COMPARED` copies, which hold the same numbers; the row gets the largest error. By
    the clocks of a GPU it is the captured run that is compared; `row` says which clock. Outputs
    are overwritten with NaN before the run that counts. Raises ContextLost.
    """
    row = replace(row, contestant=one.name, straw_man=one.straw_man, note=one.note)
    if one.prepare is None:
        return Admitted(row)
    if one.slow:
        print(f"{one.name}: {one.slow}", file=sys.stderr, flush=True)
    try:
        ready = [one.prepare(given) for given in copies]
        matches = [compare(_output(each, row.clock, device)) for each in ready[:COMPARED]]
    except Exception as error:  # of other people's code: whatever it is, the others go on
        return Admitted(replace(row, note=survived(one.name, error, device)))
    # The worst decides, and one that did not pass is worse than any that did.
    row = matched(row, max(matches, key=lambda match: (not match.passed, match.max_error)))
    return Admitted(row) if row.note == NO_MATCH else Admitted(row, tuple(r.run for r in ready))


def matched(row: Row, found: Match) -> Row:
    """The row with its errors; NO_MATCH in its note where they are too large."""
    row = replace(row, tolerance=found.tolerance)
    if math.isfinite(found.max_error):  # else `Row.error` is infinite
        row = replace(row, max_error=found.max_error, rms_error=found.rms_error)
    return row if found.passed else replace(row, note=NO_MATCH)


def _output(ready: Prepared, clock: str, device: torch.device) -> torch.Tensor:
    """What a run made, as it will be timed, on outputs that held NaN before."""
    ready.run()  # compiles, and lets libraries choose
    run: Run = ready.run if clock == "host" else capture([ready.run], device).replay
    for _ in range(2):  # an output that is allocated anew is one of two, of which one is still kept
        if ready.poison is None:
            ready.output().fill_(torch.nan)
        else:
            ready.poison()
        run()
    return ready.output()


# --- timed -----------------------------------------------------------------------------------


def timed(
    admitted: Sequence[Admitted],
    clock: Clock,
    device: torch.device,
    rounds: int,
    seconds: float | None = None,
    make: Callable[[Sequence[Run], Clock, torch.device], Callable[[], float]] | None = None,
) -> list[Row]:
    """Everyone's row with its times, in the same order; who fails now gets a note instead.

    They are one race. `make` gives what takes a time, by default `sampler`. Raises ContextLost.
    """
    race = race_id()
    rows = {one.row.contestant: replace(one.row, clock=clock, race=race) for one in admitted}
    fallen: dict[str, str] = {}  # and why
    take: dict[str, Callable[[], float]] = {}
    for place, one in enumerate(admitted):
        if not one.runs:
            continue
        name = one.row.contestant
        # Contestants share tensors: none should find in the cache what another has just read.
        turn = place * len(one.runs) // len(admitted)
        runs = one.runs[turn:] + one.runs[:turn]
        try:
            # Where the cache is overwritten it does not matter what it holds: one copy will do.
            sample = (make or sampler)(runs[:1] if clock == "cold" else runs, clock, device)
        except Exception as error:
            rows[name] = replace(rows[name], note=survived(name, error, device))
        else:
            take[name] = partial(_turn, name, sample, fallen, device)
    for name, times in take_turns(take, clock, rounds, seconds, device=device).items():
        row = rows[name]
        rows[name] = replace(row, note=fallen[name]) if name in fallen else row.timed(times)
    return list(rows.values())


def _turn(
    name: str, sample: Callable[[], float], fallen: dict[str, str], device: torch.device
) -> float:
    """A contestant's time; NaN once it fell out, and `fallen` says why."""
    if name in fallen:
        return math.nan
    try:
        return sample()
    except Exception as error:
        fallen[name] = survived(name, error, device)
        return math.nan


def _as_a_call(row: Row, one: Admitted | None, problem: Problem, device: torch.device) -> Row:
    """A whole network's row with the engine's memory, and the host's part of a run."""
    if row.contestant == OURS:
        row = replace(row, workspace=problem.plan.workspace)
    if one is None or row.median_us is None or row.clock != "host" or device.type != "cuda":
        return row
    try:
        return replace(row, enqueue_us=enqueue_us(one.runs, device, row.runs))
    except Exception as error:  # in a later turn than those that were timed
        return replace(row, note=survived(row.contestant, error, device))


def enqueue_us(runs: Sequence[Run], device: torch.device, rounds: int) -> float:
    """Median of the host's microseconds until a run returns, with nothing queued before it."""
    taken = []
    for turn in range(rounds):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        runs[turn % len(runs)]()
        taken.append((time.perf_counter() - started) * 1e6)
    torch.cuda.synchronize(device)
    return statistics.median(taken)


# --- what went wrong -------------------------------------------------------------------------


def reason(error: Exception) -> str:
    """An exception in one short line."""
    said = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {said}"[:160].rstrip(": ")


def survived(contestant: str, error: Exception, device: torch.device) -> str:
    """Why a contestant is out. Raises ContextLost if nobody else can run on this GPU any more.

    A kernel that reads where there is no memory leaves an error that every later call meets.
    """
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except Exception:
            raise ContextLost(contestant, error) from error
    return reason(error)


def free(device: torch.device) -> None:
    """Give back memory that nothing holds. Raises torch.AcceleratorError on a broken context."""
    gc.collect()  # compiled graphs are cycles, and hold tensors
    if device.type == "cuda":
        torch.cuda.empty_cache()
