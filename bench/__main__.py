"""The shell's way in: `alexnet-triton-bench VERB`, or `python -m alexnet_triton.bench VERB`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from .env import environment


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
    options = parser.parse_args(arguments)
    status: int = options.run(options)
    return status


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
