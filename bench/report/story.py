"""What a results file has to say: which rows stand for it, its headline, and its warnings in words.

A view is one subject in one dtype by one clock: rows that may stand in one picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .. import units
from ..measure import summary
from ..records import OURS, Results, Row, best_peer, times_best_peer
from .goals import NETWORK

DTYPES = ("fp16", "bf16", "tf32", "fp32")
CLOCKS = ("graph", "cold", "host")
"""Which view stands for the whole, the first that there is."""

MOST = 3  # warnings of a kind that are told in full


NO_GPU = (
    "These results name no GPU: their times are those of Triton's interpreter on a CPU and say "
    "nothing of a GPU."
)


@dataclass(frozen=True, slots=True)
class View:
    """Rows of one section, subject, dtype and clock.

    The subject of layers is their network; a whole network's is its problem, since images as
    pixels and as floats are two races.
    """

    section: str
    subject: str
    dtype: str
    clock: str
    rows: tuple[Row, ...]

    @property
    def name(self) -> str:
        """As a reader chooses it."""
        return f"{self.subject}, {self.dtype}, {CLOCK_WORDS.get(self.clock, self.clock)}"

    @property
    def batches(self) -> list[int]:
        """Batch sizes at which ours was timed."""
        return sorted({row.batch for row in self.rows if right(row) and row.contestant == OURS})

    def at(self, batch: int) -> list[Row]:
        """The rows of one batch size."""
        return [row for row in self.rows if row.batch == batch]

    def ours(self, batch: int) -> list[Row]:
        """Our rows of one batch size that were found right and timed."""
        return [row for row in self.at(batch) if right(row) and row.contestant == OURS]


CLOCK_WORDS = {"graph": "graph replay", "cold": "cold L2", "host": "host clock"}


@dataclass(frozen=True, slots=True)
class Headline:
    """Figures of the verdict strip; None where nothing was measured."""

    view: View
    fast: Row  # ours, at the batch of most images per second
    quick: Row  # ours, at the smallest batch


def right(row: Row) -> bool:
    """Whether its time may be shown: proved, and timed."""
    return row.matched and row.median_us is not None


def views(results: Results, section: str) -> list[View]:
    """Every view of a section in which ours was timed, the one that stands for the whole first."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in results.rows:
        if row.section == section:
            subject = row.problem if section == "model" else row.network
            found.setdefault((subject, row.dtype, row.clock), []).append(row)
    subjects = list(dict.fromkeys(subject for subject, _, _ in found))
    made = [View(section, *key, tuple(rows)) for key, rows in found.items()]
    return sorted(
        (view for view in made if view.batches),
        key=lambda v: (subjects.index(v.subject), _rank(v.dtype, DTYPES), _rank(v.clock, CLOCKS)),
    )


def _rank(name: str, order: Sequence[str]) -> int:
    return order.index(name) if name in order else len(order)


def headline(results: Results) -> Headline | None:
    """What the whole network does; None without a right, timed row of ours."""
    found = views(results, "model")
    if not found:
        return None
    view = found[0]
    ours = [row for batch in view.batches for row in view.ours(batch)]
    return Headline(view, max(ours, key=lambda r: r.images_per_second or 0.0), ours[0])


def main_batch(results: Results, view: View) -> int:
    """The batch a picture of layers shows first: the headline's if there, else the largest."""
    top = headline(results)
    if top and top.fast.batch in view.batches:
        return top.fast.batch
    return view.batches[-1]


def apart(rows: Sequence[Row]) -> list[Row]:
    """Of one batch, rows whose layers do not overlap: the single layers first, then fused ones.

    In the order in which they came, so that they make up the network.
    """
    taken: set[str] = set()
    kept = []
    for row in sorted(rows, key=lambda r: r.problem.count("+")):
        layers = set(row.problem.split("+"))
        if not layers & taken:
            taken |= layers
            kept.append(row)
    return sorted(kept, key=rows.index)


def network(row: Row) -> str:
    """The network's name; a whole network's rows on pixels carry " uint8" behind it."""
    return row.network.removesuffix(" uint8")


def straw_man(row: Row, rows: Sequence[Row]) -> Row | None:
    """The fastest straw man of the same race."""
    found = [other for other in rows if other.race == row.race and other.straw_man and right(other)]
    return min(found, key=lambda other: other.median_us or 0.0, default=None)


def times_faster(row: Row, other: Row | None) -> float | None:
    """How many times as fast `row` is as `other`."""
    if other is None or not row.median_us or not other.median_us:
        return None
    return other.median_us / row.median_us


