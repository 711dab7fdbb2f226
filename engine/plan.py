"""From a network to the map of a run: which kernel, which shapes, which tiles, which buffer.

A plan knows shapes, fusion, configurations, work and memory; it knows no tensors. `print(plan)`
shows it. Layers are fused (`fuse.py`), the first convolution becomes a stem and a stride-1
convolution, and an adaptive pool that would change nothing is left out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..kernels import conv, gemm, layout, lrn, pool, softmax, stem
from ..kernels.jit import Work
from .fuse import Block, fuse
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

KernelShape = (
    stem.StemShape
    | conv.Conv2dShape
    | pool.PoolShape
    | gemm.LinearShape
    | lrn.LRNShape
    | softmax.SoftmaxShape
)
KernelConfig = (
    stem.StemConfig
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
class Numbers:
    """What an engine computes in: the dtype of activations and weights, and of float32 products."""

    dtype: torch.dtype
    precision: str = "ieee"


NUMBERS = {
    "fp32": Numbers(torch.float32),
    "tf32": Numbers(torch.float32, "tf32"),
    "fp16": Numbers(torch.float16),
    "bf16": Numbers(torch.bfloat16),
}


@dataclass(frozen=True, slots=True)
class Step:
    """One kernel of the run: it reads the previous step's output and writes `output` [H, W, N, C].

    `name` is that of the block it computes; the stem has one of its own, "input", and no block.
    """

    name: str
    kernel: str
    block: Block | None
    shape: KernelShape | GatherShape
    config: KernelConfig | None  # None for an exchange, which no kernel does
    output: tuple[int, int, int, int]
    work: Work
    slot: int = 0

    @property
    def layers(self) -> tuple[str, ...]:
        """The network's layers that it computes."""
        return self.block.layers if self.block else ()


@dataclass(frozen=True, slots=True)
class Plan:
    """All steps for one batch, and the slots of memory that their outputs share.

    `slots` are sizes in elements. Two neighbours never share a slot; a kept step has its own.
    """

    network: Network
    batch: int
    image_shape: Shape
    numbers: Numbers
    arch: int | None
    steps: tuple[Step, ...]
    slots: tuple[int, ...]

    @property
    def workspace(self) -> int:
        """Bytes of all activations."""
        return sum(self.slots) * self.numbers.dtype.itemsize

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
                "flops": step.work.flops,
                "bytes": step.work.bytes,
                "slot": step.slot,
            }
            for step in self.steps
        ]
        return {
            "network": self.network.name,
            "batch": self.batch,
            "image_shape": list(self.image_shape),
            "arch": self.arch,
            "workspace": self.workspace,
            "steps": steps,
        }

    def __str__(self) -> str:
        where = "Triton's interpreter" if self.arch is None else f"sm_{self.arch}"
        dtype = str(self.numbers.dtype).removeprefix("torch.")
        if self.numbers.precision == "tf32":
            dtype = "tf32"
        size = "x".join(map(str, self.image_shape))
        lines = [
            f"{self.network.name}: {self.batch} images {size}, {dtype}, {where}, "
            f"workspace {self.workspace / 1e6:.1f} MB",
            f"{'step':<8} {'kernel':<15} {'tile':<15} {'output HWNC':<18} {'slot':>4} "
            f"{'MFLOP':>10} {'MB':>9}  fused",
        ]
        for step in self.steps:
            config = step.config
            declared = asdict(config) if config else {}
            blocks = [str(v) for k, v in declared.items() if k.startswith("BLOCK")]
            lines.append(
                f"{step.name:<8} {step.kernel:<15} {'x'.join(blocks):<15} "
                f"{'x'.join(map(str, step.output)):<18} {step.slot:>4} "
                f"{step.work.flops / 1e6:>10.1f} {step.work.bytes / 1e6:>9.2f}  "
                f"{' + '.join(step.layers or ('normalise', 'space-to-depth'))}"
            )
        total = self.work
        lines.append(f"{'total':<62} {total.flops / 1e6:>12.1f} {total.bytes / 1e6:>9.2f}")
        return "\n".join(lines)


def plan(
    network: Network,
    batch: int,
    numbers: Numbers,
    arch: int | None,
    *,
    image_shape: Shape | None = None,
    image_dtype: torch.dtype = torch.uint8,
    configured_for: int | None = None,
    batch_invariant: bool = False,
    keep: Collection[str] = (),
) -> Plan:
    """Plan `network` for `batch` images [C, H, W] on compute capability `arch`, None: interpreter.

    Configurations are chosen for `configured_for` images (default: `batch`), so that the last,
    smaller piece of a long batch computes exactly as the pieces before it. `keep` names the layers
    whose outputs must survive the run. Raises NetworkError if the images do not fit the network.
    """
    image_shape = tuple(image_shape or network.input_shape)
    order = _Order(
        batch, batch if configured_for is None else configured_for, numbers, arch, batch_invariant
    )
    blocks = fuse(network, image_shape)
    first = blocks[0]
    if not isinstance(first.layer, Conv2d):
        raise NetworkError(
            f"{network.name}, layer {first.name}: a network must start with a convolution, got "
            f"{type(first.layer).__name__}"
        )
    expected = network.parameter_shapes()
    steps = list(_stem(first, first.layer, order, image_dtype))
    for block in blocks[1:]:
        if isinstance(block.layer, Linear):
            (wanted, features) = expected[f"{block.name}.weight"], block.came[0]
            if wanted[1] != features:
                raise NetworkError(
                    f"{network.name}, layer {block.name}: wanted {wanted[1]} features, got "
                    f"{features} from an image {image_shape}; use {network.input_shape}"
                )
        steps += _steps(block, steps[-1].output, order)
    names = [step.name for step in steps[1:]]
    if unknown := [name for name in keep if name not in names]:
        raise NetworkError(
            f"{network.name} has no features {', '.join(map(repr, unknown))}; it has "
            f"{', '.join(names)}"
        )
    placed, slots = place(steps, keep)
    return Plan(network, batch, image_shape, numbers, arch, placed, slots)


