"""What a round does at a card: its phases' batches, the binaries that they want, and a rehearsal.

`round --dry` runs the schedule against a clock of its own, from what was measured before: it needs
no card, and says whether each call fits. The phases and their seconds are in `choices.py`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from ..engine.devices.planner import Planner
from ..engine.load import aim
from ..engine.plan import ARITHMETIC, Options
from ..engine.spec import Network
from ..engine.zoo import network
from ..kernels.jit import Launch
from .choices import PHASES
from .inspect.ahead import Make, distinct, named
from .measure.fill import STEPS, TILES, Tile, assumed, probe
from .measure.problem import Problem, configured, network_problem, ready, tensors, tuned_planner
from .tune.budget import searches
from .tune.short import short_list

ROOT = Path(__file__).resolve().parents[1]
RESERVE = 20.0  # seconds kept for the report
GRACE = 15.0  # seconds that a phase may take beyond its share
BATCHES: dict[str, tuple[int, ...]] = {
    "first": (256, 1, 1024),
    "short": (256, 1, 1024, 64),
    "model": (256, 1),
    "order": (256, 1),
    "layers": (256, 1),
    "more-layers": (1024, 64),
    "more-short": (8, 4096),
    "more-order": (1024, 64),
    "more-model": (1024, 64, 8, 4096),
    "compile": (1, 256, 1024),
    "dtypes": (256, 1),
    "last-layers": (8, 4096),
    "climb": (256, 1, 1024, 64),
    "last-model": (256, 1, 1024, 64),
}
"""On a GPU, the most telling first."""
OTHERS = ("bf16", "tf32", "fp32")
COMMANDS = {
    "fill": "fill ROWS",
    "first": "model MODEL BATCH DTYPE GRAPH ROWS --seconds 1 --peers torch",
    "roofs": "roofs DTYPE OTHERS ROWS",
    "short": "tune --all --model MODEL BATCH DTYPE ON TABLE CACHE BUDGET FEW",
    "model": "model MODEL BATCH DTYPE ROWS --seconds 1 --input float uint8 "
    "--peers torch fused nchw frontend",
    "order": "order MODEL BATCH DTYPE ROWS TABLE --seconds 1",
    "layers": "layers --model MODEL BATCH DTYPE GRAPH ROWS --seconds 0.5 "
    "--peers torch fused nchw frontend",
    "climb": "tune --all --again --model MODEL BATCH DTYPE ON TABLE CACHE BUDGET",
    "compile": "model MODEL BATCH DTYPE GRAPH ROWS --seconds 1 --peers torch fused compile",
    "dtypes": "model MODEL BATCH GRAPH ROWS --seconds 1 --peers torch --dtype bf16 tf32 fp32",
}
"""What each kind of phase says, but for the tests; round.py has what stands for the capitals."""
TESTS = ROOT / "tests" / "at_a_card.txt"  # one of pytest's names a line, the longest first
LEAST = ("fill", "first", "roofs", "tests", "short", "model", "order", "layers")
"""What a CPU proves of it, one image at a time."""


def tests() -> list[str]:
    """What the phase of tests runs on a GPU; none without a checkout."""
    return TESTS.read_text().splitlines() if TESTS.exists() else []


def verb(phase: str) -> str:
    """What kind of phase it is: "more-layers" is "layers"."""
    return phase.rpartition("-")[2]


def turns(
    phases: Sequence[str], end: float, now: Callable[[], float]
) -> Iterator[tuple[str, float, float]]:
    """Each phase in turn, with its part of the seconds left until `end`, and all that are left.

    The parts are of those that fit into what is left. When the next does not it is over: a
    later call begins with that. The first has its turn in any case.
    """
    for place, phase in enumerate(phases):
        left = end - now()
        ends = itertools.accumulate(PHASES[each] for each in phases[place:])
        together = max((seconds for seconds in ends if seconds <= left), default=0)
        if place and not together:
            return
        yield phase, left * PHASES[phase] / (together or PHASES[phase]), left


def over(notes: Iterable[str]) -> set[str]:
    """The phases that by these notes ran to their end, whatever came of it."""
    done: set[str] = set()
    cut = ""
    for note in notes:
        phase, _, said = note.partition(": ")
        if re.search(r"cut short|^\d+ not reached", said):
            cut = phase
        elif re.match(r"took \d+ s$", said):
            done = done - {phase} if phase == cut else done | {phase}
            cut = ""
    return done


# --- binaries --------------------------------------------------------------------------------


def binaries(
    phases: Sequence[str],
    net: Network,
    dtype: str,
    device: torch.device,
    target: str | None = None,
) -> Iterator[tuple[str, Make]]:
    """(phase, launches) in the order in which they are wanted, for the device or a target.

    Those of a search beyond closed lists, of slices and of tests are not among them.
    """
    arch = aim(target, device).arch or 90
    chip = assumed(arch, target or torch.cuda.get_device_name(device))
    for phase in phases:
        batches = BATCHES.get(phase, ())
        match verb(phase):
            case "fill":
                for tile in TILES["cuda"]:
                    yield phase, partial(_probes, tile, arch)
            case "short":
                planner = Planner(net, ARITHMETIC[dtype], arch)
                for search in searches(planner, dtype, batches):
                    for config in short_list(search.step, planner.arithmetic, arch, chip):
                        assert search.step.config is not None  # or it had no list
                        tried = replace(search.step.config, **config)
                        problem = configured(search.problem, tried, search.step.name)
                        yield phase, partial(launches_of, problem, search.step.name)
            case "first" | "model" | "layers" | "order" | "compile" | "dtypes" as kind:
                dtypes = OTHERS if kind == "dtypes" else (dtype,)
                entries = (False, True) if kind == "model" else (False,)  # pixels, too
                for name, batch, pixels in itertools.product(dtypes, batches, entries):
                    planner = tuned_planner(net, ARITHMETIC[name], device, target, options=None)
                    pdl = kind == "order" or (kind != "layers" and planner.options_for(batch).pdl)
                    planner = replace(planner, options=Options(pdl=pdl and arch >= 90))
                    problem = network_problem(planner, name, batch, pixels)
                    for step in problem.plan.steps:
                        yield phase, partial(launches_of, problem, step.name)


def launches_of(problem: Problem, step: str) -> tuple[Launch, ...]:
    """Of one step of a problem, on tensors without memory."""
    return dict(ready(problem, tensors(problem, "meta")).launches)[step]


def _probes(tile: Tile, arch: int) -> tuple[Launch, ...]:
    return (probe(tile, STEPS[0], "cuda", arch),)


# --- a rehearsal -----------------------------------------------------------------------------

# Seconds, and where they are from: H100 is bench/results/h100, its notes the first section of
# bench/results/NOTES.md.
START = 5.0  # until a process measures; H100: 2 to 3, without others that compile
COMPILE = 4.0  # a binary, beside 14 others; notes: 2 to 4
TRIAL = 0.25  # a configuration that is compiled; H100: 0.08 to 1.2
EACH = {
    "fill": 4.0,  # a guess, for all eight products
    "first": 3.0,  # a batch by one clock; H100: 8 in 17 s, start and roofs included (model.json)
    "roofs": 3.0,  # H100: 1
    "tests": 6.0,  # a test that compiles a kernel or two, eight at a time; a guess
    "short": 3.0,  # a search, its final included; H100: 43 in 151
    "model": 19.0,  # a batch by three clocks, as floats and as pixels: as `first`, and 7 of SEARCH
    "order": 8.0,  # a batch; H100: 4
    "layers": 2.5,  # a layer; H100: 28 in 29, with half the peers (layers-peers.json); 7 of SEARCH
    "compile": 65.0,  # a batch; notes: a minute
    "dtypes": 5.0,  # a batch and dtype; H100: 2 in 20, start included (model-bf16-tf32.json)
}
PROCESSES = 15
CALLS = 3
LAYERS = 14  # of AlexNet, those with their pools included


def expected(phase: str, trials: int) -> float:
    """Seconds of a phase at a card, after its binaries are there."""
    batches = len(BATCHES.get(phase, ()))
    kind = verb(phase)
    count = {
        "tests": len(tests()) / 8,
        "short": 8 * batches,
        "layers": LAYERS * batches,
        "dtypes": len(OTHERS) * batches,
    }.get(kind, max(1, batches))
    return START + count * EACH[kind] + trials * TRIAL


@dataclass(slots=True)
class FakeClock:
    """Seconds that pass when somebody says so."""

    seconds: float = 0.0

    def __call__(self) -> float:
        return self.seconds


def rehearse(
    phases: Sequence[str], seconds: float, known: Mapping[str, float], card: str = "h200"
) -> tuple[list[str], bool]:
    """Calls of so many seconds until all phases are done, in lines; whether they fit.

    That is, each phase into its time, and all into CALLS. `known` are seconds that phases took
    before, instead of what is expected of them. Each call starts on a machine that has compiled
    nothing.
    """
    lines, fits, rest, calls = list[str](), True, [*phases], 0
    work = [*named(binaries(phases, network("alexnet"), "fp16", torch.device("cpu"), card), 90)]
    while rest:
        now, calls = FakeClock(), calls + 1
        names = [phase for phase, _, _ in distinct(one for one in work if one[0] in rest)]
        lines.append(f"call {calls}: {len(names)} binaries, the last at {_there(len(names)):.0f} s")
        done = 0
        for phase, share, left in turns(rest, seconds - RESERVE, now):
            before = len(names) - names[::-1].index(phase) if phase in names else 0
            trials = sum(of == phase for of, _, _ in work) if verb(phase) == "short" else 0
            wait = max(0.0, _there(before) - START - now())
            takes = share if phase == "climb" else wait + expected(phase, trials)
            takes, last = known.get(phase, takes), min(share + GRACE, left)
            fits = fits and takes <= last
            lines.append(
                f"  {phase:<12} at {now():3.0f} s: {takes:3.0f} of {last:3.0f} s, "
                f"{names.count(phase):2} binaries{'' if takes <= last else ', TOO LATE'}"
            )
            now.seconds += min(takes, last)
            done += 1
        lines.append(f"  report       at {now():3.0f} s of {seconds:.0f}")
        rest = rest[done:]
    return lines, fits and calls <= CALLS


def _there(binaries: int) -> float:
    """When so many are there, if they are compiled from second 0."""
    return START + -(-binaries // PROCESSES) * COMPILE if binaries else 0.0
