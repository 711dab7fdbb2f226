"""How fast operands arrive at the multiprocessors, measured: `bench fill`.

Tiles of operands come from the L2 cache, at a rate that `kernels/cost.py` assumes until somebody
has measured it. One product whose operands the cache holds is computed by the engine's linear
kernel at four shapes of tile and at two depths. What the deeper one takes longer is steps of the
loop alone, and the bytes that these bring are a rate that the shape reaches. The best of the four
is the fill: operands arrive at least as fast. Clocks are the model's, at its nominal rate.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path

import torch

from ...engine.devices.cards import GPUS, find_card
from ...engine.load import resolve
from ...engine.plan import ARITHMETIC
from ...engine.verify import errors, tolerance, within
from ...kernels import cost, layout
from ...kernels.gemm import LinearConfig, linear, reference
from ...kernels.jit import Launch, architecture
from .timing import measure
from .verb import tell

Tile = tuple[int, int, int, int]  # images, outputs, warps, stages
TILES: dict[str, tuple[Tile, ...]] = {
    "cuda": ((64, 64, 4, 4), (64, 128, 4, 4), (128, 128, 8, 4), (128, 256, 8, 3)),
    "cpu": ((16, 16, 4, 1),),
}
DEPTH = {"cuda": 64, "cpu": 16}  # numbers of a step: 128 bytes of halves
STEPS = 8, 40  # neither is a multiple of 16, so one binary does for both


def probe(tile: Tile, steps: int, kind: str, arch: int | None, place: str = "meta") -> Launch:
    """The product at one shape of tile, as deep as so many steps; random operands.

    Its 128 x 256 tiles are as many as the card's multiprocessors, smaller ones multiples of them.
    """
    rows, columns, warps, stages = tile
    depth, images, outputs = DEPTH[kind], rows, columns
    if kind == "cuda":
        count = cost.chip_of(arch or 90).multiprocessors
        if place != "meta":
            count = torch.cuda.get_device_properties(place).multi_processor_count
        across = max(n for n in range(1, math.isqrt(count) + 1) if count % n == 0)
        images, outputs = 128 * across, 256 * (count // across)
    dtype = torch.float16 if kind == "cuda" else torch.float32

    def random(*shape: int) -> torch.Tensor:
        made = torch.empty(shape, dtype=dtype, device=place)
        return made if place == "meta" else made.normal_()

    config = LinearConfig(rows, columns, depth, 1, False, warps, stages, (arch or 0) >= 90)
    out = layout.empty(1, 1, images, outputs, dtype, place)
    return linear(random(1, steps, images, depth), random(steps, outputs, depth), None, out, config)


def assumed(arch: int | None, device: str, fill: float | None = None) -> cost.Chip:
    """What is assumed of a card by its driver's name, with the measured fill if there is one."""
    found = find_card(device)
    known = cost.CHIPS.get(GPUS[found].name) if found else None
    known = known or cost.chip_of(arch or 90)
    return known if fill is None else replace(known, fill=fill, port=max(known.port, fill))


def fill_of(tile: Tile, us: tuple[float, float], launch: Launch, chip: cost.Chip) -> float:
    """Bytes a clock and multiprocessor by the times at both depths; `launch` is the deeper one.

    Raises ValueError where the deeper product took no longer.
    """
    short, long = us
    if long <= short:
        raise ValueError(f"{STEPS[1]} steps took {long:.2f} us, {STEPS[0]} took {short:.2f}")
    itemsize = launch.arguments["y"].element_size()
    step = (tile[0] + tile[1]) * launch.arguments["BLOCK_K"] * itemsize
    moved = (STEPS[1] - STEPS[0]) * step * launch.grid[0]
    rate: float = moved / ((long - short) * 1e-6 * chip.clock) / chip.multiprocessors
    return rate


def fills(device: torch.device) -> dict[str, float]:
    """The rate that each shape of tile reaches; one that fails, or is wrong, is told and left out.

    The answer is compared with float64 before it is timed.
    """
    kind, arch, found = device.type, architecture(device), {}
    name = torch.cuda.get_device_name(device) if kind == "cuda" else ""
    chip = assumed(arch, name)
    if kind == "cuda":
        count = torch.cuda.get_device_properties(device).multi_processor_count
        chip = replace(chip, multiprocessors=count)
    for tile in TILES[kind]:
        try:
            products = [probe(tile, steps, kind, arch, str(device)) for steps in STEPS]
            for product in products:
                _prove(product)
            runs = {str(place): [product] for place, product in enumerate(products)}
            times = measure(runs, "graph" if kind == "cuda" else "host", device, 9)
            us = times["0"].median, times["1"].median
            found[f"{tile[0]}x{tile[1]}"] = fill_of(tile, us, products[1], chip)
        except Exception as error:  # a driver may refuse one kernel and take the others
            tell(f"fill: {tile[0]}x{tile[1]} left out: {str(error).splitlines()[:1]}")
    return found


def _prove(product: Launch) -> None:
    """Raises ValueError for a wrong answer."""
    operands = (product.arguments[name] for name in ("x", "w"))
    x, w = (getattr(each, "base", each) for each in operands)  # descriptors have it
    out = product.arguments["y"].fill_(torch.nan)
    product()
    rows, columns = (each.flatten(0, -3).transpose(0, 1).flatten(1) for each in (x, w))
    wrong = errors(out.flatten(0, 2).double(), reference(rows, columns, None))
    bound = tolerance(ARITHMETIC["fp16" if x.dtype == torch.float16 else "fp32"], rows.shape[1])
    if not within(*wrong, bound):
        raise ValueError(f"NO MATCH: errors up to {wrong[0]:.2g}, {bound:.2g} are allowed")


# --- the verb --------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    """Measure the fill; 1 if no shape of tile could be timed."""
    found = fills(resolve(options.device))
    facts = json.dumps({"fill": max(found.values(), default=None), "tiles": found})
    if options.json == "-":
        print(facts)
    else:
        for tile, rate in found.items():
            print(f"{tile:<8} {rate:6.1f} bytes a clock and multiprocessor")
    if options.json not in (None, "-"):
        Path(options.json).write_text(facts + "\n")
    return 0 if found else 1