@dataclass(frozen=True, slots=True)
class _Order:
    """What is wanted of every step alike."""

    batch: int
    configured_for: int
    numbers: Numbers
    arch: int | None
    batch_invariant: bool

    def conv2d_config(self, shape: conv.Conv2dShape) -> conv.Conv2dConfig:
        sample = replace(shape, N=self.configured_for)
        dtype, precision = self.numbers.dtype, self.numbers.precision
        return conv.default_config(sample, dtype, precision, self.arch, self.batch_invariant)

    def linear_config(self, shape: gemm.LinearShape) -> gemm.LinearConfig:
        sample = replace(shape, N=self.configured_for)
        dtype, precision = self.numbers.dtype, self.numbers.precision
        return gemm.default_config(sample, dtype, precision, self.arch, self.batch_invariant)


def _conv2d_shape(layer: Conv2d, came: Shape, batch: int) -> conv.Conv2dShape:
    channels, height, width = came
    k, s, p, d = layer.kernel_size, layer.stride, layer.padding, layer.dilation
    return conv.Conv2dShape(
        *(batch, channels, height, width, layer.out_channels, k, k),
        *((s, s), (p, p, p, p), (d, d), layer.groups),
    )


def _stem(
    block: Block, layer: Conv2d, order: _Order, image_dtype: torch.dtype
) -> tuple[Step, Step]:
    """The first convolution: pixels normalised and folded, then convolved at stride 1."""
    dtype, n = order.numbers.dtype, order.batch
    whole = _conv2d_shape(layer, block.came, n)
    fold, shape = stem.fold(whole)
    channels = fold.S * fold.S * fold.C
    config = stem.default_config(fold, order.arch)
    work = stem.work(fold, image_dtype, dtype)
    way_in = Step("input", "stem", None, fold, config, (fold.OH, fold.OW, n, channels), work)
    tiles = order.conv2d_config(shape)
    return way_in, Step(
        name=block.name,
        kernel=f"conv2d {tiles.tiling}",
        block=block,
        shape=shape,
        config=tiles,
        output=(shape.OH, shape.OW, n, shape.OC),
        work=conv.work(whole, dtype),  # folding adds zero taps, not work
    )


def _steps(block: Block, came: tuple[int, int, int, int], order: _Order) -> Iterator[Step]:
    """What a later block becomes on the activation [H, W, N, C] that the step before it made."""
    height, width, n, channels = came
    dtype, arch = order.numbers.dtype, order.arch
    match block.layer:
        case Conv2d() as layer:
            shape = _conv2d_shape(layer, block.came, n)
            tiles = order.conv2d_config(shape)
            output = (shape.OH, shape.OW, n, shape.OC)
            work = conv.work(shape, dtype)
            yield Step(block.name, f"conv2d {tiles.tiling}", block, shape, tiles, output, work)
        case Linear(features):
            product = gemm.LinearShape(n, height * width, channels, features)
            cut = order.linear_config(product)
            kernel = "linear" if cut.SPLIT_K == 1 else f"linear /{cut.SPLIT_K}"
            work = gemm.work(product, dtype)
            yield Step(block.name, kernel, block, product, cut, (1, 1, n, features), work)
        case MaxPool2d() | AvgPool2d() | AdaptiveAvgPool2d() as layer:
            if block.came == block.output and isinstance(layer, AdaptiveAvgPool2d):
                return  # every window is one pixel
            _, oh, ow = block.output
            window = pool.PoolShape(n, channels, height, width, oh, ow)
            if not isinstance(layer, AdaptiveAvgPool2d):
                k, s, p = layer.kernel_size, layer.stride, layer.padding
                window = replace(window, kernel=(k, k), stride=(s, s), padding=(p, p))
            kernel = "max_pool2d" if isinstance(layer, MaxPool2d) else "avg_pool2d"
            size = pool.default_config(window, arch)
            work = pool.work(window, dtype)
            yield Step(block.name, kernel, block, window, size, (oh, ow, n, channels), work)
        case LocalResponseNorm() as layer:
            norm = lrn.LRNShape(height * width * n, channels, layer.size, layer.groups)
            rows = lrn.default_config(norm, arch)
            yield Step(block.name, "lrn", block, norm, rows, came, lrn.work(norm, dtype))
        case Gather(towers):
            moved = GatherShape(height * width * n, channels * towers)
            work = Work(0, 2 * moved.M * moved.C * dtype.itemsize)
            output = (height, width, n, moved.C)
            yield Step(block.name, "exchange", block, moved, None, output, work)
        case Softmax():
            scores = softmax.SoftmaxShape(height * width * n, channels)
            whole = softmax.default_config(scores, arch)
            work = softmax.work(scores, dtype)
            yield Step(block.name, "softmax", block, scores, whole, came, work)


def place(steps: Sequence[Step], keep: Collection[str]) -> tuple[tuple[Step, ...], tuple[int, ...]]:
    """Give every step's output a slot: two that alternate, and one for each kept output."""
    slots = [0, 0]
    placed = []
    shared = 0  # the alternating slot that the next unkept step writes
    for step in steps:
        height, width, images, channels = step.output
        size = height * width * images * layout.aligned(channels)
        if step.name in keep:
            slots.append(size)
            slot = len(slots) - 1
        else:
            slot, shared = shared, 1 - shared
            slots[slot] = max(slots[slot], size)
        placed.append(replace(step, slot=slot))
    return tuple(placed), tuple(slots)
