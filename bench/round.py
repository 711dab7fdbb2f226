"""Everything that half an hour at a GPU should yield, in one command that ends inside its time.

Phases in order, each with a share of the time that is left when it begins: the kernels' tests, the
roofs, the configurations of what has no row in the device's table yet, the order of launches, the
whole network, its layers, and the report. Whatever a phase finds is on the disk before the next
begins, and one that fails is a note in the results, so a run cut short leaves what it had. Winners
go into the package's table at once, since the phases after must run with them, and into the output
folder, from where they can be kept.

On a CPU the same phases run on the digits network in a reduced form, which proves the path and says
nothing of a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from types import FrameType

import torch

from ..engine import EngineError
from ..engine.load import find, numbers, one_of, resolve
from ..engine.plan import NUMBERS
from ..engine.single import Planner
from ..engine.spec import Network
from ..kernels import tuning
from ..kernels.jit import architecture
from .cache import Cache
from .endtoend import model_rows
from .env import Verbs, environment
from .goals import verdicts
from .lab import Lab, device_name, table_shape, tune
from .layers import INTERPRETED, ROUNDS, Effort, layer_rows
from .layers import lines as layer_lines
from .model import lines as model_lines
from .order import orders, tuned_row
from .problem import Problem, tuned_planner
from .records import Results, Row, save, save_csv
from .report import page
from .roofline import measure_roofs
from .tune import targets

ROOT = Path(__file__).resolve().parents[1]
RESERVE = 20.0  # seconds kept for the report
BATCHES = {"cuda": (256, 1, 1024, 64, 8, 4096), "cpu": (1,)}  # the goals' first
MODEL = {"cuda": "alexnet", "cpu": "digits"}
KINDS = {  # torch.compile takes minutes for all layers, so only the whole network meets it
    "layers": ("torch", "fused", "nchw", "frontend"),
    "model": ("torch", "fused", "nchw", "compile", "frontend"),
}
TUNED = ("conv2d", "linear", "max_pool2d", "avg_pool2d", "stem")  # what a plan asks its table for
TESTS = {
    "cuda": ("conv", "gemm", "pool", "lrn", "stem", "softmax", "epilogue", "run", "pipeline"),
    "cpu": ("memory", "epilogue"),
}


@dataclass(slots=True)
class Round:
    """One round as it goes: what was asked for, and the results so far."""

    out: Path
    device: torch.device
    network: Network
    dtype: str
    batches: Sequence[int]
    end: float  # on time.monotonic's clock
    limit: int | None  # new trials of each search
    results: Results = field(init=False)

    def __post_init__(self) -> None:
        notes = (INTERPRETED,) if self.device.type == "cpu" else ()
        self.results = Results(environment(), {}, (), notes=notes)

    @property
    def left(self) -> float:
        """Seconds until the report must begin."""
        return max(0.0, self.end - RESERVE - time.monotonic())

    def effort(self, share: float) -> Effort:
        """Measuring for a share of what is left."""
        return Effort(ROUNDS[self.device.type], 2.0, time.monotonic() + share * self.left)

    def note(self, line: str) -> None:
        """Keep a line with the results, and say it."""
        tell(line)
        self.results = replace(self.results, notes=(*self.results.notes, line))

    def keep(self) -> None:
        """Write the results so far."""
        save(self.results, self.out / "results.json")
        save_csv(self.results.rows, self.out / "results.csv")


def tell(line: str) -> None:
    """Progress."""
    print(line, file=sys.stderr, flush=True)


# --- phases ----------------------------------------------------------------------------------


def tests(run: Round) -> None:
    """The tests of the kernels and of the engine, on this device."""
    folder = ROOT / "tests"
    if not folder.is_dir() or importlib.util.find_spec("pytest") is None:
        run.note("tests: not run, there is no checkout with pytest here")
        return
    parallel = ["-n", str(min(8, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    files = [str(folder / f"test_{name}.py") for name in TESTS[run.device.type]]
    there = [file for file in files if Path(file).exists()]
    command = [sys.executable, "-m", "pytest", "-q", *parallel, *there]
    log = run.out / "tests.txt"
    with log.open("w") as file:
        try:
            subprocess.run(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=0.5 * run.left
            )
        except subprocess.TimeoutExpired:
            file.write("\ncut short: the time for tests was up\n")
    *_, last = log.read_text().strip().splitlines() or ["nothing was printed"]
    run.note(f"tests: {last.strip('= ')}")


def roofs(run: Round) -> None:
    """The rates of this device, measured."""
    wanted = dict.fromkeys([run.dtype, *(("bf16", "tf32") if run.device.type == "cuda" else ())])
    run.results = replace(run.results, roofs=measure_roofs(run.device, list(wanted)))


def configurations(run: Round) -> None:
    """Search the steps that the device's table has nothing for, the costliest first."""
    path = tuning.path_of(device_name(run.device))
    table = path if run.device.type == "cuda" else run.out / path.name
    cache = Cache(run.out / "searches.jsonl")
    end = time.monotonic() + 0.5 * run.left
    with Lab(run.device, timeout=min(60.0, 0.1 * run.left + 1)) as lab:
        work = list(_untuned(run, table))
        tell(f"{len(work)} searches")
        for turn, (problem, name) in enumerate(work):
            if (left := end - time.monotonic()) <= 0:
                run.note(f"configurations: {len(work) - turn} of {len(work)} not reached")
                break
            tell(f"{name}, batch {problem.batch}")
            seconds = min(left, max(2 * left / (len(work) - turn), 5.0))
            found = tune(problem, lab, cache, step=name, seconds=seconds, limit=run.limit)
            if row := found.row:
                _save(table, run, row)
                tell(f"  {found.ratio or 1:.2f} times the default, {len(found.trials)} tried")
            searches = tuple(trial.to_dict() for trial in cache.trials)
            run.results = replace(run.results, searches=searches)
            run.keep()
    _reread()


