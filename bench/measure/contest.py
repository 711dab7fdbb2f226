"""From a contestant to a row: proved right the way it will be timed, timed in turns, or explained.

Who cannot run, is wrong, or fails while it is timed leaves a row that says so; the others go on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ..records import Row
from .peers import Peer, Prepared
from .problem import Match, Tensors
from .timing import Clock, Run, capture, sampler, take_turns

Compare = Callable[[torch.Tensor], Match]

NO_MATCH = "NO MATCH, so not timed"


@dataclass(frozen=True, slots=True)
class Entry:
    """A contestant's row and the runs of its copies, none if it may not be timed."""

    row: Row
    runs: tuple[Run, ...] = ()


def admit(
    one: Peer, copies: Sequence[Tensors], row: Row, compare: Compare, device: torch.device
) -> Entry:
    """Prepare a contestant on every copy of the tensors and compare what each makes.

    By the clocks of a GPU it is the captured run that is compared; `row` says which clock. Outputs
    are overwritten with NaN before the run that counts. Copies hold the same numbers, and the row
    gets the largest error.
    """
    row = replace(row, contestant=one.name, straw_man=one.straw_man, note=one.note)
    if one.prepare is None:
        return Entry(row)
    try:
        ready = [one.prepare(given) for given in copies]
        found = [compare(_output(each, row.clock, device)) for each in ready]
    except Exception as error:  # of other people's code: whatever it is, the others go on
        return Entry(replace(row, note=reason(error)))
    # The worst decides, and one that did not pass is worse than any that did.
    row = matched(row, max(found, key=lambda match: (not match.passed, match.max_error)))
    return Entry(row) if row.note == NO_MATCH else Entry(row, tuple(each.run for each in ready))


def matched(row: Row, found: Match) -> Row:
    """The row with its errors; NO_MATCH in its note where they are too large."""
    row = replace(row, tolerance=found.tolerance)
    if math.isfinite(found.max_error):
        row = replace(row, max_error=found.max_error, rms_error=found.rms_error)
    return row if found.passed else replace(row, note=NO_MATCH)


def timed(
    entries: Sequence[Entry],
    clock: Clock,
    device: torch.device,
    rounds: int,
    seconds: float | None = None,
) -> list[Row]:
    """Every entry's row with its times, in the same order; who fails now gets a note instead."""
    rows = {entry.row.contestant: replace(entry.row, clock=clock) for entry in entries}
    take: dict[str, Callable[[], float]] = {}
    for place, entry in enumerate(entries):
        if not entry.runs:
            continue
        name = entry.row.contestant
        # Contestants share tensors: none should find in the cache what another has just read.
        turn = place * len(entry.runs) // len(entries)
        runs = entry.runs[turn:] + entry.runs[:turn]
        try:
            # Where the cache is overwritten it does not matter what it holds: one copy will do.
            take[name] = sampler(runs[:1] if clock == "cold" else runs, clock, device)
        except Exception as error:
            rows[name] = replace(rows[name], note=reason(error))
    try:
        for name, times in take_turns(take, clock, rounds, seconds).items():
            rows[name] = rows[name].timed(times)
    except Exception as error:
        rows |= {name: replace(rows[name], note=reason(error)) for name in take}
    return list(rows.values())


def reason(error: Exception) -> str:
    """An exception in one short line."""
    said = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {said}"[:160].rstrip(": ")


def _output(ready: Prepared, clock: str, device: torch.device) -> torch.Tensor:
    """What a run made, as it will be timed, on outputs that held NaN before."""
    ready.run()  # compiles, and lets libraries choose
    run: Run = ready.run if clock == "host" else capture([ready.run], device).replay
    ready.output().fill_(torch.nan)
    run()
    return ready.output()
