"""`bench tune`: search the configurations of a network's layers, and keep the winners.

The search itself is in `tuner.py`, what is tried in `space.py`, in which order in `search.py`, how
long in `budget.py`. Here stands what a user says and sees.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from ...engine import NetworkError
from ...engine.devices.planner import Planner
from ...engine.load import arithmetic, find, resolve
from ...kernels import tuning
from ..choices import CACHE
from ..env import environment
from ..records import RecordError
from . import budget, simulate
from .cache import Cache, Trial
from .outcome import Outcome, short, table
from .search import STRATEGIES
from .space import SpaceError
from .tuner import Tuner, tune

# --- the verb --------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    """Search, or replay a search; 1 if a step got no configuration, 130 if interrupted."""
    try:
        return _simulate(options) if options.simulate else _tune(options)
    except KeyboardInterrupt:
        where = options.cache or ("nowhere" if options.simulate else CACHE)
        print(f"interrupted; trials are kept in {where}", file=sys.stderr)
        return 130


def _tune(options: argparse.Namespace) -> int:
    if bool(options.layer) == options.all:
        raise NetworkError("tune: wanted layers or --all; conv4 is one")
    device = resolve(options.device)
    dtype, meaning = arithmetic(options.dtype, device, "triton")
    network, _ = find(options.model)
    outcomes: list[Outcome] = []
    with Tuner(device, options.clock, options.jobs, options.timeout) as tuner:
        # Without the table: a search starts from the defaults.
        planner = Planner(network, meaning, tuner.arch)
        every = budget.searches(planner, dtype, options.batch, options.layer or None)
        cache = Cache(options.cache or CACHE)
        path = _table_path(options, tuner)
        known = set()
        if options.all and not options.again:
            known = {(row.problem, row.batch) for row in budget.rows(path)}
        skipped = [search for search in every if search.known_by in known]
        work = [search for search in every if search.known_by not in known]
        end = math.inf if options.budget is None else time.perf_counter() + options.budget
        for turn, search in enumerate(work):
            if (left := end - time.perf_counter()) <= 0:
                break
            least = budget.LEAST[device.type]
            outcomes.append(
                tune(
                    search.problem,
                    tuner,
                    cache,
                    step=search.step.name,
                    strategy=options.strategy or "local",
                    seed=options.seed,
                    seconds=budget.share(work[turn:], left, least) if options.budget else None,
                    limit=options.limit,
                    values=_values(options.set),
                    resume=options.resume,
                    told=_progress(search),
                    hints=budget.hints(search, budget.rows(path)),
                )
            )
            if path and (row := outcomes[-1].row):
                tuning.save(path, tuner.name, [row])
    missed = work[len(outcomes) :]
    if options.json:
        found = {
            "environment": environment(device),
            "cache": str(cache.path),
            "table": None if path is None else str(path),
            "searches": [outcome.to_dict() for outcome in outcomes],
            "not_reached": [str(search) for search in missed],
            "skipped": [str(search) for search in skipped],
        }
        print(json.dumps(found, indent=2))
    else:
        print(table(outcomes))
        for search in missed:
            print(f"{search}: not reached, the budget was spent")
        if skipped:
            print(f"{len(skipped)} have a row in the table already; --again searches them too")
        print(f"trials: {cache.path}" + (f"   winners: {path}" if path else ""))
    return 0 if all(outcome.best for outcome in outcomes) else 1


def _table_path(options: argparse.Namespace, tuner: Tuner) -> Path | None:
    wanted = options.write
    if wanted is None:
        wanted = options.table is not None or tuner.device.type == "cuda"
    if not wanted:
        return None
    path: Path = options.table or tuning.path_of(tuner.name)
    return path


def _values(given: Sequence[str]) -> dict[str, list[str]]:
    found = {}
    for text in given:
        name, equals, values = text.partition("=")
        if not (name and equals and values):
            raise SpaceError(f"--set: wanted NAME=VALUE,VALUE, got {text!r}")
        found[name] = values.split(",")
    return found


def _progress(search: budget.Search) -> Callable[[Trial], None]:
    """One line that is written over on a terminal; elsewhere one for each new best."""
    where = f"{search.problem.network.name} {search} {search.problem.dtype}"
    counts: Counter[str] = Counter()
    fastest = float("inf")

    def told(trial: Trial) -> None:
        nonlocal fastest
        counts[trial.status] += 1
        better = trial.time < fastest
        fastest = min(fastest, trial.time)
        tally = ", ".join(f"{count} {status}" for status, count in counts.items())
        line = f"{where}: {tally}; best {fastest:.2f} us"
        if sys.stderr.isatty():
            print(f"\r{line}\x1b[K", end="", file=sys.stderr, flush=True)
        elif better:
            print(f"{line}: {short(trial.config)}", file=sys.stderr)

    return told


def _simulate(options: argparse.Namespace) -> int:
    strategies = [options.strategy] if options.strategy else list(STRATEGIES)
    if not options.simulate.exists():
        raise RecordError(f"{options.simulate}: No such file or directory")
    stored = simulate.by_subject(Cache(options.simulate), options.layer)
    if options.cache and (len(strategies) > 1 or len(stored) > 1):
        raise SpaceError("--simulate with --cache: wanted one --strategy and one search")
    repeats = 1 if options.cache else options.repeats
    found = []
    for subject, trials in stored.items():
        replays = [
            simulate.replay(trials, name, seed, Cache(options.cache), options.limit)
            for name in strategies
            for seed in range(options.seed, options.seed + (1 if name == "exhaustive" else repeats))
        ]
        found.append(simulate.Simulation(subject, tuple(trials), tuple(replays)))
    if options.json:
        print(json.dumps([one.to_dict() for one in found], indent=2))
    else:
        print("\n".join(map(str, found)))
    complete = all(replay.to_best for one in found for replay in one.replays)
    return 0 if complete or options.limit else 1
