"""Every launch of every network keeps the driver's rules, and every rule is seen to refuse one.

To plan and bind each network at each batch for each dtype and card would take an hour. A kernel's
launch follows from its layer, the number of images, its configuration and the size of a number, so
here each layer of all networks is bound alone, by the engine's own `bind`, and only once for all
networks, dtypes and cards that want it alike. Whole plans of a few batches must be made of the same
launches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from alexnet_triton.engine.bind import Packed, bind, pack, sliced, view
from alexnet_triton.engine.devices.towers import half
from alexnet_triton.engine.memory import ALIGNMENT
from alexnet_triton.engine.plan import (
    ARITHMETIC,
    Arithmetic,
    GatherShape,
    Options,
    Plan,
    Step,
    plan,
)
from alexnet_triton.engine.spec import Network, NetworkError
from alexnet_triton.engine.zoo import NETWORKS
from alexnet_triton.kernels import (
    channels_last,
    conv,
    driver,
    first_layer,
    gemm,
    layout,
    lpips,
    lrn,
    pool,
    softmax,
)
from alexnet_triton.kernels.driver import (
    RULES,
    Asked,
    TensorMap,
    departures,
    refusals,
    tensor_maps,
)
from alexnet_triton.kernels.jit import Kernel, Launch, LaunchRefused
from alexnet_triton.kernels.pdl import overlapping
from triton.tools.tensor_descriptor import TensorDescriptor

ARCHS = (80, 86, 89, 90, 100, 120)
BATCHES = (*range(1, 261), 1000, *(n + i for n in (512, 1024, 2048, 4096) for i in (-1, 0, 1)))

# So many images, configured for so many: the last, smaller piece of a long batch is configured as
# the pieces before it.
SIZES = (
    *((n, n) for n in BATCHES),
    *((n, whole) for whole in (64, 128, 1024) for n in (1, 2, 31, 63)),
)


def archs(images: int) -> tuple[int, ...]:
    """All of them where tiles begin, end or are ragged; of what lies between, each batch one."""
    if images < 34 or images > 260 or images % 32 in (0, 1, 31):
        return ARCHS
    return (ARCHS[images % len(ARCHS)],)


@cache
def networks() -> dict[str, Network]:
    """The zoo, and the half of each network that two towers can share."""
    found = dict(NETWORKS)
    for name, network in NETWORKS.items():
        try:
            found[f"half of {name}"] = half(network)
        except NetworkError:
            continue
    return found


@cache
def weights(name: str, arithmetic: Arithmetic) -> Packed:
    network = networks()[name]
    shapes = network.parameter_shapes().items()
    return pack(network, {k: torch.empty(s, device="meta") for k, s in shapes}, arithmetic, "meta")


def images_of(network: Network, batch: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    return torch.empty(batch, *network.input_shape, dtype=dtype, device="meta")


def whole(
    name: str, batch: int, dtype: str, arch: int, **wanted: Any
) -> tuple[Plan, list[tuple[str, Launch]]]:
    """A plan, and all its launches by step name, stems first."""
    network, arithmetic = networks()[name], ARITHMETIC[dtype]
    planned = plan(network, batch, arithmetic, arch, **wanted)
    bound = bind(planned, weights(name, arithmetic))
    images = images_of(network, batch)
    stems = [("input", head.first(images)) for head in bound.heads]
    rest = [*(pair for head in bound.heads for pair in head.launches), *bound.launches]
    return planned, [*stems, *((step, launch) for step, several in rest for launch in several)]


# --- a layer alone ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Layer:
    """A step of a network, and the step before it, for so many images."""

    name: str  # the network's
    before: Step
    step: Step
    arithmetic: Arithmetic
    images: int = 1

    @property
    def first(self) -> bool:
        return isinstance(self.before.shape, channels_last.ChannelsLastShape)

    @property
    def product(self) -> bool:
        return isinstance(self.step.shape, conv.Conv2dShape | gemm.LinearShape)

    @property
    def problem(self) -> object:
        """All that sets a layer apart: names, activations and which network change no rule."""
        step = self.step
        return step.shape, step.kernel, step.dtype.itemsize, self.first

    def of(self, images: int) -> Layer:
        """The same layer for another number of images."""
        before, step = sliced(self.before, images), sliced(self.step, images)
        return Layer(self.name, before, step, self.arithmetic, images)

    def configured(self, arch: int) -> Any:
        """The configuration that a plan chooses."""
        block = self.step.block
        affine = block is not None and block.affine is not None
        how = self.arithmetic.dtype, self.arithmetic.precision, arch, False, affine
        match self.step.shape:
            case conv.Conv2dShape() as shape if self.before.by_image:
                return first_layer.default_config(shape, self.before.output[3], *how)
            case conv.Conv2dShape() as shape:
                return conv.default_config(shape, *how)
            case gemm.LinearShape() as shape:
                return gemm.default_config(shape, *how)
            case pool.PoolShape() as shape:
                return pool.default_config(shape, arch)
            case lrn.LRNShape() as shape:
                return lrn.default_config(shape, arch)
            case softmax.SoftmaxShape() as shape:
                return softmax.default_config(shape, arch)
        raise AssertionError(self.step)

    def launches(
        self, chosen: Any, arch: int, pixels: torch.dtype = torch.uint8
    ) -> Iterator[Launch]:
        """Its launches as `bind` makes them; before those of a first layer, the pass."""
        before, step = self.before, replace(self.step, config=chosen)
        if isinstance(before.shape, channels_last.ChannelsLastShape):
            before = replace(before, config=channels_last.default_config(before.shape, arch))
        network, packed = networks()[self.name], weights(self.name, self.arithmetic)

        def planned(one: Step) -> Plan:
            room, shape = max(one.size, 4 * one.scratch), network.input_shape
            return Plan(network, self.images, shape, self.arithmetic, arch, (one,), room)

        if self.first:
            yield bind(planned(before), packed).first(images_of(network, self.images, pixels))
        x = view(before, torch.empty(before.size, dtype=torch.uint8, device="meta"))
        ((_, several),) = bind(planned(step), packed, x).launches
        yield from several


def layers(name: str, arithmetic: Arithmetic) -> list[Layer]:
    """All layers of a network that are kernels, for one image, each in memory of its own."""
    found: list[Layer] = []
    planned = plan(networks()[name], 1, arithmetic, 80)
    steps = [replace(step, offset=0, scratch_offset=0) for step in planned.steps]
    for before, step in pairwise(steps):
        if not isinstance(step.shape, GatherShape):
            found.append(Layer(name, before, step, arithmetic))
    return found


def distinct(arithmetic: Arithmetic) -> list[Layer]:
    """The layers of all networks, each problem once."""
    found = [layer for name in networks() for layer in layers(name, arithmetic)]
    return list({layer.problem: layer for layer in found}.values())


def broken(layer: Layer, seen: set[object]) -> list[str]:
    """What any card would refuse of a layer at any number of images, if not seen before."""
    found = []
    for images, configured_for in SIZES:
        here = layer.of(images)
        like = here if configured_for == images else layer.of(configured_for)
        for arch in archs(images):
            chosen = like.configured(arch)
            # Beyond its configuration a launch differs by descriptors, and those are a product's.
            key = images, chosen, layer.product and arch >= driver.HOPPER
            if key in seen:
                continue
            seen.add(key)
            pixels = layer.arithmetic.dtype if images % 2 else torch.uint8
            where = f"{layer.name} {layer.step.name}, {images} images, sm_{arch}"
            for launch in here.launches(chosen, arch, pixels):
                found += [f"{where}: {line}" for line in refusals(launch, arch)]
    return found


SHARES = 4  # of the products, so that several processes can take them


@pytest.mark.parametrize("share", range(SHARES))
@pytest.mark.parametrize("dtypes", [("fp32",), ("tf32",), ("fp16", "bf16")], ids="+".join)
def test_every_product_of_every_network_at_every_batch(dtypes: tuple[str, ...], share: int) -> None:
    seen: dict[object, set[object]] = {}  # by problem: two bytes are two bytes to the driver
    for dtype in dtypes:
        products = [layer for layer in distinct(ARITHMETIC[dtype]) if layer.product]
        for layer in products[share::SHARES]:
            assert not broken(layer, seen.setdefault(layer.problem, set()))


def test_every_other_kernel_of_every_network_at_every_batch() -> None:
    """Pooling, normalisation and softmax, which count alike in every dtype."""
    for layer in distinct(ARITHMETIC["fp16"]):
        if not layer.product:
            assert not broken(layer, set())


def distances(images: int, height: int, width: int, channels: int, arch: int) -> Iterator[Launch]:
    """The launches of LPIPS for one of AlexNet's layers, one image against all others."""
    taps = layout.empty(height, width, images + 1, channels, torch.float16, "meta")
    one = taps[:, :, -1:].expand(-1, -1, images, -1)
    y = torch.empty(height, width, images, device="meta")
    shape = lpips.DistanceShape(images, channels, height, width)
    config = lpips.default_config(shape, arch)
    yield lpips.distances(taps[:, :, :-1], one, y[0, 0], y, shape, config)
    yield lpips.means(y, y[0, 0], shape, config)


