"""`bench tune`: search the configurations of a network's layers, and keep the winners.

The search itself is in `tuner.py`, what is tried in `space.py`, in which order in `search.py`. Here
stands what a user says and sees.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ...engine import NetworkError
from ...engine.devices.planner import Planner
from ...engine.load import arithmetic, find, resolve
from ...errors import printable
from ...kernels import tuning
from ..choices import CACHE
from ..env import environment
from ..measure.problem import Problem, problems
from ..records import RecordError
from ..report import report
from . import simulate
from .cache import Cache, Trial
from .outcome import Outcome, short, table
from .search import STRATEGIES
from .space import SpaceError
from .tuner import Lab, tune


def targets(
    planner: Planner, dtype: str, batch: int, names: Sequence[str] | None = None
) -> list[tuple[Problem, str]]:
    """Steps to tune, each with the problem it is proved in; None: every step that has a kernel.

    The stem, "input", is proved in the problem of the first layer. Raises NetworkError, listing
    the steps there are, for a name that is none.
    """
    steps = planner(batch, image_dtype=planner.arithmetic.dtype).steps
    known = [step.name for step in steps if step.config is not None]
    wanted = known if names is None else names
    if unknown := [name for name in wanted if name not in known]:
        raise NetworkError(
            f"{planner.network.name} has no step {unknown[0]!r} to tune; it has {', '.join(known)}"
        )
    stem, first = steps[0].name, steps[1].name
    cut = problems(planner, dtype, batch, [first if name == stem else name for name in wanted])
    return list(zip(cut, wanted, strict=True))


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
    with Lab(device, options.clock, options.jobs, options.timeout) as lab:
        planner = Planner(network, meaning, lab.arch)
        names = None if options.all else options.layer
        work = [pair for batch in options.batch for pair in targets(planner, dtype, batch, names)]
        cache = Cache(options.cache or CACHE)
        path = _table_path(options, lab)
        for (problem, step), seconds in _shares(work, options.budget):
            outcomes.append(
                tune(
                    problem,
                    lab,
                    cache,
                    step=step,
                    strategy=options.strategy or "local",
                    seed=options.seed,
                    seconds=seconds,
                    limit=options.limit,
                    values=_values(options.set),
                    resume=options.resume,
                    told=_progress(problem, step),
                )
            )
            if path and (row := outcomes[-1].row):
                tuning.save(path, lab.name, [row])
    _plot(options, [trial for outcome in outcomes for trial in outcome.trials])
    if options.json:
        found = {
            "environment": environment(device),
            "cache": str(cache.path),
            "table": None if path is None else str(path),
            "searches": [outcome.to_dict() for outcome in outcomes],
            "not_reached": [f"{step} x{p.batch}" for p, step in work[len(outcomes) :]],
        }
        print(json.dumps(found, indent=2))
    else:
        print(table(outcomes))
        for problem, step in work[len(outcomes) :]:
            print(f"{step} x{problem.batch}: not reached, the budget was spent")
        print(f"trials: {cache.path}" + (f"   winners: {path}" if path else ""))
    return 0 if all(outcome.best for outcome in outcomes) else 1


def _shares(
    work: Sequence[tuple[Problem, str]], budget: float | None
) -> Iterator[tuple[tuple[Problem, str], float | None]]:
    """Each search with its seconds: an even share of what is left; none starts after that."""
    end = None if budget is None else time.perf_counter() + budget
    for index, pair in enumerate(work):
        if end is None:
            yield pair, None
        elif (left := end - time.perf_counter()) > 0:
            yield pair, left / (len(work) - index)


def _table_path(options: argparse.Namespace, lab: Lab) -> Path | None:
    wanted = options.write
    if wanted is None:
        wanted = options.table is not None or lab.device.type == "cuda"
    if not wanted:
        return None
    path: Path = options.table or tuning.path_of(lab.name)
    return path


def _values(given: Sequence[str]) -> dict[str, list[str]]:
    found = {}
    for text in given:
        name, equals, values = text.partition("=")
        if not (name and equals and values):
            raise SpaceError(f"--set: wanted NAME=VALUE,VALUE, got {text!r}")
        found[name] = values.split(",")
    return found


def _progress(problem: Problem, step: str) -> Callable[[Trial], None]:
    """One line that is written over on a terminal; elsewhere one for each new best."""
    where = f"{problem.network.name} {step} x{problem.batch} {problem.dtype}"
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


def _plot(options: argparse.Namespace, trials: Sequence[Trial]) -> None:
    if options.plot is None:
        return
    x, y = options.axes
    draw = report.search_svg if options.plot.suffix == ".svg" else report.search_page
    page = draw([trial.to_dict() for trial in trials], x, y)
    options.plot.parent.mkdir(parents=True, exist_ok=True)
    options.plot.write_text(page)
    print(printable(f"written: {options.plot}"), file=sys.stderr)


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
    _plot(options, [trial for one in found for trial in one.trials])
    if options.json:
        print(json.dumps([one.to_dict() for one in found], indent=2))
    else:
        print("\n".join(map(str, found)))
    complete = all(replay.to_best for one in found for replay in one.replays)
    return 0 if complete or options.limit else 1
