"""Which configurations of a step are worth trying: a few values of each parameter, and rules.

A space is declared for each kind of kernel beside the others, so that what is tried can be read
and argued about. A rule is a sentence and a predicate; configurations that break one are never
made. Rules only leave out what cannot win: what cannot run at all is the compiler's to say, which
knows registers and shared memory exactly (`inspect.refusal`).

Parameters are fields of the kernel's configuration. A field that a space does not name keeps the
default's value, and a name that the configuration does not have is passed over.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from ...engine.plan import Arithmetic, Step
from ...errors import Error
from ...kernels.channels_last import ChannelsLastShape
from ...kernels.conv import Conv2dShape, rows_tiling_fits
from ...kernels.first_layer import LARGEST, FirstLayerConfig, window
from ...kernels.gemm import LinearShape
from ...kernels.jit import MAX_TILE, power_of_two
from ...kernels.layout import aligned
from ...kernels.pool import PoolShape
from ..inspect.limits import LIMITS

Config = dict[str, Any]  # a configuration's fields by name, as JSON has them
Values = Mapping[str, tuple[Any, ...]]
Rules = Mapping[str, Callable[[Config], bool]]
"""Sentences, and whether each holds; a configuration for which one does not is left out."""

FEW = 256  # tiles: a large GPU has half as many multiprocessors, and more need not be split
ACCUMULATORS = 224  # registers a thread may fill with sums; the other 31 are for addresses


class SpaceError(Error, ValueError):
    """A step that has no space of configurations, in one line."""


@dataclass(frozen=True, slots=True)
class Space:
    """All combinations of the parameters' values that break no rule, or a list."""

    parameters: Values
    rules: Rules = field(default_factory=dict)
    listed: tuple[Config, ...] = ()  # these alone, in this order

    def legal(self, config: Config) -> bool:
        """Whether a configuration breaks no rule."""
        return all(holds(config) for holds in self.rules.values())

    def configs(self) -> list[Config]:
        """The list, or every legal configuration, the last parameter changing fastest."""
        if self.listed:
            return list(self.listed)
        every = itertools.product(*self.parameters.values())
        configs = (dict(zip(self.parameters, values, strict=True)) for values in every)
        return [config for config in configs if self.legal(config)]

    def neighbours(self, config: Config) -> list[Config]:
        """Legal configurations that differ in one parameter.

        By one step up or down to the next legal value where values are numbers, else by any value.
        """
        near: list[Config] = []
        for name, values in self.parameters.items():
            for line in _lines(values, config[name]):
                moved = ({**config, name: value} for value in line)
                near += itertools.islice(filter(self.has, moved), 1)
        return near

    def has(self, config: Config) -> bool:
        """Whether it is one of them; its fields are those of the space."""
        inside = all(config[name] in values for name, values in self.parameters.items())
        return inside and self.legal(config)


def space(step: Step, arithmetic: Arithmetic, arch: int | None) -> Space:
    """The space of a step on compute capability `arch`; None, the interpreter, has a few tiles.

    Raises SpaceError for a step without a kernel.
    """
    if step.config is None:
        raise SpaceError(f"{step.name}: an exchange between towers has no kernel to tune")
    fields = asdict(step.config)
    if arch is None:
        made = _interpreted(fields)
    elif isinstance(step.config, FirstLayerConfig) and isinstance(step.shape, Conv2dShape):
        made = _first_layer(step.shape, arithmetic, arch, step.in_place)
    else:
        made = _compiled(step.shape, arithmetic, arch)
    parameters = {
        name: _with(made.parameters.get(name, (value,)), value) for name, value in fields.items()
    }
    return replace(made, parameters=parameters)


def listed(configs: Iterable[Config]) -> Space:
    """The space of exactly these configurations, which all have the same fields."""
    known = {key(config): config for config in configs}
    names = next(iter(known.values()), {})
    parameters = {
        name: tuple(sorted({config[name] for config in known.values()})) for name in names
    }
    rules: Rules = {"it is listed": lambda config: key(config) in known}
    return Space(parameters, rules, tuple(known.values()))


def key(config: Config) -> str:
    """The same text for the same configuration."""
    return json.dumps(config, sort_keys=True)


def _lines(values: tuple[Any, ...], here: Any) -> list[list[Any]]:
    """Ways from a value to others: numbers up and down, the nearest first; others one by one."""
    others = [value for value in values if value != here]
    if isinstance(here, bool | str):
        return [[value] for value in others]
    up, down = [v for v in others if v > here], [v for v in others if v < here]
    return [sorted(up), sorted(down, reverse=True)]