def order(run: Round) -> None:
    """Slices of the first layers and overlapping kernels, for every batch."""
    path = tuning.path_of(device_name(run.device))
    table = path if run.device.type == "cuda" else run.out / path.name
    end = time.monotonic() + 0.2 * run.left
    for batch in run.batches:
        if time.monotonic() > end:
            run.note(f"order: batch {batch} and later ones not reached")
            break
        effort = Effort(ROUNDS[run.device.type], 1.0, end)
        found = orders(run.network, run.dtype, batch, run.device, effort)
        run.results = replace(
            run.results, rows=run.results.rows + tuple(each.row for each in found)
        )
        tell("\n".join([f"batch {batch}", *map(str, found)]))
        if found[0].row.median_us is not None:
            _save(table, run, tuned_row(found, run.network, run.device))
    _reread()


def model(run: Round) -> None:
    """The whole network beside its peers, then in the other dtypes alone."""
    effort = run.effort(0.5)
    for batch in run.batches:
        rows = tuple(
            model_rows(
                *(run.network, run.dtype, batch, run.device),
                kinds=KINDS["model"],
                roofs=run.results.roofs,
                effort=effort,
            )
        )
        _add(run, rows, model_lines(rows))
    if run.device.type == "cuda":
        for dtype, batch in product(("bf16", "tf32"), run.batches):
            rows = tuple(
                model_rows(
                    *(run.network, dtype, batch, run.device, ("graph",)),
                    kinds=("torch",),
                    roofs=run.results.roofs,
                    effort=effort,
                )
            )
            _add(run, rows, model_lines(rows))


def layers(run: Round) -> None:
    """Every layer beside its peers."""
    effort = run.effort(1.0)
    planner = tuned_planner(run.network, NUMBERS[run.dtype], run.device)
    for batch in run.batches:
        rows = layer_rows(
            *(planner, run.dtype, batch, run.device),
            kinds=KINDS["layers"],
            roofs=run.results.roofs,
            effort=effort,
            clocks=("graph", "cold") if run.device.type == "cuda" else None,
        )
        for row in rows:
            _add(run, (row,), layer_lines([row]))


def _untuned(run: Round, table: Path) -> Iterator[tuple[Problem, str]]:
    """Batches and steps without a row of their own, by batch, the most work first."""
    have = tuning.load(table).rows if table.exists() else ()
    known = {(row.problem, row.batch) for row in have}
    planner = _default_planner(run)
    for batch in run.batches:
        found = []
        for problem, name in targets(planner, run.dtype, batch):
            step = next(step for step in problem.plan.steps if step.name == name)
            op, shape = step.kernel.split()[0], tuning.without_batch(table_shape(problem, step))
            row = tuning.TunedRow(op, shape, run.dtype, batch, {}, 0.0, "", "", "")
            if op in TUNED and (row.problem, batch) not in known:
                found.append((step.work.flops, problem, name))
        found.sort(key=lambda one: -one[0])
        yield from ((problem, name) for _, problem, name in found)


