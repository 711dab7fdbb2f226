"""Implicit GEMM whose tile rows are images at ONE output pixel.

y[pixel, n, oc] = sum over taps inside the image, then channels, of x[pixel + tap, n, c] *
w[oc, tap, c]. The rows of a tile share their pixel, so a tap is one contiguous box of x (TMA on
Hopper) and a tap outside the image is skipped, not multiplied by zero: 9 to 10 % of the FLOPs of
AlexNet's conv2 to conv5. It wants many images: 64 and up fill a tile.

Layout: x and y as the engine's activations, [H, W, N, C]. Cost: 2 * N*OH*OW * OC * C*KH*KW FLOPs
less the skipped taps, and x, w and y through memory about once each. This is the engine's own
kernel for large batches, without its folding of the first layer.

Source: images innermost as in A. Krizhevsky's cuda-convnet (2012).
"""

from __future__ import annotations

from typing import Any

import torch

from ....kernels import conv
from ..candidate import Config, Conv2dProblem, Refused
from . import _implicit_gemm

OPERATION = "conv2d"
LAYOUT = "HWNC"

MOST_INTERPRETED = 1_000  # taps of all pixels, at a few milliseconds each


def configs(problem: Conv2dProblem) -> list[dict[str, Any]]:
    """Tiles to try."""
    taps = problem.OH * problem.OW * problem.KH * problem.KW
    if problem.arch is None and taps > MOST_INTERPRETED:
        raise Refused(f"{taps:,} taps one by one take the interpreter minutes; race it on a GPU")
    whole = _implicit_gemm.shape(problem)
    if not conv.images_tiling_fits(whole, problem.dtype):
        raise Refused(f"{problem.C // problem.groups} channels a group are no multiple of 16 bytes")
    return _implicit_gemm.configs(problem, "images")


def prepare(problem: Conv2dProblem, weight: torch.Tensor, config: Config) -> torch.Tensor:
    """The filters by tap: [KH*KW, OC, C]."""
    return conv.pack_weight(weight)


run = _implicit_gemm.run
