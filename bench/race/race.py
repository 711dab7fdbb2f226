"""Candidates against the engine's own kernel and the best peer, on one layer, in a league table.

Every candidate runs in a process of its own (`contestant.py`) and must first be proved right
(`proof.py`). The right ones are then timed in turns, one process at a time, in a fresh random order
each round, so that a drift of the machine meets all alike; each timed answer is compared, too. A
candidate that fails at any point is out, with its reason, and the race goes on; no question to it
lasts longer than the time limit.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import torch

from ...engine import table
from ...engine.load import EngineError, arithmetic, at_least_one, resolve
from ...errors import printable
from ...kernels.jit import interpreter_problem
from .. import units
from ..env import environment
from ..measure import timing
from ..measure.contest import admit, blank_row, inputs, survived
from ..measure.contestants import contestants
from ..measure.peers import libraries
from ..measure.roofline import measure_roofs
from ..records import OURS, Results, Row, best_peer
from .candidate import CandidateError, Declined, locate, pose
from .candidates import shipped
from .contestant import Contestant, Judge, TooSlow, Turn, ask, contestant
from .examiner import Proof, Setup, find_problem
from .proof import Disqualified
from .tiles import IMAGES, TILES

ROUNDS = {"cuda": 25, "cpu": 5}
GPU_PEERS = ("torch", "fused", "frontend")  # torch.compile wants minutes; `--peers` can ask for it

Outcome = Literal["raced", "declined", "too slow", "disqualified"]


@dataclass(frozen=True, slots=True)
class Standing:
    """What became of one candidate; `factor` is its own on the bound of an ordinary sum."""

    candidate: str
    file: str
    outcome: Outcome = "raced"
    reason: str = ""
    config: Mapping[str, Any] | None = None
    factor: float | None = None


@dataclass(frozen=True, slots=True)
class League:
    """A race that was run: a row for every contestant, a standing for every candidate."""

    setup: Setup
    rows: tuple[Row, ...]
    standings: tuple[Standing, ...]

    @property
    def passed(self) -> bool:
        """Whether a candidate was raced, and none was disqualified."""
        outcomes = [standing.outcome for standing in self.standings]
        return "raced" in outcomes and "disqualified" not in outcomes

    def to_dict(self) -> dict[str, Any]:
        """A results file of `records.py`, with the verdicts beside the rows."""
        return {
            **Results(environment(torch.device(self.setup.device)), {}, self.rows).to_dict(),
            "seed": self.setup.seed,
            "verdicts": [asdict(standing) for standing in self.standings],
            "passed": self.passed,
        }

    def __str__(self) -> str:
        setup = self.setup
        lines = [
            f"{setup.layer} of {setup.model}, batch {setup.batch}, {setup.dtype}, on "
            f"{setup.device}, clock {setup.clock}"
        ]
        if torch.device(setup.device).type == "cpu":
            lines.append(
                "Triton's interpreter: these times say nothing of a GPU's, and no roof is known"
            )
        standings = {standing.candidate: standing for standing in self.standings}
        timed = [row for row in self.rows if row.median_us is not None]
        timed.sort(key=lambda row: row.median_us or 0.0)
        (ours,) = (row for row in self.rows if row.contestant == OURS)
        peer = best_peer(ours, [row for row in self.rows if row.contestant not in standings])
        width = max(len(row.contestant) for row in self.rows)

        def times_ours(row: Row) -> float | None:
            if ours.median_us is None or row.median_us is None:
                return None
            return ours.median_us / row.median_us

        def notes(row: Row) -> str:
            """What a reader must know to compare this row with the others."""
            marks = ["best peer"] if row is peer else []
            if row.straw_man:
                marks.append("straw man")
            if (standing := standings.get(row.contestant)) and standing.factor not in (None, 1.0):
                marks.append(f"bound x{standing.factor:g}")
            return " " + "; ".join(filter(None, [*marks, row.note]))

        columns: table.Columns[Row] = (
            ("", 3, lambda row: str(1 + timed.index(row))),
            ("", -width, lambda row: row.contestant),
            ("max error", 9, lambda row: units.power(row.max_error)),
            ("RMS", 7, lambda row: units.power(row.rms_error)),
            ("bound", 7, lambda row: units.power(row.tolerance)),
            ("median", 8, lambda row: units.time(row.median_us)),
            ("p20", 8, lambda row: units.time(row.p20_us)),
            ("p80", 8, lambda row: units.time(row.p80_us)),
            ("x ours", 7, lambda row: units.times(times_ours(row))),
            ("", 0, notes),
        )
        lines += table.columns(timed, columns)
        for row in self.rows:
            if row.median_us is None:
                standing = standings.get(row.contestant)
                outcome = standing.outcome if standing else "not timed"
                lines.append(f"{'-':>3} {row.contestant:<{width}} {outcome}: {row.note}")
        return "\n".join(lines)


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
    roofs = measure_roofs(device, [setup.dtype]) if device.type == "cuda" else None
    blank = replace(blank_row(problem, roofs), clock=setup.clock)
    rows: dict[str, Row] = {}
    standings: dict[str, Standing] = {}
    samples: dict[str, Callable[[], float]] = {}  # of who is still in: microseconds of a run
    turns: dict[str, Turn] = {}  # of the candidates among them

    def drop(name: str, error: Exception) -> None:
        samples.pop(name, None)
        if name in standings:
            outcomes: dict[type, Outcome] = {Declined: "declined", TooSlow: "too slow"}
            outcome = outcomes.get(type(error), "disqualified")
            standings[name] = replace(standings[name], outcome=outcome, reason=str(error))
            rows[name] = replace(rows[name], note=str(error))
        else:
            rows[name] = replace(rows[name], note=survived(name, error, device))

    def take(name: str) -> float:
        """A contestant's time; once it fell out, NaN."""
        try:
            return samples[name]() if name in samples else math.nan
        except Exception as error:  # of a library's, too: the others go on
            drop(name, error)
            return math.nan

    with ExitStack() as stack:
        # A proof is not timed: on a CPU one runs beside another, on a GPU alone in its memory.
        pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)) if device.type == "cpu" else 1)
        stack.callback(pool.shutdown)
        guests: dict[str, Contestant] = {}
        for name, file in candidates.items():
            guests[name] = contestant(setup, file)
            stack.callback(guests[name].close)
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)  # of who is interrupted
        stack.enter_context(libraries(problem.plan.arithmetic))
        say(f"{OURS} and its peers")
        given, compare = inputs(problem, device, setup.seed)
        given = given[:1]  # the cache is overwritten before each turn
        # The engine's kernel and the peers are trusted to run in this process.
        for one in contestants(problem, device, kinds):
            admitted = admit(one, given, blank, compare, device)
            name, rows[admitted.row.contestant] = admitted.row.contestant, admitted.row
            try:
                if admitted.runs:
                    sample = timing.sampler(admitted.runs, setup.clock, device)
                    samples[name] = sample if device.type == "cpu" else partial(_second, sample)
            except Exception as error:
                drop(name, error)
        proofs: dict[str, Future[Proof]] = {
            name: pool.submit(ask, guest, limit, "prove", limit) for name, guest in guests.items()
        }
        for name, guest in guests.items():
            say(name)
            rows[name] = replace(blank, contestant=name)
            standings[name] = Standing(name, candidates[name])
            try:
                proof = proofs[name].result()
            except (Disqualified, Declined) as error:
                guest.close()
                drop(name, error)
            else:
                rows[name] = replace(rows[name], **asdict(proof.match), note=proof.note)
                standings[name] = replace(standings[name], config=proof.config, factor=proof.factor)
                judge = Judge(setup, problem, proof.factor)
                samples[name] = turns[name] = Turn(guest, limit, device.type == "cpu", judge)
        say(f"timing {len(samples)} contestants")
        takes = {name: partial(take, name) for name in samples}
        times = timing.take_turns(
            takes, setup.clock, ROUNDS[device.type], seconds, setup.seed, device
        )
        for name in tuple(samples):
            try:
                if name in turns:
                    turns[name].confirm(times[name].median, blank.roof_us)
                rows[name] = rows[name].timed(times[name])
            except (Disqualified, Declined) as error:
                drop(name, error)
    return League(setup, tuple(rows.values()), tuple(standings.values()))


