"""Layer by layer: the engine's kernels beside everything else that computes the same.

All contestants of a problem stand in one process with the same inputs. Each is run once and
compared with float64; who does not match is not timed, and who cannot run leaves a row that says
why. Rounds are interleaved, and small problems rotate through copies enough to overflow the L2
cache twice, so that only the clock "cold" need overwrite it. One problem is in memory at a time.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import torch

from ...engine import foretell
from ...engine.devices.planner import Planner
from ...engine.load import aim, arithmetic, find, resolve
from ..env import environment
from ..records import OURS, Results, Row, times_best_peer
from .contest import NO_MATCH, Entry, matched, reason, timed
from .options import ROUNDS, Effort, asked, begun, keep, tell, tell_kept, title
from .peers import Peer, Prepared, libraries, peers
from .problem import Problem, Tensors, expected, match, problems, ready, tensors, tuned_planner
from .roofline import roof_us
from .timing import CLOCKS, Clock, copies_to_overflow

MOST_COPIES = 1024


def default_names(planner: Planner) -> list[str]:
    """Every step of the network, and every convolution with the pool right after it."""
    _, *steps = planner(1, image_dtype=planner.arithmetic.dtype).steps
    pooled = [
        f"{step.name}+{after.name}"
        for step, after in pairwise(steps)
        if step.kernel.startswith("conv2d") and after.kernel.endswith("pool2d")
    ]
    return [*(step.name for step in steps), *pooled]


def layer_rows(
    planner: Planner,
    dtype: str,
    batch: int,
    device: torch.device,
    names: Sequence[str] | None = None,
    clocks: Sequence[Clock] | None = None,
    *,
    kinds: Sequence[str] | None = None,
    roofs: Mapping[str, float] | None = None,
    effort: Effort | None = None,
    seed: int = 0,
) -> Iterator[Row]:
    """Rows of every problem in turn: each contestant by each clock, ours first.

    `dtype` is the planner's, by its name in NUMBERS; `names` are problems ("conv4",
    "conv1+pool1"), by default `default_names`; `clocks` all that the device has; `kinds` those of
    `peers`; `roofs` what `measure_roofs` gave, without which rows have no roof. Who cannot run,
    does not match or fails while it is timed has rows without times and with a note. Raises
    NetworkError for a name that is none, EngineError for an unknown kind of peer.
    """
    effort = effort or Effort(ROUNDS[device.type])
    clocks = CLOCKS[device.type] if clocks is None else clocks
    for problem in problems(planner, dtype, batch, names or default_names(planner)):
        if effort.over:
            return
        blank = Row(
            *("layers", problem.name, problem.network.name, batch, dtype, "", ""),
            *(problem.work.flops, problem.work.bytes),
            roof_us=roof_us(problem.work, dtype, roofs) if roofs else None,
        )
        rows = _rows(problem, device, clocks, kinds, effort, seed, blank)
        _free(device)
        yield from rows


def match_rows(
    planner: Planner, dtype: str, batch: int, card: str, names: Sequence[str], seed: int = 0
) -> Iterator[Row]:
    """Rows of ours alone, from the plan of a `card` in the interpreter: matches and no times.

    Arguments and errors as of `layer_rows`.
    """
    cpu = torch.device("cpu")
    for problem in problems(planner, dtype, batch, names):
        (given,) = _copies(problem, cpu, seed)
        made = ready(problem, given)
        launches = (launch for _, several in made.launches for launch in several)
        foretell.say(foretell.seconds(launches), f"{problem.name}, {batch} images")
        made.poison()
        made()
        row = Row(
            *("layers", problem.name, problem.network.name, batch, dtype, OURS, "-"),
            *(problem.work.flops, problem.work.bytes),
            note=f"{card} interpreted: no time",
        )
        yield matched(row, match(problem, made.output(), expected(problem, given)))


# --- one problem -----------------------------------------------------------------------------


def _rows(
    problem: Problem,
    device: torch.device,
    clocks: Sequence[Clock],
    kinds: Sequence[str] | None,
    effort: Effort,
    seed: int,
    blank: Row,
) -> list[Row]:
    """All rows of one problem; nothing of it stays in memory."""
    contestants = [_engine(problem), *peers(problem, device, kinds)]
    try:
        copies = _copies(problem, device, seed)
        wanted = expected(problem, copies[0])
    except torch.cuda.OutOfMemoryError as error:
        return [
            replace(blank, contestant=one.name, clock=clock, note=reason(error))
            for clock in clocks
            for one in contestants
        ]
    with libraries(problem.plan.arithmetic), torch.inference_mode():
        entries = [
            _admitted(
                one,
                problem,
                copies,
                wanted,
                replace(blank, contestant=one.name, straw_man=one.straw_man, note=one.note),
            )
            for one in contestants
        ]
        return [
            row
            for clock in clocks
            for row in timed(entries, clock, device, effort.rounds, effort.left())
        ]


def _engine(problem: Problem) -> Peer:
    """The engine's own kernels as a contestant."""

    def prepare(given: Tensors) -> Prepared:
        bound = ready(problem, given)
        return Prepared(bound, bound.output)

    return Peer(OURS, prepare, note="stem included" if problem.source is None else "")


