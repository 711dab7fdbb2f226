"""The table that README shows, made of stored results and put between two marks.

`<!-- results:begin FILE -->` names the results, as seen from README's folder; what stands between
it and `<!-- results:end -->` is generated.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from .. import units
from ..records import RecordError, Results, Row, best_peer, load, times_best_peer
from . import story

MARKED = re.compile(
    r"(?P<begin><!-- results:begin (?P<file>\S+) -->\n)(?P<table>.*?)(?P<end><!-- results:end -->)",
    re.DOTALL,
)


def markdown(results: Results) -> str:
    """The whole network by batch size, then the layers at one; origin below. Ends in a newline."""
    parts = []
    for view in story.views(results, "model")[:1]:
        rows = [row for batch in view.batches for row in view.ours(batch)]
        head = ["batch", "ours", "best peer", "its time", "x best peer", "images/s", "of roof"]
        cells = [
            [
                str(row.batch),
                *_race(row, view),
                units.whole(row.images_per_second),
                units.percent(row.percent_of_roof),
            ]
            for row in rows
        ]
        parts.append(f"The whole network ({view.name}):\n\n{_table(head, cells)}")
    for view in story.views(results, "layers")[:1]:
        batch = story.main_batch(results, view)
        head = ["layer", "ours", "best peer", "its time", "x best peer", "of roof"]
        cells = [
            [row.problem, *_race(row, view), units.percent(row.percent_of_roof)]
            for row in view.ours(batch)
        ]
        parts.append(f"The layers at batch {batch} ({view.name}):\n\n{_table(head, cells)}")
    if not parts:
        parts.append("Nothing was right and timed in these results.\n")
    said = f"Stored results: {story.origin(results)}."
    if story.gpu(results) is None:
        said += " Times of Triton's interpreter say nothing of a GPU."
    return "\n".join([*parts, f"{said}\n"])


def _race(row: Row, view: story.View) -> list[str]:
    peer = best_peer(row, view.rows)
    return [
        units.time(row.median_us),
        peer.contestant if peer else "-",
        units.time(peer.median_us if peer else None),
        units.times(times_best_peer(row, view.rows)),
    ]


def _table(head: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *cells]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |\n" for row in lines)


def marked(readme: Path) -> dict[Path, str]:
    """The tables that stand in a file between marks, by the results they are of."""
    return {
        Path(os.path.normpath(readme.parent / found["file"])): found["table"]
        for found in MARKED.finditer(_read(readme))
    }


def rewrite(readme: Path, results: Path) -> None:
    """Generate the table of `results` anew in `readme`.

    Raises RecordError where the file cannot be read or has no marks that name these results.
    """
    wanted = Path(os.path.normpath(results.absolute()))
    made = markdown(load(results))
    hits = 0

    def fresh(found: re.Match[str]) -> str:
        nonlocal hits
        named = Path(os.path.normpath(readme.absolute().parent / found["file"]))
        if named != wanted:
            return found[0]
        hits += 1
        return f"{found['begin']}{made}{found['end']}"

    text = MARKED.sub(fresh, _read(readme))
    if not hits:
        name = os.path.relpath(wanted, readme.absolute().parent)
        raise RecordError(
            f"{readme}: no `<!-- results:begin {name} -->` in it; put that line and "
            "`<!-- results:end -->` where the table should stand"
        )
    readme.write_text(text, encoding="utf-8")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecordError(f"{path}: {error.strerror}") from None
