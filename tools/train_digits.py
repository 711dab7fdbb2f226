"""Trains the embedded digits model and writes everything that ships with it.

    pip install -e '.[train]' && python tools/train_digits.py [--seed N] [--epochs N] [--out FOLDER]

The recipe was chosen on a part of the training pictures; the held-out ones serve for the final
figure alone. On one machine a seed always gives the same weights: one thread, deterministic
algorithms.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from alexnet_triton.engine import spec
from alexnet_triton.engine.images import to_batch
from alexnet_triton.engine.reference import normalise
from alexnet_triton.engine.zoo import DIGITS
from alexnet_triton.weights.digits import weights_file
from PIL import Image
from safetensors.torch import save
from torch import nn
from torch.nn import functional as F

SOURCE = (
    "E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, "
    "UCI Machine Learning Repository, 1998, doi 10.24432/C50P49, CC BY 4.0"
)
HELDOUT_PER_DIGIT = 36
BATCH = 32
LEARNING_RATE = 3e-3  # at its highest, early on
WEIGHT_DECAY = 1e-2
SHIFT, TURN, ZOOM = 6 / 64, math.radians(10), 0.1  # augmentation: of the picture, radians, factor


def split(labels: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices to train on and indices held out, each sorted; as many of every digit held out."""
    generator = torch.Generator().manual_seed(seed)
    held = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        of_digit = (labels == digit).nonzero().flatten()
        order = torch.randperm(len(of_digit), generator=generator)
        held[of_digit[order[:HELDOUT_PER_DIGIT]]] = True
    return (~held).nonzero().flatten(), held.nonzero().flatten()


def picture(values: np.ndarray[Any, Any]) -> Image.Image:
    """One digit of the data set, 8x8 values from 0 to 16, as a grey 8-bit picture."""
    return Image.fromarray(np.rint(values * (255 / 16)).astype(np.uint8))


def pixels(pictures: list[Image.Image]) -> torch.Tensor:
    """What the network sees: float32 [N, 3, 64, 64] from -1 to 1, as the engine prepares them."""
    return normalise(to_batch(pictures, DIGITS.preprocess), DIGITS.preprocess, torch.float32)


def model() -> nn.Sequential:
    """The network with untrained weights; its layers carry the canonical names."""
    return nn.Sequential(
        OrderedDict((name, _module(layer, shape)) for name, layer, shape, _ in DIGITS.walk())
    )


def _module(layer: spec.Layer, shape: spec.Shape) -> nn.Module:
    """torch's module for a layer on images of `shape`."""
    match layer:
        case spec.Conv2d(filters, size, stride, padding, 1, 1):
            return nn.Conv2d(shape[0], filters, size, stride, padding)
        case spec.Linear(features):
            return nn.Linear(shape[0], features)
        case spec.MaxPool2d(size, stride, 0, False):
            return nn.MaxPool2d(size, stride)
        case spec.AdaptiveAvgPool2d(size):
            return nn.AdaptiveAvgPool2d(size)
        case spec.Dropout(p):
            return nn.Dropout(p)
        case spec.ReLU():
            return nn.ReLU()
        case spec.Flatten():
            return nn.Flatten()
    raise AssertionError(f"no module for {layer}")


def augment(images: torch.Tensor) -> torch.Tensor:
    """Each image shifted, turned and zoomed a little, at random; the new border is black."""
    count = len(images)
    turn = TURN * (2 * torch.rand(count) - 1)
    zoom = 1 + ZOOM * (2 * torch.rand(count) - 1)
    shift = 2 * SHIFT * (2 * torch.rand(count, 2) - 1)  # grid units: the picture is 2 wide
    cos, sin = zoom * turn.cos(), zoom * turn.sin()
    rows = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], dim=1)
    grid = F.affine_grid(rows.view(count, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1  # 0 outside is -1, black


def train(images: torch.Tensor, labels: torch.Tensor, seed: int, epochs: int) -> nn.Sequential:
    """A model trained on `images` [N, 3, 64, 64] and `labels` [N], in evaluation mode."""
    torch.manual_seed(seed)
    net = model()
    steps = epochs * math.ceil(len(images) / BATCH)
    optimiser = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=steps)
    for epoch in range(epochs):
        total = 0.0
        for batch in torch.randperm(len(images)).split(BATCH):
            logits = net(augment(images[batch]))
            loss = F.cross_entropy(logits, labels[batch], label_smoothing=0.05)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.item() * len(batch)
        print(f"epoch {epoch + 1}/{epochs}  loss {total / len(images):.4f}", flush=True)
    return net.eval()


def rounded(net: nn.Sequential) -> dict[str, torch.Tensor]:
    """The state in float16, as it is stored; `net` goes on with these rounded values."""
    state = {name: tensor.half() for name, tensor in net.state_dict().items()}
    net.load_state_dict(state)
    return state


def main() -> None:
    """Train, write the held-out pictures and the weights with their card, and print the card."""
    from sklearn.datasets import load_digits

    parser = argparse.ArgumentParser(description="Train the embedded digits model.")
    parser.add_argument("--seed", type=int, default=0, help="of the split and the training")
    parser.add_argument("--epochs", type=int, default=40, help="passes over the training pictures")
    parser.add_argument("--out", type=Path, default=weights_file().parent, help="folder to fill")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)

    data = load_digits()
    pictures = [picture(values) for values in data.images]
    images, labels = pixels(pictures), torch.from_numpy(data.target)
    training, held = split(labels, arguments.seed)

    net = train(images[training], labels[training], arguments.seed, arguments.epochs)
    state = rounded(net)
    with torch.inference_mode():
        right = int((net(images[held]).argmax(1) == labels[held]).sum())

    heldout = arguments.out / "heldout"
    shutil.rmtree(heldout, ignore_errors=True)
    for index in held.tolist():
        path = heldout / str(data.target[index]) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pictures[index].save(path)

    weights = arguments.out / "digits.safetensors"
    card = {
        "source": SOURCE,
        "seed": arguments.seed,
        "epochs": arguments.epochs,
        "trained_on": len(training),
        "heldout": len(held),
        "heldout_right": right,
        "torch": torch.__version__,
    }
    # One entry, because safetensors writes several in no fixed order.
    weights.write_bytes(save(state, {"card": json.dumps(card)}))
    print("\n".join(f"{key}: {value}" for key, value in card.items()))
    print(f"held-out top-1: {right / len(held):.2%}")
    print(f"sha256: {hashlib.sha256(weights.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    main()
