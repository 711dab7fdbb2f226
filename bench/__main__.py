"""The shell's way in: `alexnet-triton-bench VERB`, or `python -m alexnet_triton.bench VERB`.

Here stands what a user can say. What a verb does is `run` in its module of HOMES, imported when the
verb runs: torch and Triton take seconds, which `--help` would wait for.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import get_args

from .. import __version__
from ..engine.devices.cards import CARDS, TARGETS
from ..engine.dtypes import DTYPES
from ..errors import Parser, exit_status
from .choices import ARCHS, CACHE, CLOCKS, FORMS, GPUS, INPUTS, KINDS, PHASES, STRATEGIES, Clock
from .race.candidates import shipped

Verbs = argparse._SubParsersAction

HOMES = {
    "compare": ".compare",
    "env": ".env",
    "inspect": ".inspect.inspect",
    "layers": ".measure.layers",
    "model": ".measure.model",
    "order": ".tune.schedule",
    "pipeline": ".measure.pipeline",
    "race": ".race.race",
    "report": ".report.report",
    "round": ".round",
    "tune": ".tune.tune",
}
"""The module of each verb, from here."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; 0 only on success."""
    options = parser().parse_args(arguments)

    def verb() -> int:
        status: int = import_module(HOMES[options.verb], __package__).run(options)
        return status

    return exit_status("alexnet-triton-bench", verb)


