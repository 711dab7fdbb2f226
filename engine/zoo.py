"""The networks, as data.

`alexnet` is torchvision's: Krizhevsky, "One weird trick for parallelizing convolutional neural
networks" (arXiv 1404.5997), one tower. `digits` is the same net at an eighth of the width, on
handwritten digits, small enough to ship with its weights. `alexnet2012` is the original of
Krizhevsky, Sutskever and Hinton (NIPS 2012): two towers, which are groups, and response
normalisation. `alexnet_single_tower` and `alexnet_keras_bn` are what most Keras code calls AlexNet.
`zfnet` is Zeiler and Fergus (arXiv 1311.2901), `vgg*` Simonyan and Zisserman (arXiv 1409.1556) as
torchvision has them.
"""

from __future__ import annotations

from typing import Literal

from .spec import (
    AdaptiveAvgPool2d,
    BatchNorm2d,
    Conv2d,
    Dropout,
    Flatten,
    Layer,
    Linear,
    LocalResponseNorm,
    MaxPool2d,
    Network,
    NetworkError,
    Preprocess,
    ReLU,
    Sigmoid,
    Softmax,
)

Layers = tuple[tuple[str, Layer], ...]


def _preset(crop: int) -> Preprocess:
    """torchvision's preset for ImageNet."""
    return Preprocess(256, crop, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def _head(units: int, classes: int, *, drop: Literal["before", "after"] | None) -> Layers:
    """fc6 to fc8; torchvision has dropouts before linear layers in AlexNet, after them in VGGs."""
    layers: list[tuple[str, Layer]] = [("flatten", Flatten())]
    for number in (6, 7):
        dropout = (f"drop{number}", Dropout())
        layers += [dropout] * (drop == "before")
        layers += [(f"fc{number}", Linear(units)), (f"relu{number}", ReLU())]
        layers += [dropout] * (drop == "after")
    return (*layers, ("fc8", Linear(classes)))


_FOLLOWERS = {LocalResponseNorm: "norm", BatchNorm2d: "bn", MaxPool2d: "pool"}


def _stage(number: int | str, convolution: Conv2d, *followers: Layer) -> Layers:
    """A convolution with its ReLU and what follows, named by its number: conv1, relu1, pool1."""
    named = ((f"{_FOLLOWERS[type(layer)]}{number}", layer) for layer in followers)
    return ((f"conv{number}", convolution), (f"relu{number}", ReLU()), *named)


POOL = MaxPool2d(3, stride=2)


def _one_weird_trick(width: float, classes: int) -> Layers:
    def scaled(channels: int) -> int:
        return int(channels * width)

    return (
        *_stage(1, Conv2d(scaled(64), 11, stride=4, padding=2), POOL),
        *_stage(2, Conv2d(scaled(192), 5, padding=2), POOL),
        *_stage(3, Conv2d(scaled(384), 3, padding=1)),
        *_stage(4, Conv2d(scaled(256), 3, padding=1)),
        *_stage(5, Conv2d(scaled(256), 3, padding=1), POOL),
        ("avgpool", AdaptiveAvgPool2d(6)),
        *_head(scaled(4096), classes, drop="before"),
    )


def alexnet2012(
    *, width: float = 1, padding: int = 0, norm: LocalResponseNorm | None = None
) -> Layers:
    """The layers of 2012, two towers as groups.

    `padding` 2 on conv1 makes the same 55x55 of a 224 image that 0 makes of a 227 one. `norm`
    defaults to the paper's: its alpha of 1e-4 is not divided by the size, torch's is, and each
    tower normalises its own maps, as each GPU did.
    """
    norm = norm or LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0, groups=2)

    def scaled(channels: int) -> int:
        return int(channels * width)

    return (
        *_stage(1, Conv2d(scaled(96), 11, stride=4, padding=padding), norm, POOL),
        *_stage(2, Conv2d(scaled(256), 5, padding=2, groups=2), norm, POOL),
        *_stage(3, Conv2d(scaled(384), 3, padding=1)),
        *_stage(4, Conv2d(scaled(384), 3, padding=1, groups=2)),
        *_stage(5, Conv2d(scaled(256), 3, padding=1, groups=2), POOL),
        *_head(scaled(4096), 1000, drop="before"),
    )


