"""The shell's way in: `alexnet-triton VERB`, the same as `python -m alexnet_triton.engine VERB`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import Parser, exit_status
from .devices.cards import TARGETS
from .dtypes import DTYPES
from .zoo import NETWORKS

_MODEL = f"{', '.join(sorted(NETWORKS))}, or an .onnx file"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; 0 only on success, 1 with one line on standard error when refused."""
    options = parser().parse_args(arguments)

    def verb() -> int:
        from . import verbs  # takes seconds, so not before a verb is to run

        status: int = getattr(verbs, f"run_{options.verb}")(options)
        return status

    return exit_status("alexnet-triton", verb)


def parser() -> argparse.ArgumentParser:
    """The verbs and their options; made without torch, so that `--help` answers at once."""
    parser = Parser(prog="alexnet-triton", description="AlexNet inference in fused Triton kernels.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
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
        made.add_argument("--json", action="store_true", help="print JSON and nothing else")
        return made

    made = verb(
        "demo",
        "classify the held-out digits with the embedded model and compare with torch",
        "demo",
    )
    made.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    made.add_argument("--dtype", choices=DTYPES, help="default: fp16 on a GPU, fp32 on a CPU")
    _target(made)
    made.add_argument("--images", type=_count, help="so many of them (default: all)")

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
    _target(made)
    _backend(made)
    made.add_argument("--batch-size", type=_count, default=256, help="images a batch (default 256)")
    made.add_argument("--top", type=_count, default=5, help="classes an image (default 5)")
    made.add_argument(
        "--views",
        choices=("center", "ten-crop"),
        default="center",
        help="average over ten views, as in 2012 (default center)",
    )
    made.add_argument(
        "--exif", action="store_true", help="turn pictures as their EXIF says, as viewers do"
    )
    made.add_argument(
        "--classes", metavar="FILE", help="names of the classes, one a line (default: the model's)"
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
        help="write a row an image to this file, Parquet if it ends in .parquet, JSON lines if in "
        ".jsonl or .ndjson; - is standard output, as JSON lines",
    )
    there = made.add_mutually_exclusive_group()
    there.add_argument(
        "--resume",
        action="store_true",
        help="keep the rows that are in the output, errors too, and do the images that have none",
    )
    there.add_argument("--overwrite", action="store_true", help="replace what is in the output")
    made.add_argument(
        "--retry-errors", action="store_true", help="as --resume, and do those with an error again"
    )

    made = verb("summary", "print a network's layers, parameters and MACs", "summary alexnet")
    made.add_argument("model", help=_MODEL)
    made.add_argument("--diagram", type=Path, metavar="OUT", help="draw it: .svg, .png or .pdf")
    made.add_argument("--target", help=f"name the steps of the plan of {TARGETS} beside it")
    made.add_argument("--batch", type=_count, default=256, help="of that plan (default 256)")
    made.add_argument("--dtype", choices=DTYPES, default="fp16", help="of that plan (fp16)")

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
    _backend(made)

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
    _backend(made)

    made = verb(
        "plan",
        "print what would run, and for two devices which way to use them",
        "plan alexnet2012 --devices 2 --batch 1024",
    )
    made.add_argument("model", help=_MODEL)
    made.add_argument("--batch", type=_count, default=256, help="images (default 256)")
    made.add_argument("--devices", type=int, choices=(1, 2), default=1)
    made.add_argument("--target", "--card", default="h200", help=f"{TARGETS} (default h200)")
    made.add_argument("--dtype", choices=DTYPES, default="fp16", help="default fp16")
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
    _target(made)
    return parser


def _target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", help=f"run the plan of {TARGETS} in Triton's interpreter")


def _backend(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend",
        choices=("triton", "torch"),
        default="triton",
        help="our kernels, or the same by torch, fast on a CPU (default triton)",
    )


def _engine_options(parser: argparse.ArgumentParser, model: bool = True) -> None:
    if model:
        parser.add_argument("--model", default="alexnet", help=f"{_MODEL} (default alexnet)")
    parser.add_argument(
        "--weights",
        help="imagenet, digits, random:SEED, or a .pth, .safetensors, .keras or .weights.h5 file "
        "(default: the network's published state)",
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: fp16 on a GPU, fp32 on a CPU")


class _AnyOrder(Parser):
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
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"wanted {least} or more, got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
