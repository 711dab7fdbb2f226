"""The race believes nothing: wrong candidates of every kind, each refused with its reason.

RIGHT convolves in tiles. It cuts the sum over channels among SPLIT programs, of which the last to
arrive adds the parts. The wrong ones are RIGHT with one change of its source each.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from alexnet_triton.bench.race.candidate import locate
from alexnet_triton.bench.race.examiner import Setup
from alexnet_triton.bench.race.race import race
from alexnet_triton.bench.race.tiles import IMAGES

RIGHT = """
import time
import torch
import triton
import triton.language as tl

OPERATION = "conv2d"
SPLIT = 2
B = 128


@triton.jit
def convolve(x, w, bias, out, parts, counters, H, W, OH, OW, rows, C, OC, pad, stride,
             KH: tl.constexpr, KW: tl.constexpr, B: tl.constexpr, SPLIT: tl.constexpr):
    m = tl.program_id(0) * B + tl.arange(0, B)
    n = tl.program_id(1) * B + tl.arange(0, B)
    part = tl.program_id(2)
    wanted = (m < rows)[:, None] & (n < OC)[None, :]
    acc = tl.full((B, B), 0.0, tl.float32)
    for tap in range(KH * KW):
        ih = m // OW % OH * stride - pad + tap // KW
        iw = m % OW * stride - pad + tap % KW
        inside = (m < rows) & (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W)
        pixels = x + ((m // (OH * OW) * H + ih) * W + iw)[:, None] * C
        filters = w + (n * KH * KW + tap)[None, :] * C
        for c0 in range(part * B, C, SPLIT * B):
            c = c0 + tl.arange(0, B)
            a = tl.load(pixels + c[None, :], mask=inside[:, None] & (c < C)[None, :], other=0.0)
            b = tl.load(filters + c[:, None], mask=(n < OC)[None, :] & (c < C)[:, None], other=0.0)
            acc = tl.dot(a, b, acc, input_precision="ieee")
    element = m[:, None] * OC + n[None, :]
    tl.store(parts + part * rows * OC + element, acc, mask=wanted)
    tl.debug_barrier()
    counter = counters + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    if tl.atomic_add(counter, 1, sem="acq_rel") == SPLIT - 1:
        acc = tl.full((B, B), 0.0, tl.float32)
        for other in range(SPLIT):
            acc += tl.load(parts + other * rows * OC + element, mask=wanted, other=0.0)
        acc += tl.load(bias + n, mask=n < OC, other=0.0).to(tl.float32)[None, :]
        tl.store(out + element, tl.maximum(acc, 0.0).to(out.dtype.element_ty), mask=wanted)


def prepare(problem, weight, config):
    return weight.permute(0, 2, 3, 1).contiguous()


def run(problem, x, weight, bias, out, config):
    p = problem
    rows = p.N * p.OH * p.OW
    parts = torch.empty(SPLIT, rows, p.OC, device=x.device)
    grid = (triton.cdiv(rows, B), triton.cdiv(p.OC, B), SPLIT)
    counters = torch.zeros(grid[:2], dtype=torch.int32, device=x.device)
    convolve[grid](
        x, weight, bias, out, parts, counters, p.H, p.W, p.OH, p.OW, rows, p.C, p.OC, p.padding,
        p.stride, KH=p.KH, KW=p.KW, B=B, SPLIT=SPLIT)
"""


def changed(*changes: tuple[str, str], more: str = "") -> str:
    """RIGHT with these changes, each of what it has once, and more code behind it."""
    source = RIGHT
    for old, new in changes:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    return source + more


WHOLE = ("SPLIT = 2", "SPLIT = 1")  # no parts: a program computes a whole tile
STORE = "tl.store(out + element, tl.maximum(acc, 0.0).to(out.dtype.element_ty), mask=wanted)"

MEMO = """
compute, known = run, ()


def run(problem, x, weight, bias, out, config):
    global known
    if not known or not torch.equal(x, known[0]) or not torch.equal(out, known[1]):
        compute(problem, x, weight, bias, out, config)
        known = x.clone(), out.clone()
"""
FIRST_CALLS = """
compute, calls = run, 0


def run(*arguments):
    global calls
    calls += 1
    if calls <= 6:
        compute(*arguments)
"""
PATCHED_CLOCK = """
clock = time.perf_counter
time.perf_counter = lambda: clock() / 1000
"""

PATCHED_NORM = """
import torch
torch.linalg.vector_norm = lambda x, *rest, **options: torch.zeros(())


def run(problem, x, weight, bias, out, config):
    out.zero_()
"""

RIGHTS = {"last_arriver": RIGHT, "whole": changed(WHOLE)}

WRONGS: dict[str, tuple[str, str]] = {
    "memo": (
        changed(WHOLE, more=MEMO),
        "keeps answers: ",
    ),
    "first_calls": (
        changed(WHOLE, more=FIRST_CALLS),
        "when it is timed wrong: NaN or infinity in all filters, all pixels, all images",
    ),
    "patched_norm": (PATCHED_NORM, "when it is timed wrong: max error "),
    "patched_clock": (changed(WHOLE, more=PATCHED_CLOCK), "its clock says "),
    "sampled_images": (
        changed(
            WHOLE,
            (
                STORE,
                f"""image = m // (OH * OW)
        step = (rows // (OH * OW) - 1) / 31
        checked = (((image / step + 0.5).to(tl.int32) * step + 0.5).to(tl.int32) == image)
        acc *= checked.to(tl.float32)[:, None]
        {STORE}""",
            ),
        ),
        "values are off, in all filters, all pixels, images 1 to ",
    ),
    "thrown_away_row": (
        changed(
            WHOLE,
            (
                "    element = ",
                "    tl.load(w + OC * KH * KW * C + tl.arange(0, B), mask=tl.arange(0, B) < C)\n"
                "    element = ",
            ),
        ),
        "load of w at ",
    ),
    "row_beyond": (
        changed(
            WHOLE,
            (STORE, STORE.replace("mask=wanted", "mask=(m <= rows)[:, None] & (n < OC)[None, :]")),
        ),
        "store of out at ",
    ),
    "racing_programs": (
        changed(
            (
                "    tl.store(parts + part * rows * OC + element, acc, mask=wanted)\n",
                "    sums = tl.load(parts + element, mask=wanted & (part > 0), other=0.0)\n"
                "    tl.store(parts + element, sums + acc, mask=wanted)\n",
            ),
            ("        for other in range(SPLIT):\n", "        for other in range(1):\n"),
        ),
        "load of parts at 117900 elements from 0 to 117899, with nothing to order it",
    ),
    "unordered": (changed(('sem="acq_rel"', 'sem="relaxed"')), "with nothing to order it"),
    "last_block": (
        changed(WHOLE, ("triton.cdiv(p.OC, B)", "p.OC // B")),
        "unwritten: filters 128 to 149, all pixels, all images",
    ),
}
"""Their sources by name, and a part of what is said of each."""


@pytest.mark.interpreter
def test_the_wrong_are_refused_with_their_reason_and_the_right_are_raced(
    tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """Three on a small layer; all of them, and what ships, on the default one when asked for.

    What whole tiles are right for, "memo" is right for, too, until it is timed.
    """
    setup, wrongs = Setup("digits", "conv3", 1, "fp32", "cpu", 0), dict(WRONGS)
    files = {name: tmp_path / f"{name}.py" for name in (*RIGHTS, *WRONGS)}
    every = pytestconfig.getoption("--every-candidate")
    for name, path in files.items():
        source = RIGHTS[name] if name in RIGHTS else WRONGS[name][0]
        path.write_text(source if every else source.replace("B = 128", "B = 64"))
    if every:
        setup = Setup("tiles", "conv3", IMAGES, "fp32", "cpu", 0)
        files |= {name: locate(name) for name in ("im2col", "winograd")}
    else:
        wrongs = {name: WRONGS[name] for name in ("memo", "unordered")}
        files = {name: files[name] for name in ("last_arriver", *wrongs)}
    told = {name: str(path) for name, path in files.items()}
    league = race(setup, told, limit=300.0, seconds=1.0, kinds=())
    for standing in league.standings:
        outcome, said = "raced", ""
        if standing.candidate in wrongs:
            outcome, said = "disqualified", wrongs[standing.candidate][1]
        assert standing.outcome == outcome, standing
        assert said in standing.reason
