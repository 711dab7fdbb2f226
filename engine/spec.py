"""The vocabulary: a network is data, a tuple of named layers with no devices and no tensors.

Shapes here are those of one image, `(C, H, W)` before `Flatten` and `(features,)` after it.
Every layer is a frozen dataclass whose fields carry the names of torch.nn; `output_shape` and
`parameter_shapes` say what it makes and what it owns, so that parameter and MAC counts, the
plan, the weight check and the reference all read the same declaration.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import astuple, dataclass, replace
from typing import ClassVar

from ..errors import Error

Shape = tuple[int, ...]


class NetworkError(Error, ValueError):
    """A network that cannot be built on this input: names the layer, what it wanted, what came."""


class TooSmall(NetworkError):
    """An image, or what is left of it, on which a window finds no place."""


def _features(shape: Shape, kind: str) -> Shape:
    if len(shape) != 3:
        raise NetworkError(f"{kind} wants (channels, height, width), got {shape}")
    return shape


def _window(size: int, kernel: int, stride: int, padding: int, dilation: int = 1) -> int:
    """Output positions of a sliding window along one axis, torch's floor rule."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


@dataclass(frozen=True, slots=True)
class Conv2d:
    """`out_channels` filters of `kernel_size`², square, zero padded on all four sides."""

    out_channels: int
    kernel_size: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1

    def output_shape(self, shape: Shape) -> Shape:
        channels, height, width = _features(shape, "Conv2d")
        if channels % self.groups or self.out_channels % self.groups:
            raise NetworkError(
                f"{channels} to {self.out_channels} channels do not divide into "
                f"{self.groups} groups"
            )
        size = [
            _window(s, self.kernel_size, self.stride, self.padding, self.dilation)
            for s in (height, width)
        ]
        return _positive((self.out_channels, *size), shape)

    def parameter_shapes(self, shape: Shape) -> dict[str, Shape]:
        taps = (self.kernel_size, self.kernel_size)
        return {
            "weight": (self.out_channels, shape[0] // self.groups, *taps),
            "bias": (self.out_channels,),
        }

    def macs(self, shape: Shape) -> int:
        """Multiply-accumulates for one image, counted as torch counts them: padding taps too."""
        fan_in = shape[0] // self.groups * self.kernel_size**2
        return math.prod(self.output_shape(shape)) * fan_in


@dataclass(frozen=True, slots=True)
class Pool:
    """A window that slides over each channel.

    `ceil_mode` keeps a last window that starts inside the image but reaches beyond it.
    """

    kernel_size: int
    stride: int
    padding: int = 0
    ceil_mode: bool = False

    def output_shape(self, shape: Shape) -> Shape:
        channels, *size = _features(shape, type(self).__name__)
        k, s, p = self.kernel_size, self.stride, self.padding
        windows = []
        for side in size:
            count = _window(side, k, s, p)
            # torch: one more, if ceil_mode leaves a rest and that window starts inside the padding.
            rest = (side + 2 * p - k) % s
            windows.append(count + bool(self.ceil_mode and rest and count * s < side + p))
        return _positive((channels, *windows), shape)


@dataclass(frozen=True, slots=True)
class MaxPool2d(Pool):
    """The largest value of each window; padding counts as minus infinity."""


@dataclass(frozen=True, slots=True)
class AvgPool2d(Pool):
    """The mean of each window; padding counts as zeros, or not at all."""

    count_include_pad: bool = True


@dataclass(frozen=True, slots=True)
class AdaptiveAvgPool2d:
    """Averages whatever comes to `output_size`²; the identity when it has that size already."""

    output_size: int

    def output_shape(self, shape: Shape) -> Shape:
        return (_features(shape, "AdaptiveAvgPool2d")[0], self.output_size, self.output_size)


@dataclass(frozen=True, slots=True)
class Linear:
    """A fully connected layer on flattened features."""

    out_features: int

    def output_shape(self, shape: Shape) -> Shape:
        if len(shape) != 1:
            raise NetworkError(f"Linear wants flattened features, got {shape}; put a Flatten first")
        return (self.out_features,)

    def parameter_shapes(self, shape: Shape) -> dict[str, Shape]:
        return {"weight": (self.out_features, shape[0]), "bias": (self.out_features,)}

    def macs(self, shape: Shape) -> int:
        return self.out_features * shape[0]


@dataclass(frozen=True, slots=True)
class BatchNorm2d:
    """(x - running_mean) / sqrt(running_var + eps) * weight + bias, channel by channel."""

    eps: float = 1e-5

    def output_shape(self, shape: Shape) -> Shape:
        return _features(shape, "BatchNorm2d")

    def parameter_shapes(self, shape: Shape) -> dict[str, Shape]:
        return dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (shape[0],))


@dataclass(frozen=True, slots=True)
class LocalResponseNorm:
    """x / (k + alpha/size * sum of squares over `size` channels) ** beta, as torch defines it.

    Neighbours are those of the same group: with `groups` 2 each tower is normalised by itself.
    """

    size: int
    alpha: float = 1e-4
    beta: float = 0.75
    k: float = 1.0
    groups: int = 1

    def output_shape(self, shape: Shape) -> Shape:
        if _features(shape, "LocalResponseNorm")[0] % self.groups:
            raise NetworkError(f"{shape[0]} channels do not divide into {self.groups} groups")
        return shape


