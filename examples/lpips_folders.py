"""How far apart the images of two folders look, by name: LPIPS, the least alike first.

    python examples/lpips_folders.py originals/ compressed/

`alexnet-triton distance` does this for any number of images; here is what it takes in Python. Only
images of one size can be stacked, so each size is a batch of its own. Nothing is downloaded with
`--weights random:0`, whose distances mean little; `--backend torch` is the fast way on a CPU.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from alexnet_triton import LPIPS
from PIL import Image


def pixels(path: Path) -> torch.Tensor:
    """float32 [3, H, W] from -1 to 1."""
    image = np.array(Image.open(path).convert("RGB"), np.float32)
    return torch.from_numpy(image / 127.5 - 1).movedim(-1, 0)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a distance and a name a line."""
    parser = argparse.ArgumentParser(description="How far apart two folders' images look.")
    parser.add_argument("folders", nargs=2, type=Path)
    parser.add_argument("--weights", help="an AlexNet's (default: ImageNet's)")
    parser.add_argument("--backend", default="triton", choices=("triton", "torch"))
    options = parser.parse_args(arguments)
    first, second = options.folders
    lpips = LPIPS(options.weights, backend=options.backend)
    sizes = defaultdict(list)  # names by the size of their images
    for name in sorted({p.name for p in first.iterdir()} & {p.name for p in second.iterdir()}):
        if Path(name).suffix.lower() in Image.registered_extensions():
            sizes[Image.open(first / name).size].append(name)
    found: list[tuple[float, str]] = []
    for names in sizes.values():
        a, b = (torch.stack([pixels(at / name) for name in names]) for at in (first, second))
        found += zip(lpips(a, b).flatten().tolist(), names, strict=True)
    for distance, name in sorted(found, reverse=True):
        print(f"{distance:.4f} {name}")


if __name__ == "__main__":
    main()
