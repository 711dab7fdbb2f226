"""A chain of layers, as it is read from somebody else's graph: its names, its weights, its network.

Names are as in `zoo.py` (conv1, relu1, norm1, pool1, ..., fc6), by a running count of the layers
with weights. What such a graph does not say: pictures are prepared by torchvision's preset for a
crop of H, or merely scaled to 0..1 if there are not three channels; 1000 outputs are ImageNet's
classes, and any other number has no names (`classes` is "").
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

import torch

from .. import weights
from ..errors import Error
from .spec import Conv2d, Layer, Linear, Network, NetworkError, Owner, Preprocess, Shape

State = dict[str, torch.Tensor]

_ALONE = ("avgpool", "flatten", "sigmoid", "softmax")  # names without a number


class Chain:
    """Collects layers and state; `shape` is that of one image as the last of them leaves it."""

    def __init__(self, name: str, shape: Shape) -> None:
        self.layers: list[tuple[str, Layer]] = []
        self.state: State = {}
        self.shape = shape
        self._name = name
        self._input = shape
        self._names: Counter[str] = Counter()  # without the number that tells twins apart
        self._weighted = 0
        self._unbiased = False  # whether a bias may still follow the last layer

    def append(
        self, stem: str, layer: Layer, tensors: Mapping[str, torch.Tensor] = MappingProxyType({})
    ) -> None:
        """A layer with a copy of its tensors by key; a bias that is left out is zero.

        Raises NetworkError for a layer that does not fit here, WeightsError for such tensors.
        """
        shape, given = layer.output_shape(self.shape), dict(tensors)
        name = self._named(stem)
        self._unbiased = isinstance(layer, Conv2d | Linear) and "bias" not in given
        if self._unbiased:
            given["bias"] = given["weight"].new_zeros(len(given["weight"]))
        if isinstance(layer, Linear):
            given["bias"] = _by_channel(given["bias"], shape)
        if isinstance(layer, Owner):
            self._keep(name, given, layer.parameter_shapes(self.shape))
        self.layers.append((name, layer))
        self.shape = shape

    def add_bias(self, bias: torch.Tensor) -> None:
        """What an exporter wrote apart: the bias of the layer before. Raises as `append` does."""
        if not self._unbiased:
            raise NetworkError("wanted a convolution or linear layer without a bias before it")
        bias = _by_channel(bias, self.shape)
        self._keep(self.layers[-1][0], {"bias": bias}, {"bias": tuple(bias.shape)})
        self._unbiased = False

    def network(self) -> Network:
        """All of it, called by its name."""
        return Network(
            self._name,
            self._input,
            tuple(self.layers),
            preset(*self._input[:2]),
            classes="imagenet.txt" if self.shape == (1000,) else "",
        )

    def _keep(
        self, name: str, tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, Shape]
    ) -> None:
        given = {f"{name}.{key}": tensor for key, tensor in tensors.items()}
        expected = {f"{name}.{key}": shape for key, shape in shapes.items()}
        self.state |= weights.load(given, expected, network=self._name)

    def _named(self, stem: str) -> str:
        """As `zoo.py` would call it: numbered by the layer with weights that it goes with."""
        if stem in ("conv", "fc"):
            self._weighted += 1
        number = self._weighted + (stem == "drop")  # a dropout goes with the layer after it
        name = stem if stem in _ALONE else f"{stem}{number}"
        self._names[name] += 1
        again = self._names[name]
        return name if again == 1 else f"{name}_{again}"


@contextmanager
def fitting(refused: Callable[[object], Error]) -> Iterator[None]:
    """What a chain refuses is refused by its node."""
    try:
        yield
    except (NetworkError, weights.WeightsError) as error:
        raise refused(error) from None


def preset(channels: int, crop: int) -> Preprocess:
    """torchvision's for ImageNet, scaled to `crop`; other than three channels come as 0 to 1."""
    resize = round(crop * 256 / 224)
    if channels != 3:
        return Preprocess(resize, crop, mean=(0.0,) * channels, std=(1.0,) * channels)
    return Preprocess(resize, crop, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def _by_channel(bias: torch.Tensor, shape: Shape) -> torch.Tensor:
    """What is added to [N, *shape], as one number for each channel if it is no more than that."""
    wanted = (1, shape[0], *(1 for _ in shape[1:]))
    try:
        return bias.broadcast_to(wanted).reshape(-1)
    except RuntimeError:
        got = tuple(bias.shape)
        raise NetworkError(f"wanted a bias that fits {wanted}, got {got}") from None
