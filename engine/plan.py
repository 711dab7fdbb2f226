"""From a network to the map of a run: which kernel, which shapes, which tiles, which buffer.

A plan knows shapes, fusion, configurations, work and memory; it knows no tensors. `print(plan)`
shows it. Layers are fused (`fuse.py`), and images that are not channels last become it before the
first convolution reads them. Configurations are those measured on the device where there is a table
of them (`kernels/tuning.py`), else each kernel's default.

With many images the first layers may run slice by slice, each slice through all of them, so that
what passes between them stays in the GPU's cache; only the last of these layers writes all images.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar, assert_never

import torch

from ..kernels import channels_last, conv, first_layer, gemm, layout, lrn, pool, softmax
from ..kernels.jit import Work, power_of_two
from ..kernels.tuning import Table, TuningError, dtype_name
from .dtypes import DTYPES
from .fuse import Block, fuse
from .memory import Buffer, arrange
from .spec import (
    AdaptiveAvgPool2d,
    AvgPool2d,
    Conv2d,
    Gather,
    Linear,
    LocalResponseNorm,
    MaxPool2d,
    Network,
    NetworkError,
    Shape,
    Softmax,
)
from .table import Columns, columns

KernelShape = (
    channels_last.ChannelsLastShape
    | conv.Conv2dShape
    | pool.PoolShape
    | gemm.LinearShape
    | lrn.LRNShape
    | softmax.SoftmaxShape
)
KernelConfig = (
    channels_last.ChannelsLastConfig
    | first_layer.FirstLayerConfig
    | conv.Conv2dConfig
    | pool.PoolConfig
    | gemm.LinearConfig
    | lrn.LRNConfig
    | softmax.SoftmaxConfig
)


@dataclass(frozen=True, slots=True)
class GatherShape:
    """An exchange between towers: no kernel, only copies of C channels of M pixels."""

    M: int
    C: int


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """What an engine computes in: the dtype of activations and weights, and of float32 products."""

    dtype: torch.dtype
    precision: str = "ieee"


ARITHMETIC = {
    name: Arithmetic(getattr(torch, dtype), precision)
    for name, (dtype, precision) in DTYPES.items()
}


@dataclass(frozen=True, slots=True)
class Options:
    """How launches follow one another, whatever they compute."""

    slice_images: int = 0  # the first layers take so many images at a time; 0: all at once
    slice_until: str = ""  # the last step that does
    pdl: bool = False  # kernels start before their predecessors end (kernels/pdl.py)
    # Tiles are read through pointers where a descriptor's strides are none that the driver's
    # documentation describes (images, groups), should a driver refuse them.
    pointers: bool = False


PLAIN = Options()

_KERNELS: dict[type, str] = {
    channels_last.ChannelsLastShape: "channels_last",
    lrn.LRNShape: "lrn",
    softmax.SoftmaxShape: "softmax",
    GatherShape: "exchange",
}


@dataclass(frozen=True, slots=True)
class Step:
    """One kernel of the run: it reads the previous step's output and writes `output` [H, W, N, C].

    `name` is that of the block it computes; a pass over the images is called "input" and has none.
    """

    name: str
    block: Block | None
    shape: KernelShape | GatherShape
    config: KernelConfig | None  # None for an exchange, which no kernel does
    output: tuple[int, int, int, int]
    dtype: torch.dtype  # of the output
    work: Work
    tuned: bool = False  # whether the configuration was measured best
    by_image: bool = False  # whether its memory is [N, H, W, C], as the first convolution reads it
    in_place: bool = False  # whether it is a first convolution that reads the caller's images
    offset: int = 0  # bytes from the start of the plan's memory to the output
    scratch_offset: int = 0

    @property
    def kernel(self) -> str:
        """Which kernel it is, and which form of it: "conv2d pixels", "linear /4"."""
        match self.shape, self.config:
            case conv.Conv2dShape(), conv.Conv2dConfig(tiling=tiling):
                return f"conv2d {tiling}"
            case conv.Conv2dShape(), first_layer.FirstLayerConfig(form=form):
                return f"{'in_place' if self.in_place else 'first_layer'} {form}"
            case gemm.LinearShape(), gemm.LinearConfig(SPLIT_K=parts):
                return f"linear /{parts}" if parts > 1 else "linear"
            case pool.PoolShape(), _:
                largest = self.block is not None and isinstance(self.block.layer, MaxPool2d)
                return "max_pool2d" if largest else "avg_pool2d"
        return _KERNELS[type(self.shape)]

    @property
    def scratch(self) -> int:
        """float32 numbers that the parts of a split sum take."""
        match self.shape, self.config:
            case conv.Conv2dShape() as shape, conv.Conv2dConfig() as config:
                return conv.scratch_numbers(shape, config)
            case gemm.LinearShape() as shape, gemm.LinearConfig() as config:
                return gemm.scratch_numbers(shape, config)
        return 0

    @property
    def pitch(self) -> int:
        """Numbers of a pixel of an image as they lie in memory."""
        return self.output[3] if self.by_image else layout.aligned(self.output[3])

    @property
    def size(self) -> int:
        """Bytes of the output as it lies in memory."""
        height, width, images, _ = self.output
        return height * width * images * self.pitch * self.dtype.itemsize

    @property
    def layers(self) -> tuple[str, ...]:
        """The network's layers that it computes."""
        return self.block.layers if self.block else ()

    @property
    def tile(self) -> str:
        """The blocks of its configuration, "128x256x64x0"."""
        declared = asdict(self.config) if self.config else {}
        return "x".join(str(v) for name, v in declared.items() if name.startswith("BLOCK"))


