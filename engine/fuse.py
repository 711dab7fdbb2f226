"""Which layers of a network become one kernel.

A convolution or linear layer takes with it what follows it element by element: a BatchNorm before
its activation (folded into the weights, exactly), the activation, and a BatchNorm after it (a scale
and a shift in the epilogue; it stays before a max-pool, which a negative scale does not commute
with). Dropout is the identity, flatten a way of reading, and an adaptive pool to the size that
comes averages single pixels, so these vanish.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..kernels.epilogue import Activated
from .spec import (
    AdaptiveAvgPool2d,
    AvgPool2d,
    BatchNorm2d,
    Conv2d,
    Dropout,
    Flatten,
    Gather,
    Linear,
    LocalResponseNorm,
    MaxPool2d,
    Network,
    NetworkError,
    Nonlinearity,
    Shape,
    Softmax,
)

BlockLayer = (
    Conv2d
    | Linear
    | MaxPool2d
    | AvgPool2d
    | AdaptiveAvgPool2d
    | LocalResponseNorm
    | Softmax
    | Gather
)


@dataclass(frozen=True, slots=True)
class Block:
    """A layer with what is fused into it: names of layers, None where there is none."""

    name: str
    layer: BlockLayer
    came: Shape
    output: Shape
    layers: tuple[str, ...]  # all of them, in order
    batch_norm: str | None = None  # before the activation
    activation: Activated = None
    affine: str | None = None  # a BatchNorm after the activation


def fuse(network: Network, image_shape: Shape | None = None) -> list[Block]:
    """The network as blocks, for images of this shape.

    Raises NetworkError, naming the layer, for an image that does not fit and for an activation or a
    normalisation that follows nothing it could be fused into.
    """
    blocks: list[Block] = []
    for name, layer, shape, output in network.walk(image_shape):
        match layer:
            case Dropout() | Flatten():
                continue
            case AdaptiveAvgPool2d() if shape == output:
                continue
            case Nonlinearity() | BatchNorm2d():
                fused = _with(blocks[-1], name, layer) if blocks else None
                if fused is None:
                    raise NetworkError(
                        f"{network.name}, layer {name}: a {type(layer).__name__} must follow a "
                        "convolution or a linear layer, to be fused into it"
                    )
                blocks[-1] = fused
            case _:
                blocks.append(Block(name, layer, shape, output, (name,)))
    return blocks


def _with(block: Block, name: str, follower: Nonlinearity | BatchNorm2d) -> Block | None:
    """The block with the layer after it, None if its kernel has no place for that."""
    if not isinstance(block.layer, Conv2d | Linear):
        return None
    block = replace(block, layers=(*block.layers, name))
    match follower:
        case Nonlinearity() if block.activation is None:
            return replace(block, activation=follower.activation)
        case BatchNorm2d() if block.activation is None and block.batch_norm is None:
            return replace(block, batch_norm=name)
        case BatchNorm2d() if block.activation is not None and block.affine is None:
            return replace(block, affine=name)
    return None
