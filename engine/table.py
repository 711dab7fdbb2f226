"""Tables of text: a heading and a line a row, from one list of columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

Item = TypeVar("Item")
Columns = Sequence[tuple[str, int, Callable[[Item], str]]]
"""Of each column its heading, its width in characters, and what it says of a row.

Text is set to the right, or where the width is negative to the left; 0 is as wide as the text is.
"""


def columns(rows: Iterable[Item], columns: Columns[Item]) -> list[str]:
    """The heading, then a line a row."""
    return [heading(columns), *(line(row, columns) for row in rows)]


def heading(columns: Columns[Item]) -> str:
    """The first line alone, for rows that come one by one."""
    return _line((text, width) for text, width, _ in columns)


def line(row: Item, columns: Columns[Item]) -> str:
    """One row's line, under the heading."""
    return _line((value(row), width) for _, width, value in columns)


def _line(cells: Iterable[tuple[str, int]]) -> str:
    aligned = (text.rjust(width) if width > 0 else text.ljust(-width) for text, width in cells)
    return " ".join(aligned).rstrip()
