"""`bench round`: what a few minutes at a GPU should yield, however they end.

Phase after phase, as `agenda.py` has them, is a command of this package in a process of its own,
which keeps what it finds as it finds it; it gets its part of the time that is left and is ended a
little after that. One that fails, crashes or is cut short is a note in the results, and the others
go on. Meanwhile what they will launch is compiled on the other cores. Winners are in the device's
table before the phases that run with them begin, and a copy of it lies in the output folder.

A call may end, or be killed, at any second: what it had found lies there whole, and `--continue`
takes it from there, on this machine or on another of its kind: phases that ran to their end are
done, rows stay until they are measured again, searches are not repeated, winners are in the table.

On a CPU the same phases run on the digits network in a reduced form, which proves the path and says
nothing of a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

import torch

from ..engine import EngineError
from ..engine.load import arithmetic, find, resolve
from ..errors import printable
from ..kernels import tuning
from ..kernels.jit import architecture
from . import agenda, hypotheses
from .agenda import BATCHES, GRACE, LEAST, OTHERS, RESERVE, ROOT, verb
from .choices import PHASES
from .env import environment
from .inspect.ahead import compiling
from .measure.verb import INTERPRETED, tell
from .records import Results, load, merge, save, save_csv
from .tune.cache import Cache
from .tune.tuner import device_name

PATIENCE = 5.0  # seconds that a verb may take to end workers in sessions of their own
SAVED = 5.0  # seconds between two savings of the results within a phase
MODEL = {"cuda": "alexnet", "cpu": "digits"}
TRIALS = 3  # of each search of a CPU
TIMEOUT = {"cuda": 20, "cpu": 60}  # seconds of a configuration: a GPU's compiles in one

RESULTS, REPORT, SEARCHES, FOUND = "results.json", "report.html", "searches.jsonl", "found.md"
PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None  # looked up before any fork


@dataclass(frozen=True, slots=True)
class Round:
    """What was asked for, with the defaults of the device filled in."""

    out: Path
    device: torch.device
    model: str
    dtype: str
    table: Path  # where winners go

    def rows(self, phase: str) -> Path:
        """Where the command of a phase keeps what it measures."""
        return self.out / f"{phase}.json"


def begin(asked: Round, before: Path | None = None, commit: str | None = None) -> None:
    """Results without a phase, or with all that a call before this one left in a folder.

    `commit` is the code's, for a copy of it without git. Raises RecordError for results that
    cannot be read, EngineError for those of another GPU.
    """
    here = environment(asked.device)
    here["commit"] = here["commit"] or commit
    notes = (INTERPRETED,) if asked.device.type == "cpu" else ()
    results = Results(here, {}, (), notes=notes)
    if before is not None:
        results = load(before / RESULTS)
        then = results.environment
        if then.get("gpu name") != here["gpu name"]:
            raise EngineError(
                f"--continue {before}: wanted a round on {here['gpu name']}, got one on "
                f"{then.get('gpu name')}"
            )
        since = (
            f"what was not measured again is from {then.get('date')}, commit {then.get('commit')}"
        )
        for phase in PHASES:  # one that was killed did not hand over its last rows
            cut = before / f"{phase}.json"
            if phase not in (*agenda.over(results.notes), "fill") and cut.exists():
                results = merge(results, load(cut))
        results = replace(results, environment=here, notes=(*results.notes, since))
        lines = [json.dumps(dict(trial)) + "\n" for trial in results.searches]
        searches = before / SEARCHES
        put(asked.out / SEARCHES, searches.read_text() if searches.exists() else "".join(lines))
        if (fill := before / "fill.json").exists():
            put(asked.rows("fill"), fill.read_text())
        if (won := before / asked.table.name).exists() and won != asked.table:
            known = tuning.load(asked.table).rows if asked.table.exists() else ()
            rows = sorted((*known, *tuning.load(won).rows), key=lambda row: row.date)
            tuning.save(asked.table, device_name(asked.device), rows)  # the newest of each
    Cache(asked.out / SEARCHES)  # refuses what is none
    save(results, asked.out / RESULTS)


def put(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def command(phase: str, asked: Round, seconds: float) -> list[str]:
    """What a phase runs, none if it cannot; `seconds` are for what can be told its time."""
    cuda, fill = asked.device.type == "cuda", _fill(asked)
    if phase == "tests":
        return _pytest(cuda)
    batches = BATCHES.get(phase, ()) if cuda else (1,)
    narrow = ["--short", *(["--fill", f"{fill:.1f}"] if fill else [])]
    said = {
        "MODEL": [asked.model],
        "BATCH": ["--batch", *map(str, batches)],
        "DTYPE": ["--dtype", asked.dtype],
        "OTHERS": [*OTHERS] if cuda else [],
        "GRAPH": ["--clock", "graph"] if cuda else [],
        "FEW": narrow if cuda else ["--limit", str(TRIALS)],
        "BUDGET": ["--budget", f"{seconds:.0f}", "--timeout", str(TIMEOUT[asked.device.type])],
        "CACHE": ["--cache", str(asked.out / SEARCHES)],
        "TABLE": [] if cuda else ["--table", str(asked.table)],
        "ROWS": ["--device", str(asked.device), "--json", str(asked.rows(phase))],
        "ON": ["--device", str(asked.device)],
    }
    words = agenda.COMMANDS[verb(phase)].split()
    return [
        *(sys.executable, "-m", str(__package__)),
        *(part for word in words for part in said.get(word, [word])),
    ]


def _pytest(cuda: bool) -> list[str]:
    """Chosen tests of kernels and engine on a GPU, a few on a CPU; none without a checkout."""
    if not agenda.TESTS.exists() or importlib.util.find_spec("pytest") is None:
        return []
    few = cuda and importlib.util.find_spec("xdist") is not None
    return [
        *("env", "OMP_NUM_THREADS=1", sys.executable, "-m", "pytest", "-v", "--tb=short"),
        *("-p", "no:cacheprovider", *(("-n", "8", "--dist", "worksteal") if few else ())),
        *(agenda.tests() if cuda else ["tests/test_memory.py"]),
    ]


def _fill(asked: Round) -> float | None:
    """Bytes a clock and multiprocessor, if they were measured."""
    try:
        found: float | None = json.loads(asked.rows("fill").read_text())["fill"]
    except (OSError, ValueError, KeyError):
        return None
    return found


def perform(asked: Round, phases: Sequence[str], end: float) -> None:
    """The phases in turn until `end`, on time.monotonic's clock; a note says how each ended."""
    for phase, seconds, left in agenda.turns(phases, end, time.monotonic):
        started = time.monotonic()
        last = min(seconds + GRACE, left)
        tell(f"--- {phase}: {seconds:.0f} of {left:.0f} s")
        log = asked.out / f"{phase}.txt"
        for old in (log, asked.rows(phase)):
            old.unlink(missing_ok=True)
        work = command(phase, asked, max(1.0, last - GRACE))
        before, notes = _measured(asked), list[str]()
        if not work:
            notes.append(f"{phase}: not run, there is no checkout with pytest here")
        else:
            where = ROOT if phase == "tests" else None  # as pytest's own options want it
            try:
                status = watch(work, log, started + last, lambda: keep(asked, phase), where)  # noqa: B023
            finally:  # interrupted, too
                keep(asked, phase)
            if status is None:
                idle = phase != "tests" and _measured(asked) == before
                notes.append(
                    f"{phase}: {'failed, cut short with nothing' if idle else 'cut short'}"
                )
            elif phase == "tests":
                notes.append(f"tests: {'failed' if status else 'passed'}, {_last(log)}")
            elif status:
                notes.append(f"{phase}: failed, {_how(status, log)}")
            elif phase == "fill" and (fill := _fill(asked)):
                notes.append(f"fill: {fill:.1f} bytes a clock and multiprocessor")
        if missed := log.exists() and log.read_text(errors="replace").count(": not reached, "):
            notes.append(f"{phase}: {missed} not reached")
        keep(asked, phase, *notes, f"{phase}: took {time.monotonic() - started:.0f} s")


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
        process = None
        try:
            with _uninterrupted():
                process = subprocess.Popen(
                    command,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=os.environ | {"PYTHONUNBUFFERED": "1"},  # or the last line is not the last
                    cwd=folder,
                    process_group=0,
                    preexec_fn=_die_with_parent,
                )
            saved = time.monotonic()
            while process.poll() is None and time.monotonic() < end:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.05)
                sys.stderr.write(said.read())
                if time.monotonic() > saved + SAVED:
                    tick()
                    saved = time.monotonic()
            return process.poll()
        finally:
            if process is not None:
                if process.poll() is None:
                    process.send_signal(signal.SIGINT)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(PATIENCE)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            sys.stderr.write(said.read())
            sys.stderr.flush()


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """What happens here ends before an interrupt does: nobody would end a process half started."""
    came: list[int] = []
    stops = (signal.SIGINT, signal.SIGTERM)
    before = [(stop, signal.signal(stop, lambda number, _: came.append(number))) for stop in stops]
    try:
        yield
    finally:
        for stop, handler in before:
            signal.signal(stop, handler)
    if came:
        raise KeyboardInterrupt


