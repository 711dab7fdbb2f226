"""Fused Triton kernels. The functional face: drop-in twins of `torch.nn.functional`.

    from alexnet_triton import kernels
    y = kernels.conv2d(x, weight, bias, stride=4, padding=2, activation="relu")

Every kernel file has the same rooms in the same order: docstring (the maths, the layout, the
cost), shape, kernels, configurations, packing, launcher, reference, work. A launcher takes tensors
and an explicit configuration and returns a `Launch`; calling it runs the kernel, compiled on CUDA
tensors and in Triton's interpreter on CPU tensors.
"""

from .functional import (
    adaptive_avg_pool2d,
    avg_pool2d,
    conv2d,
    linear,
    local_response_norm,
    max_pool2d,
)

__all__ = [
    "adaptive_avg_pool2d",
    "avg_pool2d",
    "conv2d",
    "linear",
    "local_response_norm",
    "max_pool2d",
]
