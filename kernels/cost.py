"""What a launch costs on a card, by what limits it: a model of numbers, without a card or a tensor.

A program walks its steps of K; all work on a tile of rows x columns is proportional to them:

    step     = max(matrix, operand fill, shared memory, issue, latency)          in clocks
    program  = steps * step + around / resident
    launch   = launch_us + max(waves * program / clock, bytes / memory)

with `resident` programs on a multiprocessor at once: they share what a step takes, and hide what
lies around the steps. Waves are programs a multiprocessor, rounded up; where programs are unlike,
since tiles skip taps that meet only padding, the early ones make room for the rest, and half a
program is what is left over. Prefetches count for nothing.

`Tiles` says how a launch is cut in numbers that no kernel has to itself; the functions at the end
make them of each kernel's shape and configuration. These may be any objects with the kernel's
fields: the kernels choose their configurations by what they cost, so they import this file and not
the reverse.

The form of the model and the numbers of `H200` are by counting and reading machine code, before any
measurement; those of `H100` are fitted to what one measured: bench/results/NOTES.md says how well.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Chip:
    """What is assumed of a card; "a clock" is a clock and multiprocessor."""

    name: str
    multiprocessors: int
    clock: float  # Hz
    memory: float  # bytes a second
    matrix: float  # multiply-accumulates of halves a clock; half as many in tf32
    fma: float  # the same in ieee float32, which no matrix unit computes
    fill: float  # bytes of operands a clock that arrive from the L2 cache, if all ask for theirs
    shared: float  # bytes a clock that shared memory reads or writes
    shared_memory: int  # bytes of a multiprocessor
    port: float = 64  # bytes a clock that arrive if few multiprocessors ask
    issue: float = 3.0  # instructions of warps a clock, of the 4 that there could be
    barriers: float = 60.0  # instructions that a warp could issue while it waits in a step
    latency: float = 1_450.0  # clocks from asking for a tile to having it
    around: float = 4_500.0  # clocks of a program's prologue and epilogue
    launch_us: float = 1.3  # from the end of a launch to the start of the next
    dependent_us: float = 0.7  # the same where launches overlap (pdl.py)


H200 = Chip("H200", 132, 1.755e9, 4.3e12, 2_048, 128, fill=32, shared=128, shared_memory=228 * 1024)
# What 220 measured configurations of convolutions and linear layers deny of the above: operands
# arrive at 50 bytes a clock at least, from where on shared memory limits, at 84 % of its rate. The
# matrix rate is that of a measured product, which power limits; the memory's is that of pools.
H100 = replace(H200, name="H100 SXM", memory=3.0e12, matrix=1_650, fill=56, shared=108)
A100 = Chip(
    "A100 80GB", 108, 1.41e9, 2.04e12, 1_024, 64, fill=32, shared=128, shared_memory=164 * 1024
)
CHIPS = {chip.name: chip for chip in (H200, H100, A100)}

REGISTERS = 65_536  # of a multiprocessor
OF_A_THREAD = 255
WARPS = 64  # of a multiprocessor, at most
RESERVED = 1024  # bytes of shared memory that the driver adds to each program


@functools.cache
def chip_of(arch: int) -> Chip:
    """What is assumed of compute capability `arch` (80, 90, ...) where the card is not known.

    Cards for desks have less shared memory than those for data centres.
    """
    chip = H200 if arch >= 90 else A100
    return replace(chip, shared_memory=100 * 1024) if arch in (86, 89) or arch >= 120 else chip


# --- a launch in numbers ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tiles:
    """How one launch is cut: `programs` walk `steps` of K in all, the longest of them `longest`.

    A step brings rows x depth and columns x depth numbers of `itemsize` bytes. Without columns
    there are no products, and a step only reads rows x depth numbers.
    """

    rows: int
    columns: tuple[int, ...]  # of each accumulator
    depth: int
    itemsize: int
    programs: int
    steps: int
    longest: int
    bytes: int  # to and from memory, by all programs
    arithmetic: str = "half"  # or "tf32" or "ieee"
    warps: int = 4
    stages: int = 3  # tiles of operands in shared memory
    instructions: int = 100  # of each warp in a step; more where it gathers rows itself
    registers: int = 28  # of each thread beside its sums; more where it gathers rows itself
    parts: int = 1  # programs that share the sum of a tile; the last of them adds
    full: float = 1.0  # part of the rows that are there; the rest is neither read nor written

    @property
    def operands(self) -> int:
        """Bytes of shared memory that a step fills."""
        return (self.rows + sum(self.columns)) * self.depth * self.itemsize

    @property
    def sums(self) -> int:
        """Numbers in the accumulators of a program."""
        return self.rows * sum(self.columns)


class Clocks(NamedTuple):
    """Clocks that a step of K takes on a multiprocessor, by what could limit it."""

    matrix: float
    operand_fill: float
    shared_memory: float
    issue: float
    latency: float

    @property
    def limit(self) -> str:
        """What takes longest, in words."""
        return LIMITS[self.index(max(self))]


LIMITS = tuple(name.replace("_", " ") for name in Clocks._fields)
"""What the numbers of Clocks are, in words."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What launches take, one after the other, and what limits the longest of them."""

    us: float  # infinite if a multiprocessor has no room for a program
    launches: int
    limit: str  # one of LIMITS, or "prologue", "memory", "launch" or "room"
    tiles: tuple[Tiles, ...] = field(repr=False)

    def __add__(self, other: Cost) -> Cost:
        if not other.launches:
            return self
        longer = max(self, other, key=lambda one: one.us)
        launches = self.launches + other.launches
        return Cost(self.us + other.us, launches, longer.limit, self.tiles + other.tiles)


