"""The shell's way in: `alexnet-triton-bench VERB`, or `python -m alexnet_triton.bench VERB`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from ..engine import EngineError, NetworkError
from ..engine.plan import NUMBERS
from ..weights import WeightsError
from .env import environment
from .pipeline import compare


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; 0 only on success."""
    parser = argparse.ArgumentParser(
        prog="alexnet-triton-bench", description="Measure and inspect the Triton kernels."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    env = verbs.add_parser(
        "env",
        help="tell machine, GPU and versions, for results and bug reports",
        epilog="example: alexnet-triton-bench env --json",
    )
    env.add_argument("--json", action="store_true", help="print JSON and nothing else")
    env.set_defaults(run=_env)

    pipeline = verbs.add_parser(
        "pipeline",
        help="time two devices as pipeline, as towers and side by side, against one",
        epilog="example: alexnet-triton-bench pipeline alexnet --devices cuda:0 cuda:1 --batch 512",
    )
    pipeline.add_argument("model", nargs="?", default="alexnet")
    pipeline.add_argument("--weights", default="random:0", help="default random:0")
    pipeline.add_argument(
        "--devices", nargs=2, default=("cuda:0", "cuda:0"), metavar=("FIRST", "SECOND")
    )
    pipeline.add_argument("--batch", type=int, default=256, help="images a call (default 256)")
    pipeline.add_argument("--micro-batch", type=int, default=64, help="default 64")
    pipeline.add_argument("--at", default="auto", help="first step of the second stage")
    pipeline.add_argument("--dtype", choices=NUMBERS, help="default: fp16 on a GPU, fp32 on a CPU")
    pipeline.add_argument("--repeats", type=int, default=9, help="rounds (default 9)")
    pipeline.add_argument("--json", action="store_true", help="print JSON and nothing else")
    pipeline.set_defaults(run=_pipeline)

    options = parser.parse_args(arguments)
    try:
        status: int = options.run(options)
    except (EngineError, NetworkError, WeightsError) as error:
        print(f"alexnet-triton-bench: error: {error}", file=sys.stderr)
        return 1
    return status


def _pipeline(options: argparse.Namespace) -> int:
    dtype = options.dtype or ("fp32" if options.devices[0] == "cpu" else "fp16")
    found = compare(
        options.model,
        options.weights,
        (options.devices[0], options.devices[1]),
        options.batch,
        dtype,
        options.at,
        options.micro_batch,
        options.repeats,
    )
    if options.json:
        print(json.dumps({"environment": environment(), **found.to_dict()}, indent=2))
    else:
        print(found)
    return 0 if found.passed else 1


def _env(options: argparse.Namespace) -> int:
    found = environment()
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        for name, value in found.items():
            print(f"{name:<20} {'-' if value is None else value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
