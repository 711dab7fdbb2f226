"""Where a state can come from, and the one function that gets it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from types import MappingProxyType

import torch

from . import digits, download
from .files import SUFFIXES, read
from .seeded import MAX_SEED, seeded
from .state import State, WeightsError, canonical

Source = str | PathLike[str] | Mapping[str, torch.Tensor]


def load(
    source: Source,
    expected: Mapping[str, tuple[int, ...]],
    *,
    network: str,
    flattened: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> State:
    """The canonical state of the network called `network` from `source` (see the package).

    `expected` maps tensor names to shapes, in network order; the result has the same names in the
    same order, each a float32, contiguous, finite CPU tensor that shares memory with nothing.
    `flattened` maps the weight of each linear layer after a flatten to the (C, H, W) that it was
    flattened from; only files of frameworks that flatten in another order ask for it.

    Raises WeightsError, one line, when the source is unknown, out of reach, or does not fit.
    """
    match source:
        case Mapping():
            return canonical(source, expected, "state dict")
        case "imagenet":
            _only_for("alexnet", network, source)
            path = download.fetch(download.IMAGENET_URL, download.IMAGENET_SHA256)
        case "digits":
            _only_for("digits", network, source)
            path = digits.weights_file()
        case str() if source.startswith("random:"):
            return seeded(expected, _seed(source))
        case str() | PathLike() if Path(source).suffix or Path(source).exists():
            path = Path(source).expanduser()
        case _:
            raise WeightsError(
                f"unknown weights {source!r}; wanted 'imagenet', 'digits', 'random:SEED', "
                f"a {', '.join(SUFFIXES)} file, or a state dict"
            )
    return canonical(read(path, expected, flattened), expected, str(path))


def _only_for(owner: str, network: str, source: str) -> None:
    if network != owner:
        raise WeightsError(
            f"weights {source!r} wanted network {owner!r}, got {network!r}; "
            "cure: use 'random:SEED', a file or a state dict"
        )


def _seed(source: str) -> int:
    digits = source.removeprefix("random:")
    if not re.fullmatch("[0-9]{1,10}", digits) or int(digits) > MAX_SEED:
        raise WeightsError(
            f"weights {source!r}: wanted a seed from 0 to {MAX_SEED}, got {digits!r}; "
            "cure: for example 'random:0'"
        )
    return int(digits)
