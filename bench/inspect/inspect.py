"""`bench inspect`: a layer's kernels on GPUs that are not here, and what to think of them.

Compiling and judging are in `compiled` and `inspection`; this tells of it, as a table or as the
code itself.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence

from triton import __version__ as TRITON

from ...engine import EngineError
from ...engine import table as columns
from ...engine.devices.cards import find_card
from ...engine.devices.planner import Planner
from ...engine.load import find
from ...engine.plan import ARITHMETIC
from ...engine.spec import Network
from ..choices import ARCHS
from ..measure.problem import configured, problems
from .configuration import DEFAULT, parse
from .inspection import KernelReport, Report, inspect
from .limits import GPUS, Arch, arch_name, find_arch

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
    """Print what kernels become; 1 if `--check` is given and one is not clean."""
    network, _ = find(options.model)
    if options.batch < 1:
        raise EngineError(f"--batch: wanted at least 1 image, got {options.batch}")
    if options.json and options.code:
        raise EngineError("--json: prints JSON and nothing else, and --code the code")
    card = find_card(options.card or "")
    if options.card and card is None:
        raise EngineError(f"--card: wanted one of {', '.join(GPUS)}, got {options.card!r}")
    archs = _archs(options.arch, card)
    reports = []
    for report in inspected(
        network, options.dtype, options.batch, _cuts(network, options), archs, card
    ):
        print(f"{arch_name(report.arch)} {report.layer} {report.config}", file=sys.stderr)
        reports.append(report)
    if options.json:
        facts = {"model": network.name, "batch": options.batch, "dtype": options.dtype}
        print(json.dumps({**facts, "reports": [report.to_dict() for report in reports]}, indent=2))
    elif options.code:
        print(code(reports, options.code))
    else:
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
    """Which layers in which configurations."""
    planner = Planner(network, ARITHMETIC[options.dtype], None)
    known = [step.name for step in planner(options.batch).steps[1:]]
    return list(itertools.product(options.layers or known, options.config or [DEFAULT]))
