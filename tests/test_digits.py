"""The embedded model: what ships is what the training script makes, and it reads digits."""

from __future__ import annotations

import hashlib
import json
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from alexnet_triton.engine import reference
from alexnet_triton.engine.zoo import DIGITS
from alexnet_triton.weights import load
from alexnet_triton.weights.digits import heldout, weights_file
from PIL import Image
from safetensors import safe_open

SCRIPT = Path(__file__).parents[1] / "tools" / "train_digits.py"
SHAPES = DIGITS.parameter_shapes()

script = SimpleNamespace(**runpy.run_path(str(SCRIPT)))


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


def pixels(files: list[tuple[Path, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the network sees of held-out files, and their labels."""
    return script.pixels([Image.open(path) for path, _ in files]), torch.tensor(
        [label for _, label in files]
    )


def test_the_file_is_the_network_in_half_precision() -> None:
    with safe_open(weights_file(), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {name: tuple(t.shape) for name, t in tensors.items()} == SHAPES
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    assert weights_file().stat().st_size < 2_000_000


def test_the_readme_tells_the_truth(card: dict[str, Any]) -> None:
    readme = weights_file().with_name("README.md").read_text()
    assert hashlib.sha256(weights_file().read_bytes()).hexdigest() in readme
    right, held = card["heldout_right"], card["heldout"]
    assert f"**{right} of {held} ({right / held:.2%})**".replace("%", " %") in readme
    assert "doi 10.24432/C50P49" in readme
    assert card["source"] == script.SOURCE
    assert f"python {SCRIPT.relative_to(SCRIPT.parents[1])} " in readme


def test_heldout_pictures_are_small_and_sorted() -> None:
    files = heldout()
    assert len(files) >= 360
    assert files == sorted(files, key=lambda item: (item[1], int(item[0].stem)))
    assert set(Counter(label for _, label in files).values()) == {script.HELDOUT_PER_DIGIT}
    for path, _ in files:
        with Image.open(path) as image:
            assert (image.mode, image.size) == ("L", (8, 8))
    assert sum(path.stat().st_size for path, _ in files) < 100_000


def test_accuracy_is_the_one_recorded(card: dict[str, Any]) -> None:
    """In float64, where no rounding decides a picture."""
    images, labels = pixels(heldout())
    assert images.shape == (card["heldout"], *DIGITS.input_shape)
    state = load("digits", SHAPES, network="digits")
    wide = {name: tensor.double() for name, tensor in state.items()}
    *_, logits = reference.forward(DIGITS, wide, images.double()).values()
    right = int((logits.argmax(1) == labels).sum())
    assert right == card["heldout_right"]
    assert right >= 0.97 * len(labels)


def test_the_trained_model_is_the_network() -> None:
    """The modules that are trained compute what the declared layers do, with the same names."""
    torch.manual_seed(0)
    net = script.model().double().eval()
    images, _ = pixels(heldout()[::90])
    state = net.state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == SHAPES
    *_, expected = reference.forward(DIGITS, state, images.double()).values()
    with torch.inference_mode():
        torch.testing.assert_close(net(images.double()), expected)


def test_heldout_was_never_trained_on(
    card: dict[str, Any], data: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """Nor was a picture that looks the same."""
    pictures, labels = data
    training, held = script.split(labels, card["seed"])
    assert sorted([*training.tolist(), *held.tolist()]) == list(range(len(labels)))
    assert len(training) == card["trained_on"]
    assert sorted(int(path.stem) for path, _ in heldout()) == held.tolist()
    seen = {script.picture(pictures[i].numpy()).tobytes() for i in training.tolist()}
    for path, label in heldout():
        index = int(path.stem)
        assert int(labels[index]) == label
        with Image.open(path) as image:
            assert image.tobytes() == script.picture(pictures[index].numpy()).tobytes()
            assert image.tobytes() not in seen


def test_training_is_seeded_and_learns(capsys: pytest.CaptureFixture[str]) -> None:
    images, labels = pixels(heldout()[::6])

    def trained(seed: int) -> dict[str, torch.Tensor]:
        with torch.random.fork_rng():
            return dict(script.rounded(script.train(images, labels, seed, epochs=2)))

    first, again, other = trained(3), trained(3), trained(4)
    assert {name: tuple(t.shape) for name, t in first.items()} == SHAPES
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    assert "epoch 2/2" in capsys.readouterr().out


def test_the_script_fills_a_folder(tmp_path: Path) -> None:
    """Everything but the length of the training is as shipped, so the pictures are the same."""
    pytest.importorskip("sklearn", reason="the extra `train` is not installed")
    command = [sys.executable, str(SCRIPT), "--epochs", "1", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = sorted(path.relative_to(tmp_path) for path in tmp_path.glob("heldout/*/*.png"))
    shipped = weights_file().parent
    assert made == sorted(path.relative_to(shipped) for path, _ in heldout())
    assert all((tmp_path / p).read_bytes() == (shipped / p).read_bytes() for p in made)
    load(tmp_path / "digits.safetensors", SHAPES, network="digits")
