"""A convolution of one's own, raced against the engine's kernel and the best peer.

    alexnet-triton-bench race conv3 --candidate examples/my_kernel.py

Change it and race it again: what is wrong is disqualified and told why. Without a GPU the race is
run in Triton's interpreter. A program makes BLOCK_M pixels of BLOCK_N filters: a sum over taps and,
BLOCK_K at a time, over channels. What else a candidate may say: `bench/race/candidate.py`.
"""

import triton
import triton.language as tl
from alexnet_triton.bench.race.candidate import Declined


@triton.jit
def convolve(
    x, w, bias, y, M, H, W, C, OH, OW, OC, K, stride, pad, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # pixels of all images
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # filters
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tap in range(K * K):
        row, column = m // OW % OH * stride - pad + tap // K, m % OW * stride - pad + tap % K
        inside = (m < M) & (row >= 0) & (row < H) & (column >= 0) & (column < W)
        pixel = (m // (OH * OW) * H + row) * W + column
        for start in range(0, C, BLOCK_K):
            c = start + tl.arange(0, BLOCK_K)
            a = tl.load(x + pixel[:, None] * C + c, mask=inside[:, None] & (c < C), other=0.0)
            there = (c < C)[:, None] & (n < OC)
            b = tl.load(w + (tap * C + c)[:, None] * OC + n, mask=there, other=0.0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
    acc = tl.maximum(acc + tl.load(bias + n, mask=n < OC, other=0.0), 0.0).to(y.dtype.element_ty)
    tl.store(y + m[:, None] * OC + n, acc, mask=(m < M)[:, None] & (n < OC))


def configs(problem):
    """Tiles to try: on a CPU one for all, since the interpreter wants few and large ones."""
    sizes = (problem.N * problem.OH * problem.OW, problem.OC, problem.C)
    whole = [max(16, min(256, triton.next_power_of_2(size))) for size in sizes]
    tiles = [whole] if problem.arch is None else [(64, 64, 64), (128, 64, 32)]
    return [{"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k} for m, n, k in tiles]


def prepare(problem, weight, config):
    """The filters as the kernel reads them, once: [taps, channels, filters]."""
    return weight.permute(2, 3, 1, 0).contiguous()


def run(problem, x, weight, bias, out, config):
    """Fill out, [N, OC, OH, OW]; x and out lie channels last in memory."""
    p = problem
    if p.groups != 1 or p.dilation != 1 or p.activation != "relu":
        raise Declined("knows no groups, no dilation, and ReLU alone")
    pixels = p.N * p.OH * p.OW
    grid = (triton.cdiv(pixels, config["BLOCK_M"]), triton.cdiv(p.OC, config["BLOCK_N"]))
    sizes = (pixels, p.H, p.W, p.C, p.OH, p.OW, p.OC, p.KH, p.stride, p.padding)
    convolve[grid](x, weight, bias, out, *sizes, p.precision, **config)
