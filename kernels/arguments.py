"""The door of the functional face: what arguments may be, checked once, before anything runs.

Each refusal is one line with the argument, what was wanted and what came, and raises what torch
raises for the same call, so that an `except` which catches the one catches the other: TypeError
for a wrong type, RuntimeError for a wrong value or shape, NotImplementedError (a RuntimeError) for
tensors that there is no kernel for. ValueError is for arguments that torch does not have.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any

import torch

from .conv import Conv2dShape
from .gemm import LinearShape
from .pool import PoolShape

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PRECISIONS = ("ieee", "tf32")


def check_tensors(function: str, **tensors: torch.Tensor | None) -> None:
    """All are dense tensors of one supported dtype on one device; only a bias may be None.

    Raises TypeError for what is no tensor, NotImplementedError for a dtype, layout or device
    without kernels, RuntimeError if the tensors do not go together or autograd would want them.
    """
    first: torch.Tensor | None = None
    for name, tensor in tensors.items():
        if tensor is None and name == "bias":
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{function}: {name} must be a tensor, got {type(tensor).__name__}")
        if first is None:
            _check_supported(function, name, tensor)
            first = tensor
        elif _kind(tensor) != _kind(first):
            raise RuntimeError(
                f"{function}: {name} is {_kind(tensor)}, wanted {_kind(first)} like input"
            )
        if tensor.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{function}: {name} requires a gradient, but these kernels are inference only; "
                "use torch.no_grad() or detach it"
            )


def _check_supported(function: str, name: str, tensor: torch.Tensor) -> None:
    if tensor.layout != torch.strided or tensor.device.type not in ("cpu", "cuda"):
        raise NotImplementedError(
            f"{function}: {name} is {_kind(tensor)}, wanted a dense tensor on a CPU or CUDA device"
        )
    if tensor.dtype not in DTYPES:
        wanted = ", ".join(map(str, DTYPES))
        raise NotImplementedError(
            f"{function}: {name} is {_kind(tensor)}, wanted one of {wanted}; convert it with .to()"
        )
    if tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu":
        raise NotImplementedError(
            f"{function}: {name} is bfloat16 on a CPU, where Triton's interpreter computes it "
            "wrongly; use float32 or float16 there, or move the tensors to a GPU"
        )


def _kind(tensor: torch.Tensor) -> str:
    layout = "" if tensor.layout == torch.strided else f" {tensor.layout}"
    return f"{tensor.dtype}{layout} on {tensor.device}"


def as_images(
    function: str, input: torch.Tensor, refusal: type[Exception] = RuntimeError
) -> torch.Tensor:
    """[N, C, H, W] as it is and [C, H, W] as one image; other shapes raise `refusal`."""
    if input.dim() not in (3, 4):
        raise refusal(
            f"{function}: input has shape {list(input.shape)}, wanted [N, C, H, W] or, for one "
            "image, [C, H, W]"
        )
    return input if input.dim() == 4 else input.unsqueeze(0)


def integer(function: str, argument: str, value: Any) -> int:
    """Any integer but a bool. TypeError for the rest."""
    if not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{function}: {argument} must be an integer, got {type(value).__name__}")


def at_least(function: str, argument: str, value: int, low: int) -> int:
    """`value`, or RuntimeError if it is below `low`."""
    if value < low:
        raise RuntimeError(f"{function}: {argument} must be at least {low}, got {value}")
    return value


def pair(function: str, argument: str, value: Any, low: int) -> tuple[int, int]:
    """An integer, or one or two of them in a tuple or list, as (height, width).

    Raises TypeError for other types, RuntimeError for another length or a number below `low`.
    """
    values = value if isinstance(value, tuple | list) else (value,)
    sizes = [integer(function, argument, v) for v in values]
    if len(sizes) not in (1, 2):
        raise RuntimeError(
            f"{function}: {argument} must be one integer or (height, width), got {value}"
        )
    return (
        at_least(function, argument, sizes[0], low),
        at_least(function, argument, sizes[-1], low),
    )


def flag(function: str, argument: str, value: Any) -> bool:
    """A bool and nothing that merely is true. TypeError for the rest."""
    if not isinstance(value, bool):
        raise TypeError(f"{function}: {argument} must be a bool, got {type(value).__name__}")
    return value


def real(function: str, argument: str, value: Any) -> float:
    """A real number as a float. TypeError for the rest."""
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{function}: {argument} must be a number, got {type(value).__name__}")
    return float(value)


def float32_precision(function: str, precision: str | None, dtype: torch.dtype) -> str:
    """How float32 products are computed; None is "ieee". ValueError if it does not apply."""
    if precision is None:
        return "ieee"
    if precision not in PRECISIONS:
        raise ValueError(
            f"{function}: precision must be None or one of {PRECISIONS}, got {precision!r}"
        )
    if dtype != torch.float32:
        raise ValueError(
            f"{function}: precision {precision!r} is for float32, but input is {dtype}; omit it"
        )
    return precision


# --- shapes ----------------------------------------------------------------------------------


def conv2d_shape(
    images: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
) -> Conv2dShape:
    """The problem that `torch.nn.functional.conv2d` would solve; RuntimeError if there is none."""
    strides = pair("conv2d", "stride", stride, 1)
    dilations = pair("conv2d", "dilation", dilation, 1)
    groups = at_least("conv2d", "groups", integer("conv2d", "groups", groups), 1)
    if weight.dim() != 4 or 0 in (weight.shape[0], *weight.shape[2:]):
        raise RuntimeError(
            f"conv2d: weight has shape {list(weight.shape)}, wanted [OC, C/groups, KH, KW] with "
            "none of OC, KH and KW zero"
        )
    n, c, h, w = images.shape
    oc, c_group, kh, kw = weight.shape
    if c != c_group * groups or oc % groups:
        raise RuntimeError(
            f"conv2d: weight has shape {list(weight.shape)}, wanted {c}/groups channels for input "
            f"{list(images.shape)} and a multiple of groups filters, where groups is {groups}"
        )
    if bias is not None and bias.shape != (oc,):
        raise RuntimeError(f"conv2d: bias has shape {list(bias.shape)}, wanted [{oc}] like weight")
    paddings = _conv2d_padding(padding, (kh, kw), strides, dilations)
    shape = Conv2dShape(n, c, h, w, oc, kh, kw, strides, paddings, dilations, groups)
    if shape.OH < 1 or shape.OW < 1 or (n and c and not h * w):
        raise RuntimeError(
            f"conv2d: input of {h}x{w} with padding {paddings} (top, bottom, left, right) is too "
            f"small for a {kh}x{kw} filter with dilation {dilations}"
        )
    return shape


def _conv2d_padding(
    padding: Any, kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Any form of padding as (top, bottom, left, right)."""
    if isinstance(padding, tuple | list) and len(padding) == 4:
        top, left = pair("conv2d", "padding", padding[::2], 0)
        bottom, right = pair("conv2d", "padding", padding[1::2], 0)
        return top, bottom, left, right
    if not isinstance(padding, str):
        h, w = pair("conv2d", "padding", padding, 0)
        return h, h, w, w
    if padding == "valid":
        return 0, 0, 0, 0
    if padding != "same":
        raise RuntimeError(
            f"conv2d: padding must be numbers, 'same' or 'valid', got the string {padding!r}"
        )
    if stride != (1, 1):
        raise RuntimeError(f"conv2d: padding 'same' wants a stride of 1, got stride {stride}")
    # Where the total is odd, torch puts the odd one at the bottom and the right.
    h, w = (d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
    return h // 2, h - h // 2, w // 2, w - w // 2


def pool2d_shape(
    function: str,
    images: torch.Tensor,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    ceil_mode: Any,
) -> PoolShape:
    """The problem that torch's pooling of that name would solve; RuntimeError if there is none."""
    kernel = pair(function, "kernel_size", kernel_size, 1)
    missing = stride is None or (isinstance(stride, tuple | list) and not stride)
    strides = kernel if missing else pair(function, "stride", stride, 1)
    pads = pair(function, "padding", padding, 0)
    dilations = pair(function, "dilation", dilation, 1)
    ceil = flag(function, "ceil_mode", ceil_mode)
    if pads[0] > kernel[0] // 2 or pads[1] > kernel[1] // 2:
        raise RuntimeError(
            f"{function}: padding must be at most half of kernel_size {kernel}, got {pads}"
        )
    n, c, h, w = images.shape
    if 0 in (c, h, w):
        raise RuntimeError(
            f"{function}: input has shape {list(images.shape)}, only its batch may be empty"
        )
    oh, ow = (
        _windows(size, k, s, p, d, ceil)
        for size, k, s, p, d in zip((h, w), kernel, strides, pads, dilations, strict=True)
    )
    if oh < 1 or ow < 1:
        raise RuntimeError(
            f"{function}: input of {h}x{w} with padding {pads} is too small for a kernel_size of "
            f"{kernel} with dilation {dilations}"
        )
    return PoolShape(n, c, h, w, oh, ow, kernel, strides, pads, dilations)


def _windows(size: int, kernel: int, stride: int, pad: int, dilation: int, ceil: bool) -> int:
    """How many windows slide along one axis."""
    room = size + 2 * pad - dilation * (kernel - 1) - 1
    if not ceil:
        return room // stride + 1
    count = -(-room // stride) + 1
    # The last window must start in the image or in the padding before it.
    return count - 1 if (count - 1) * stride >= size + pad else count


def adaptive_shape(function: str, images: torch.Tensor, output_size: Any) -> PoolShape:
    """The problem that `torch.nn.functional.adaptive_avg_pool2d` would solve."""
    n, c, h, w = images.shape
    sizes: Sequence[Any] = output_size
    if not isinstance(output_size, tuple | list):
        sizes = (integer(function, "output_size", output_size),) * 2
    if len(sizes) != 2:
        raise RuntimeError(
            f"{function}: output_size must be one integer or (height, width), got {output_size}"
        )
    oh, ow = (
        size if wanted is None else integer(function, "output_size", wanted)
        for size, wanted in zip((h, w), sizes, strict=True)
    )
    at_least(function, "output_size", min(oh, ow), 0)
    if not h * w and (oh, ow) != (1, 1):
        raise RuntimeError(f"{function}: input has shape {list(images.shape)}, which has no pixels")
    return PoolShape(n, c, h, w, oh, ow)


def linear_shape(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> LinearShape:
    """The problem that `torch.nn.functional.linear` would solve; RuntimeError if there is none."""
    if input.dim() < 1 or weight.dim() not in (1, 2) or input.shape[-1] != weight.shape[-1]:
        raise RuntimeError(
            f"linear: weight has shape {list(weight.shape)}, wanted [OC, K] or [K] for an input "
            f"[..., K], which has shape {list(input.shape)}"
        )
    oc = math.prod(weight.shape[:-1])
    # torch broadcasts a bias; these are the shapes that are the same bias for every row.
    biases = [(), (1,), (oc,), (1, 1), (1, oc)] if weight.dim() == 2 else [()]
    if bias is not None and tuple(bias.shape) not in biases:
        wanted = list(weight.shape[:-1])
        raise RuntimeError(
            f"linear: bias has shape {list(bias.shape)}, wanted {wanted} like weight"
        )
    return LinearShape(math.prod(input.shape[:-1]), 1, input.shape[-1], oc)
