"""Where a state can come from, and the one function that gets it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum
from os import PathLike, fsdecode
from os.path import exists, expanduser
from pathlib import Path
from types import MappingProxyType

import torch

from . import digits, download
from .files import SUFFIXES, read
from .seeded import MAX_SEED, seeded
from .state import Shapes, State, WeightsError, canonical, named, unfit

Source = str | PathLike[str] | Mapping[str, torch.Tensor] | Enum


def load(
    source: Source,
    expected: Shapes,
    *,
    network: str,
    flattened: Shapes = MappingProxyType({}),
    head: str | None = None,
) -> State:
    """The canonical state of the network called `network` from `source` (see the package).

    `expected` maps tensor names to shapes, in network order; the result has the same names in the
    same order, each a float32, contiguous, finite CPU tensor that shares memory with nothing.
    `flattened` maps the weight of each linear layer after a flatten to the (C, H, W) that it was
    flattened from; only files of frameworks that flatten in another order ask for it. `head` names
    the layer that may have another number of outputs in a file or a state dict, as after
    fine-tuning.

    Raises WeightsError, one line, when the source is unknown, out of reach, or does not fit.
    """
    match source:
        case Enum() if not isinstance(source, str):  # AlexNet_Weights.DEFAULT
            path = _by_torchvision(source, network)
        case Mapping():
            with named("state dict"):
                return canonical(source, expected, head)
        case torch.nn.Module():
            got = f"the module {type(source).__name__}"
            raise unfit("weights:", "a state dict", got, "pass model.state_dict()")
        case "imagenet" | "DEFAULT" | "IMAGENET1K_V1":
            _only_for("alexnet", network, source)
            path = download.fetch(download.IMAGENET_URL, download.IMAGENET_SHA256)
        case "digits":
            _only_for("digits", network, source)
            path = digits.weights_file()
        case str() if source.startswith("random:"):
            return seeded(expected, _seed(source))
        case str() | PathLike() if Path(word := fsdecode(source)).suffix or exists(word):
            path = Path(expanduser(word))
        case _:
            raise WeightsError(
                f"unknown weights {source!r}; wanted 'imagenet', 'digits', 'random:SEED', "
                f"a {', '.join(SUFFIXES)} file, or a state dict"
            )
    with named(path):
        return canonical(read(path, expected, flattened, head), expected, head)


def _by_torchvision(member: Enum, network: str) -> Path:
    """The file that a member of a torchvision weights enum names, for the network it is of."""
    url = str(getattr(member.value, "url", ""))
    file = re.fullmatch(r"([a-z0-9]+)(?:-owt)?-([0-9a-f]{8})\.pth", url.rpartition("/")[2])
    if not file:
        raise WeightsError(
            f"weights {member}: wanted torchvision's of an AlexNet or a VGG, whole, got {url!r}"
        )
    _only_for(file[1], network, str(member))
    return download.fetch(url, file[2])


def _only_for(owner: str, network: str, source: str) -> None:
    if network != owner:
        cure = "use 'random:SEED', a file or a state dict"
        raise unfit(f"weights {source!r}", f"network {owner!r}", repr(network), cure)


def _seed(source: str) -> int:
    digits = source.removeprefix("random:")
    if not re.fullmatch("[0-9]{1,10}", digits) or int(digits) > MAX_SEED:
        seed, cure = f"a seed from 0 to {MAX_SEED}", "for example 'random:0'"
        raise unfit(f"weights {source[:99]!r}:", seed, repr(digits[:99]), cure)
    return int(digits)