@dataclass(frozen=True, slots=True)
class Plan:
    """All steps for one batch, and the memory that their outputs share.

    Outputs lie where those alive at the same time do not overlap; a kept output stays alive. The
    first `sliced` steps run on `options.slice_images` images at a time; their outputs have memory
    for so many, but for the last one's.
    """

    network: Network
    batch: int
    image_shape: Shape
    arithmetic: Arithmetic
    arch: int | None
    steps: tuple[Step, ...]
    workspace: int  # bytes of all activations and split sums
    options: Options = PLAIN
    sliced: int = 0

    @property
    def work(self) -> Work:
        """FLOPs and bytes of the whole run."""
        return sum((step.work for step in self.steps), Work(0, 0))

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints: the steps with their tiles, outputs, work and slots."""
        steps = [
            {
                "name": step.name,
                "kernel": step.kernel,
                "layers": list(step.layers),
                "config": asdict(step.config) if step.config else None,
                "output": list(step.output),
                "tuned": step.tuned,
                "flops": step.work.flops,
                "bytes": step.work.bytes,
                "offset": step.offset,
                "size": step.size,
            }
            for step in self.steps
        ]
        return {
            "network": self.network.name,
            "batch": self.batch,
            "image_shape": list(self.image_shape),
            "arch": self.arch,
            "workspace": self.workspace,
            "options": asdict(self.options),
            "sliced": self.sliced,
            "steps": steps,
        }

    @property
    def where(self) -> str:
        """What it is planned for: "fp16 on sm_90"."""
        dtype = dtype_name(self.arithmetic.dtype, self.arithmetic.precision)
        return f"{dtype} on " + (f"sm_{self.arch}" if self.arch else "Triton's interpreter")

    def __str__(self) -> str:
        size, total = "x".join(map(str, self.image_shape)), self.work
        lines = [
            f"{self.network.name}: {self.batch} images {size}, {self.where}, "
            f"workspace {self.workspace / 1e6:.1f} MB"
        ]
        if self.options.pdl:
            lines.append("each kernel starts before the one before it ends")
        if self.sliced:
            names = f"{self.steps[0].name} to {self.steps[self.sliced - 1].name}"
            lines.append(f"{names}: {self.options.slice_images} images at a time")
        lines += columns(self.steps, _COLUMNS)
        lines.append(f"{'total':<70} {total.flops / 1e6:>12.1f} {total.bytes / 1e6:>9.2f}")
        return "\n".join(lines)


def _fused(step: Step) -> str:
    words = " + ".join(step.layers or ("normalise", "channels last"))
    return f" {words}  (tuned)" if step.tuned else f" {words}"


_COLUMNS: Columns[Step] = [
    ("step", -8, lambda step: step.name),
    ("kernel", -20, lambda step: step.kernel),
    ("tile", -15, lambda step: step.tile),
    ("output HWNC", -18, lambda step: "x".join(map(str, step.output))),
    ("at MB", 7, lambda step: f"{step.offset / 1e6:.2f}"),
    ("MFLOP", 10, lambda step: f"{step.work.flops / 1e6:.1f}"),
    ("MB", 9, lambda step: f"{step.work.bytes / 1e6:.2f}"),
    (" fused", 0, _fused),
]


def plan(
    network: Network,
    batch: int,
    arithmetic: Arithmetic,
    arch: int | None,
    *,
    image_shape: Shape | None = None,
    image_dtype: torch.dtype = torch.uint8,
    in_place: bool = False,
    configured_for: int | None = None,
    batch_invariant: bool = False,
    keep: Collection[str] = (),
    tuned: Table | None = None,
    options: Options = PLAIN,
) -> Plan:
    """Plan `network` for `batch` images [C, H, W] on compute capability `arch`, None: interpreter.

    Configurations are chosen for `configured_for` images (default: `batch`), so that the last,
    smaller piece of a long batch computes exactly as the pieces before it. `in_place` says that the
    images may be read where they lie, as `kernels.first_layer.in_place` finds; a batch-invariant
    plan always has the pass, since the order of sums must not depend on that. `keep` names the
    layers whose outputs must survive the run. `tuned` is the device's table; a batch-invariant plan
    leaves it aside. Raises NetworkError for no images, for images that do not fit the network, or
    if no step is called as `options` says.
    """
    if batch < 1:
        raise NetworkError(f"{network.name}: wanted a batch of 1 or more images, got {batch}")
    if options.slice_images < 0:
        raise NetworkError(f"options: wanted slices of 0 or more, got {options.slice_images}")
    if options.pdl and arch is not None and arch < 90:
        raise NetworkError(f"options: pdl wants compute capability 9.0 or newer, got sm_{arch}")
    image_shape = tuple(image_shape or network.input_shape)
    configured_for = batch if configured_for is None else configured_for
    choice = _Choice(
        *(configured_for, arithmetic, arch, batch_invariant),
        tuned=None if batch_invariant else tuned,
        pointers=options.pointers,
    )
    slicing = 0 < options.slice_images < configured_for
    early = replace(choice, configured_for=options.slice_images) if slicing else choice
    blocks = fuse(network, image_shape)
    first = blocks[0]
    if not isinstance(first.layer, Conv2d):
        raise NetworkError(
            f"{network.name}, layer {first.name}: a network must start with a convolution, got "
            f"{type(first.layer).__name__}"
        )
    expected = network.parameter_shapes()
    reads = in_place and not batch_invariant
    steps = _first(first, first.layer, batch, early, image_dtype, reads)
    for block in blocks[1:]:
        if steps[-1].name == options.slice_until:
            early = choice
        if isinstance(block.layer, Linear):
            (_, wanted), features = expected[f"{block.name}.weight"], block.came[0]
            if wanted != features:
                raise NetworkError(
                    f"{network.name}, layer {block.name}: wanted {wanted} features, got "
                    f"{features} from an image {image_shape}; use {network.input_shape}"
                )
        steps.append(_step(block, steps[-1].output, early))
    # The last sums are float32; rounding them would help nobody.
    if isinstance(steps[-1].shape, conv.Conv2dShape | gemm.LinearShape | softmax.SoftmaxShape):
        steps[-1] = replace(steps[-1], dtype=torch.float32)
    names = [step.name for step in steps if step.block]
    if unknown := [name for name in keep if name not in names]:
        raise NetworkError(
            f"{network.name} has no features {', '.join(map(repr, unknown))}; it has "
            f"{', '.join(names)}"
        )
    sliced = 0
    if slicing:
        if options.slice_until not in names:
            raise NetworkError(
                f"{network.name} has no step {options.slice_until!r} to slice until; it has "
                f"{', '.join(names)}"
            )
        sliced = [step.name for step in steps].index(options.slice_until) + 1
        inner = {step.name for step in steps[: sliced - 1]}
        if batch <= options.slice_images or inner & set(keep):
            sliced = 0
    whole = Plan(network, batch, image_shape, arithmetic, arch, tuple(steps), 0, options, sliced)
    return placed(whole, keep)


def part(whole: Plan, start: int, stop: int | None = None, keep: Collection[str] = ()) -> Plan:
    """Some neighbouring steps of a plan as a plan of their own, with their own memory, unsliced."""
    return placed(replace(whole, steps=whole.steps[start:stop], sliced=0), keep)


def reconfigured(whole: Plan, name: str, config: KernelConfig) -> Plan:
    """The same plan with another configuration of one step, as `tune` tries it; none is kept."""
    steps = tuple(
        replace(step, config=config) if step.name == name else step for step in whole.steps
    )
    return placed(replace(whole, steps=steps), ())


def placed(whole: Plan, keep: Collection[str]) -> Plan:
    """Give every output of a plan its place in memory; those in `keep` survive the run."""
    steps, end = whole.steps, len(whole.steps)
    outputs = []
    for i, step in enumerate(steps):
        first, last, size = i, i + 1, step.size
        if i < whole.sliced - 1:
            size = -(-size // whole.batch) * whole.options.slice_images
        elif i == whole.sliced - 1:
            first = 0  # written by every slice
        outputs.append(Buffer(size, first, end if step.name in keep else last))
    parts = [Buffer(4 * step.scratch, i, i) for i, step in enumerate(steps)]
    offsets, workspace = arrange([*outputs, *parts])
    places = zip(steps, offsets[:end], offsets[end:], strict=True)
    there = (replace(step, offset=at, scratch_offset=scratch) for step, at, scratch in places)
    return replace(whole, steps=tuple(there), workspace=workspace)


Config = TypeVar("Config", bound=KernelConfig)


@dataclass(frozen=True, slots=True)
class _Choice:
    """How every step alike is configured."""

    configured_for: int
    arithmetic: Arithmetic
    arch: int | None
    batch_invariant: bool
    tuned: Table | None
    pointers: bool
    affine: bool = False  # whether a scale and a shift end this step

    def conv2d(self, shape: conv.Conv2dShape) -> tuple[conv.Conv2dConfig, bool]:
        """As `measured`; through pointers where a descriptor steps from group to group."""
        default = conv.default_config(replace(shape, N=self.configured_for), *self.how)
        config, tuned = self.measured("conv2d", shape, default)
        if self.pointers and shape.groups > 1:
            config = replace(config, descriptors=False)
        return config, tuned

    def first_layer(
        self, shape: conv.Conv2dShape, pixel: int, op: str = "first_layer"
    ) -> tuple[first_layer.FirstLayerConfig, bool]:
        """As `measured`; through pointers where a descriptor steps against the order of strides."""
        like = replace(shape, N=self.configured_for)
        default = first_layer.default_config(like, pixel, *self.how)
        config, tuned = self.measured(op, shape, default)
        return (replace(config, form="pointers") if self.pointers else config), tuned

    @property
    def how(self) -> tuple[torch.dtype, str, int | None, bool, bool]:
        """What defaults depend on beside the shape."""
        dtype, precision = self.arithmetic.dtype, self.arithmetic.precision
        return dtype, precision, self.arch, self.batch_invariant, self.affine

    def measured(self, op: str, shape: KernelShape, default: Config) -> tuple[Config, bool]:
        """The configuration in the device's table and True, or else the default and False."""
        if self.tuned is None:
            return default, False
        dtype = dtype_name(self.arithmetic.dtype, self.arithmetic.precision)
        config = self.tuned.find(op, shape, dtype, self.configured_for)
        if config is None:
            return default, False
        try:
            return type(default)(**config), True
        except (TypeError, ValueError) as error:
            raise TuningError(
                f"{self.tuned.device}'s table: {op} in {dtype} at {self.configured_for} images is "
                f"configured for another version ({error}); tune it again"
            ) from None


