"""What the engine may run on a GPU, compiled for GPUs that are not here and read as machine code.

For every kernel: nothing that the driver refuses, nothing spilled, products on the tensor cores. On
Hopper a main loop whose operands have descriptors is TMA and warpgroup products, one group of them
in flight, with few instructions beside them.

Defaults are chosen from closed lists, so all that can be chosen can be compiled. `make test` takes
a sample of it, the same at every run, `make codegen` takes all, but for what it found clean before.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from alexnet_triton.bench.inspect import machine_code
from alexnet_triton.bench.inspect.compiled import Binary, compile_for
from alexnet_triton.bench.inspect.machine_code import main_loop, opcodes
from alexnet_triton.engine.bind import Packed, allocate, bind, pack, view
from alexnet_triton.engine.plan import (
    ARITHMETIC,
    PLAIN,
    KernelConfig,
    Options,
    Plan,
    Step,
    part,
    plan,
    reconfigured,
)
from alexnet_triton.engine.zoo import ALEXNET, network
from alexnet_triton.kernels import conv, first_layer, gemm, layout, lpips, pool
from alexnet_triton.kernels.driver import refusals, tensor_maps
from alexnet_triton.kernels.jit import Launch
from alexnet_triton.kernels.tuning import TUNED, Table, TunedRow, load, without_batch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor

PRODUCTS = ("_conv2d_rows_kernel", "_conv2d_pixels_kernel", "_first_layer_kernel", "_linear_kernel")
MULTIPLIES = (conv.Conv2dConfig, first_layer.FirstLayerConfig, gemm.LinearConfig)
# Tensor core instructions by architecture.
MATRIX = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}

ZOO = (
    *("alexnet", "alexnet2012", "alexnet_single_tower", "alexnet_keras_bn"),
    *("zfnet", "vgg11", "digits"),
)
BATCHES = (1, 8, 64, 256, 1024)
ARCHS = (80, 90, 100)
# bf16 is fp16 with other types.
GROUPS = [
    *itertools.product(ARCHS, ("fp16", "tf32"), ZOO),
    *itertools.product(ARCHS, ("fp32",), ("alexnet", "alexnet2012", "digits")),
    *itertools.product((90,), ("bf16",), ("alexnet2012", "zfnet")),
]
MORE_GROUPS = [*itertools.product((120,), ("fp16", "tf32", "fp32"), ZOO)]
CLEAN = Path(__file__).parents[1] / "build" / "codegen.txt"  # a line for each binary found clean


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


def possible(
    step: Step, pixel: int, dtype: torch.dtype, arch: int, affine: bool
) -> Iterator[first_layer.FirstLayerConfig | conv.Conv2dConfig | gemm.LinearConfig]:
    """The configurations from which a product's is chosen; it reads pixels of so many numbers."""
    match step.shape, step.config:
        case conv.Conv2dShape() as shape, first_layer.FirstLayerConfig(form=form):
            return first_layer.candidates(shape, pixel, form, dtype, arch, affine)
        case conv.Conv2dShape() as shape, conv.Conv2dConfig():
            return conv.candidates(shape, dtype, arch, affine)
        case gemm.LinearShape() as shape, gemm.LinearConfig():
            return gemm.candidates(shape, dtype, arch, affine)
    raise AssertionError(step)


@cache
def packed(name: str, dtype: str) -> Packed:
    """A network's weights, without numbers."""
    shapes = network(name).parameter_shapes()
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    return pack(network(name), state, ARITHMETIC[dtype], "meta")


Case = tuple[Plan, torch.Tensor, bool]
"""One step alone, what it reads, and whether a scale and a shift are added to it."""


def cases(name: str, arch: int, dtype: str) -> list[Case]:
    """What a network's layers may become at any of BATCHES, alike ones side by side."""
    net, arithmetic = network(name), ARITHMETIC[dtype]
    found: list[Case] = []
    for batch, invariant in itertools.product(BATCHES, (False, True)):
        whole = plan(net, batch, arithmetic, arch, batch_invariant=invariant)
        memory = allocate(whole, torch.device("meta"))
        x = torch.empty(batch, *net.input_shape, dtype=torch.uint8, device="meta")
        for i, step in enumerate(whole.steps):
            alone = part(whole, i, i + 1)
            product = isinstance(step.config, MULTIPLIES)
            affine = step.block is not None and step.block.affine is not None
            added = (False, True) if product and (name, dtype) == ("alexnet", "fp16") else (False,)
            for ends in added:
                configs: Iterable[KernelConfig | None] = [step.config]
                if product and not invariant and dtype != "fp32":
                    configs = possible(step, x.shape[3], arithmetic.dtype, arch, affine or ends)
                for config in configs:
                    assert config is not None
                    found.append((reconfigured(alone, step.name, config), x, ends))
            x = view(step, memory)

    def likeness(case: Case) -> tuple[object, ...]:
        (step,) = case[0].steps
        return not isinstance(step.config, MULTIPLIES), step.kernel.partition("/")[0], step.tile

    return sorted(found, key=likeness)


