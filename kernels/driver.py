"""What the CUDA driver or the hardware refuses of a launch, told without either.

A compiler knows nothing of a launch's grid, tensors and strides: what breaks a rule there is found
on the card, by the first user with that batch. Here each rule is a line of a table with the place
where it is written, and `refusals` holds a `Launch` against all of them, on meta tensors too.

Most rules are those of tensor maps, from compute capability 9.0; before it Triton makes pointers of
its descriptors. The rest are the limits of a grid and of a block, and the 32 bits in which Triton
and the kernels here count.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from .jit import Launch

KIB = 1024

# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
SHARED_MEMORY = {
    80: 163 * KIB,
    86: 99 * KIB,
    87: 163 * KIB,
    89: 99 * KIB,
    90: 227 * KIB,
    100: 227 * KIB,
    103: 227 * KIB,
    120: 99 * KIB,
}
"""Bytes that one block may ask for, by compute capability."""
THREADS = 1024  # of one block
REGISTERS = 65_536  # of one block
GRID = (2**31 - 1, 65_535, 65_535)

HOPPER = 90  # tensor maps and dependent launches are from compute capability 9.0
WARP = 32
INT32 = 2**31  # the first number that does not fit

_GUIDE = 'CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"'
_ENCODE = "CUDA Driver API, cuTensorMapEncodeTiled"


# --- what is judged --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TensorMap:
    """A descriptor as Triton hands it to cuTensorMapEncodeTiled: innermost dimension first."""

    name: str  # of the kernel's argument
    address: int  # of a meta tensor, bytes from the start of its allocation
    room: int  # bytes from there to the end of the allocation
    itemsize: int
    sizes: tuple[int, ...]  # globalDim
    strides: tuple[int, ...]  # globalStrides, in bytes: of all dimensions but the innermost
    box: tuple[int, ...]  # boxDim
    swizzle: int  # bytes of the swizzle's span, 0: none

    @property
    def span(self) -> int:
        """Bytes of the box's innermost side."""
        return self.box[0] * self.itemsize


@dataclass(frozen=True, slots=True)
class Asked:
    """A launch on an architecture; shared memory and registers are known once it is compiled."""

    launch: Launch
    arch: int
    maps: tuple[TensorMap, ...]  # none before Hopper
    shared: int | None  # bytes of a block
    registers: int | None  # of a thread


