"""A linear layer as a matrix times a matrix, on tensor cores, however few the images are.

y[n, oc] = act(bias[oc] + sum over k of x[n, k] * w[oc, k]). A matrix instruction has at least 64
rows on one side and 8 on the other, so with one image the filters take the long side (`transposed`)
and most of the short one is padding: the arithmetic is free, since w must be read anyway. The sum
over k is cut into SPLIT_K parts, so that enough programs read at once; the last to arrive adds
them in a fixed order. This is the engine's own kernel (`kernels/gemm.py`).

Layout: x as torch has it, w padded to 16 bytes a row. Cost: 2 * N * OC * features FLOPs; x, w and y
move once.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from ....kernels import gemm, layout
from ..candidate import Config, LinearProblem, Refused

OPERATION = "linear"


def configs(problem: LinearProblem) -> list[dict[str, Any]]:
    """What the engine itself would take, and on tensor cores other ways to split the sum."""
    p = problem
    if p.features % layout.CHANNEL_ALIGNMENT:
        raise Refused(f"{p.features} features are no multiple of {layout.CHANNEL_ALIGNMENT}")
    shape = gemm.LinearShape(p.N, 1, p.features, p.OC)
    default = gemm.default_config(shape, p.dtype, p.precision, p.arch)
    if p.arch is None or (p.dtype == torch.float32 and p.precision == "ieee") or p.N > 64:
        return [asdict(default)]
    splits = sorted({default.SPLIT_K, 1, 2, 4, 8})
    return [asdict(replace(default, SPLIT_K=split)) for split in splits]


def prepare(problem: LinearProblem, weight: Tensor, config: Config) -> Tensor:
    """The weights as [1, OC, features], rows padded."""
    return gemm.pack_weight(weight)


def run(
    problem: LinearProblem, x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, config: Config
) -> Tensor:
    """The answer, [N, OC]."""
    y = layout.empty(1, 1, problem.N, problem.OC, x.dtype, x.device)
    tiles = gemm.LinearConfig(**config)
    gemm.linear(x[None, None], weight, bias, y, tiles, problem.activation, problem.precision)()
    return y[0, 0]
