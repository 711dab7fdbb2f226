"""`bench model`: the whole network beside its peers as a table, or a prediction of its time."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...engine.devices.cards import CARDS
from ...engine.load import arithmetic, find, resolve
from ...errors import printable
from .. import units
from ..records import OURS, Results, Row, times_best_peer
from .endtoend import model_rows
from .options import BATCHES, asked, begun, keep, tell, tell_kept, title
from .predict import predict
from .summary import summaries, warnings

MODEL = {"cuda": "alexnet", "cpu": "digits"}  # what is measured if nothing is said

# --- the table ---------------------------------------------------------------------------------

HEAD = (
    f"{'network':<16} {'batch':>5} {'contestant':<22} {'clock':<5} {'error':>8} {'median us':>11} "
    f"{'p20':>11} {'p80':>11} {'images/s':>10} {'TFLOP/s':>8} {'GB/s':>6} {'% roof':>6} "
    f"{'x peer':>6}"
)


def lines(rows: Sequence[Row]) -> list[str]:
    """One line a row, in their order; ours says how it stands to the best peer."""
    return [_line(row, rows) for row in rows]


def _line(row: Row, rows: Sequence[Row]) -> str:
    who = f"{row.problem:<16} {row.batch:>5} {row.contestant:<22} {row.clock:<5}"
    error = f"{row.max_error:>8.1e}" if row.max_error is not None else f"{'-':>8}"
    note = ", ".join([*(["straw man"] if row.straw_man else []), *([row.note] if row.note else [])])
    if row.median_us is None:
        return f"{who} {error}  {note}"
    roof = f"{row.percent_of_roof:.1f}" if row.percent_of_roof is not None else "-"
    ahead = times_best_peer(row, rows) if row.contestant == OURS else None
    return (
        f"{who} {error} {row.median_us:>11.2f} {row.p20_us:>11.2f} {row.p80_us:>11.2f} "
        f"{units.whole(row.images_per_second):>10} {row.tflops:>8.2f} {row.gbps:>6.0f} {roof:>6} "
        f"{f'{ahead:.2f}' if ahead else '':>6}  {note}".rstrip()
    )


# --- the verb --------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    """Measure the whole network, or predict its time; 1 if a row of ours was not timed."""
    return _predicted(options) if options.predict else _measured(options)


def _predicted(options: argparse.Namespace) -> int:
    network, _ = find(options.model or MODEL["cuda"])
    found = [
        predict(network, CARDS[options.predict], dtype, batch, entry == "uint8")
        for dtype in options.dtype or ["fp16"]
        for batch in options.batch or BATCHES["cuda"]
        for entry in options.input
    ]
    if options.json is None:
        print("\n\n".join(map(str, found)))
        return 0
    text = json.dumps({"predictions": [one.to_dict() for one in found]}, indent=1)
    if options.json == "-":
        print(text)
    else:
        Path(options.json).write_text(text + "\n")
        tell(printable(f"written: {options.json}"))
    return 0


def _measured(options: argparse.Namespace) -> int:
    device = resolve(options.device)
    network, _ = find(options.model or MODEL[device.type])
    dtypes = [arithmetic(name, device, "triton")[0] for name in options.dtype or [None]]
    batches, clocks, effort = asked(options, device)
    results = begun(options, device, dtypes)
    printed = options.json != "-"
    if printed:
        print(title(network.name, device, results))
        print(HEAD)
    for batch in batches:
        for dtype in dtypes:
            for entry in options.input:
                tell(f"{network.name}, batch {batch}, {dtype}, {entry}")
                rows = tuple(
                    model_rows(
                        *(network, dtype, batch, device, clocks),
                        pixels=entry == "uint8",
                        kinds=options.peers,
                        roofs=results.roofs,
                        effort=effort,
                        seed=options.seed,
                    )
                )
                results = replace(results, rows=results.rows + rows)
                if printed:
                    print("\n".join(lines(rows)), flush=True)
                keep(results, options)
    _conclude(results, printed)
    tell_kept(options)
    return 0 if all(row.median_us for row in results.rows if row.contestant == OURS) else 1


def _conclude(results: Results, printed: bool) -> None:
    rows, roofs = results.rows, results.roofs
    if not printed:
        print(json.dumps(_judged(results), indent=1))
        return
    told = [*map(str, summaries(rows, roofs)), *(f"warning: {line}" for line in warnings(rows))]
    print("\n".join(["", *told]))


def _judged(results: Results) -> dict[str, Any]:
    """What `--json` prints: the results, and what follows from them."""
    rows, roofs = results.rows, results.roofs
    return results.to_dict() | {
        "summaries": [each.to_dict() for each in summaries(rows, roofs)],
        "warnings": list(warnings(rows)),
    }
