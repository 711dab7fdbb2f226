"""`bench round`: everything that half an hour at a GPU should yield, inside a given time.

The kernels' tests, the roofs, the configurations of what has no row in the device's table yet, the
order of launches, the whole network, its layers, and torch.compile, which takes longest and so
comes last. Each phase is a command or two of this package in a process of its own, which keeps what
it finds as it finds it; it gets its part of the time that is left and is ended a little after
that. One that fails, crashes or is cut short is a note in the results, and the others go on.
Winners are in the device's table before the phases that run with them begin, and a copy of it lies
in the output folder.

A round may go on from an earlier one, on a machine that has the package's table by now but not the
output folder: its rows stay until they are measured again, and its searches are not repeated.

On a CPU the same phases run on the digits network in a reduced form, which proves the path and says
nothing of a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

import torch

from ..engine import EngineError
from ..engine.load import arithmetic, at_least_one, find, resolve
from ..errors import Error, printable
from ..kernels import tuning
from .choices import PHASES
from .env import environment
from .measure.verb import INTERPRETED, tell
from .records import Results, load, merge, save, save_csv
from .tune.cache import Cache
from .tune.tuner import device_name

ROOT = Path(__file__).resolve().parents[1]
RESERVE = 20.0  # seconds kept for the report
GRACE = 15.0  # seconds that a phase may take beyond its share
PATIENCE = 5.0  # seconds that a verb may take to end workers in sessions of their own
SAVED = 5.0  # seconds between two savings of the results within a phase
BATCHES = {"cuda": (256, 1, 1024, 64, 8, 4096), "cpu": (1,)}  # the most telling first
MODEL = {"cuda": "alexnet", "cpu": "digits"}
TRIALS = {"cuda": None, "cpu": 3}  # new ones of each search
TIMEOUT = {"cuda": 20, "cpu": 60}  # seconds of a configuration: a GPU's compiles in one
PEERS = ("torch", "fused", "nchw", "frontend")
OTHERS = (("bf16", 3), ("tf32", 2), ("fp32", 2))  # dtypes beside, and for how many batches
TESTS = {
    "cuda": (
        "conv",
        "gemm",
        "pool",
        "lrn",
        "channels_last",
        "first_layer",
        "epilogue",
        "run",
        "pipeline",
    ),
    "cpu": ("memory", "epilogue"),
}

RESULTS, REPORT, SEARCHES = "results.json", "report.html", "searches.jsonl"
FOUND = "phase.json"  # the results of the command under way


@dataclass(frozen=True, slots=True)
class Round:
    """What was asked for, with the defaults of the device filled in."""

    out: Path
    device: torch.device
    model: str
    dtype: str
    batches: Sequence[int]
    table: Path  # where winners go
    limit: int | None = None  # new trials of each search
    again: bool = False  # search what has a row too


def begin(asked: Round, earlier: Path | None = None, commit: str | None = None) -> None:
    """Results without a phase, or with all that an earlier round found.

    `commit` is the code's, for a copy of it without git. Raises RecordError for results that
    cannot be read, EngineError for those of another GPU.
    """
    here = environment(asked.device)
    here["commit"] = here["commit"] or commit
    notes = [INTERPRETED] if asked.device.type == "cpu" else []
    results = Results(here, {}, (), notes=tuple(notes))
    if earlier is not None:
        before = load(earlier / RESULTS)
        then = before.environment
        if then.get("gpu name") != here["gpu name"]:
            raise EngineError(
                f"--earlier {earlier}: wanted a round on {here['gpu name']}, got one on "
                f"{then.get('gpu name')}"
            )
        notes.append(
            f"what was not measured again is from {then.get('date')}, commit {then.get('commit')}"
        )
        results = replace(before, environment=here, notes=tuple(notes))
        searches = earlier / SEARCHES
        if not searches.exists():
            lines = (json.dumps(dict(trial)) + "\n" for trial in before.searches)
            (asked.out / SEARCHES).write_text("".join(lines))
        elif asked.out.resolve() != earlier.resolve():
            shutil.copy(searches, asked.out / SEARCHES)
    (asked.out / FOUND).unlink(missing_ok=True)
    Cache(asked.out / SEARCHES)  # refuses what is none
    save(results, asked.out / RESULTS)


def commands(phase: str, asked: Round, seconds: float) -> list[list[str]]:
    """What a phase runs, one after the other; `seconds` are for what can be told its time."""
    cuda = asked.device.type == "cuda"
    others = OTHERS if cuda else ()
    verb = [sys.executable, "-m", str(__package__)]
    on = ["--device", str(asked.device)]
    at = ["--batch", *map(str, asked.batches), "--dtype", asked.dtype]
    found = ["--json", str(asked.out / FOUND)]
    table = [] if cuda else ["--table", str(asked.table)]
    model = [*verb, "model", asked.model, *on, *found, "--seconds", "2"]
    graph = ["--clock", "graph"] if cuda else []
    match phase:
        case "tests":
            return _pytest(asked.device)
        case "roofs":
            dtypes = dict.fromkeys([asked.dtype, *(dtype for dtype, _ in others)])
            return [[*verb, "roofs", *on, *found, "--dtype", *dtypes]]
        case "tune":
            how = ["--budget", f"{seconds:.0f}", "--timeout", str(TIMEOUT[asked.device.type])]
            how += ["--cache", str(asked.out / SEARCHES), *table]
            how += [] if asked.limit is None else ["--limit", str(asked.limit)]
            how += ["--again"] if asked.again else []
            return [[*verb, "tune", "--all", "--model", asked.model, *on, *at, *how]]
        case "order":
            return [[*verb, "order", asked.model, *on, *at, *found, "--seconds", "1", *table]]
        case "model":
            beside = [
                [*model, "--batch", *map(str, asked.batches[:count]), "--dtype", dtype, *graph]
                for dtype, count in others
            ]
            return [
                [*model, *at, "--peers", *PEERS],
                *([*command, "--peers", "torch"] for command in beside),
            ]
        case "layers":
            how = ["--seconds", "1", *(["--clock", "graph", "cold"] if cuda else [])]
            how += ["--peers", *PEERS]
            return [[*verb, "layers", "--model", asked.model, *on, *at, *found, *how]]
    return [[*model, *at, *graph, "--peers", "torch", "fused", "compile"]]


def _pytest(device: torch.device) -> list[list[str]]:
    """The tests of the kernels and of the engine, on this device; none without a checkout."""
    folder = ROOT / "tests"
    files = [folder / f"test_{name}.py" for name in TESTS[device.type]]
    if not files[0].exists() or importlib.util.find_spec("pytest") is None:
        return []
    command = ["env", "OMP_NUM_THREADS=1", sys.executable, "-m", "pytest"]
    command += ["-q", "--tb=short", "-p", "no:cacheprovider"]
    if device.type == "cuda" and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(os.cpu_count() or 1), "--dist", "worksteal"]
    return [[*command, *map(str, files)]]


def perform(asked: Round, phases: Sequence[str], end: float) -> None:
    """The phases in turn until `end`, on time.monotonic's clock; a note says how each ended."""
    for place, phase in enumerate(phases):
        started = time.monotonic()
        left = end - started
        if left <= 0:
            keep(asked, f"{phase}: not reached")
            continue
        seconds = left * PHASES[phase] / sum(PHASES[each] for each in phases[place:])
        last = min(seconds + GRACE, left)
        tell(f"--- {phase}: {seconds:.0f} of {left:.0f} s")
        log = asked.out / f"{phase}.txt"
        log.unlink(missing_ok=True)
        work = commands(phase, asked, max(1.0, last - GRACE))
        before = _measured(asked)
        notes = [] if work else [f"{phase}: not run, there is no checkout with pytest here"]
        for command in work:
            (asked.out / FOUND).unlink(missing_ok=True)
            where = ROOT if phase == "tests" else None  # as pytest's own options want it
            status = watch(command, log, started + last, lambda: keep(asked), where)
            keep(asked)  # before the next command's results take the place of these
            if status is None:
                idle = phase != "tests" and _measured(asked) == before
                notes.append(
                    f"{phase}: {'failed, cut short with nothing' if idle else 'cut short'}"
                )
                break
            if phase == "tests":
                notes.append(f"tests: {'failed' if status else 'passed'}, {_last(log)}")
            elif status:
                notes.append(f"{phase}: failed, {_how(status, log)}")
        if missed := log.exists() and log.read_text(errors="replace").count(": not reached, "):
            notes.append(f"{phase}: {missed} not reached")
        keep(asked, *notes, f"{phase}: took {time.monotonic() - started:.0f} s")