@dataclass(frozen=True, slots=True)
class Nonlinearity:
    """An activation, element by element; the plan fuses it into the layer before.

    A subclass names its row in `kernels.epilogue.ACTIVATIONS`; its fields are that row's
    parameters, in that order.
    """

    row: ClassVar[str]

    @property
    def activation(self) -> str | tuple[str | float, ...]:
        """As the kernels take it."""
        values = astuple(self)
        return (self.row, *values) if values else self.row

    def output_shape(self, shape: Shape) -> Shape:
        return shape


@dataclass(frozen=True, slots=True)
class ReLU(Nonlinearity):
    """max(x, 0)"""

    row = "relu"


@dataclass(frozen=True, slots=True)
class Sigmoid(Nonlinearity):
    """1 / (1 + exp(-x))"""

    row = "sigmoid"


@dataclass(frozen=True, slots=True)
class Softmax:
    """exp(x) / sum of exp(x), over the classes of one image."""

    def output_shape(self, shape: Shape) -> Shape:
        return shape


@dataclass(frozen=True, slots=True)
class Dropout:
    """The identity: this is an inference engine. Kept so that the network reads as published."""

    p: float = 0.5

    def output_shape(self, shape: Shape) -> Shape:
        return shape


@dataclass(frozen=True, slots=True)
class Flatten:
    """(C, H, W) to (C*H*W,), in that order."""

    def output_shape(self, shape: Shape) -> Shape:
        return (math.prod(shape),)


@dataclass(frozen=True, slots=True)
class Gather:
    """The channels of all towers side by side; a split network has one where towers meet."""

    towers: int

    def output_shape(self, shape: Shape) -> Shape:
        return (shape[0] * self.towers, *shape[1:])


Owner = Conv2d | Linear | BatchNorm2d  # the layers that own parameters
Layer = (
    Owner
    | MaxPool2d
    | AvgPool2d
    | AdaptiveAvgPool2d
    | LocalResponseNorm
    | Nonlinearity
    | Softmax
    | Dropout
    | Flatten
    | Gather
)


def _positive(shape: Shape, came: Shape) -> Shape:
    if min(shape) < 1:
        raise TooSmall(f"input {came} is too small: the output would be {shape}")
    return shape


@dataclass(frozen=True, slots=True)
class Preprocess:
    """From a picture to the network's input: torchvision's `ImageClassification` preset.

    The shorter side is resized to `resize` (bilinear, antialiased), the centre `crop`² is cut out,
    pixels become `(value / 255 - mean) / std`, channel by channel.
    """

    resize: int
    crop: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Network:
    """A named chain of named layers, the shape of the image it is published for, and its words.

    `classes` names the file of class names beside `zoo.py`, one a line; `weights` is the source
    of its published state, as `weights.load` takes it, None where nobody publishes one.
    """

    name: str
    input_shape: Shape
    layers: tuple[tuple[str, Layer], ...]
    preprocess: Preprocess
    classes: str
    weights: str | None = None

    def walk(self, input_shape: Shape | None = None) -> Iterator[tuple[str, Layer, Shape, Shape]]:
        """Each layer as `(name, layer, input shape, output shape)`, for this image shape.

        Raises NetworkError naming the first layer that the shape does not fit.
        """
        shape = self.input_shape if input_shape is None else input_shape
        for name, layer in self.layers:
            try:
                output = layer.output_shape(shape)
            except NetworkError as error:
                least = self.least_side() if isinstance(error, TooSmall) else None
                cure = f"; images from {least}x{least} fit" if least else ""
                raise NetworkError(f"{self.name}, layer {name}: {error}{cure}") from None
            yield name, layer, shape, output
            shape = output

    def least_side(self) -> int | None:
        """The smallest square image on which every window finds a place; None if none is."""
        channels, *sides = self.input_shape
        for side in range(1, max(sides) + 1):
            with suppress(TooSmall):
                shape: Shape = (channels, side, side)
                for _, layer in self.layers:
                    shape = layer.output_shape(shape)
                return side
        return None

    def output_shape(self, input_shape: Shape | None = None) -> Shape:
        """Shape of what the last layer makes of one image."""
        return list(self.walk(input_shape))[-1][3]

    def parameter_shapes(self) -> dict[str, Shape]:
        """The canonical state: `{"conv1.weight": (64, 3, 11, 11), ...}`, in network order."""
        return {
            f"{name}.{key}": wanted
            for name, layer, shape, _ in self.walk()
            if isinstance(layer, Owner)
            for key, wanted in layer.parameter_shapes(shape).items()
        }

    @property
    def head(self) -> str | None:
        """The last linear layer, whose outputs are the classes; None where there is none."""
        return next((name for name, layer in self.layers[::-1] if isinstance(layer, Linear)), None)

    def with_outputs(self, count: int) -> Network:
        """This network with another number of classes, which have no words and no weights."""
        if self.head is None or dict(self.layers)[self.head] == Linear(count):
            return self
        layers = tuple((n, Linear(count) if n == self.head else layer) for n, layer in self.layers)
        return replace(self, layers=layers, classes="", weights=None)

    def flattened(self) -> dict[str, Shape]:
        """What a linear weight after a `Flatten` was flattened from: `{"fc6.weight": (C, H, W)}`.

        Frameworks that keep channels last flatten (H, W, C); their columns must be permuted.
        """
        found: dict[str, Shape] = {}
        before: Shape | None = None
        for name, layer, shape, _ in self.walk():
            if isinstance(layer, Flatten):
                before = shape
            if isinstance(layer, Linear) and before is not None:
                found[f"{name}.weight"] = before
                before = None
        return found
