"""The heads of LPIPS on AlexNet, version 0.1: how much each channel of a layer counts.

`README.md` tells where they are from, `LICENSE` under what terms they are shared.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import torch
from safetensors.torch import load_file


def heads() -> dict[str, torch.Tensor]:
    """The weight of every channel, none negative: float32 [C] for conv1 to conv5."""
    return load_file(Path(str(resources.files(__package__))) / "alex.safetensors")
