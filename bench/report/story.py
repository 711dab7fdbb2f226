"""What results say: the rows that stand for them, headline, tables, and warnings in words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .. import units
from ..measure.cautions import cautions
from ..ratio import Ratio, ratio
from ..records import OURS, Results, Row, best_peer, races

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLOCKS = {"graph": "graph replay", "cold": "cold L2", "host": "host clock"}
PREFERRED = ("fp16", "bf16", "tf32", "fp32", *CLOCKS)
"""Which view stands for the whole: ours, then the first of these dtypes and clocks."""

MOST = 3  # warnings of a kind that are told in full
NO_GPU = (
    "These results name no GPU: their times are those of Triton's interpreter on a CPU and say "
    "nothing of a GPU."
)
NO_TENSORRT = (
    "TensorRT was not raced: it builds engines of its own from a network's file, in a package that "
    "torch does not bring and no machine of ours has had."
)


@dataclass(frozen=True, slots=True)
class Exhibit:
    """A table in words, for a page, README or a terminal; the first `words` columns are text.

    On a page it stands beside its figure, or is folded away.
    """

    caption: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    words: int = 1
    figure: Figure | None = None
    folded: bool = False


CELLS = ("ours", "best peer", "its time", "x best peer", "of roof")


@dataclass(frozen=True, slots=True)
class Duel:
    """Ours and the best peer of one race; None where none was right and timed."""

    row: Row  # one of the two
    ours: Row | None
    peer: Row | None

    @property
    def ratio(self) -> Ratio | None:
        """How many times as fast as the best peer ours is."""
        return ratio(self.ours, self.peer) if self.ours and self.peer else None

    def stronger(self, other: Duel) -> bool:
        """Whether it says less for ours, or more where the other says nothing."""
        if self.ratio and other.ratio:
            return self.ratio.value < other.ratio.value
        return bool(self.ratio)

    @property
    def cells(self) -> tuple[str, ...]:
        """What a table says of it, under CELLS."""
        ours, peer = self.ours, self.peer
        name = peer.contestant if peer else "-"
        times = [units.time(row.median_us if row else None) for row in (ours, peer)]
        roof = units.percent(ours.percent_of_roof if ours else None)
        return (times[0], name, times[1], str(self.ratio or "-"), roof)


@dataclass(frozen=True, slots=True)
class View:
    """Rows that may stand in one picture: of one section, subject, dtype and clock.

    The subject of layers is their network; a whole network's is its problem, since images as
    pixels and as floats are two races.
    """

    subject: str
    dtype: str
    clock: str
    rows: tuple[Row, ...]

    @property
    def name(self) -> str:
        """In words."""
        return f"{self.subject}, {self.dtype}, {CLOCKS.get(self.clock, self.clock)}"

    @property
    def right(self) -> list[Row]:
        """All that were found right and timed."""
        return [row for row in self.rows if row.right]

    @property
    def ours(self) -> list[Row]:
        """Our rows that were found right and timed, small batches first."""
        ours = [row for row in self.right if row.contestant == OURS]
        return sorted(ours, key=lambda row: row.batch)

    @property
    def batches(self) -> list[int]:
        """Batch sizes at which ours was timed, or where it never was, at which a peer was."""
        return sorted({row.batch for row in self.ours or self.right})

    def duels(self, batch: int | None = None) -> list[Duel]:
        """Ours against the best peer of one batch size or of all, where there was a time.

        Of several races of one measurement it is the one in which the peer is strongest.
        """
        duels: dict[tuple[object, ...], Duel] = {}
        for race in races(row for row in self.rows if batch in (None, row.batch)).values():
            ours = next((row for row in race if row.contestant == OURS and row.right), None)
            peer = best_peer(race[0], race)
            if (row := ours or peer) is None:
                continue
            duel, other = Duel(row, ours, peer), duels.get(row.measurement)
            if other is None or duel.stronger(other):
                duels[row.measurement] = duel
        return list(duels.values())


def views(results: Results, section: str) -> list[View]:
    """Every view of a section with a time, the one that stands for the whole first."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in results.rows:
        if row.section == section:
            subject = row.network if section == "layers" else row.problem
            groups.setdefault((subject, row.dtype, row.clock), []).append(row)
    subjects = [subject for subject, _, _ in groups]
    made = [View(*key, tuple(rows)) for key, rows in groups.items()]
    return sorted(
        (view for view in made if view.batches),
        key=lambda v: (not v.ours, subjects.index(v.subject), *map(_rank, (v.dtype, v.clock))),
    )


def _rank(name: str) -> int:
    return PREFERRED.index(name) if name in PREFERRED else len(PREFERRED)


def headline(results: Results) -> tuple[View, Row, Row] | None:
    """The whole network's view, our row of most images per second, and of the smallest batch."""
    for view in views(results, "model")[:1]:
        if view.ours:
            return view, max(view.ours, key=lambda r: r.images_per_second or 0.0), view.ours[0]
    return None


def layers_table(view: View, batch: int) -> Exhibit:
    """The layers at one batch size."""
    rows = [(duel.row.problem, *duel.cells) for duel in view.duels(batch)]
    return Exhibit(f"The layers at batch {batch} ({view.name})", ("layer", *CELLS), rows)