def test_distances_of_every_layer_at_every_batch() -> None:
    """Of images from 31x31 to 4000x3000; more pixels than 32 bits count are refused before."""
    sizes = ((7, 7, 64), (1, 1, 192), (999, 749, 64), (499, 374, 192), (249, 187, 384))
    for arch, images, size in product(ARCHS, (1, 2, 63, 64, 1000, 2048), sizes):
        for launch in distances(images, *size, arch):
            assert not refusals(launch, arch), (arch, images, size)
    with pytest.raises(ValueError, match=r"2147483648 rows .* smaller batch"):
        next(distances(2048, 1024, 1024, 64, 90))


# --- whole plans -----------------------------------------------------------------------------


def told(launch: Launch) -> object:
    """All that the driver learns of a launch, but for where in memory its tensors lie."""

    def short(value: Any) -> object:
        match value:
            case torch.Tensor():
                return value.shape, value.stride(), value.dtype
            case TensorDescriptor():
                described = value.shape, value.strides, value.block_shape
                return value.base.dtype, *map(tuple, described)
        return value

    arguments = {name: short(value) for name, value in launch.arguments.items()}
    return launch.kernel.__name__, launch.grid, launch.options, arguments


@pytest.mark.parametrize("name", networks())
def test_plans_are_made_of_the_launches_that_layers_make_alone(name: str) -> None:
    for dtype, arch, batch in (("fp16", 90, 1), ("bf16", 100, 259), ("tf32", 120, 128)):
        arithmetic = ARITHMETIC[dtype]
        alone: list[object] = []
        for one in layers(name, arithmetic):
            layer = one.of(batch)
            alone += map(told, layer.launches(layer.configured(arch), arch))
        _, launches = whole(name, batch, dtype, arch)
        assert [told(launch) for _, launch in launches] == alone, (dtype, arch, batch)


