"""What searches have found: one JSON line for each configuration tried, kept for good.

A trial is known by the device, Triton's version, the kernel's source, the problem and the
configuration. A search asks the cache first, so one that was interrupted, or is given more
configurations, loses and repeats nothing. Every line is on the disk before the next trial starts;
a last line that was cut short is dropped. Failures are results too and kept with their reason.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO, Literal

from triton.runtime.jit import JITFunction

from ...kernels.jit import Launch
from ..records import RecordError
from .space import Config, key

Status = Literal["ok", "refused", "wrong", "failed", "timeout"]
STATUSES: tuple[Status, ...] = ("ok", "refused", "wrong", "failed", "timeout")


@dataclass(frozen=True, slots=True)
class Subject:
    """What the trials of one search share."""

    device: str
    triton: str  # version
    source: str  # `source_hash`
    network: str
    layer: str
    batch: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.network} {self.layer} x{self.batch} {self.dtype}, {self.device}"


@dataclass(frozen=True, slots=True)
class Trial:
    """One configuration tried, in microseconds; there are times only if `status` is "ok".

    `refused` was not run: the launcher or the static check would not have it. `max_error` is
    relative to the largest number of the float64 answer.
    """

    subject: Subject
    config: Config
    status: Status
    reason: str = ""
    median_us: float | None = None
    p20_us: float | None = None
    p80_us: float | None = None
    max_error: float | None = None
    registers: int | None = None  # per thread
    shared: int | None = None  # bytes per program
    date: str = ""
    clock: str = ""
    seconds: float | None = None  # what the trial took, compiling included
    won: bool = False  # whether it won the last final of its search, of which its times are

    @property
    def time(self) -> float:
        """The median, infinite for what did not get as far."""
        return float("inf") if self.median_us is None else self.median_us

    def to_dict(self) -> dict[str, object]:
        """One flat object, as a line of the file holds it."""
        fields = asdict(self)
        return {**fields.pop("subject"), **fields}


class Cache:
    """The trials of one file; without a path they are kept in memory alone.

    Raises RecordError, naming file and line, for anything but trials.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._trials = {(trial.subject, key(trial.config)): trial for trial in self._read()}

    @property
    def trials(self) -> list[Trial]:
        """All trials in the order of their first lines; of two lines for one, the later."""
        return list(self._trials.values())

    def find(self, subject: Subject, config: Config) -> Trial | None:
        """The trial of a configuration, None if it was not tried."""
        return self._trials.get((subject, key(config)))

    def strangers(self, subject: Subject, fields: Collection[str]) -> str:
        """One line on trials of a search that do not count in it, if there are any.

        They are of another source, or their configuration has a field beside `fields`.
        """
        odd = [
            trial
            for trial in self.trials
            if replace(trial.subject, source=subject.source) == subject
            and not (trial.subject == subject and trial.config.keys() <= set(fields))
        ]
        if not odd:
            return ""
        why = f"wanted the source {subject.source}, got {odd[0].subject.source}"
        if odd[0].subject == subject:
            got = ", ".join(odd[0].config.keys() - set(fields))
            why = f"wanted no fields but {', '.join(fields)}, got {got}"
        return f"{self.path}: {len(odd)} trials of {subject} do not count: {why}; tried anew"

    def append(self, trial: Trial) -> None:
        """Keep a trial; it is on the disk when this returns."""
        self._trials[trial.subject, key(trial.config)] = trial
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            _drop_torn_line(file)
            file.write(json.dumps(trial.to_dict()).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self) -> Iterable[Trial]:
        if self.path is None or not self.path.exists():
            return
        try:
            text = self.path.read_bytes()
        except OSError as error:
            raise RecordError(f"{self.path}: {error.strerror}") from None
        whole = text[: text.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                yield _trial(json.loads(line))
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise RecordError(f"{self.path}, line {number}: no trial: {error}") from None


def _drop_torn_line(file: BinaryIO) -> None:
    """Cut off what a crash left of a last line."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 1))
    if size and file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def _trial(line: dict[str, object]) -> Trial:
    names = Subject.__dataclass_fields__
    known = [*names, *(name for name in Trial.__dataclass_fields__ if name != "subject")]
    if odd := ", ".join(line.keys() - set(known)):
        raise ValueError(f"wanted no fields but {', '.join(known)}, got {odd}; delete the line")
    subject = Subject(**{name: line[name] for name in names})  # type: ignore[arg-type]
    rest = {name: value for name, value in line.items() if name not in names}
    trial = Trial(subject, **rest)  # type: ignore[arg-type]
    if trial.status not in STATUSES:
        raise ValueError(f"status {trial.status!r}")
    return trial


def source_hash(launches: Iterable[Launch]) -> str:
    """A name for the code that these launches run: the text of every jit function in the modules of
    their kernels, and of those that they import, one module further.

    Not Triton's own `cache_key`, which also changes with the line a function stands on and with the
    version of Triton, and not the files, whose docstrings and launchers change without the kernel.
    All jit functions of a module, used by the configuration or not, so that one search of a kernel
    with several forms has one name. Where a module lies does not matter.
    """
    modules = {launch.kernel.fn.__module__ for launch in launches}
    for name in sorted(modules):
        modules |= {function.fn.__module__ for function in _functions(name).values()}
    texts = [
        f"{name}\n{function.src}"
        for module in modules
        for name, function in _functions(module).items()
    ]
    return hashlib.sha256("\n".join(sorted(texts)).encode()).hexdigest()[:12]


def _functions(module: str) -> dict[str, JITFunction]:
    names = vars(sys.modules[module])
    return {name: value for name, value in names.items() if isinstance(value, JITFunction)}