def launch_of(case: Case, name: str, dtype: str) -> Launch:
    """The one launch of a step."""
    alone, x, ends = case
    weights = packed(name, dtype)
    bound = bind(alone, weights, x if alone.steps[0].block else None)
    (launch,) = bound.every_launch(x)
    if ends:
        numbers = dict.fromkeys(("scale", "shift"), weights.mean)
        launch = replace(launch, arguments=launch.arguments | numbers)
    return launch


def binary_of(launch: Launch, arch: int) -> str:
    """What a launch is compiled to, as Triton tells binaries apart, and what it is checked for."""
    kernel = launch.kernel
    backend = make_backend(GPUTarget("cuda", arch, 32))
    bound = create_function_from_signature(kernel.signature, kernel.params, backend)
    _, specialization, _ = bound(**launch.arguments, **launch.options)
    told = (
        triton.__version__,
        arch,
        kernel.cache_key,
        specialization,
        sorted(launch.options.items()),
    )
    checks = inspect.getsource(faults), inspect.getsource(faults_of_a_loop)
    read = inspect.getsource(machine_code)
    return hashlib.sha256(repr((told, *checks, read)).encode()).hexdigest()


def faults(
    binary: Binary, launch: Launch, arch: int, dtype: str, measured: bool = False
) -> Iterator[str]:
    """What is wrong with a compiled launch, a line each; what was `measured` may look slow."""
    yield from refusals(launch, arch, binary.shared, binary.registers)
    if binary.spills:
        yield f"spills: {binary.spills} local memory accesses"
    if binary.stack:
        yield f"has a stack of {binary.stack} bytes"
    if binary.kernel in PRODUCTS and dtype != "fp32" and not binary.instructions[MATRIX[arch]]:
        yield "misses the tensor cores"
    if arch == 90 and binary.kernel in PRODUCTS and dtype != "fp32":
        described = {
            name
            for name, v in launch.arguments.items()
            if name in ("x", "w") and isinstance(v, TensorDescriptor)
        }
        waits = re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d+)", binary.sass)
        if len(waits) > 2 or not any(map(int, waits)):
            yield f"each product waits for the one before it: {waits} may be in flight"
        if described == {"x", "w"}:
            yield from faults_of_a_loop(binary, launch, dtype, measured)


def faults_of_a_loop(binary: Binary, launch: Launch, dtype: str, measured: bool) -> Iterator[str]:
    """Of the main loop on Hopper where both operands have descriptors."""
    loop = main_loop(binary.sass)
    if not loop.found or not {"UTMALDG", "HGMMA"} <= set(loop.opcodes):
        yield "has no loop that loads through TMA and multiplies by warpgroups"
    if passed := {"LDSM", "LDS", "STS", "LDG", "LDGSTS"} & set(loop.opcodes):
        yield f"passes operands through registers: {', '.join(sorted(passed))}"
    told = launch.arguments
    rows, columns = (told[f"BLOCK_{axis}"] + told.get(f"BLOCK_{axis}2", 0) for axis in "MN")
    matrix = rows * columns * told["BLOCK_K"] / (1024 if dtype == "tf32" else 2048)
    issue = len(loop.opcodes) * launch.num_warps / 4
    # Narrower tiles wait for weights and not for the matrix units, and filters may be shallow.
    deep = told["BLOCK_K"] * (4 if dtype == "tf32" else 2) >= 128
    most = 0.3 if min(rows, columns) >= 128 else 0.75 if min(rows, columns) >= 64 else math.inf
    if deep and not measured and issue > most * matrix:
        yield f"issues for {issue / matrix:.0%} of the time of its products, wanted {most:.0%}"


def check(launch: Launch, arch: int, dtype: str, measured: bool = False) -> Binary:
    """The launch compiled, if nothing is wrong with it."""
    binary = compile_for(launch, arch)
    wrong = list(faults(binary, launch, arch, dtype, measured))
    assert not wrong, f"{told_of(launch, arch)}: {'; '.join(wrong)}"
    return binary


