"""What the verbs `layers` and `model` share: what a user says, and what is kept and told."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ...engine.load import at_least_one, one_of
from ...errors import printable
from ..env import environment
from ..records import Results, save, save_csv
from .peers import KINDS
from .roofline import COPY, measure_roofs
from .timing import CLOCKS, Clock

BATCHES = {"cuda": (1, 8, 64, 256, 1024, 4096), "cpu": (1,)}
ROUNDS = {"cuda": 25, "cpu": 3}
INTERPRETED = "a CPU: Triton's interpreter, whose times say nothing of a GPU's"


@dataclass(frozen=True, slots=True)
class Effort:
    """How long a clock takes: rounds of turns, and after so many seconds no new one but three."""

    rounds: int = 25
    seconds: float | None = None


def asked(
    options: argparse.Namespace, device: torch.device
) -> tuple[Sequence[int], Sequence[Clock], Effort]:
    """Batches, clocks and effort. Raises EngineError for what cannot be measured."""
    batches: Sequence[int] = options.batch or BATCHES[device.type]
    clocks: Sequence[Clock] = options.clock or CLOCKS[device.type]
    rounds = ROUNDS[device.type] if options.rounds is None else options.rounds
    at_least_one("--rounds", rounds)
    for batch in batches:
        at_least_one("--batch", batch)
    for clock in clocks:
        one_of(f"--clock on a {device.type}", clock, CLOCKS[device.type])
    for kind in options.peers or ():
        one_of("--peers", kind, KINDS)
    return batches, clocks, Effort(rounds, options.seconds)


def begun(options: argparse.Namespace, device: torch.device, dtypes: Sequence[str]) -> Results:
    """Results without rows yet: where they are made, and the roofs, measured now.

    They are kept at once, so that a file that cannot be written is refused before the rest.
    """
    tell(f"measuring the roofs of {device}")
    notes = (INTERPRETED,) if device.type == "cpu" else ()
    results = Results(environment(device), measure_roofs(device, dtypes), (), notes=notes)
    keep(results, options)
    return results


def keep(results: Results, options: argparse.Namespace) -> None:
    """Whatever there is so far, so that a run cut short leaves it."""
    if options.json not in (None, "-"):
        save(results, Path(options.json))
    if options.csv is not None:
        save_csv(results.rows, options.csv)


def tell_kept(options: argparse.Namespace) -> None:
    """Which files hold the results."""
    for path in (options.json, options.csv):
        if path not in (None, "-"):
            tell(printable(f"written: {path}"))


def title(network: str, device: torch.device, results: Results) -> str:
    """What is measured where, and the roofs."""
    where = results.environment["gpu name"] if device.type == "cuda" else results.environment["cpu"]
    rates = ", ".join(
        f"{rate / 1e9:,.0f} GB/s copied" if name == COPY else f"{rate / 1e12:.3g} TFLOP/s {name}"
        for name, rate in results.roofs.items()
    )
    roofs = [f"measured roofs: {rates}"] if rates else []
    return "\n".join([f"{network} on {where}", *roofs, *results.notes])


def tell(what: str) -> None:
    """Progress, on standard error."""
    print(what, file=sys.stderr, flush=True)
