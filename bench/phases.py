"""Everything that half an hour at a GPU should yield: the phases of a round.

The kernels' tests, the roofs, the configurations of what has no row in the device's table yet, the
order of launches, the whole network, its layers, and torch.compile, which takes longest and so
comes last. Each phase has its share of the time that is left when it begins and is stopped a little
after that; one that fails is a note in the results. Whatever a phase finds is on the disk seconds
later, so a round cut short leaves what it had. Winners go into the package's table at once, since
the phases after must run with them, and into the output folder, from where they can be kept.

On a CPU the same phases run on the digits network in a reduced form, which proves the path and says
nothing of a GPU. What starts a round, and outlives one that crashes or hangs, is `round.py`.
"""

from __future__ import annotations

import gc
import importlib.util
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from ..engine.devices.planner import Planner
from ..engine.plan import ARITHMETIC, Step
from ..engine.spec import Network
from ..kernels import tuning
from ..kernels.jit import architecture
from . import choices
from .measure.endtoend import model_rows
from .measure.layers import default_names, layer_rows
from .measure.layers import lines as layer_lines
from .measure.model import lines as model_lines
from .measure.options import ROUNDS, Effort
from .measure.problem import Problem, tuned_planner
from .measure.roofline import measure_roofs, roof_us
from .records import Results, Row, load, save, save_csv
from .tune.cache import Cache
from .tune.schedule import orders, tuned_row
from .tune.tune import targets
from .tune.tuner import Lab, device_name, table_shape, tune

ROOT = Path(__file__).resolve().parents[1]
GRACE = 15.0  # seconds that a phase may take beyond its share
SAVED = 5.0  # seconds between two savings of the results within a phase
KINDS = ("torch", "fused", "nchw", "frontend")
TUNED = ("conv2d", "linear", "max_pool2d", "avg_pool2d", "stem")  # what a plan asks its table for
LATENCY_US = 3.0  # what a kernel takes however small it is, roughly: for weighing searches
LEAST = {"cuda": 4.0, "cpu": 1.0}  # seconds of a search, by type of device
TIMEOUT = {"cuda": 20.0, "cpu": 60.0}  # seconds of a candidate: a GPU's compiles in one
OTHERS = (("bf16", 3), ("tf32", 2), ("fp32", 2))  # dtypes beside, and for how many batches
TESTS = {
    "cuda": ("conv", "gemm", "pool", "lrn", "stem", "softmax", "epilogue", "run", "pipeline"),
    "cpu": ("memory", "epilogue"),
}


@dataclass(slots=True)
class Round:
    """One round as it goes: what was asked for, and the results so far, which `out` holds."""

    out: Path
    device: torch.device
    network: Network
    dtype: str
    batches: Sequence[int]
    end: float  # on time.monotonic's clock
    limit: int | None = None  # new trials of each search
    again: bool = False  # search what has a row too
    until: float = 0.0  # when the phase under way should end
    results: Results = field(init=False)
    _saved: float = 0.0

    def __post_init__(self) -> None:
        self.results = load(self.out / "results.json")

    @property
    def left(self) -> float:
        """Seconds until the phase under way should end."""
        return max(0.0, self.until - time.monotonic())

    def effort(self, seconds: float) -> Effort:
        """Measuring for at most so many seconds a race, within this phase."""
        return Effort(ROUNDS[self.device.type], seconds, self.until)

    def note(self, line: str) -> None:
        """Keep a line with the results, and say it."""
        tell(line)
        self.results = replace(self.results, notes=(*self.results.notes, line))

    def add(self, rows: Sequence[Row], told: Iterable[str] = ()) -> None:
        """Rows, over those of an earlier measurement of the same."""
        new = {row.key for row in rows}
        kept = tuple(row for row in self.results.rows if row.key not in new)
        self.results = replace(self.results, rows=(*kept, *rows))
        for line in told:
            tell(line)
        if time.monotonic() > self._saved + SAVED:
            self.keep()

    def keep(self) -> None:
        """Write the results so far."""
        save(self.results, self.out / "results.json")
        save_csv(self.results.rows, self.out / "results.csv")
        self._saved = time.monotonic()


def tell(line: str) -> None:
    """Progress."""
    print(line, file=sys.stderr, flush=True)


# --- phases ----------------------------------------------------------------------------------


def tests(run: Round) -> None:
    """The tests of the kernels and of the engine, on this device, in processes of their own."""
    folder = ROOT / "tests"
    if not folder.is_dir() or importlib.util.find_spec("pytest") is None:
        run.note("tests: not run, there is no checkout with pytest here")
        return
    files = [folder / f"test_{name}.py" for name in TESTS[run.device.type]]
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    if run.device.type == "cuda" and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(os.cpu_count() or 1), "--dist", "worksteal"]
    command += [str(file) for file in files if file.exists()]
    status = _logged(command, run.out / "tests.txt", run.left)
    *_, last = (run.out / "tests.txt").read_text().strip().splitlines() or ["nothing was printed"]
    said = "cut short" if status is None else "failed" if status else "passed"
    run.note(f"tests: {said}, {last.strip('= ')}")