def _single_tower() -> Layers:
    return (
        *_stage(1, Conv2d(96, 11, stride=4), POOL),
        *_stage(2, Conv2d(256, 5, padding=2), POOL),
        *_stage(3, Conv2d(384, 3, padding=1)),
        *_stage(4, Conv2d(384, 3, padding=1)),
        *_stage(5, Conv2d(256, 3, padding=1), POOL),
        *_head(4096, 1000, drop="before"),
        ("softmax", Softmax()),
    )


def _keras_bn() -> Layers:
    return (
        *_stage(1, Conv2d(96, 11, stride=4), BatchNorm2d(eps=1e-3), POOL),
        *_stage(2, Conv2d(256, 5), BatchNorm2d(eps=1e-3), POOL),
        *_stage(3, Conv2d(384, 3)),
        *_stage(4, Conv2d(384, 3)),
        *_stage(5, Conv2d(256, 3), POOL),
        *_head(4096, 1, drop=None),
        ("sigmoid", Sigmoid()),
    )


def _zfnet() -> Layers:
    last_kept = MaxPool2d(3, stride=2, ceil_mode=True)
    return (
        *_stage(1, Conv2d(96, 7, stride=2, padding=1), last_kept),
        *_stage(2, Conv2d(256, 5, stride=2), last_kept),
        *_stage(3, Conv2d(384, 3, padding=1)),
        *_stage(4, Conv2d(384, 3, padding=1)),
        *_stage(5, Conv2d(256, 3, padding=1), POOL),
        *_head(4096, 1000, drop="before"),
    )


def vgg(stages: tuple[int, ...], *, width: float = 1) -> Layers:
    """A VGG with that many 3x3 convolutions in each of its five stages."""
    layers: list[tuple[str, Layer]] = []
    for stage, count in enumerate(stages, start=1):
        channels = int(min(64 * 2 ** (stage - 1), 512) * width)
        for i in range(1, count + 1):
            layers += _stage(f"{stage}_{i}", Conv2d(channels, 3, padding=1))
        layers.append((f"pool{stage}", MaxPool2d(2, stride=2)))
    return (
        *layers,
        ("avgpool", AdaptiveAvgPool2d(7)),
        *_head(int(4096 * width), 1000, drop="after"),
    )


def _imagenet(name: str, layers: Layers, *, size: int = 224, weights: str | None = None) -> Network:
    return Network(name, (3, size, size), layers, _preset(size), "imagenet.txt", weights)


ALEXNET = _imagenet("alexnet", _one_weird_trick(1, 1000), weights="imagenet")

DIGITS = Network(
    name="digits",
    input_shape=(3, 64, 64),
    layers=_one_weird_trick(1 / 8, 10),
    preprocess=Preprocess(64, 64, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    classes="digits.txt",
    weights="digits",
)

ALEXNET_KERAS_BN = Network(
    name="alexnet_keras_bn",
    input_shape=(3, 224, 224),
    layers=_keras_bn(),
    preprocess=Preprocess(224, 224, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
    classes="cats_dogs.txt",
)

# Caffe's bvlc_alexnet normalises across both towers, divides alpha, and has k 1.
CAFFE_NORM = LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0)

NETWORKS = {
    network.name: network
    for network in (
        ALEXNET,
        DIGITS,
        _imagenet("alexnet2012", alexnet2012(), size=227),
        _imagenet("alexnet2012_224", alexnet2012(padding=2)),
        _imagenet("alexnet2012_caffe", alexnet2012(norm=CAFFE_NORM), size=227),
        _imagenet("alexnet_single_tower", _single_tower(), size=227),
        ALEXNET_KERAS_BN,
        _imagenet("zfnet", _zfnet()),
        _imagenet("vgg11", vgg((1, 1, 2, 2, 2))),
        _imagenet("vgg13", vgg((2, 2, 2, 2, 2))),
        _imagenet("vgg16", vgg((2, 2, 3, 3, 3))),
        _imagenet("vgg19", vgg((2, 2, 4, 4, 4))),
    )
}


def network(name: str) -> Network:
    """The network of that name; NetworkError lists the legal names."""
    try:
        return NETWORKS[name]
    except KeyError:
        raise NetworkError(
            f"unknown network {name!r}; known: {', '.join(sorted(NETWORKS))}"
        ) from None
