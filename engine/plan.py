"""From a network to the map of a run: which kernel, which shapes, which tiles, which buffer.

A plan knows shapes, fusion, configurations, work and memory; it knows no tensors. `print(plan)`
shows it. ReLU is fused into the layer before it, dropout and flatten vanish, the first convolution
becomes a stem and a stride-1 convolution, and an adaptive pool that would change nothing is left
out.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, replace

import torch

from ..kernels import conv, layout, linear, pool, stem
from ..kernels.jit import Work
from .spec import (
    AdaptiveAvgPool2d,
    Conv2d,
    Dropout,
    Flatten,
    Linear,
    MaxPool2d,
    Network,
    NetworkError,
    ReLU,
)

KernelShape = stem.StemShape | conv.Conv2dShape | pool.PoolShape | linear.LinearShape
KernelConfig = stem.StemConfig | conv.Conv2dConfig | pool.PoolConfig | linear.LinearConfig


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

    `name` is that of the layer it computes (the stem: "input"), `layers` all layers fused into it.
    """

    name: str
    layers: tuple[str, ...]
    shape: KernelShape
    config: KernelConfig
    activation: str | None
    output: tuple[int, int, int, int]
    slot: int
    work: Work

    @property
    def kernel(self) -> str:
        """What runs, in words."""
        match self.shape:
            case stem.StemShape():
                return "stem"
            case conv.Conv2dShape():
                assert isinstance(self.config, conv.Conv2dConfig)
                return f"conv2d {self.config.tiling}"
            case pool.PoolShape():
                return "avg_pool2d" if self.shape.adaptive else "max_pool2d"
            case linear.LinearShape():
                assert isinstance(self.config, linear.LinearConfig)
                return "linear" if self.config.SPLIT_K == 1 else f"linear /{self.config.SPLIT_K}"


