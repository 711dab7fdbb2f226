"""Candidates against the engine's own kernel and the best peer, on one layer, in a league table.

Every candidate runs in a process of its own (`contestant.py`) and must first be proved right
(`proof.py`). The right ones are then timed in turns, one process at a time, in a fresh random order
each round, so that a drift of the machine meets all alike. A candidate that fails at any point is
out, with its reason, and the race goes on; no question to it lasts longer than the time limit.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace

import torch

from ...engine.load import EngineError, arithmetic, at_least_one, one_of, resolve
from ...errors import printable
from ...kernels.jit import interpreter_problem
from ..measure import timing
from ..measure.contest import admit, blank_row, survived
from ..measure.contestants import contestants
from ..measure.peers import libraries
from ..measure.problem import Problem
from ..measure.timing import CLOCKS, Clock
from ..records import OURS, Row
from .candidate import CandidateError, Refused, locate, pose
from .candidates import shipped
from .contestant import (
    Contestant,
    Proof,
    Setup,
    after_a_change,
    ask,
    contestant,
    copies,
    find_problem,
)
from .league import League, Outcome, Standing
from .proof import Disqualified

ROUNDS = {"cuda": 25, "cpu": 5}
GPU_PEERS = ("torch", "fused", "frontend")  # torch.compile wants minutes; `--peers` can ask for it

Take = Callable[[], float]  # one time, in microseconds a run


def race(
    setup: Setup,
    candidates: Mapping[str, str],
    limit: float,
    seconds: float,
    kinds: Sequence[str] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> League:
    """Race candidates (name to file) on the layer of `setup`.

    `limit` bounds each question to a candidate and `seconds` the timing of all, both in seconds;
    `kinds` are those of `peers`. Raises NetworkError for an unknown network or layer, EngineError
    for an unknown kind of peer, CandidateError for a layer that cannot be raced on.
    """
    problem, device = find_problem(setup), torch.device(setup.device)
    pose(problem)
    blank = replace(blank_row(problem), clock=setup.clock)
    rows: dict[str, Row] = {}
    standings: dict[str, Standing] = {}
    takes: dict[str, Take] = {}
    with ExitStack() as stack:
        guests = {name: contestant(setup, file) for name, file in candidates.items()}
        for guest in guests.values():
            stack.callback(guest.close)
        stack.enter_context(libraries(problem.plan.arithmetic))
        say(f"{OURS} and its peers")
        for row, take in _residents(problem, device, blank, setup, kinds):
            rows[row.contestant] = row
            if take is not None:
                takes[row.contestant] = take
        for name, guest in guests.items():
            say(name)
            row, standing = replace(blank, contestant=name), Standing(name, candidates[name])
            try:
                proof: Proof = ask(guest, "prove", limit)
                ask(guest, "bind", limit)
            except (Disqualified, Refused) as error:
                guest.close()
                rows[name], standings[name] = _out(row, standing, error)
            else:
                rows[name] = replace(row, **asdict(proof.match), note=proof.note)
                standings[name] = replace(standing, config=proof.config, factor=proof.factor)
                takes[name] = _turn(name, guest, limit, rows, standings)
        say(f"timing {len(takes)} contestants")
        times = timing.take_turns(takes, setup.clock, ROUNDS[device.type], seconds, setup.seed)
    for name, taken in times.items():
        if name not in standings or standings[name].outcome == "raced":
            rows[name] = rows[name].timed(taken)
    return League(setup, tuple(rows.values()), tuple(standings.values()))


# --- who takes part --------------------------------------------------------------------------


def _out(row: Row, standing: Standing, error: Exception) -> tuple[Row, Standing]:
    """A candidate's row and standing once it is out of the race."""
    outcome: Outcome = "refused" if isinstance(error, Refused) else "disqualified"
    said = str(error)
    return replace(row, note=said), replace(standing, outcome=outcome, reason=said)


def _turn(
    name: str,
    guest: Contestant,
    limit: float,
    rows: dict[str, Row],
    standings: dict[str, Standing],
) -> Take:
    """A candidate's turn; once it fell out, NaN."""

    def take() -> float:
        if standings[name].outcome == "raced":
            try:
                return float(ask(guest, "take", limit))
            except (Disqualified, Refused) as error:
                rows[name], standings[name] = _out(rows[name], standings[name], error)
        return math.nan

    return take


def _residents(
    problem: Problem,
    device: torch.device,
    blank: Row,
    setup: Setup,
    kinds: Sequence[str] | None,
) -> Iterator[tuple[Row, Take | None]]:
    """The engine's kernel and the peers, which are trusted to run in this process."""
    given, compare = copies(problem, setup)
    for one in contestants(problem, device, kinds):
        admitted = admit(one, given, blank, compare, device)
        row, take = admitted.row, None
        try:
            if admitted.runs:
                take = after_a_change(timing.sampler(admitted.runs, setup.clock, device), device)
        except Exception as error:  # of a library's: the others go on
            row = replace(row, note=survived(row.contestant, error, device))
        yield row, take


# --- the verb --------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    """Race candidates; 1 if none was raced or one was disqualified."""
    device = resolve(options.device)
    gpu = device.type == "cuda"
    dtype, _ = arithmetic(options.dtype, device, "triton")
    usual: Clock = "cold" if gpu else "host"
    clock: Clock = options.clock or usual
    one_of(f"--clock on a {device.type}", clock, CLOCKS[device.type])
    batch = (256 if gpu else 1) if options.batch is None else options.batch
    at_least_one("--batch", batch)
    for name in ("timeout", "seconds"):
        if (value := getattr(options, name)) <= 0:
            raise CandidateError(f"--{name}: wanted more than 0 seconds, got {value:g}")
    if not gpu and (problem := interpreter_problem()):
        raise EngineError(problem)
    files = [*options.candidate, *(shipped() if options.all_shipped else ())]
    setup = Setup(options.model, options.layer, batch, dtype, str(device), options.seed, clock)
    kinds = GPU_PEERS if options.peers is None and gpu else options.peers
    league = race(setup, _named(files), options.timeout, options.seconds, kinds, _progress)
    print(json.dumps(league.to_dict(), indent=2) if options.json else league)
    return 0 if league.passed else 1


def _progress(line: str) -> None:
    print(f"{line} ...", file=sys.stderr, flush=True)


def _named(files: Sequence[str]) -> dict[str, str]:
    """Each candidate's file by a short name: the file's, or all of the path where two share it.

    Raises CandidateError for a file that is none, and where there is none at all.
    """
    if not files:
        raise CandidateError(
            "race: wanted --candidate FILE or --all-shipped, got neither; these ship: "
            + ", ".join(shipped())
        )
    paths = list(dict.fromkeys(map(locate, files)))
    stems = [path.stem for path in paths]
    names = [str(path) if stems.count(path.stem) > 1 else path.stem for path in paths]
    return dict(zip(map(printable, names), map(str, paths), strict=True))
