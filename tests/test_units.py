"""Numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from alexnet_triton.bench import units


@pytest.mark.parametrize(
    ("words", "value", "expected"),
    [
        (units.time, 0.1234, "0.123 µs"),
        (units.time, 9.996, "10.0 µs"),
        (units.time, 999.6, "1.00 ms"),
        (units.time, 21_340, "21.3 ms"),
        (units.time, 999_700, "1.00 s"),
        (units.time, None, "-"),
        (units.whole, 553_214, "553,000"),
        (units.percent, 61.6, "62 %"),
        (units.percent, 0.44, "0.4 %"),
        (units.times, 1.5249, "1.52x"),
        (units.times, 0.872, "0.872x"),
        (units.times, 0.0035, "1/286"),
        (units.times, 0.0, "0x"),
        (units.power, 2.09e-4, "2.1e-4"),
        (units.power, math.inf, "not finite"),
        (units.trim, "10.0 µs", "10 µs"),
        (units.trim, "1.50 ms", "1.5 ms"),
        (units.trim, "1.0e-10", "1e-10"),
        (units.trim, "2.00x", "2x"),
        (units.trim, "500,000", "500,000"),
    ],
)
def test_numbers_in_words(words: Callable[[object], str], value: object, expected: str) -> None:
    assert words(value) == expected


def test_numbers_with_units() -> None:
    assert units.si(6.1234e14, "FLOP/s") == "612 TFLOP/s"
    assert units.si(999.9e9, "B/s") == "1.00 TB/s"
    assert units.si(12, "") == "12.0"
    assert units.span(13.5, 14) == "13.5 to 14.0 µs"
    assert units.span(990, 1200) == "990 µs to 1.20 ms"
