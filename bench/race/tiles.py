"""A network that no one trains: every size of its layers is two or three tiles of 64, and odd.

Digits' layers are smaller than a tile, and AlexNet's keep an interpreter busy for minutes. Layers
bear AlexNet's names: a candidate is raced by the same words with a GPU and without.
"""

from __future__ import annotations

from ...engine.spec import AdaptiveAvgPool2d, Conv2d, Flatten, Linear, Network, Preprocess, ReLU

TILES = Network(
    "tiles",
    (3, 2, 3),
    (
        ("conv1", Conv2d(130, 1)),
        ("relu1", ReLU()),
        ("conv3", Conv2d(150, 3, padding=1)),
        ("relu3", ReLU()),
        ("avgpool", AdaptiveAvgPool2d(1)),
        ("flatten", Flatten()),
        ("fc6", Linear(139)),
        ("relu6", ReLU()),
    ),
    Preprocess(3, 3, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
    classes="",
)
IMAGES = 131
"""A batch of two tiles of images and a rest."""
