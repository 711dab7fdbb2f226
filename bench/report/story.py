"""What results say: the rows that stand for them, headline, tables, and warnings in words.

A view is one subject in one dtype by one clock: rows that may stand in one picture.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .. import units
from ..measure.summary import warnings as warnings_of_times
from ..records import OURS, Results, Row, best_peer, times_best_peer

DTYPES = ("fp16", "bf16", "tf32", "fp32")
CLOCKS = {"graph": "graph replay", "cold": "cold L2", "host": "host clock"}
"""Which view stands for the whole is the first of these that there is."""

MOST = 3  # warnings of a kind that are told in full

NO_GPU = (
    "These results name no GPU: their times are those of Triton's interpreter on a CPU and say "
    "nothing of a GPU."
)


@dataclass(frozen=True, slots=True)
class Table:
    """Cells in words, for a page, README or a terminal; the first `words` columns are text."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int = 1


@dataclass(frozen=True, slots=True)
class Duel:
    """Ours and the best peer of one race; None where none was right and timed."""

    ours: Row | None
    peer: Row | None

    @property
    def row(self) -> Row:
        """The row that names the problem."""
        row = self.ours or self.peer
        assert row is not None  # `duels` makes none of nothing
        return row

    @property
    def ratio(self) -> float | None:
        """How many times as fast as the best peer ours is."""
        return None if self.ours is None or self.peer is None else _ratio(self.ours, self.peer)

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """Our time, the best peer, its time, and how many times as fast ours is."""
        ours, peer = self.ours, self.peer
        return (
            units.time(ours.median_us if ours else None),
            peer.contestant if peer else "-",
            units.time(peer.median_us if peer else None),
            units.times(self.ratio),
        )


@dataclass(frozen=True, slots=True)
class View:
    """Rows of one section, subject, dtype and clock.

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
    def ours(self) -> list[Row]:
        """Our rows that were found right and timed, small batches first."""
        ours = [row for row in self.rows if right(row) and row.contestant == OURS]
        return sorted(ours, key=lambda row: row.batch)

    @property
    def batches(self) -> list[int]:
        """Batch sizes at which ours was timed, or where it never was, at which a peer was."""
        rows = self.ours or [row for row in self.rows if right(row)]
        return sorted({row.batch for row in rows})

    def duels(self, batch: int | None = None) -> list[Duel]:
        """The races of one batch size, or of all of them."""
        return duels(row for row in self.rows if batch in (None, row.batch))


def right(row: Row) -> bool:
    """Whether its time may be shown: proved, and timed."""
    return row.matched and row.median_us is not None


def duels(rows: Iterable[Row]) -> list[Duel]:
    """Ours against the best peer of every race in which one of them was right and timed."""
    races: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        races.setdefault(row.race, []).append(row)
    found = []
    for race in races.values():
        ours = next((row for row in race if row.contestant == OURS and right(row)), None)
        peer = best_peer(race[0], race)
        if ours or peer:
            found.append(Duel(ours, peer))
    return found


def apart(races: Sequence[Duel]) -> list[Duel]:
    """Of one batch, layers that do not overlap: the single ones first, then fused ones.

    In the order in which they came, so that they make up the network.
    """
    taken: set[str] = set()
    kept = []
    for duel in sorted(races, key=lambda duel: duel.row.problem.count("+")):
        layers = set(duel.row.problem.split("+"))
        if not layers & taken:
            taken |= layers
            kept.append(duel)
    return sorted(kept, key=races.index)


def views(results: Results, section: str) -> list[View]:
    """Every view of a section with a time, the one that stands for the whole first."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in results.rows:
        if row.section == section:
            subject = row.network if section == "layers" else row.problem
            groups.setdefault((subject, row.dtype, row.clock), []).append(row)
    subjects = list(dict.fromkeys(subject for subject, _, _ in groups))

    def rank(view: View) -> tuple[object, ...]:
        dtype = DTYPES.index(view.dtype) if view.dtype in DTYPES else len(DTYPES)
        clock = list(CLOCKS).index(view.clock) if view.clock in CLOCKS else len(CLOCKS)
        return (not view.ours, subjects.index(view.subject), dtype, clock)

    made = [View(*key, tuple(rows)) for key, rows in groups.items()]
    return sorted((view for view in made if view.batches), key=rank)


def headline(results: Results) -> tuple[View, Row, Row] | None:
    """What the whole network does: its view, our row of most images per second, and our first.

    None without a right, timed row of ours.
    """
    for view in views(results, "model")[:1]:
        if view.ours:
            return view, max(view.ours, key=lambda r: r.images_per_second or 0.0), view.ours[0]
    return None


def main_batch(results: Results, view: View) -> int:
    """The batch a picture of layers shows first: the headline's if there, else the largest."""
    top = headline(results)
    return top[1].batch if top and top[1].batch in view.batches else view.batches[-1]


# --- tables that README and the page share ----------------------------------------------------


