"""The networks, as data.

`alexnet` is torchvision's: Krizhevsky, "One weird trick for parallelizing convolutional neural
networks" (arXiv 1404.5997), one tower. `digits` is the same net at an eighth of the width, on
handwritten digits, small enough to ship with its weights.
"""

from __future__ import annotations

from .spec import (
    AdaptiveAvgPool2d,
    Conv2d,
    Dropout,
    Flatten,
    Layer,
    Linear,
    MaxPool2d,
    Network,
    NetworkError,
    Preprocess,
    ReLU,
)


def _alexnet_layers(width: float, classes: int) -> tuple[tuple[str, Layer], ...]:
    def scaled(channels: int) -> int:
        return int(channels * width)

    return (
        ("conv1", Conv2d(scaled(64), 11, stride=4, padding=2)),
        ("relu1", ReLU()),
        ("pool1", MaxPool2d(3, stride=2)),
        ("conv2", Conv2d(scaled(192), 5, padding=2)),
        ("relu2", ReLU()),
        ("pool2", MaxPool2d(3, stride=2)),
        ("conv3", Conv2d(scaled(384), 3, padding=1)),
        ("relu3", ReLU()),
        ("conv4", Conv2d(scaled(256), 3, padding=1)),
        ("relu4", ReLU()),
        ("conv5", Conv2d(scaled(256), 3, padding=1)),
        ("relu5", ReLU()),
        ("pool5", MaxPool2d(3, stride=2)),
        ("avgpool", AdaptiveAvgPool2d(6)),
        ("flatten", Flatten()),
        ("drop6", Dropout()),
        ("fc6", Linear(scaled(4096))),
        ("relu6", ReLU()),
        ("drop7", Dropout()),
        ("fc7", Linear(scaled(4096))),
        ("relu7", ReLU()),
        ("fc8", Linear(classes)),
    )


ALEXNET = Network(
    name="alexnet",
    input_shape=(3, 224, 224),
    layers=_alexnet_layers(1, 1000),
    preprocess=Preprocess(256, 224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    classes="imagenet.txt",
    weights="imagenet",
)

DIGITS = Network(
    name="digits",
    input_shape=(3, 64, 64),
    layers=_alexnet_layers(1 / 8, 10),
    preprocess=Preprocess(64, 64, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    classes="digits.txt",
    weights="digits",
)

NETWORKS = {network.name: network for network in (ALEXNET, DIGITS)}


def network(name: str) -> Network:
    """The network of that name; NetworkError lists the legal names."""
    try:
        return NETWORKS[name]
    except KeyError:
        raise NetworkError(
            f"unknown network {name!r}; known: {', '.join(sorted(NETWORKS))}"
        ) from None