def watch(
    command: Sequence[str],
    log: Path,
    end: float,
    tick: Callable[[], None] = lambda: None,
    folder: Path | None = None,
) -> int | None:
    """Run a command in a folder; its status, or None if it was interrupted at `end`.

    What it says goes to a log, and as progress to standard error; `tick` is called every SAVED
    seconds. None of its processes outlives this call, however it ends.
    """
    with log.open("ab") as file, log.open(errors="replace") as said:
        said.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},  # or the last line said is not the last
            cwd=folder,
            process_group=0,
        )
        saved = time.monotonic()
        try:
            while process.poll() is None and time.monotonic() < end:
                time.sleep(0.05)
                sys.stderr.write(said.read())
                if time.monotonic() > saved + SAVED:
                    tick()
                    saved = time.monotonic()
            return process.poll()
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(PATIENCE)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            sys.stderr.write(said.read())
            sys.stderr.flush()


def _how(status: int, log: Path) -> str:
    """How a command failed, in words."""
    if status < 0:
        return f"its process died with {signal.Signals(-status).name}"
    return _last(log, "error:") or f"status {status}"


def _last(log: Path, word: str = "") -> str:
    """The last line that was said, or the last with a word."""
    lines = (line.strip("= ") for line in log.read_text(errors="replace").splitlines())
    return next((line[:500] for line in [*lines][::-1] if line and word in line.lower()), "")


