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

END = "<!-- results:end -->"


def markdown(results: Results) -> str:
    """The whole network by batch size, then the layers at one; origin below. Ends in a newline."""
    parts = [f"{table.caption}:\n\n{_lines(table)}" for table in story.tables(results)]
    said = f"Stored results: {story.origin(results)}."
    if story.gpu(results) is None:
        said += " Times of Triton's interpreter say nothing of a GPU."
    nothing = "Nothing was right and timed in these results.\n"
    return "\n".join([*(parts or [nothing]), f"{said}\n"])


def _lines(table: story.Cells) -> str:
    lines = [table.head, ("---", *["---:"] * (len(table.head) - 1)), *table.rows]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |\n" for row in lines)


def rewrite(readme: Path, results: Path) -> None:
    """Generate the table of `results` anew in `readme`.

    Raises RecordError where the file cannot be read or has no marks that name these results.
    """
    begin = f"<!-- results:begin {os.path.relpath(results, readme.parent)} -->"
    made = f"{begin}\n{markdown(load(results))}{END}"
    try:
        text = readme.read_text(encoding="utf-8")
    except OSError as error:
        raise RecordError(f"{readme}: {error.strerror}") from None
    between = re.compile(f"{re.escape(begin)}\n.*?{END}", re.DOTALL)
    text, hits = between.subn(lambda _: made, text)
    if not hits:
        raise RecordError(
            f"{readme}: no `{begin}` in it; put that line and `{END}` where the table should stand"
        )
    readme.write_text(text, encoding="utf-8")