def _die_with_parent() -> None:
    """A call that is killed leaves nobody who goes on measuring beside the next one."""
    if PRCTL:
        PRCTL(1, 9)  # PR_SET_PDEATHSIG, SIGKILL


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
    return results.rows, results.roofs, results.searches, _fill(asked)


def keep(asked: Round, phase: str | None, *notes: str) -> None:
    """Add to the results on the disk what a phase has found, and notes; they are told, too."""
    for note in notes:
        tell(note)
    results = load(asked.out / RESULTS)
    if phase not in (None, "fill") and (rows := asked.rows(str(phase))).exists():
        with _or_told(rows):
            results = merge(results, load(rows))
    with _or_told(asked.out / SEARCHES):
        trials = tuple(trial.to_dict() for trial in Cache(asked.out / SEARCHES).trials)
        results = replace(results, searches=trials or results.searches)
    if asked.table.exists() and asked.table.parent != asked.out:
        put(asked.out / asked.table.name, asked.table.read_text())
    results = replace(results, notes=(*results.notes, *notes))
    save(results, asked.out / RESULTS)
    with _or_told(asked.out / FOUND):
        put(asked.out / FOUND, hypotheses.found(results))
    with _or_told(csv := asked.out / "results.csv"):
        save_csv(results.rows, csv.with_suffix(".part"))
        os.replace(csv.with_suffix(".part"), csv)


