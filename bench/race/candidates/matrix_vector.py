"""A linear layer on one image as a matrix times a vector: plain FMAs, no tensor core.

y[oc] = act(bias[oc] + sum over k of w[oc, k] * x[k]). A program owns a few outputs and streams
their rows of w once, adding in float32 along k in as many lanes as a block is long; the lanes are
added at the end. With one image every weight is used once, so the time is that of reading w.

Layout: as torch has it. Cost: 2 * OC * features FLOPs; w moves once, x once per program from L2.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl
from torch import Tensor

from ....kernels.epilogue import finish
from ....kernels.jit import MAX_TILE, Launch, jit, power_of_two
from ..candidate import Config, Declined, LinearProblem

OPERATION = "linear"


@jit
def _matrix_vector_kernel(
    x,  # [K]
    w,  # [OC, K]
    bias,  # [OC]
    y,  # [OC]
    OC: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    oc = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = w + oc.to(tl.int64)[:, None] * K
    acc = tl.full((BLOCK_N, BLOCK_K), 0.0, tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        inside = (oc < OC)[:, None] & (k < K)[None, :]
        weights = tl.load(row + k[None, :], mask=inside, other=0.0).to(tl.float32)
        values = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        acc += weights * values[None, :]
    total = tl.reduce(acc, 1, tl.standard._sum_combine)[None, :]
    total = finish(total, bias, None, None, oc, oc < OC, ACTIVATION)
    tl.store(y + oc[None, :], total.to(y.dtype.element_ty), mask=(oc < OC)[None, :])


def configs(problem: LinearProblem) -> list[dict[str, Any]]:
    """Outputs a program owns, and how much of their rows it reads at a time."""
    if problem.N != 1:
        raise Declined(f"wants one image, got {problem.N}")
    if problem.arch is None:
        block_k = power_of_two(problem.features, 16, 1024)
        block_n = power_of_two(problem.OC, 16, MAX_TILE // block_k)
        return [{"BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": 4, "num_stages": 1}]
    sizes = [(1, 1024), (2, 1024), (4, 512), (4, 1024), (8, 512), (16, 256)]
    return [
        {"BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": warps, "num_stages": 3}
        for block_n, block_k in sizes
        for warps in (4, 8)
    ]


def run(
    problem: LinearProblem, x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, config: Config
) -> None:
    """Fill out."""
    arguments = {
        **{"x": x, "w": weight, "bias": bias, "y": out},
        **{"OC": problem.OC, "K": problem.features, "ACTIVATION": problem.activation},
        **{"BLOCK_N": config["BLOCK_N"], "BLOCK_K": config["BLOCK_K"]},
    }
    grid = (-(-problem.OC // config["BLOCK_N"]),)
    warps, stages = config["num_warps"], config["num_stages"]
    Launch(_matrix_vector_kernel, grid, arguments, warps, stages)()
