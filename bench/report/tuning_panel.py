"""The panel of searches: what was tried, what it took, and why some of it failed."""

from __future__ import annotations

from collections.abc import Sequence

from .. import units
from . import landscape
from .page import details, figure, missing, paragraph, section, switch, table

TUNING = 80_000
"""Bytes that the packed views may take in a page with all its room."""


def tuning(
    lines: Sequence[landscape.Line],
    x: str | None = None,
    y: str | None = None,
    room: float = 1,
) -> str:
    """Searches: two parameters as a heat map, all configurations as dots, and why some failed.

    x, y: the parameters shown first; the most telling ones without. Raises RecordError for one
    that no search has.
    """
    title = "Tuning"
    found = landscape.searches(lines)
    if not found:
        said = "No configuration was searched. To fill this:"
        return section("tuning", title, missing(said, "alexnet-triton-bench round --out DIR"))
    chosen = [found[0].chosen(x, y), *(search.chosen(None, None) for search in found[1:])]
    around = [_around(search) for search in found]
    # One pair of every search, then the others: what does not fit is the least telling.
    shown = [(i, pair) for i, pair in enumerate(chosen)]
    shown += [
        (i, pair)
        for i, search in enumerate(found)
        for pair in search.pairs
        if set(pair) != set(chosen[i])
    ]
    views = {
        f"{found[i].name}: {a} by {b}": ['<div class="pair">', _map(found[i], a, b), around[i]]
        for i, (a, b) in shown
    }
    return section(
        "tuning",
        title,
        paragraph(
            "Left, the best time over all other parameters for every pair of values. Right, every "
            "configuration; those that failed stand below, with the reason when pointed at.",
            "note",
        ),
        switch("tuning", "Shown:", views, TUNING * room),
    )


def _map(search: landscape.Search, x: str, y: str) -> str:
    drawing = landscape.heat_map(search, x, y)
    return f"<div>{figure(f'{search.name}: {x} by {y}', drawing)}</div>"


def _around(search: landscape.Search) -> str:
    """What stands after a heat map, whichever it is: all configurations, and why some failed."""
    best = search.right[:10]
    head = ["configuration", "time", "registers", "shared", "error"]
    cells = [
        [
            landscape.said(at["config"]),
            units.time(float(at["median_us"])),
            units.pretty(at.get("registers")),
            units.pretty(at.get("shared")),
            units.power(at.get("max_error")),
        ]
        for at in best
    ]
    parts = [figure(_score(search), landscape.scatter(search))]
    if any(at.get("registers") for at in search.right):
        parts.append(figure("Time over registers", landscape.by_registers(search)))
    if search.failures:
        parts.append(f'<div class="reasons">{_reasons(search)}</div>')
    inside = "".join(f"<div>{part}</div>" for part in parts)
    folded = details(
        f"The {len(best)} best as a table", table(f"Best of {search.name}", head, cells)
    )
    return f"{inside}</div>{folded}"


def _reasons(search: landscape.Search) -> str:
    return table(
        f"Why {sum(search.failures.values())} failed; numbers are those of the first of a kind",
        ["status", "reason", "configurations"],
        [
            [status, reason or "-", str(count)]
            for (status, reason), count in search.failures.most_common(10)
        ],
        words=2,
    )


def _score(search: landscape.Search) -> str:
    good = len(search.right)
    best = f"; the best takes {units.time(search.right[0]['median_us'])}" if good else ""
    return f"{len(search.lines)} configurations on {search.device}, {good} right{best}."
