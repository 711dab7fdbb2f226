"""No kernel reads or writes outside its tensors, on shapes that fit no tile; what does is found.

Nor does one read what nobody wrote, or two programs touch what nothing orders. The sanitizer
watches every access of every program as it is interpreted, through descriptors too. No numbers are
checked: other tests do that.
"""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import linecache
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import triton.language as tl
from alexnet_triton.bench.race.sanitizer import Violation, sanitized
from alexnet_triton.engine.bind import bind, pack
from alexnet_triton.engine.devices.planner import Planner
from alexnet_triton.engine.plan import ARITHMETIC, PLAIN, Options
from alexnet_triton.engine.zoo import network
from alexnet_triton.kernels import (
    channels_last,
    conv,
    first_layer,
    gemm,
    layout,
    lpips,
    lrn,
    pool,
    softmax,
    split_k,
)
from alexnet_triton.kernels.channels_last import ChannelsLastConfig, ChannelsLastShape
from alexnet_triton.kernels.conv import Conv2dConfig, Conv2dShape
from alexnet_triton.kernels.first_layer import FirstLayerConfig
from alexnet_triton.kernels.gemm import LinearConfig
from alexnet_triton.kernels.jit import Kernel, Launch, jit
from alexnet_triton.kernels.lpips import DistanceConfig, DistanceShape
from alexnet_triton.kernels.lrn import LRNConfig, LRNShape
from alexnet_triton.kernels.pool import PoolConfig, PoolShape
from alexnet_triton.kernels.softmax import SoftmaxConfig, SoftmaxShape
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

pytestmark = pytest.mark.interpreter

Epilogue = tuple[bool, str | None, bool]  # bias, activation, scale and shift

# No two blocks of one kernel are of one size.
TILE = (16, 32, 64)
ROWS = Conv2dConfig("rows", *TILE, descriptors=False)
PIXELS = Conv2dConfig("pixels", *TILE, descriptors=False)
WHOLE = LinearConfig(*TILE, descriptors=False)
SPLIT = LinearConfig(*TILE, SPLIT_K=3, descriptors=False)
CONVOLUTIONS = {
    "multiples of nothing": Conv2dShape(17, 67, 1, 2, 37, 2, 2, padding=(1, 0, 1, 0)),
    "multiples of the tile": Conv2dShape(16, 64, 2, 1, 32, 2, 1, padding=(1, 1, 0, 0)),
    "one of everything": Conv2dShape(1, 1, 1, 1, 1, 1, 1),
    "stride and dilation": Conv2dShape(
        2, 8, 7, 6, 8, 3, 3, stride=(2, 1), padding=(2, 2, 1, 1), dilation=(2, 3)
    ),
    "strides over the filter": Conv2dShape(3, 8, 9, 8, 8, 2, 1, stride=(4, 3)),
    "windows outside the image": Conv2dShape(
        3, 5, 2, 2, 6, 2, 2, stride=(2, 3), padding=(3, 3, 5, 5)
    ),
    "filter over the image": Conv2dShape(4, 5, 3, 2, 6, 5, 3, padding=(2, 1, 2, 1)),
    "aligned groups": Conv2dShape(17, 32, 1, 2, 36, 1, 3, padding=(0, 0, 1, 1), groups=2),
    "odd groups": Conv2dShape(3, 15, 2, 2, 21, 2, 3, padding=(1, 0, 1, 1), groups=3),
}
LINEARS = {  # images, pixels, channels, outputs
    "multiples of nothing": (19, 3, 70, 37),
    "multiples of the tile": (16, 2, 64, 32),
    "one of everything": (1, 1, 1, 1),
    "fewer steps than parts": (1, 2, 24, 40),
}
POOLS = {
    "alexnet": PoolShape(3, 5, 7, 8, 3, 4, (3, 3), (2, 2)),
    "over both ends": PoolShape(3, 5, 7, 8, 3, 3, (4, 3), (3, 4), (1, 1)),
    "one pixel": PoolShape(1, 1, 1, 1, 1, 1, (1, 1)),
}
DILATED = PoolShape(3, 5, 7, 8, 4, 5, (2, 3), (2, 2), (1, 1), (3, 2))
ADAPTIVE = {
    "fewer": PoolShape(2, 11, 7, 8, 3, 6),
    "more": PoolShape(2, 11, 3, 2, 4, 3),
}
READ = ChannelsLastShape(N=2, C=3, H=9, W=7, rows=12, columns=10, pixel=4)  # more on both sides
FIRST = Conv2dShape(2, 3, 9, 7, 5, 5, 3, stride=(3, 2), padding=(2, 1, 1, 2))
EPILOGUES: list[Epilogue] = [
    (False, None, False),
    (True, None, False),
    (False, "relu", True),
    (True, "sigmoid", True),
]


