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
from dataclasses import replace
from functools import partial

import torch

from ...engine.load import EngineError, arithmetic, at_least_one, one_of, resolve
from ...errors import printable
from ...kernels.jit import interpreter_problem
from ..measure import timing
from ..measure.contest import admit, reason
from ..measure.peers import Peer, Prepared, libraries, peers
from ..measure.problem import Problem, Tensors, expected, match, ready
from ..measure.timing import CLOCKS, Clock
from ..records import OURS, Row
from .candidate import CandidateError, Refused, locate, pose
from .candidates import shipped
from .contestant import Entrant, Entry, after_a_change, copies, find_problem
from .league import League, Outcome, Verdict
from .proof import Disqualified

ROUNDS = {"cuda": 25, "cpu": 5}
GPU_PEERS = ("torch", "fused", "frontend")  # torch.compile wants minutes; `--peers` can ask for it

Take = Callable[[], float]  # one time, in microseconds a run


def race(
    entry: Entry,
    candidates: Mapping[str, str],
    limit: float,
    seconds: float,
    kinds: Sequence[str] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> League:
    """Race candidates (name to file) on the layer that `entry` names; its own `file` is not read.

    `limit` bounds each question to a candidate and `seconds` the timing of all, both in seconds;
    `kinds` are those of `peers`. Raises NetworkError for an unknown network or layer, EngineError
    for an unknown kind of peer, CandidateError for a layer that cannot be raced on.
    """
    problem, device = find_problem(entry), torch.device(entry.device)
    pose(problem)
    work = problem.work
    blank = Row(
        section="layers",
        problem=problem.name,
        network=problem.network.name,
        batch=problem.batch,
        dtype=entry.dtype,
        contestant="",
        clock=entry.clock,
        flops=work.flops,
        bytes=work.bytes,
    )
    rows: dict[str, Row] = {}
    verdicts: dict[str, Verdict] = {}
    takes: dict[str, Take] = {}
    fallen: dict[str, str] = {}
    with ExitStack() as stack:
        entrants = {name: Entrant(replace(entry, file=file)) for name, file in candidates.items()}
        for entrant in entrants.values():  # all are started by now: importing torch takes its time
            stack.callback(entrant.close)
        stack.enter_context(libraries(problem.plan.arithmetic))
        say(f"{OURS} and its peers")
        for row, take in _residents(problem, device, blank, entry.clock, entry.seed, kinds):
            rows[row.contestant] = row
            if take is not None:
                takes[row.contestant] = take
        for name, entrant in entrants.items():
            say(name)
            row = replace(blank, contestant=name)
            rows[name], verdicts[name] = _judged(entrant, row, limit)
            if verdicts[name].outcome == "raced":
                takes[name] = _turn(name, entrant, limit, fallen)
            else:
                entrant.close()
        say(f"timing {len(takes)} contestants")
        rounds = ROUNDS[device.type]
        times = timing.take_turns(takes, entry.clock, rounds, seconds, entry.seed)
    for name, taken in times.items():
        if name in fallen:
            rows[name] = replace(rows[name], note=fallen[name])
            verdicts[name] = replace(verdicts[name], outcome="disqualified", reason=fallen[name])
        else:
            rows[name] = rows[name].timed(taken)
    return League(entry, tuple(rows.values()), tuple(verdicts.values()))


# --- who takes part --------------------------------------------------------------------------


def _judged(entrant: Entrant, row: Row, limit: float) -> tuple[Row, Verdict]:
    """A candidate's row with its match, or with the reason why it may not be timed."""
    name, file = row.contestant, entrant.entry.file
    try:
        entrant.start()
        found = entrant.prove(limit)
        entrant.bind(limit)
    except (Disqualified, Refused) as error:
        outcome: Outcome = "refused" if isinstance(error, Refused) else "disqualified"
        return replace(row, note=str(error)), Verdict(name, file, outcome, str(error))
    config, factor = found.pop("config"), found.pop("factor")
    return replace(row, **found), Verdict(name, file, "raced", "", config, factor)


def _turn(name: str, entrant: Entrant, limit: float, fallen: dict[str, str]) -> Take:
    """A candidate's turn: once it fell out, NaN, and the reason is in `fallen`."""

    def take() -> float:
        if name in fallen:
            return math.nan
        try:
            return entrant.take(limit)
        except Disqualified as error:
            fallen[name] = str(error)
            return math.nan

    return take


def _residents(
    problem: Problem,
    device: torch.device,
    blank: Row,
    clock: Clock,
    seed: int,
    kinds: Sequence[str] | None,
) -> Iterator[tuple[Row, Take | None]]:
    """The engine's kernel and the peers, which are trusted to run in this process."""

    def engine(given: Tensors) -> Prepared:
        bound = ready(problem, given)
        return Prepared(bound, bound.output)

    given = copies(problem, device, clock, seed)
    wanted = expected(problem, given[0])
    compare = partial(match, problem, wanted=wanted)
    for one in [Peer(OURS, engine), *peers(problem, device, kinds)]:
        entry = admit(one, given, blank, compare, device)
        row, take = entry.row, None
        try:
            if entry.runs:
                take = after_a_change(timing.sampler(entry.runs, clock, device), device)
        except Exception as error:  # of a library's: the others go on
            row = replace(row, note=reason(error))
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
    entry = Entry("", options.model, options.layer, batch, dtype, str(device), options.seed, clock)
    kinds = GPU_PEERS if options.peers is None and gpu else options.peers
    found = race(entry, _named(files), options.timeout, options.seconds, kinds, _progress)
    print(json.dumps(found.to_dict(), indent=2) if options.json else found)
    return 0 if found.passed else 1


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