def _measured(asked: Round) -> tuple[object, ...]:
    """What there is to lose."""
    results = load(asked.out / RESULTS)
    return results.rows, results.roofs, results.searches


def keep(asked: Round, *notes: str) -> None:
    """Add to the results on the disk what was found since, and notes; they are told, too."""
    for note in notes:
        tell(note)
    results = load(asked.out / RESULTS)
    if (asked.out / FOUND).exists():
        results = merge(results, load(asked.out / FOUND))
    if trials := Cache(asked.out / SEARCHES).trials:
        results = replace(results, searches=tuple(trial.to_dict() for trial in trials))
    if asked.table.exists() and asked.table.parent != asked.out:
        shutil.copy(asked.table, asked.out)
    save(replace(results, notes=(*results.notes, *notes)), asked.out / RESULTS)
    save_csv(results.rows, asked.out / "results.csv")


# --- the verb --------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    """Do all phases in the time given, and report; 1 if one failed, 130 if interrupted."""
    end = time.monotonic() + 60 * options.minutes - RESERVE
    device = resolve(options.device)
    kind = device.type
    dtype, _ = arithmetic(options.dtype, device, "triton")
    model, batches = options.model or MODEL[kind], options.batch or BATCHES[kind]
    table = tuning.path_of(device_name(device))
    if kind == "cpu":  # the package's tables are for GPUs alone
        table = options.out / table.name
    find(model)  # refuses what is none
    for batch in batches:
        at_least_one("--batch", batch)
    if options.minutes * 60 <= RESERVE:
        raise EngineError(f"--minutes: wanted more than {RESERVE / 60:.2f}, got {options.minutes}")
    limit = options.limit or TRIALS[kind]
    asked = Round(options.out, device, model, dtype, batches, table, limit, options.again)
    asked.out.mkdir(parents=True, exist_ok=True)
    begin(asked, options.earlier, options.commit)
    before = signal.signal(signal.SIGTERM, _interrupt)
    interrupted = False
    try:
        perform(asked, options.phases, end)
    except KeyboardInterrupt:
        interrupted = True
        keep(asked, "interrupted: the report tells what there is")
    finally:
        signal.signal(signal.SIGTERM, before)
    (asked.out / FOUND).unlink(missing_ok=True)
    _report(asked.out)
    failed = [note for note in load(asked.out / RESULTS).notes if ": failed," in note]
    print("".join(f"{note}\n" for note in failed), end="", file=sys.stderr)
    return 130 if interrupted else 1 if failed else 0


def _report(out: Path) -> None:
    """Write the page; the results stand where that cannot be."""
    print(printable(f"results: {out / RESULTS}   report: {out / REPORT}"))
    try:
        from .report.report import page

        (out / REPORT).write_text(page(load(out / RESULTS)), encoding="utf-8")
    except (Error, ImportError) as error:  # drawings may want what is not installed here
        tell(f"report: none, {error}")


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