def _with(values: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
    """Values to search and the default's own: a search starts there and must find neighbours."""
    return values if value in values or len(values) == 1 else tuple(sorted([*values, value]))


# --- the interpreter -------------------------------------------------------------------------


def _interpreted(default: Config) -> Space:
    """Tiles of the default's size, half and a quarter of it: enough to try everything."""
    blocks = [name for name, size in default.items() if name.startswith("BLOCK_") and size]
    parameters = {
        name: tuple(sorted({max(1, default[name] // cut) for cut in (1, 2, 4)})) for name in blocks
    }
    rules: Rules = {
        f"a tile has at most {MAX_TILE} numbers": lambda c: all(
            c[a] * c[b] <= MAX_TILE for a, b in itertools.combinations(blocks, 2)
        ),
        "a product's operands have at least 16 rows and columns": lambda c: (
            "BLOCK_K" not in c or all(c[name] >= 16 for name in blocks)
        ),
    }
    return Space(parameters, rules)


# --- compiled --------------------------------------------------------------------------------


def _compiled(shape: object, arithmetic: Arithmetic, arch: int) -> Space:
    match shape:
        case Conv2dShape():
            return _conv2d(shape, arithmetic, arch)
        case LinearShape():
            return _linear(shape, arithmetic, arch)
        case PoolShape():
            return _pool(shape)
        case ChannelsLastShape():
            return _passes(shape)
    raise SpaceError(f"no space is declared for {type(shape).__name__}: no plan looks it up")


def _conv2d(shape: Conv2dShape, arithmetic: Arithmetic, arch: int) -> Space:
    parameters = {
        "tiling": ("rows", "pixels"),
        "BLOCK_M": (32, 64, 128, 256),
        "BLOCK_M2": (0, 64),
        "BLOCK_N": (32, 64, 128, 256),
        "BLOCK_N2": (0, 32, 64, 128),
        "BLOCK_K": (16, 32, 64, 128),
        "SPLIT_K": (1, 2, 4, 8, 16),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4, 5),
        "descriptors": (False, True),
    }
    channels, filters = shape.C // shape.groups, shape.OC // shape.groups
    # The longest run of rows that a tile may hold.
    in_row = shape.N * (shape.OW if shape.stride[1] == 1 else 1)
    everywhere = shape.N * shape.OH * shape.OW

    def by_rows(config: Config) -> bool:
        return bool(config["tiling"] == "rows")

    rules: Rules = {
        "a tile of rows is at least half full": lambda t: (
            not by_rows(t) or t["BLOCK_M"] <= 2 * in_row
        ),
        "a tile of pixels is no longer than the output": lambda t: (
            t["BLOCK_M"] <= power_of_two(everywhere, 32, 256)
        ),
        "a second accumulator is narrower, needed, and for whole sums of rows": lambda t: (
            (
                not t["BLOCK_N2"] + t["BLOCK_M2"]
                or (by_rows(t) and t["SPLIT_K"] == 1 and not (t["BLOCK_N2"] and t["BLOCK_M2"]))
            )
            and (not t["BLOCK_N2"] or t["BLOCK_N2"] < t["BLOCK_N"] < filters)
            and (not t["BLOCK_M2"] or t["BLOCK_M2"] < t["BLOCK_M"] < in_row)
        ),
        "descriptors step from group to group by 16 bytes": lambda t: (
            not (by_rows(t) and t["descriptors"]) or rows_tiling_fits(shape, arithmetic.dtype)
        ),
        **_product_rules(everywhere, filters, channels, shape.KH * shape.KW, shape.groups),
        **_matrix_rules(arithmetic, arch),
    }
    return Space(parameters, rules)


def _first_layer(shape: Conv2dShape, arithmetic: Arithmetic, arch: int, in_place: bool) -> Space:
    parameters = {
        "form": ("images", "rows", "pointers"),
        "columns": (1, 2, 3, 4),
        "BLOCK_M": (64, 128, 256),
        "BLOCK_N": (32, 64, 128, 256),
        "BLOCK_N2": (0, 32, 64, 128),
        "BLOCK_K": (16, 32, 64),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
    }
    pixel = shape.C if in_place else power_of_two(shape.C, 1, LARGEST)
    windows = {columns: window(shape, pixel, columns) for columns in (1, 2, 3, 4)}
    rows = {"images": shape.N, "rows": shape.OH, "pointers": shape.N * shape.OH * shape.OW}

    def filters(config: Config) -> int:
        return int(config["columns"]) * shape.OC

    rules: Rules = {
        "a window of the columns is one K step, no longer than needed": lambda t: (
            t["BLOCK_K"] == power_of_two(windows[t["columns"]], 16, 2 * LARGEST)
        ),
        "a tile is at least half full": lambda t: t["BLOCK_M"] <= 2 * max(64, rows[t["form"]]),
        "a tile is no wider than the columns' filters": lambda t: (
            t["BLOCK_N"] <= power_of_two(filters(t), 32, 256)
        ),
        "a second accumulator is narrower and needed": lambda t: (
            not t["BLOCK_N2"] or t["BLOCK_N2"] < t["BLOCK_N"] < filters(t)
        ),
        **_matrix_rules(arithmetic, arch),
    }
    return Space(parameters, rules)


def _passes(shape: ChannelsLastShape) -> Space:
    """Tiles of BLOCK pixels that hold all their numbers."""
    width = power_of_two(shape.pixel, 1, MAX_TILE)
    parameters = {"BLOCK": (64, 128, 256, 512, 1024, 2048, 4096), "num_warps": (1, 2, 4, 8)}
    rules: Rules = {
        "a thread has 4 to 128 numbers": lambda t: (
            4 <= t["BLOCK"] * width / (32 * t["num_warps"]) <= 128
        )
    }
    return Space(parameters, rules)


def _linear(shape: LinearShape, arithmetic: Arithmetic, arch: int) -> Space:
    parameters = {
        "transposed": (False, True),
        "BLOCK_M": (16, 32, 64, 128, 256),
        "BLOCK_N": (32, 64, 128, 256),
        "BLOCK_K": (16, 32, 64, 128, 256),
        "SPLIT_K": (1, 2, 4, 8, 16),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4, 5, 6),
        "descriptors": (False, True),
    }

    rules: Rules = {
        "a tile is no longer than the batch or the matrix instruction": lambda t: (
            t["BLOCK_M"] <= power_of_two(shape.N, 16 if t["transposed"] else 64, 256)
        ),
        "the matrix instruction's side of 64 rows is full": lambda t: (
            t["BLOCK_N" if t["transposed"] else "BLOCK_M"] >= 64
        ),
        **_product_rules(shape.N, shape.OC, shape.C, shape.P),
        **_matrix_rules(arithmetic, arch),
    }
    return Space(parameters, rules)


def _product_rules(rows: int, filters: int, channels: int, taps: int, groups: int = 1) -> Rules:
    """How tiles fit a product of so many rows and, in each of the groups, filters."""

    def few_tiles(config: Config) -> bool:
        across = groups * _tiles(filters, config["BLOCK_N"])
        return _tiles(rows, config["BLOCK_M"]) * across < FEW

    return {
        "a tile is no wider than the filters": lambda t: (
            t["BLOCK_N"] <= power_of_two(filters, 32, 256)
        ),
        "a K step is no longer than the channels": lambda t: (
            t["BLOCK_K"] <= power_of_two(channels, 16, 256)
        ),
        "a sum is split where tiles are few, and a part has four steps": lambda t: (
            t["SPLIT_K"] == 1
            or (few_tiles(t) and taps * _tiles(channels, t["BLOCK_K"]) >= 4 * t["SPLIT_K"])
        ),
    }


def _matrix_rules(arithmetic: Arithmetic, arch: int) -> Rules:
    """What registers and shared memory hold of a product's tile."""

    def height(config: Config) -> int:
        return int(config["BLOCK_M"]) + int(config.get("BLOCK_M2", 0))

    def width(config: Config) -> int:
        return int(config["BLOCK_N"]) + int(config.get("BLOCK_N2", 0))

    def operands(config: Config) -> int:
        numbers_a_stage = (height(config) + width(config)) * config["BLOCK_K"]
        return int(numbers_a_stage * arithmetic.dtype.itemsize * config["num_stages"])

    rules: Rules = {
        "descriptors are from sm_90": lambda t: (
            arch >= 90 or not t.get("descriptors", t.get("form") != "pointers")
        ),
        f"sums take at most {ACCUMULATORS} registers a thread": lambda t: (
            height(t) * width(t) <= ACCUMULATORS * 32 * t["num_warps"]
        ),
        "eight warps have 8192 sums to share": lambda t: (
            t["num_warps"] <= 4 or height(t) * width(t) >= 8192
        ),
        "operands fit in shared memory": lambda t: (
            arch not in LIMITS or operands(t) <= LIMITS[arch].shared_per_block
        ),
    }
    if arithmetic.dtype != torch.float32 or arithmetic.precision != "ieee":
        return rules
    return {
        **rules,
        # No tensor core computes this, and unrolled multiply-adds compile for minutes.
        "plain multiply-adds keep to small tiles": lambda t: (
            height(t) * width(t) <= 8192 and t["BLOCK_K"] <= 32 and t["num_stages"] <= 3
        ),
    }


def _pool(shape: PoolShape) -> Space:
    """Tiles of BLOCK_P outputs by BLOCK_R numbers of the (image, channel) pairs."""
    parameters = {
        "BLOCK_P": (1, 2, 4, 8, 16, 32),
        "BLOCK_R": (32, 64, 128, 256, 512, 1024, 2048),
        "num_warps": (1, 2, 4, 8),
    }
    rules: Rules = {
        "a tile is no wider than the problem": lambda t: (
            t["BLOCK_R"] <= power_of_two(shape.N * aligned(shape.C), 32, 2048)
        ),
        "a thread has 1 to 32 numbers": lambda t: (
            1 <= t["BLOCK_P"] * t["BLOCK_R"] / (32 * t["num_warps"]) <= 32
        ),
    }
    return Space(parameters, rules)


def _tiles(size: int, block: int) -> int:
    return -(-size // block)
