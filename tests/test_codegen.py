"""What the engine would run on a GPU, compiled for GPUs that are not here and read as machine code.

For every kernel of the plan: nothing spilled, shared memory that exists, products on the tensor
cores; on Hopper the many-image convolution reads through TMA into warpgroup instructions.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from alexnet_triton.bench.inspect import Binary, compile_for, opcodes
from alexnet_triton.engine.bind import bind, pack
from alexnet_triton.engine.plan import NUMBERS, plan
from alexnet_triton.engine.zoo import network
from alexnet_triton.kernels.jit import Launch

MATRIX = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}  # tensor core instructions by architecture

# Every dtype on every architecture, and every regime of batch (one, few, many) on each of them.
RUNS = [
    *((80, "fp16", 1024), (80, "bf16", 1), (80, "tf32", 64), (80, "fp32", 1)),
    *((90, "fp16", 1024), (90, "fp16", 1), (90, "bf16", 64), (90, "tf32", 1024), (90, "fp32", 64)),
    *((100, "fp16", 1024), (100, "bf16", 1), (100, "tf32", 64), (100, "fp32", 1024)),
]


@cache
def launches(name: str, arch: int, dtype: str, batch: int) -> list[tuple[str, Launch]]:
    """Every launch of a plan, by step name; meta tensors, since only types and shapes matter."""
    net, numbers = network(name), NUMBERS[dtype]
    shapes = net.parameter_shapes()
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    bound = bind(plan(net, batch, numbers, arch), pack(net, state, numbers, "meta"))
    images = torch.empty(batch, *net.input_shape, dtype=torch.uint8, device="meta")
    return [
        ("input", bound.stem(images)),
        *((name, run) for name, runs in bound.launches for run in runs),
    ]


def check(binary: Binary, dtype: str) -> None:
    what = f"{binary.kernel} on sm_{binary.arch}"
    assert binary.spills == 0, f"{what} spills: {binary.spills} local memory accesses"
    assert binary.stack == 0, f"{what} has a stack of {binary.stack} bytes"
    assert binary.fits, f"{what} wants {binary.shared} bytes of shared memory"
    multiplies = "conv2d" in binary.kernel or binary.kernel == "_linear_kernel"
    if multiplies and dtype != "fp32":
        assert binary.instructions[MATRIX[binary.arch]], f"{what} misses the tensor cores"
    if binary.kernel == "_conv2d_images_kernel" and dtype != "fp32" and binary.arch >= 90:
        assert binary.instructions["UTMALDG"], f"{what} does not load through TMA"


@pytest.mark.parametrize(("arch", "dtype", "batch"), RUNS)
def test_alexnet_as_the_engine_would_run_it(arch: int, dtype: str, batch: int) -> None:
    kernels = set()
    for _, launch in launches("alexnet", arch, dtype, batch):
        binary = compile_for(launch, arch)
        check(binary, dtype)
        kernels.add(binary.kernel)
    many = "_conv2d_images_kernel" in kernels
    assert many == (batch >= 64), f"batch {batch} ran {sorted(kernels)}"


def test_hoppers_main_loop_is_tma_and_warpgroup_products() -> None:
    (conv4,) = (run for step, run in launches("alexnet", 90, "fp16", 1024) if step == "conv4")
    loop = main_loop(compile_for(conv4, 90))
    assert "UTMALDG" in loop, "the loop does not load through TMA"
    assert "HGMMA" in loop, "the loop does not multiply by warpgroups"
    for operand_copy in ("LDSM", "LDGSTS", "LDG", "STS"):
        assert operand_copy not in loop, f"{operand_copy}: operands pass through registers"


def main_loop(binary: Binary) -> list[str]:
    """Opcodes between the last matrix instruction's enclosing backward branch and its target."""
    lines = binary.sass.splitlines()
    labels = {
        line.split(":")[0].strip(): i for i, line in enumerate(lines) if line.startswith(".L")
    }
    matrix = MATRIX[binary.arch]
    for end, line in enumerate(lines):
        if "BRA" not in line or "`(" not in line:
            continue
        start = labels[line.split("`(")[1].split(")")[0]]
        body = lines[start:end]
        if start < end and any(matrix in inner for inner in body):
            return opcodes("\n".join(body))
    raise AssertionError(f"{binary.kernel}: no loop around {matrix}")
