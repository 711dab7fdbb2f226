"""`bench inspect`: a layer's kernels on GPUs that are not here, and what to think of them.

Compiling and judging are in `compiled` and `inspection`; this tells of it: as a table, as two
layers side by side, or as the code itself.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from triton import __version__ as TRITON

from ...engine import EngineError
from ...engine import table as columns
from ...engine.devices.planner import Planner
from ...engine.load import find
from ...engine.plan import ARITHMETIC
from ...engine.spec import Network
from ...errors import printable
from .. import units
from ..choices import ARCHS, FORMS
from ..measure.problem import configured, problems
from .configuration import DEFAULT, parse
from .inspection import KernelReport, Report, inspect
from .limits import GPUS, Arch, arch_name, find_arch, find_gpu

Cut = tuple[str, str]  # a layer, "conv4" or "conv1+pool1", and a configuration as `parse` reads it


def inspected(
    network: Network,
    dtype: str,
    batch: int,
    cuts: Sequence[Cut],
    archs: Sequence[Arch],
    card: str | None = None,
) -> Iterator[Report]:
    """A report for each architecture and each (layer, configuration), as they are done.

    `card` is a key of GPUS and meant for its own architecture; the others are judged on the first
    card that has them. Raises NetworkError for an unknown layer and EngineError for a
    configuration that `parse` refuses.
    """
    for arch in archs:
        planner = Planner(network, ARITHMETIC[dtype], arch)
        for layer, config in cuts:
            (problem,) = problems(planner, dtype, batch, [layer])
            if config != DEFAULT:
                problem = configured(problem, parse(config, problem.step))
            yield inspect(problem, arch, _card(arch, card), config)


def _card(arch: Arch, asked: str | None) -> str | None:
    if asked and GPUS[asked].arch == arch:
        return asked
    return next((key for key, gpu in GPUS.items() if gpu.arch == arch), None)


# --- in words ---------------------------------------------------------------------------------

INDENT = " " * 4

# Of a kernel, and what stands before it.
COLUMNS: columns.Columns[tuple[str, KernelReport]] = (
    ("layer", -9, lambda row: row[0]),
    ("kernel", -23, lambda row: row[1].binary.kernel),
    ("regs", 4, lambda row: str(row[1].binary.registers)),
    ("spill", 5, lambda row: str(row[1].binary.spills)),
    ("stack", 5, lambda row: str(row[1].binary.stack)),
    ("shared", 7, lambda row: str(row[1].binary.shared)),
    ("limit", 7, lambda row: str(row[1].binary.limits.shared_per_block)),
    ("warps", 5, lambda row: str(row[1].binary.warps)),
    ("/SM", 3, lambda row: str(row[1].binary.occupancy.blocks)),
    ("occ", 4, lambda row: f"{row[1].binary.occupancy.share:.0%}"),
    ("waves", 6, lambda row: f"{row[1].waves.waves:.1f}" if row[1].waves else "-"),
    ("full", 4, lambda row: f"{row[1].waves.full:.0%}" if row[1].waves else "-"),
)


def table(reports: Iterable[Report]) -> str:
    """Reports for a human, under a heading for each architecture."""
    lines: list[str] = []
    before = None
    for report in reports:
        if report.arch != before:
            card = f", waves on {GPUS[report.card].name}" if report.card else ""
            lines += ["", f"{arch_name(report.arch)}{card}", columns.heading(COLUMNS)]
            before = report.arch
        lines += _lines(report)
    return "\n".join(lines[1:])


def _lines(report: Report) -> Iterator[str]:
    label = report.layer
    if report.config != DEFAULT or not report.kernels:
        yield f"{report.layer} {report.config}"
        label = ""
    for kernel in report.kernels:
        yield columns.line((label, kernel), COLUMNS)
        yield f"{INDENT}{_mix(kernel)}"
        label = ""
    yield f"{INDENT}{_work(report)}"
    yield f"{INDENT}{report.verdict}"


def _mix(kernel: KernelReport) -> str:
    total = len(kernel.loop.opcodes)
    where = "main loop" if kernel.loop.found else "no loop, all"
    shares = (f"{count} {name} ({count / total:.0%})" for name, count in kernel.loop.mix.items())
    return f"{where} of {total}: {', '.join(shares)}"


def _work(report: Report) -> str:
    work = f"{report.work.flops / 1e9:,.2f} GFLOP, {report.work.bytes / 1e6:,.2f} MB, "
    work += f"{report.intensity:,.1f} FLOP/byte"
    if report.roof:
        work += f": bound by {report.roof.bound}, {report.roof.us:,.1f} us or "
        work += f"{report.roof.flops / 1e12:,.1f} TFLOP/s at best"
    if report.estimate_us:
        work += f"; estimated {report.estimate_us:,.1f} us"
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


def _facts(report: Report) -> Iterator[tuple[str, str]]:
    facts = report.to_dict() | (report.main.to_dict() if report.main else {})
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


def code(reports: Iterable[Report], form: str) -> str:
    """The code of every kernel, one after the other: `sass`, `ptx` or `ttgir`."""
    return "\n".join(
        f"// {report.layer}, {report.config}, {arch_name(report.arch)}: {kernel.binary.kernel}\n"
        f"{getattr(kernel.binary, form)}"
        for report in reports
        for kernel in report.kernels
    )


# --- the verb --------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    """Print or write what kernels become; 1 if `--check` is given and one is not clean."""
    network, _ = find(options.model)
    if options.batch < 1:
        raise EngineError(f"--batch: wanted at least 1 image, got {options.batch}")
    if options.json and "-" in (options.sass, options.ptx, options.ttgir):
        raise EngineError("--json: prints JSON and nothing else; write the code to a file")
    card = find_gpu(options.card) if options.card else None
    archs = _archs(options.arch, card)
    reports = []
    for report in inspected(
        network, options.dtype, options.batch, _cuts(network, options), archs, card
    ):
        print(f"{arch_name(report.arch)} {report.layer} {report.config}", file=sys.stderr)
        reports.append(report)
    printed = [_write(reports, form, getattr(options, form)) for form in FORMS]
    if options.json:
        facts = {"model": network.name, "batch": options.batch, "dtype": options.dtype}
        print(json.dumps({**facts, "reports": [report.to_dict() for report in reports]}, indent=2))
    elif options.diff:
        pairs = zip(reports[::2], reports[1::2], strict=True)
        print("\n\n".join(difference(left, right) for left, right in pairs))
    elif not any(printed):
        print(f"{network.name}, batch {options.batch:,}, {options.dtype}, Triton {TRITON}")
        print(table(reports))
    return 1 if options.check and not all(report.clean for report in reports) else 0


def _archs(names: str | None, card: str | None) -> list[Arch]:
    """The architectures asked for; without any, the card's or the usual ones."""
    if names is None and card:
        return [find_arch(arch_name(GPUS[card].arch))]
    archs = [find_arch(name) for name in (names or ARCHS).split(",")]
    if card and GPUS[card].arch not in archs:
        raise EngineError(
            f"--card: {card} is {arch_name(GPUS[card].arch)}, which is not among {names}"
        )
    return list(dict.fromkeys(archs))


