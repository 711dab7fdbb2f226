"""Activations are `[H, W, N, C]`: images inside pixels, channels innermost.

A block of images at one pixel is then one contiguous box of memory, so a tap of a filter is a
plain tile load: no gather, no mask, and a tap outside the image is simply skipped. cuda-convnet
kept images innermost for the same reason (A. Krizhevsky, 2012); TVM calls the layout HWNC.

An activation is an ordinary torch tensor of shape [H, W, N, C] whose images lie `pitch` elements
apart, C rounded up to a multiple of 8, because the tensor memory accelerator wants strides in
multiples of 16 bytes. The elements between C and the pitch are never read.

Kernels also write views with other strides (`strides`), such as a slice of the images; pooling and
convolutions of few images read them, too.
"""

from __future__ import annotations

import torch

CHANNEL_ALIGNMENT = 8  # elements: 16 bytes in half precision, 32 in single


def aligned(channels: int) -> int:
    """`channels` rounded up to the alignment."""
    return -(-channels // CHANNEL_ALIGNMENT) * CHANNEL_ALIGNMENT


def empty(
    height: int,
    width: int,
    images: int,
    channels: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> torch.Tensor:
    """An uninitialised activation [height, width, images, channels], aligned."""
    shape = (height, width, images, aligned(channels))
    return torch.empty(shape, dtype=dtype, device=device)[..., :channels]


def pitch(activation: torch.Tensor) -> int:
    """Elements from one image to the next.

    Raises ValueError if the tensor [H, W, N, C] is not laid out as this module lays it out.
    """
    _, width, images, channels = activation.shape
    step = aligned(channels)
    wanted = (width * images * step, images * step, step, 1)
    laid = zip(activation.shape, activation.stride(), wanted, strict=True)
    if activation.numel() and any(size > 1 and stride != want for size, stride, want in laid):
        raise ValueError(
            f"activation {tuple(activation.shape)} has strides {activation.stride()}, wanted "
            f"images {step} elements apart and dense; make it with layout.empty or layout.pack"
        )
    return step


def strides(activation: torch.Tensor) -> tuple[int, int, int]:
    """Strides of rows, columns and images in units of the alignment, of any view [H, W, N, C].

    Raises ValueError for channels that are not dense or strides that are not aligned.
    """
    height, width, images, channel = activation.stride()
    steps = (height, width, images)
    if activation.numel() and (channel != 1 or any(s % CHANNEL_ALIGNMENT for s in steps)):
        raise ValueError(
            f"activation {tuple(activation.shape)} has strides {activation.stride()}, wanted dense "
            f"channels and multiples of {CHANNEL_ALIGNMENT}; make it with layout.empty"
        )
    rows, columns, pictures = (step // CHANNEL_ALIGNMENT for step in steps)
    return rows, columns, pictures


def addressed(name: str, activation: torch.Tensor) -> dict[str, int]:
    """What a kernel is told of a view `x`: x_h, x_w in units of the alignment, X_N in elements."""
    rows, columns, images = strides(activation)
    image = images * CHANNEL_ALIGNMENT
    return {f"{name}_h": rows, f"{name}_w": columns, f"{name.upper()}_N": image}


def check_rows(function: str, rows: int, block: int) -> None:
    """Raises ValueError, naming the function, for rows that kernels cannot number in 32 bits.

    They number the last tile's rows to its end, so there is room for one tile of `block` more.
    """
    if rows + block > 2**31:
        raise ValueError(
            f"{function}: {rows} rows are more than a 32-bit index counts; use a smaller batch"
        )


def pack(images: torch.Tensor) -> torch.Tensor:
    """[N, C, H, W], any strides, to an activation [H, W, N, C]."""
    n, c, h, w = images.shape
    activation = empty(h, w, n, c, images.dtype, images.device)
    activation.copy_(images.permute(2, 3, 0, 1))
    return activation


def unpack(activation: torch.Tensor) -> torch.Tensor:
    """An activation [H, W, N, C] to a contiguous [N, C, H, W]."""
    return activation.permute(2, 3, 0, 1).contiguous()
