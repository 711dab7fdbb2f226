"""`bench inspect`: a layer's kernels on GPUs that are not here, and what to think of them.

Compiling, judging and telling are in `compiled`, `inspection` and `text`; this is the way in.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from triton import __version__ as TRITON

from ...engine import EngineError
from ...engine.devices.planner import Planner
from ...engine.load import find
from ...engine.plan import ARITHMETIC
from ...engine.spec import Network
from ...errors import printable
from ..choices import ARCHS, FORMS
from ..measure.problem import configured, problems
from .configuration import DEFAULT, parse
from .inspection import PLANNED_AS, Report, report
from .limits import GPUS, Arch, arch_name, find_arch, find_gpu
from .text import code, difference, table

Cut = tuple[str, str]  # a layer, "conv4" or "conv1+pool1", and a configuration as `parse` reads it


def reports(
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
        planner = Planner(network, ARITHMETIC[dtype], arch if isinstance(arch, int) else PLANNED_AS)
        for layer, config in cuts:
            (problem,) = problems(planner, dtype, batch, [layer])
            if config != DEFAULT:
                problem = configured(problem, parse(config, problem.step))
            yield report(problem, arch, _card(arch, card), config)


def _card(arch: Arch, wanted: str | None) -> str | None:
    if wanted and GPUS[wanted].arch == arch:
        return wanted
    return next((key for key, gpu in GPUS.items() if gpu.arch == arch), None)


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
    found = []
    for one in reports(network, options.dtype, options.batch, _cuts(network, options), archs, card):
        print(f"{arch_name(one.arch)} {one.layer} {one.config}", file=sys.stderr)
        found.append(one)
    printed = [_write(found, form, getattr(options, form)) for form in FORMS]
    if options.json:
        told = {"model": network.name, "batch": options.batch, "dtype": options.dtype}
        print(json.dumps({**told, "reports": [one.to_dict() for one in found]}, indent=2))
    elif options.diff:
        pairs = zip(found[::2], found[1::2], strict=True)
        print("\n\n".join(difference(left, right) for left, right in pairs))
    elif not any(printed):
        print(f"{network.name}, batch {options.batch:,}, {options.dtype}, Triton {TRITON}")
        print(table(found))
    return 1 if options.check and not all(one.clean for one in found) else 0


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
    planner = Planner(network, ARITHMETIC[options.dtype], PLANNED_AS)
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


def _write(found: Sequence[Report], form: str, where: str | None) -> bool:
    """Write the code in one form; True if that went to standard output."""
    if where is None:
        return False
    if where == "-":
        print(code(found, form))
    else:
        _save(Path(where), code(found, form))
    return where == "-"


def _save(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise EngineError(f"{path}: {error.strerror}") from None
    print(printable(f"written: {path}"), file=sys.stderr)
