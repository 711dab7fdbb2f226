"""What the engine would run on a GPU, compiled for GPUs that are not here and read as machine code.

For every kernel of the plan: nothing that the driver refuses, nothing spilled, products on the
tensor cores; on Hopper the many-image convolution reads through TMA into warpgroup instructions.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import nullcontext
from functools import cache
from typing import Any

import pytest
import torch
import triton
from alexnet_triton.bench.inspect.compiled import Binary, compile_for
from alexnet_triton.bench.inspect.machine_code import main_loop, opcodes
from alexnet_triton.engine.bind import bind, pack
from alexnet_triton.engine.plan import ARITHMETIC, PLAIN, Options, plan
from alexnet_triton.engine.zoo import ALEXNET, network
from alexnet_triton.kernels import conv, layout, pool
from alexnet_triton.kernels.driver import refusals, tensor_maps
from alexnet_triton.kernels.jit import Launch
from alexnet_triton.kernels.tuning import TUNED, Table, TunedRow, load, without_batch

PRODUCTS = ("_conv2d_rows_kernel", "_conv2d_pixels_kernel", "_first_layer_kernel", "_linear_kernel")
MATRIX = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}  # tensor core instructions by architecture

# Every dtype on every architecture, and every regime of batch (one, few, many) on each of them.
RUNS = [
    *((80, "fp16", 1024), (80, "bf16", 1), (80, "tf32", 64), (80, "fp32", 1)),
    *((90, "fp16", 1024), (90, "fp16", 1), (90, "bf16", 64), (90, "tf32", 1024), (90, "fp32", 64)),
    *((100, "fp16", 1024), (100, "bf16", 1), (100, "tf32", 64), (100, "fp32", 1024)),
]


# What torchvision's AlexNet has not: groups, LRN, softmax, scale and shift, sigmoid, other pools.
OTHERS = [
    *(("alexnet2012", 80, "fp16", 64), ("alexnet2012", 90, "bf16", 256)),
    *(("alexnet_single_tower", 90, "fp16", 1), ("alexnet_keras_bn", 100, "tf32", 64)),
    *(("zfnet", 80, "bf16", 128), ("vgg11", 90, "fp16", 64)),
]


@cache
def launches(
    name: str,
    arch: int,
    dtype: str,
    batch: int,
    size: int | None = None,
    pixels: torch.dtype = torch.uint8,
    options: Options = PLAIN,
    tuned: Table | None = None,
) -> list[tuple[str, Launch]]:
    """Every launch of a plan, by step name; meta tensors, since only types and shapes matter."""
    net, arithmetic = network(name), ARITHMETIC[dtype]
    shapes = net.parameter_shapes()
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    image_shape = (3, size, size) if size else net.input_shape
    planned = plan(
        *(net, batch, arithmetic, arch),
        image_shape=image_shape,
        image_dtype=pixels,
        options=options,
        tuned=tuned,
    )
    bound = bind(planned, pack(net, state, arithmetic, "meta"))
    images = torch.empty(batch, *image_shape, dtype=pixels, device="meta")
    return [
        ("input", bound.first(images)),
        *((name, run) for name, runs in bound.launches for run in runs),
    ]


def check(launch: Launch, arch: int, dtype: str) -> Binary:
    """The launch compiled, if nothing is wrong with it."""
    binary = compile_for(launch, arch)
    what = f"{binary.kernel} on sm_{arch}"
    assert not refusals(launch, arch, binary.shared, binary.registers)
    assert binary.spills == 0, f"{what} spills: {binary.spills} local memory accesses"
    assert binary.stack == 0, f"{what} has a stack of {binary.stack} bytes"
    multiplies = binary.kernel in PRODUCTS
    if multiplies and dtype != "fp32":
        assert binary.instructions[MATRIX[arch]], f"{what} misses the tensor cores"
    if arch == 90 and binary.instructions["HGMMA"]:
        waits = binary.sass.count("WARPGROUP.DEPBAR")
        assert waits <= 2, f"{what}: each product waits for the one before it ({waits} waits)"
    if binary.kernel == "_conv2d_rows_kernel" and dtype != "fp32" and arch >= 90:
        assert binary.instructions["UTMALDG"], f"{what} does not load through TMA"
    return binary


@pytest.mark.parametrize(("arch", "dtype", "batch"), RUNS)
def test_alexnet_as_the_engine_would_run_it(arch: int, dtype: str, batch: int) -> None:
    kernels = set()
    for _, launch in launches("alexnet", arch, dtype, batch):
        kernels.add(check(launch, arch, dtype).kernel)
    many = "_conv2d_rows_kernel" in kernels
    assert many == (batch >= 8), f"batch {batch} ran {sorted(kernels)}"


@pytest.mark.parametrize(("name", "arch", "dtype", "batch"), OTHERS)
def test_the_other_networks(name: str, arch: int, dtype: str, batch: int) -> None:
    for _, launch in launches(name, arch, dtype, batch):
        check(launch, arch, dtype)


@pytest.mark.parametrize("pixels", [torch.float32, torch.float16], ids=str)
def test_float_images_and_the_adaptive_pool(pixels: torch.dtype) -> None:
    steps = launches("alexnet", 90, "fp16", 8, 256, pixels)
    assert "avgpool" in dict(steps)
    for name, launch in steps:
        if name in ("input", "avgpool"):
            check(launch, 90, "fp16")


@pytest.mark.parametrize("kernel", [3, 7, 20])
def test_pools_of_any_size_keep_to_their_registers(kernel: int) -> None:
    shape = pool.PoolShape(8, 64, 32, 32, 33 - kernel, 33 - kernel, (kernel, kernel))
    x = layout.empty(32, 32, 8, 64, torch.float32, "meta")
    out = layout.empty(shape.OH, shape.OW, 8, 64, torch.float32, "meta")
    for arch in (80, 90, 100):
        config = pool.default_config(shape, arch)
        check(pool.max_pool2d(x, out, shape, config), arch, "fp32")
        check(pool.avg_pool2d(x, out, shape, config), arch, "fp32")


def test_hoppers_main_loop_is_tma_and_warpgroup_products() -> None:
    (conv4,) = (run for step, run in launches("alexnet", 90, "fp16", 1024) if step == "conv4")
    loop = main_loop(compile_for(conv4, 90).sass)
    assert loop.found
    assert "UTMALDG" in loop.opcodes, "the loop does not load through TMA"
    assert "HGMMA" in loop.opcodes, "the loop does not multiply by warpgroups"
    for operand_copy in ("LDSM", "LDGSTS", "LDG", "STS"):
        assert operand_copy not in loop.opcodes, f"{operand_copy}: operands pass through registers"


def boxes(launch: Launch, arch: int, monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """Box, swizzle and size of a number of each tensor map, as Triton tells its driver."""
    told: list[dict[str, Any]] = []
    compiler = triton.compile

    def listening(*args: Any, **options: Any) -> Any:
        compiled = compiler(*args, **options)
        told.extend(compiled.metadata.tensordesc_meta)
        return compiled

    with monkeypatch.context() as patch:
        patch.setattr(triton, "compile", listening)
        compile_for(launch, arch)
    spans = (0, 32, 64, 128)  # CUtensorMapSwizzle
    return [
        (tuple(reversed(one["block_size"])), spans[one["swizzle"]], one["elem_size"])
        for one in told
    ]


@pytest.mark.parametrize(
    ("dtype", "arch", "images", "block_m", "block_k"),
    [
        *(("fp16", 90, 1, 4, 64), ("fp16", 90, 512, 512, 16)),
        *(("tf32", 100, 64, 64, 16), ("fp32", 120, 64, 64, 64)),
    ],
)
def test_triton_makes_the_boxes_that_the_driver_is_told(
    dtype: str, arch: int, images: int, block_m: int, block_k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    arithmetic = ARITHMETIC[dtype]
    shape = conv.Conv2dShape(images, 256, 4, 4, 16, 3, 3)
    config = conv.Conv2dConfig("rows", block_m, 16, block_k, num_stages=1)
    x, weight, out = (
        layout.empty(*size, arithmetic.dtype, "meta")
        for size in ((4, 4, images, 256), (1, 9, 16, 256), (2, 2, images, 16))
    )
    launch = conv.conv2d(x, weight[0], None, out, shape, config, precision=arithmetic.precision)
    expected = [(tensor.box, tensor.swizzle, tensor.itemsize) for tensor in tensor_maps(launch)]
    assert boxes(launch, arch, monkeypatch) == expected


def test_overlapping_kernels_wait_before_they_read_and_prefetch_before_they_wait() -> None:
    """On sm_90, in the order of the machine code: the next may start, weights, wait, the rest."""
    loads = ("LDG", "LDGSTS", "UTMALDG")
    for name, launch in launches("alexnet", 90, "fp16", 1, options=Options(pdl=True))[1:]:
        binary = check(launch, 90, "fp16")
        order = opcodes(binary.sass)
        waits = order.index("ACQBULK")
        assert order.index("PREEXIT") < waits, name
        assert not set(order[:waits]) & {*loads, "STG"}, f"{name} reads or writes too early"
        asks = "CCTL" in order[:waits]
        assert asks == (binary.kernel in ("_linear_kernel", "_conv2d_pixels_kernel")), name


TABLES = [
    pytest.param(table, row.dtype, row.batch, id=f"{table.device} {row.dtype} {row.batch}")
    for table in map(load, sorted(TUNED.glob("*.json")))
    for row in {(row.dtype, row.batch): row for row in table.rows}.values()
]
ARCHITECTURES = {"NVIDIA H200": 90, "NVIDIA H100": 90, "NVIDIA A100": 80, "NVIDIA B200": 100}


def check_table(table: Table, dtype: str, batch: int, steps: Collection[str] | None = None) -> None:
    """Every kernel of the plan with this table; the device's name says the architecture."""
    (arch,) = {arch for card, arch in ARCHITECTURES.items() if table.device.startswith(card)}
    for name, launch in launches("alexnet", arch, dtype, batch, tuned=table):
        if steps is None or name in steps:
            check(launch, arch, dtype)


NONE_YET = pytest.mark.skip(reason="no table ships yet: no GPU has measured one")


@pytest.mark.parametrize(
    ("table", "dtype", "batch"), TABLES or [pytest.param(None, "", 0, marks=NONE_YET)]
)
def test_shipped_tables(table: Table, dtype: str, batch: int) -> None:
    """What was measured to be fast is also clean."""
    check_table(table, dtype, batch)


def test_a_table_with_a_row_that_cannot_launch_is_found() -> None:
    (shape,) = (
        s.shape for s in plan(ALEXNET, 256, ARITHMETIC["fp16"], 90).steps if s.name == "conv4"
    )
    large = {"tiling": "rows", "BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "num_warps": 8}
    for stages, fits in ((3, True), (6, False)):
        config = large | {"num_stages": stages}
        row = TunedRow("conv2d", without_batch(shape), "fp16", 256, config, 1.0, "", "", "")
        table = Table("NVIDIA H200", (row,))
        with nullcontext() if fits else pytest.raises(AssertionError, match="of shared memory"):
            check_table(table, "fp16", 256, ["conv4"])
