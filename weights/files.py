"""What a file holds, read without ever running what is in it."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from textwrap import shorten

from safetensors.torch import load_file

from . import checkpoint, keras
from .state import Shapes, WeightsError, unfit

SUFFIXES = (".pth", ".pt", ".tar", ".ckpt", ".bin", ".safetensors", *keras.SUFFIXES)
"""All but the last three are names that people give to files of torch.save."""

_AGAIN = "download or save it again"


def read(path: Path, expected: Shapes, flattened: Shapes, head: str | None = None) -> object:
    """The content of a file with one of `SUFFIXES`, on the CPU; a state dict, one hopes.

    Keras files have neither our names nor our layout: they are read with the network's `expected`
    shapes, `flattened` volumes and `head` in hand (see `keras.read`).

    Raises WeightsError for a folder, a missing or empty file, another suffix, a file that is
    truncated or corrupt, and a pickle that asks for anything but tensors and plain containers.
    """
    suffix = path.suffix.lower()
    if path.is_dir():
        raise unfit("", "a file", "a folder", "name the file in it")
    if suffix not in SUFFIXES:
        raise WeightsError(f"wanted a file ending in {', '.join(SUFFIXES)}, got {suffix!r}")
    if not path.exists():
        raise WeightsError("no such file; cure: check the path")
    if path.stat().st_size == 0:
        raise WeightsError(f"the file is empty; cure: {_AGAIN}")
    try:
        if suffix in keras.SUFFIXES:
            return keras.read(path, expected, flattened, head)
        return load_file(path) if suffix == ".safetensors" else checkpoint.read(path)
    except WeightsError:
        raise
    except UnpicklingError as error:
        reason, cure = (*error.args, "save model.state_dict(), or a .safetensors file")[:2]
        raise WeightsError(f"refused, nothing in it was run: {reason}; cure: {cure}") from None
    except Exception as error:  # broken bytes raise nearly anything in the parsers below
        reason = shorten(f"{type(error).__name__}: {error}"[:1000].partition(". ")[0], 120)
        crc = suffix in (".pth", ".pt") and "CRC-32" in reason
        how = ", with torch.serialization.set_crc32_options(True)" if crc else ""
        raise WeightsError(f"cannot be read as {suffix} ({reason}); cure: {_AGAIN}{how}") from None
