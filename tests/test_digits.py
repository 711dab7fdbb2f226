"""The embedded model: what ships is what the training script makes, and it reads digits."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from alexnet_triton.engine.zoo import network
from alexnet_triton.weights import load
from alexnet_triton.weights.digits import heldout, train, weights_file
from PIL import Image
from safetensors import safe_open
from torch.nn import functional as F

DIGITS = network("digits")


@pytest.fixture(scope="module")
def card() -> dict[str, Any]:
    with safe_open(weights_file(), framework="pt") as file:
        loaded: dict[str, Any] = json.loads(file.metadata()["card"])
    return loaded


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, torch.Tensor]:
    """scikit-learn's pictures [1797, 8, 8] and labels."""
    datasets = pytest.importorskip("sklearn.datasets", reason="the extra `train` is not installed")
    digits = datasets.load_digits()
    return torch.from_numpy(digits.images), torch.from_numpy(digits.target)


def forward(images: torch.Tensor) -> torch.Tensor:
    """AlexNet in torch and float64, where no rounding decides a picture."""
    state = load("digits", DIGITS.parameter_shapes(), network="digits")
    weight = {name: tensor.double() for name, tensor in state.items()}
    x = images.double()
    for name, stride, padding, pooled in (
        ("conv1", 4, 2, True),
        ("conv2", 1, 2, True),
        ("conv3", 1, 1, False),
        ("conv4", 1, 1, False),
        ("conv5", 1, 1, True),
    ):
        x = F.conv2d(x, weight[f"{name}.weight"], weight[f"{name}.bias"], stride, padding).relu()
        x = F.max_pool2d(x, 3, 2) if pooled else x
    x = F.adaptive_avg_pool2d(x, 6).flatten(1)
    x = F.linear(x, weight["fc6.weight"], weight["fc6.bias"]).relu()
    x = F.linear(x, weight["fc7.weight"], weight["fc7.bias"]).relu()
    return F.linear(x, weight["fc8.weight"], weight["fc8.bias"])


def test_the_file_is_the_network_in_half_precision() -> None:
    with safe_open(weights_file(), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {name: tuple(t.shape) for name, t in tensors.items()} == DIGITS.parameter_shapes()
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    assert weights_file().stat().st_size < 2_000_000


def test_the_readme_tells_the_truth(card: dict[str, Any]) -> None:
    readme = weights_file().with_name("README.md").read_text()
    assert hashlib.sha256(weights_file().read_bytes()).hexdigest() in readme
    right, held = card["heldout_right"], card["heldout"]
    assert f"**{right} of {held} ({right / held:.2%})**".replace("%", " %") in readme
    assert "doi 10.24432/C50P49" in readme
    assert card["source"] == train.SOURCE


def test_heldout_pictures_are_small_and_sorted() -> None:
    files = heldout()
    assert len(files) >= 360
    assert files == sorted(files, key=lambda item: (item[1], int(item[0].stem)))
    assert set(Counter(label for _, label in files).values()) == {train.HELDOUT_PER_DIGIT}
    for path, _ in files:
        with Image.open(path) as image:
            assert (image.mode, image.size) == ("L", (8, 8))
    assert sum(path.stat().st_size for path, _ in files) < 100_000


def test_accuracy_is_the_one_recorded(card: dict[str, Any]) -> None:
    images = torch.stack([train.pixels(Image.open(path)) for path, _ in heldout()])
    labels = torch.tensor([label for _, label in heldout()])
    assert images.shape == (card["heldout"], *DIGITS.input_shape)
    right = int((forward(images).argmax(1) == labels).sum())
    assert right == card["heldout_right"]
    assert right >= 0.97 * len(labels)


def test_pictures_are_prepared_as_the_preset_says() -> None:
    preset = DIGITS.preprocess
    assert preset.resize == preset.crop == train.SIZE
    seen = train.pixels(Image.new("L", (8, 8), 51))
    mean, std = torch.tensor(preset.mean), torch.tensor(preset.std)
    wanted = ((torch.full((3,), 51 / 255) - mean) / std)[:, None, None].expand(3, 64, 64)
    torch.testing.assert_close(seen, wanted)


def test_heldout_was_never_trained_on(
    card: dict[str, Any], data: tuple[torch.Tensor, torch.Tensor]
) -> None:
    pictures, labels = data
    training, held = train.split(labels, card["seed"])
    assert sorted([*training.tolist(), *held.tolist()]) == list(range(len(labels)))
    assert len(training) == card["trained_on"]
    assert sorted(int(path.stem) for path, _ in heldout()) == held.tolist()
    for path, label in heldout():
        index = int(path.stem)
        assert int(labels[index]) == label
        with Image.open(path) as image:
            assert image.tobytes() == train.picture(pictures[index].numpy()).tobytes()


def test_no_heldout_picture_has_a_twin_in_training(
    card: dict[str, Any], data: tuple[torch.Tensor, torch.Tensor]
) -> None:
    pictures, labels = data
    training, _ = train.split(labels, card["seed"])
    seen = {train.picture(pictures[i].numpy()).tobytes() for i in training.tolist()}
    assert not [path for path, _ in heldout() if Image.open(path).tobytes() in seen]


def test_training_is_seeded_and_learns(
    data: tuple[torch.Tensor, torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    pictures, labels = data
    images = torch.stack([train.pixels(train.picture(p.numpy())) for p in pictures[:64]])

    def trained(seed: int) -> dict[str, torch.Tensor]:
        with torch.random.fork_rng():
            return train.rounded(train.train(images, labels[:64], seed, epochs=2))

    first, again, other = trained(3), trained(3), trained(4)
    assert {name: tuple(t.shape) for name, t in first.items()} == DIGITS.parameter_shapes()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    assert "epoch 2/2" in capsys.readouterr().out


def test_the_script_fills_a_folder(tmp_path: Path) -> None:
    """Everything but the length of the training is as shipped, so the pictures are the same."""
    pytest.importorskip("sklearn", reason="the extra `train` is not installed")
    command = ["alexnet_triton.weights.digits.train", "--epochs", "1", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = sorted(path.relative_to(tmp_path) for path in tmp_path.glob("heldout/*/*.png"))
    shipped = weights_file().parent
    assert made == sorted(path.relative_to(shipped) for path, _ in heldout())
    assert all((tmp_path / p).read_bytes() == (shipped / p).read_bytes() for p in made)
    load(tmp_path / "digits.safetensors", DIGITS.parameter_shapes(), network="digits")