def network_table(view: View) -> Table:
    """The whole network by batch size."""
    head = ("batch", "ours", "best peer", "its time", "x best peer", "images/s", "of roof")
    rows = []
    for duel in view.duels():
        speed, share = _speed(duel.ours), _of_roof(duel.ours)
        rows.append((str(duel.row.batch), *duel.cells, speed, share))
    return Table(f"The whole network ({view.name})", head, tuple(rows))


def layers_table(view: View, batch: int) -> Table:
    """The layers at one batch size."""
    head = ("layer", "ours", "best peer", "its time", "x best peer", "of roof")
    rows = [(d.row.problem, *d.cells, _of_roof(d.ours)) for d in view.duels(batch)]
    return Table(f"The layers at batch {batch} ({view.name})", head, tuple(rows))


def _speed(row: Row | None) -> str:
    return units.whole(row.images_per_second if row else None)


def _of_roof(row: Row | None) -> str:
    return units.percent(row.percent_of_roof if row else None)


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
    of_roof = f", {_of_roof(fast)} of the roof" if fast.roof_us else ""
    p80 = f"p50; p80 {units.time(quick.p80_us)}"
    made = [
        ("images per second", _speed(fast), f"batch {fast.batch}{of_roof}"),
        (f"latency, batch {quick.batch}", units.time(quick.median_us), p80),
    ]
    for row in dict.fromkeys((fast, quick)):
        if peer := best_peer(row, view.rows):
            made.append(_against(f"x best peer, batch {row.batch}", row, peer))
    straws = [r for r in view.rows if r.race == fast.race and r.straw_man and right(r)]
    if straws:
        straw = min(straws, key=lambda row: row.median_us or 0.0)
        made.append(_against(f"x straw man, batch {fast.batch}", fast, straw))
    return made


def _against(what: str, row: Row, other: Row) -> tuple[str, str, str]:
    takes = f"{other.contestant} takes {units.time(other.median_us)}"
    return what, units.times(_ratio(row, other)), takes


def _ratio(row: Row, other: Row) -> float | None:
    if row.median_us is None or other.median_us is None:
        return None
    return other.median_us / row.median_us


def match_verdict(results: Results) -> tuple[bool | None, str]:
    """Whether all of ours are right, and how many were checked, in words; None without any."""
    ours = [row for row in results.rows if row.contestant == OURS or row.section == "order"]
    wrong = [row for row in ours if not row.matched]
    if not ours:
        return None, "nothing of ours was checked"
    if not wrong:
        return True, f"all {len(ours)} of our rows match float64"
    names = ", ".join(dict.fromkeys(f"{row.problem} at batch {row.batch}" for row in wrong))
    return False, f"{len(wrong)} of our {len(ours)} rows do not match float64: {names}"


def warnings(results: Results) -> list[str]:
    """What a reader should know before believing a figure, one line each."""
    found = [] if gpu(results) else [NO_GPU]
    commit = results.environment.get("commit")
    if commit is None:
        found.append("The commit is unknown, so the run cannot be repeated exactly.")
    elif "+" in commit:
        plain = commit.partition("+")[0].rpartition(" ")[2]
        found.append(f"Files differed from commit {plain} when this was measured.")
    if not results.roofs:
        found.append("No roofs were measured, so there are no percentages of them.")
    found += _lost([row for row in results.rows if not right(row) and not _absent(row)])
    found += _slower(results)
    restless = [f"{line}." for line in warnings_of_times(results.rows)]
    found += restless[:MOST]
    if len(restless) > MOST:
        found.append(f"And {len(restless) - MOST} more of our rows whose times scatter or wait.")
    return found


def absences(results: Results) -> list[str]:
    """Peers that were not there to be compared, one line for each reason."""
    return _lost([row for row in results.rows if not right(row) and _absent(row)])


def _absent(row: Row) -> bool:
    """Whether it is a peer that never ran: no news of it or of ours."""
    return row.contestant != OURS and row.max_error is None


def _lost(rows: Sequence[Row]) -> list[str]:
    """Contestants without a time to show, by reason; reasons that differ in numbers are one."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        reason = row.note or f"error {units.power(row.max_error)} in {row.problem}"
        groups.setdefault(re.sub(r"[\d.]+(e-?\d+)?", "#", reason), []).append(row)
    found = []
    for group in groups.values():
        first = group[0]
        reason = first.note or f"error {units.power(first.max_error)} in {first.problem}"
        names = list(dict.fromkeys(row.contestant for row in group))
        where = f"{len(group)} row{'' if len(group) == 1 else 's'}"
        found.append(f"Not timed or not right in {where}: {', '.join(names)}: {reason}.")
    return found


def _slower(results: Results) -> list[str]:
    """Where a peer was faster than our layers."""
    for view in views(results, "layers")[:1]:
        lost = [(d.ratio, d.row) for d in view.duels() if d.ratio is not None and d.ratio < 1]
        places = [
            f"{row.problem} at batch {row.batch} ({units.times(ratio)})"
            for ratio, row in sorted(lost, key=lambda pair: pair[0])[: 2 * MOST]
        ]
        more = f" and {len(lost) - len(places)} more" if len(lost) > len(places) else ""
        if places:
            return [f"Slower than the best peer, {view.name}: {', '.join(places)}{more}."]
    return []
