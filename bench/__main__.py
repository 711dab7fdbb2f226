"""The shell's way in: `alexnet-triton-bench VERB`, or `python -m alexnet_triton.bench VERB`.

Here stands what a user can say. What a verb does is `run` in its module of HOMES, imported when the
verb runs: torch and Triton take seconds, which `--help` would wait for.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

from .. import __version__
from ..engine.devices.cards import CARDS, TARGETS
from ..engine.dtypes import DTYPES
from ..errors import Parser, exit_status
from .choices import (
    ARCHS,
    CACHE,
    FORMS,
    GPUS,
    INPUTS,
    KINDS,
    PHASES,
    SCENARIOS,
    STRATEGIES,
    Clock,
)
from .race.candidates import shipped

HOMES = {
    "compare": ".compare",
    "env": ".env",
    "fill": ".measure.fill",
    "inspect": ".inspect.inspect",
    "layers": ".measure.layers",
    "model": ".measure.model",
    "order": ".tune.schedule",
    "pipeline": ".measure.pipeline",
    "race": ".race.race",
    "report": ".report.report",
    "roofs": ".measure.roofline",
    "round": ".round",
    "tune": ".tune.tune",
}
"""The module of each verb, from here."""

PEERS = "peers:\n" + "".join(f"  {kind:<9} {what}\n" for kind, what in KINDS.items())

CANDIDATES = f"""
A candidate is a Python file with a function run(problem, x, weight, bias, out, config), or the name
of one that ships: {", ".join(shipped())}.
The exit status is 0 if a candidate was raced and none was disqualified. To decline a layer that its
algorithm does not solve disqualifies nobody.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; 0 only on success."""
    options = parser().parse_args(arguments)

    def verb() -> int:
        status: int = import_module(HOMES[options.verb], __package__).run(options)
        return status

    return exit_status("alexnet-triton-bench", verb)


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"wanted 1 or more, got {text}")
    return count


def _percentage(text: str) -> float:
    from .compare import fraction

    try:
        return fraction(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"wanted a percentage like 5%, got {text!r}") from None


SHARED: dict[str, dict[str, Any]] = {
    "batch": {"nargs": "+", "type": int, "metavar": "N", "help": "images at once"},
    "clock": {"nargs": "+", "choices": get_args(Clock), "help": "default: all the device has"},
    "csv": {"type": Path, "metavar": "FILE", "help": "keep rows for a spreadsheet"},
    "device": {"help": "cpu, cuda or cuda:N (default: a GPU if there is one)"},
    "dtype": {"help": "fp32, tf32, fp16 or bf16 (default: fp16, on a CPU fp32)"},
    "json": {"action": "store_true", "help": "print JSON and nothing else"},
    "json [FILE]": {
        "nargs": "?",
        "const": "-",
        "metavar": "FILE",
        "help": "keep results as they come; no FILE: print them",
    },
    "model": {"default": "alexnet", "help": "a network's name or .onnx file (default alexnet)"},
    "peers": {"nargs": "*", "metavar": "KIND", "help": "kinds of peers, see below (default: all)"},
    "rounds": {"type": int, "help": "turns of each (default: 25, on a CPU 3)"},
    "seconds": {"type": float, "help": "no new turns after these, for each race"},
    "seed": {"type": int, "default": 0, "help": "of the random tensors (default 0)"},
    "table": {
        "type": Path,
        "metavar": "FILE",
        "help": "where the winners go (default on a GPU: the package's table of the device)",
    },
}
"""Options that several verbs take."""

MEASURED = ("batch", "peers", "clock", "device", "rounds", "seconds", "seed", "csv", "json [FILE]")

Add = Callable[..., argparse.Action]


def parser() -> argparse.ArgumentParser:
    """The verbs and their options."""
    parser = Parser(
        prog="alexnet-triton-bench", description="Measure and inspect the Triton kernels."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, help: str, *examples: str, shared: Sequence[str], more: str = "") -> Add:
        """A verb with these of the shared options; to be completed by its own."""
        lines = "".join(f"  alexnet-triton-bench {name} {example}\n" for example in examples)
        parser = verbs.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog=f"examples:\n{lines}{more}",
        )
        for option in shared:
            parser.add_argument(f"--{option.split()[0]}", **SHARED[option])
        return parser.add_argument

    add = verb(
        "compare",
        "hold two results files against each other, and fail on what became slower",
        "old.json new.json --fail-slower 5%",
        shared=["json"],
    )
    add("old", type=Path, metavar="OLD", help="results, as --json FILE keeps them")
    add("new", type=Path, metavar="NEW", help="results to hold against them")
    add(
        "--fail-slower",
        type=_percentage,
        metavar="PERCENT",
        help="exit status 1 if a row of ours is slower by more; losing a match always fails",
    )

    verb(
        "env",
        "tell machine, GPU and versions, for results and bug reports",
        "--json",
        shared=["json"],
    )

    verb(
        "fill",
        "measure how fast operands arrive at the multiprocessors, for the cost model",
        "--json fill.json",
        shared=["device", "json [FILE]"],
    )

    add = verb(
        "inspect",
        "compile kernels for GPUs that are not here: resources, occupancy, machine code",
        "conv4 --arch sm_90 --config default --config BLOCK_N=128,num_stages=4",
        shared=["model", "json"],
    )
    add("layers", nargs="*", metavar="LAYER", help="default: all of the model")
    add("--arch", help=f"comma-separated (default: the card's, or {ARCHS})")
    add("--card", help=f"for waves and roofs: {', '.join(GPUS)}")
    add("--batch", type=int, default=1024, help="images (default 1024)")
    add("--dtype", choices=DTYPES, default="fp16", help="default fp16")
    add(
        "--config",
        action="append",
        metavar="KEY=VALUE,...",
        help="change the default configuration; several give several reports",
    )
    add("--code", choices=FORMS, help="print machine code, PTX or Triton's GPU IR instead")
    add("--check", action="store_true", help="fail if a kernel is refused")

    add = verb(
        "layers",
        "time every layer beside cuDNN and cuBLAS, each proved right first",
        "conv4 conv5+pool5 --batch 1 256 --dtype fp16",
        "--peers torch fused --json layers.json --csv layers.csv",
        shared=["model", "dtype", *MEASURED],
        more=PEERS,
    )
    add("layers", nargs="*", metavar="LAYER", help="default: all, and conv+pool")
    add("--target", help=f"match the plan of {TARGETS} in the interpreter instead; no times")

    add = verb(
        "model",
        "time the whole network beside torch and cuDNN, or predict its time on a card",
        "alexnet --batch 1 64 256 --dtype fp16 --json model.json",
        "--batch 1 --clock graph --peers fused compile",
        "--predict h200 --batch 1 256",
        shared=MEASURED,
        more=PEERS,
    )
    add("model", nargs="?", help="a network's name (default: alexnet, on a CPU digits)")
    add("--dtype", nargs="+", help=SHARED["dtype"]["help"])
    add(
        "--input",
        nargs="+",
        choices=INPUTS,
        default=["float"],
        help="normalised images, or pixels that peers must normalise (default: float)",
    )
    add(
        "--scenario",
        nargs="+",
        choices=SCENARIOS,
        help="latency of single calls, or images/s of a stream, instead",
    )
    add("--calls", type=int, help="calls, or images of the stream (default 2048, 512; CPU: 16)")
    add("--predict", choices=CARDS, help="a card's bound and estimate instead; needs no GPU")

    add = verb(
        "order",
        "time slices of the first layers and overlapping kernels on a whole network",
        "alexnet --batch 1 64 1024 --table mine.json",
        shared=["dtype", "device", "rounds", "seconds", "table", "csv", "json [FILE]"],
    )
    add("model", nargs="?", default="alexnet", help="default alexnet")
    add("--batch", type=int, nargs="+", default=[1], metavar="N", help="images (default 1)")

    add = verb(
        "pipeline",
        "time two devices as pipeline, as towers and side by side, against one",
        "alexnet --devices cuda:0 cuda:1 --batch 512",
        shared=["json [FILE]", "csv"],
    )
    add("model", nargs="?", default="alexnet", help="default alexnet")
    add("--devices", nargs=2, default=("cuda:0", "cuda:0"), metavar=("FIRST", "SECOND"))
    add("--batch", type=int, default=256, help="images a call (default 256)")
    add("--micro-batch", type=int, default=64, help="default 64")
    add("--at", default="auto", help="first step of the second stage")
    add("--dtype", choices=DTYPES, help="default: fp16 on a GPU, fp32 on a CPU")
    add("--rounds", type=int, default=9, help="turns of each (default 9)")

    add = verb(
        "race",
        "prove your own kernels right, and time them beside the engine's and the best peer",
        "conv3 --candidate my_conv.py --candidate winograd",
        shared=["device", "seed", "json"],
        more=CANDIDATES,
    )
    add("layer", help="a convolution or a linear layer, such as conv3 or fc7")
    add("--candidate", action="append", default=[], metavar="FILE", help="may be repeated")
    add("--all-shipped", action="store_true", help="with all candidates that ship")
    add("--model", help="default: alexnet, on a CPU tiles: conv3 and fc6 of 2 to 3 tiles each way")
    add("--batch", type=int, help="images (default: 256, on a CPU 1, of tiles 131)")
    add("--dtype", choices=DTYPES, help="default: fp16 on a GPU, fp32 on a CPU")
    add("--peers", nargs="*", metavar="KIND", help=f"{', '.join(KINDS)} (default: not compile)")
    add(
        "--timeout",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="for a candidate to be proved right, or to take one time (default 120)",
    )
    add("--seconds", type=float, default=20.0, help="of timing, for all together (default 20)")

    add = verb(
        "report",
        "turn stored results into a page, a terminal summary or README's table",
        "results.json -o report.html",
        shared=[],
    )
    add(
        "results",
        type=Path,
        nargs="+",
        metavar="RESULTS.json",
        help="what a run stored; several of one device make one page",
    )
    add(
        *("-o", "--output"),
        type=Path,
        metavar="FILE",
        help="where the page goes (default: report.html, unless another form is asked for)",
    )
    add("--text", action="store_true", help="print the verdict and the layers")
    add(
        "--readme",
        type=Path,
        metavar="README.md",
        help="rewrite the table between `<!-- results:begin RESULTS.json -->` (the path as seen "
        "from the file's folder) and `<!-- results:end -->`",
    )
    add("--json", action="store_true", help="print the verdict as JSON")

    add = verb(
        "roofs",
        "measure what this device can do at best: products by dtype, and bytes copied",
        "--dtype fp16 tf32 --json roofs.json",
        shared=["device", "json [FILE]"],
    )
    add("--dtype", nargs="+", help=SHARED["dtype"]["help"])

    add = verb(
        "round",
        "test, tune, measure and report in a few minutes, call after call",
        "--dry",
        "--out bench/results/h200",
        "--out again --continue bench/results/h200",
        shared=["device"],
    )
    add("--out", type=Path, metavar="DIR", help="results go there as they come")
    add("--minutes", type=float, default=8.5, help="after these it has ended (default 8.5)")
    add("--phases", nargs="+", choices=PHASES, help="default: the next that fit, in order")
    add("--model", help="default alexnet, on a CPU digits")
    add("--continue", dest="continued", type=Path, metavar="DIR", help="go on from a call's --out")
    add("--commit", metavar="HASH", help="of this code, where it is not a git checkout")
    add("--dry", action="store_true", help="print the schedule, and fail if it does not fit")

    add = verb(
        "tune",
        "search the configurations of layers on this device and keep the fastest right ones",
        "conv4 fc6 --batch 1 256 --budget 300",
        "--all --batch 256 1 --budget 1800",
        "--simulate searches.jsonl",
        shared=["model", "device", "table", "json"],
        more="""