def parser() -> argparse.ArgumentParser:
    """The verbs and their options."""
    parser = Parser(
        prog="alexnet-triton-bench", description="Measure and inspect the Triton kernels."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    add = (_compare, _env, _inspect, _layers, _model, _order, _pipeline, _race, _report, _round)
    for verb in (*add, _tune):
        verb(verbs)
    return parser


def _compare(verbs: Verbs[Parser]) -> None:
    parser = verbs.add_parser(
        "compare",
        help="hold two results files against each other, and fail on what became slower",
        epilog="example: alexnet-triton-bench compare old.json new.json --fail-slower 5%",
    )
    parser.add_argument("old", type=Path, metavar="OLD", help="results, as --json FILE keeps them")
    parser.add_argument("new", type=Path, metavar="NEW", help="results to hold against them")
    parser.add_argument(
        "--fail-slower",
        type=_percentage,
        metavar="PERCENT",
        help="exit status 1 if a row of ours is slower by more; losing a match always fails",
    )
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")


def _env(verbs: Verbs[Parser]) -> None:
    parser = verbs.add_parser(
        "env",
        help="tell machine, GPU and versions, for results and bug reports",
        epilog="example: alexnet-triton-bench env --json",
    )
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")


def _inspect(verbs: Verbs[Parser]) -> None:
    parser = verbs.add_parser(
        "inspect",
        help="compile kernels for GPUs that are not here: resources, occupancy, machine code",
        epilog="example: alexnet-triton-bench inspect conv4 --arch sm_90 "
        "--config default --config BLOCK_N=128,num_stages=4",
    )
    parser.add_argument("layers", nargs="*", metavar="LAYER", help="default: all of the model")
    parser.add_argument("--model", default="alexnet")
    parser.add_argument("--arch", help=f"comma-separated (default: the card's, or {ARCHS})")
    parser.add_argument("--card", help=f"for waves and roofs: {', '.join(GPUS)}")
    parser.add_argument("--batch", type=int, default=1024, help="images (default 1024)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp16")
    parser.add_argument(
        "--config",
        action="append",
        metavar="KEY=VALUE,...",
        help="change the default configuration; several give several reports",
    )
    parser.add_argument(
        "--diff",
        nargs=2,
        metavar=("A", "B"),
        help="two layers, or two configurations of one LAYER, side by side",
    )
    for form, what in FORMS.items():
        parser.add_argument(f"--{form}", metavar="FILE", help=f"write {what}; - prints it")
    parser.add_argument("--check", action="store_true", help="fail if a kernel is refused")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")


def _layers(verbs: Verbs[Parser]) -> None:
    parser = verbs.add_parser(
        "layers",
        help="time every layer beside cuDNN and cuBLAS, each proved right first",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  alexnet-triton-bench layers conv4 conv5+pool5 --batch 1 256 --dtype fp16\n"
        "  alexnet-triton-bench layers --peers torch fused --json layers.json --csv layers.csv\n",
    )
    parser.add_argument("layers", nargs="*", metavar="LAYER", help="default: all, and conv+pool")
    parser.add_argument("--model", default="alexnet", help="a network's name (default: alexnet)")
    parser.add_argument("--dtype", help="fp32, tf32, fp16 or bf16 (default: fp16, on a CPU fp32)")
    parser.add_argument(
        "--target", help=f"match the plan of {TARGETS} in the interpreter instead; no times"
    )
    _measured(parser)


def _model(verbs: Verbs[Parser]) -> None:
    parser = verbs.add_parser(
        "model",
        help="time the whole network beside torch and cuDNN, or predict its time on a card",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  alexnet-triton-bench model alexnet --batch 1 64 256 --dtype fp16 --json model.json\n"
        "  alexnet-triton-bench model --batch 1 --clock graph --peers fused compile\n"
        "  alexnet-triton-bench model --predict h200 --batch 1 256\n",
    )
    parser.add_argument(
        "model", nargs="?", help="a network's name (default: alexnet, on a CPU digits)"
    )
    parser.add_argument(
        "--dtype", nargs="+", help="fp32, tf32, fp16, bf16 (default: fp16, on a CPU fp32)"
    )
    parser.add_argument(
        "--input",
        nargs="+",
        choices=INPUTS,
        default=["float"],
        help="normalised images, or pixels that peers must normalise (default: float)",
    )
    parser.add_argument(
        "--predict", choices=CARDS, help="predict from FLOPs and bytes instead; needs no GPU"
    )
    _measured(parser)


def _order(verbs: Verbs[Parser]) -> None:
    parser = verbs.add_parser(
        "order",
        help="time slices of the first layers and overlapping kernels on a whole network",
        epilog="example: alexnet-triton-bench order alexnet --batch 1 64 1024 --table mine.json",
    )
    parser.add_argument("model", nargs="?", default="alexnet", help="default alexnet")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], metavar="N")
    parser.add_argument("--dtype", help="fp32, tf32, fp16 or bf16 (default: fp16, on a CPU fp32)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    parser.add_argument("--rounds", type=int, help="turns of each (default: 25, on a CPU 3)")
    parser.add_argument(
        "--table",
        type=Path,
        metavar="FILE",
        help="where the fastest goes (default on a GPU: the package's table of the device)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")


def _pipeline(verbs: Verbs[Parser]) -> None:
    parser = verbs.add_parser(
        "pipeline",
        help="time two devices as pipeline, as towers and side by side, against one",
        epilog="example: alexnet-triton-bench pipeline alexnet --devices cuda:0 cuda:1 --batch 512",
    )
    parser.add_argument("model", nargs="?", default="alexnet")
    parser.add_argument("--weights", default="random:0", help="default random:0")
    parser.add_argument(
        "--devices", nargs=2, default=("cuda:0", "cuda:0"), metavar=("FIRST", "SECOND")
    )
    parser.add_argument("--batch", type=int, default=256, help="images a call (default 256)")
    parser.add_argument("--micro-batch", type=int, default=64, help="default 64")
    parser.add_argument("--at", default="auto", help="first step of the second stage")
    parser.add_argument("--dtype", choices=DTYPES, help="default: fp16 on a GPU, fp32 on a CPU")
    parser.add_argument("--repeats", type=int, default=9, help="rounds (default 9)")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")


EPILOG = """example:
  alexnet-triton-bench race conv3 --candidate my_conv.py --candidate winograd

A candidate is a Python file with a function run(problem, x, weight, bias, out, config), or the name
of one that ships: {shipped}.
The exit status is 0 if a candidate was raced and none was disqualified. To refuse a layer that its
algorithm does not solve disqualifies nobody.
"""


def _race(verbs: Verbs[Parser]) -> None:
    parser = verbs.add_parser(
        "race",
        help="prove your own kernels right, and time them beside the engine's and the best peer",
        epilog=EPILOG.format(shipped=", ".join(shipped())),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("layer", help="a convolution or a linear layer, such as conv3 or fc7")
    parser.add_argument(
        "--candidate", action="append", default=[], metavar="FILE", help="may be repeated"
    )
    parser.add_argument("--all-shipped", action="store_true", help="with all candidates that ship")
    parser.add_argument("--model", default="alexnet", help="default alexnet")
    parser.add_argument("--batch", type=int, help="images (default: 256, on a CPU 1)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: fp16 on a GPU, fp32 on a CPU")
    parser.add_argument("--device", help="default: the GPU if there is one, else the CPU")
    parser.add_argument("--clock", help="cold, graph or host (default: cold, on a CPU host)")
    parser.add_argument(
        "--peers", nargs="*", metavar="KIND", help=f"{', '.join(KINDS)} (default: not compile)"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="for a candidate to be proved right, or to take one time (default 120)",
    )
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="of timing, for all together (default 20)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs (default 0)")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")


def _report(verbs: Verbs[Parser]) -> None:
    parser = verbs.add_parser(
        "report",
        help="turn stored results into a page, a terminal summary or README's table",
        epilog="example: alexnet-triton-bench report results.json -o report.html",
    )
    parser.add_argument(
        "results",
        type=Path,
        nargs="+",
        metavar="RESULTS.json",
        help="what a run stored; several of one device make one page",
    )
    parser.add_argument(
        *("-o", "--output"),
        type=Path,
        metavar="FILE",
        help="where the page goes (default: report.html, unless another form is asked for)",
    )
    parser.add_argument("--text", action="store_true", help="print the verdict and the layers")
    parser.add_argument(
        "--readme",
        type=Path,
        metavar="README.md",
        help="rewrite the table between `<!-- results:begin RESULTS.json -->` (the path as seen "
        "from the file's folder) and `<!-- results:end -->`",
    )
    parser.add_argument("--json", action="store_true", help="print the verdict as JSON")


def _round(verbs: Verbs[Parser]) -> None:
    parser = verbs.add_parser(
        "round",
        help="test, tune, measure and report, all in one and inside a given time",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  alexnet-triton-bench round --out bench/results/h200 --minutes 25\n"
        "  alexnet-triton-bench round --out again --earlier bench/results/h200 --minutes 9 "
        "--phases tune layers",
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="results go there as they come")
    add("--minutes", type=float, default=25.0, help="after these it has ended (default 25)")
    add("--phases", nargs="+", choices=PHASES, default=list(PHASES), help="default: all, in order")
    add("--model", help="default alexnet, on a CPU digits")
    add("--dtype", help="fp16 (default on a GPU), bf16, tf32 or fp32 (default on a CPU)")
    add("--batch", type=int, nargs="+", metavar="N", help="default 256 1 1024 64 8 4096; CPU: 1")
    add("--limit", type=int, metavar="N", help="new trials of each search (CPU: 3)")
    add("--again", action="store_true", help="search also what has a row in the table")
    add("--earlier", type=Path, metavar="DIR", help="go on from what an earlier round left there")
    add("--commit", metavar="HASH", help="of this code, where it is not a git checkout")
    add("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    add("--until", type=float, help=argparse.SUPPRESS)  # the process that works is told so


def _tune(verbs: Verbs[Parser]) -> None:
    parser = verbs.add_parser(
        "tune",
        help="search the configurations of layers on this device and keep the fastest right ones",
        description="Each configuration is compiled and judged, compared with float64, and only "
        "then timed; each is a line in the cache at once, so a search can be interrupted, and goes "
        "on where it was. The winners go into the table that the engine reads.",
        epilog="examples: alexnet-triton-bench tune conv4 fc6 --batch 1 256 --budget 300   "
        "alexnet-triton-bench tune --simulate searches.jsonl",
    )
    add = parser.add_argument
    add("layer", nargs="*", help="steps of the plan: conv4, pool1, fc6; input is the stem")
    add("--all", action="store_true", help="every step")
    add("--model", default="alexnet", help="a network's name or .onnx file (default alexnet)")
    add("--batch", type=_count, nargs="+", default=[1], metavar="N", help="images (default 1)")
    add("--dtype", choices=DTYPES, help="default: fp16 on a GPU, fp32 on a CPU")
    add("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    add("--strategy", choices=STRATEGIES, help="default local; with --simulate each")
    add("--seed", type=int, default=0, help="of random and local (default 0)")
    add("--budget", type=float, metavar="SECONDS", help="for all searches together (default: none)")
    add("--limit", type=_count, metavar="N", help="new trials of each search (default: no limit)")
    add(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=V,V",
        help="other values of parameters: BLOCK_M=64,128 num_warps=4",
    )
    add("--cache", type=Path, metavar="FILE", help=f"JSON lines of all trials (default {CACHE})")
    add(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="take what the cache has (default), or try it all anew",
    )
    add("--clock", choices=sorted(set().union(*CLOCKS.values())), help="default graph; CPU: host")
    add("--jobs", type=_count, help="processes that compile ahead (default: cores but one)")
    add("--timeout", type=float, default=60.0, help="seconds for one candidate (default 60)")
    add(
        "--table",
        type=Path,
        metavar="FILE",
        help="where the winners go (default on a GPU: the package's table of the device)",
    )
    add(
        "--write",
        action=argparse.BooleanOptionalAction,
        help="write the table (default on a GPU, and where --table is given)",
    )
    add("--simulate", type=Path, metavar="CACHE", help="replay a stored search, without a GPU")
    add("--repeats", type=_count, default=20, help="seeds of a simulation (default 20)")
    add("--json", action="store_true", help="print JSON and nothing else")


def _measured(parser: argparse.ArgumentParser) -> None:
    """What `layers` and `model` take; the kinds of peers go to the parser's epilog."""
    kinds = "\n".join(f"  {kind:<9} {what}" for kind, what in KINDS.items())
    parser.epilog = f"{parser.epilog}peers:\n{kinds}"
    add = parser.add_argument
    add("--batch", nargs="+", type=int, metavar="N", help="images at once")
    add("--peers", nargs="*", metavar="KIND", help="kinds of peers, see below (default: all)")
    add("--clock", nargs="+", choices=get_args(Clock), help="default: all that the device has")
    add("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    add("--rounds", type=int, help="turns of each (default: 25, on a CPU 3)")
    add("--seconds", type=float, help="no new turns after these, for each race")
    add("--seed", type=int, default=0, help="of the random tensors")
    add("--json", nargs="?", const="-", metavar="FILE", help="keep results; no FILE: print them")
    add("--csv", type=Path, metavar="FILE", help="keep rows for a spreadsheet")


def _percentage(text: str) -> float:
    from .compare import fraction

    try:
        return fraction(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"wanted a percentage like 5%, got {text!r}") from None


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"wanted 1 or more, got {text}")
    return count


if __name__ == "__main__":
    sys.exit(main())