def _copies(problem: Problem, device: torch.device, seed: int) -> list[Tensors]:
    """Tensors to rotate through, fresh random numbers each."""
    count = 1
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        count = copies_to_overflow(problem.work.bytes, cache, MOST_COPIES)
    generator = torch.Generator(device).manual_seed(seed)
    return [tensors(problem, device, generator) for _ in range(count)]


def _admitted(
    one: Peer, problem: Problem, copies: Sequence[Tensors], wanted: torch.Tensor, row: Row
) -> Entry:
    """The row with the match of the first copy, and the runs of all; none if it may not be timed.

    Not `contest.admit`, which looks at every copy: there may be a thousand here.
    """
    if one.prepare is None:
        return Entry(row)
    try:
        first = one.prepare(copies[0])
        first.run()
        row = matched(row, match(problem, first.output(), wanted))
        if row.note == NO_MATCH:
            return Entry(row)
        return Entry(row, (first.run, *(one.prepare(given).run for given in copies[1:])))
    except Exception as error:  # of other people's code: whatever it is, the others go on
        return Entry(replace(row, note=reason(error)))


def _free(device: torch.device) -> None:
    gc.collect()  # compiled graphs are cycles, and hold tensors
    if device.type == "cuda":
        torch.cuda.empty_cache()


# --- the table -------------------------------------------------------------------------------

HEAD = (
    f"{'layer':<15} {'batch':>5} {'contestant':<24} {'clock':<5} {'error':>8} {'median us':>11} "
    f"{'p20':>10} {'p80':>10} {'TFLOP/s':>8} {'GB/s':>7} {'% roof':>6} {'x peer':>6}"
)


def lines(rows: Sequence[Row]) -> list[str]:
    """One line a row, the fastest first by each clock; ours says how it stands to the best peer."""
    clocks = list(dict.fromkeys(row.clock for row in rows))
    ordered = sorted(rows, key=lambda r: (clocks.index(r.clock), r.median_us or math.inf))
    return [_line(row, rows) for row in ordered]


def _line(row: Row, rows: Sequence[Row]) -> str:
    who = f"{row.problem:<15} {row.batch:>5} {row.contestant:<24} {row.clock:<5}"
    error = f"{row.max_error:>8.1e}" if row.max_error is not None else f"{'-':>8}"
    note = ", ".join([*(["straw man"] if row.straw_man else []), *([row.note] if row.note else [])])
    if row.median_us is None:
        return f"{who} {error}  {note}"
    roof = f"{row.percent_of_roof:>6.1f}" if row.percent_of_roof is not None else f"{'-':>6}"
    ahead = times_best_peer(row, rows) if row.contestant == OURS else None
    return (
        f"{who} {error} {row.median_us:>11.2f} {row.p20_us:>10.2f} {row.p80_us:>10.2f} "
        f"{_short(row.tflops):>8} {_short(row.gbps):>7} {roof} "
        f"{_short(ahead) if ahead else '':>6}  {note}".rstrip()
    )


def _short(value: float | None) -> str:
    """Three digits that matter, none of them an exponent's."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 1e-3 else f"{value:.4f}"


# --- the verb --------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    """Measure layer by layer, telling rows as they come; 1 if one of ours was not timed.

    With a target, nothing is timed: 1 if one of ours does not match.
    """
    device = resolve(options.device or (options.target and "cpu"))
    card = aim(options.target, device).name
    dtype, meaning = arithmetic(options.dtype, device, "triton", options.target)
    network, _ = find(options.model)
    planner = tuned_planner(network, meaning, device, options.target)
    batches, clocks, effort = asked(options, device)
    names = options.layers or default_names(planner)
    problems(planner, dtype, batches[0], names)  # refuses what is no layer before it measures

    printed = options.json != "-"
    if card is None:
        results = begun(options, device, [dtype])
    else:
        notes = (f"The plan of {card} in Triton's interpreter: matches, no times.",)
        results = Results(environment(device), {}, (), notes=notes)
    if printed:
        print(title(f"{network.name}, {dtype},", device, results))
        print(HEAD)
    for batch in batches:
        for name in names:
            tell(f"{name}, batch {batch}")
            made = (
                layer_rows(
                    *(planner, dtype, batch, device, [name], clocks),
                    kinds=options.peers,
                    roofs=results.roofs,
                    effort=effort,
                    seed=options.seed,
                )
                if card is None
                else match_rows(planner, dtype, batch, card, [name], options.seed)
            )
            rows = tuple(made)
            results = replace(results, rows=results.rows + rows)
            if printed:
                print("\n".join(lines(rows)), flush=True)
            keep(results, options)
    if not printed:
        print(json.dumps(results.to_dict(), indent=1))
    tell_kept(options)
    ours = [row for row in results.rows if row.contestant == OURS]
    return 0 if all(row.matched if card else row.median_us for row in ours) else 1
