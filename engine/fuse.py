"""Which layers of a network become one kernel.

A convolution or linear layer takes with it what follows it element by element: a BatchNorm before
its activation (folded into the weights, exactly), the activation, and a BatchNorm after it (a scale
and a shift in the epilogue; it stays before a max-pool, which a negative scale does not commute
with). Dropout is the identity and flatten is a way of reading, so both vanish.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .spec import (
    BatchNorm2d,
    Conv2d,
    Dropout,
    Flatten,
    Layer,
    Linear,
    Network,
    NetworkError,
    ReLU,
    Shape,
    Sigmoid,
)

Walked = tuple[str, Layer, Shape, Shape]  # as Network.walk gives it


@dataclass(frozen=True, slots=True)
class Block:
    """A layer with what is fused into it: names of layers, None where there is none."""

    name: str
    layer: Layer
    came: Shape
    output: Shape
    batch_norm: str | None = None  # before the activation
    activation: str | None = None  # "relu" or "sigmoid"
    affine: str | None = None  # a BatchNorm after the activation
    layers: tuple[str, ...] = ()  # all of them, in order


def fuse(network: Network, image_shape: Shape | None = None) -> list[Block]:
    """The network as blocks, for images of this shape.

    Raises NetworkError, naming the layer, for an image that does not fit and for an activation or a
    normalisation that follows nothing it could be fused into.
    """
    walk = [w for w in network.walk(image_shape) if not isinstance(w[1], Dropout | Flatten)]
    blocks = []
    while walk:
        name, layer, came, output = walk[0]
        if isinstance(layer, Conv2d | Linear):
            blocks.append(_with_tail(walk))
        elif isinstance(layer, ReLU | Sigmoid | BatchNorm2d):
            raise NetworkError(
                f"{network.name}, layer {name}: a {type(layer).__name__} must follow a convolution "
                "or a linear layer, to be fused into it"
            )
        else:
            blocks.append(Block(name, layer, came, output, layers=(name,)))
        del walk[: len(blocks[-1].layers)]
    return blocks


def _with_tail(walk: Sequence[Walked]) -> Block:
    """The block that starts with the convolution or linear layer at the head of `walk`."""
    name, layer, came, output = walk[0]
    before = activation = after = None
    layers = [name]
    for follower, kind, _, _ in walk[1:]:
        match kind:
            case ReLU() | Sigmoid() if activation is None:
                activation = "relu" if isinstance(kind, ReLU) else "sigmoid"
            case BatchNorm2d() if activation is None and before is None:
                before = follower
            case BatchNorm2d() if activation is not None and after is None:
                after = follower
            case _:
                break
        layers.append(follower)
    return Block(name, layer, came, output, before, activation, after, tuple(layers))