def _conv2d_shape(layer: Conv2d, came: Shape, batch: int) -> conv.Conv2dShape:
    channels, height, width = came
    k, s, p, d = layer.kernel_size, layer.stride, layer.padding, layer.dilation
    return conv.Conv2dShape(
        *(batch, channels, height, width, layer.out_channels, k, k),
        *((s, s), (p, p, p, p), (d, d), layer.groups),
    )


def _first(
    block: Block,
    layer: Conv2d,
    batch: int,
    choice: _Choice,
    image_dtype: torch.dtype,
    in_place: bool,
) -> list[Step]:
    """The first convolution on the images where they lie, or a pass over them and what reads that.

    A pass writes channels-last images, or for a convolution that cannot read these an activation.
    """
    choice = replace(choice, affine=block.affine is not None)
    dtype, shape = choice.arithmetic.dtype, _conv2d_shape(layer, block.came, batch)
    output, work = (shape.OH, shape.OW, shape.N, shape.OC), conv.work(shape, dtype)
    config: KernelConfig
    if in_place and first_layer.fits(shape, shape.C):
        config, tuned = choice.first_layer(shape, shape.C, "in_place")
        if first_layer.whole(shape, config.form):
            step = Step(block.name, block, shape, config, output, dtype, work, tuned)
            return [replace(step, in_place=True)]
    pixel = power_of_two(shape.C, 1, first_layer.LARGEST)
    by_image = first_layer.fits(shape, pixel)
    if by_image:
        config, tuned = choice.first_layer(shape, pixel)
        rows, columns = first_layer.padded(shape, pixel)
    else:
        config, tuned = choice.conv2d(shape)
        rows, columns, pixel = shape.H, shape.W, layout.aligned(shape.C)
    read = channels_last.ChannelsLastShape(batch, shape.C, shape.H, shape.W, rows, columns, pixel)
    default = channels_last.default_config(read, choice.arch)
    blocks, fast = choice.measured("channels_last", read, default)
    first = Step(
        *("input", None, read, blocks, (rows, columns, batch, pixel), dtype),
        *(channels_last.work(read, image_dtype, dtype), fast, by_image),
    )
    return [first, Step(block.name, block, shape, config, output, dtype, work, tuned)]


