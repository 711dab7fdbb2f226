"""What a search comes to: its trials, the default, the best, and why the others are not."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ...kernels import tuning
from .cache import STATUSES, Subject, Trial
from .space import Config


@dataclass(frozen=True, slots=True)
class Outcome:
    """A search, over or cut short. The times of `default` and `best` are from the final."""

    subject: Subject
    op: str  # the launcher's name, as tables of tuned configurations have it
    shape: Any  # the kernel's, a dataclass
    trials: tuple[Trial, ...]  # in the order of the search, those from the cache included
    fresh: int  # how many were not in the cache
    size: int  # configurations in the space
    default: Trial  # what the engine would take without this search
    best: Trial | None  # None if nothing was right

    @property
    def ratio(self) -> float | None:
        """How many times as fast as the default the best is."""
        if self.best is None or self.best.median_us is None or self.default.median_us is None:
            return None
        return self.default.median_us / self.best.median_us

    @property
    def row(self) -> tuning.TunedRow | None:
        """The winner, for the table that the engine reads."""
        if self.best is None or self.best.median_us is None:
            return None
        return tuning.TunedRow(
            op=self.op,
            shape=tuning.without_batch(self.shape),
            dtype=self.subject.dtype,
            batch=self.subject.batch,
            config=self.best.config,
            median_us=round(self.best.median_us, 3),
            triton=self.subject.triton,
            date=self.best.date,
            source=self.subject.source,
        )

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints: how the trials ended, the default and the best."""
        return {
            **asdict(self.subject),
            "space": self.size,
            "tried": len(self.trials),
            "new": self.fresh,
            "statuses": dict(Counter(trial.status for trial in self.trials)),
            "reasons": [
                {"status": status, "reason": reason, "count": count}
                for status, reason, count in reasons(self.trials)
            ],
            "default": self.default.to_dict(),
            "best": self.best.to_dict() if self.best else None,
            "ratio": self.ratio,
        }


def table(outcomes: Sequence[Outcome]) -> str:
    """Each search in a line: what was tried, how it ended, default and best; then the reasons."""
    lines = [
        f"{'layer':<8} {'batch':>5} {'space':>6} {'tried':>6} "
        + " ".join(f"{status:>7}" for status in STATUSES)
        + f" {'default us':>11} {'best us':>10} {'times':>6}  best"
    ]
    for outcome in outcomes:
        counts = Counter(trial.status for trial in outcome.trials)
        best = outcome.best
        lines.append(
            f"{outcome.subject.layer:<8} {outcome.subject.batch:>5} {outcome.size:>6} "
            f"{len(outcome.trials):>6} "
            + " ".join(f"{counts[status]:>7}" for status in STATUSES)
            + f" {_us(outcome.default.median_us):>11} {_us(best.median_us if best else None):>10} "
            f"{'-' if outcome.ratio is None else format(outcome.ratio, '.2f'):>6}  "
            + ("nothing was right" if best is None else short(best.config))
        )
    for outcome in outcomes:
        for status, reason, count in reasons(outcome.trials):
            where = f"{outcome.subject.layer} x{outcome.subject.batch}"
            lines.append(f"{where}: {count} {status}: {reason}")
    return "\n".join(lines)


def reasons(trials: Sequence[Trial]) -> list[tuple[str, str, int]]:
    """(status, reason, how many), most frequent first.

    Reasons that differ in numbers alone count as one, for which the first stands.
    """
    counts: Counter[tuple[str, str]] = Counter()
    example: dict[tuple[str, str], str] = {}
    for trial in trials:
        if trial.status != "ok":
            kind = trial.status, re.sub(r"[\d.,e+-]+", "#", trial.reason)
            counts[kind] += 1
            example.setdefault(kind, trial.reason)
    return [(kind[0], example[kind], count) for kind, count in counts.most_common()]


def short(config: Config) -> str:
    """A configuration in one line: tiles first, then what is chosen."""
    blocks = [str(size) for name, size in config.items() if name.startswith("BLOCK") and size]
    rest = [
        value if isinstance(value, str) else name if value is True else f"{name}={value}"
        for name, value in config.items()
        if not name.startswith("BLOCK") and value is not False
    ]
    return " ".join(["x".join(blocks), *rest])


def _us(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
