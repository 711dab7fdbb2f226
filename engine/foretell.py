"""How long the interpreter will take over a card's plan, said before it starts.

A card's tiles are many and small, and the interpreter pays for each, so a full-size network takes
minutes to hours. The estimate is no model: a few programs of every launch are run and timed, and
there are as many as the grid says. Programs at the border of an image have less to do, and those
come first, so the estimate is off by up to half.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable
from dataclasses import replace

from ..kernels.jit import Launch

WORTH_SAYING = 60  # seconds


def say(launches: Iterable[Launch], what: str, times: float = 1) -> None:
    """One line on standard error if it is worth saying: how long `what` takes.

    That is so many times these launches, on CPU tensors; what they write is written, in part.
    """
    total = 0.0
    for launch in launches:
        programs = math.prod(launch.grid)
        spent = _spent(launch, 1)
        # Where it matters, what a launch costs before its first program is not counted for each.
        if spent * programs > 1 < launch.grid[0]:
            more = min(launch.grid[0], 3)
            one, several = (_spent(launch, n) for n in (1, more))
            spent = (several - one) / (more - 1) if several > one else one
        total += spent * programs * times
    if total > WORTH_SAYING:
        minutes = total / 60
        duration = f"{minutes:.0f} minutes" if minutes < 90 else f"{minutes / 60:.1f} hours"
        print(f"{what} in Triton's interpreter: about {duration}", file=sys.stderr, flush=True)


def _spent(launch: Launch, programs: int) -> float:
    """Seconds of the first few programs; what counts arrivals counts none of these."""
    arguments = dict(launch.arguments)
    if arguments.get("counters") is not None:
        arguments["counters"] = arguments["counters"].clone()
    grid = (programs, *(1 for _ in launch.grid[1:]))
    part = replace(launch, grid=grid, arguments=arguments)
    started = time.perf_counter()
    part()
    return time.perf_counter() - started