def variants(name: str, arch: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Batches, and what else a plan may be asked for."""
    yield 5, {"batch_invariant": True}
    yield 130, {"batch_invariant": True}
    yield 129, {"configured_for": 512}
    yield 300, {"options": Options(pointers=True)}
    pools = [step for step, layer in networks()[name].layers if "pool" in step][:2]
    for until in pools:
        yield 77, {"options": Options(32, until)}  # the last slice is a smaller one
    if arch >= driver.HOPPER:
        yield 1, {"options": Options(pdl=True)}
        yield 200, {"options": Options(64, pools[-1], pdl=True)}


@pytest.mark.parametrize("name", networks())
def test_plans_in_every_order_of_launches(name: str) -> None:
    for arch in ARCHS:
        for turn, (batch, wanted) in enumerate(variants(name, arch)):
            dtype = [*ARITHMETIC][turn % len(ARITHMETIC)]
            planned, launches = whole(name, batch, dtype, arch, **wanted)
            starts = [at for s in planned.steps for at in (s.offset, s.scratch_offset)]
            assert not any(at % ALIGNMENT for at in starts)
            found = [line for _, launch in launches for line in refusals(launch, arch)]
            assert not found, (batch, dtype, arch, wanted)


def test_what_the_documentation_does_not_describe_is_known() -> None:
    """One kind of departure only, and no other: whoever adds one must look it up first."""
    for name in networks():
        for dtype in ("fp16", "tf32", "fp32"):
            planned, launches = whole(name, 256, dtype, 90)
            steps = {step.name: step for step in planned.steps}
            for step_name, launch in launches:
                step, wanted = steps[step_name], {}
                match step.shape, step.config:
                    case conv.Conv2dShape(groups=2), conv.Conv2dConfig(tiling="rows"):
                        wanted = {"x": "order"}
                    case _, first_layer.FirstLayerConfig():
                        wanted = {"x": "order"}
                assert departures(launch, 90) == wanted, (name, dtype, step_name)
                assert departures(launch, 80) == {}


@pytest.mark.parametrize("name", ["alexnet", "alexnet2012"])
def test_a_driver_that_takes_documented_descriptors_only(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It refuses the images' and the groups', each with the cure; through pointers, nothing."""
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    for pointers in (False, True):
        refused = {}
        _, launches = whole(name, 256, "fp16", 90, options=Options(pointers=pointers))
        for step_name, launch in launches:
            with monkeypatch.context() as patch:
                driven = partial(_strict_driver, launch)
                patch.setattr(Kernel, "__getitem__", lambda _, grid, run=driven: run)
                try:
                    launch()
                except LaunchRefused as error:
                    refused[step_name] = str(error)
        grouped = {"conv2", "conv4", "conv5"} if name == "alexnet2012" else set()
        assert refused.keys() == (set() if pointers else {"conv1"} | grouped)
        assert all("Options(pointers=True)" in line for line in refused.values())


def _strict_driver(launch: Launch, **arguments: object) -> None:
    """Launches as Triton does with a driver that takes the documented strides only."""
    if departures(launch, 90):
        raise RuntimeError(
            "Triton Error [CUDA]: Failed to create tensor map descriptor: invalid argument"
        )


# --- each rule refuses -----------------------------------------------------------------------


def launch_of(step: str, batch: int, dtype: str, arch: int) -> Launch:
    _, launches = whole("alexnet", batch, dtype, arch)
    return next(launch for name, launch in launches if name == step)


def changed(launch: Launch, **arguments: Any) -> Launch:
    return replace(launch, arguments={**launch.arguments, **arguments})


def described(launch: Launch, **fields: Any) -> Launch:
    """The launch with another descriptor of its images, which Triton's own checks have not seen."""
    descriptor = copy(launch.arguments["x"])
    for name, value in fields.items():
        setattr(descriptor, name, value)
    return changed(launch, x=descriptor)


def large(descriptors: bool) -> Launch:
    """A convolution whose filters take more than 2^31 numbers."""
    shape = conv.Conv2dShape(1, 46_344, 1, 1, 46_344, 1, 1)
    x, out = (layout.empty(1, 1, 1, 46_344, torch.float16, "meta") for _ in range(2))
    weight = torch.empty(1, 46_344, 46_344, dtype=torch.float16, device="meta")
    config = conv.Conv2dConfig("pixels", 64, 64, 64, descriptors=descriptors)
    return conv.conv2d(x, weight, None, out, shape, config)


GOOD = cache(lambda: launch_of("conv4", 256, "fp16", 90))  # x [13, 13*256, 384], boxes [128, 64]

# By rule: a tensor map that breaks it, and what is said.
MAPS = [
    ("tensorRank", {"sizes": (8,) * 6, "strides": (16,) * 5}, "6 dimensions, wanted 1 to 5"),
    ("globalAddress", {"address": 520}, "starts 8 bytes after a multiple of 16"),
    ("globalDim", {"sizes": (384, 0, 13)}, "a size of 0, wanted 1 to 2^32"),
    ("globalStrides", {"strides": (776, 2_555_904)}, "776 bytes, wanted a multiple of 16"),
    ("globalStrides", {"strides": (768, 2**40), "room": 2**44}, "wanted less than 2^40"),
    ("boxDim", {"box": (64, 512, 1)}, "a box with a side of 512, wanted 1 to 256"),
    ("boxDim[0]", {"box": (4, 128, 1)}, "rows of 8 bytes, wanted a multiple of 16"),
    ("swizzle", {"box": (128, 64, 1)}, "rows of 256 bytes, over the swizzle's 128"),
    ("allocation", {"room": 33_226_750}, "ends 2 bytes behind its allocation"),
]

# By rule: an architecture, a launch that it refuses, and what is said.
LAUNCHES: list[tuple[str, int, Callable[[], Launch], str]] = [
    ("globalAddress", 90, lambda: described(GOOD(), base=view_of(1)), "starts 2 bytes after"),
    ("globalStrides", 90, lambda: described(GOOD(), strides=[1, 388, 1]), "776 bytes"),
    ("boxDim[0]", 90, lambda: described(GOOD(), block_shape=[1, 128, 4]), "rows of 8 bytes"),
    ("descriptor sizes", 90, lambda: described(GOOD(), shape=[2**31, 3328, 384]), "in 32 bits"),
    ("grid", 80, lambda: replace(GOOD(), grid=(2**31, 1)), "2147483648 programs along x"),
    ("grid", 80, lambda: replace(GOOD(), grid=(1, 70_000)), "70000 programs along y"),
    ("grid", 80, lambda: replace(GOOD(), grid=(1, 1, 70_000)), "70000 programs along z"),
    ("grid", 80, lambda: replace(GOOD(), grid=(0, 1)), "0 programs along x, wanted 1 to"),
    ("threads", 80, lambda: replace(GOOD(), num_warps=64), "64 warps a block, wanted at most 32"),
    ("num_warps", 80, lambda: replace(GOOD(), num_warps=6), "6 warps a block, wanted a power"),
    ("num_warps", 80, lambda: replace(GOOD(), num_warps=0), "0 warps a block, wanted a power"),
    ("dependent launch", 89, lambda: replace(GOOD(), pdl=True), "which sm_89 cannot"),
    ("integers", 80, lambda: changed(GOOD(), H=2**31), "H is 2147483648"),
    ("rows", 80, lambda: changed(GOOD(), N=12_707_004), "counts to 2147483675"),
    ("rows", 80, lambda: changed(launch_of("pool1", 1, "fp16", 80), R=2**31 - 8), "counts to"),
    ("rows", 80, lambda: changed(launch_of("fc6", 1, "fp16", 80), N=2**31 - 8), "counts to"),
    ("filters", 80, lambda: large(False), "2147766336 numbers in the filters"),
    ("filters", 90, lambda: overlapping(large(True)), "2147766336 numbers in the filters"),
]


def view_of(offset: int) -> torch.Tensor:
    return torch.empty(2**26, dtype=torch.float16, device="meta")[offset:]


@pytest.mark.parametrize(("rule", "changes", "words"), MAPS)
def test_a_tensor_map_is_refused(rule: str, changes: dict[str, Any], words: str) -> None:
    good = next(tensor for tensor in tensor_maps(GOOD()) if tensor.name == "x")

    def told(tensor: TensorMap) -> list[tuple[str, str]]:
        asked = Asked(GOOD(), 90, (tensor,), None, None)
        return [(rule.name, line) for rule in RULES for line in rule.breaches(asked)]

    assert told(good) == []
    ((name, line),) = told(replace(good, **changes))
    assert name == rule
    assert line.startswith("x: ")
    assert words in line


@pytest.mark.parametrize(("rule", "arch", "made", "words"), LAUNCHES)
def test_a_launch_is_refused(rule: str, arch: int, made: Callable[[], Launch], words: str) -> None:
    launch = made()
    said = [line for line in refusals(launch, arch) if line.startswith(f"{rule}: ")]
    assert any(words in line for line in said), refusals(launch, arch)
    assert f": {launch.kernel.__name__}: " in said[0]


def test_what_was_compiled_is_refused_if_too_large() -> None:
    for arch, kib in ((80, 163), (86, 99), (89, 99), (90, 227), (100, 227), (120, 99)):
        assert refusals(GOOD(), arch, shared=kib * 1024, registers=255) == []
        (line,) = refusals(GOOD(), arch, shared=kib * 1024 + 1)
        assert line.startswith(f"shared memory: _conv2d_rows_kernel: {kib * 1024 + 1} bytes")
    (line,) = refusals(replace(GOOD(), num_warps=16), 90, registers=136)
    assert line.startswith("registers: _conv2d_rows_kernel: 69632 registers a block")


def test_every_rule_is_seen_to_refuse_and_names_its_source() -> None:
    seen = {"shared memory", "registers", *(name for name, *_ in MAPS + LAUNCHES)}
    assert seen == {rule.name for rule in RULES}
    assert all(rule.source for rule in RULES)


def test_what_is_no_refusal() -> None:
    odd = described(GOOD(), strides=[1, 388, 1])
    assert refusals(odd, 120)
    assert refusals(odd, 89) == [], "before Hopper a descriptor is pointers"
    assert refusals(large(True), 90) == [], "large filters are read through descriptors"
    # Distances of more than 32 bits take another binary, which multiplies them in 64 bits as here.
    assert refusals(changed(launch_of("input", 1, "fp16", 90), stride_n=2**33), 90) == []


def test_a_block_of_512_is_loaded_in_boxes_of_256() -> None:
    wide = described(GOOD(), block_shape=[1, 512, 64])
    assert refusals(wide, 90) == []
    assert {t.name: t.box for t in tensor_maps(wide)}["x"] == (64, 256, 1)
