"""The engine's convolution (`kernels/conv.py`) in the words of a candidate, for either tiling."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal

import torch

from ....kernels import conv
from ....kernels.jit import power_of_two
from ..candidate import Config, Conv2dProblem


def shape(problem: Conv2dProblem) -> conv.Conv2dShape:
    """The same problem as the kernel's launcher takes it."""
    p = problem
    pairs = ((p.stride,) * 2, (p.padding,) * 4, (p.dilation,) * 2)
    return conv.Conv2dShape(p.N, p.C, p.H, p.W, p.OC, p.KH, p.KW, *pairs, p.groups)


def configs(problem: Conv2dProblem, tiling: Literal["images", "pixels"]) -> list[dict[str, Any]]:
    """What the engine itself would take, where it takes this tiling, and some neighbours."""
    whole, arch = shape(problem), problem.arch
    oc, c = whole.OC // whole.groups, whole.C // whole.groups
    default = conv.default_config(whole, problem.dtype, problem.precision, arch)
    found = [default] if default.tiling == tiling else []
    if arch is None:
        if tiling == "images":  # all images, filters and channels in one tile
            m, n, k = (power_of_two(size, 16, 1024) for size in (whole.N, oc, c))
            found = [conv.Conv2dConfig("images", m, n, k)]
    elif problem.dtype == torch.float32 and problem.precision == "ieee":  # no tensor core
        found += [conv.Conv2dConfig(tiling, 64, 32, 16, 4, 2, arch >= 90)]
    else:
        block_k = power_of_two(c, 16, 128 // problem.dtype.itemsize)  # 128 bytes: one shared row
        sizes = ((64, 64, 4, 4), (128, 64, 8, 4), (128, 128, 8, 3), (128, 256, 8, 3))
        found += [
            conv.Conv2dConfig(tiling, block_m, block_n, block_k, warps, stages, arch >= 90)
            for block_m, block_n, warps, stages in sizes
            if block_n <= power_of_two(oc, 64, 256)
        ]
    return [asdict(config) for config in dict.fromkeys(found)]


def run(
    problem: Conv2dProblem,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    out: torch.Tensor,
    config: Config,
) -> None:
    """Fill out; x and out are [H, W, N, C] in memory and weight is what `pack_weight` made."""
    for launch in conv.conv2d(
        x.permute(2, 3, 0, 1),
        weight,
        bias,
        out.permute(2, 3, 0, 1),
        shape(problem),
        conv.Conv2dConfig(**config),
        problem.activation,
        problem.precision,
    ):
        launch()
