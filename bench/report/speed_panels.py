"""Panels that say how fast: layers as blocks with all their rows, roofline, batch sizes."""

from __future__ import annotations

from collections.abc import Sequence

from .. import units
from ..records import OURS, Results, Row, best_peer, times_best_peer
from . import charts, story
from .blocks import Block, blocks, steps
from .page import details, either, figure, legend, missing, pair, paragraph, section, switch, table
from .story import View, right

# Bytes that the packed views of a panel may take in a page with all its room.
LAYERS, ROWS, ROOFLINE, BATCHES = 40_000, 60_000, 40_000, 30_000


def layers(results: Results, room: float = 1) -> str:
    """AlexNet as a row of blocks, and every row of the layer that is chosen."""
    title = "Where the time goes"
    found = _choices(results)
    if not found:
        return section("layers", title, _no_layers())
    shown = {name: [_blocks(view, batch)] for name, view, batch in found}
    first = found[0][1]
    named = list(dict.fromkeys(row.problem for row in first.rows))
    tables = {"all layers": [_all_layers(first, found[0][2])]}
    tables |= {name: [_one_layer(results, first.subject, name)] for name in named}
    return section(
        "layers",
        title,
        paragraph(
            "A block is as wide as its layer's share of the time and as bright as the layer is "
            "near to the roof; below its name, how many times as fast as the best peer it is. "
            "Choose a block to see the layer's rows.",
            "note",
        ),
        switch("blocks", "Shown:", shown, LAYERS * room),
        switch("layers", "Rows of", tables, ROWS * room),
    )


def _no_layers() -> str:
    return missing("No layer was timed. To fill this:", "alexnet-triton-bench layers --json FILE")


def _choices(results: Results) -> list[tuple[str, View, int]]:
    """Every view of the layers at every batch size, the main one first."""
    found = []
    for view in story.views(results, "layers"):
        main = story.main_batch(results, view)
        batches = [main, *(b for b in view.batches if b != main)]
        found += [(f"batch {batch}, {view.name}", view, batch) for batch in batches]
    return found


def _blocks(view: View, batch: int) -> str:
    rows = story.apart(view.ours(batch))
    made = [
        Block(
            row.problem,
            row.median_us or 0.0,
            row.percent_of_roof,
            times_best_peer(row, view.at(row.batch)),
        )
        for row in rows
    ]
    total = sum(block.us for block in made)
    caption = (
        f"Batch {batch}, {view.name}: {units.time(total)} for {len(made)} "
        f"layer{'s' if len(made) > 1 else ''} timed one by one."
    )
    return figure(caption, either(blocks(made), steps(made)))


def _all_layers(view: View, batch: int) -> str:
    head = ["layer", "time", "share", "rate", "of roof", "best peer", "its time", "x best peer"]
    rows = view.ours(batch)
    alone = story.apart(rows)
    total = sum(row.median_us or 0.0 for row in alone)
    cells = []
    for row in rows:
        peer = best_peer(row, view.at(row.batch))
        cells.append(
            [
                row.problem,
                units.time(row.median_us),
                units.percent(100 * (row.median_us or 0.0) / total) if row in alone else "-",
                _rate(row),
                units.percent(row.percent_of_roof),
                peer.contestant if peer else "-",
                units.time(peer.median_us if peer else None),
                units.times(times_best_peer(row, view.at(row.batch))),
            ]
        )
    return table(f"Our layers, batch {batch}, {view.name}", head, cells)


def _rate(row: Row) -> str:
    return "-" if row.tflops is None or not row.flops else units.si(row.tflops * 1e12, "FLOP/s")


def _one_layer(results: Results, network: str, name: str) -> str:
    rows = [
        r for r in results.rows if (r.section, r.network, r.problem) == ("layers", network, name)
    ]
    return row_table(f"{name} of {network}, every contestant", rows)


def row_table(caption: str, rows: Sequence[Row]) -> str:
    """Rows with all that was measured of each."""
    head = ["contestant", "dtype", "clock", "batch", "time", "p20 to p80", "rate", "moved"]
    head += ["of roof", "x best peer", "error (tolerance)", "match"]
    cells = [
        [
            row.contestant + (" (straw man)" if row.straw_man else ""),
            row.dtype,
            row.clock,
            str(row.batch),
            *_timed(row, rows),
            f"{units.power(row.max_error)} ({units.power(row.tolerance)})",
            "yes" if row.matched else row.note or "NO",
        ]
        for row in sorted(rows, key=lambda r: (r.dtype, r.clock, r.batch, r.median_us or 1e30))
    ]
    return table(caption, head, cells, words=3)


