"""From a plan to launches: weights packed once, memory allocated once, every step bound to both."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from ..kernels import channels_last, conv, first_layer, gemm, lrn, pool, softmax
from ..kernels.jit import Launch
from ..kernels.pdl import overlapping
from .fuse import Block, fuse
from .plan import Arithmetic, GatherShape, Plan, Step
from .spec import (
    AvgPool2d,
    BatchNorm2d,
    Conv2d,
    Gather,
    Linear,
    LocalResponseNorm,
    MaxPool2d,
    Network,
)

State = Mapping[str, torch.Tensor]
Affine = tuple[torch.Tensor, torch.Tensor]  # scale and shift, float32 [C] each
Launches = tuple[tuple[str, tuple[Launch, ...]], ...]  # by step, in order


@dataclass(frozen=True, slots=True)
class Packed:
    """A network's weights as the kernels read them, on one device in one dtype, by layer name."""

    weight: dict[str, torch.Tensor]
    bias: dict[str, torch.Tensor]
    affine: dict[str, Affine]  # after the activation
    mean: torch.Tensor  # float32 [C], on a scale of 0 to 1
    std: torch.Tensor
    unpacked: dict[str, torch.Tensor]  # the first convolution's [OC, C, KH, KW], packed when bound
    _packed: dict[tuple[object, ...], torch.Tensor] = field(default_factory=dict)

    def first_layer(
        self, name: str, shape: conv.Conv2dShape, pixel: int, columns: int
    ) -> torch.Tensor:
        """The first convolution's weight for `columns` outputs of `pixel` numbers at once."""
        key = (name, shape.stride, shape.padding, pixel, columns)
        if key not in self._packed:
            self._packed[key] = first_layer.pack_weight(self.unpacked[name], shape, pixel, columns)
        return self._packed[key]

    def conv2d(self, name: str) -> torch.Tensor:
        """An ordinary convolution's weight, even the first's."""
        if name not in self.weight:
            self.weight[name] = conv.pack_weight(self.unpacked[name])
        return self.weight[name]


def pack(
    network: Network,
    state: State,
    arithmetic: Arithmetic,
    device: torch.device | str,
    only: Collection[str] | None = None,
) -> Packed:
    """Pack the canonical state of `network`, or the layers in `only` of it."""
    first: dict[str, torch.Tensor] = {}
    weights: dict[str, torch.Tensor] = {}
    biases: dict[str, torch.Tensor] = {}
    affine: dict[str, Affine] = {}
    flattened = network.flattened()
    layers = dict(network.layers)
    blocks = fuse(network)
    for block in blocks:
        name = block.name
        if not isinstance(block.layer, Conv2d | Linear) or (only and name not in only):
            continue
        weight, bias = _folded(block, layers, state)
        weight = weight.to(device, arithmetic.dtype)
        if isinstance(block.layer, Linear):
            _, height, width = flattened.get(f"{name}.weight", (1, 1, 1))
            weights[name] = gemm.pack_weight(weight, height * width)
        elif block is blocks[0]:
            first[name] = weight
        else:
            weights[name] = conv.pack_weight(weight)
        biases[name] = bias.to(device, arithmetic.dtype)
        if block.affine is not None:
            scale, shift = _scale_and_shift(block.affine, layers, state)
            affine[name] = scale.to(device, torch.float32), shift.to(device, torch.float32)
    mean = torch.tensor(network.preprocess.mean, dtype=torch.float32, device=device)
    std = torch.tensor(network.preprocess.std, dtype=torch.float32, device=device)
    return Packed(weights, biases, affine, mean, std, first)