def tensor_map(name: str, descriptor: TensorDescriptor) -> TensorMap:
    """The map that Triton makes of a descriptor.

    A block is loaded as several boxes: no side is longer than 256, and rows are as long as the
    swizzle's span, the longest that divides the block's; fewer than eight rows are not swizzled.
    """
    base, size = descriptor.base, descriptor.base.dtype.itemsize
    *rows, row = descriptor.block_shape
    swizzle = next((span for span in (128, 64, 32) if row * size % span == 0), 0)
    if math.prod(rows) < 8:
        swizzle = 0
    box = (swizzle // size if swizzle else row, *reversed(rows))
    return TensorMap(
        name,
        base.data_ptr(),
        base.untyped_storage().nbytes() - base.storage_offset() * size,
        size,
        tuple(reversed(descriptor.shape)),
        tuple(size * stride for stride in reversed(descriptor.strides[:-1])),
        tuple(min(side, 256) for side in box),
        swizzle,
    )


def tensor_maps(launch: Launch) -> tuple[TensorMap, ...]:
    """The maps of all descriptors among a launch's arguments."""
    given = launch.arguments.items()
    return tuple(tensor_map(name, v) for name, v in given if isinstance(v, TensorDescriptor))


# --- tensor maps -----------------------------------------------------------------------------


def _rank(tensor: TensorMap) -> Iterator[str]:
    if not 1 <= len(tensor.sizes) <= 5:
        yield f"{len(tensor.sizes)} dimensions, wanted 1 to 5"


def _address(tensor: TensorMap) -> Iterator[str]:
    # An allocation is aligned to 256 bytes at least, so the distance from its start will do.
    if tensor.address % 16:
        yield f"starts {tensor.address % 16} bytes after a multiple of 16"


def _sizes(tensor: TensorMap) -> Iterator[str]:
    for size in tensor.sizes:
        if not 1 <= size <= 2**32:
            yield f"a size of {size}, wanted 1 to 2^32"


def _sizes_in_triton(tensor: TensorMap) -> Iterator[str]:
    for size in tensor.sizes:
        if size >= INT32:
            yield f"a size of {size}, which Triton passes in 32 bits"


def _strides(tensor: TensorMap) -> Iterator[str]:
    for stride in tensor.strides:
        if stride % 16:
            yield f"a stride of {stride} bytes, wanted a multiple of 16"
        if not 0 <= stride < 2**40:
            yield f"a stride of {stride} bytes, wanted less than 2^40"


def _box(tensor: TensorMap) -> Iterator[str]:
    for side in tensor.box:
        if not 1 <= side <= 256:
            yield f"a box with a side of {side}, wanted 1 to 256"


def _box_rows(tensor: TensorMap) -> Iterator[str]:
    if tensor.span % 16:
        yield f"a box with rows of {tensor.span} bytes, wanted a multiple of 16"


def _swizzle(tensor: TensorMap) -> Iterator[str]:
    if tensor.swizzle and tensor.span > tensor.swizzle:
        yield f"a box with rows of {tensor.span} bytes, over the swizzle's {tensor.swizzle}"


def _inside(tensor: TensorMap) -> Iterator[str]:
    steps = zip(tensor.sizes, (tensor.itemsize, *tensor.strides), strict=True)
    end = tensor.itemsize + sum((size - 1) * step for size, step in steps)
    if end > tensor.room:
        yield f"ends {end - tensor.room} bytes behind its allocation"


def _of_maps(check: Callable[[TensorMap], Iterator[str]]) -> Callable[[Asked], Iterator[str]]:
    def breaches(asked: Asked) -> Iterator[str]:
        for tensor in asked.maps:
            for line in check(tensor):
                yield f"{tensor.name}: {line}"

    return breaches


# --- grids and blocks ------------------------------------------------------------------------


def _grid(asked: Asked) -> Iterator[str]:
    for axis, programs, most in zip("xyz", asked.launch.grid, GRID, strict=False):
        if not 1 <= programs <= most:
            yield f"{programs} programs along {axis}, wanted 1 to {most}"


def _threads(asked: Asked) -> Iterator[str]:
    warps = asked.launch.num_warps
    if warps * WARP > THREADS:
        yield f"{warps} warps a block, wanted at most {THREADS // WARP}"


def _warps(asked: Asked) -> Iterator[str]:
    warps = asked.launch.num_warps
    if warps < 1 or warps & (warps - 1):
        yield f"{warps} warps a block, wanted a power of two"


def _dependent(asked: Asked) -> Iterator[str]:
    if asked.launch.pdl and asked.arch < HOPPER:
        yield f"starts before its predecessor ends, which sm_{asked.arch} cannot"


def _shared(asked: Asked) -> Iterator[str]:
    if asked.shared is not None and asked.shared > SHARED_MEMORY[asked.arch]:
        most = SHARED_MEMORY[asked.arch]
        yield f"{asked.shared} bytes of shared memory a block, sm_{asked.arch} has {most}"


def _registers(asked: Asked) -> Iterator[str]:
    wanted = (asked.registers or 0) * WARP * asked.launch.num_warps
    if wanted > REGISTERS:
        yield f"{wanted} registers a block, wanted at most {REGISTERS}"


# --- 32 bits ---------------------------------------------------------------------------------

# Distances in memory, which every kernel here multiplies in 64 bits.
_DISTANCE = re.compile(r"(stride|[abxy])_[a-z]")


def _integers(asked: Asked) -> Iterator[str]:
    for name, value in asked.launch.arguments.items():
        wide = isinstance(value, int) and not -INT32 <= value < INT32
        if wide and not _DISTANCE.fullmatch(name):
            yield f"{name} is {value}, which takes another binary, of 64 bits"


def _rows(asked: Asked) -> Iterator[str]:
    """Rows are numbered in 32 bits; tiles are powers of two, so the last ends at 2^31 at most."""
    told = asked.launch.arguments
    if "M" in told:
        last = told["M"] - 1
    elif "OH" in told and "N" in told:
        last = told["OH"] * told["OW"] * told["N"] - 1
    elif "R" in told:  # pooling's numbers of a pixel, which the kernel itself cuts into tiles
        last = told["R"] + told["BLOCK_R"] - 1
    elif "N" in told:  # and so does a linear layer with its images
        last = told["N"] + told["BLOCK_M"] - 1
    else:
        return
    if last >= INT32:
        yield f"counts to {last}"


def _filters(asked: Asked) -> Iterator[str]:
    """A convolution's filters [KH*KW, OC, C], read through pointers or, of one tap, ahead."""
    arguments = asked.launch.arguments
    if "KH" not in arguments:
        return
    filters, taps = arguments.get("w"), 1
    if isinstance(filters, torch.Tensor):
        taps = filters.shape[0]
    else:
        filters = arguments.get("w_memory") if asked.launch.pdl else None
    if filters is not None and taps * filters.stride(0) > INT32:
        yield f"{taps * filters.stride(0)} numbers in the filters"


# --- the table -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule by name, where it is written, and how a launch breaks it, in words."""

    name: str
    source: str
    breaches: Callable[[Asked], Iterator[str]]


RULES = (
    Rule("tensorRank", _ENCODE, _of_maps(_rank)),
    Rule("globalAddress", _ENCODE, _of_maps(_address)),
    Rule("globalDim", _ENCODE, _of_maps(_sizes)),
    Rule("descriptor sizes", "Triton, backends/nvidia/driver.py", _of_maps(_sizes_in_triton)),
    Rule("globalStrides", _ENCODE, _of_maps(_strides)),
    Rule("boxDim", _ENCODE, _of_maps(_box)),
    Rule("boxDim[0]", _ENCODE, _of_maps(_box_rows)),
    Rule("swizzle", _ENCODE, _of_maps(_swizzle)),
    Rule("allocation", "CUDA Driver API, CUDA_ERROR_ILLEGAL_ADDRESS", _of_maps(_inside)),
    Rule("grid", _GUIDE, _grid),
    Rule("threads", _GUIDE, _threads),
    Rule("num_warps", "Triton, backends/nvidia/compiler.py", _warps),
    Rule(
        "dependent launch",
        'CUDA C++ Programming Guide, "Programmatic Dependent Launch"',
        _dependent,
    ),
    Rule("shared memory", _GUIDE, _shared),
    Rule("registers", _GUIDE, _registers),
    Rule("integers", "Triton: an integer of 2^31 or more is an i64", _integers),
    Rule("rows", "the kernels here: program_id * BLOCK_M + arange is an i32", _rows),
    Rule("filters", "kernels/conv.py: the offset of a filter is an i32", _filters),
)


def refusals(
    launch: Launch, arch: int, shared: int | None = None, registers: int | None = None
) -> list[str]:
    """Why compute capability `arch` (80, 90, ...) would not run this launch; none if it would.

    `shared` bytes of a block and `registers` of a thread are those of the compiled kernel; they are
    left aside where it has not been compiled, since a launch alone does not tell them.
    """
    maps = tensor_maps(launch) if arch >= HOPPER else ()
    asked = Asked(launch, arch, maps, shared, registers)
    return [
        f"{rule.name}: {launch.kernel.__name__}: {line} ({rule.source})"
        for rule in RULES
        for line in rule.breaches(asked)
    ]


def departures(launch: Launch, arch: int) -> dict[str, str]:
    """Maps that the documentation does not describe, by argument: out of "order", or an "overlap".

    It says of globalStrides that each "includes previous dimension stride": stride i is stride i-1
    times size i and its padding, and no less than size i. Yet such maps are made every day, so this
    is told apart from what is refused: FlashAttention-3's have the heads of one row after its rows,
    and Triton's tools/ragged_tma.py gives two dimensions one stride.
    """
    found = {}
    for tensor in tensor_maps(launch) if arch >= HOPPER else ():
        steps = zip((tensor.itemsize, *tensor.strides), tensor.sizes, strict=True)
        taken = [(step, size) for step, size in steps if size > 1]
        if not _nested(sorted(taken)):
            found[tensor.name] = "overlap"
        elif not _nested(taken):
            found[tensor.name] = "order"
    return found


def _nested(steps: list[tuple[int, int]]) -> bool:
    """Whether each dimension's step passes over the whole of the dimension before it."""
    return all(step * size <= further for (step, size), (further, _) in pairwise(steps))
