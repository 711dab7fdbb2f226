"""Implicit GEMM whose tile rows run over (output row, output column, image).

y[row, oc] = sum over taps, then channels, of x[pixel(row, tap), c] * w[oc, tap, c]: one GEMM of
N*OH*OW rows, whose left operand is gathered from x as it is needed and never written. Rows whose
tap falls outside the image are masked, so the padding's products are computed and add nothing.

Layout: x and y as the engine's activations, [H, W, N, C]. Cost: 2 * N*OH*OW * OC * C*KH*KW FLOPs,
and x, w and y through memory about once each. This is the engine's own kernel for small batches,
without its folding of the first layer.

Source: S. Chetlur et al., "cuDNN: Efficient Primitives for Deep Learning", arXiv:1410.0759 (2014).
"""

from __future__ import annotations

from typing import Any

import torch

from ....kernels import conv
from ..candidate import Config, Conv2dProblem
from . import _implicit_gemm

OPERATION = "conv2d"
LAYOUT = "HWNC"


def configs(problem: Conv2dProblem) -> list[dict[str, Any]]:
    """Tiles to try."""
    return _implicit_gemm.configs(problem, "pixels")


def prepare(problem: Conv2dProblem, weight: torch.Tensor, config: Config) -> torch.Tensor:
    """The filters by tap: [KH*KW, OC, C]."""
    return conv.pack_weight(weight)


run = _implicit_gemm.run
