"""From a plan to launches: weights packed once, memory allocated once, every step bound to both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..kernels import conv, layout, linear, pool, stem
from ..kernels.jit import Launch
from .plan import Numbers, Plan, Step
from .spec import Conv2d, Flatten, Linear, Network


@dataclass(frozen=True, slots=True)
class Packed:
    """A network's weights as the kernels read them, on one device in one dtype, by layer name."""

    weight: dict[str, torch.Tensor]
    bias: dict[str, torch.Tensor]
    mean: torch.Tensor  # float32 [C], on a scale of 0 to 1
    std: torch.Tensor


def pack(
    network: Network,
    state: Mapping[str, torch.Tensor],
    numbers: Numbers,
    device: torch.device | str,
) -> Packed:
    """Pack the canonical state of `network`; the first convolution is folded for the stem."""
    weights: dict[str, torch.Tensor] = {}
    biases: dict[str, torch.Tensor] = {}
    pixels = 1  # of the activation that the next linear layer reads
    for name, layer, came, _ in network.walk():
        if isinstance(layer, Flatten):
            pixels = came[1] * came[2]
        if not isinstance(layer, Conv2d | Linear):
            continue
        weight = state[f"{name}.weight"].to(device, numbers.dtype)
        if isinstance(layer, Linear):
            weights[name] = linear.pack_weight(weight, pixels)
            pixels = 1
        elif weights:
            weights[name] = conv.pack_weight(weight)
        else:
            weights[name] = conv.pack_weight(stem.pack_weight(weight, layer.stride))
        biases[name] = state[f"{name}.bias"].to(device, numbers.dtype)
    mean = torch.tensor(network.preprocess.mean, dtype=torch.float32, device=device)
    std = torch.tensor(network.preprocess.std, dtype=torch.float32, device=device)
    return Packed(weights, biases, mean, std)


@dataclass(frozen=True, slots=True)
class Bound:
    """A plan with its memory and its launches.

    `outputs` are the activations [H, W, N, C] by step name; those of unkept steps are overwritten
    by later steps. The stem reads the caller's images, so it is bound anew for each batch.
    """

    plan: Plan
    packed: Packed
    outputs: dict[str, torch.Tensor]
    launches: tuple[tuple[str, Launch], ...]  # of every step but the stem, in order, by step name

    def stem(self, images: torch.Tensor) -> Launch:
        """The first step, from images [N, C, H, W] of the plan's shape."""
        step = self.plan.steps[0]
        assert isinstance(step.shape, stem.StemShape)
        assert isinstance(step.config, stem.StemConfig)
        out = self.outputs[step.name]
        return stem.stem(images, self.packed.mean, self.packed.std, out, step.shape, step.config)

    def run(self, images: torch.Tensor) -> None:
        """Fill `outputs` from images [N, C, H, W]."""
        self.stem(images)()
        for _, launch in self.launches:
            launch()


def bind(plan: Plan, packed: Packed) -> Bound:
    """Allocate the plan's slots where the weights are and bind every step to them."""
    dtype, device = plan.numbers.dtype, packed.mean.device
    slots = [torch.empty(size, dtype=dtype, device=device) for size in plan.slots]
    outputs: dict[str, torch.Tensor] = {}
    launches: list[tuple[str, Launch]] = []
    x: torch.Tensor | None = None
    for step in plan.steps:
        height, width, images, channels = step.output
        shape = (height, width, images, layout.aligned(channels))
        size = height * width * images * shape[3]
        out = slots[step.slot][:size].view(shape)[..., :channels]
        if x is not None:
            made = _launches(step, x, out, packed, plan.numbers.precision)
            launches += [(step.name, launch) for launch in made]
        outputs[step.name] = x = out
    return Bound(plan, packed, outputs, tuple(launches))


def _launches(
    step: Step, x: torch.Tensor, out: torch.Tensor, packed: Packed, precision: str
) -> tuple[Launch, ...]:
    match step.shape, step.config:
        case conv.Conv2dShape() as shape, conv.Conv2dConfig() as config:
            weight, bias = packed.weight[step.name], packed.bias[step.name]
            return (conv.conv2d(x, weight, bias, out, shape, config, step.activation, precision),)
        case linear.LinearShape(), linear.LinearConfig() as config:
            weight, bias = packed.weight[step.name], packed.bias[step.name]
            return linear.linear(x, weight, bias, out, config, step.activation, precision)
        case pool.PoolShape() as shape, pool.PoolConfig() as config if shape.adaptive:
            return (pool.avg_pool2d(x, out, shape, config),)
        case pool.PoolShape() as shape, pool.PoolConfig() as config:
            return (pool.max_pool2d(x, out, shape, config),)
    raise AssertionError(f"step {step.name}: {step.shape} with {step.config}")