def roofs(run: Round) -> None:
    """The rates of this device, measured."""
    others = [name for name, _ in OTHERS] if run.device.type == "cuda" else []
    wanted = list(dict.fromkeys([run.dtype, *others]))
    run.results = replace(run.results, roofs=measure_roofs(run.device, wanted))


def configurations(run: Round) -> None:
    """Search the steps that the device's table has nothing for, the costliest first."""
    table, cache = _table(run), Cache(run.out / "searches.jsonl")
    with Lab(run.device, timeout=TIMEOUT[run.device.type]) as lab:
        work = list(searches(run, table))
        tell(f"{len(work)} searches")
        for turn, (search, seconds) in enumerate(shares(work, LEAST[run.device.type])):
            if run.left <= 0:
                run.note(f"tune: {len(work) - turn} of {len(work)} not reached")
                break
            problem, name = search.problem, search.step.name
            tell(f"{name}, batch {problem.batch}: {seconds(run.left):.0f} s")
            found = tune(
                *(problem, lab, cache),
                step=name,
                seconds=seconds(run.left),
                limit=run.limit,
                hints=search.hints(table),
            )
            if row := found.row:
                _save(table, run, row)
                tell(f"  {found.ratio or 1:.2f} times the default, {len(found.trials)} tried")
            trials = tuple(trial.to_dict() for trial in cache.trials)
            run.results = replace(run.results, searches=trials)
            run.add(())
    _reread()


def order(run: Round) -> None:
    """Slices of the first layers and overlapping kernels, for every batch."""
    table = _table(run)
    for batch in run.batches:
        if run.left <= 0:
            run.note(f"order: batch {batch} and later ones not reached")
            break
        found = orders(run.network, run.dtype, batch, run.device, run.effort(1.0))
        run.add([each.row for each in found], [f"batch {batch}", *map(str, found)])
        if found[0].row.median_us is not None:
            _save(table, run, tuned_row(found, run.network, run.device))
        _free(run.device)
    _reread()


def model(run: Round) -> None:
    """The whole network beside its peers, then in the other dtypes beside torch's own calls."""
    for batch in run.batches:
        _race(run, run.dtype, batch, KINDS, ("cold", "graph", "host"))
    if run.device.type == "cuda":
        for dtype, count in OTHERS:
            for batch in run.batches[:count]:
                _race(run, dtype, batch, ("torch",), ("graph",))


def layers(run: Round) -> None:
    """Every layer beside its peers: what has weights first, then with its pool, then pools."""
    planner = tuned_planner(run.network, ARITHMETIC[run.dtype], run.device)
    names = sorted(default_names(planner), key=lambda name: (name.startswith("pool"), "+" in name))
    for batch, name in product(run.batches, names):
        rows = tuple(
            layer_rows(
                *(planner, run.dtype, batch, run.device, [name]),
                clocks=("graph", "cold") if run.device.type == "cuda" else None,
                kinds=KINDS,
                roofs=run.results.roofs,
                effort=run.effort(1.0),
            )
        )
        if not rows:
            run.note(f"layers: {name} at batch {batch} and later ones not reached")
            break
        run.add(rows, layer_lines(rows))


def compiled(run: Round) -> None:
    """The whole network again, now beside torch.compile too: it tunes itself for a minute each."""
    for batch in run.batches:
        _race(run, run.dtype, batch, ("torch", "fused", "compile"), ("graph",))


def _race(run: Round, dtype: str, batch: int, kinds: Sequence[str], clocks: Sequence[Any]) -> None:
    rows = tuple(
        model_rows(
            *(run.network, dtype, batch, run.device),
            clocks if run.device.type == "cuda" else None,
            kinds=kinds,
            roofs=run.results.roofs if dtype in run.results.roofs else None,
            effort=run.effort(2.0),
        )
    )
    if rows:
        run.add(rows, model_lines(rows))
    else:
        run.note(f"{dtype} at batch {batch} not reached")


@dataclass(frozen=True, slots=True)
class Phase:
    """What is done, and its part of the time beside the others' parts."""

    do: Callable[[Round], None]
    part: float


_PHASES = (
    Phase(tests, 2.0),
    Phase(roofs, 0.3),
    Phase(configurations, 5.0),
    Phase(order, 1.5),
    Phase(model, 2.0),
    Phase(layers, 4.0),
    Phase(compiled, 2.5),
)
PHASES = dict(zip(choices.PHASES, _PHASES, strict=True))


