"""The verb `classify`: one job, from the words of its command line to its exit status."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Generator, Iterator
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
from .classify import Tally, classify, remaining
from .listing import is_table, listing, plain
from .rows import Existing, ImageRow, Output, OutputError


def run_classify(options: argparse.Namespace) -> int:
    """Exit 1 if an image that was named itself, or every image, could not be classified.

    A bad file found in a folder or by a glob is a row with its error and fails nothing. Rows that
    a resumed job has kept count, those of images that are gone do not.
    """
    tally, file = Tally(), _file(options)
    try:
        with _terminated_as_interrupted():
            _job(options, file, tally)
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
        print(f"alexnet-triton: {tally.bad} of {tally.total} images had errors", file=sys.stderr)
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


def _asked(options: argparse.Namespace) -> dict[str, Any]:
    """What decides a row but for the weights, as `provenance` keeps it."""
    from_file = options.model.lower().endswith(".onnx")
    words = sorted(map(plain, options.source))  # in any order
    starts_here = any(is_table(w) or not (is_url(w) or os.path.isabs(w)) for w in words)
    return {
        "model": provenance.of_file(options.model) if from_file else options.model,
        "top": options.top,
        "views": options.views,
        "exif": options.exif or None,
        "classes": options.classes and provenance.of_file(options.classes),
        "sources": words,
        "folder": os.getcwd() if starts_here else None,  # tables, too, may hold relative paths
    }


def _job(options: argparse.Namespace, file: Path | None, tally: Tally) -> None:
    existing = _existing(options, file)
    with contextlib.ExitStack() as stack:
        # Opened first: an unwritable output must not cost the work.
        output = stack.enter_context(Output(file, existing)) if file else None
        if output:
            output.agree(**_asked(options))
        kept = output.kept() if output else ()
        sources = listing(options.source, gone=output is not None and output.resumed)
        todo = remaining(sources, kept, tally, retry=existing == "retry")
        rows = _rows(options, todo, output)
        stack.enter_context(contextlib.closing(rows))  # ends its workers
        for row in _shown(_progress(rows, options, tally), options):
            if output:
                output.write(row)
            tally.add(row.error, row.named)


def _rows(
    options: argparse.Namespace, sources: Iterator[Listed], output: Output | None
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
    given = vars(options)
    engine = {name: given[name] for name in ("device", "dtype", "backend", "classes")}
    engine["weights"] = source
    how = {name: given[name] for name in ("batch_size", "top", "views", "exif")}
    if options.ray is not None:
        engines = options.workers or 1
        address = options.ray or None
        return ray.run(sources, address, model=model, workers=engines, **engine, **how)
    size, target = options.batch_size, options.target
    loaded = Engine.load(model, **engine, max_batch=size, target=target)
    return classify(loaded, sources, **how, workers=options.workers)


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
    lines = [f"  {best.score:7.2%}  {printable(best.label)}" for best in row.predictions]
    if row.error is not None:
        lines = [f"  error: {shortened(row.error)}"]
    return "\n".join([printable(row.path), *lines])


def _progress(
    rows: Iterator[ImageRow], options: argparse.Namespace, tally: Tally
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
        *(TextColumn("classifying"), BarColumn(), MofNCompleteColumn(), _Rate()),
        *(TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("images", total=None)

        def count() -> None:
            progress.update(task, total=sum(1 for _ in listing(options.source, gone=True)))

        threading.Thread(target=count, daemon=True).start()
        for row in rows:
            yield row
            progress.update(task, completed=tally.total)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(
            f"{task.speed:,.0f} images/s" if task.speed else "", style="progress.data.speed"
        )
