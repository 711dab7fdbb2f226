"""What each verb of the shell does: `run_VERB` takes its options and returns its exit status.

It is imported when a verb runs and not before (`__main__.py`): with torch, Triton and rich it takes
seconds, which `--help` would wait for.
"""

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

import torch
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

from .. import weights
from ..errors import printable, shortened
from .demo import demo
from .devices.advice import advise
from .devices.cards import CARDS, find_card
from .devices.planner import Planner
from .images import ImageError, Source, is_url, to_batch
from .jobs import provenance, ray
from .jobs.classify import Tally, classify, remaining
from .jobs.listing import is_table, listing, plain
from .jobs.rows import Existing, Output, OutputError, Row
from .load import EngineError, aim, arithmetic, find, load_state, one_of, resolve
from .onnx import graph as onnx_graph
from .pictures.canvas import check
from .pictures.diagram import draw
from .pictures.explain import default_image, explain
from .pictures.maps import draw_filters, draw_maps
from .plan import ARITHMETIC
from .run import Engine
from .spec import Network
from .summary import summarise
from .verify import verify


def run_demo(options: argparse.Namespace) -> int:
    """The held-out digits; 1 if an answer is not torch's."""
    seen = demo(options.device, options.dtype, options.target, options.images)
    print(json.dumps(seen.to_dict(), indent=2) if options.json else seen)
    return 0 if seen.passed else 1


def run_summary(options: argparse.Namespace) -> int:
    """The table of layers, and the picture of them if one is wanted."""
    net = find(options.model)[0]
    if options.diagram:
        draw(net, options.diagram)
        print(f"{printable(str(options.diagram))}: the diagram", file=sys.stderr)
    planned = None
    if options.target is not None:
        planned = _planner(net, options.target, options.dtype)(options.batch)
    table = summarise(net, planned)
    print(json.dumps(table.to_dict(), indent=2) if options.json else table)
    return 0


def run_explain(options: argparse.Namespace) -> int:
    """One output number taken apart; 1 if the engine's is another."""
    net, published = find(options.model)
    image = to_batch(options.image, net.preprocess) if options.image else default_image(net)
    net, state = load_state(net, published if options.weights is None else options.weights)
    wanted = (options.layer, options.filter, options.at)
    how = {"device": options.device, "dtype": options.dtype, "backend": options.backend}
    seen = explain(net, state, *wanted, image, **how)
    print(json.dumps(seen.to_dict(), indent=2) if options.json else seen)
    return 0 if seen.equal else 1


def run_features(options: argparse.Namespace) -> int:
    """Pictures of a layer's maps, and of the first layer's filters if they are wanted."""
    check(options.output)
    net, published = find(options.model)
    net, state = load_state(net, published if options.weights is None else options.weights)
    how = {"device": options.device, "dtype": options.dtype, "backend": options.backend}
    engine = Engine.load(net, state, **how, max_batch=1)
    written = {options.output: draw_maps(engine, options.image, options.layer, options.output)}
    if options.filters:
        path = options.output.with_suffix(f".filters{options.output.suffix}")
        written[path] = draw_filters(net, state, path)
    if options.json:
        named = [{"output": str(p), "width": w, "height": h} for p, (w, h) in written.items()]
        print(json.dumps({"model": net.name, "layer": options.layer, "pictures": named}, indent=2))
    else:
        for path, (width, height) in written.items():
            print(f"{printable(str(path))}: {width} x {height}")
    return 0


def run_verify(options: argparse.Namespace) -> int:
    """Every layer beside float64; 1 if one is out of tolerance."""
    net, published = find(options.model)
    net, state = load_state(net, published if options.weights is None else options.weights)
    device = resolve(options.device or (options.target and "cpu"))
    generator = torch.Generator().manual_seed(options.seed)
    shape = (options.images, *net.input_shape)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    dtype, _ = arithmetic(options.dtype, device, "triton", options.target)
    result = verify(net, state, dtype, device, images, options.target)
    print(json.dumps(result.to_dict(), indent=2) if options.json else result)
    return 0 if result.first_failure is None else 1


def run_plan(options: argparse.Namespace) -> int:
    """The map of a run on one card, and advice for two of it; needs neither card nor weights."""
    planner = _planner(find(options.model)[0], options.target, options.dtype)
    planned = planner(options.batch)
    advice = None
    if options.devices == 2:
        key = find_card(options.target) or options.target
        one_of("--target for --devices 2", key, CARDS)  # whose rates are known
        card = CARDS[key]
        advice = advise(planner, options.dtype, options.batch, card, options.micro_batch)
    if options.json:
        print(json.dumps({"plan": planned.to_dict(), "advice": advice and advice.to_dict()}))
        return 0
    print(planned)
    if advice:
        print(f"\n{advice}")
    return 0


def _planner(network: Network, target: str, dtype: str) -> Planner:
    """Plans as an engine on that card makes them; nothing runs, so any dtype will do."""
    aimed = aim(target, torch.device("cpu"))
    return Planner(network, ARITHMETIC[dtype], aimed.arch, tuned=aimed.tuned, options=None)


def run_convert(options: argparse.Namespace) -> int:
    """The canonical state of any source as one file."""
    if Path(options.source).suffix.lower() == ".onnx":
        net, state = onnx_graph.read(options.source)
    else:
        net = find(options.model)[0]
        net, state = load_state(net, options.source)
    weights.save(state, options.output)
    written = {
        "model": net.name,
        "output": str(options.output),
        "tensors": len(state),
        "parameters": sum(tensor.numel() for tensor in state.values()),
    }
    if options.json:
        print(json.dumps(written, indent=2))
    else:
        print(
            f"{printable(str(options.output))}: {written['tensors']} tensors of {net.name}, "
            f"{written['parameters']:,} parameters"
        )
    return 0


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
    asked = [name for name in ("resume", "retry_errors", "overwrite") if getattr(options, name)]
    if asked and not file:
        flag = asked[0].replace("_", "-")
        raise OutputError(f"--{flag} is about a file of rows: name it with --output")
    if options.json and options.output and not file:
        raise OutputError("--json: wanted a file beside it, got --output -, which is JSON lines")
    if options.retry_errors and options.overwrite:
        raise OutputError("--retry-errors keeps rows, --overwrite replaces them: leave one out")
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
    options: argparse.Namespace, sources: Iterator[Source | ImageError], output: Output | None
) -> Generator[Row]:
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
    engine = {
        "weights": source,
        "device": options.device,
        "dtype": options.dtype,
        "backend": options.backend,
        "classes": options.classes,
    }
    how = {name: getattr(options, name) for name in ("batch_size", "top", "views", "exif")}
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


def _shown(rows: Iterator[Row], options: argparse.Namespace) -> Iterator[Row]:
    """Print rows on the way as JSON or JSON lines if asked for, else as text if to no file."""
    first = True
    for row in rows:
        if options.json:
            print("[\n" if first else ",\n", json.dumps(row.to_dict()), sep="", end="")
        elif not options.output:
            _print_row(row)
        elif not _file(options):
            print(json.dumps(row.to_dict()), flush=True)
        first = False
        yield row
    if options.json:
        print("[\n]" if first else "\n]")


def _print_row(row: Row) -> None:
    if row.error is not None:
        print(f"{printable(row.path)}\n  error: {shortened(row.error)}")
        return
    print(printable(row.path))
    for prediction in row.predictions:
        print(f"  {prediction.score:7.2%}  {printable(prediction.label)}")


def _progress(rows: Iterator[Row], options: argparse.Namespace, tally: Tally) -> Iterator[Row]:
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