# --- searches --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Search:
    """A step to tune, and its weight beside the others' weights."""

    problem: Problem
    step: Step
    row: tuning.TunedRow  # what the table will know it by; without a configuration
    weight: float

    def hints(self, table: Path) -> list[dict[str, Any]]:
        """Winners for the nearest batches, of the same dtype before others."""
        rows = tuning.load(table).rows if table.exists() else ()
        alike = [row for row in rows if (row.op, row.shape) == (self.row.op, self.row.shape)]

        def distance(row: tuning.TunedRow) -> tuple[bool, float]:
            return row.dtype != self.row.dtype, abs(math.log(row.batch / self.row.batch))

        return [dict(row.config) for row in sorted(alike, key=distance)[:2]]


def searches(run: Round, table: Path) -> list[Search]:
    """Steps without a row of their own, or all; what a round gains most from first.

    A step weighs what it takes of its batch's time by the roofs, and an early batch more.
    """
    have = tuning.load(table).rows if table.exists() else ()
    known = set() if run.again else {(row.problem, row.batch) for row in have}
    # Without the table: a search starts from the defaults.
    planner = Planner(run.network, ARITHMETIC[run.dtype], architecture(run.device))
    found = []
    for place, batch in enumerate(run.batches):
        work = targets(planner, run.dtype, batch)
        steps = [next(s for s in p.plan.steps if s.name == name) for p, name in work]
        times = [LATENCY_US + _roof_us(step, run) for step in steps]
        for (problem, _), step, time_us in zip(work, steps, times, strict=True):
            op, shape = step.kernel.split()[0], tuning.without_batch(table_shape(problem, step))
            row = tuning.TunedRow(op, shape, run.dtype, batch, {}, 0.0, "", "", "")
            if op in TUNED and (row.problem, batch) not in known:
                weight = time_us / sum(times) / (1 + place / 2)
                found.append(Search(problem, step, row, weight))
    return sorted(found, key=lambda one: -one.weight)


def _roof_us(step: Step, run: Round) -> float:
    roofs = run.results.roofs
    # Without a measurement: a GPU with 200 products a byte, as many as reach a petaflop.
    guess = {run.dtype: 1e15, "copy": 5e12}
    return roof_us(step.work, run.dtype, roofs if run.dtype in roofs else guess)


def shares(
    work: Sequence[Search], least: float
) -> Iterator[tuple[Search, Callable[[float], float]]]:
    """Each search with its part of the seconds that are left when it begins, by weight."""
    for turn, search in enumerate(work):
        part = search.weight / sum(other.weight for other in work[turn:])
        yield search, lambda left, part=part: min(left, max(part * left, least))  # type: ignore[misc]


def _table(run: Round) -> Path:
    """Where winners go: on a CPU not into the package."""
    path = tuning.path_of(device_name(run.device))
    return path if run.device.type == "cuda" else run.out / path.name


def _save(table: Path, run: Round, row: tuning.TunedRow) -> None:
    """Into the table, and a copy of it beside the results."""
    tuning.save(table, device_name(run.device), [row])
    copy = run.out / table.name
    if copy != table:
        shutil.copy(table, copy)


def _reread() -> None:
    """Tables are read once a process; this one has just changed its own."""
    tuning.table.cache_clear()


# --- in its time -----------------------------------------------------------------------------


class TimeUp(BaseException):
    """A phase's time is over, wherever it was.

    No Exception: whoever measures other people's code goes on after any of those.
    """


@contextmanager
def until(end: float) -> Iterator[None]:
    """Raise TimeUp here at `end` at the latest, and every second after it until that is heard.

    Once may not do: what is raised in a destructor or a callback is lost.
    """

    def stop(signum: int, frame: FrameType | None) -> None:
        raise TimeUp

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, max(0.01, end - time.monotonic()), 1.0)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def perform(
    run: Round, phases: Sequence[str], begun: Callable[[str, float], None] = lambda name, end: None
) -> None:
    """The phases in turn; one that fails or takes too long is a note.

    `begun` is told the name of each and when, on time.monotonic's clock, it is stopped. What a
    phase leaves is kept before the next begins. Raises RuntimeError if the GPU can do no more.
    """
    for place, name in enumerate(phases):
        started = time.monotonic()
        if started >= run.end:
            run.note(f"{name}: not reached")
            run.keep()
            continue
        part = PHASES[name].part / sum(PHASES[each].part for each in phases[place:])
        run.until = started + part * (run.end - started)
        last = min(run.until + GRACE, run.end)
        begun(name, last)
        tell(f"--- {name}: {run.left:.0f} of {run.end - started:.0f} s")
        try:
            with until(last):
                PHASES[name].do(run)
        except TimeUp:
            run.note(f"{name}: cut short")
        except Exception as error:  # the other phases are worth having
            run.note(f"{name}: failed, {type(error).__name__}: {error}"[:500])
        run.note(f"{name}: took {time.monotonic() - started:.0f} s")
        run.keep()
        _reread()
        _free(run.device)  # raises if the GPU's context is broken: this process can do no more


def _logged(command: Sequence[str], log: Path, seconds: float) -> int | None:
    """Run a command with all its children into a log; its status, None if the time was up."""
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            process_group=0,
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
