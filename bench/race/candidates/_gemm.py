"""A batched GEMM + epilogue in plain Triton: what im2col and Winograd hand their products to.

    y[b, m, n] = act(bias[b, n] + sum over k of a[b, m, k] * w[b, n, k])

a and w lie dense with k innermost, K rounded up to 16 bytes so that the tensor memory accelerator
can step over rows; y may have any strides with n innermost.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ....kernels.epilogue import Activated, finish
from ....kernels.jit import MAX_TILE, Launch, jit, power_of_two


def pitch(k: int) -> int:
    """Elements from row to row of a and w: K rounded up to a multiple of 8."""
    return -(-k // 8) * 8


def pitched(rows: torch.Tensor) -> torch.Tensor:
    """A copy of [B, N, K] with rows `pitch(K)` apart."""
    k = rows.shape[2]
    padded = rows.new_zeros((*rows.shape[:2], pitch(k)))
    padded[..., :k] = rows
    return padded[..., :k]


@jit(do_not_specialize=("M",))
def _gemm_kernel(
    a,  # [B, M, K], rows `pitch(K)` apart, as a descriptor or a pointer
    w,  # [B, N, K], rows `pitch(K)` apart, as a descriptor or a pointer
    bias,  # [B, N] or None
    y,
    M,
    y_batch,  # elements from y[b] to y[b + 1]
    y_row,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
):
    N_BLOCKS: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    PITCH: tl.constexpr = (K + 7) // 8 * 8
    b = tl.program_id(1)
    n0 = (tl.program_id(0) % N_BLOCKS) * BLOCK_N
    m0 = (tl.program_id(0) // N_BLOCKS) * BLOCK_M
    row = m0 + tl.arange(0, BLOCK_M)
    column = n0 + tl.arange(0, BLOCK_N)
    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for k0 in range(0, K, BLOCK_K):
        if DESCRIPTORS:
            left = a.load([b, m0, k0]).reshape(BLOCK_M, BLOCK_K)
            right = w.load([b, n0, k0]).reshape(BLOCK_N, BLOCK_K)
        else:
            k = k0 + tl.arange(0, BLOCK_K)
            a_row = a + (b.to(tl.int64) * M + row)[:, None] * PITCH + k[None, :]
            w_row = w + (b.to(tl.int64) * N + column)[:, None] * PITCH + k[None, :]
            inside = (k < K)[None, :]
            left = tl.load(a_row, mask=(row < M)[:, None] & inside, other=0.0)
            right = tl.load(w_row, mask=(column < N)[:, None] & inside, other=0.0)
        acc = tl.dot(left, right.T, acc, input_precision=PRECISION)
    acc = finish(acc, bias, None, None, b * N + column, column < N, ACTIVATION)
    target = y + b.to(tl.int64) * y_batch + row.to(tl.int64)[:, None] * y_row + column[None, :]
    mask = (row < M)[:, None] & (column < N)[None, :]
    tl.store(target, acc.to(y.dtype.element_ty), mask=mask)


def configs(
    m: int, n: int, k: int, dtype: torch.dtype, precision: str, arch: int | None
) -> list[dict[str, Any]]:
    """Tiles to try for [m, k] x [k, n]; few and large where kernels are interpreted."""
    if arch is None:
        block_n, block_k = power_of_two(n, 16, 512), power_of_two(k, 16, 512)
        block_m = power_of_two(m, 16, MAX_TILE // max(block_n, block_k))
        sizes = [(block_m, block_n, block_k, 4, 1)]
    elif dtype == torch.float32 and precision == "ieee":  # no tensor core computes this
        sizes = [(64, 32, 16, 4, 2), (64, 64, 16, 4, 2)]
    else:
        block_k = 128 // dtype.itemsize  # 128 bytes: one swizzled shared row
        sizes = [
            (64, 64, block_k, 4, 4),
            (128, 64, block_k, 4, 4),
            (128, 128, block_k, 8, 3),
            (128, 256, block_k, 8, 3),
        ]
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
    return [dict(zip(names, size, strict=True)) for size in sizes]


def gemm(
    a: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    config: Mapping[str, Any],
    arch: int | None,
    activation: Activated = None,
    precision: str = "ieee",
) -> Launch:
    """Bind one product; a [B, M, K] and w [B, N, K] as views of rows `pitch(K)` apart."""
    batches, m, k = a.shape
    n, step = w.shape[1], pitch(k)
    descriptors = arch is not None and arch >= 90
    arguments = {
        **{"a": a, "w": w, "bias": bias, "y": y, "y_batch": y.stride(0), "y_row": y.stride(1)},
        **{"M": m, "N": n, "K": k, "DESCRIPTORS": descriptors},
        **{name: config[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")},
        **{"ACTIVATION": activation, "PRECISION": precision},
    }
    if descriptors:
        blocks = {"a": config["BLOCK_M"], "w": config["BLOCK_N"]}
        for name, operand in (("a", a), ("w", w)):
            rows = operand.shape[1]
            arguments[name] = TensorDescriptor(
                operand,
                shape=[batches, rows, k],
                strides=[rows * step, step, 1],
                block_shape=[1, blocks[name], config["BLOCK_K"]],
            )
    grid = (-(-m // config["BLOCK_M"]) * -(-n // config["BLOCK_N"]), batches)
    return Launch(_gemm_kernel, grid, arguments, config["num_warps"], config["num_stages"])
