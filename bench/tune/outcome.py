"""What a search comes to: its trials, the default, the best, and why the others are not."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from ...engine.table import Columns, columns
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
    lines = columns(outcomes, COLUMNS)
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


def _count(status: str, outcome: Outcome) -> str:
    return str(sum(trial.status == status for trial in outcome.trials))


def _us(trial: Trial | None) -> str:
    return "-" if trial is None or trial.median_us is None else f"{trial.median_us:.2f}"


def _best(outcome: Outcome) -> str:
    return "nothing was right" if outcome.best is None else short(outcome.best.config)


COLUMNS: Columns[Outcome] = (
    ("layer", -8, lambda outcome: outcome.subject.layer),
    ("batch", 5, lambda outcome: str(outcome.subject.batch)),
    ("space", 6, lambda outcome: str(outcome.size)),
    ("tried", 6, lambda outcome: str(len(outcome.trials))),
    *((status, 7, partial(_count, status)) for status in STATUSES),
    ("default us", 11, lambda outcome: _us(outcome.default)),
    ("best us", 10, lambda outcome: _us(outcome.best)),
    ("times", 6, lambda outcome: "-" if outcome.ratio is None else f"{outcome.ratio:.2f}"),
    (" best", 0, lambda outcome: f" {_best(outcome)}"),
)
