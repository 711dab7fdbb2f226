"""Sums that were cut into parts, added up: the second half of every split-K kernel.

    y[m, oc] = act(bias[oc] + sum over parts of parts[part, m, oc]) * scale[oc] + shift[oc]

A small batch gives a convolution or a linear layer fewer tiles than a GPU has multiprocessors, so
the sum over K is split among programs. Each writes its float32 part; this kernel adds the parts in
a fixed order, so the result does not depend on which was ready first, and ends with the epilogue.

Cost: SPLIT_K - 1 additions an output; the parts are read once, 4 * SPLIT_K bytes an output.
"""

from __future__ import annotations

import torch
import triton.language as tl

from . import layout
from .epilogue import Activated, finish
from .jit import Launch, jit
from .pdl import begin


@jit
def at_least_one(steps):
    """`steps`, which is never less than one, so that the compiler knows it too.

    A loop that might not run leaves its sums zero on a way around it. With Triton 3.6 that can be
    reason enough for ptxas (C7515) to finish every warpgroup product before it starts the next.
    """
    return tl.maximum(steps, 1)


@jit(do_not_specialize=("M", "W", "N", "y_h", "y_w"))
def _sum_parts_kernel(
    parts,  # float32 [SPLIT_K, M, OC aligned]
    bias,  # [OC] or None
    scale,  # float32 [OC] or None
    shift,  # float32 [OC] or None
    y,  # [H, W, N, OC]: M = H * W * N rows
    M,
    W,
    N,
    y_h,  # strides in units of 8 elements
    y_w,
    Y_N: tl.constexpr,  # stride from image to image, in elements
    OC: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (row < M)[:, None] & (channel < OC)[None, :]
    PITCH: tl.constexpr = (OC + 7) // 8 * 8
    offset = row.to(tl.int64)[:, None] * PITCH + channel[None, :]
    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for part in tl.static_range(SPLIT_K):
        step = M.to(tl.int64) * (part * PITCH)
        acc += tl.load(parts + step + offset, mask=inside, other=0.0)
    acc = finish(acc, bias, scale, shift, channel, channel < OC, ACTIVATION)
    pixel = row // N
    start = ((pixel // W).to(tl.int64) * y_h + (pixel % W).to(tl.int64) * y_w) * 8
    start += (row % N).to(tl.int64) * Y_N
    target = y + start[:, None] + channel[None, :]
    tl.store(target, acc.to(y.dtype.element_ty), mask=inside)


def filled(split: int, steps: int) -> int:
    """How many parts of a sum of `steps` have any, if it is cut into `split` of equal length."""
    return -(-steps // -(-steps // split))


def scratch_size(split: int, rows: int, channels: int) -> int:
    """float32 numbers that `split` parts of [rows, channels] take; none if there is one part."""
    return split * rows * layout.aligned(channels) if split > 1 else 0


def parts_of(
    scratch: torch.Tensor | None, split: int, rows: int, channels: int, device: torch.device
) -> torch.Tensor:
    """Room for the parts, an activation [1, split, rows, channels]: in `scratch` or new."""
    if scratch is None:
        return layout.empty(1, split, rows, channels, torch.float32, device)
    size = scratch_size(split, rows, channels)
    pitch = layout.aligned(channels)
    return scratch[:size].view(1, split, rows, pitch)[..., :channels]


def sum_parts(
    parts: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    activation: Activated,
    affine: tuple[torch.Tensor, torch.Tensor] | None,
) -> Launch:
    """Bind the sum of parts [1, SPLIT_K, M, OC] into an activation `out` [H, W, N, OC] of M pixels.

    `out` may be a view that `layout.strides` takes.
    """
    _, split, rows, channels = parts.shape
    y_h, y_w, y_n = layout.strides(out)
    scale, shift = affine or (None, None)
    block_m, block_n = min(16, 1 << (rows - 1).bit_length()), 64
    arguments = {
        "parts": parts,
        "bias": bias,
        "scale": scale,
        "shift": shift,
        "y": out,
        "M": rows,
        "W": out.shape[1],
        "N": out.shape[2],
        "y_h": y_h,
        "y_w": y_w,
        "Y_N": y_n * layout.CHANNEL_ALIGNMENT,
        "OC": channels,
        "SPLIT_K": split,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "ACTIVATION": activation,
        "PDL": False,
    }
    grid = (-(-rows // block_m), -(-channels // block_n))
    return Launch(_sum_parts_kernel, grid, arguments, num_warps=4, num_stages=1)


def reference(parts: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """The sum in float64 without activation: [SPLIT_K, M, OC] to [M, OC]."""
    total = parts.double().sum(0)
    return total if bias is None else total + bias.double()
