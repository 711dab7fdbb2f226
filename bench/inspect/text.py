"""Reports of `bench inspect` as text: a table, two side by side, or the code itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .configuration import DEFAULT
from .inspection import KernelReport, Report
from .limits import GPUS, arch_name

INDENT = " " * 4


def table(found: Iterable[Report]) -> str:
    """Reports for a human, under a heading for each architecture."""
    lines: list[str] = []
    before = None
    for one in found:
        if one.arch != before:
            card = f", waves on {GPUS[one.card].name}" if one.card else ""
            lines += ["", f"{arch_name(one.arch)}{card}", _HEADING]
            before = one.arch
        lines += _lines(one)
    return "\n".join(lines[1:])


_HEADING = (
    f"{'layer':<9} {'kernel':<23} {'regs':>4} {'spill':>5} {'stack':>5} {'shared':>7} {'limit':>7} "
    f"{'warps':>5} {'/SM':>3} {'occ':>4} {'waves':>6} {'full':>4}"
)


def _lines(one: Report) -> Iterator[str]:
    label = one.layer
    if one.config != DEFAULT or not one.kernels:
        yield f"{one.layer} {one.config}"
        label = ""
    for kernel in one.kernels:
        binary, held, passed = kernel.binary, kernel.occupancy, kernel.waves
        yield (
            f"{label:<9} {binary.kernel:<23} {binary.registers:>4} {binary.spills:>5} "
            f"{binary.stack:>5} {binary.shared:>7} {binary.limits.shared_per_block:>7} "
            f"{binary.warps:>5} {held.blocks:>3} {held.share:>4.0%} "
            + (f"{passed.waves:>6.1f} {passed.full:>4.0%}" if passed else f"{'-':>6} {'-':>4}")
        )
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
    line = f"{one.work.flops / 1e9:,.2f} GFLOP, {one.work.bytes / 1e6:,.2f} MB, "
    line += f"{one.intensity:,.1f} FLOP/byte"
    if one.roof:
        line += f": bound by {one.roof.bound}, {one.roof.us:,.1f} us or "
        line += f"{one.roof.flops / 1e12:,.1f} TFLOP/s at best"
    return line


def difference(left: Report, right: Report) -> str:
    """Two reports side by side; what differs is marked with a star."""
    a, b = dict(_facts(left)), dict(_facts(right))
    rows = [(name, a.get(name, "-"), b.get(name, "-")) for name in {**a, **b}]
    first, second = (max(len(row[i]) for row in rows if row[0] != "verdict") for i in (0, 1))
    told = [
        f"{'*' if one != other else ' '} {name:<{first}}  {one:<{second}}  {other}"
        for name, one, other in rows
        if name != "verdict"
    ]
    return "\n".join([*told, f"left:  {left.verdict}", f"right: {right.verdict}"])


def _facts(one: Report) -> Iterator[tuple[str, str]]:
    """What a report says of a layer and its main kernel, name by name."""
    yield "layer", one.layer
    yield "configuration", one.config
    yield "architecture", arch_name(one.arch)
    yield from ((name, str(value)) for name, value in one.settings.items())
    yield "GFLOP", f"{one.work.flops / 1e9:,.2f}"
    yield "MB", f"{one.work.bytes / 1e6:,.2f}"
    yield "FLOP/byte", f"{one.intensity:,.1f}"
    if one.roof:
        yield "bound by", one.roof.bound
        yield "us at best", f"{one.roof.us:,.1f}"
    if one.main:
        yield from _kernel_facts(one.main)


def _kernel_facts(main: KernelReport) -> Iterator[tuple[str, str]]:
    binary, total = main.binary, len(main.loop.opcodes)
    yield "kernel", binary.kernel
    yield "blocks", f"{main.grid:,}"
    yield "registers", f"{binary.registers}"
    yield "spills", f"{binary.spills}"
    yield "stack", f"{binary.stack}"
    yield "shared memory", f"{binary.shared:,} of {binary.limits.shared_per_block:,}"
    yield "warps", f"{binary.warps}"
    yield "blocks per SM", f"{main.occupancy.blocks}"
    yield "occupancy", f"{main.occupancy.share:.0%}"
    yield "limited by", " and ".join(main.occupancy.limited_by)
    if main.waves:
        yield "waves", f"{main.waves.waves:.2f}"
        yield "full", f"{main.waves.full:.0%}"
    yield "operands", main.operands
    yield "multiplies by", main.multiplies_by or "-"
    yield "main loop", f"{total} instructions"
    for name, count in main.loop.mix.items():
        yield f"  {name}", f"{count} ({count / total:.0%})"


def code(found: Iterable[Report], form: str) -> str:
    """The code of every kernel, one after the other: `sass`, `ptx` or `ttgir`."""
    return "\n".join(
        f"// {one.layer}, {one.config}, {arch_name(one.arch)}: {kernel.binary.kernel}\n"
        f"{getattr(kernel.binary, form)}"
        for one in found
        for kernel in one.kernels
    )
