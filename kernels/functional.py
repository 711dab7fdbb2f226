"""Drop-in twins of `torch.nn.functional`: NCHW in, contiguous NCHW of the same dtype out.

They run on CUDA tensors (compiled) and on CPU tensors (in Triton's interpreter), in float32,
float16 and, on a GPU, bfloat16; sums are float32. Unbatched images, empty batches and tensors of
any strides are taken as torch takes them, inputs are never written, and what torch refuses is
refused with its type of exception (see `arguments`). They are for inference: an argument that
requires a gradient is refused unless gradients are off.

Every call packs its operands and picks a default configuration; the engine, which calls a layer
many times, packs once and uses the launchers beneath. The order in every function is the same:
check, short-cut what is empty, pack, launch, unpack.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch

from . import arguments, conv, gemm, layout, lrn, pool
from .epilogue import Activated, check_activation
from .jit import Launch, architecture

Pair = int | tuple[int, int]


def conv2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Pair = 1,
    padding: Pair | str | tuple[int, int, int, int] = 0,
    dilation: Pair = 1,
    groups: int = 1,
    *,
    activation: Activated = None,
    precision: str | None = None,
) -> torch.Tensor:
    """`torch.nn.functional.conv2d`, then an activation, in one kernel.

    input [N, C, H, W] or [C, H, W], weight [OC, C/groups, KH, KW], bias [OC]; the result is
    [N, OC, OH, OW] or [OC, OH, OW]. `padding` is also "same", "valid" or (top, bottom, left,
    right); `activation` is None or in the table of `epilogue`, "relu" or "sigmoid"; `precision` is
    that of float32 products, "ieee" (the default) or "tf32", and is not to be given for other
    dtypes.

    Two edges: an input without channels gives a result without channels, which is what torch makes
    of it; and padding is left out rather than multiplied in large batches, so that an infinite or
    NaN weight which only meets padding need not show.

    Raises TypeError, RuntimeError and NotImplementedError where torch does, and for tensors that
    are float64 or require a gradient; ValueError for a bad `activation` or `precision`.
    """
    arguments.check_tensors("conv2d", input=input, weight=weight, bias=bias)
    check_activation("conv2d", activation)
    precision = arguments.float32_precision("conv2d", precision, input.dtype)
    images = arguments.as_images("conv2d", input)
    shape = arguments.conv2d_shape(images, weight, bias, stride, padding, dilation, groups)
    if not shape.N * shape.C:
        result = input.new_empty((shape.N, shape.OC if shape.C else 0, shape.OH, shape.OW))
    else:
        out = layout.empty(shape.OH, shape.OW, shape.N, shape.OC, input.dtype, input.device)
        config = conv.default_config(shape, input.dtype, precision, architecture(input.device))
        conv.conv2d(
            layout.pack(images),
            conv.pack_weight(weight),
            None if bias is None else bias.contiguous(),
            out,
            shape,
            config,
            activation,
            precision,
        )()
        result = layout.unpack(out)
    return result if input.dim() == 4 else result.squeeze(0)


def max_pool2d(
    input: torch.Tensor,
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    dilation: Pair = 1,
    ceil_mode: bool = False,
) -> torch.Tensor:
    """`torch.nn.functional.max_pool2d`: [N, C, H, W] or [C, H, W] to the same with [OH, OW].

    A NaN in a window is the window's maximum, as in torch. Raises TypeError, RuntimeError and
    NotImplementedError where torch does, and for integers and float64.
    """
    arguments.check_tensors("max_pool2d", input=input)
    options = (kernel_size, stride, padding, dilation, ceil_mode)
    shape = arguments.pool2d_shape("max_pool2d", arguments.as_images("max_pool2d", input), *options)
    return _pooled(pool.max_pool2d, input, shape)


def avg_pool2d(
    input: torch.Tensor,
    kernel_size: Pair,
    stride: Pair | None = None,
    padding: Pair = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> torch.Tensor:
    """`torch.nn.functional.avg_pool2d`: [N, C, H, W] or [C, H, W] to the same with [OH, OW].

    Raises TypeError, RuntimeError and NotImplementedError where torch does, and for integers and
    float64.
    """
    arguments.check_tensors("avg_pool2d", input=input)
    images = arguments.as_images("avg_pool2d", input)
    count = arguments.flag("avg_pool2d", "count_include_pad", count_include_pad)
    options = (kernel_size, stride, padding, 1, ceil_mode)
    shape = arguments.pool2d_shape("avg_pool2d", images, *options)
    return _pooled(partial(pool.avg_pool2d, count_include_pad=count), input, shape)


def adaptive_avg_pool2d(
    input: torch.Tensor, output_size: int | tuple[int | None, int | None]
) -> torch.Tensor:
    """`torch.nn.functional.adaptive_avg_pool2d`: [N, C, H, W] or [C, H, W] to `output_size`.

    A None in `output_size` keeps that size. Raises TypeError, RuntimeError and NotImplementedError
    where torch does, and for float64.
    """
    arguments.check_tensors("adaptive_avg_pool2d", input=input)
    # torch looks at a pair of sizes before it looks at the shape.
    too_flat = input.dim() < 3 and isinstance(output_size, tuple | list)
    images = arguments.as_images(
        "adaptive_avg_pool2d", input, ValueError if too_flat else RuntimeError
    )
    shape = arguments.adaptive_shape("adaptive_avg_pool2d", images, output_size)
    if not shape.N * shape.C * shape.H * shape.W * shape.OH * shape.OW:
        # The mean of no pixels is NaN; torch gives it for an output of 1x1 and refuses others.
        result = input.new_full((shape.N, shape.C, shape.OH, shape.OW), math.nan)
        return result if input.dim() == 4 else result.squeeze(0)
    return _pooled(pool.avg_pool2d, input, shape)


def _pooled(
    function: Callable[..., Launch], input: torch.Tensor, shape: pool.PoolShape
) -> torch.Tensor:
    """The pooling of that shape on images [N, C, H, W] or [C, H, W]."""
    out = layout.empty(shape.OH, shape.OW, shape.N, shape.C, input.dtype, input.device)
    if shape.N:
        images = input if input.dim() == 4 else input.unsqueeze(0)
        config = pool.default_config(shape, architecture(input.device))
        function(layout.pack(images), out, shape, config)()
    result = layout.unpack(out)
    return result if input.dim() == 4 else result.squeeze(0)


def linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    activation: Activated = None,
    precision: str | None = None,
) -> torch.Tensor:
    """`torch.nn.functional.linear`, then an activation, in one kernel.

    input [..., K], weight [OC, K] and bias [OC] or one number give [..., OC]; weight [K] and a
    bias [] give [...]. `activation` and `precision` are those of `conv2d`.

    Raises TypeError, RuntimeError and NotImplementedError where torch does, for tensors that are
    float64 or require a gradient, and for a bias that differs from row to row, which torch's
    documentation leaves out too; ValueError for a bad `activation` or `precision`.
    """
    arguments.check_tensors("linear", input=input, weight=weight, bias=bias)
    check_activation("linear", activation)
    precision = arguments.float32_precision("linear", precision, input.dtype)
    shape = arguments.linear_shape(input, weight, bias)
    result_shape = (*input.shape[:-1], *weight.shape[:-1])
    if not shape.N * shape.OC:
        return input.new_empty(result_shape)
    rows, filters = input.reshape(shape.N, shape.C), weight.reshape(shape.OC, shape.C)
    if not shape.C:  # an empty sum is zero: one product with zero has the same bias and activation
        shape = gemm.LinearShape(shape.N, 1, 1, shape.OC)
        rows, filters = input.new_zeros((shape.N, 1)), weight.new_zeros((shape.OC, 1))
    out = layout.empty(1, 1, shape.N, shape.OC, input.dtype, input.device)
    config = gemm.default_config(shape, input.dtype, precision, architecture(input.device))
    gemm.linear(
        layout.pack(rows[:, :, None, None]),
        gemm.pack_weight(filters),
        None if bias is None else bias.reshape(-1).expand(shape.OC).contiguous(),
        out,
        config,
        activation,
        precision,
    )()
    return layout.unpack(out).reshape(result_shape)


def local_response_norm(
    input: torch.Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> torch.Tensor:
    """`torch.nn.functional.local_response_norm`: [N, C, ...] of 3 dimensions or more, to the same.

    Raises TypeError, ValueError (fewer dimensions), RuntimeError and NotImplementedError where
    torch does, and for float64.
    """
    name = "local_response_norm"
    arguments.check_tensors(name, input=input)
    if input.dim() < 3:
        raise ValueError(
            f"{name}: input has shape {list(input.shape)}, wanted 3 or more dimensions, [N, C, ...]"
        )
    size = arguments.at_least(name, "size", arguments.integer(name, "size", size), 1)
    alpha = arguments.real(name, "alpha", alpha)
    beta = arguments.real(name, "beta", beta)
    k = arguments.real(name, "k", k)
    if not input.numel():
        return input.new_empty(input.shape)
    x = layout.pack(input.flatten(2).unsqueeze(3))
    pixels, _, n, c = x.shape
    out = layout.empty(pixels, 1, n, c, input.dtype, input.device)
    shape = lrn.LRNShape(pixels * n, c, size)
    config = lrn.default_config(shape, architecture(input.device))
    lrn.local_response_norm(x, out, shape, config, alpha, beta, k)()
    return layout.unpack(out).reshape(input.shape)
