"""The shell's way in: `alexnet-triton VERB`, the same as `python -m alexnet_triton.engine VERB`.

Here stands what a user can say. `run_VERB` does it, in a module that is imported when the verb
runs: torch and Triton take seconds, which `--help` would wait for.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import Parser, exit_status
from .devices.cards import TARGETS
from .dtypes import DTYPES
from .zoo import NETWORKS

Option = Callable[[argparse.ArgumentParser], object]  # adds itself

HOMES = {"classify": ".jobs.job", "features": ".jobs.features", "distance": ".jobs.distance"}
HOMES |= {"validate": ".jobs.validate"}
"""The module of a verb that has one to itself; the others are in `verbs.py`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; 0 only on success, 1 with one line on standard error when refused."""
    options = parser().parse_args(arguments)

    def verb() -> int:
        home = import_module(HOMES.get(options.verb, ".verbs"), __package__)
        status: int = getattr(home, f"run_{options.verb}")(options)
        return status

    return exit_status("alexnet-triton", verb)


def parser() -> argparse.ArgumentParser:
    """The verbs and their options; made without torch, so that `--help` answers at once."""
    parser = Parser(prog="alexnet-triton", description="AlexNet inference in fused Triton kernels.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    verbs = parser.add_subparsers(
        dest="verb", required=True, metavar="VERB", parser_class=_AnyOrder
    )
    for name, help, example, *options in COMMANDS:
        verb = verbs.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            epilog=f"example: alexnet-triton {example}",
        )
        verb.add_argument("--json", action="store_true", help="print JSON and nothing else")
        for add in options:
            add(verb)
    return parser


def option(*names: str, **how: Any) -> Option:
    """One argument, as `add_argument` takes it."""
    return lambda parser: parser.add_argument(*names, **how)


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


def _percent(text: str) -> float:
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = -1.0
    if not (value == 0 or 1 <= value <= 100):  # 0.565 is a fraction, and everything would pass
        raise argparse.ArgumentTypeError(f"wanted a percentage like 56.5, got {text}")
    return value


def _at_least(least: int) -> Callable[[str], int]:
    def count(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"wanted {least} or more, got {text}")
        return value

    return count


_count, _natural = _at_least(1), _at_least(0)


def _rows_to(what: str) -> Option:
    return option(
        "--output",
        type=Path,
        help=f"write a row {what} to this file, Parquet if it ends in .parquet, JSON lines if in "
        ".jsonl or .ndjson; - is standard output, as JSON lines",
    )


# What several verbs can be told

_KINDS = f"{', '.join(sorted(NETWORKS))}, or an .onnx file"
_NETWORK = option("model", help=_KINDS)
_MODEL = option("--model", default="alexnet", help=f"{_KINDS} (default alexnet)")
_WEIGHTS = option(
    "--weights",
    help="imagenet, digits, random:SEED, or a .pth, .safetensors, .keras or .weights.h5 file "
    "(default: the network's published state)",
)
_DEVICE = option("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
_DTYPE = option("--dtype", choices=DTYPES, help="default: fp16 on a GPU, fp32 on a CPU")
_ENGINE = (_WEIGHTS, _DEVICE, _DTYPE)
_TARGET = option("--target", help=f"run the plan of {TARGETS} in Triton's interpreter")
_BACKEND = option(
    "--backend",
    choices=("triton", "torch"),
    default="triton",
    help="our kernels, or the same by torch, fast on a CPU (default triton)",
)
_BATCH_SIZE = option("--batch-size", type=_count, default=256, help="images a batch (default 256)")
_VIEWS = option(
    "--views",
    choices=("center", "ten-crop"),
    default="center",
    help="average over ten views, as in 2012 (default center)",
)
_EXIF = option(
    "--exif", action="store_true", help="turn pictures as their EXIF says, as viewers do"
)
_CLASSES = option(
    "--classes", metavar="FILE", help="names of the classes, one a line (default: the model's)"
)
_SOURCES = option(
    "source",
    nargs="+",
    help="image files, folders, globs or URLs, and .parquet files with a column `path` of them",
)
_WORKERS = option(
    "--workers",
    type=_natural,
    default=0,
    help="processes that decode images (default 0: this one, between batches); "
    "with --ray, engines at once (default 1)",
)
_RAY = option(
    "--ray",
    nargs="?",
    const="",
    metavar="ADDRESS",
    help="run on the Ray cluster at HOST:PORT, at auto, or without ADDRESS on one "
    "started on this machine for the job; rows come in any order",
)
_KEEPING = (
    option(
        "--resume",
        action="store_true",
        help="keep the rows that are in the output, errors too, and do the images that have none",
    ),
    option("--overwrite", action="store_true", help="replace what is in the output"),
    option(
        "--retry-errors", action="store_true", help="as --resume, and do those with an error again"
    ),
)

# Of each verb its name, its help, an example of it, and its options in the order of its `--help`.
COMMANDS: tuple[tuple[str, str, str, *tuple[Option, ...]], ...] = (
    (
        "demo",
        "classify the held-out digits with the embedded model and compare with torch",
        "demo",
        _DEVICE,
        _DTYPE,
        _TARGET,
        option("--images", type=_count, help="so many of them (default: all)"),
    ),
    (
        "classify",
        "print the most likely classes of images",
        "classify holiday/ cat.jpg --top 3 --output labels.jsonl",
        _SOURCES,
        _MODEL,
        *_ENGINE,
        _TARGET,
        _BACKEND,
        _BATCH_SIZE,
        option("--top", type=_count, default=5, help="classes an image (default 5)"),
        _VIEWS,
        _EXIF,
        _CLASSES,
        _WORKERS,
        _RAY,
        _rows_to("an image"),
        *_KEEPING,
    ),
    (
        "summary",
        "print a network's layers, parameters and MACs",
        "summary alexnet",
        _NETWORK,
        option("--diagram", type=Path, metavar="OUT", help="draw it: .svg, .png or .pdf"),
        option("--target", help=f"name the steps of the plan of {TARGETS} beside it"),
        option("--batch", type=_count, default=256, help="of that plan (default 256)"),
        option("--dtype", choices=DTYPES, default="fp16", help="of that plan (fp16)"),
    ),
    (
        "explain",
        "show how one output number of a layer comes about, and that the engine agrees",
        "explain digits --layer conv3 --filter 0 --at 1,2",
        _NETWORK,
        option("image", nargs="?", help="default: a held-out digit, or seeded noise"),
        option("--layer", required=True, help="a convolution or a linear layer"),
        option("--filter", type=int, default=0, help="counted from 0 (default 0)"),
        option("--at", type=_place, metavar="ROW,COLUMN", help="where in the output"),
        *_ENGINE,
        _BACKEND,
    ),
    (
        "features",
        "write a layer's activations of images as rows, or draw those of one as maps",
        "features holiday/ --layer fc7 --output fc7.parquet",
        _SOURCES,
        option(
            "--layer",
            default="conv1",
            help="after its ReLU; torchvision's names will do, too: features.1 (default conv1)",
        ),
        option(
            "--output",
            type=Path,
            required=True,
            help="a row an image in a .parquet, .jsonl or .ndjson file, or float32 [images, ...] "
            "in a .npy or .safetensors file, NaN where an image has an error, and beside it in "
            "FILE.paths.jsonl which row is whose; or a picture, .png, .svg or .pdf, of one image",
        ),
        option(
            "--filters",
            action="store_true",
            help="draw the first layer's filters too, in OUTPUT with `.filters` before its suffix",
        ),
        _MODEL,
        *_ENGINE,
        _TARGET,
        _BACKEND,
        _BATCH_SIZE,
        _EXIF,
        _WORKERS,
        _RAY,
        *_KEEPING,
    ),
    (
        "distance",
        "measure by LPIPS how far apart two images look, or those of two folders with one name",
        "distance originals/ restored/ --output distances.parquet",
        option("first", help="an image, a URL or a folder"),
        option("second", help="another, of the same size, or a folder with the very same names"),
        option(
            "--size",
            type=_at_least(31),
            metavar="SIDE",
            help="resize both images to SIDE x SIDE (default: they must have one size)",
        ),
        *_ENGINE,
        _TARGET,
        _BACKEND,
        option("--batch-size", type=_count, default=64, help="pairs a batch (default 64)"),
        _EXIF,
        option("--workers", type=_natural, default=0, help="processes that decode (default 0)"),
        _rows_to("a pair"),
        *_KEEPING,
    ),
    (
        "plan",
        "print what would run, and for two devices which way to use them",
        "plan alexnet2012 --devices 2 --batch 1024",
        _NETWORK,
        option("--batch", type=_count, default=256, help="images (default 256)"),
        option("--devices", type=int, choices=(1, 2), default=1),
        option("--target", "--card", default="h200", help=f"{TARGETS} (default h200)"),
        option("--dtype", choices=DTYPES, default="fp16", help="default fp16"),
        option("--micro-batch", type=_count, default=64, help="default 64"),
    ),
    (
        "convert",
        "write weights from any source as one canonical .safetensors file",
        "convert model.keras alexnet.safetensors --model alexnet_single_tower",
        option("source", help="imagenet, random:SEED, or a weights or .onnx file"),
        option("output", type=Path, help="the .safetensors file to write"),
        option("--model", default="alexnet", help=f"whose weights these are: {_KINDS}"),
    ),
    (
        "validate",
        "count how often the first guess, and the first five, are right on labelled images",
        "validate imagenet/val --views ten-crop --expect 56.5",
        option(
            "folder",
            help="a folder of folders, each of them a class; its name is the class's name, its "
            "number, or if none of them is that, its place in sorted order (ImageFolder's rule)",
        ),
        option(
            "--labels",
            metavar="FILE",
            help="instead of folders' names, a CSV file of rows path,label with paths from FOLDER "
            "on and labels by the same rule",
        ),
        _MODEL,
        *_ENGINE,
        _TARGET,
        _BACKEND,
        _BATCH_SIZE,
        _VIEWS,
        _EXIF,
        _CLASSES,
        option("--workers", type=_natural, default=0, help="processes that decode (default 0)"),
        option(
            "--expect",
            type=_percent,
            metavar="PERCENT",
            help="exit 1 if the first guess is right less often, or an image could not be read",
        ),
    ),
    (
        "verify",
        "hold every kernel of a network against float64 on the same weights",
        "verify alexnet --weights random:0",
        option("model", nargs="?", default="digits", help=_KINDS),
        *_ENGINE,
        option("--images", type=_count, default=2, help="random images (default 2)"),
        option("--seed", type=int, default=0, help="of the random images (default 0)"),
        _TARGET,
    ),
)


if __name__ == "__main__":
    sys.exit(main())
