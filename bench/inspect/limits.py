"""What one multiprocessor of each architecture has, and how many blocks it therefore holds at once.

The limits come from this table and never from a device, so that a kernel can be judged for a GPU
that is not there. What a block may have of NVIDIA's is in `kernels/driver.py`, which launches are
held against. From: CUDA C++ Programming Guide, "Technical Specifications per Compute
Capability"; how registers and shared memory are rounded, and what runs out first: the CUDA
Occupancy Calculator; columns of tensor memory: PTX ISA, "Tensor Memory".
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import triton

from ...engine import EngineError
from ...kernels.driver import KIB, REGISTERS, SHARED_MEMORY, THREADS
from ..choices import GPUS as GPUS

Arch = int
"""A compute capability as a number, 90 for 9.0."""

OF_A_WARP = 32  # threads
WARPS_OF_A_BLOCK = THREADS // OF_A_WARP
REGISTERS_OF_A_THREAD = 255
PARTITIONS = 4  # of a multiprocessor; each has its own schedulers and its share of the registers
RESERVED = KIB  # bytes of shared memory that the driver adds to each block


@dataclass(frozen=True, slots=True)
class Occupancy:
    """Blocks and warps resident on one multiprocessor; no block if it cannot be launched."""

    blocks: int
    warps: int
    share: float  # of the warps that there could be
    limited_by: tuple[str, ...]  # what runs out first; several if they run out together


@dataclass(frozen=True, slots=True)
class Waves:
    """A grid on a card: every multiprocessor takes its blocks, then the next, until none is left.

    `full` is how much of the places in all waves is used, if all blocks take equally long.
    """

    blocks: int
    places: int  # blocks that run at once
    waves: float
    full: float


@dataclass(frozen=True, slots=True)
class Limits:
    """One multiprocessor of REGISTERS registers of 32 bits; memory is in bytes."""

    warps: int
    blocks: int
    shared_per_block: int  # the most that one block may ask for
    tensor_memory: int = 0  # columns, where accumulators have a memory of their own

    def occupancy(
        self, registers: int, shared: int, warps: int, tensor_memory: int = 0
    ) -> Occupancy:
        """Of blocks with `warps` warps, `registers` a thread, `shared` bytes and columns of tensor
        memory."""
        fits = {
            "registers": _by_registers(registers, warps) if registers else None,
            "shared memory": self._by_shared(shared),
            "tensor memory": self.tensor_memory // tensor_memory if tensor_memory else None,
            "warps": self.warps // warps if warps <= WARPS_OF_A_BLOCK else 0,
            "blocks": self.blocks,
        }
        counts = {name: count for name, count in fits.items() if count is not None}
        blocks = min(counts.values())
        runs_out = tuple(name for name, count in counts.items() if count == blocks)
        return Occupancy(blocks, blocks * warps, blocks * warps / self.warps, runs_out)

    def _by_shared(self, shared: int) -> int:
        """There is room for the largest block with what the driver adds."""
        if shared > self.shared_per_block:
            return 0
        return (self.shared_per_block + RESERVED) // _rounded(shared + RESERVED, 128)


def _by_registers(registers: int, warps: int) -> int:
    """They are rounded up per warp, and each partition has its own: warps do not straddle."""
    each = _rounded(registers * OF_A_WARP, 256)
    whole = each * _rounded(warps, PARTITIONS) <= REGISTERS
    if registers > REGISTERS_OF_A_THREAD or not whole:
        return 0
    return REGISTERS // PARTITIONS // each * PARTITIONS // warps


LIMITS: dict[Arch, Limits] = {
    80: Limits(64, 32, SHARED_MEMORY[80]),
    86: Limits(48, 16, SHARED_MEMORY[86]),
    87: Limits(48, 16, SHARED_MEMORY[87]),
    89: Limits(48, 24, SHARED_MEMORY[89]),
    90: Limits(64, 32, SHARED_MEMORY[90]),
    100: Limits(64, 32, SHARED_MEMORY[100], tensor_memory=512),
    103: Limits(64, 32, SHARED_MEMORY[103], tensor_memory=512),
    120: Limits(48, 24, SHARED_MEMORY[120]),
}


def waves(grid: int, per_multiprocessor: int, multiprocessors: int) -> Waves | None:
    """How `grid` blocks pass through a card; None where none of them can run."""
    places = per_multiprocessor * multiprocessors
    if not places or not grid:
        return None
    return Waves(grid, places, grid / places, grid / (-(-grid // places) * places))


def arch_name(arch: Arch) -> str:
    """`sm_90` for 90."""
    return f"sm_{arch}"


def find_arch(name: str) -> Arch:
    """The architecture called `sm_90` or `90`.

    Raises EngineError, listing those there are, for one whose limits are not known.
    """
    number = name.strip().lower().removeprefix("sm_")
    if not number.isdecimal() or int(number) not in LIMITS:
        legal = ", ".join(map(arch_name, LIMITS))
        raise EngineError(f"--arch: wanted one of {legal}, got {name!r}")
    return int(number)


def tool(name: str) -> Path:
    """Where one of the CUDA programs that Triton ships lies."""
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def _rounded(count: int, unit: int) -> int:
    return -(-count // unit) * unit
