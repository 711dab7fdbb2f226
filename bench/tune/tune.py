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
from functools import partial

from ...engine import NetworkError
from ...engine.devices.planner import Planner
from ...engine.load import arithmetic, find, resolve
from ...engine.table import Columns, columns
from ...kernels import tuning
from ..choices import CACHE
from ..env import environment
from ..measure.fill import assumed
from ..measure.verb import tell
from . import budget, simulate
from .cache import STATUSES, Cache, Trial
from .short import short_list
from .space import Config, SpaceError
from .tuner import Outcome, Tuner, reasons, tune

# --- the verb --------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    """Search, or replay a search; 1 if a step got no configuration, 130 if interrupted."""
    try:
        return simulate.run(options) if options.simulate else _tune(options)
    except KeyboardInterrupt:
        kept = "" if options.simulate else f"; trials are kept in {options.cache or CACHE}"
        print(f"interrupted{kept}", file=sys.stderr)
        return 130


def _tune(options: argparse.Namespace) -> int:
    if bool(options.layer) == options.all:
        raise NetworkError("tune: wanted layers or --all; conv4 is one")
    device = resolve(options.device)
    if options.short and device.type == "cpu":
        raise SpaceError("--short: wanted a GPU, for which kernels list configurations, got a CPU")
    dtype, meaning = arithmetic(options.dtype, device, "triton")
    network, _ = find(options.model)
    outcomes: list[Outcome] = []
    with Tuner(device, options.jobs, options.timeout) as tuner:
        # Without the table: a search starts from the defaults.
        planner = Planner(network, meaning, tuner.arch)
        every = budget.searches(planner, dtype, options.batch, options.layer or None)
        cache = Cache(options.cache or CACHE)
        path = options.table
        if path is None and device.type == "cuda":
            path = tuning.path_of(tuner.name)
        holding, refused = budget.rows(path, every)
        for line in refused:
            tell(line)
        known = set()
        if options.all and not options.again:
            known = {(row.problem, row.batch) for row in holding}
        skipped = [search for search in every if search.known_by in known]
        work = [search for search in every if search.known_by not in known]
        lists = {}
        if options.short:
            chip = assumed(tuner.arch, tuner.name, options.fill)
            listed = partial(short_list, arithmetic=meaning, arch=tuner.arch, chip=chip)
            lists = {search.known_by: listed(search.step) for search in work}
            work = [search for search in work if lists[search.known_by]]
            tell(f"{len(lists) - len(work)} steps have no short list and keep what they have")
        end = math.inf if options.budget is None else time.perf_counter() + options.budget
        for turn, search in enumerate(work):
            if (left := end - time.perf_counter()) <= 0:
                break
            least = budget.LEAST[device.type]
            outcomes.append(
                tune(
                    *(search, tuner, cache),
                    strategy=options.strategy or "local",
                    seed=options.seed,
                    seconds=budget.share(work[turn:], left, least) if options.budget else None,
                    limit=options.limit,
                    told=_progress(search),
                    hints=[] if lists else budget.hints(search, budget.rows(path, every)[0]),
                    only=lists.get(search.known_by, ()),
                )
            )
            if path and (row := outcomes[-1].row):
                tuning.save(path, tuner.name, [row])
    missed = work[len(outcomes) :]
    if options.json:
        facts = {
            "environment": environment(device),
            "cache": str(cache.path),
            "table": None if path is None else str(path),
            "searches": [outcome.to_dict() for outcome in outcomes],
            "not_reached": [str(search) for search in missed],
            "skipped": [str(search) for search in skipped],
            "refused": refused,
        }
        print(json.dumps(facts, indent=2))
    else:
        print(table(outcomes))
        for search in missed:
            print(f"{search}: not reached, the budget was spent")
        if skipped:
            print(f"{len(skipped)} have a row in the table already; --again searches them too")
        print(f"trials: {cache.path}" + (f"   winners: {path}" if path else ""))
    return 0 if all(outcome.best for outcome in outcomes) else 1


def _progress(search: budget.Search) -> Callable[[Trial], None]:
    """One line that is written over on a terminal; elsewhere one for each new best."""
    where = f"{search.problem.network.name} {search} {search.problem.dtype}"
    counts: Counter[str] = Counter()
    fastest = float("inf")

    def hear(trial: Trial) -> None:
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

    return hear


def table(outcomes: Sequence[Outcome]) -> str:
    """Each search in a line: what was tried, how it ended, default and best; then the reasons."""
    lines = columns(outcomes, COLUMNS)
    for outcome in outcomes:
        for status, reason, count in reasons(outcome.trials):
            lines.append(f"{outcome.search}: {count} {status}: {reason}")
        lines += [outcome.strangers] * bool(outcome.strangers)
    return "\n".join(lines)


def short(config: Config) -> str:
    """A configuration in one line: tiles first, then what is chosen."""
    blocks = [str(size) for name, size in config.items() if name.startswith("BLOCK") and size]
    rest = [
        value if isinstance(value, str) else name if value is True else f"{name}={value}"
        for name, value in config.items()
        if not name.startswith("BLOCK") and value is not False
    ]
    return " ".join(["x".join(blocks), *rest])


def _count(status: str, outcome: Outcome) -> str:
    return str(sum(trial.status == status for trial in outcome.trials))


def _us(trial: Trial | None) -> str:
    return "-" if trial is None or trial.median_us is None else f"{trial.median_us:.2f}"


def _best(outcome: Outcome) -> str:
    if outcome.best is None:
        return "nothing was right"
    stays = "the default, " if outcome.best.config == outcome.default.config else ""
    return stays + short(outcome.best.config)


COLUMNS: Columns[Outcome] = (
    ("layer", -8, lambda outcome: outcome.search.step.name),
    ("batch", 5, lambda outcome: str(outcome.search.problem.batch)),
    ("space", 6, lambda outcome: str(outcome.size)),
    ("tried", 6, lambda outcome: str(len(outcome.trials))),
    *((status, 7, partial(_count, status)) for status in STATUSES),
    ("default us", 11, lambda outcome: _us(outcome.default)),
    ("best us", 10, lambda outcome: _us(outcome.best)),
    ("times", 6, lambda outcome: "-" if outcome.ratio is None else f"{outcome.ratio:.2f}"),
    (" best", 0, lambda outcome: f" {_best(outcome)}"),
)