NOTHING = Cost(0.0, 0, "launch", ())


def resident(tiles: Tiles, chip: Chip) -> int:
    """Programs that a multiprocessor holds at once, 0 if none fits."""
    threads = 32 * tiles.warps
    a_thread = -(-tiles.sums // threads) + tiles.registers
    if a_thread > OF_A_THREAD:
        return 0
    fits = min(REGISTERS // (-(-a_thread // 8) * 8 * threads), WARPS // tiles.warps)
    if tiles.columns:
        fits = min(fits, chip.shared_memory // (tiles.stages * tiles.operands + RESERVED))
    return fits


def filled(chip: Chip, programs: int) -> float:
    """Bytes a clock that arrive from the L2 cache at each of the multiprocessors that run them."""
    return min(chip.port, chip.fill * max(1, chip.multiprocessors / programs))


def step(tiles: Tiles, chip: Chip, held: int) -> Clocks:
    """Clocks of one step where `held` programs are resident.

    A warpgroup's instruction multiplies 64 rows of 32 bytes with the same of up to 256 columns and
    reads both from shared memory, where they were written before.
    """
    operands, columns = tiles.operands, tiles.columns
    missing = tiles.rows * (1 - tiles.full) * tiles.depth * tiles.itemsize
    fill = (operands - missing) / filled(chip, tiles.programs)
    if not columns:
        issue = tiles.instructions * tiles.warps / chip.issue
        return Clocks(0.0, fill, 0.0, issue, 0.0)
    blocks = -(-tiles.rows // 64)
    rate = {"half": chip.matrix, "tf32": chip.matrix / 2, "ieee": chip.fma}[tiles.arithmetic]
    split = max(1, tiles.warps // 4 // blocks)  # warpgroups with columns of the same rows
    read = blocks * (64 * split * len(columns) + sum(columns)) * tiles.depth * tiles.itemsize
    return Clocks(
        64 * blocks * sum(columns) * tiles.depth / rate,
        fill,
        (read + operands) / chip.shared,
        (tiles.instructions + chip.barriers) * tiles.warps / chip.issue,
        chip.latency / (max(1, tiles.stages - 1) * held),
    )


def cost(tiles: Tiles, chip: Chip) -> Cost:
    """What a launch takes on a card."""
    programs, multiprocessors = tiles.programs, chip.multiprocessors
    if not programs:
        return NOTHING
    held = min(resident(tiles, chip), -(-programs // multiprocessors))
    if not held:
        return Cost(math.inf, 1, "room", (tiles,))
    each = step(tiles, chip, held)
    waves = programs / multiprocessors
    rounded: float = -(-programs // multiprocessors)
    if tiles.longest * programs != tiles.steps:
        rounded = max(1, min(rounded, waves + 0.5))
    walking = max(rounded * tiles.steps / programs, tiles.longest) * max(each)
    around = rounded * (chip.around if tiles.columns else chip.latency) / held
    if tiles.parts > 1:  # the last program of a tile counts them, reads all parts and adds
        finished = programs // tiles.parts
        read = -(-finished // multiprocessors) * tiles.parts * 4 * tiles.sums * tiles.full
        around += chip.latency + read / filled(chip, finished)
    busy, memory = (walking + around) / chip.clock * 1e6, tiles.bytes / chip.memory * 1e6
    limit = each.limit if walking >= around else "prologue"
    if memory > busy:
        busy, limit = memory, "memory"
    if chip.launch_us > busy:
        limit = "launch"
    return Cost(busy + chip.launch_us, 1, limit, (tiles,))


Candidate = TypeVar("Candidate")


def parts_to_fill(programs: int, steps: int, chip: Chip, waves: int = 1) -> int:
    """In how many parts to cut the sums of few programs, of `steps` each, to fill a card.

    In so many waves at most, and in eight parts, of four steps or more: each costs a write and a
    read.
    """
    return max(1, min(waves * chip.multiprocessors // max(1, programs), steps // 4, 8))


def cheapest(candidates: Iterable[Candidate], cost: Callable[[Candidate], Cost]) -> Candidate:
    """The candidate that takes the least time, the first of equals.

    Raises ValueError if there is none.
    """
    return min(candidates, key=lambda candidate: cost(candidate).us)


# --- of each kernel --------------------------------------------------------------------------


def conv_cost(shape: Any, config: Any, dtype: torch.dtype, precision: str, chip: Chip) -> Cost:
    """Of a Conv2dShape and a Conv2dConfig; bytes as in conv.work.

    Tiles of `rows` skip the taps that none of their rows can use, but not those of a split sum.
    Those of `pixels` skip none.
    """
    n, oh, ow, kh, kw = shape.N, shape.OH, shape.OW, shape.KH, shape.KW
    c, oc = shape.C // shape.groups, shape.OC // shape.groups
    columns = (config.BLOCK_N, config.BLOCK_N2) if config.BLOCK_N2 else (config.BLOCK_N,)
    blocks = -(-c // config.BLOCK_K)
    across = shape.groups * -(-oc // sum(columns))
    longest = kh * kw * blocks
    gathered = config.tiling == "pixels" or not config.descriptors
    block = config.BLOCK_M + config.BLOCK_M2
    if config.tiling == "pixels":
        tiles = -(-oh * ow * n // block)
        steps = across * tiles * longest
    else:
        (stride_h, stride_w), (dilation_h, dilation_w) = shape.stride, shape.dilation
        top, _, left, _ = shape.padding
        width = shape.W, ow, kw, stride_w, left, dilation_w
        of_a_row, taps = _of_a_row(width, n, block)
        tiles = oh * of_a_row
        steps = across * blocks * taps
        steps *= _of_a_column((shape.H, oh, kh, stride_h, top, dilation_h))
    elements = n * (shape.C * shape.H * shape.W + shape.OC * oh * ow) + shape.OC * (c * kh * kw + 1)
    tile = block, columns, config.BLOCK_K, dtype.itemsize
    walk, parts = _split(across * tiles, steps, longest, config.SPLIT_K)
    told = _told(config, dtype, precision, gathered)
    told |= {"parts": parts, "full": oh * ow * n / (tiles * block) if n else 1.0}
    return cost(Tiles(*tile, *walk, elements * dtype.itemsize, **told), chip)


def first_layer_cost(
    shape: Any, pixel: int, config: Any, dtype: torch.dtype, precision: str, chip: Chip
) -> Cost:
    """Of the Conv2dShape of a first layer on pixels of so many numbers, and its configuration.

    A step is a filter row: a window of numbers that `columns` outputs share.
    """
    n, oh, block = shape.N, shape.OH, config.BLOCK_M
    groups = -(-shape.OW // config.columns)
    if config.form == "images":
        tiles = groups * oh * -(-n // block)
    elif config.form == "rows":
        tiles = groups * -(-oh // block) * n
    else:
        tiles = -(-groups * oh * n // block)
    columns = (config.BLOCK_N, config.BLOCK_N2) if config.BLOCK_N2 else (config.BLOCK_N,)
    programs = tiles * -(-config.columns * shape.OC // sum(columns))
    window = ((config.columns - 1) * shape.stride[1] + shape.KW) * pixel
    longest = shape.KH * -(-window // config.BLOCK_K)
    elements = n * (shape.H * shape.W * pixel + shape.OC * oh * shape.OW)
    elements += shape.OC * (shape.KH * shape.KW * pixel + 1)
    tile = block, columns, config.BLOCK_K, dtype.itemsize, programs, programs * longest, longest
    told = _told(config, dtype, precision, config.form == "pointers")
    full = groups * oh * n / (tiles * block) if tiles else 1.0
    return cost(Tiles(*tile, elements * dtype.itemsize, **told, full=full), chip)


def linear_cost(shape: Any, config: Any, dtype: torch.dtype, precision: str, chip: Chip) -> Cost:
    """Of a LinearShape and a LinearConfig; bytes as in gemm.work."""
    rows, width = config.BLOCK_M, config.BLOCK_N
    if config.transposed:
        rows, width = width, rows
    longest = shape.P * -(-shape.C // config.BLOCK_K)
    programs = -(-shape.N // config.BLOCK_M) * -(-shape.OC // config.BLOCK_N)
    features = shape.P * shape.C
    elements = shape.N * (features + shape.OC) + shape.OC * (features + 1)
    tile = rows, (width,), config.BLOCK_K, dtype.itemsize
    walk, parts = _split(programs, programs * longest, longest, config.SPLIT_K)
    told = _told(config, dtype, precision, not config.descriptors)
    told["parts"] = parts
    return cost(Tiles(*tile, *walk, elements * dtype.itemsize, **told), chip)


def pool_cost(shape: Any, config: Any, dtype: torch.dtype, chip: Chip) -> Cost:
    """Of a PoolShape and a PoolConfig: every tap is read anew, and mostly found in the cache."""
    numbers = shape.N * -(-shape.C // 8) * 8
    taps = shape.kernel[0] * shape.kernel[1]
    if shape.adaptive:
        taps = -(-shape.H // shape.OH) * -(-shape.W // shape.OW)
    outputs = shape.OH * shape.OW
    programs = -(-outputs // config.BLOCK_P) * -(-numbers // config.BLOCK_R)
    moved = numbers * (shape.H * shape.W + outputs) * dtype.itemsize
    of_a_thread = config.BLOCK_P * config.BLOCK_R // (32 * config.num_warps)
    tile = (config.BLOCK_P, (), config.BLOCK_R, dtype.itemsize, programs, programs * taps, taps)
    return cost(Tiles(*tile, moved, warps=config.num_warps, instructions=2 * of_a_thread), chip)


def channels_last_cost(
    shape: Any, config: Any, image: torch.dtype, dtype: torch.dtype, chip: Chip
) -> Cost:
    """Of a ChannelsLastShape and its configuration: 4 instructions an element, as compiled."""
    rows, columns = shape.rows, shape.columns
    if (rows, columns) == (shape.H, shape.W):  # dense images are one row each
        rows, columns = 1, rows * columns
    width = min(1 << (columns - 1).bit_length(), config.BLOCK)
    programs = -(-columns // width) * -(-shape.N * rows // (config.BLOCK // width))
    moved = shape.N * shape.C * shape.H * shape.W * image.itemsize
    moved += shape.N * shape.rows * shape.columns * shape.pixel * dtype.itemsize
    of_a_thread = -(-config.BLOCK * shape.pixel // (32 * config.num_warps))
    tile = (config.BLOCK, (), shape.pixel, dtype.itemsize, programs, programs, 1)
    return cost(Tiles(*tile, moved, warps=config.num_warps, instructions=4 * of_a_thread), chip)


def stream_cost(moved: int, chip: Chip) -> Cost:
    """Of a kernel that does little more than move so many bytes: a normalisation, a softmax."""
    programs = -(-moved // 8_192)
    return cost(Tiles(64, (), 64, 2, programs, programs, 1, moved), chip)


def _told(config: Any, dtype: torch.dtype, precision: str, gathered: bool) -> dict[str, Any]:
    """Fields of Tiles that a configuration or the compiled loop tells."""
    return {
        "arithmetic": "half" if dtype.itemsize == 2 else precision,
        "warps": config.num_warps,
        "stages": config.num_stages,
        "instructions": 176 if gathered else 100,
        "registers": 44 if gathered else 28,
    }


def _split(programs: int, steps: int, longest: int, split: int) -> tuple[tuple[int, int, int], int]:
    """Programs, steps and longest of sums in so many parts, and how many of these have a step."""
    if split == 1 or not programs:
        return (programs, steps, longest), 1
    each = -(-longest // split)
    parts = -(-longest // each)
    return (programs * parts, programs * parts * each, each), parts


Axis = tuple[int, int, int, int, int, int]
"""Pixels, outputs, taps of a filter, stride, padding before the first pixel, dilation."""


def _users(axis: Axis) -> Iterator[range]:
    """For each tap of a filter, the outputs along an axis for which it lies inside the image."""
    size, out, kernel, stride, pad, dilation = axis
    for tap in range(kernel):
        before = pad - tap * dilation  # output o reads pixel o * stride - before
        yield range(max(0, -(-before // stride)), min(out, (size - 1 + before) // stride + 1))


@functools.lru_cache(maxsize=1024)
def _of_a_column(axis: Axis) -> int:
    """Taps that all outputs of a column use together."""
    return sum(map(len, _users(axis)))


@functools.lru_cache(maxsize=1024)
def _of_a_row(axis: Axis, images: int, block: int) -> tuple[int, int]:
    """Tiles of an output row, and the taps that they use together.

    Rows of tiles run over (column, image), but at larger strides stay in their column.
    """
    if axis[3] > 1:
        tiles = -(-images // block)
        return axis[1] * tiles, _of_a_column(axis) * tiles
    ends = ((users.start * images, users.stop * images - 1) for users in _users(axis) if users)
    used = sum(last // block - first // block + 1 for first, last in ends)
    return -(-axis[1] * images // block), used