def tables(results: Results) -> list[Exhibit]:
    """The two that stand for the whole: the network by batch size, its layers at the largest."""
    made = []
    for view in views(results, "model")[:1]:
        rows = [
            (str(d.row.batch), *d.cells, units.whole(d.ours.images_per_second if d.ours else None))
            for batch in view.batches
            for d in view.duels(batch)
        ]
        head = ("batch", *CELLS, "images/s")
        made.append(Exhibit(f"The whole network ({view.name})", head, rows))
    layers = views(results, "layers")[:1]
    return [*made, *(layers_table(view, view.batches[-1]) for view in layers)]


# --- in words ---------------------------------------------------------------------------------


def gpu(results: Results) -> str | None:
    """The GPU's name, None where there was none."""
    return results.environment.get("gpu name")


def origin(results: Results) -> str:
    """Device, date and commit in one line."""
    facts = results.environment
    device = gpu(results) or f"no GPU ({facts.get('cpu') or 'CPU'}, Triton's interpreter)"
    date = (facts.get("date") or "no date")[:10]
    return f"{device}, {date}, commit {facts.get('commit') or 'unknown'}"


def figures(results: Results) -> list[tuple[str, str, str]]:
    """The verdict strip: (what, figure, remark) each; empty without a timed model row of ours."""
    top = headline(results)
    if top is None:
        return []
    view, fast, quick = top
    speed, roof = units.whole(fast.images_per_second), units.percent(fast.percent_of_roof)
    remark = f"batch {fast.batch}" + (f", {roof} of the roof" if fast.roof_us else "")
    made = [("images per second", speed, remark)]
    remark = f"p50; p80 {units.time(quick.p80_us)}"
    made.append((f"latency, batch {quick.batch}", units.time(quick.median_us), remark))
    for batch in dict.fromkeys((fast.batch, quick.batch)):
        for duel in view.duels(batch):
            if duel.peer and duel.ratio:
                remark = f"{duel.peer.contestant} takes {units.time(duel.peer.median_us)}"
                made.append((f"x best peer, batch {batch}", str(duel.ratio), remark))
    return made


def match_verdict(results: Results) -> tuple[bool | None, str]:
    """Whether all of ours are right, and how many were checked, in words; None without any."""
    ours = [row for row in results.rows if row.ours]
    wrong = [row for row in ours if not row.matched]
    if not ours:
        return None, "nothing of ours was checked"
    if not wrong:
        return True, f"all {len(ours)} of our rows match float64"
    names = ", ".join(dict.fromkeys(f"{row.problem} at batch {row.batch}" for row in wrong))
    return False, f"{len(wrong)} of our {len(ours)} rows do not match float64: {names}"


def warnings(results: Results) -> list[str]:
    """What a reader should know before believing a figure, one line each."""
    told = [] if gpu(results) else [NO_GPU]
    commit = results.environment.get("commit")
    if commit is None:
        told.append("The commit is unknown, so the run cannot be repeated exactly.")
    elif "+" in commit:
        told.append(f"Files differed from commit {commit} when this was measured.")
    if not results.roofs:
        told.append("No roofs were measured, so there are no percentages of them.")
    told += _untimed(row for row in results.rows if not _absent(row))
    for view in views(results, "layers")[:1]:
        ratios = [(duel.ratio.value, duel.row) for duel in view.duels() if duel.ratio]
        lost = [pair for pair in ratios if pair[0] < 1]
        places = [
            f"{row.problem} at batch {row.batch} ({units.times(ratio)})"
            for ratio, row in sorted(lost, key=lambda pair: pair[0])
        ]
        if places:
            slower = ", ".join(_most(places, 2 * MOST))
            told.append(f"Slower than the best peer, {view.name}: {slower}.")
    return told + _most([f"{line}." for line in cautions(results.rows)], MOST)


def absences(results: Results) -> list[str]:
    """Peers that were not there to be compared, one line for each reason."""
    return [*_untimed(row for row in results.rows if _absent(row)), NO_TENSORRT]


def _absent(row: Row) -> bool:
    """Whether it is a peer that never ran: no news of it or of ours."""
    return row.contestant != OURS and row.error is None


def _untimed(rows: Iterable[Row]) -> list[str]:
    """Contestants without a time to show, by reason; reasons that differ in numbers are one."""
    groups: dict[str, list[tuple[str, Row]]] = {}
    for row in rows:
        if not row.shown:
            reason = row.note or f"error {units.power(row.error)} in {row.problem}"
            groups.setdefault(re.sub(r"[\d.]+(e-?\d+)?", "#", reason), []).append((reason, row))
    return [
        f"{', '.join(dict.fromkeys(row.contestant for _, row in group))}: not timed or not right "
        f"in {len(group)} row{'' if len(group) == 1 else 's'}: {group[0][0]}."
        for group in groups.values()
    ]


def _most(lines: Sequence[str], most: int) -> list[str]:
    return [*lines[:most], *([f"and {len(lines) - most} more"] if len(lines) > most else [])]
