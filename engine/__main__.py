"""The shell's way in: `alexnet-triton VERB`, the same as `python -m alexnet_triton.engine VERB`."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .. import weights
from ..weights import WeightsError
from . import onnx_graph
from .demo import demo
from .images import ImageError
from .jobs import Row, classify
from .plan import NUMBERS
from .run import Engine, EngineError, find, load_state, resolve
from .spec import NetworkError
from .summary import summarise
from .verify import verify
from .zoo import NETWORKS

_MODEL = f"{', '.join(sorted(NETWORKS))}, or an .onnx file"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; 0 only on success, 1 with one line on standard error when refused."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
        sys.stdout.flush()
    except (EngineError, ImageError, NetworkError, WeightsError, OSError) as error:
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
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

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
    made.add_argument("source", nargs="+", help="image files, folders, globs or URLs")
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
    made.add_argument("--output", type=Path, help="write one JSON line an image to this file")

    made = verb("summary", "print a network's layers, parameters and MACs", "summary alexnet")
    made.add_argument("model", help=_MODEL)

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


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"wanted 1 or more, got {text}")
    return value


def _demo(options: argparse.Namespace) -> int:
    seen = demo(options.device, options.dtype)
    print(json.dumps(seen.to_dict(), indent=2) if options.json else seen)
    return 0 if seen.passed else 1


def _summary(options: argparse.Namespace) -> int:
    table = summarise(find(options.model)[0])
    print(json.dumps(table.to_dict(), indent=2) if options.json else table)
    return 0


def _verify(options: argparse.Namespace) -> int:
    net, published = find(options.model)
    state = load_state(net, options.weights or published)
    device = resolve(options.device)
    generator = torch.Generator().manual_seed(options.seed)
    shape = (options.images, *net.input_shape)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    dtype = options.dtype or ("fp32" if device.type == "cpu" else "fp16")
    result = verify(net, state, dtype, device, images)
    print(json.dumps(result.to_dict(), indent=2) if options.json else result)
    return 0 if result.first_failure is None else 1


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

    A bad file found in a folder or by a glob is a row with its error and fails nothing.
    """
    with contextlib.ExitStack() as stack:
        # Opened first: an unwritable output must not cost the work.
        output = stack.enter_context(options.output.open("w")) if options.output else None
        engine = Engine.load(
            options.model,
            options.weights,
            device=options.device,
            dtype=options.dtype,
            backend=options.backend,
            max_batch=options.batch_size,
        )
        good = bad = named_bad = 0
        rows = classify(engine, options.source, options.batch_size, options.top, options.views)
        if options.json:
            print("[", end="")
        for row in _progress(rows):
            good += row.error is None
            bad += row.error is not None
            named_bad += row.error is not None and row.named
            if output:
                output.write(json.dumps(row.to_dict()) + "\n")
            if options.json:
                separator = "\n" if good + bad == 1 else ",\n"
                print(separator + json.dumps(row.to_dict()), end="")
            else:
                _print_row(row)
        if options.json:
            print("\n]")
    if bad:
        print(f"alexnet-triton: {bad} of {good + bad} images had errors", file=sys.stderr)
    return 1 if named_bad or not good else 0


def _print_row(row: Row) -> None:
    if row.error is not None:
        print(f"{row.path}\n  error: {row.error}")
        return
    print(row.path)
    for prediction in row.predictions:
        print(f"  {prediction.score:7.2%}  {prediction.label}")


def _progress(rows: Iterator[Row]) -> Iterator[Row]:
    """Count on standard error while it is a terminal that the answers do not go to."""
    if not sys.stderr.isatty() or sys.stdout.isatty():
        yield from rows
        return
    columns = (TextColumn("classifying"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("images", total=None)
        for row in rows:
            yield row
            progress.advance(task)


if __name__ == "__main__":
    sys.exit(main())
