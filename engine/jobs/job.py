"""A job: from the words of a command line to its exit status, and what keeps its rows.

`classify` and `features` are jobs over images; `distance.py` has one over pairs of them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from ...errors import printable, shortened
from ..images import Listed, is_url
from ..load import EngineError, arithmetic, find, load_state, resolve
from ..run import Engine
from . import provenance, ray
from .classify import Tally, answer, remaining
from .kinds import ImageRow, Kind, Predictions
from .listing import is_table, listing, plain
from .rows import Existing, Output
from .tables import OutputError


@dataclass(frozen=True, slots=True)
class Job:
    """What one verb's job is: the rest is the same for all."""

    kind: Kind
    asked: provenance.Record  # what decides a row but for the weights
    listed: Callable[[bool], Iterator[Listed]]  # its inputs, which may be gone if so told
    rows: Callable[[Iterator[Listed], Output | None], Generator[ImageRow]]
    items: str = "images"


def run_classify(options: argparse.Namespace) -> int:
    """The most likely classes of images; see `run`."""
    more = {name: getattr(options, name) for name in ("top", "views")}
    more["classes"] = options.classes and provenance.of_file(options.classes)
    return run(options, over_images(options, Predictions(options.top, options.views), **more))


def over_images(options: argparse.Namespace, kind: Kind, **asked: Any) -> Job:
    """The job of `options` that makes such rows of images."""
    from_file = options.model.lower().endswith(".onnx")
    return Job(
        kind,
        {
            "model": provenance.of_file(options.model) if from_file else options.model,
            **asked,
            **asked_of_sources(options, sorted(map(plain, options.source))),  # in any order
        },
        lambda gone: listing(options.source, gone=gone),
        partial(_rows, options, kind),
    )


def asked_of_sources(options: argparse.Namespace, words: list[str]) -> dict[str, Any]:
    """What is to be read, and how, as `provenance` keeps it."""
    starts_here = any(is_table(w) or not (is_url(w) or os.path.isabs(w)) for w in words)
    return {
        "exif": options.exif or None,
        "sources": words,
        "folder": os.getcwd() if starts_here else None,  # tables, too, may hold relative paths
    }


def run(options: argparse.Namespace, job: Job) -> int:
    """Exit 1 if an image that was named itself, or every image, has no result.

    A bad file found in a folder or by a glob is a row with its error and fails nothing. Rows that
    a resumed job has kept count, those of images that are gone do not.
    """
    tally, file = Tally(), _file(options)
    try:
        with _terminated_as_interrupted():
            _do(options, job, file, tally)
    except KeyboardInterrupt:
        kept = f"; {printable(str(file))} holds the rows so far, go on with --resume"
        words = kept if file and file.is_file() and tally.total > tally.kept else ""
        print(f"alexnet-triton: interrupted{words}", file=sys.stderr)
        return 130
    if file and not options.json:
        print(f"{printable(str(file))}: {tally.total} rows")
    if options.output and not file:
        print(f"standard output: {tally.total} rows", file=sys.stderr)
    if tally.bad:
        print(
            f"alexnet-triton: {tally.bad} of {tally.total} {job.items} had errors", file=sys.stderr
        )
    return 1 if tally.failed else 0


def _file(options: argparse.Namespace) -> Path | None:
    """The file that rows go to; None is standard output, which gets JSON lines if it is named."""
    return None if options.output in (Path("-"), Path("/dev/stdout")) else options.output


def _existing(options: argparse.Namespace, file: Path | None) -> Existing:
    """What becomes of rows that are there. Raises OutputError for options that cannot be."""
    flags = ("resume", "retry_errors", "overwrite")
    asked = [f"--{name.replace('_', '-')}" for name in flags if getattr(options, name)]
    if asked and not file:
        raise OutputError(f"{asked[0]} is about a file of rows: name it with --output")
    if options.json and options.output and not file:
        raise OutputError("--json: wanted a file beside it, got --output -, which is JSON lines")
    if options.overwrite and len(asked) > 1:
        raise OutputError(f"{asked[0]} keeps rows, --overwrite replaces them: leave one out")
    if options.retry_errors:
        return "retry"
    return "resume" if options.resume else "overwrite" if options.overwrite else "refuse"


