"""What this machine can do at best, measured, and what a problem would then at least cost.

Two rates make the roof (S. Williams, A. Waterman, D. Patterson, "Roofline", 2009): floating point
operations of a large matrix product by torch's own library, and bytes, read plus written, of a
large copy within the device's memory. Both on random data: on zeros a product runs faster than it
ever would again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Literal

import torch

from ...engine.load import arithmetic, one_of, resolve
from ...engine.plan import ARITHMETIC, Arithmetic
from ...kernels.jit import Work
from .. import units
from ..env import environment
from ..records import COPY as COPY
from ..records import Results, save
from .peers import libraries
from .timing import Clock, measure

PRODUCT = {"cuda": 8192, "cpu": 512}  # rows and columns of each factor, by type of device
COPIED = {"cuda": 1 << 30, "cpu": 1 << 26}  # bytes
CLOCK: dict[str, Clock] = {"cuda": "graph", "cpu": "host"}


def measure_roofs(
    device: torch.device, dtypes: Collection[str], rounds: int = 9
) -> dict[str, float]:
    """FLOP/s by name of dtype ("fp16", "tf32", ...), and byte/s under COPY.

    The copy counts each byte twice, read and written. torch's TF32 switches are as before
    afterwards. Raises EngineError for a dtype that is none.
    """
    for name in dtypes:
        one_of("dtype", name, ARITHMETIC)
    products = {name: _product_rate(device, ARITHMETIC[name], rounds) for name in dtypes}
    return {**products, COPY: _copy_rate(device, rounds)}


def roof_us(work: Work, dtype: str, roofs: Mapping[str, float]) -> float:
    """Microseconds that the measured rates allow at best: the larger of arithmetic and traffic.

    Raises KeyError where the roof of `dtype` was not measured.
    """
    return 1e6 * max(work.flops / roofs[dtype], work.bytes / roofs[COPY])


def binds(work: Work, dtype: str, roofs: Mapping[str, float]) -> Literal["compute", "memory"]:
    """Which of the two makes the roof."""
    return "compute" if work.flops / roofs[dtype] >= work.bytes / roofs[COPY] else "memory"


def _product_rate(device: torch.device, arithmetic: Arithmetic, rounds: int) -> float:
    size = PRODUCT[device.type]
    a, b = (torch.randn(size, size, device=device).to(arithmetic.dtype) for _ in range(2))
    out = torch.empty_like(a)
    with libraries(arithmetic), torch.inference_mode():
        return 2 * size**3 / _seconds(lambda: torch.mm(a, b, out=out), device, rounds)


def _copy_rate(device: torch.device, rounds: int) -> float:
    size = COPIED[device.type]
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _seconds(lambda: target.copy_(source), device, rounds)


def _seconds(run: Callable[[], object], device: torch.device, rounds: int) -> float:
    times = measure({"": [run]}, CLOCK[device.type], device, rounds)
    return times[""].median / 1e6


# --- the verb --------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    """Measure the roofs; they are told, or kept as results without rows."""
    device = resolve(options.device)
    dtypes = [arithmetic(name, device, "triton")[0] for name in options.dtype or [None]]
    results = Results(environment(device), measure_roofs(device, dtypes), ())
    if options.json == "-":
        print(results.to_json())
    else:
        for name, rate in results.roofs.items():
            print(f"{name:<6} {units.si(rate, 'B/s' if name == COPY else 'FLOP/s')}")
    if options.json not in (None, "-"):
        save(results, Path(options.json))
    return 0
