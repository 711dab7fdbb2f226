"""What one multiprocessor of each architecture has, and how many blocks it therefore holds at once.

The limits come from this table and never from a device, so that a kernel can be judged for a GPU
that is not there. What a block may have of NVIDIA's is in `kernels/driver.py`, which launches are
held against. NVIDIA: CUDA C++ Programming Guide, "Technical Specifications per Compute
Capability"; how registers and shared memory are rounded, and what runs out first: the CUDA
Occupancy Calculator; columns of tensor memory: PTX ISA, "Tensor Memory". AMD: LLVM's "User Guide
for AMDGPU Backend" and the CDNA3 instruction set guide; a compute unit stands for the
multiprocessor, a wave for the warp, LDS for shared memory.
"""

from __future__ import annotations

import functools
import re
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import triton
from triton.backends import backends

from ...engine import EngineError
from ...kernels.driver import KIB, REGISTERS, SHARED_MEMORY, THREADS
from ..choices import GPUS as GPUS

Arch = int | str
"""As Triton names a target: NVIDIA's compute capability as a number, 90, or AMD's "gfx942"."""


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
    """One multiprocessor. Registers are of 32 bits, memory is in bytes."""

    registers: int
    registers_per_thread: int
    register_unit: int  # a warp's registers are rounded up to a multiple of this
    partitions: int  # each has its own schedulers and its share of the registers
    warps: int
    blocks: int
    shared: int
    shared_per_block: int  # the most that one block may ask for
    shared_reserved: int  # what the driver adds to each block
    shared_unit: int  # a block's shared memory is rounded up to a multiple of this
    tensor_memory: int = 0  # columns, where accumulators have a memory of their own
    threads_per_warp: int = 32
    threads_per_block: int = THREADS

    @property
    def warps_per_block(self) -> int:
        """The most that one block may have."""
        return self.threads_per_block // self.threads_per_warp

    def occupancy(
        self, registers: int, shared: int, warps: int, tensor_memory: int = 0
    ) -> Occupancy:
        """Of blocks with `warps` warps, `registers` a thread, `shared` bytes and columns of tensor
        memory."""
        fits = {
            "registers": self._by_registers(registers, warps) if registers else None,
            "shared memory": self._by_shared(shared),
            "tensor memory": self.tensor_memory // tensor_memory if tensor_memory else None,
            "warps": self.warps // warps if warps <= self.warps_per_block else 0,
            "blocks": self.blocks,
        }
        counts = {name: count for name, count in fits.items() if count is not None}
        blocks = min(counts.values())
        runs_out = tuple(name for name, count in counts.items() if count == blocks)
        return Occupancy(blocks, blocks * warps, blocks * warps / self.warps, runs_out)

    def _by_registers(self, registers: int, warps: int) -> int:
        """They are rounded up per warp, and each partition has its own: warps do not straddle."""
        each = _rounded(registers * self.threads_per_warp, self.register_unit)
        whole = each * _rounded(warps, self.partitions) <= self.registers
        if registers > self.registers_per_thread or not whole:
            return 0
        return self.registers // self.partitions // each * self.partitions // warps

    def _by_shared(self, shared: int) -> int | None:
        each = _rounded(shared + self.shared_reserved, self.shared_unit)
        if shared > self.shared_per_block:
            return 0
        return self.shared // each if each else None


def _nvidia(
    warps: int, blocks: int, shared_per_block: int, *, reserved: int = KIB, tensor_memory: int = 0
) -> Limits:
    """What all of NVIDIA's share; a multiprocessor has room for one block and what is reserved."""
    return Limits(
        registers=REGISTERS,
        registers_per_thread=255,
        register_unit=256,
        partitions=4,
        warps=warps,
        blocks=blocks,
        shared=shared_per_block + reserved,
        shared_per_block=shared_per_block,
        shared_reserved=reserved,
        shared_unit=128,
        tensor_memory=tensor_memory,
    )


LIMITS: dict[Arch, Limits] = {
    75: replace(_nvidia(32, 16, 64 * KIB, reserved=0), shared_unit=256),
    80: _nvidia(64, 32, SHARED_MEMORY[80]),
    86: _nvidia(48, 16, SHARED_MEMORY[86]),
    87: _nvidia(48, 16, SHARED_MEMORY[87]),
    89: _nvidia(48, 24, SHARED_MEMORY[89]),
    90: _nvidia(64, 32, SHARED_MEMORY[90]),
    100: _nvidia(64, 32, SHARED_MEMORY[100], tensor_memory=512),
    103: _nvidia(64, 32, SHARED_MEMORY[103], tensor_memory=512),
    120: _nvidia(48, 24, SHARED_MEMORY[120]),
    # 512 registers a lane in each of 4 SIMDs, accumulation registers included, handed out by 8.
    "gfx942": Limits(
        registers=4 * 512 * 64,
        registers_per_thread=512,
        register_unit=8 * 64,
        partitions=4,
        warps=32,
        blocks=16,
        shared=64 * KIB,
        shared_per_block=64 * KIB,
        shared_reserved=0,
        shared_unit=512,
        threads_per_warp=64,
    ),
}


def waves(grid: int, per_multiprocessor: int, multiprocessors: int) -> Waves | None:
    """How `grid` blocks pass through a card; None where none of them can run."""
    places = per_multiprocessor * multiprocessors
    if not places or not grid:
        return None
    return Waves(grid, places, grid / places, grid / (-(-grid // places) * places))


def arch_name(arch: Arch) -> str:
    """`sm_90` for 90, and AMD's names as they are."""
    return f"sm_{arch}" if isinstance(arch, int) else arch


def find_arch(name: str) -> Arch:
    """The architecture called `sm_90`, `90` or `gfx942`.

    Raises EngineError, listing those there are, for one that this Triton does not compile for or
    whose limits are not known.
    """
    wanted = name.strip().lower().removeprefix("sm_")
    for arch in compilable():
        if str(arch) == wanted:
            return arch
    legal = ", ".join(map(arch_name, compilable()))
    raise EngineError(f"--arch: Triton {triton.__version__} compiles for {legal}; got {name!r}")


def find_gpu(name: str) -> str:
    """The key in GPUS. Raises EngineError, listing those there are, for an unknown one."""
    key = name.strip().lower()
    if key not in GPUS:
        raise EngineError(f"--card: wanted one of {', '.join(GPUS)}, got {name!r}")
    return key


@functools.cache
def compilable() -> tuple[Arch, ...]:
    """The architectures of LIMITS that this Triton's assemblers and disassembler know."""
    assembled = _named("ptxas") | _named("ptxas-blackwell")
    known: set[Arch] = {*assembled & _named("nvdisasm")}
    if "amd" in backends:
        known.add("gfx942")
    return tuple(arch for arch in LIMITS if arch in known)


def _named(program: str) -> set[int]:
    """The architectures that a program's help names, none if Triton does not ship it."""
    if not tool(program).exists():
        return set()
    told = subprocess.run([tool(program), "--help"], capture_output=True, text=True).stdout
    return {int(number) for number in re.findall(r"'sm_?(\d+)'", told, re.IGNORECASE)}


def tool(name: str) -> Path:
    """Where one of the CUDA programs that Triton ships lies."""
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def _rounded(count: int, unit: int) -> int:
    return -(-count // unit) * unit
