"""One list of columns gives a table its heading and its lines."""

from __future__ import annotations

from collections.abc import Callable

from alexnet_triton.engine import table

COLUMNS: list[tuple[str, int, Callable[[dict[str, float]], str]]] = [
    ("name", -6, lambda row: "conv1"),
    ("us", 8, lambda row: f"{row['us']:.2f}"),
    ("note", 0, lambda row: "straw man" if row["us"] > 1 else ""),
]


def test_values_stand_under_their_headings() -> None:
    assert table.columns([{"us": 12.5}, {"us": 0.25}], COLUMNS) == [
        "name         us note",
        "conv1     12.50 straw man",
        "conv1      0.25",
    ]


def test_a_line_comes_alone_as_it_does_in_the_table() -> None:
    row = {"us": 12.5}
    assert [table.heading(COLUMNS), table.line(row, COLUMNS)] == table.columns([row], COLUMNS)


def test_a_long_value_is_not_cut() -> None:
    assert table.line({"us": 123456789.0}, COLUMNS).split()[1] == "123456789.00"
