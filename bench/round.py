"""`bench round`: everything that half an hour at a GPU should yield, inside a given time.

The work is done phase by phase (`phases.py`) in a process of its own, and watched from here: if it
crashes, loses its GPU to an error or hangs where no alarm reaches it, it is replaced by one that
goes on with the phases after. All that there is in the end becomes the report.

A round may go on from an earlier one, on a machine that has the package's table by now but not the
output folder: its rows stay until they are measured again, and its searches are not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType

import torch

from ..engine import EngineError
from ..engine.load import arithmetic, at_least_one, find, resolve
from ..errors import printable
from .env import environment
from .measure.options import INTERPRETED
from .phases import Round, perform, tell
from .records import Results, load, save
from .report.report import page

RESERVE = 20.0  # seconds kept for the report
START = 120.0  # seconds until a process must have begun its first phase
SILENCE = 10.0  # seconds after which a phase that did not hear its alarm is given up
BATCHES = {"cuda": (256, 1, 1024, 64, 8, 4096), "cpu": (1,)}  # the most telling first
MODEL = {"cuda": "alexnet", "cpu": "digits"}
UNDER_WAY = "phase.json"  # what the process that works is at, and until when


def begin(
    out: Path, device: torch.device, earlier: Path | None = None, commit: str | None = None
) -> None:
    """Results without a phase, or with all that an earlier round found.

    `commit` is the code's, for a copy of it without git. Raises RecordError for results that
    cannot be read, EngineError for those of another GPU.
    """
    here = environment(device)
    here["commit"] = here["commit"] or commit
    notes = [INTERPRETED] if device.type == "cpu" else []
    results = Results(here, {}, (), notes=tuple(notes))
    if earlier is not None:
        before = load(earlier / "results.json")
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
        searches = earlier / "searches.jsonl"
        if searches.exists() and out.resolve() != earlier.resolve():
            shutil.copy(searches, out / searches.name)
    save(results, out / "results.json")


def watch(command: Sequence[str], out: Path, phases: Sequence[str], end: float) -> None:
    """Have a process do the phases, and others what one leaves undone; none is left running.

    The command is completed by the phases and by `end`, when the last of them must be over, on
    time.monotonic's clock. A process ends with status 0 unless it crashed.
    """
    rest = list(phases)
    while rest and time.monotonic() < end:
        (out / UNDER_WAY).unlink(missing_ok=True)
        how = _watched([*command, "--phases", *rest, "--until", str(end)], out / UNDER_WAY, end)
        if how is None:
            break
        at, _ = _under_way(out / UNDER_WAY) or ("round", 0.0)
        results = load(out / "results.json")
        line = f"{at}: failed, {how}"
        tell(line)
        save(replace(results, notes=(*results.notes, line)), out / "results.json")
        rest = rest[rest.index(at) + 1 :] if at in rest else []  # what cannot begin never will
    else:
        results = load(out / "results.json")
        lines = (f"{name}: not reached" for name in rest)
        save(replace(results, notes=(*results.notes, *lines)), out / "results.json")
    (out / UNDER_WAY).unlink(missing_ok=True)


def _watched(command: Sequence[str], under_way: Path, end: float) -> str | None:
    """How a process failed, in words; None if it did not."""
    first = time.monotonic() + START
    process = subprocess.Popen(command, process_group=0)
    try:
        while process.poll() is None:
            _, until = _under_way(under_way) or ("", first)
            if time.monotonic() > min(until, end) + SILENCE:
                return "no answer, so its process was ended"
            time.sleep(0.05)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    code = process.returncode
    if code == 0:
        return None
    return "its process died with " + (signal.Signals(-code).name if code < 0 else f"status {code}")


def _under_way(path: Path) -> tuple[str, float] | None:
    """The phase that a process is at, and when it is stopped."""
    try:
        name, until = json.loads(path.read_text())
    except (OSError, ValueError):  # none yet, or being written
        return None
    return name, until


# --- the verb --------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    """Do all phases in the time given, and report; 1 if a phase failed."""
    end = time.monotonic() + 60 * options.minutes
    device = resolve(options.device)
    dtype, _ = arithmetic(options.dtype, device, "triton")
    network, _ = find(options.model or MODEL[device.type])
    batches = options.batch or BATCHES[device.type]
    for batch in batches:
        at_least_one("--batch", batch)
    if options.minutes * 60 <= RESERVE:
        raise EngineError(f"--minutes: wanted more than {RESERVE / 60:.2f}, got {options.minutes}")
    limit = options.limit or (3 if device.type == "cpu" else None)
    out: Path = options.out
    if options.until is not None:
        work = Round(out, device, network, dtype, batches, options.until, limit, options.again)
        perform(work, options.phases, lambda *now: _tell_watcher(out / UNDER_WAY, now))
        return 0

    out.mkdir(parents=True, exist_ok=True)
    begin(out, device, options.earlier, options.commit)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        watch(_worker(options, device), out, options.phases, end - RESERVE)
    except KeyboardInterrupt:
        tell("interrupted: the report tells what there is")
    finally:
        signal.signal(signal.SIGTERM, before)
    results = load(out / "results.json")
    (out / "report.html").write_text(page(results))
    print(printable(f"results: {out / 'results.json'}   report: {out / 'report.html'}"))
    failed = [note for note in results.notes if ": failed," in note]
    print("\n".join(failed), file=sys.stderr)
    return 1 if failed else 0


def _worker(options: argparse.Namespace, device: torch.device) -> list[str]:
    """This command again, as the process that works."""
    room = __name__.rpartition(".")[0]
    made = [sys.executable, "-m", room, "round", "--out", str(options.out), "--device", str(device)]
    for name in ("model", "dtype", "limit"):
        if (value := getattr(options, name)) is not None:
            made += [f"--{name}", str(value)]
    made += ["--again"] if options.again else []
    return [*made, *(["--batch", *map(str, options.batch)] if options.batch else [])]


def _tell_watcher(path: Path, now: tuple[str, float]) -> None:
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(json.dumps(now))
    os.replace(unfinished, path)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
