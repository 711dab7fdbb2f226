"""torchvision's names of an AlexNet's or a VGG's layers, for those of this engine.

torchvision numbers the modules of each half: `features.0` is the first convolution, `features.1`
its ReLU, `features.2` the pool behind it. Here a kernel ends behind the ReLU, so `features.1` is
what `conv1` gives, and nobody has what `features.0` does.
"""

from __future__ import annotations

import re

from .fuse import fuse
from .spec import AdaptiveAvgPool2d, Dropout, Flatten, Network, NetworkError


def canonical(network: Network, name: str) -> str:
    """The network's own name of the layer that torchvision calls `name`; any other stays.

    Raises NetworkError for a layer whose output another one is fused into.
    """
    found = re.fullmatch(r"(features|classifier)\.([0-9]{1,4})", name)
    if found is None or name in dict(network.layers):
        return name
    layer = dict(_numbered(network)).get(name)
    for block in fuse(network):
        if layer == block.layers[-1]:
            return block.name
        if layer in block.layers:
            last = {own: theirs for theirs, own in _numbered(network)}[block.layers[-1]]
            raise NetworkError(
                f"{network.name} has no features {name!r}: one kernel makes {layer} and what "
                f"follows it; ask for {last!r}, which is {block.name!r} after its activation"
            )
    return name


def _numbered(network: Network) -> list[tuple[str, str]]:
    """Each of torchvision's names with the network's own; none where it has no such halves.

    Nor where there is no dropout: what wrote an ONNX file left it out, and more that has a number.
    """
    kinds = [type(layer) for _, layer in network.layers]
    if not {AdaptiveAvgPool2d, Flatten, Dropout} <= {*kinds}:
        return []
    names = [name for name, _ in network.layers]
    features = names[: kinds.index(AdaptiveAvgPool2d)]
    halves = {"features": features, "classifier": names[kinds.index(Flatten) + 1 :]}
    return [(f"{half}.{n}", own) for half, each in halves.items() for n, own in enumerate(each)]
