"""Numbers as people read them: three significant digits, with the prefix that keeps them short."""

from __future__ import annotations

import math
import re

PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def three(value: float) -> str:
    """Three significant digits, thousands set apart: 0.123, 12.3, 12,300."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    rounded = float(f"{value:.3g}")
    if abs(rounded) < 1e-3:
        return power(value)
    return f"{rounded:,.{max(0, 2 - math.floor(math.log10(abs(rounded))))}f}"


def time(us: float | None) -> str:
    """A time given in microseconds, in µs, ms or s."""
    if us is None:
        return "-"
    if us < 999.5:
        return f"{three(us)} µs"
    return f"{three(us / 1e3)} ms" if us < 999_500 else f"{three(us / 1e6)} s"


def span(low: float | None, high: float | None) -> str:
    """From one time to another: 13.5 to 14.0 µs."""
    first, last = time(low), time(high)
    number, _, unit = first.partition(" ")
    return f"{number if last.endswith(f' {unit}') else first} to {last}"


def si(value: float | None, unit: str) -> str:
    """A count with its unit: 612 TFLOP/s, 4.30 TB/s, 12.3 k."""
    if value is None:
        return "-"
    for factor, prefix in PREFIXES:
        if abs(value) >= factor * 0.9995:
            return f"{three(value / factor)} {prefix}{unit}"
    return f"{three(value)} {unit}".rstrip()


def whole(value: float | None) -> str:
    """Images per second and the like, without a prefix: 553,000."""
    return "-" if value is None else three(value)


def trim(words: str) -> str:
    """The same number without zeros after its point: 10 µs for 10.0 µs."""
    return re.sub(r"\.(?!\d)", "", re.sub(r"(\.\d*?)0+(?!\d)", r"\1", words))


def percent(value: float | None) -> str:
    """A percentage: 62 %, and 0.4 % below ten."""
    if value is None:
        return "-"
    return f"{value:.0f} %" if value >= 9.95 else f"{value:.1f} %"


def times(value: float | None) -> str:
    """A ratio of speeds: 1.52x, and 1/286 where it is below a half."""
    if value is None:
        return "-"
    return f"1/{three(1 / value)}" if 0 < value < 0.5 else f"{three(value)}x"


def power(value: float | None) -> str:
    """An error, as a power of ten: 2.1e-4."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return "not finite"
    digits, _, exponent = f"{value:.1e}".partition("e")
    return "0" if value == 0 else f"{digits}e{int(exponent)}"


def pretty(value: object) -> str:
    """A configuration's value: true and false as yes and no, None as a dash."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
