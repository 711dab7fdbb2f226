"""Explicit im2col: write the matrix of all windows, then one GEMM.

Row (n, oh, ow) of the matrix holds the C*KH*KW inputs that this output pixel sees, so
y[row, oc] = act(bias[oc] + sum over k of matrix[row, k] * w[oc, k]). AlexNet's conv1 makes
3025 rows of 363 numbers of each image, which is 7.3 times its pixels.

Layout: x and y channels last. k runs over (kh, kw, c), so a row is KH*KW runs of C neighbours; rows
are padded to 16 bytes. Each group of filters has its own matrix. Cost: the FLOPs of the
convolution, padding included, and beyond x, w and y the matrix is written once and read once.

Source: K. Chellapilla, S. Puri, P. Simard, "High Performance Convolutional Neural Networks for
Document Processing" (2006).
"""

from __future__ import annotations

from typing import Any

import triton.language as tl
from torch import Tensor

from ....kernels.jit import MAX_TILE, Launch, jit, power_of_two
from ..candidate import Config, Conv2dProblem
from ._gemm import configs as gemm_configs
from ._gemm import gemm, pitch, pitched

OPERATION = "conv2d"


@jit
def _im2col_kernel(
    x,  # [N, H, W, GROUPS*C]
    matrix,  # [GROUPS, N*OH*OW, KH*KW*C], rows PITCH apart
    N,
    H,
    W,
    OH,
    OW,
    stride,
    pad,
    dilation,
    GROUPS: tl.constexpr,
    C: tl.constexpr,  # channels per group
    KH: tl.constexpr,
    KW: tl.constexpr,
    PITCH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    group = tl.program_id(2)
    rows = N * OH * OW
    ih = (row // OW % OH * stride - pad)[:, None] + (k // C // KW * dilation)[None, :]
    iw = (row % OW * stride - pad)[:, None] + (k // C % KW * dilation)[None, :]
    wanted = (row < rows)[:, None] & (k < KH * KW * C)[None, :]
    inside = wanted & (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W)
    pixel = ((row // (OH * OW)).to(tl.int64)[:, None] * H + ih) * W + iw
    channel = group * C + k % C
    value = tl.load(x + pixel * (GROUPS * C) + channel[None, :], mask=inside, other=0.0)
    target = (group.to(tl.int64) * rows + row)[:, None] * PITCH + k[None, :]
    tl.store(matrix + target, value, mask=wanted)


def configs(problem: Conv2dProblem) -> list[dict[str, Any]]:
    """Tiles of the GEMM to try."""
    p = problem
    size = (p.N * p.OH * p.OW, p.OC // p.groups, p.C // p.groups * p.KH * p.KW)
    return gemm_configs(*size, p.dtype, p.precision, p.arch)


def prepare(problem: Conv2dProblem, weight: Tensor, config: Config) -> Tensor:
    """The filters as [groups, OC/groups, KH*KW*C/groups], rows padded."""
    rows = weight.permute(0, 2, 3, 1)
    return pitched(rows.reshape(problem.groups, problem.OC // problem.groups, -1))


def run(
    problem: Conv2dProblem, x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, config: Config
) -> None:
    """Fill out."""
    p = problem
    rows, columns = p.N * p.OH * p.OW, weight.shape[2]
    matrix = x.new_empty((p.groups, rows, pitch(columns)))[..., :columns]
    unfold(problem, x, matrix)()
    # out is [N*OH*OW, groups, OC/groups] in memory.
    y = out.permute(0, 2, 3, 1).reshape(rows, p.groups, -1).transpose(0, 1)
    gemm(matrix, weight, bias, y, config, p.arch, p.activation, p.precision)()


def unfold(problem: Conv2dProblem, x: Tensor, matrix: Tensor) -> Launch:
    """Bind the kernel that writes the matrix [groups, rows, columns]."""
    p = problem
    _, rows, columns = matrix.shape
    block_k = power_of_two(columns, 16, 512 if p.arch is None else 64)
    block_r = power_of_two(rows, 16, MAX_TILE // block_k if p.arch is None else 64)
    arguments = {
        **{"x": x, "matrix": matrix, "N": p.N, "H": p.H, "W": p.W, "OH": p.OH, "OW": p.OW},
        **{"stride": p.stride, "pad": p.padding, "dilation": p.dilation},
        **{"GROUPS": p.groups, "C": p.C // p.groups, "KH": p.KH, "KW": p.KW},
        **{"PITCH": pitch(columns), "BLOCK_R": block_r, "BLOCK_K": block_k},
    }
    grid = (-(-rows // block_r), -(-columns // block_k), p.groups)
    return Launch(_im2col_kernel, grid, arguments, num_warps=4, num_stages=1)