@dataclass(frozen=True, slots=True)
class Plan:
    """All steps for one batch, and the slots of memory that their outputs share.

    `slots` are sizes in elements. Two neighbours never share a slot; a kept step has its own.
    """

    network: Network
    batch: int
    image_shape: tuple[int, int, int]
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
            blocks = [str(v) for k, v in asdict(config).items() if k.startswith("BLOCK")]
            lines.append(
                f"{step.name:<8} {step.kernel:<15} {'x'.join(blocks):<15} "
                f"{'x'.join(map(str, step.output)):<18} {step.slot:>4} "
                f"{step.work.flops / 1e6:>10.1f} {step.work.bytes / 1e6:>9.2f}  "
                f"{' + '.join(step.layers)}"
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
    image_shape: tuple[int, int, int] | None = None,
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
    image_shape = image_shape or (network.input_shape[0], *network.input_shape[1:])
    steps = _Steps(batch, configured_for or batch, numbers, arch, batch_invariant, image_dtype)
    walk = list(network.walk(image_shape))
    if not isinstance(walk[0][1], Conv2d):
        raise NetworkError(
            f"{network.name}, layer {walk[0][0]}: a network must start with a convolution, got "
            f"{type(walk[0][1]).__name__}"
        )
    expected = network.parameter_shapes()
    for index, (name, layer, came, output) in enumerate(walk):
        follows = walk[index + 1] if index + 1 < len(walk) else None
        fused = follows[0] if follows and isinstance(follows[1], ReLU) else None
        match layer:
            case Conv2d():
                steps.conv2d(name, fused, layer, came)
            case MaxPool2d():
                steps.max_pool2d(name, layer, came, output)
            case AdaptiveAvgPool2d():
                if came != output:
                    steps.adaptive_avg_pool2d(name, came, output)
            case Linear():
                wanted = expected[f"{name}.weight"]
                if wanted[1] != came[0]:
                    raise NetworkError(
                        f"{network.name}, layer {name}: wanted {wanted[1]} features, got {came[0]} "
                        f"from an image {image_shape}; use {network.input_shape}"
                    )
                steps.linear(name, fused, layer)
            case ReLU():
                if not steps.made or name not in steps.made[-1].layers:
                    raise NetworkError(
                        f"{network.name}, layer {name}: a ReLU must follow a convolution or a "
                        "linear layer, to be fused into it"
                    )
            case Dropout() | Flatten():
                pass
    names = {step.name for step in steps.made}
    if unknown := [name for name in keep if name not in names]:
        raise NetworkError(
            f"{network.name} has no features {', '.join(map(repr, unknown))}; it has "
            f"{', '.join(step.name for step in steps.made[1:])}"
        )
    placed, slots = _place(steps.made, set(keep))
    return Plan(network, batch, image_shape, numbers, arch, placed, slots)


class _Steps:
    """Collects steps while a network is walked; each method appends what one layer becomes."""

    def __init__(
        self,
        batch: int,
        configured_for: int,
        numbers: Numbers,
        arch: int | None,
        batch_invariant: bool,
        image_dtype: torch.dtype,
    ) -> None:
        self.made: list[Step] = []
        self._batch = batch
        self._configured_for = configured_for
        self._numbers = numbers
        self._arch = arch
        self._invariant = batch_invariant
        self._image_dtype = image_dtype

    def _add(
        self,
        name: str,
        layers: tuple[str, ...],
        shape: KernelShape,
        config: KernelConfig,
        activation: str | None,
        output: tuple[int, int, int],
        work: Work,
    ) -> None:
        height, width, channels = output
        full = (height, width, self._batch, channels)
        self.made.append(Step(name, layers, shape, config, activation, full, 0, work))

    def conv2d(self, name: str, relu: str | None, layer: Conv2d, came: tuple[int, ...]) -> None:
        channels, height, width = came
        k, p = layer.kernel_size, layer.padding

        def problem(n: int) -> conv.Conv2dShape:
            return conv.Conv2dShape(
                *(n, channels, height, width, layer.out_channels, k, k),
                stride=(layer.stride, layer.stride),
                padding=(p, p, p, p),
                dilation=(layer.dilation, layer.dilation),
                groups=layer.groups,
            )

        dtype, precision = self._numbers.dtype, self._numbers.precision
        shape, sample = problem(self._batch), problem(self._configured_for)
        work = conv.work(shape, dtype)
        if not self.made:
            folded, shape = stem.fold(shape)
            self._add(
                "input",
                ("normalise", f"space-to-depth {folded.S}"),
                folded,
                stem.default_config(folded, self._arch),
                None,
                (folded.OH, folded.OW, folded.S * folded.S * folded.C),
                stem.work(folded, self._image_dtype, dtype),
            )
            _, sample = stem.fold(sample)
        config = conv.default_config(sample, dtype, precision, self._arch, self._invariant)
        layers = (name, relu) if relu else (name,)
        output = (shape.OH, shape.OW, shape.OC)
        self._add(name, layers, shape, config, "relu" if relu else None, output, work)

    def max_pool2d(
        self, name: str, layer: MaxPool2d, came: tuple[int, ...], output: tuple[int, ...]
    ) -> None:
        k, s, p = layer.kernel_size, layer.stride, layer.padding
        shape = pool.PoolShape(self._batch, *came, *output[1:], (k, k), (s, s), (p, p))
        self._pool(name, shape)

    def adaptive_avg_pool2d(
        self, name: str, came: tuple[int, ...], output: tuple[int, ...]
    ) -> None:
        self._pool(name, pool.PoolShape(self._batch, *came, *output[1:]))

    def _pool(self, name: str, shape: pool.PoolShape) -> None:
        config = pool.default_config(shape, self._arch)
        work = pool.work(shape, self._numbers.dtype)
        self._add(name, (name,), shape, config, None, (shape.OH, shape.OW, shape.C), work)

    def linear(self, name: str, relu: str | None, layer: Linear) -> None:
        height, width, _, channels = self.made[-1].output
        dtype, precision = self._numbers.dtype, self._numbers.precision
        shape = linear.LinearShape(self._batch, height * width, channels, layer.out_features)
        sample = linear.LinearShape(self._configured_for, shape.P, shape.C, shape.OC)
        config = linear.default_config(sample, dtype, precision, self._arch, self._invariant)
        self._add(
            name,
            (name, relu) if relu else (name,),
            shape,
            config,
            "relu" if relu else None,
            (1, 1, layer.out_features),
            linear.work(shape, dtype),
        )


def _place(steps: list[Step], keep: set[str]) -> tuple[tuple[Step, ...], tuple[int, ...]]:
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
