"""A stored search replayed: how soon each strategy would have found what is known to be best.

The stored trials are the whole space, and their times the truth; a strategy asks for them as it
would on the device, and what each cost there is added up. No GPU is touched, so strategies can be
compared anywhere and the whole path of a search is tested where there is none.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from ...engine.table import Columns, columns
from ..records import RecordError
from .cache import Cache, Subject, Trial
from .search import STRATEGIES, follow
from .space import Config, key, listed

NEAR = 1.05  # times the best: as good as found
SEEDS = 20


@dataclass(frozen=True, slots=True)
class Replay:
    """One strategy's way through a stored search; None where it did not get as far."""

    strategy: str
    seed: int
    tried: int
    to_best: int | None  # trials until the known best, it included
    to_near: int | None  # until one within 5 % of it
    seconds_to_best: float | None  # on the device, compiling included
    seconds: float | None  # of all that were tried; None if the search did not say


def run(options: argparse.Namespace) -> int:
    """Replay what `--simulate` names; 1 if a replay missed the best."""
    strategies = [options.strategy] if options.strategy else list(STRATEGIES)
    if not options.simulate.exists():
        raise RecordError(f"{options.simulate}: No such file or directory")
    stored = by_subject(Cache(options.simulate), options.layer)
    facts, lines, complete = [], [], True
    for subject, trials in stored.items():
        replays = {
            name: [
                replay(trials, name, options.seed + turn)
                for turn in range(1 if name == "exhaustive" else SEEDS)
            ]
            for name in strategies
        }
        each = [one for several in replays.values() for one in several]
        complete = complete and all(one.to_best for one in each)
        facts.append(
            {
                **asdict(subject),
                "configurations": len(trials),
                "best": best(trials).to_dict(),
                "replays": [asdict(one) for one in each],
            }
        )
        right = sum(trial.status == "ok" for trial in trials)
        title = (
            f"{subject}: {len(trials)} configurations, {right} of them right, "
            f"best {best(trials).time:.1f} us"
        )
        lines.append("\n  ".join([title, *columns(replays.items(), COLUMNS)]))
    print(json.dumps(facts, indent=2) if options.json else "\n".join(lines))
    return 0 if complete else 1


def best(trials: Iterable[Trial]) -> Trial:
    """The fastest right one. Raises RecordError if none is."""
    right = [trial for trial in trials if trial.status == "ok"]
    if not right:
        raise RecordError("the stored search has no configuration that was right")
    return min(right, key=lambda trial: trial.time)


def by_subject(cache: Cache, layers: Sequence[str] = ()) -> dict[Subject, list[Trial]]:
    """The searches in a cache, of these layers or of all.

    Raises RecordError if there is none, listing the layers there are.
    """
    searches: dict[Subject, list[Trial]] = {}
    for trial in cache.trials:
        if not layers or trial.subject.layer in layers:
            searches.setdefault(trial.subject, []).append(trial)
    if not searches:
        there = ", ".join(sorted({trial.subject.layer for trial in cache.trials})) or "nothing"
        wanted = " or ".join(layers) or "a search"
        raise RecordError(f"{cache.path}: wanted {wanted}, got {there}")
    return searches


def replay(trials: Sequence[Trial], strategy: str, seed: int = 0) -> Replay:
    """Let a strategy search among `trials`, all of one subject, from the first of them."""
    stored = {key(trial.config): trial for trial in trials}
    goal = best(trials).time
    tried: list[Trial] = []

    def evaluate(configs: Sequence[Config]) -> list[float]:
        asked = [stored[key(config)] for config in configs]
        tried.extend(asked)
        return [trial.time for trial in asked]

    space = listed(trial.config for trial in trials)
    follow(STRATEGIES[strategy](space, trials[0].config, seed), evaluate)
    to_best = _first(tried, goal)
    return Replay(
        strategy,
        seed,
        len(tried),
        to_best,
        _first(tried, goal * NEAR),
        None if to_best is None else _seconds(tried[:to_best]),
        _seconds(tried),
    )


def _first(tried: Sequence[Trial], time: float) -> int | None:
    """How many trials it took until one was as fast."""
    return next((count for count, trial in enumerate(tried, 1) if trial.time <= time), None)


def _seconds(trials: Sequence[Trial]) -> float | None:
    taken = [trial.seconds for trial in trials if trial.seconds is not None]
    return round(sum(taken), 3) if len(taken) == len(trials) else None


def _spread(values: Sequence[float | None]) -> str:
    """Median and extremes, of whole numbers without their fractions."""
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return f"{len(known)} of {len(values)} found" if len(values) > 1 else "-"
    middle, low, high = (f"{v:.0f}" for v in (statistics.median(known), min(known), max(known)))
    return middle if low == high else f"{middle} ({low} to {high})"


COLUMNS: Columns[tuple[str, list[Replay]]] = (
    ("strategy", -12, lambda item: item[0]),
    ("replays", 7, lambda item: str(len(item[1]))),
    ("tries to the best", 20, lambda item: _spread([each.to_best for each in item[1]])),
    ("to within 5 %", 16, lambda item: _spread([each.to_near for each in item[1]])),
    ("seconds to the best", 20, lambda item: _spread([each.seconds_to_best for each in item[1]])),
)
