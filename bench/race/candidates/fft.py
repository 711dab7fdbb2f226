"""Convolution in the frequency domain, by torch.fft: no Triton in it.

Over a grid that holds the padded image, a correlation becomes a product: for each frequency f,
Y[f, n, oc] = sum over c of X[f, n, c] * conj(W[f, oc, c]), a GEMM of complex numbers. The grid is
rounded up to a size of factors 2, 3 and 5; outputs at a stride are picked from all outputs. It pays
for large filters at stride 1, and least where a stride throws most of the outputs away.

Layout: x channels last, spectra with channels innermost. Cost: 8 * F * N * OC * C FLOPs in float32
for F frequencies, about half the grid, and the transforms; the spectra of x, w and y pass through
memory, each some times as large as the tensor.

Rounding: everything is float32 whatever the dtype. Beyond the error of the sum over channels, that
of the transforms is relative to the energy of a whole image and grows with the logarithm of its
size. They are no larger than the sum's for any image here, hence TOLERANCE.

Source: M. Mathieu, M. Henaff, Y. LeCun, "Fast Training of Convolutional Networks through FFTs",
arXiv:1312.5851 (2013).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....kernels.epilogue import activated
from ...units import si
from ..candidate import Config, Conv2dProblem, Refused

OPERATION = "conv2d"
TOLERANCE = 2.0


def grid(problem: Conv2dProblem) -> tuple[int, int]:
    """Rows and columns of the transform."""
    return _smooth(problem.H + 2 * problem.padding), _smooth(problem.W + 2 * problem.padding)


def _smooth(size: int) -> int:
    """The smallest number from `size` on that has no prime factor above 5."""
    while True:
        rest = size
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return size
        size += 1


def note(problem: Conv2dProblem) -> str:
    """The grid, and the sizes of the spectra."""
    rows, columns = grid(problem)
    frequencies, p = rows * (columns // 2 + 1), problem
    numbers = p.N * p.C + p.OC * p.C + p.N * p.OC
    return f"grid {rows}x{columns}, spectra {si(8 * frequencies * numbers, 'B')} in all"


def prepare(problem: Conv2dProblem, weight: Tensor, config: Config) -> Tensor:
    """The filters' conjugated spectra, complex64 [rows, columns/2 + 1, C, OC]."""
    if problem.dilation > 1 or problem.groups > 1:
        raise Refused(
            f"wants dilation 1 and one group, got {problem.dilation} and {problem.groups}"
        )
    spectra = torch.fft.rfft2(weight.float().permute(2, 3, 1, 0), s=grid(problem), dim=(0, 1))
    conjugated: Tensor = spectra.conj().resolve_conj().contiguous()
    return conjugated


def run(
    problem: Conv2dProblem, x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, config: Config
) -> Tensor:
    """The answer, [N, OC, OH, OW]."""
    p, size = problem, grid(problem)
    padded = torch.nn.functional.pad(x.float(), (p.padding,) * 4)
    spectra = torch.fft.rfft2(padded.permute(2, 3, 0, 1), s=size, dim=(0, 1))
    y = torch.fft.irfft2(spectra @ weight, s=size, dim=(0, 1))
    rows, columns = p.stride * (p.OH - 1) + 1, p.stride * (p.OW - 1) + 1
    y = y[: rows : p.stride, : columns : p.stride] + bias.float()
    return activated(y, p.activation).to(p.dtype).permute(2, 3, 0, 1)
