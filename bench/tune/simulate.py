"""A stored search replayed: how soon each strategy would have found what is known to be best.

The stored trials are the whole space, and their times the truth; a strategy asks for them as it
would on the device, and what each cost there is added up. No GPU is touched, so strategies can be
compared anywhere and the whole path of a search is tested where there is none.
"""

from __future__ import annotations

import argparse
import json
import random
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
    """One strategy's way through a stored search, which every strategy sees to its end."""

    strategy: str
    seed: int
    to_best: int  # trials until the known best, it included
    to_near: int  # until one within 5 % of it
    seconds_to_best: float | None  # on the device, compiling included; None if it did not say


def run(options: argparse.Namespace) -> int:
    """Replay what `--simulate` names, by one strategy or by each."""
    if not options.simulate.exists():
        raise RecordError(f"{options.simulate}: No such file or directory")
    facts, lines = [], []
    for subject, trials in by_subject(Cache(options.simulate), options.layer).items():
        fastest = best(trials)
        replays = [
            [
                replay(trials, name, options.seed + turn)
                for turn in range(1 if name == "exhaustive" else SEEDS)
            ]
            for name in ([options.strategy] if options.strategy else STRATEGIES)
        ]
        facts.append(
            {
                **asdict(subject),
                "configurations": len(trials),
                "best": fastest.to_dict(),
                "replays": [asdict(one) for several in replays for one in several],
            }
        )
        right = sum(trial.status == "ok" for trial in trials)
        title = (
            f"{subject}: {len(trials)} configurations, {right} of them right, "
            f"best {fastest.time:.1f} us"
        )
        lines.append("\n  ".join([title, *columns(replays, COLUMNS)]))
    print(json.dumps(facts, indent=2) if options.json else "\n".join(lines))
    return 0


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
    """Let a strategy search among `trials`, all of one subject.

    From the first of them, the default, or with a seed above 0 from any: where a model chose the
    default well, strategies differ little from there.
    """
    stored = {key(trial.config): trial for trial in trials}
    goal = best(trials).time
    tried: list[Trial] = []

    def evaluate(configs: Sequence[Config]) -> list[float]:
        asked = [stored[key(config)] for config in configs]
        tried.extend(asked)
        return [trial.time for trial in asked]

    def until(time: float) -> int:
        return next(count for count, trial in enumerate(tried, 1) if trial.time <= time)

    space = listed(trial.config for trial in trials)
    start = random.Random(seed).choice(trials) if seed else trials[0]
    follow(STRATEGIES[strategy](space, start.config, seed), evaluate)
    taken = [trial.seconds for trial in tried[: until(goal)] if trial.seconds is not None]
    known = len(taken) == until(goal)
    return Replay(
        *(strategy, seed, until(goal), until(goal * NEAR)),
        round(sum(taken), 3) if known else None,
    )


def _spread(values: Sequence[float | None]) -> str:
    """Median and extremes, in whole numbers."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    middle, low, high = (f"{v:.0f}" for v in (statistics.median(known), min(known), max(known)))
    return middle if low == high else f"{middle} ({low} to {high})"


COLUMNS: Columns[list[Replay]] = (
    ("strategy", -12, lambda several: several[0].strategy),
    ("replays", 7, lambda several: str(len(several))),
    ("tries to the best", 20, lambda several: _spread([one.to_best for one in several])),
    ("to within 5 %", 16, lambda several: _spread([one.to_near for one in several])),
    ("seconds to the best", 20, lambda several: _spread([o.seconds_to_best for o in several])),
)
