"""Reports of `bench inspect` as text: a table, two side by side, or the code itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ...engine.table import Columns, heading, line
from .. import units
from .configuration import DEFAULT
from .inspection import KernelReport, Report
from .limits import GPUS, arch_name

INDENT = " " * 4

# Of a kernel, and what stands before it.
COLUMNS: Columns[tuple[str, KernelReport]] = (
    ("layer", -9, lambda row: row[0]),
    ("kernel", -23, lambda row: row[1].binary.kernel),
    ("regs", 4, lambda row: str(row[1].binary.registers)),
    ("spill", 5, lambda row: str(row[1].binary.spills)),
    ("stack", 5, lambda row: str(row[1].binary.stack)),
    ("shared", 7, lambda row: str(row[1].binary.shared)),
    ("limit", 7, lambda row: str(row[1].binary.limits.shared_per_block)),
    ("warps", 5, lambda row: str(row[1].binary.warps)),
    ("/SM", 3, lambda row: str(row[1].occupancy.blocks)),
    ("occ", 4, lambda row: f"{row[1].occupancy.share:.0%}"),
    ("waves", 6, lambda row: f"{row[1].waves.waves:.1f}" if row[1].waves else "-"),
    ("full", 4, lambda row: f"{row[1].waves.full:.0%}" if row[1].waves else "-"),
)


def table(found: Iterable[Report]) -> str:
    """Reports for a human, under a heading for each architecture."""
    lines: list[str] = []
    before = None
    for one in found:
        if one.arch != before:
            card = f", waves on {GPUS[one.card].name}" if one.card else ""
            lines += ["", f"{arch_name(one.arch)}{card}", heading(COLUMNS)]
            before = one.arch
        lines += _lines(one)
    return "\n".join(lines[1:])


def _lines(one: Report) -> Iterator[str]:
    label = one.layer
    if one.config != DEFAULT or not one.kernels:
        yield f"{one.layer} {one.config}"
        label = ""
    for kernel in one.kernels:
        yield line((label, kernel), COLUMNS)
        yield f"{INDENT}{_mix(kernel)}"
        label = ""
    yield f"{INDENT}{_work(one)}"
    yield f"{INDENT}{one.verdict}"


def _mix(kernel: KernelReport) -> str:
    total = len(kernel.loop.opcodes)
    where = "main loop" if kernel.loop.found else "no loop, all"
    shares = (f"{count} {name} ({count / total:.0%})" for name, count in kernel.loop.mix.items())
    return f"{where} of {total}: {', '.join(shares)}"


def _work(one: Report) -> str:
    work = f"{one.work.flops / 1e9:,.2f} GFLOP, {one.work.bytes / 1e6:,.2f} MB, "
    work += f"{one.intensity:,.1f} FLOP/byte"
    if one.roof:
        work += f": bound by {one.roof.bound}, {one.roof.us:,.1f} us or "
        work += f"{one.roof.flops / 1e12:,.1f} TFLOP/s at best"
    return work


def difference(left: Report, right: Report) -> str:
    """What `--json` tells of two layers and their main kernels, side by side.

    What differs is marked with a star.
    """
    a, b = dict(_facts(left)), dict(_facts(right))
    rows = [(name, a.get(name, "-"), b.get(name, "-")) for name in {**a, **b}]
    first, second = (max(len(row[i]) for row in rows) for i in (0, 1))
    facts = [
        f"{'*' if one != other else ' '} {name:<{first}}  {one:<{second}}  {other}"
        for name, one, other in rows
    ]
    return "\n".join([*facts, f"left:  {left.verdict}", f"right: {right.verdict}"])


def _facts(one: Report) -> Iterator[tuple[str, str]]:
    facts = one.to_dict() | (one.main.to_dict() if one.main else {})
    for left_out in ("kernels", "instructions", "refusal", "verdict"):  # too long for a column
        facts.pop(left_out, None)
    return _flat(facts | facts.pop("settings"))


def _flat(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Names and values, those inside of others under both names."""
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat({f"{name}.{inside}": each for inside, each in value.items()})
        elif isinstance(value, tuple):
            yield name, " and ".join(value)
        elif isinstance(value, float):
            yield name, units.three(value)
        else:
            yield name, f"{value:,}" if type(value) is int else units.pretty(value)


def code(found: Iterable[Report], form: str) -> str:
    """The code of every kernel, one after the other: `sass`, `ptx` or `ttgir`."""
    return "\n".join(
        f"// {one.layer}, {one.config}, {arch_name(one.arch)}: {kernel.binary.kernel}\n"
        f"{getattr(kernel.binary, form)}"
        for one in found
        for kernel in one.kernels
    )
