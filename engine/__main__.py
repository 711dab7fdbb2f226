"""The shell's way in: `alexnet-triton VERB`, the same as `python -m alexnet_triton.engine VERB`."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Generator, Iterator, Sequence
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
from ..weights import WeightsError
from . import onnx_graph, ray
from .advice import advise
from .canvas import PictureError, check
from .cards import CARDS
from .demo import demo
from .diagram import draw
from .explain import default_image, explain
from .images import ImageError, Source, to_batch
from .jobs import Tally, classify, remaining
from .listing import listing
from .load import EngineError, find, load_state, numbers, resolve
from .maps import draw_filters, draw_maps
from .plan import NUMBERS
from .rows import Existing, Output, OutputError, Row
from .run import Engine
from .single import Planner
from .spec import NetworkError
from .summary import summarise
from .verify import verify
from .zoo import NETWORKS

_REFUSALS = (EngineError, ImageError, NetworkError, OutputError, PictureError, WeightsError)
_MODEL = f"{', '.join(sorted(NETWORKS))}, or an .onnx file"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; 0 only on success, 1 with one line on standard error when refused."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
        sys.stdout.flush()
    except (*_REFUSALS, OSError) as error:
        if isinstance(error, BrokenPipeError):  # the reader has left, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        print(f"alexnet-triton: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("alexnet-triton: interrupted", file=sys.stderr)
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="alexnet-triton", description="AlexNet inference in fused Triton kernels."
    )
    verbs = parser.add_subparsers(
        dest="verb", required=True, metavar="VERB", parser_class=_AnyOrder
    )

    def verb(name: str, help: str, example: str) -> argparse.ArgumentParser:
        made = verbs.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            epilog=f"example: alexnet-triton {example}",
        )
        made.set_defaults(run=globals()[f"_{name}"])
        made.add_argument("--json", action="store_true", help="print JSON and nothing else")
        return made

    made = verb(
        "demo",
        "classify the held-out digits with the embedded model and compare with torch",
        "demo",
    )
    made.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    made.add_argument("--dtype", choices=NUMBERS, help="default: fp16 on a GPU, fp32 on a CPU")

    made = verb(
        "classify",
        "print the most likely classes of images",
        "classify holiday/ cat.jpg --top 3 --output labels.jsonl",
    )
    made.add_argument(
        "source",
        nargs="+",
        help="image files, folders, globs or URLs, and .parquet files with a column `path` of them",
    )
    _engine_options(made)
    made.add_argument("--backend", choices=("triton", "torch"), default="triton")
    made.add_argument("--batch-size", type=_count, default=256, help="images a batch (default 256)")
    made.add_argument("--top", type=_count, default=5, help="classes an image (default 5)")
    made.add_argument(
        "--views",
        choices=("center", "ten-crop"),
        default="center",
        help="average over ten views, as in 2012 (default center)",
    )
    made.add_argument(
        "--workers",
        type=_natural,
        default=0,
        help="processes that decode images (default 0: this one, between batches); "
        "with --ray, engines at once (default 1)",
    )
    made.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="classify on the Ray cluster at HOST:PORT, at auto, or without ADDRESS on one started "
        "on this machine for the job; rows come in any order",
    )
    made.add_argument(
        "--output",
        type=Path,
        help="write a row an image to this file, Parquet if it ends in .parquet, else JSON lines",
    )
    there = made.add_mutually_exclusive_group()
    there.add_argument(
        "--resume",
        action="store_true",
        help="keep the rows that are in the output, errors too, and do the images that have none",
    )
    there.add_argument("--overwrite", action="store_true", help="replace what is in the output")

    made = verb("summary", "print a network's layers, parameters and MACs", "summary alexnet")
    made.add_argument("model", help=_MODEL)
    made.add_argument("--diagram", type=Path, metavar="OUT", help="draw it: .svg, .png or .pdf")

    made = verb(
        "explain",
        "show how one output number of a layer comes about, and that the engine agrees",
        "explain digits --layer conv3 --filter 0 --at 1,2",
    )
    made.add_argument("model", help=_MODEL)
    made.add_argument("image", nargs="?", help="default: a held-out digit, or seeded noise")
    made.add_argument("--layer", required=True, help="a convolution or a linear layer")
    made.add_argument("--filter", type=int, default=0, help="counted from 0 (default 0)")
    made.add_argument("--at", type=_place, metavar="ROW,COLUMN", help="where in the output")
    _engine_options(made, model=False)

    made = verb(
        "features",
        "draw a layer's feature maps of an image",
        "features cat.jpg --layer conv1 --output maps.png",
    )
    made.add_argument("image", help="an image file or URL")
    made.add_argument("--layer", default="conv1", help="default conv1")
    made.add_argument("--output", type=Path, required=True, help="a .png, .svg or .pdf file")
    made.add_argument(
        "--filters",
        action="store_true",
        help="draw the first layer's filters too, in OUTPUT with `.filters` before its suffix",
    )
    _engine_options(made)

    made = verb(
        "plan",
        "print what would run, and for two devices which way to use them",
        "plan alexnet2012 --devices 2 --batch 1024",
    )
    made.add_argument("model", help=_MODEL)
    made.add_argument("--batch", type=_count, default=256, help="images (default 256)")
    made.add_argument("--devices", type=int, choices=(1, 2), default=1)
    made.add_argument("--card", choices=sorted(CARDS), default="h200", help="default h200")
    made.add_argument("--dtype", choices=NUMBERS, default="fp16", help="default fp16")
    made.add_argument("--micro-batch", type=_count, default=64, help="default 64")

    made = verb(
        "convert",
        "write weights from any source as one canonical .safetensors file",
        "convert model.keras alexnet.safetensors --model alexnet_single_tower",
    )
    made.add_argument("source", help="imagenet, random:SEED, or a weights or .onnx file")
    made.add_argument("output", type=Path, help="the .safetensors file to write")
    made.add_argument("--model", default="alexnet", help=f"whose weights these are: {_MODEL}")

    made = verb(
        "verify",
        "hold every kernel of a network against float64 on the same weights",
        "verify alexnet --weights random:0",
    )
    made.add_argument("model", nargs="?", default="digits", help=_MODEL)
    _engine_options(made, model=False)
    made.add_argument("--images", type=_count, default=2, help="random images (default 2)")
    made.add_argument("--seed", type=int, default=0, help="of the random images (default 0)")
    return parser


def _engine_options(parser: argparse.ArgumentParser, model: bool = True) -> None:
    if model:
        parser.add_argument("--model", default="alexnet", help=f"{_MODEL} (default alexnet)")
    parser.add_argument(
        "--weights",
        help="imagenet, digits, random:SEED, or a .pth, .safetensors, .keras or .weights.h5 file "
        "(default: the network's published state)",
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    parser.add_argument("--dtype", choices=NUMBERS, help="default: fp16 on a GPU, fp32 on a CPU")


class _AnyOrder(argparse.ArgumentParser):
    """Finds an optional positional behind options too, which argparse does only if told to."""

    def parse_known_args(self, *arguments: Any, **named: Any) -> Any:
        # The parse in any order calls back for each of its passes, which are ordinary ones.
        ordinary = vars(self).get("parsing", False)
        self.parsing = True
        try:
            parse = super().parse_known_args if ordinary else self.parse_known_intermixed_args
            return parse(*arguments, **named)
        finally:
            self.parsing = ordinary


def _place(text: str) -> tuple[int, int]:
    try:
        row, column = map(int, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"wanted ROW,COLUMN, got {text}") from None
    return row, column


def _count(text: str) -> int:
    return _at_least(1, text)


def _natural(text: str) -> int:
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    value = int(text)
    if value < least:
        raise argparse.ArgumentTypeError(f"wanted {least} or more, got {text}")
    return value


def _demo(options: argparse.Namespace) -> int:
    seen = demo(options.device, options.dtype)
    print(json.dumps(seen.to_dict(), indent=2) if options.json else seen)
    return 0 if seen.passed else 1


def _summary(options: argparse.Namespace) -> int:
    net = find(options.model)[0]
    if options.diagram:
        draw(net, options.diagram)
    table = summarise(net)
    print(json.dumps(table.to_dict(), indent=2) if options.json else table)
    return 0


def _explain(options: argparse.Namespace) -> int:
    net, published = find(options.model)
    image = to_batch(options.image, net.preprocess) if options.image else default_image(net)
    state = load_state(net, options.weights or published)
    wanted = (options.layer, options.filter, options.at)
    seen = explain(net, state, *wanted, image, device=options.device, dtype=options.dtype)
    print(json.dumps(seen.to_dict(), indent=2) if options.json else seen)
    return 0 if seen.equal else 1


def _features(options: argparse.Namespace) -> int:
    check(options.output)
    net, published = find(options.model)
    state = load_state(net, options.weights or published)
    engine = Engine.load(net, state, device=options.device, dtype=options.dtype, max_batch=1)
    written = {options.output: draw_maps(engine, options.image, options.layer, options.output)}
    if options.filters:
        path = options.output.with_suffix(f".filters{options.output.suffix}")
        written[path] = draw_filters(net, state, path)
    if options.json:
        named = [{"output": str(p), "width": w, "height": h} for p, (w, h) in written.items()]
        print(json.dumps({"model": net.name, "layer": options.layer, "pictures": named}, indent=2))
    else:
        for path, (width, height) in written.items():
            print(f"{path}: {width} x {height}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    net, published = find(options.model)
    state = load_state(net, options.weights or published)
    device = resolve(options.device)
    generator = torch.Generator().manual_seed(options.seed)
    shape = (options.images, *net.input_shape)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    dtype, _ = numbers(options.dtype, device, "triton")
    result = verify(net, state, dtype, device, images)
    print(json.dumps(result.to_dict(), indent=2) if options.json else result)
    return 0 if result.first_failure is None else 1


def _plan(options: argparse.Namespace) -> int:
    """The map of a run on one card, and advice for two of it; needs neither card nor weights."""
    card = CARDS[options.card]
    planner = Planner(find(options.model)[0], NUMBERS[options.dtype], card.arch)
    planned = planner(options.batch)
    advice = None
    if options.devices == 2:
        advice = advise(planner, options.dtype, options.batch, card, options.micro_batch)
    if options.json:
        print(json.dumps({"plan": planned.to_dict(), "advice": advice and advice.to_dict()}))
        return 0
    print(planned)
    if advice:
        print(f"\n{advice}")
    return 0


def _convert(options: argparse.Namespace) -> int:
    if Path(options.source).suffix.lower() == ".onnx":
        net, state = onnx_graph.read(options.source)
    else:
        net = find(options.model)[0]
        state = load_state(net, options.source)
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
            f"{options.output}: {written['tensors']} tensors of {net.name}, "
            f"{written['parameters']:,} parameters"
        )
    return 0


def _classify(options: argparse.Namespace) -> int:
    """Exit 1 if an image that was named itself, or every image, could not be classified.

    A bad file found in a folder or by a glob is a row with its error and fails nothing. Rows that
    a resumed job has kept count, those of images that are gone do not.
    """
    tally = Tally()
    try:
        with _terminated_as_interrupted():
            _job(options, tally)
    except KeyboardInterrupt:
        kept = f"; {options.output} holds the rows so far, go on with --resume"
        words = kept if options.output and tally.total else ""
        print(f"alexnet-triton: interrupted{words}", file=sys.stderr)
        return 130
    if options.output and not options.json:
        print(f"{options.output}: {tally.total} rows")
    if tally.bad:
        print(f"alexnet-triton: {tally.bad} of {tally.total} images had errors", file=sys.stderr)
    return 1 if tally.failed else 0


def _job(options: argparse.Namespace, tally: Tally) -> None:
    existing: Existing = (
        "resume" if options.resume else "overwrite" if options.overwrite else "refuse"
    )
    if existing != "refuse" and not options.output:
        raise OutputError(f"--{existing} is about a file of rows: name it with --output")
    with contextlib.ExitStack() as stack:
        # Opened first: an unwritable output must not cost the work.
        output = stack.enter_context(Output(options.output, existing)) if options.output else None
        kept = output.kept() if output else ()
        rows = _rows(options, remaining(listing(options.source), kept, tally))
        stack.enter_context(contextlib.closing(rows))  # ends its workers
        for row in _shown(_progress(rows, options, tally), options):
            if output:
                output.write(row)
            tally.add(row.error, row.named)


def _rows(options: argparse.Namespace, sources: Iterator[Source | ImageError]) -> Generator[Row]:
    """The rows of `sources`, from Ray or from an engine of this process."""
    engine = {
        "weights": options.weights,
        "device": options.device,
        "dtype": options.dtype,
        "backend": options.backend,
    }
    how = {"batch_size": options.batch_size, "top": options.top, "views": options.views}
    if options.ray is not None:
        engines = options.workers or 1
        address = options.ray or None
        return ray.run(sources, address, model=options.model, workers=engines, **engine, **how)
    loaded = Engine.load(options.model, **engine, max_batch=options.batch_size)
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
    """Print rows on the way: as JSON if asked for, else as text where no file takes them."""
    first = True
    for row in rows:
        if options.json:
            print("[\n" if first else ",\n", json.dumps(row.to_dict()), sep="", end="")
        elif not options.output:
            _print_row(row)
        first = False
        yield row
    if options.json:
        print("[\n]" if first else "\n]")


def _print_row(row: Row) -> None:
    if row.error is not None:
        print(f"{row.path}\n  error: {row.error}")
        return
    print(row.path)
    for prediction in row.predictions:
        print(f"  {prediction.score:7.2%}  {prediction.label}")


def _progress(rows: Iterator[Row], options: argparse.Namespace, tally: Tally) -> Iterator[Row]:
    """Count on standard error while it is a terminal that the answers do not go to.

    A second look at the folders, beside the work, counts what there is to do: until it is through,
    the time that remains is unknown.
    """
    printed = options.json or not options.output
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
            progress.update(task, total=sum(1 for _ in listing(options.source)))

        threading.Thread(target=count, daemon=True).start()
        for row in rows:
            yield row
            progress.update(task, completed=tally.total)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(
            f"{task.speed:,.0f} images/s" if task.speed else "", style="progress.data.speed"
        )


if __name__ == "__main__":
    sys.exit(main())
