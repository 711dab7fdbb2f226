"""What one multiprocessor of each architecture has, and how many of them a card has.

The limits come from this table and never from a device, so that a kernel can be judged for a GPU
that is not there. NVIDIA: CUDA C++ Programming Guide, "Technical Specifications per Compute
Capability"; how registers and shared memory are rounded: the CUDA Occupancy Calculator; columns of
tensor memory: PTX ISA, "Tensor Memory". AMD: LLVM's "User Guide for AMDGPU Backend" and the CDNA3
instruction set guide; a compute unit stands for the multiprocessor, a wave for the warp, LDS for
shared memory.
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

KIB = 1024

Arch = int | str
"""As Triton names a target: NVIDIA's compute capability as a number, 90, or AMD's "gfx942"."""


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
    threads_per_block: int = 1024

    @property
    def warps_per_block(self) -> int:
        """The most that one block may have."""
        return self.threads_per_block // self.threads_per_warp


def _nvidia(warps: int, blocks: int, shared: int, tensor_memory: int = 0) -> Limits:
    """What all since 8.0 share, with shared memory in KiB."""
    return Limits(
        registers=65_536,
        registers_per_thread=255,
        register_unit=256,
        partitions=4,
        warps=warps,
        blocks=blocks,
        shared=shared * KIB,
        shared_per_block=(shared - 1) * KIB,
        shared_reserved=KIB,
        shared_unit=128,
        tensor_memory=tensor_memory,
    )


LIMITS: dict[Arch, Limits] = {
    75: replace(_nvidia(32, 16, 64), shared_per_block=64 * KIB, shared_reserved=0, shared_unit=256),
    80: _nvidia(64, 32, 164),
    86: _nvidia(48, 16, 100),
    87: _nvidia(48, 16, 164),
    89: _nvidia(48, 24, 100),
    90: _nvidia(64, 32, 228),
    100: _nvidia(64, 32, 228, tensor_memory=512),
    103: _nvidia(64, 32, 228, tensor_memory=512),
    120: _nvidia(48, 24, 100),
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


@dataclass(frozen=True, slots=True)
class Gpu:
    """A card by its name, its architecture and how many multiprocessors it runs."""

    name: str
    arch: Arch
    multiprocessors: int


# From the whitepapers of the architectures: NVIDIA Turing, Ampere GA100 and GA102, Hopper, Ada,
# Blackwell (B200: as its driver reports), AMD CDNA3. Of one architecture, the first is assumed.
GPUS = {
    "t4": Gpu("T4", 75, 40),
    "a100": Gpu("A100", 80, 108),
    "h200": Gpu("H200", 90, 132),
    "h100": Gpu("H100 SXM", 90, 132),
    "b200": Gpu("B200", 100, 148),
    "rtx3090": Gpu("GeForce RTX 3090", 86, 82),
    "rtx4090": Gpu("GeForce RTX 4090", 89, 128),
    "rtx5090": Gpu("GeForce RTX 5090", 120, 170),
    "mi300x": Gpu("Instinct MI300X", "gfx942", 304),
}


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