def _default_planner(run: Round) -> Planner:
    """Plans without a table: a search starts from the defaults."""
    return Planner(run.network, NUMBERS[run.dtype], architecture(run.device))


def _save(table: Path, run: Round, row: tuning.TunedRow) -> None:
    """Into the table, and a copy of it beside the results."""
    tuning.save(table, device_name(run.device), [row])
    copy = run.out / table.name
    if copy != table:
        shutil.copy(table, copy)


def _reread() -> None:
    """Tables are read once a process; this one has just changed its own."""
    tuning.table.cache_clear()


def _add(run: Round, rows: Sequence[Row], told: Sequence[str]) -> None:
    run.results = replace(run.results, rows=run.results.rows + tuple(rows))
    run.keep()
    tell("\n".join(told))


PHASES: dict[str, Callable[[Round], None]] = {
    "tests": tests,
    "roofs": roofs,
    "tune": configurations,
    "order": order,
    "model": model,
    "layers": layers,
}


# --- the verb --------------------------------------------------------------------------------


class TimeUp(Exception):
    """The round's time is over, wherever it was."""


@contextmanager
def until(end: float) -> Iterator[None]:
    """Raise TimeUp here at `end` at the latest, and on a request to terminate."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise TimeUp

    before = {kind: signal.signal(kind, stop) for kind in (signal.SIGALRM, signal.SIGTERM)}
    signal.setitimer(signal.ITIMER_REAL, max(0.1, end - time.monotonic()))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for kind, handler in before.items():
            signal.signal(kind, handler)


def perform(run: Round, phases: Sequence[str]) -> None:
    """The phases in turn and the report; never raises for what a phase does."""
    try:
        with until(run.end - RESERVE):
            for name in phases:
                started = time.monotonic()
                tell(f"--- {name}: {run.left:.0f} s left")
                try:
                    PHASES[name](run)
                except TimeUp:
                    raise
                except Exception as error:  # the other phases are worth having
                    run.note(f"{name}: failed, {type(error).__name__}: {error}")
                run.note(f"{name}: took {time.monotonic() - started:.0f} s")
                run.keep()
    except TimeUp:
        run.note("the time was up before all phases ended")
    run.keep()
    (run.out / "report.html").write_text(page(run.results))


def command(verbs: Verbs[argparse.ArgumentParser]) -> None:
    """Add `round` to the verbs."""
    parser = verbs.add_parser(
        "round",
        help="test, tune, measure and report, all in one and inside a given time",
        epilog="example: alexnet-triton-bench round --out bench/results/h200 --minutes 25",
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="results go there as they come")
    add("--minutes", type=float, default=25.0, help="after these it has ended (default 25)")
    add("--phases", nargs="+", choices=PHASES, default=list(PHASES), help="default: all, in order")
    add("--model", help="default alexnet, on a CPU digits")
    add("--dtype", help="fp16 (default on a GPU), bf16, tf32 or fp32 (default on a CPU)")
    add("--batch", type=int, nargs="+", metavar="N", help="default 256 1 1024 64 8 4096; CPU: 1")
    add("--limit", type=int, metavar="N", help="new trials of each search (CPU: 3)")
    add("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    end = time.monotonic() + 60 * options.minutes
    device = resolve(options.device)
    dtype, _ = numbers(options.dtype, device, "triton")
    network, _ = find(options.model or MODEL[device.type])
    if options.minutes * 60 <= RESERVE:
        raise EngineError(f"--minutes: wanted more than {RESERVE / 60:.2f}, got {options.minutes}")
    for phase in options.phases:
        one_of("--phases", phase, PHASES)
    options.out.mkdir(parents=True, exist_ok=True)
    limit = options.limit or (3 if device.type == "cpu" else None)
    batches = options.batch or BATCHES[device.type]
    run = Round(options.out, device, network, dtype, batches, end, limit)
    perform(run, options.phases)
    print(f"results: {options.out / 'results.json'}   report: {options.out / 'report.html'}")
    for verdict in verdicts(run.results.rows, run.results.roofs):
        if verdict.met is not None:
            print(verdict)
    failed = [note for note in run.results.notes if ": failed," in note]
    return 1 if failed else 0
