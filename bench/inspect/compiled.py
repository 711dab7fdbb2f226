"""What a kernel becomes on a GPU that is not here: compile a launch, read its machine code.

`Launch` knows a kernel's argument types, alignments and options, which is all the compiler asks
for, so any launch made with CPU or meta tensors can be compiled for any architecture that Triton
knows. Registers, stack and shared memory are read off the binary with the `cuobjdump` and
`nvdisasm` that Triton ships.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.cache import get_cache_manager
from triton.runtime.jit import create_function_from_signature

from ...kernels.jit import ALONE, Launch
from .limits import (
    LIMITS,
    OF_A_WARP,
    WARPS_OF_A_BLOCK,
    Arch,
    Limits,
    Occupancy,
    arch_name,
    tool,
)
from .machine_code import is_matrix, opcodes


@dataclass(frozen=True)
class Binary:
    """One kernel compiled for one architecture."""

    kernel: str
    arch: Arch
    warps: int  # per block
    registers: int  # per thread
    stack: int  # bytes per thread
    shared: int  # bytes per block
    tensor_memory: int  # columns per block
    ttir: str
    ttgir: str
    ptx: str
    image: bytes  # what the driver loads

    @property
    def limits(self) -> Limits:
        """What the architecture has."""
        return LIMITS[self.arch]

    @cached_property
    def sass(self) -> str:
        """The machine code, as text.

        The disassembler takes half a second for any, so Triton's cache keeps what it said.
        """
        kept = get_cache_manager(
            hashlib.sha256(triton.__version__.encode() + self.image).hexdigest()
        )
        if (path := kept.get_file("sass")) is None:
            with tempfile.TemporaryDirectory() as folder:
                cubin = Path(folder) / "kernel.cubin"
                cubin.write_bytes(self.image)
                path = kept.put(_run("nvdisasm", "-c", str(cubin)), "sass", binary=False)
        return Path(path).read_text()

    @cached_property
    def instructions(self) -> Counter[str]:
        """How often each opcode stands in the machine code, without its modifiers."""
        return Counter(opcodes(self.sass))

    @property
    def spills(self) -> int:
        """Loads and stores of registers that did not fit: in local memory, which is the stack."""
        return self.instructions["LDL"] + self.instructions["STL"] if self.stack else 0

    @property
    def occupancy(self) -> Occupancy:
        """How many of its blocks a multiprocessor holds."""
        return self.limits.occupancy(self.registers, self.shared, self.warps, self.tensor_memory)

    @property
    def excess(self) -> int:
        """Bytes of shared memory over the limit of a block."""
        return max(0, self.shared - self.limits.shared_per_block)

    @property
    def wants_matrix(self) -> bool:
        """Whether the source multiplies matrices of numbers that tensor cores take."""
        products = [line for line in self.ttir.splitlines() if "tt.dot " in line]
        return any("inputPrecision = tf32" in p or not _FLOAT32.search(p) for p in products)

    @property
    def uses_matrix(self) -> bool:
        """Whether the machine code multiplies on them."""
        return any(is_matrix(opcode) for opcode in self.instructions)


_FLOAT32 = re.compile(r": tensor<[0-9x]*xf(32|64)")


def refusal(binary: Binary) -> str | None:
    """Why this kernel is not worth running, in one line; None if nothing speaks against it.

    That is: the driver would not start it, its registers spill, it has a stack, or it multiplies
    halves or TF32 without the tensor cores.
    """
    limits, where, held = binary.limits, arch_name(binary.arch), binary.occupancy
    if not held.blocks:
        reasons = {
            "shared memory": f"{binary.shared:,} bytes of shared memory, {binary.excess:,} over "
            f"the limit of {where}",
            "tensor memory": f"{binary.tensor_memory} columns of tensor memory, {where} has "
            f"{limits.tensor_memory}",
            "warps": f"{binary.warps} warps a block, {where} takes {WARPS_OF_A_BLOCK}",
            "registers": f"{binary.warps} warps of {binary.registers} registers a thread, more "
            f"than {where} has for a block",
        }
        first = next(what for what in reasons if what in held.limited_by)
        return f"NOT LAUNCHABLE: {reasons[first]}"
    if binary.spills:
        return (
            f"spills: {binary.spills:,} accesses to local memory, {binary.stack:,} bytes a thread"
        )
    if binary.stack:
        return f"has a stack of {binary.stack:,} bytes a thread in local memory"
    if binary.wants_matrix and not binary.uses_matrix:
        return f"misses the tensor cores of {where}"
    return None


def compile_for(launch: Launch, arch: Arch) -> Binary:
    """Compile `launch` for `arch` (80, 90, ...) exactly as a launch there would.

    Raises whatever Triton's compiler raises.
    """
    source, target, options = _source(launch, arch)
    kernel = launch.kernel
    with ALONE:
        compiled = triton.compile(source, target=target, options=options.__dict__)
    code, metadata = compiled.asm, compiled.metadata
    registers, stack = _resources(code["cubin"])
    return Binary(
        kernel=kernel.__name__,
        arch=arch,
        warps=metadata.num_warps,
        registers=registers,
        stack=stack,
        shared=metadata.shared,
        tensor_memory=getattr(metadata, "tmem_size", None) or 0,
        ttir=code["ttir"],
        ttgir=code["ttgir"],
        ptx=code["ptx"],
        image=code["cubin"],
    )


def binary_name(launch: Launch, arch: Arch) -> str:
    """The same text for launches that one binary serves, without compiling it."""
    source, _, options = _source(launch, arch)
    return f"{source.hash()} {options.hash()}"


def _source(launch: Launch, arch: Arch) -> tuple[ASTSource, GPUTarget, Any]:
    """What Triton compiles, for what, and how."""
    target = GPUTarget("cuda", arch, OF_A_WARP)
    backend, kernel = make_backend(target), launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, extra = bind(**launch.arguments, **launch.options)
    # _pack_args is what JITFunction.run calls between binding and compiling.
    parsed, signature, constants, attributes = kernel._pack_args(
        backend, launch.options, bound, specialization, extra
    )
    return ASTSource(kernel, signature, constants, attributes), target, parsed


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack per thread, as cuobjdump tells them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _run("cuobjdump", "-res-usage", str(path))
    counts = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if counts is None:
        raise RuntimeError(f"cuobjdump told no resources: {usage!r}")
    return int(counts[1]), int(counts[2])


def _run(name: str, *arguments: str) -> str:
    done = subprocess.run([tool(name), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr.strip()}")
    return done.stdout
