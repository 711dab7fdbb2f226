"""The canonical state as a file: fast to load, and nothing in it can run."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from .state import WeightsError


def save(state: Mapping[str, torch.Tensor], path: str | os.PathLike[str]) -> None:
    """Write a canonical state to a `.safetensors` file, whole or not at all.

    Raises WeightsError for another suffix and where the file cannot be written, OSError for its
    folder.
    """
    target = Path(os.path.expanduser(path))
    if target.suffix != ".safetensors":
        raise WeightsError(f"{target}: wanted a name ending in .safetensors, got {target.suffix!r}")
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        written = Path(folder) / target.name
        try:
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, written)
        except SafetensorError as error:
            raise WeightsError(f"{target}: cannot be written: {error}") from None
        written.replace(target)