Each configuration is compiled and judged, compared with float64, and only then timed; each is a
line in the cache at once, so a search can be interrupted, and goes on where it was. The costliest
steps come first. In the end the best few and the default take turns. A winner whose 80th percentile
lies below the default's 20th goes into the table that the engine reads; else the default does.
""",
    )
    add(
        "layer",
        nargs="*",
        help="steps of the plan: conv4, pool1, fc6; input is the pass over the images",
    )
    add("--all", action="store_true", help="every step that has no row in the table yet")
    add("--again", action="store_true", help="with --all: those that have one, too")
    add("--batch", type=_count, nargs="+", default=[1], metavar="N", help="images (default 1)")
    add("--dtype", choices=DTYPES, help="default: fp16 on a GPU, fp32 on a CPU")
    add("--strategy", choices=STRATEGIES, help="default local; with --simulate each")
    add("--short", action="store_true", help="the kernels' own short lists alone, cheapest first")
    add("--fill", type=float, metavar="BYTES", help="with --short: measured operands a clock")
    add("--seed", type=int, default=0, help="of random and local (default 0)")
    add("--budget", type=float, metavar="SECONDS", help="for all searches together (default: none)")
    add("--limit", type=_count, metavar="N", help="new trials of each search (default: no limit)")
    add("--cache", type=Path, metavar="FILE", help=f"JSON lines of all trials (default {CACHE})")
    add("--jobs", type=_count, help="processes that compile ahead (default: cores but one)")
    add("--timeout", type=float, default=60.0, help="seconds for one candidate (default 60)")
    add("--simulate", type=Path, metavar="CACHE", help="replay a stored search, without a GPU")
    return parser


if __name__ == "__main__":
    sys.exit(main())