def _timed(row: Row, rivals: Sequence[Row]) -> list[str]:
    """No speed without a match."""
    if not right(row):
        return ["not timed" if row.median_us is None else "not shown", *["-"] * 5]
    return [
        units.time(row.median_us),
        units.span(row.p20_us, row.p80_us),
        _rate(row),
        units.si((row.gbps or 0.0) * 1e9, "B/s"),
        units.percent(row.percent_of_roof),
        units.times(times_best_peer(row, rivals)),
    ]


def roofline(results: Results, room: float = 1) -> str:
    """The layers and their best peers under the measured roofs."""
    title = "Roofline"
    drawn = {
        name: [made]
        for name, view, batch in _choices(results)
        if (made := _roofline(results, view, batch))
    }
    if not drawn:
        return section("roofline", title, _no_layers())
    note = (
        "Each layer's useful FLOP/s, and its best peer's at the other end of the line, under the "
        "rates that this machine reached in the same run."
        if results.roofs
        else "No roofs were measured in this run, so the layers stand without them."
    )
    return section(
        "roofline",
        title,
        paragraph(note, "note"),
        switch("roofline", "Shown:", drawn, ROOFLINE * room),
    )


def _roofline(results: Results, view: View, batch: int) -> str:
    styles = story.styles(results)
    points = []
    for row in story.apart(view.ours(batch)):
        if not row.flops or not row.tflops:
            continue
        peer = best_peer(row, view.at(row.batch))
        rival = (
            (peer.contestant, styles[peer.contestant], peer.tflops * 1e12)
            if peer and peer.tflops
            else None
        )
        points.append(charts.Point(row.problem, row.flops / row.bytes, row.tflops * 1e12, rival))
    if not points:
        return ""
    compute, memory = results.roofs.get(view.dtype), results.roofs.get("copy")
    names = [OURS, *dict.fromkeys(p.peer[0] for p in points if p.peer)]
    cells = [
        [
            p.name,
            units.three(p.intensity),
            units.si(p.rate, "FLOP/s"),
            p.peer[0] if p.peer else "-",
            units.si(p.peer[2] if p.peer else None, "FLOP/s"),
        ]
        for p in points
    ]
    return (
        legend(names, styles)
        + either(
            charts.roofline(points, compute, memory),
            charts.roofline(points, compute, memory, 420, 400),
        )
        + details(
            "The same as a table",
            table(
                f"Batch {batch}, {view.name}",
                ["layer", "FLOP per byte", "ours", "best peer", "its rate"],
                cells,
            ),
        )
    )


def batches(results: Results, room: float = 1) -> str:
    """Latency and images per second over the batch size, ours and the peers'."""
    title = "Latency and throughput by batch size"
    found = story.views(results, "model")
    if not found:
        said = "The whole network was not timed. To fill this:"
        return section("batches", title, missing(said, "alexnet-triton-bench model --json FILE"))
    drawn = {view.name: [_batches(results, view)] for view in found}
    return section("batches", title, switch("batches", "Shown:", drawn, BATCHES * room))


def _batches(results: Results, view: View) -> str:
    styles = story.styles(results)
    by_name: dict[str, list[Row]] = {}
    for row in view.rows:
        if right(row):
            by_name.setdefault(row.contestant, []).append(row)
    names = [name for name in styles if name in by_name]
    latency, rate = [], []
    for name in names:
        rows = sorted(by_name[name], key=lambda r: r.batch)
        at = [(r.batch, r.p20_us or 0.0, r.median_us or 0.0, r.p80_us or 0.0) for r in rows]
        latency.append(charts.Curve(name, styles[name], tuple(at)))
        per_second = tuple((b, b / hi * 1e6, b / mid * 1e6, b / lo * 1e6) for b, lo, mid, hi in at)
        rate.append(charts.Curve(name, styles[name], per_second))
    lost = [r.contestant for r in view.rows if not right(r) and r.contestant not in by_name]
    absent = f" Not shown, since not right or not timed: {', '.join(dict.fromkeys(lost))}."
    head = ["batch", "contestant", "time", "p20", "p80", "images/s", "of roof", "x best peer"]
    cells = [
        [
            str(row.batch),
            row.contestant,
            units.time(row.median_us),
            units.time(row.p20_us),
            units.time(row.p80_us),
            units.whole(row.images_per_second),
            units.percent(row.percent_of_roof),
            units.times(times_best_peer(row, view.at(row.batch))),
        ]
        for row in sorted(view.rows, key=lambda r: (r.batch, r.median_us or 1e30))
        if right(row)
    ]
    return (
        legend(names, styles)
        + pair(
            figure("Time of one batch", charts.curves(latency, "latency", "time")),
            figure("Images per second", charts.curves(rate, "images/s", "")),
        )
        + paragraph(
            f"{view.name}. Points are medians, bands go from p20 to p80."
            + (absent if lost else ""),
            "note",
        )
        + details("The same as a table", table(view.name, head, cells, words=2))
    )