def _do(options: argparse.Namespace, job: Job, file: Path | None, tally: Tally) -> None:
    existing = _existing(options, file)
    with contextlib.ExitStack() as stack:
        # Opened first: an unwritable output must not cost the work.
        output = stack.enter_context(Output(file, existing, job.kind)) if file else None
        if output:
            output.agree(**job.asked)
        kept = output.kept() if output else ()
        sources = job.listed(output is not None and output.resumed)
        todo = remaining(sources, kept, tally, retry=existing == "retry")
        rows = job.rows(todo, output)
        stack.enter_context(contextlib.closing(rows))  # ends its workers
        for row in _shown(_progress(rows, options, job, tally), options):
            if output:
                output.write(row)
            tally.add(row.error, row.named)


def _rows(
    options: argparse.Namespace, kind: Kind, sources: Iterator[Listed], output: Output | None
) -> Generator[ImageRow]:
    """The rows of `sources`, from Ray or from an engine of this process."""
    if options.ray is not None and options.target is not None:
        raise EngineError("--target: wanted without --ray, whose workers run their own devices")
    model, source = options.model, options.weights
    if options.ray is None:  # refuses what cannot be before weights are read
        arithmetic(options.dtype, resolve(options.device), options.backend, options.target)
    if output:
        model, published = find(model)
        word = source or (published if isinstance(published, str) else options.model)
        model, source = load_state(model, published if source is None else source)
        output.agree(weights=provenance.by_content(word, provenance.fingerprint(source)))
        output.kind = kind = kind.fitted(model)  # its weights may have other classes
    given = vars(options)
    engine = {name: given[name] for name in ("device", "dtype", "backend")}
    engine |= {"weights": source, "classes": given.get("classes")}
    how = {name: given[name] for name in ("batch_size", "exif")}
    if options.ray is not None:
        engines = options.workers or 1
        address = options.ray or None
        return ray.run(sources, address, kind, model=model, workers=engines, **engine, **how)
    size, target = options.batch_size, options.target
    loaded = Engine.load(model, **engine, max_batch=size, target=target)
    return answer(loaded, sources, kind, **how, workers=options.workers)


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does: by an exception, so that files are left whole."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _shown(rows: Iterator[ImageRow], options: argparse.Namespace) -> Iterator[ImageRow]:
    """Print rows on the way as JSON or JSON lines if asked for, else as text if to no file."""
    first = True
    for row in rows:
        if options.json:
            print("[\n" if first else ",\n", json.dumps(row.to_dict()), sep="", end="")
        elif not options.output:
            print(_text(row))
        elif not _file(options):
            print(json.dumps(row.to_dict()), flush=True)
        first = False
        yield row
    if options.json:
        print("[\n]" if first else "\n]")


def _text(row: ImageRow) -> str:
    error = row.error
    lines = row.kind.text(row.result) if error is None else [f"  error: {shortened(error)}"]
    return "\n".join([printable(row.path), *lines])


def _progress(
    rows: Iterator[ImageRow], options: argparse.Namespace, job: Job, tally: Tally
) -> Iterator[ImageRow]:
    """Count on standard error while it is a terminal that the answers do not go to.

    A second look at the folders, beside the work, counts what there is to do: until it is through,
    the time that remains is unknown.
    """
    printed = options.json or not _file(options)
    if not sys.stderr.isatty() or (printed and sys.stdout.isatty()):
        yield from rows
        return
    columns = (
        *(TextColumn(job.kind.verb), BarColumn(), MofNCompleteColumn(), _Rate(job.items)),
        *(TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(job.items, total=None)

        def count() -> None:
            progress.update(task, total=sum(1 for _ in job.listed(True)))

        threading.Thread(target=count, daemon=True).start()
        for row in rows:
            yield row
            progress.update(task, completed=tally.total)


class _Rate(ProgressColumn):
    def __init__(self, items: str) -> None:
        super().__init__()
        self._items = items

    def render(self, task: Task) -> Text:
        rate = f"{task.speed:,.0f} {self._items}/s" if task.speed else ""
        return Text(rate, style="progress.data.speed")
