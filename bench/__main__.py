"""The shell's way in: `alexnet-triton-bench VERB`, or `python -m alexnet_triton.bench VERB`.

Every verb stands in the module of its name, whose `command` adds its arguments here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..engine import EngineError, NetworkError
from ..kernels.tuning import TuningError
from ..weights import WeightsError
from . import compare, env, inspect, layers, model, order, pipeline, race, report, round, tune
from .lab.space import SpaceError
from .records import RecordError
from .rivals.candidate import CandidateError

VERBS = (compare, env, inspect, layers, model, order, pipeline, race, report, round, tune)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; 0 only on success."""
    parser = argparse.ArgumentParser(
        prog="alexnet-triton-bench", description="Measure and inspect the Triton kernels."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in VERBS:
        verb.command(verbs)
    options = parser.parse_args(arguments)
    try:
        status: int = options.run(options)
    except (
        EngineError,
        NetworkError,
        WeightsError,
        RecordError,
        SpaceError,
        TuningError,
        CandidateError,
    ) as error:
        print(f"alexnet-triton-bench: error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.filename is None:  # nothing that the user named
            raise
        print(f"alexnet-triton-bench: error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
