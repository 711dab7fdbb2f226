"""What a file holds, read without ever running what is in it."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten

import torch
from safetensors.torch import load_file

from . import keras
from .state import WeightsError

SUFFIXES = (".pth", ".pt", ".safetensors", *keras.SUFFIXES)


def read(
    path: Path,
    expected: Mapping[str, tuple[int, ...]],
    flattened: Mapping[str, tuple[int, ...]],
) -> object:
    """The content of a file with one of `SUFFIXES`, on the CPU; a state dict, one hopes.

    Keras files have neither our names nor our layout: they are read with the network's `expected`
    shapes and `flattened` volumes in hand (see `keras.read`).

    Raises WeightsError for a folder, a missing or empty file, another suffix, a file that is
    truncated or corrupt, and a pickle that asks for anything but tensors and plain containers.
    """
    suffix = path.suffix.lower()
    if path.is_dir():
        raise WeightsError(f"{path}: wanted a file, got a folder; cure: name the file in it")
    if suffix not in SUFFIXES:
        raise WeightsError(f"{path}: wanted a file ending in {', '.join(SUFFIXES)}, got {suffix!r}")
    if not path.exists():
        raise WeightsError(f"{path}: no such file; cure: check the path")
    if path.stat().st_size == 0:
        raise WeightsError(f"{path}: the file is empty; cure: download or save it again")
    try:
        if suffix in keras.SUFFIXES:
            return keras.read(path, expected, flattened)
        return load_file(path) if suffix == ".safetensors" else _unpickled(path)
    except WeightsError:
        raise
    except Exception as error:  # broken bytes raise nearly anything in the parsers below
        reason = shorten(f"{type(error).__name__}: {error}".partition(". ")[0], 120)
        raise WeightsError(
            f"{path}: cannot be read as {suffix} ({reason}); cure: download or save it again"
        ) from None


def _unpickled(path: Path) -> object:
    """torch's restricted unpickler knows tensors and containers, and refuses every other name."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of pickle protocols; the refusal says all
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"its pickle asks for {named[1]}" if named else "it is no pickle of plain tensors"
        raise WeightsError(
            f"{path}: refused, nothing in it was run: {what}; "
            "cure: save model.state_dict(), or a .safetensors file"
        ) from None
