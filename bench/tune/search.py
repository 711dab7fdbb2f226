"""In which order configurations are tried: strategies that ask and are told.

A strategy is a generator. It yields configurations to try next and is sent their times in the same
order, infinite for those that failed; it knows nothing of how times come about, so a search on a
GPU and the replay of a stored one are the same search. None asks for a configuration twice, all
start with the configuration that the engine would take anyway, and each gets round to the whole
space if it is let.

With the same seed and the same times a strategy asks the same questions. A search that was
interrupted therefore goes on by starting over, with the answers it already has.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace

from .. import choices
from .space import Config, Space, key

Strategy = Generator[list[Config], list[float], None]
Evaluate = Callable[[Sequence[Config]], "list[float] | None"]


def exhaustive(space: Space, start: Config, seed: int = 0) -> Strategy:
    """Everything, in the order of the space."""
    yield [start]
    yield [config for config in space.configs() if config != start]


def random_order(space: Space, start: Config, seed: int = 0) -> Strategy:
    """Everything, in a random order."""
    return exhaustive(replace(space, listed=_shuffled(space, seed)), start)


def local(space: Space, start: Config, seed: int = 0) -> Strategy:
    """Hill climbing with restarts: step to the best neighbour until none is better, then elsewhere.

    From `start` first, then from random configurations that were not tried. Multi-start local
    search, one of the baselines in R. Schoonhoven, B. van Werkhoven and K. J. Batenburg,
    "Benchmarking optimization algorithms for auto-tuning GPU kernels", 2022.
    """
    times: dict[str, float] = {}
    for origin in [start, *_shuffled(space, seed)]:
        if key(origin) in times:
            continue
        here = origin
        (times[key(here)],) = yield [here]
        while True:
            around = space.neighbours(here)
            if fresh := [config for config in around if key(config) not in times]:
                told = yield fresh
                times |= {key(config): time for config, time in zip(fresh, told, strict=True)}
            best = min([here, *around], key=lambda config: times[key(config)])
            if times[key(best)] >= times[key(here)]:
                break
            here = best


def _shuffled(space: Space, seed: int) -> tuple[Config, ...]:
    configs = space.configs()
    return tuple(random.Random(seed).sample(configs, len(configs)))


STRATEGIES: dict[str, Callable[[Space, Config, int], Strategy]] = dict(
    zip(choices.STRATEGIES, (exhaustive, random_order, local), strict=True)
)


def follow(strategy: Strategy, evaluate: Evaluate) -> None:
    """Answer a strategy's questions until it has none, or until `evaluate` returns None."""
    asked = next(strategy, None)
    while asked is not None and (times := evaluate(asked)) is not None:
        try:
            asked = strategy.send(times)
        except StopIteration:
            return
    strategy.close()
