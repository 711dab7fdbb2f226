"""The same networks by torch.nn.functional: the explicit other backend, and the yardstick.

In the engine's dtype on cuDNN or oneDNN this is `backend="torch"`; in float64 it is what `verify`
and the tests hold the kernels against.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import assert_never

import torch
from torch.nn import functional as F

from ..kernels.epilogue import activated
from .spec import (
    AdaptiveAvgPool2d,
    AvgPool2d,
    BatchNorm2d,
    Conv2d,
    Dropout,
    Flatten,
    Gather,
    Layer,
    Linear,
    LocalResponseNorm,
    MaxPool2d,
    Network,
    NetworkError,
    Nonlinearity,
    Preprocess,
    Softmax,
)


def normalise(images: torch.Tensor, preprocess: Preprocess, dtype: torch.dtype) -> torch.Tensor:
    """[N, C, H, W] as the first layer sees it: uint8 pixels normalised, floats as given."""
    if images.dtype != torch.uint8:
        return images.to(dtype)
    # At least float32: half precision would round the pixel before it is scaled.
    wide = torch.promote_types(dtype, torch.float32)
    mean = torch.tensor(preprocess.mean, dtype=wide, device=images.device)[:, None, None]
    std = torch.tensor(preprocess.std, dtype=wide, device=images.device)[:, None, None]
    return ((images.to(wide) / 255 - mean) / std).to(dtype)


def apply(
    name: str, layer: Layer, x: torch.Tensor, state: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """One layer on [N, C, H, W] or [N, features], in the dtype of `x` and `state`."""
    match layer:
        case Conv2d(_, _, stride, padding, dilation, groups):
            weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
            return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
        case MaxPool2d(kernel, stride, padding, ceil_mode):
            return F.max_pool2d(x, kernel, stride, padding, ceil_mode=ceil_mode)
        case AvgPool2d(kernel, stride, padding, ceil_mode, count_include_pad):
            return F.avg_pool2d(x, kernel, stride, padding, ceil_mode, count_include_pad)
        case AdaptiveAvgPool2d():
            return F.adaptive_avg_pool2d(x, layer.output_size)
        case BatchNorm2d():
            owned = (state[f"{name}.{key}"] for key in layer.parameter_shapes(x.shape[1:]))
            weight, bias, mean, variance = owned
            return F.batch_norm(x, mean, variance, weight, bias, eps=layer.eps)
        case LocalResponseNorm(size, alpha, beta, k, groups):
            parts = x.chunk(groups, 1)
            return torch.cat([F.local_response_norm(p, size, alpha, beta, k) for p in parts], 1)
        case Softmax():
            return x.softmax(1)
        case Linear():
            return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])
        case Nonlinearity():
            return activated(x, layer.activation)
        case Flatten():
            return x.flatten(1)
        case Dropout():
            return x
        case Gather():
            raise NetworkError(f"layer {name}: one tower's half means nothing by itself")
        case _:
            assert_never(layer)


def forward(
    network: Network, state: Mapping[str, torch.Tensor], x: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Every layer's output for normalised images [N, C, H, W], by layer name, in network order."""
    outputs: dict[str, torch.Tensor] = {}
    for name, layer in network.layers:
        x = outputs[name] = apply(name, layer, x, state)
    return outputs