def told_of(launch: Launch, arch: int) -> str:
    """A launch in one line: where, which kernel, its constants."""
    words = ("GROUPS", "C", "OC", "WINDOW", "COLUMNS", "SPLIT_K", "FORM", "TRANSPOSED", "PRECISION")
    told = [
        f"{name} {value}"
        for name, value in launch.arguments.items()
        if name.startswith("BLOCK") or name in words
    ]
    where = f"{launch.kernel.__name__} on sm_{arch}"
    return f"{where}: {', '.join(told)}, {launch.num_warps} warps, {launch.num_stages} stages"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Groups of launches: all of each group, or one, another one in every group."""
    if "chosen" in metafunc.fixturenames:
        every = metafunc.config.getoption("--every-candidate")
        groups = [*GROUPS, *MORE_GROUPS] if every else GROUPS
        # Multiples of the golden section lie everywhere, however many they are.
        chosen = [
            pytest.param(group, None if every else i * 0.618 % 1, id="-".join(map(str, group)))
            for i, group in enumerate(groups)
        ]
        metafunc.parametrize(("group", "chosen"), chosen)


def test_candidates(group: tuple[int, str, str], chosen: float | None) -> None:
    """What may be chosen is clean: all of a group, or the one at a part of the way through it."""
    arch, dtype, name = group
    found = cases(name, arch, dtype)
    if chosen is not None:
        check(launch_of(found[int(chosen * len(found))], name, dtype), arch, dtype)
        return
    launches = (launch_of(case, name, dtype) for case in found)
    wrong = []
    for key, launch in {binary_of(launch, arch): launch for launch in launches}.items():
        if CLEAN.exists() and key in CLEAN.read_text():
            continue
        lines = list(faults(compile_for(launch, arch), launch, arch, dtype))
        wrong += [f"{told_of(launch, arch)}: {line}" for line in lines]
        if not lines:
            CLEAN.parent.mkdir(exist_ok=True)
            with CLEAN.open("a") as file:
                file.write(f"{key}\n")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("name", "arch", "dtype", "batch"),
    [
        *(("alexnet", 90, "fp16", 1024), ("alexnet", 90, "fp16", 1)),
        *(("alexnet2012", 80, "bf16", 64), ("alexnet_single_tower", 100, "tf32", 8)),
    ],
)
def test_networks_as_the_engine_would_run_them(
    name: str, arch: int, dtype: str, batch: int
) -> None:
    """With all that is not a product, too: pools, LRN, softmax."""
    kernels = set()
    for _, launch in launches(name, arch, dtype, batch):
        kernels.add(check(launch, arch, dtype).kernel)
    many = "_conv2d_rows_kernel" in kernels
    assert many == (batch >= 8), f"batch {batch} ran {sorted(kernels)}"


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


@pytest.mark.parametrize(
    ("arch", "dtype", "side", "channels"),
    [
        *((80, torch.float32, 13, 384), (90, torch.float16, 55, 64)),
        (100, torch.float16, 27, 192),
    ],
)
def test_distances(arch: int, dtype: torch.dtype, side: int, channels: int) -> None:
    """No product is fused with what is subtracted from it: equal images would not be 0 apart."""
    taps = layout.empty(side, side, 128, channels, dtype, "meta")
    y = torch.empty(side, side, 64, device="meta")
    shape = lpips.DistanceShape(64, channels, side, side)
    config = lpips.default_config(shape, arch)
    weight, pairs = torch.empty(channels, device="meta"), (taps[:, :, :64], taps[:, :, 64:])
    binary = check(lpips.distances(*pairs, weight, y, shape, config), arch, "fp16")
    assert not re.search(r"FFMA[^;]*, -R\d+", binary.sass)
    assert "max.NaN.f32" in binary.ptx, "a NaN would be 0 apart from anything"
    check(lpips.means(y, y[0, 0], shape, config), arch, "fp16")


def test_faults_are_found() -> None:
    """Warps that share a tile each count its loop; four cannot hold the sums of a large one."""
    shape = conv.Conv2dShape(64, 256, 4, 4, 256, 3, 3)
    x, weight, out = (
        layout.empty(*size, torch.float16, "meta")
        for size in ((4, 4, 64, 256), (1, 9, 256, 256), (2, 2, 64, 256))
    )
    for block_n, warps, fault in ((128, 8, "issues for"), (256, 4, "spills")):
        config = conv.Conv2dConfig("rows", 128, block_n, 64, warps)
        with pytest.raises(AssertionError, match=fault):
            check(conv.conv2d(x, weight[0], None, out, shape, config), 90, "fp16")


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
    every = launches("alexnet", 90, "fp16", 1, options=Options(pdl=True))[1:]
    for name, launch in {launch.kernel: (name, launch) for name, launch in every}.values():
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


def check_table(table: Table, dtype: str, batch: int) -> None:
    """Every kernel that this table configures; the device's name says the architecture."""
    (arch,) = {arch for card, arch in ARCHITECTURES.items() if table.device.startswith(card)}
    arithmetic = ARITHMETIC[dtype]
    steps = plan(ALEXNET, batch, arithmetic, arch, tuned=table).steps
    measured = {step.name for step in steps if step.tuned}
    for name, launch in launches("alexnet", arch, dtype, batch, tuned=table):
        if name in measured:
            check(launch, arch, dtype, measured=True)


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
            check_table(table, "fp16", 256)
