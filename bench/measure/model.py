"""`bench model`: the whole network beside its peers as a table, or a prediction of its time.

One race (`contest.py`) is one batch in one dtype: the engine and its peers on the same images.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ...engine.devices.cards import CARDS
from ...engine.load import arithmetic, find, resolve
from ...engine.plan import ARITHMETIC
from ..records import OURS
from . import scenario
from .cautions import cautions
from .contest import race
from .predict import predict
from .problem import network_problem, tuned_planner
from .verb import BATCHES, Races, as_table, asked, begun, measured, tell

MODEL = {"cuda": "alexnet", "cpu": "digits"}  # what is measured if nothing is said


def run(options: argparse.Namespace) -> int:
    """Measure the whole network, or predict its time; 1 if a row of ours was not timed."""
    return _predicted(options) if options.predict else _measured(options)


def _predicted(options: argparse.Namespace) -> int:
    network, _ = find(options.model or MODEL["cuda"])
    predictions = [
        predict(network, CARDS[options.predict], dtype, batch, entry == "uint8")
        for dtype in options.dtype or ["fp16"]
        for batch in options.batch or BATCHES["cuda"]
        for entry in options.input
    ]
    if options.json is None:
        print("\n\n".join(map(str, predictions)))
        return 0
    text = json.dumps({"predictions": [one.to_dict() for one in predictions]}, indent=1)
    if options.json == "-":
        print(text)
    else:
        Path(options.json).write_text(text + "\n")
        tell(f"written: {options.json}")
    return 0


def _measured(options: argparse.Namespace) -> int:
    device = resolve(options.device)
    network, _ = find(options.model or MODEL[device.type])
    dtypes = [arithmetic(name, device, "triton")[0] for name in options.dtype or [None]]
    batches, clocks, effort = asked(options, device)
    if options.scenario:
        return scenario.run(options, network, device, dtypes)
    results = begun(options, device, dtypes)

    def races() -> Races:
        for batch in batches:
            for dtype in dtypes:
                planner = tuned_planner(network, ARITHMETIC[dtype], device, options=None)
                for entry in options.input:
                    rows = race(
                        network_problem(planner, dtype, batch, entry == "uint8"),
                        *(device, clocks),
                        kinds=options.peers,
                        roofs=results.roofs,
                        effort=effort,
                        seed=options.seed,
                    )
                    yield f"{network.name}, batch {batch}, {dtype}, {entry}", rows

    results = measured(options, results, races(), *as_table("network", results))
    if options.json != "-":
        print("\n".join(["", *(f"warning: {line}" for line in cautions(results.rows))]))
    return 0 if all(row.median_us for row in results.rows if row.contestant == OURS) else 1