def _cuts(network: Network, options: argparse.Namespace) -> list[Cut]:
    """Which layers in which configurations; for `--diff`, the two of a pair after one another."""
    planner = Planner(network, ARITHMETIC[options.dtype], None)
    known = [step.name for step in planner(options.batch).steps[1:]]
    if not options.diff:
        return list(itertools.product(options.layers or known, options.config or [DEFAULT]))
    if options.config:
        raise EngineError("--diff: takes its configurations itself; leave --config out")
    two_layers = all(set(name.split("+")) <= set(known) for name in options.diff)
    if two_layers and not options.layers:
        return [(name, DEFAULT) for name in options.diff]
    if two_layers or len(options.layers) != 1:
        raise EngineError(
            f"--diff: wanted two layers of {', '.join(known)}, or one LAYER and two of "
            f"{DEFAULT} or KEY=VALUE,...; got {' and '.join(options.diff)}"
        )
    return [(options.layers[0], config) for config in options.diff]


def _write(reports: Sequence[Report], form: str, where: str | None) -> bool:
    """Write the code in one form; True if that went to standard output."""
    if where is None:
        return False
    if where == "-":
        print(code(reports, form))
        return True
    try:
        Path(where).write_text(code(reports, form), encoding="utf-8")
    except OSError as error:
        raise EngineError(f"{where}: {error.strerror}") from None
    print(printable(f"written: {where}"), file=sys.stderr)
    return False
