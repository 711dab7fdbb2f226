"""The table that README shows, made of stored results and put between two marks.

`<!-- results:begin FILE -->` names the results, as seen from README's folder; what stands between
it and `<!-- results:end -->` is generated.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..records import RecordError, Results, load
from . import story

MARKED = re.compile(
    r"(?P<begin><!-- results:begin (?P<file>\S+) -->\n)(?P<table>.*?)(?P<end><!-- results:end -->)",
    re.DOTALL,
)


def markdown(results: Results) -> str:
    """The whole network by batch size, then the layers at one; origin below. Ends in a newline."""
    tables = [story.network_table(view) for view in story.views(results, "model")[:1]]
    for view in story.views(results, "layers")[:1]:
        tables.append(story.layers_table(view, story.main_batch(results, view)))
    parts = [f"{table.caption}:\n\n{_lines(table)}" for table in tables]
    if not parts:
        parts.append("Nothing was right and timed in these results.\n")
    said = f"Stored results: {story.origin(results)}."
    if story.gpu(results) is None:
        said += " Times of Triton's interpreter say nothing of a GPU."
    return "\n".join([*parts, f"{said}\n"])


def _lines(table: story.Table) -> str:
    lines = [table.head, ("---", *["---:"] * (len(table.head) - 1)), *table.rows]
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