def styles(results: Results) -> dict[str, int | str]:
    """A colour and marker for every contestant: 0 is ours, straw men share one."""
    straw = {row.contestant for row in results.rows if row.straw_man}
    peers = dict.fromkeys(row.contestant for row in results.rows if row.contestant != OURS)
    numbered = [name for name in peers if name not in straw]
    found: dict[str, int | str] = {OURS: 0}
    found |= {name: i for i, name in enumerate(numbered, 1)}
    return found | dict.fromkeys(straw, "straw")


def gpu(results: Results) -> str | None:
    """The GPU's name, None where there was none."""
    return results.environment.get("gpu name")


def origin(results: Results) -> str:
    """Device, date and commit in one line."""
    found = results.environment
    device = gpu(results) or f"no GPU ({found.get('cpu') or 'CPU'}, Triton's interpreter)"
    date = (found.get("date") or "no date")[:10]
    return f"{device}, {date}, commit {found.get('commit') or 'unknown'}"


def match_verdict(results: Results) -> tuple[bool | None, str]:
    """Whether all of ours are right, and how many were checked, in words; None without any."""
    ours = [row for row in results.rows if row.contestant == OURS]
    wrong = [row for row in ours if not row.matched]
    if not ours:
        return None, "nothing of ours was checked"
    if not wrong:
        return True, f"all {len(ours)} of our rows match float64"
    names = ", ".join(dict.fromkeys(f"{row.problem} at batch {row.batch}" for row in wrong))
    return False, f"{len(wrong)} of our {len(ours)} rows do not match float64: {names}"


def warnings(results: Results) -> list[str]:
    """What a reader should know before believing a figure, one line each."""
    found = []
    if gpu(results) is None:
        found.append(NO_GPU)
    commit = results.environment.get("commit")
    if commit is None:
        found.append("The commit is unknown, so the run cannot be repeated exactly.")
    elif commit.endswith("+"):
        found.append(f"Files differed from commit {commit[:-1]} when this was measured.")
    if not results.roofs:
        found.append("No roofs were measured, so there are no percentages of them.")
    rivals = {r.contestant: r for r in results.rows if r.contestant != OURS and not r.matched}
    for name, row in rivals.items():
        count = sum(r.contestant == name and not r.matched for r in results.rows)
        why = row.note or f"error {units.power(row.max_error)} in {row.problem}"
        found.append(f"{name} was not timed or did not match in {_count(count, 'row')}: {why}.")
    found += _losses(results)
    told = [f"{line}." for line in summary.warnings(results.rows)]
    found += told[:MOST]
    if len(told) > MOST:
        found.append(f"And {len(told) - MOST} more of our rows whose times scatter or wait.")
    return found


def _losses(results: Results) -> list[str]:
    """Where a peer was faster."""
    found = []
    for view in views(results, "layers")[:1]:
        if gpu(results) and view.subject == NETWORK:
            continue  # the goals tell it
        lost = {
            (row.problem, batch): ratio
            for batch in view.batches
            for row in view.ours(batch)
            if (ratio := times_best_peer(row, view.at(batch))) is not None and ratio < 1
        }
        if lost:
            where = ", ".join(
                f"{problem} at batch {batch} ({units.times(ratio)})"
                for (problem, batch), ratio in sorted(lost.items(), key=lambda i: i[1])[:6]
            )
            more = f" and {len(lost) - 6} more" if len(lost) > 6 else ""
            found.append(f"Slower than the best peer, {view.name}: {where}{more}.")
    return found


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def figures(results: Results) -> list[tuple[str, str, str]]:
    """The verdict strip: (what, figure, remark) each; empty without a timed model row of ours."""
    top = headline(results)
    if top is None:
        return []
    rows, fast, quick = top.view.rows, top.fast, top.quick
    made = [
        (
            "images per second",
            units.whole(fast.images_per_second),
            f"batch {fast.batch}, {units.percent(fast.percent_of_roof)} of the roof"
            if fast.roof_us
            else f"batch {fast.batch}",
        ),
        (
            f"latency, batch {quick.batch}",
            units.time(quick.median_us),
            f"p50; p80 {units.time(quick.p80_us)}",
        ),
    ]
    for row in dict.fromkeys((fast, quick)):
        if peer := best_peer(row, rows):
            ratio = units.times(times_best_peer(row, rows))
            made.append((f"x best peer, batch {row.batch}", ratio, _takes(peer)))
    if straw := straw_man(fast, rows):
        ratio = units.times(times_faster(fast, straw))
        made.append((f"x straw man, batch {fast.batch}", ratio, _takes(straw)))
    return made


def _takes(row: Row) -> str:
    return f"{row.contestant} takes {units.time(row.median_us)}"
