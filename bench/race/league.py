"""The table of a race: who was raced and how fast, who was not and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from ...engine import table
from .. import units
from ..env import environment
from ..records import OURS, Results, Row, best_peer
from .contestant import Setup

Outcome = Literal["raced", "refused", "disqualified"]


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
            lines.append("Triton's interpreter: these times say nothing of a GPU's")
        standings = {standing.candidate: standing for standing in self.standings}
        timed = [row for row in self.rows if row.median_us is not None]
        timed.sort(key=lambda row: row.median_us or 0.0)
        (ours,) = (row for row in self.rows if row.contestant == OURS)
        peer = best_peer(ours, [row for row in self.rows if row.contestant not in standings])
        width = max(len(row.contestant) for row in self.rows)

        def notes(row: Row) -> str:
            marks = _marks(row, standings.get(row.contestant), row is peer)
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
            ("x ours", 7, lambda row: units.times(_ratio(ours, row))),
            ("", 0, notes),
        )
        lines += table.columns(timed, columns)
        for row in self.rows:
            if row.median_us is None:
                standing = standings.get(row.contestant)
                outcome = standing.outcome if standing else "not timed"
                lines.append(f"{'-':>3} {row.contestant:<{width}} {outcome}: {row.note}")
        return "\n".join(lines)


def _ratio(ours: Row, row: Row) -> float | None:
    """How many times as fast as the engine's own kernel."""
    if ours.median_us is None or row.median_us is None:
        return None
    return ours.median_us / row.median_us


def _marks(row: Row, standing: Standing | None, best: bool) -> Sequence[str]:
    """What a reader must know to compare this row with the others."""
    marks = ["best peer"] if best else []
    if row.straw_man:
        marks.append("straw man")
    if standing is not None and standing.factor not in (None, 1.0):
        marks.append(f"bound x{standing.factor:g}")
    return marks