def _step(block: Block, came: tuple[int, int, int, int], choice: _Choice) -> Step:
    """What a later block becomes on the activation [H, W, N, C] that the step before it made."""
    choice = replace(choice, affine=block.affine is not None)
    height, width, n, channels = came
    dtype, arch = choice.arithmetic.dtype, choice.arch
    shape: KernelShape | GatherShape
    config: KernelConfig | None
    output, tuned = came, False
    match block.layer:
        case Conv2d() as layer:
            shape = _conv2d_shape(layer, block.came, n)
            config, tuned = choice.conv2d(shape)
            output, work = (shape.OH, shape.OW, n, shape.OC), conv.work(shape, dtype)
        case Linear(features):
            shape = gemm.LinearShape(n, height * width, channels, features)
            default = gemm.default_config(replace(shape, N=choice.configured_for), *choice.how)
            config, tuned = choice.measured("linear", shape, default)
            output, work = (1, 1, n, features), gemm.work(shape, dtype)
        case MaxPool2d() | AvgPool2d() | AdaptiveAvgPool2d() as layer:
            _, oh, ow = block.output
            shape = pool.PoolShape(n, channels, height, width, oh, ow)
            if not isinstance(layer, AdaptiveAvgPool2d):
                k, s, p = layer.kernel_size, layer.stride, layer.padding
                shape = replace(shape, kernel=(k, k), stride=(s, s), padding=(p, p))
            op = "max_pool2d" if isinstance(layer, MaxPool2d) else "avg_pool2d"
            config, tuned = choice.measured(op, shape, pool.default_config(shape, arch))
            output, work = (oh, ow, n, channels), pool.work(shape, dtype)
        case LocalResponseNorm() as layer:
            shape = lrn.LRNShape(height * width * n, channels, layer.size, layer.groups)
            config, work = lrn.default_config(shape, arch), lrn.work(shape, dtype)
        case Gather(towers):
            shape, config = GatherShape(height * width * n, channels * towers), None
            output = (height, width, n, shape.C)
            work = Work(0, 2 * shape.M * shape.C * dtype.itemsize)
        case Softmax():
            shape = softmax.SoftmaxShape(height * width * n, channels)
            config, work = softmax.default_config(shape, arch), softmax.work(shape, dtype)
        case _:
            assert_never(block.layer)
    return Step(block.name, block, shape, config, output, dtype, work, tuned)