@contextlib.contextmanager
def _or_told(path: Path) -> Iterator[None]:
    """What is worth less than the phases to come may fail."""
    try:
        yield
    except Exception as error:
        tell(f"{path}: left out, {error}")


@contextlib.contextmanager
def _compiling(asked: Round, phases: Sequence[str]) -> Iterator[None]:
    """While it lasts, what the phases will launch is compiled; a CPU compiles nothing."""
    arch = architecture(asked.device)
    if arch is None:
        yield
        return
    work = agenda.binaries(phases, find(asked.model)[0], asked.dtype, asked.device)
    with compiling(work, arch, tell):
        yield


# --- the verb --------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    """As many phases as fit into the time, and a report; 1 if one failed, 130 if interrupted.

    With `dry` what that would be, and 1 if it does not fit.
    """
    seconds = 60 * options.minutes
    if seconds <= RESERVE:
        raise EngineError(f"--minutes: wanted more than {RESERVE / 60:.2f}, got {options.minutes}")
    before = options.continued
    noted = load(before / RESULTS).notes if before else ()
    if options.dry:
        return _rehearse(options.phases or _left(PHASES, noted), seconds, noted)
    if options.out is None:
        raise EngineError("--out: wanted a folder for the results; --dry needs none")
    end = time.monotonic() + seconds - RESERVE
    device = resolve(options.device)
    dtype, _ = arithmetic(None, device, "triton")
    model = options.model or MODEL[device.type]
    find(model)  # refuses what is none
    table = tuning.path_of(device_name(device))
    if device.type == "cpu":  # the package's tables are for GPUs alone
        table = options.out / table.name
    asked = Round(options.out, device, model, dtype, table)
    asked.out.mkdir(parents=True, exist_ok=True)
    begin(asked, before, options.commit)
    started = len(load(asked.out / RESULTS).notes)
    left = _left(PHASES if device.type == "cuda" else LEAST, noted)
    phases = options.phases or left
    handler = signal.signal(signal.SIGTERM, _interrupt)
    interrupted = False
    try:
        with _compiling(asked, phases):
            perform(asked, phases, end)
    except KeyboardInterrupt:
        interrupted = True
        keep(asked, None, "interrupted: the report tells what there is")
    finally:
        signal.signal(signal.SIGTERM, handler)
    _report(asked.out)
    failed = [note for note in load(asked.out / RESULTS).notes[started:] if ": failed," in note]
    print("".join(f"{note}\n" for note in failed), end="", file=sys.stderr)
    return 130 if interrupted else 1 if failed else 0


def _left(phases: Iterable[str], notes: Sequence[str]) -> list[str]:
    done = agenda.over(notes)
    return [phase for phase in phases if phase not in done]


def _rehearse(phases: Sequence[str], seconds: float, notes: Sequence[str]) -> int:
    took = (re.match(r"(\S+): took (\d+) s$", note) for note in notes)
    known = {match[1]: float(match[2]) for match in took if match}
    lines, fits = agenda.rehearse(phases, seconds, known)
    print("\n".join([*lines, "fits" if fits else "does not fit"]))
    return 0 if fits else 1


def _report(out: Path) -> None:
    """Write the page; the results stand where that cannot be, say for want of what draws."""
    print(printable(f"results: {out / RESULTS}   report: {out / REPORT}"))
    with _or_told(out / REPORT):
        from .report.report import page

        put(out / REPORT, page(load(out / RESULTS)))


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
