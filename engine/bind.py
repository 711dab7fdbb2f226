"""From a plan to launches: weights packed once, memory allocated once, every step bound to both."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..kernels import conv, gemm, layout, lrn, pool, softmax, stem
from ..kernels.jit import Launch
from .fuse import Block, fuse
from .plan import Numbers, Plan, Step
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


@dataclass(frozen=True, slots=True)
class Packed:
    """A network's weights as the kernels read them, on one device in one dtype, by layer name."""

    weight: dict[str, torch.Tensor]
    bias: dict[str, torch.Tensor]
    affine: dict[str, tuple[torch.Tensor, torch.Tensor]]  # scale and shift after the activation
    mean: torch.Tensor  # float32 [C], on a scale of 0 to 1
    std: torch.Tensor


def pack(
    network: Network,
    state: State,
    numbers: Numbers,
    device: torch.device | str,
    only: Collection[str] | None = None,
) -> Packed:
    """Pack the canonical state of `network`, or the layers in `only` of it.

    The first convolution is folded for the stem.
    """
    weights: dict[str, torch.Tensor] = {}
    biases: dict[str, torch.Tensor] = {}
    affine: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    flattened = network.flattened()
    layers = dict(network.layers)
    blocks = fuse(network)
    for block in blocks:
        name = block.name
        if not isinstance(block.layer, Conv2d | Linear) or (only and name not in only):
            continue
        weight, bias = _folded(block, layers, state)
        weight = weight.to(device, numbers.dtype)
        if isinstance(block.layer, Linear):
            _, height, width = flattened.get(f"{name}.weight", (1, 1, 1))
            weights[name] = gemm.pack_weight(weight, height * width)
        elif block is blocks[0] and block.layer.dilation == block.layer.groups == 1:
            weights[name] = conv.pack_weight(stem.pack_weight(weight, block.layer.stride))
        else:
            weights[name] = conv.pack_weight(weight)
        biases[name] = bias.to(device, numbers.dtype)
        if block.affine is not None:
            scale, shift = _scale_and_shift(block.affine, layers, state)
            affine[name] = scale.to(device, torch.float32), shift.to(device, torch.float32)
    mean = torch.tensor(network.preprocess.mean, dtype=torch.float32, device=device)
    std = torch.tensor(network.preprocess.std, dtype=torch.float32, device=device)
    return Packed(weights, biases, affine, mean, std)


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
class Bound:
    """A plan with its memory and its launches.

    `outputs` are the activations [H, W, N, C] by step name; those of unkept steps are overwritten
    by later steps. The stem reads the caller's images, so it is bound anew for each batch.
    """

    plan: Plan
    packed: Packed
    outputs: dict[str, torch.Tensor]
    launches: tuple[tuple[str, tuple[Launch, ...]], ...]  # of every step but the stem, in order

    def stem(self, images: torch.Tensor) -> Launch:
        """The first step, from images [N, C, H, W] of the plan's shape."""
        step = self.plan.steps[0]
        assert isinstance(step.shape, stem.StemShape)
        assert isinstance(step.config, stem.StemConfig)
        out = self.outputs[step.name]
        return stem.stem(images, self.packed.mean, self.packed.std, out, step.shape, step.config)

    def run(self, images: torch.Tensor | None) -> None:
        """Fill `outputs` from images [N, C, H, W], None for a stage that starts without a stem."""
        if images is not None:
            self.stem(images)()
        for _, launches in self.launches:
            for launch in launches:
                launch()


def bind(
    plan: Plan,
    packed: Packed,
    source: torch.Tensor | None = None,
    slots: Sequence[torch.Tensor] | None = None,
) -> Bound:
    """Bind every step of a plan to its weights and its memory.

    `source` is the activation that the first step reads, for a later stage, which has no stem.
    `slots` is the memory, made by `allocate`; new by default. Plans that never run at once may
    share it.
    """
    slots = slots or allocate(plan, packed.mean.device)
    outputs: dict[str, torch.Tensor] = {}
    launches: list[tuple[str, tuple[Launch, ...]]] = []
    x = source
    for step in plan.steps:
        height, width, images, channels = step.output
        shape = (height, width, images, layout.aligned(channels))
        size = height * width * images * shape[3]
        out = slots[step.slot][:size].view(shape)[..., :channels]
        if x is not None:
            made = _launches(step, x, out, packed, plan.numbers.precision)
            launches.append((step.name, made))
        outputs[step.name] = x = out
    return Bound(plan, packed, outputs, tuple(launches))


def allocate(plan: Plan, device: torch.device) -> list[torch.Tensor]:
    """Uninitialised memory for a plan's slots."""
    return [torch.empty(size, dtype=plan.numbers.dtype, device=device) for size in plan.slots]


def _launches(
    step: Step, x: torch.Tensor, out: torch.Tensor, packed: Packed, precision: str
) -> tuple[Launch, ...]:
    block = step.block
    assert block is not None
    name, activation, affine = block.name, block.activation, packed.affine.get(block.name)
    match block.layer, step.shape, step.config:
        case Conv2d(), conv.Conv2dShape() as shape, conv.Conv2dConfig() as config:
            weight, bias = packed.weight[name], packed.bias[name]
            return conv.conv2d(x, weight, bias, out, shape, config, activation, precision, affine)
        case Linear(), gemm.LinearShape(), gemm.LinearConfig() as config:
            weight, bias = packed.weight[name], packed.bias[name]
            return gemm.linear(x, weight, bias, out, config, activation, precision, affine)
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