def _folded(
    block: Block, layers: Mapping[str, object], state: State
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of a block, with the BatchNorm before its activation multiplied in."""
    weight, bias = state[f"{block.name}.weight"], state[f"{block.name}.bias"]
    if block.batch_norm is None:
        return weight, bias
    scale, shift = _scale_and_shift(block.batch_norm, layers, state)
    return weight.double() * scale[:, None, None, None], bias.double() * scale + shift


def _scale_and_shift(
    name: str, layers: Mapping[str, object], state: State
) -> tuple[torch.Tensor, torch.Tensor]:
    """A BatchNorm as x * scale + shift, float64 [C] each."""
    layer = layers[name]
    assert isinstance(layer, BatchNorm2d)
    variance = state[f"{name}.running_var"].double()
    scale = state[f"{name}.weight"].double() / (variance + layer.eps).sqrt()
    return scale, state[f"{name}.bias"].double() - state[f"{name}.running_mean"].double() * scale


@dataclass(frozen=True, slots=True)
class Head:
    """The first layers on the images [start, stop) of a batch: all of them, or one slice."""

    start: int
    stop: int
    packed: Packed
    precision: str  # of float32 products
    step: Step  # the first
    out: torch.Tensor
    launches: Launches  # of the steps after the first that run slice by slice

    def first(self, images: torch.Tensor) -> Launch:
        """Bind the first step to all images of the batch [N, C, H, W]."""
        mine = images[self.start : self.stop]
        match self.step.shape, self.step.config:
            case (
                channels_last.ChannelsLastShape() as shape,
                channels_last.ChannelsLastConfig() as config,
            ):
                mean, std, out = self.packed.mean, self.packed.std, self.out.permute(2, 0, 1, 3)
                return channels_last.channels_last(mine, mean, std, out, shape, config)
        x, none = mine.permute(2, 3, 0, 1), self.out.new_empty(0)  # its sums are never split
        (launch,) = _launches(self.step, x, self.out, self.packed, self.precision, none)
        return launch


@dataclass(frozen=True, slots=True)
class Bound:
    """A plan with its memory and its launches.

    `outputs` are the activations [H, W, N, C] by step name; those of unkept steps are overwritten
    by later steps, and those within a slice hold the last slice. The first step reads the caller's
    images, so it is bound anew for each batch.
    """

    plan: Plan
    packed: Packed
    outputs: dict[str, torch.Tensor]
    heads: tuple[Head, ...]  # none for a stage that starts without images
    launches: Launches  # of every step after the heads, in order

    def first(self, images: torch.Tensor) -> Launch:
        """The first step of an unsliced plan, from images [N, C, H, W] of the plan's shape."""
        (head,) = self.heads
        return head.first(images)

    def run(self, images: torch.Tensor | None) -> None:
        """Fill `outputs` from images [N, C, H, W], None for a stage that starts without images."""
        for head in self.heads:
            assert images is not None
            head.first(images)()
            _run(head.launches)
        self.run_after_first()

    def by_step(self, images: torch.Tensor) -> Launches:
        """All that `run` runs on these images; each slice has the steps of its own again."""
        made: list[tuple[str, tuple[Launch, ...]]] = []
        for head in self.heads:
            made += (head.step.name, (head.first(images),)), *head.launches
        return (*made, *self.launches)

    def every_launch(self, images: torch.Tensor) -> Iterator[Launch]:
        """All that `run` runs on these images, in order."""
        yield from _flat(self.by_step(images))

    def run_after_first(self) -> None:
        """The rest of an unsliced plan whose first step has run."""
        _run(self.launches)


def _flat(launches: Launches) -> Iterator[Launch]:
    for _, several in launches:
        yield from several


def _run(launches: Launches) -> None:
    for launch in _flat(launches):
        launch()


def bind(
    plan: Plan,
    packed: Packed,
    source: torch.Tensor | None = None,
    memory: torch.Tensor | None = None,
) -> Bound:
    """Bind every step of a plan to its weights and its memory.

    `source` is the activation that the first step reads, for a later stage, which reads no images.
    `memory` is made by `allocate`; new by default. Plans that never run at once may share it.
    """
    if memory is None:
        memory = allocate(plan, packed.mean.device)
    outputs = {step.name: view(step, memory) for step in plan.steps[plan.sliced :]}
    precision = plan.arithmetic.precision
    heads = []
    if plan.sliced:
        boundary = plan.steps[plan.sliced - 1]
        outputs[boundary.name] = view(boundary, memory)
        for start in range(0, plan.batch, plan.options.slice_images):
            stop = min(start + plan.options.slice_images, plan.batch)
            steps = [sliced(step, stop - start) for step in plan.steps[: plan.sliced]]
            views = {step.name: view(step, memory) for step in steps[:-1]}
            views[boundary.name] = outputs[boundary.name][:, :, start:stop]
            launches = _bind(plan, steps, views, packed, memory, None)
            first = views[steps[0].name]
            heads.append(Head(start, stop, packed, precision, steps[0], first, launches))
            outputs = views | outputs
    elif source is None:
        step = plan.steps[0]
        heads = [Head(0, plan.batch, packed, precision, step, outputs[step.name], ())]
    rest = plan.steps[max(plan.sliced - 1, 0) :]
    return Bound(
        plan, packed, outputs, tuple(heads), _bind(plan, rest, outputs, packed, memory, source)
    )


def _bind(
    plan: Plan,
    steps: Sequence[Step],
    outputs: Mapping[str, torch.Tensor],
    packed: Packed,
    memory: torch.Tensor,
    source: torch.Tensor | None,
) -> Launches:
    """Launches of the steps from views of memory; without a `source`, of those after the first."""
    made = []
    x = source
    for step in steps:
        out = outputs[step.name]
        if x is not None:
            launches = _launches(step, x, out, packed, plan.arithmetic.precision, memory)
            if plan.options.pdl:
                launches = tuple(overlapping(launch) for launch in launches)
            made.append((step.name, launches))
        x = out
    return tuple(made)


def sliced(step: Step, images: int) -> Step:
    """The same step for another number of images, in the same place in memory."""
    height, width, before, channels = step.output
    shape = step.shape
    match shape:
        case lrn.LRNShape() | softmax.SoftmaxShape() | GatherShape():
            shape = replace(shape, M=shape.M // before * images)
        case _:
            shape = replace(shape, N=images)
    return replace(step, shape=shape, output=(height, width, images, channels))


def allocate(plan: Plan, device: torch.device) -> torch.Tensor:
    """Uninitialised memory for a plan: uint8, `plan.workspace` of them."""
    return torch.empty(plan.workspace, dtype=torch.uint8, device=device)


def view(step: Step, memory: torch.Tensor) -> torch.Tensor:
    """A step's output [H, W, N, C] where it lies in its plan's memory."""
    height, width, images, channels = step.output
    flat = memory[step.offset : step.offset + step.size].view(step.dtype)
    if step.by_image:
        return flat.view(images, height, width, channels).permute(1, 2, 0, 3)
    return flat.view(height, width, images, step.pitch)[..., :channels]


def _launches(
    step: Step,
    x: torch.Tensor,
    out: torch.Tensor,
    packed: Packed,
    precision: str,
    memory: torch.Tensor,
) -> tuple[Launch, ...]:
    block = step.block
    assert block is not None
    name, activation, affine = block.name, block.activation, packed.affine.get(block.name)
    scratch = memory[step.scratch_offset :][: 4 * step.scratch].view(torch.float32)
    match block.layer, step.shape, step.config:
        case Conv2d(), conv.Conv2dShape() as shape, first_layer.FirstLayerConfig() as config:
            pixel, bias = x.shape[3], packed.bias[name]
            weight = packed.first_layer(name, shape, pixel, config.columns)
            images = x.permute(2, 0, 1, 3).flatten(2)
            return (
                first_layer.first_layer(
                    images, weight, bias, out, shape, pixel, config, activation, precision, affine
                ),
            )
        case Conv2d(), conv.Conv2dShape() as shape, conv.Conv2dConfig() as config:
            weight, bias = packed.conv2d(name), packed.bias[name]
            return (
                conv.conv2d(
                    x, weight, bias, out, shape, config, activation, precision, affine, scratch
                ),
            )
        case Linear(), gemm.LinearShape(), gemm.LinearConfig() as config:
            weight, bias = packed.weight[name], packed.bias[name]
            return (
                gemm.linear(x, weight, bias, out, config, activation, precision, affine, scratch),
            )
        case MaxPool2d(), pool.PoolShape() as shape, pool.PoolConfig() as config:
            return (pool.max_pool2d(x, out, shape, config),)
        case AvgPool2d() as layer, pool.PoolShape() as shape, pool.PoolConfig() as config:
            return (pool.avg_pool2d(x, out, shape, config, layer.count_include_pad),)
        case _, pool.PoolShape() as shape, pool.PoolConfig() as config:
            return (pool.avg_pool2d(x, out, shape, config),)
        case LocalResponseNorm(_, alpha, beta, k, _), lrn.LRNShape() as shape, lrn.LRNConfig() as c:
            return (lrn.local_response_norm(x, out, shape, c, alpha, beta, k),)
        case Gather(), _, _:
            return ()  # the towers' own runner copies
        case _, softmax.SoftmaxShape() as shape, softmax.SoftmaxConfig() as config:
            return (softmax.softmax(x, out, shape, config),)
    raise AssertionError(f"step {name}: {step.shape} with {step.config}")