def activation(height: int, width: int, images: int, channels: int) -> torch.Tensor:
    """An activation [H, W, N, C] of zeros."""
    return layout.empty(height, width, images, channels, torch.half, "cpu").zero_()


def several(bound: Launch | Iterable[Launch]) -> list[Launch]:
    """What a launcher gives, one or more."""
    return [bound] if isinstance(bound, Launch) else list(bound)


def tail(channels: int, epilogue: Epilogue) -> tuple[Any, Any]:
    """A bias and an affine, each or None."""
    with_bias, _, with_affine = epilogue
    affine = (torch.zeros(channels), torch.zeros(channels))
    return torch.zeros(channels).half() if with_bias else None, affine if with_affine else None


def convolution(
    shape: Conv2dShape,
    config: Conv2dConfig,
    epilogue: Epilogue = (True, "relu", True),
    module: Any = conv,
    x: torch.Tensor | None = None,
) -> list[Launch]:
    """One convolution in half precision, by the module or a copy of it."""
    bias, affine = tail(shape.OC, epilogue)
    weight = torch.zeros(shape.OC, shape.C // shape.groups, shape.KH, shape.KW).half()
    if x is None:
        x = activation(shape.H, shape.W, shape.N, shape.C)
    out = activation(shape.OH, shape.OW, shape.N, shape.OC)
    packed = conv.pack_weight(weight)
    bound = module.conv2d(x, packed, bias, out, shape, config, epilogue[1], "ieee", affine)
    return several(bound)


def linear(
    sizes: tuple[int, int, int, int],
    config: LinearConfig,
    epilogue: Epilogue = (True, "relu", True),
    module: Any = gemm,
) -> list[Launch]:
    """One linear layer of (images, pixels, channels, outputs) in half precision."""
    n, pixels, c, oc = sizes
    bias, affine = tail(oc, epilogue)
    weight = gemm.pack_weight(torch.zeros(oc, c * pixels).half(), pixels)
    x, out = activation(pixels, 1, n, c), activation(1, 1, n, oc)
    return several(module.linear(x, weight, bias, out, config, epilogue[1], "ieee", affine))


def pooling(function: Any, shape: PoolShape, *options: bool) -> list[Launch]:
    """One pooling by one of the launchers."""
    x = activation(shape.H, shape.W, shape.N, shape.C)
    out = activation(shape.OH, shape.OW, shape.N, shape.C)
    return several(function(x, out, shape, PoolConfig(4, 16), *options))


def normalisation(shape: LRNShape, module: Any = lrn) -> list[Launch]:
    """One local response normalisation."""
    x, out = activation(shape.M, 1, 1, shape.C), activation(shape.M, 1, 1, shape.C)
    return several(module.local_response_norm(x, out, shape, LRNConfig(4, 8)))


def probabilities(shape: SoftmaxShape, module: Any = softmax) -> list[Launch]:
    """One softmax."""
    x, out = activation(1, 1, shape.M, shape.C), activation(1, 1, shape.M, shape.C)
    return several(module.softmax(x, out, shape, SoftmaxConfig(2)))


def distance(shape: DistanceShape, module: Any = lpips) -> list[Launch]:
    """The distances of pairs, pixel by pixel and their means; all of b is one image."""
    config, pixels = DistanceConfig(4, 8), (shape.H, shape.W, shape.N)
    a, one = activation(*pixels, shape.C), activation(shape.H, shape.W, 1, shape.C)
    b = one.expand(*pixels, shape.C)
    y, out = torch.zeros(pixels), torch.zeros(shape.N)
    each = module.distances(a, b, torch.zeros(shape.C), y, shape, config)
    return [each, module.means(y, out, shape, config)]


def entry(
    pixels: torch.Tensor, module: Any = channels_last, shape: ChannelsLastShape = READ
) -> list[Launch]:
    """The pass for pixels [2, 3, 9, 7]."""
    out = torch.zeros(shape.N, shape.rows, shape.columns, shape.pixel).half()
    mean, std = torch.zeros(3), torch.ones(3)
    return several(module.channels_last(pixels, mean, std, out, shape, ChannelsLastConfig(32)))


def first(form: Any, columns: int, module: Any = first_layer) -> list[Launch]:
    """A first convolution, FIRST, from what the pass writes."""
    rows, width = first_layer.padded(FIRST, 4)
    weight = first_layer.pack_weight(torch.zeros(5, 3, 5, 3).half(), FIRST, 4, columns)
    images = torch.zeros(2, rows, width * 4).half()
    config = FirstLayerConfig(form, columns, 16, 8, 4, 32)
    out = activation(FIRST.OH, FIRST.OW, 2, 5)
    return several(module.first_layer(images, weight, None, out, FIRST, 4, config, "relu"))


def products(descriptors: bool) -> dict[str, list[Launch]]:
    """Convolutions and linear layers, with tensor descriptors or plain pointers."""
    ways = ("images", "rows") if descriptors else ("pointers",)
    made = {
        f"first layer, {way}, {columns} columns": first(way, columns)
        for way, columns in itertools.product(ways, (1, 2))
    }
    rows, pixels = (replace(config, descriptors=descriptors) for config in (ROWS, PIXELS))
    for name, shape in CONVOLUTIONS.items():
        made[f"conv, pixels, {name}"] = convolution(shape, pixels)
        if conv.rows_tiling_fits(shape, torch.half) or not descriptors:
            made[f"conv, rows, {name}"] = convolution(shape, rows)
    for name in ("multiples of nothing", "aligned groups"):
        for two in (replace(rows, BLOCK_M2=8), replace(rows, BLOCK_N2=8)):
            made[f"conv, {two.BLOCK_M2 + 8} rows, {name}"] = convolution(CONVOLUTIONS[name], two)
        split = replace(pixels, SPLIT_K=3)
        made[f"conv, 3 parts, {name}"] = convolution(CONVOLUTIONS[name], split)
        several_rows = replace(rows, SPLIT_K=3)
        made[f"conv, 3 parts of rows, {name}"] = convolution(CONVOLUTIONS[name], several_rows)
    forms = itertools.product((WHOLE, SPLIT), (False, True), LINEARS.items())
    for form, transposed, (name, sizes) in forms:
        config = replace(form, transposed=transposed, descriptors=descriptors)
        made[f"linear, {form.SPLIT_K} parts, {transposed=}, {name}"] = linear(sizes, config)
    return made


def others() -> dict[str, list[Launch]]:
    """Every other kernel on its awkward shapes, and every epilogue."""
    made: dict[str, list[Launch]] = {}
    for epilogue in EPILOGUES:
        shape, sizes = CONVOLUTIONS["strides over the filter"], LINEARS["fewer steps than parts"]
        made[f"conv, {epilogue=}"] = convolution(shape, PIXELS, epilogue)
        made[f"linear, {epilogue=}"] = linear(sizes, WHOLE, epilogue)
        made[f"linear, 3 parts, {epilogue=}"] = linear(sizes, SPLIT, epilogue)
    for name, pool_shape in (POOLS | {"dilated": DILATED}).items():
        made[f"max, {name}"] = pooling(pool.max_pool2d, pool_shape)
    for (name, pool_shape), count in itertools.product(POOLS.items(), (False, True)):
        made[f"average, {name}, {count}"] = pooling(pool.avg_pool2d, pool_shape, count)
    for name, pool_shape in ADAPTIVE.items():  # nothing is padded, so nothing to count
        made[f"average, {name}"] = pooling(pool.avg_pool2d, pool_shape, True)
    for lrn_shape in (LRNShape(18, 13, 5), LRNShape(5, 16, 4, 2), LRNShape(1, 1, 9)):
        made[f"lrn, {lrn_shape}"] = normalisation(lrn_shape)
    for softmax_shape in (SoftmaxShape(3, 13), SoftmaxShape(2, 16), SoftmaxShape(1, 1)):
        made[f"softmax, {softmax_shape}"] = probabilities(softmax_shape)
    for sizes in ((3, 13, 2, 5), (2, 16, 3, 3), (1, 1, 1, 1)):
        made[f"lpips, {sizes}"] = distance(DistanceShape(*sizes))
    for name, images in {
        "bytes": torch.zeros(2, 3, 9, 7, dtype=torch.uint8),
        "floats": torch.zeros(2, 3, 9, 7),
        "NHWC": torch.zeros(2, 9, 7, 3, dtype=torch.uint8).permute(0, 3, 1, 2),
        "crop": torch.zeros(2, 3, 11, 9)[:, :, 2:, 2:],
        "grey": torch.zeros(2, 1, 9, 7, dtype=torch.uint8).expand(2, 3, 9, 7),
    }.items():
        made[f"pass, {name}"] = entry(images)
    exact = replace(READ, rows=9, columns=7)
    made["pass, nothing beyond"] = entry(torch.zeros(2, 3, 9, 7), shape=exact)
    return made


# Faults


@jit
def _copy_kernel(x, y, N, READ: tl.constexpr, WRITE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i + READ, mask=i < N, other=0.0)
    tl.store(y + i + WRITE, value, mask=i < N)


def single(kernel: Kernel, programs: int, **arguments: Any) -> Launch:
    """A launch of one of the small kernels here."""
    return Launch(kernel, (programs,), arguments, num_warps=1, num_stages=1)


def copying(x: torch.Tensor, y: torch.Tensor, read: int = 0, write: int = 0) -> Launch:
    """x to y, but x is read `read` elements further on and y written `write` further on."""
    programs, offsets = -(-len(x) // 8), {"READ": read, "WRITE": write}
    return single(_copy_kernel, programs, x=x, y=y, N=len(x), **offsets, BLOCK=8)


ENDS = POOLS["over both ends"]
EVEN = Conv2dShape(17, 67, 1, 2, 40, 1, 2, padding=(0, 1, 0, 0))  # 40 channels: no padding
SIZES = (19, 1, 70, 40)


def on_pixels(module: Any) -> list[Launch]:
    return convolution(EVEN, PIXELS, module=module)


def on_averages(module: Any) -> list[Launch]:
    return pooling(module.avg_pool2d, ENDS, True)


def on_softmax(module: Any) -> list[Launch]:
    return probabilities(SoftmaxShape(3, 16), module)


def on_distances(module: Any) -> list[Launch]:
    return distance(DistanceShape(3, 16, 2, 3), module)


# A module, a part of a mask in it, what to put there, whose elements are reached then, and how to
# launch the kernel from a copy of the module.
MUTATIONS: dict[str, tuple[ModuleType, str, str, str, Callable[[Any], list[Launch]]]] = {
    "rows": (
        *(conv, "(row < rows) &", "(row <= rows) &", "x"),
        lambda m: convolution(EVEN, ROWS, module=m),
    ),
    "pixels": (conv, "ih < H", "ih <= H", "x", on_pixels),
    "filters": (conv, "n < OC", "n <= OC", "w", on_pixels),
    "tail": (conv, "channel < OC", "channel <= OC", "bias", on_pixels),
    "linear": (gemm, "image < N", "image <= N", "x", lambda m: linear(SIZES, WHOLE, module=m)),
    "split": (gemm, "channel < OC", "channel <= OC", "y", lambda m: linear(SIZES, SPLIT, module=m)),
    "max": (pool, "inside & valid[:, None]", "inside", "x", lambda m: pooling(m.max_pool2d, ENDS)),
    "average": (pool, "inside & valid[:, None]", "inside", "x", on_averages),
    "lrn": (lrn, "row < M", "row <= M", "y", lambda m: normalisation(LRNShape(18, 16, 5), m)),
    "softmax": (softmax, "row < M", "row <= M", "y", on_softmax),
    "distances": (lpips, "row < M", "row <= M", "y", on_distances),
    "means": (lpips, "pixel < M", "pixel <= M", "x", on_distances),
    "pass": (
        *(channels_last, "(h < H)", "(h <= H)", "image"),
        lambda m: entry(torch.zeros(2, 3, 9, 7), m),
    ),
}


def mutated(module: ModuleType, old: str, new: str) -> Any:
    """A copy of a module of kernels with `new` wherever its source has `old`."""
    source = inspect.getsource(module)
    assert old in source, f"{module.__name__} has no {old!r} any more: mutate something else"
    source = source.replace(old, new)
    name, file = f"{module.__name__}_mutated", f"mutated {old} {module.__name__}.py"
    copy = ModuleType(name)
    copy.__package__ = module.__package__
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    sys.modules[name] = copy  # where a dataclass looks for its annotations
    exec(compile(source, file, "exec", dont_inherit=True), vars(copy))
    return copy


def mutant(name: str) -> list[Launch]:
    """One of our kernels with a mask broken."""
    module, old, new, _, bind = MUTATIONS[name]
    return bind(mutated(module, old, new))


def unwritten(made: Iterable[Launch]) -> Iterator[torch.Tensor]:
    """What launches fill, whole memory of it, and the padding channels of what they read.

    Pooling takes padding along: what comes of it is padding.
    """
    for launch in made:
        for name, value in launch.arguments.items():
            tensor = getattr(value, "base", value)
            memory = getattr(tensor, "_base", None)
            if name in ("y", "parts") and tensor is not None:
                yield tensor if memory is None else memory
            elif name in ("a", "b", "x", "w") and memory is not None and memory.ndim == tensor.ndim:
                pooling = "pool" in launch.kernel.__name__
                yield memory[..., memory.shape[-1] if pooling else tensor.shape[-1] :]


def watched(made: Iterable[Launch], before: Iterable[torch.Tensor] = ()) -> list[Violation]:
    """What is found while they run; `before` is unwritten."""
    with sanitized(before) as violations:
        for launch in made:
            launch()
    return violations


def faults(made: dict[str, list[Launch]]) -> dict[str, list[str]]:
    """Those that are not clean, and why."""
    found = {name: watched(several, unwritten(several)) for name, several in made.items()}
    return {name: list(map(str, violations)) for name, violations in found.items() if violations}


@pytest.mark.parametrize("descriptors", [False, True])
def test_products_stay_inside_their_tensors(descriptors: bool) -> None:
    assert faults(products(descriptors)) == {}


def test_other_kernels_stay_inside_their_tensors() -> None:
    assert faults(others()) == {}


def test_every_kernel_is_among_them() -> None:
    made = products(False) | others()
    run = {launch.kernel for several in made.values() for launch in several}
    folder = Path(conv.__file__).parent
    for name in sorted(path.stem for path in folder.glob("*.py")):
        module = importlib.import_module(f"{conv.__package__}.{name}")
        for kernel in vars(module).values():
            if isinstance(kernel, Kernel) and kernel.__name__.endswith("_kernel"):
                assert kernel in run, f"no launch above runs {module.__name__}.{kernel.__name__}"


@pytest.mark.parametrize(
    ("arch", "options"),
    [(None, PLAIN), (80, PLAIN), (90, Options(slice_images=2, slice_until="pool1"))],
    ids=str,
)
def test_a_plan_stays_inside_its_slots(
    arch: int | None, options: Options, generator: torch.Generator
) -> None:
    """As the engine binds it for a GPU, outputs side by side in one memory, all of it unwritten."""
    digits = network("digits")
    shapes = digits.parameter_shapes()
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    plan = Planner(digits, ARITHMETIC["fp16"], arch, options=options)(3)
    bound = bind(plan, pack(digits, state, ARITHMETIC["fp16"], torch.device("cpu")))
    images = torch.zeros(3, *digits.input_shape, dtype=torch.uint8)
    made = list(bound.every_launch(images))
    assert len(made) >= len(plan.steps)
    assert watched(made, unwritten(made)) == []


def test_a_watched_kernel_computes_what_it_does_unwatched(generator: torch.Generator) -> None:
    config = replace(PIXELS, descriptors=True)
    (launch,) = convolution(CONVOLUTIONS["multiples of nothing"], config, (True, None, False))
    x, y = launch.arguments["x"], launch.arguments["y"]
    x.copy_(torch.randn(x.shape, generator=generator))
    launch.arguments["w"].base.fill_(0.5)
    launch()
    wanted = y.clone()
    y.fill_(torch.nan)
    assert watched([launch]) == []
    assert torch.equal(y, wanted)
    assert wanted.count_nonzero() > 0


@pytest.mark.parametrize(
    ("read", "write", "where", "program"),
    [
        (1, 0, ("load", "x", 13, 13), (1, 0, 0)),
        (-3, 0, ("load", "x", -3, -1), (0, 0, 0)),
        (0, 2, ("store", "y", 13, 14), (1, 0, 0)),
        (0, -1, ("store", "y", -1, -1), (0, 0, 0)),
    ],
)
def test_a_planted_fault_is_named_and_does_no_harm(
    read: int, write: int, where: tuple[str, str, int, int], program: tuple[int, int, int]
) -> None:
    """Though what lies on both sides is memory, and even the other tensor's."""
    memory = torch.arange(42.0)
    x, y, between = memory[3:16], memory[19:32], memory[16:19].clone()
    (found,) = watched([copying(x, y, read, write)])
    access, _, lowest, highest = where
    assert (found.access, found.argument, found.lowest, found.highest) == where
    assert (found.elements, found.count) == (13, highest - lowest + 1)
    assert (found.kernel, found.program) == ("_copy_kernel", program)
    source, first = inspect.getsourcelines(_copy_kernel.fn)
    (at,) = (i for i, text in enumerate(source) if f"tl.{access}(" in text)
    assert found.line == f"test_sanitizer.py:{first + at}"
    assert torch.equal(memory[16:19], between)
    assert memory[32] == 32
    assert memory[18] == 18
    good = slice(max(0, -read, write), 13 - max(read, -write, 0))  # the others were copied
    assert torch.equal(y[good], x[good.start + read - write : good.stop + read - write])


@jit
def _wide_kernel(x, y, table):  # type: ignore[no-untyped-def]
    i = tl.arange(0, 8)
    tl.atomic_add(y + i, x.load([0]))
    tl.atomic_cas(y + 3 + i, tl.full((8,), 0.0, tl.float32), tl.full((8,), 1.0, tl.float32))
    tl.store(tl.load(table).to(tl.pointer_type(tl.float32)), 1.0)


def test_descriptors_atomics_and_pointers_from_memory() -> None:
    y = torch.zeros(16)
    wide = TensorDescriptor(torch.ones(4), shape=[6], strides=[1], block_shape=[8])
    table = torch.tensor([y[15:].data_ptr()])
    found = watched([single(_wide_kernel, 1, x=wide, y=y[:7], table=table)])
    seen = [(each.access, each.argument, each.count) for each in found]
    assert seen == [
        ("load", "x", 2),
        ("atomic", "y", 1),
        ("atomic", "y", 4),
        ("store", "no tensor", 1),
    ]
    assert y.tolist() == [1.0] * 4 + [1.0] * 3 + [0.0] * 9


def test_nothing_is_left_behind() -> None:
    names = ("load", "store", "rmw", "cas", "barrier", "set_grid_idx")
    before = interpreter.GridExecutor.__call__, interpreter._implicit_cvt
    with pytest.raises(KeyError), sanitized():
        raise KeyError
    assert (interpreter.GridExecutor.__call__, interpreter._implicit_cvt) == before
    patched = vars(interpreter.interpreter_builder)
    assert not [name for name in patched if name.endswith(names)]


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_mask_is_found(name: str) -> None:
    _, _, _, argument, _ = MUTATIONS[name]
    assert argument in {violation.argument for violation in watched(mutant(name))}


# Unwritten memory


def test_what_nobody_wrote_is_not_read() -> None:
    x, y, z = torch.ones(13), torch.empty(26), torch.empty(13)
    (found,) = watched([copying(y[:13], z), copying(y[:13], z)], [y[3:5], y[20:]])
    assert (found.fault, found.access, found.argument) == ("unwritten", "load", "x")
    assert (found.lowest, found.highest, found.count) == (3, 4, 4)
    read = y[3:16]  # by other programs than it was written by, but later
    assert watched([copying(x, y[5:18]), copying(read, z), copying(z, x)], [y[5:], z]) == []


def test_what_torch_makes_is_unwritten_until_it_is_filled() -> None:
    with sanitized() as found:
        made = torch.empty(13)
        copying(made[:7].zero_(), torch.zeros(7))()
        assert found == []
        copying(made, made.new_empty(13))()
        assert [(each.argument, each.lowest, each.highest) for each in found] == [("x", 7, 12)]
        torch.add(torch.ones(13), 1, out=made)
        copying(made, torch.empty_like(made))()
        assert len(found) == 1


# Races


def split(module: Any) -> list[Launch]:
    return linear(SIZES, SPLIT, module=module)


def ended(module: Any) -> list[Launch]:
    """The same sum, added up by a copy of split_k."""
    return split(mutated(gemm, "from .split_k import", f"from {module.__name__} import"))


# A module, a part of it, what to put there, what is found of which tensors then, and the launch.
RACES: dict[str, tuple[ModuleType, str, str, set[tuple[str, str]], Any]] = {
    "no barrier": (split_k, "tl.debug_barrier()", "pass", {("unordered", "parts")}, ended),
    **{
        order: (
            *(split_k, '"acq_rel"', f'"{order}"'),
            *({("unordered", "parts"), ("unordered", "counters")}, ended),
        )
        for order in ("relaxed", "acquire", "release")
    },
    "within a block": (
        *(split_k, '"acq_rel"', '"acq_rel", scope="cta"'),
        *({("unordered", "parts"), ("unordered", "counters")}, ended),
    ),
    "neighbours": (
        *(gemm, "n_blocks) * BLOCK_N", "n_blocks) * (BLOCK_N // 2)"),
        *({("unordered", "y")}, lambda m: linear(SIZES, WHOLE, module=m)),
    ),
    "one part for all": (
        *(gemm, "parts + offset + part * size, acc", "parts + offset, acc"),
        *({("unordered", "parts"), ("unwritten", "parts")}, split),
    ),
    "padding": (
        *(gemm, "(image < N)[:, None] & (k < C)", "(image < N)[:, None] & (k < 72)"),
        *({("unwritten", "x")}, lambda m: linear(SIZES, WHOLE, module=m)),
    ),
}


@pytest.mark.parametrize("name", RACES)
def test_what_is_unordered_or_unwritten_is_found(name: str) -> None:
    """Neighbours write the same values: nothing else would show them."""
    module, old, new, wanted, bind = RACES[name]
    launches = bind(mutated(module, old, new))
    found = watched(launches, unwritten(launches))
    assert {(each.fault, each.argument) for each in found} == wanted
    for each in found:
        assert (each.other is None) == (each.fault == "unwritten")
        assert each.by != each.program


@jit
def _handing_on_kernel(x, y, counters, BEFORE: tl.constexpr, AFTER: tl.constexpr, TO: tl.constexpr):  # type: ignore[no-untyped-def]
    """Program 0 hands y to 1, which hands it to 2."""
    program = tl.program_id(0)
    before = tl.load(x + program)
    if program > 0:
        tl.atomic_cas(counters + program, 1, 2, sem=AFTER)
        before += tl.load(y + program - 1) + tl.load(y)
    tl.store(y + program, before)
    tl.debug_barrier()
    tl.atomic_add(counters + program + TO, 1, sem=BEFORE)


@pytest.mark.parametrize(
    ("before", "after", "to", "races"),
    [
        ("release", "acquire", 1, 0),
        ("acq_rel", "acq_rel", 1, 0),
        ("release", "acquire", 2, 3),
        ("relaxed", "acquire", 1, 4),
        ("release", "relaxed", 1, 4),
        ("acquire", "release", 1, 4),
    ],
)
def test_a_release_comes_before_an_acquire_of_its_address(
    before: str, after: str, to: int, races: int
) -> None:
    """Within one launch: the one before was in order."""
    x, y, counters = torch.ones(3), torch.zeros(3), torch.zeros(5, dtype=torch.int32)
    right, launch = (
        single(_handing_on_kernel, 3, x=x, y=y, counters=counters, BEFORE=of[0], AFTER=of[1], TO=to)
        for of, to in ((("release", "acquire"), 1), ((before, after), to))
    )
    assert sum(each.count for each in watched([right, launch])) == races
    assert y.tolist() == [1, 3, 5]


@jit
def _overwriting_kernel(x, y, counter, TELLING: tl.constexpr, WAITING: tl.constexpr):  # type: ignore[no-untyped-def]
    """Programs 0 and 1 read what 2 overwrites; bits say who tells it, who has a barrier before."""
    program = tl.program_id(0)
    if program == 2:
        tl.atomic_add(counter, 0, sem="acquire")
        tl.store(x, 2.0)
    else:
        tl.store(y + program, tl.load(x))
        if (WAITING >> program) % 2 == 1:
            tl.debug_barrier()
        tl.atomic_add(counter, 1, mask=(TELLING >> program) % 2 == 1, sem="release")


@pytest.mark.parametrize(
    ("telling", "waiting", "reader"),
    [(3, 3, None), (2, 3, (0, 0, 0)), (1, 3, (1, 0, 0)), (2, 1, (0, 0, 0)), (3, 1, (1, 0, 0))],
)
def test_every_reader_must_be_done_before_a_write(telling: int, waiting: int, reader: Any) -> None:
    x, y, counter = torch.ones(1), torch.ones(2), torch.zeros(1, dtype=torch.int32)
    bits = {"TELLING": telling, "WAITING": waiting}
    found = watched([single(_overwriting_kernel, 3, x=x, y=y, counter=counter, **bits)])
    assert [(each.access, each.other, each.by) for each in found] == (
        [("store", "load", reader)] if reader else []
    )


@jit
def _bytes_kernel(x, y, sums):  # type: ignore[no-untyped-def]
    """Each of 4 programs writes a byte of x: 0 has read the last two of them, 3 reads the others.

    And sums are added to and stored by different programs, and loaded by another.
    """
    program = tl.program_id(0)
    if program == 0:
        tl.store(y, tl.load(x + 1))
        tl.store(sums, 0)
        tl.atomic_add(sums + 1, 1)
    tl.store(x.to(tl.pointer_type(tl.int8), bitcast=True) + program, 1)
    if program == 1:
        tl.atomic_add(sums, 1)
    if program == 2:
        tl.store(sums + 1, 1)
    if program == 3:
        tl.store(y + 1, tl.load(x))
        tl.store(y + 2, tl.load(sums + 1))


def test_neighbouring_bytes_are_not_one_and_an_atomic_is_a_write() -> None:
    x, y = torch.zeros(2, dtype=torch.int16), torch.zeros(3, dtype=torch.int16)
    sums = torch.zeros(2, dtype=torch.int32)
    found = watched([single(_bytes_kernel, 4, x=x, y=y, sums=sums)])
    seen = [(each.access, each.argument, each.lowest, each.count, each.other) for each in found]
    assert seen == [
        ("atomic", "sums", 0, 1, "store"),
        ("store", "x", 2, 2, "load"),
        ("store", "sums", 1, 1, "atomic"),
        ("load", "x", 0, 1, "store"),
        ("load", "sums", 1, 1, "store"),
        ("load", "sums", 1, 1, "atomic"),
    ]
