"""The table of a race: who was raced and how fast, who was not and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from .. import units
from ..env import environment
from ..records import OURS, Results, Row, best_peer
from .contestant import Entry

Outcome = Literal["raced", "refused", "disqualified"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one candidate; `factor` is its own on the bound of an ordinary sum."""

    candidate: str
    file: str
    outcome: Outcome
    reason: str = ""
    config: Mapping[str, Any] | None = None
    factor: float | None = None


@dataclass(frozen=True, slots=True)
class League:
    """A race that was run: a row for every contestant, a verdict for every candidate."""

    entry: Entry
    rows: tuple[Row, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def passed(self) -> bool:
        """Whether a candidate was raced, and none was disqualified."""
        outcomes = [verdict.outcome for verdict in self.verdicts]
        return "raced" in outcomes and "disqualified" not in outcomes

    def to_dict(self) -> dict[str, Any]:
        """A results file of `records.py`, with the verdicts beside the rows."""
        return {
            **Results(environment(torch.device(self.entry.device)), {}, self.rows).to_dict(),
            "seed": self.entry.seed,
            "verdicts": [asdict(verdict) for verdict in self.verdicts],
            "passed": self.passed,
        }

    def __str__(self) -> str:
        entry = self.entry
        lines = [
            f"{entry.layer} of {entry.model}, batch {entry.batch}, {entry.dtype}, on "
            f"{entry.device}, clock {entry.clock}"
        ]
        if torch.device(entry.device).type == "cpu":
            lines.append("Triton's interpreter: these times say nothing of a GPU's")
        verdicts = {verdict.candidate: verdict for verdict in self.verdicts}
        width = max(len(row.contestant) for row in self.rows)
        lines.append(
            f"{'':>3} {'':<{width}} {'max error':>9} {'RMS':>7} {'bound':>7} {'median':>8} "
            f"{'p20':>8} {'p80':>8} {'x ours':>7}"
        )
        timed = [row for row in self.rows if row.median_us is not None]
        (ours,) = (row for row in self.rows if row.contestant == OURS)
        peer = best_peer(ours, [row for row in self.rows if row.contestant not in verdicts])
        for rank, row in enumerate(sorted(timed, key=lambda row: row.median_us or 0.0), 1):
            notes = [*_marks(row, verdicts.get(row.contestant), row is peer), row.note]
            lines.append(
                f"{rank:>3} {row.contestant:<{width}} {units.power(row.max_error):>9} "
                f"{units.power(row.rms_error):>7} {units.power(row.tolerance):>7} "
                f"{units.time(row.median_us):>8} {units.time(row.p20_us):>8} "
                f"{units.time(row.p80_us):>8} {units.times(_ratio(ours, row)):>7}  "
                f"{'; '.join(filter(None, notes))}".rstrip()
            )
        for row in self.rows:
            if row.median_us is None:
                verdict = verdicts.get(row.contestant)
                said = verdict.outcome if verdict else "not timed"
                lines.append(f"{'-':>3} {row.contestant:<{width}} {said}: {row.note}")
        return "\n".join(lines)


def _ratio(ours: Row, row: Row) -> float | None:
    """How many times as fast as the engine's own kernel."""
    if ours.median_us is None or row.median_us is None:
        return None
    return ours.median_us / row.median_us


def _marks(row: Row, verdict: Verdict | None, best: bool) -> Sequence[str]:
    """What a reader must know to compare this row with the others."""
    marks = ["best peer"] if best else []
    if row.straw_man:
        marks.append("straw man")
    if verdict is not None and verdict.factor not in (None, 1.0):
        marks.append(f"bound x{verdict.factor:g}")
    return marks
