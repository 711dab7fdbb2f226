"""Random weights that keep activations at their size, the same for the same seed."""

from __future__ import annotations

import math

import torch

from .state import Shapes, State

MAX_SEED = 2**32 - 1  # torch's CPU generator keeps 32 bits of its seed: beyond it, seeds coincide
_BIAS_STD = 0.1  # small beside activations of order one, yet a layer that drops its bias shows


def seeded(expected: Shapes, seed: int) -> State:
    """Normal weights with variance 2 / fan-in, and small normal biases, for every name.

    A normalisation gets scales of both signs and variances from 0.5 to 1.5.

    The scale is that of He et al., "Delving Deep into Rectifiers" (arXiv 1502.01852). The numbers
    depend on `seed` and `expected` alone: the generator is our own.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        kind = name.rpartition(".")[2]
        if kind == "running_var":
            return torch.rand(shape, generator=generator).add_(0.5)
        if kind == "weight":
            fan_in = math.prod(shape[1:])
            std = math.sqrt(2 / fan_in) if len(shape) > 1 else 1.0
        else:
            std = _BIAS_STD
        return torch.randn(shape, generator=generator).mul_(std)

    return {name: draw(name, shape) for name, shape in expected.items()}
