"""What a kernel becomes on a GPU that is not here: compile a launch, read its machine code.

`Launch` knows a kernel's argument types, alignments and options, which is all the compiler asks
for, so any launch made with CPU tensors can be compiled for any NVIDIA architecture. Registers,
stack and shared memory are read off the binary with the `cuobjdump` and `nvdisasm` that Triton
ships. The limits are NVIDIA's, CUDA C++ Programming Guide, "Technical Specifications per Compute
Capability".
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from ..kernels.jit import ALONE, Launch

# Bytes of shared memory that one block may ask for, by compute capability.
SHARED_MEMORY_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}


@dataclass(frozen=True)
class Binary:
    """One kernel compiled for one architecture."""

    kernel: str
    arch: int
    registers: int  # per thread
    stack: int  # bytes per thread
    shared: int  # bytes per block
    ttgir: str
    ptx: str
    cubin: bytes

    @cached_property
    def sass(self) -> str:
        """The machine code, as text."""
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(self.cubin)
            return _tool("nvdisasm", "-c", str(cubin))

    @cached_property
    def instructions(self) -> Counter[str]:
        """How often each opcode stands in the machine code, without its modifiers."""
        return Counter(opcodes(self.sass))

    @property
    def spills(self) -> int:
        """Loads and stores of local memory: registers that did not fit."""
        return self.instructions["LDL"] + self.instructions["STL"]

    @property
    def fits(self) -> bool:
        """Whether a block's shared memory exists on that architecture."""
        return self.shared <= SHARED_MEMORY_LIMIT[self.arch]


def opcodes(sass: str) -> list[str]:
    """The opcodes in machine code as nvdisasm prints it, in order, bare of modifiers."""
    line = r"^\s+(?:/\*[0-9a-f]+\*/\s+)?(?:@!?\w+\s+)?([A-Z][A-Z0-9]+)"
    return re.findall(line, sass, re.M)


def compile_for(launch: Launch, arch: int) -> Binary:
    """Compile `launch` for compute capability `arch` (80, 90, 100) exactly as a launch there would.

    Raises whatever Triton's compiler raises.
    """
    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    kernel = launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    bound, specialization, extra = bind(**launch.arguments, **options)
    # _pack_args is what JITFunction.run calls between binding and compiling.
    parsed, signature, constants, attributes = kernel._pack_args(
        backend, options, bound, specialization, extra
    )
    source = ASTSource(kernel, signature, constants, attributes)
    with ALONE:
        compiled = triton.compile(source, target=target, options=parsed.__dict__)
    cubin = compiled.asm["cubin"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _tool("cuobjdump", "-res-usage", str(path))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump told no resources of {kernel.__name__}: {usage!r}")
    return Binary(
        kernel=kernel.__name__,
        arch=arch,
        registers=int(found[1]),
        stack=int(found[2]),
        shared=compiled.metadata.shared,
        ttgir=compiled.asm["ttgir"],
        ptx=compiled.asm["ptx"],
        cubin=cubin,
    )


def _tool(name: str, *arguments: str) -> str:
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=True)
    return done.stdout
