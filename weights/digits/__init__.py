"""The embedded model: an eighth-width AlexNet for handwritten digits, and pictures to try it on.

`README.md` tells the source, the split and the accuracy; `tools/train_digits.py` of the checkout
made the other files here.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path


def weights_file() -> Path:
    """The model's `.safetensors` file, canonical names, float16."""
    return _home() / "digits.safetensors"


def heldout() -> list[tuple[Path, int]]:
    """The pictures never trained on, each with its digit, sorted by digit and index.

    8x8 grey PNG files, `heldout/<digit>/<index>.png`, the index being that of scikit-learn's
    `load_digits`.
    """
    return sorted((path, int(path.parent.name)) for path in _home().glob("heldout/*/*.png"))


def _home() -> Path:
    return Path(str(resources.files(__package__)))