def _second(sample: Callable[[], float]) -> float:
    """A time after another process's turn: on a GPU the first is lost."""
    sample()
    return sample()


# --- the verb --------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    """Race candidates; 1 if none was raced or one was disqualified."""
    device = resolve(options.device)
    gpu = device.type == "cuda"
    dtype, _ = arithmetic(options.dtype, device, "triton")
    model = options.model or ("alexnet" if gpu else TILES.name)
    usual = 256 if gpu else IMAGES if model == TILES.name else 1
    batch = usual if options.batch is None else options.batch
    at_least_one("--batch", batch)
    for name in ("timeout", "seconds"):
        if (value := getattr(options, name)) <= 0:
            raise CandidateError(f"--{name}: wanted more than 0 seconds, got {value:g}")
    if not gpu and (problem := interpreter_problem()):
        raise EngineError(problem)
    files = [*options.candidate, *(shipped() if options.all_shipped else ())]
    setup = Setup(model, options.layer, batch, dtype, str(device), options.seed)
    kinds = GPU_PEERS if options.peers is None and gpu else options.peers

    def say(line: str) -> None:
        print(f"{line} ...", file=sys.stderr, flush=True)

    league = race(setup, _named(files), options.timeout, options.seconds, kinds, say)
    print(json.dumps(league.to_dict(), indent=2) if options.json else league)
    return 0 if league.passed else 1


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
