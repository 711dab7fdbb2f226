"""Weights: every source gives the canonical state, and whatever does not fit is refused by name."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from alexnet_triton.engine.zoo import network
from alexnet_triton.weights import WeightsError, checkpoint, download, load
from safetensors.torch import save_file

State = dict[str, torch.Tensor]
Edit = Callable[[State], Any]
Save = Callable[[Any, Path], None]

EXPECTED = network("digits").parameter_shapes()
LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")
NUMBERED = (*(f"features.{n}" for n in (0, 3, 6, 8, 10)), *(f"classifier.{n}" for n in (1, 4, 6)))
TORCHVISION = dict(zip(LAYERS, NUMBERED, strict=True))


@pytest.fixture
def state() -> State:
    return load("random:1", EXPECTED, network="digits")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of torch.hub; the folder where checkpoints go."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


def torchvision_named(state: State) -> State:
    return {
        f"{TORCHVISION[layer]}.{key}": tensor
        for (layer, key), tensor in ((name.split("."), t) for name, t in state.items())
    }


def loaded(source: Any) -> State:
    return load(source, EXPECTED, network="digits")


def assert_same(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert list(actual) == list(EXPECTED)
    for name, tensor in actual.items():
        assert tensor.dtype == torch.float32
        assert tensor.device.type == "cpu"
        assert tensor.is_contiguous()
        assert torch.equal(tensor, expected[name])


def refused(source: Any, *parts: object, network: str = "digits") -> str:
    """`load` refuses `source` in one line that holds every one of `parts`."""
    with pytest.raises(WeightsError) as caught:
        load(source, EXPECTED, network=network)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for part in parts:
        assert str(part) in message
    return message


def save_legacy(state: object, path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


# Sources


@pytest.mark.parametrize(
    ("save", "name"),
    [
        (torch.save, "a.pth"),
        (torch.save, "a.PT"),
        (save_legacy, "a.pth"),
        (save_file, "a.safetensors"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_files_of_every_float_dtype(
    save: Save, name: str, dtype: torch.dtype, state: State, tmp_path: Path
) -> None:
    given = {name: tensor.to(dtype) for name, tensor in state.items()}
    save(given, tmp_path / name)
    for path in (tmp_path / name, str(tmp_path / name)):
        assert_same(loaded(path), {name: tensor.float() for name, tensor in given.items()})


def test_a_dict_in_any_order_and_layout_is_copied(state: State) -> None:
    given = {name: torch.nn.Parameter(tensor) for name, tensor in reversed(state.items())}
    given["conv2.weight"] = torch.nn.Parameter(
        state["conv2.weight"].to(memory_format=torch.channels_last)
    )
    given["fc7.weight"] = torch.nn.Parameter(state["fc7.weight"].T.contiguous().T)
    copy = loaded(given)
    assert_same(copy, state)
    with torch.no_grad():
        for parameter in given.values():
            parameter.zero_()
    assert not any(t.requires_grad or not t.any() for t in copy.values())


def test_random_is_he_scaled(state: State) -> None:
    assert_same(state, state)
    for name in ("conv3.weight", "fc6.weight", "fc7.weight"):
        fan_in = state[name][0].numel()
        assert state[name].std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.03)
    assert 0 < state["fc6.bias"].abs().max() < 1


def test_random_depends_on_its_seed_alone(state: State) -> None:
    before = torch.get_rng_state()
    torch.manual_seed(1)
    again = load("random:1", EXPECTED, network="anything")
    other = load(f"random:{2**32 - 1}", EXPECTED, network="anything")
    assert torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(1).get_state())
    torch.set_rng_state(before)
    assert_same(again, state)
    assert not any(torch.equal(other[name], state[name]) for name in state)


@pytest.mark.parametrize(("source", "owner"), [("imagenet", "alexnet"), ("digits", "digits")])
def test_pretrained_weights_belong_to_one_network(source: str, owner: str, hub: Path) -> None:
    refused(source, repr(source), repr(owner), "'vgg11'", "random:SEED", network="vgg11")
    assert not hub.exists()


# States that do not fit


def changed(name: str, value: object) -> Edit:
    return lambda state: state | {name: value}


def not_finite(value: torch.Tensor) -> Edit:
    def edit(state: State) -> State:
        tensor = state["fc7.weight"].to(value.dtype)
        tensor[3, 5] = value
        return state | {"fc7.weight": tensor}

    return edit


FAR = f"features.{'9' * 5000}.weight"  # beyond reason, and a name like any other

UNFIT: dict[str, tuple[Edit, *tuple[str, ...]]] = {
    "missing": (
        lambda state: {name: state[name] for name in state if name != "conv4.bias"},
        *("missing conv4.bias;", "wanted 16", "got 15"),
    ),
    "empty": (lambda _: {}, "missing conv1.weight", "and 8 more", "got 0"),
    "extra": (changed("fc9.weight", torch.ones(1)), "extra fc9.weight;", "wanted 16", "got 17"),
    **{
        f"extra, {name[:20]}": (
            lambda state, name=name, tensor=tensor: torchvision_named(state) | {name: tensor},
            f"extra {name}"[:200],
        )
        for name, tensor in (
            ("features.1.running_mean", torch.ones(8)),
            ("features.12.weight", torch.ones(8, 8, 3, 3)),
            (FAR, torch.ones(1, 1, 1, 1)),
        )
    },
    "twice": (
        changed("module.fc8.bias", torch.ones(10)),
        "one fc8.bias, got fc8.bias and module.fc8.bias",
    ),
    "twice, by number": (
        changed("features.0.weight", torch.ones(8, 3, 11, 11)),
        *("one conv1.weight", "features.0.w"),
    ),
    "shape": (
        changed("conv2.weight", torch.ones(24, 8, 3, 3)),
        *("conv2.weight wanted", "(24, 8, 5, 5)", "got (24, 8, 3, 3)"),
    ),
    "shape, by number": (
        lambda state: torchvision_named(state | {"conv2.weight": torch.ones(24, 8, 3, 3)}),
        "conv2.weight (stored as features.3.weight)",
    ),
    "scalar": (changed("conv2.weight", torch.tensor(1.0)), "got ()"),
    **{
        str(dtype): (changed("fc8.bias", torch.ones(10, dtype=dtype)), "fc8.bias", f"got {dtype}")
        for dtype in (torch.int8, torch.int64, torch.bool, torch.complex64)
    },
    **{
        f"{shown} of {value.dtype}": (
            not_finite(value),
            *("fc7.weight", "finite", "got 1 ", f"({shown} at (3, 5))"),
        )
        for value, shown in (
            (torch.tensor(float("nan")), "nan"),
            (torch.tensor(-float("inf"), dtype=torch.float16), "-inf"),
            (torch.tensor(1e39, dtype=torch.float64), "inf"),
        )
    },
    "sparse": (changed("fc8.bias", torch.ones(10).to_sparse()), "fc8.bias", "dense", "sparse"),
    "meta": (changed("fc8.bias", torch.ones(10, device="meta")), "fc8.bias", "dense", "meta"),
    "a list": (lambda _: [torch.ones(3)], "wanted a state dict", "got list"),
    "a tensor": (lambda _: torch.ones(3), "wanted a state dict", "got Tensor"),
    "a number": (changed("epoch", 3), "'epoch'", "wanted a tensor", "got int"),
    "a dict in it": (lambda s: {"model": s}, "'model'", "wanted a tensor", "got dict"),
    "a number for a name": (lambda _: {3: torch.ones(3)}, "names", "int"),
    # Nor may a name write to the terminal: here a line of its own, in green.
    "a line": (changed("x\n\x1b[32mwell", torch.ones(1)), r"extra x\n\x1b[32mwell"),
}


@pytest.mark.parametrize(("edit", "parts"), [(e, p) for e, *p in UNFIT.values()], ids=UNFIT)
def test_what_does_not_fit_is_named(
    edit: Edit, parts: list[str], state: State, tmp_path: Path
) -> None:
    content, path = edit(state), tmp_path / "a.pth"
    torch.save(content, path)
    refused(path, f"{path}: ", "cure: ", *parts)
    if isinstance(content, dict):
        refused(content, "state dict: ", "cure: ", *parts)


# Files that cannot be read


def test_no_such_source(tmp_path: Path, state: State) -> None:
    refused(tmp_path / "a.pth", tmp_path / "a.pth", "no such file")
    refused("no/such/file.safetensors", "no/such/file.safetensors", "no such file")
    refused(tmp_path, tmp_path, "folder")
    (tmp_path / "b.pth").mkdir()
    refused(tmp_path / "b.pth", "b.pth", "folder")
    for name in ("weights.onnx", "weights"):
        torch.save(state, tmp_path / name)
        refused(tmp_path / name, name, ".pth, .pt, ", ".safetensors")
    for unknown in ("imagenet1k", Path("nothing"), 3, None):
        refused(unknown, "imagenet", "digits", "random:SEED", ".safetensors", "state dict")


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors", ".keras", ".h5"])
@pytest.mark.parametrize("content", [b"", b"<html>404 Not Found</html>\n" * 9, b"\xff" * 64])
def test_empty_or_something_else(suffix: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    refused(path, path, "cure: ", "" if content else "the file is empty")


@pytest.mark.parametrize(
    ("save", "suffix"),
    [(torch.save, ".pth"), (save_legacy, ".pth"), (save_file, ".safetensors")],
)
def test_truncated_anywhere(save: Save, suffix: str, state: State, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    save(state, path)
    whole = path.read_bytes()
    for kept in (1, 7, 100, 1000, len(whole) // 2, len(whole) - 1000, len(whole) - 1):
        path.write_bytes(whole[:kept])
        refused(path, path, "cure: ")


class Hostile:
    """Unpickled as code it would make the folder `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


def save_pickle(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


@pytest.mark.parametrize("save", [torch.save, save_legacy, save_pickle])
def test_a_hostile_pickle_is_not_run(
    save: Save,
    state: State,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # torch's own way to switch it off
    made, path = tmp_path / "made", tmp_path / "hostile.pth"
    save(state | {"conv1.weight": Hostile(made)}, path)
    message = refused(path, path, "nothing in it was run", "cure: ")
    assert "mkdir" in message or save is save_pickle
    assert not recwarn.list
    assert not made.exists()
    torch.load(path, weights_only=False) if save is not save_pickle else pickle.loads(
        path.read_bytes()
    )
    assert made.exists(), "the payload is dead, so this test shows nothing"


def test_a_whole_model_is_not_unpickled(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "torch.nn.modules.linear.Linear", "model.state_dict()")


# The download


def served(content: bytes, folder: Path) -> tuple[str, str]:
    """A file with `content` to download: its URL, and the beginning of its hash."""
    folder.mkdir()
    path = folder / "alexnet-owt-00000000.pth"
    path.write_bytes(content)
    return path.as_uri(), hashlib.sha256(content).hexdigest()[:8]


def test_imagenet_is_downloaded_once(
    state: State,
    hub: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    torch.save(torchvision_named(state), tmp_path / "a.pth")
    url, sha256 = served((tmp_path / "a.pth").read_bytes(), tmp_path / "server")
    monkeypatch.setattr(download, "IMAGENET_URL", url)
    monkeypatch.setattr(download, "IMAGENET_SHA256", sha256)
    assert_same(load("imagenet", EXPECTED, network="alexnet"), state)
    shown = capfd.readouterr()
    assert url in shown.err
    assert "100" in shown.err
    assert not shown.out
    assert [path.name for path in hub.iterdir()] == ["alexnet-owt-00000000.pth"]

    (tmp_path / "server" / "alexnet-owt-00000000.pth").unlink()
    assert_same(load("imagenet", EXPECTED, network="alexnet"), state)
    assert not capfd.readouterr().err


def test_a_cached_file_with_a_wrong_hash_is_never_parsed(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parse(*_: object, **__: object) -> None:
        raise AssertionError("parsed unchecked")

    monkeypatch.setattr(checkpoint, "read", parse)
    assert f"-{download.IMAGENET_SHA256}.pth" in download.IMAGENET_URL
    path = hub / "alexnet-owt-7be5be79.pth"
    hub.mkdir(parents=True)
    path.write_bytes(b"not the weights")
    digest = hashlib.sha256(b"not the weights").hexdigest()
    refused("imagenet", path, "7be5be79", digest, "delete", network="alexnet")
    assert path.exists()


def test_a_download_with_a_wrong_hash_leaves_nothing(hub: Path, tmp_path: Path) -> None:
    url, _ = served(b"something else", tmp_path / "server")
    with pytest.raises(WeightsError, match=r"cannot get .*7be5be79") as caught:
        download.fetch(url, "7be5be79")
    assert url in str(caught.value)
    assert not list(hub.iterdir())


def test_an_interrupted_download_leaves_nothing(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control-C in the middle is the user's, not ours to swallow; the next run starts clean."""
    url, sha256 = served(b"0123456789" * 100_000, tmp_path / "server")

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("torch.hub.tqdm.update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            download.fetch(url, sha256)
    assert not list(hub.iterdir())
    assert download.fetch(url, sha256).stat().st_size == 1_000_000


def test_no_network_names_the_url_the_place_and_the_cure(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nobody = "http://127.0.0.1:1/models/alexnet-owt-7be5be79.pth"  # a port where nothing listens
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "IMAGENET_URL", nobody)
    path = hub / "alexnet-owt-7be5be79.pth"
    refused("imagenet", nobody, f"put it at {path}", "connect", network="alexnet")
    assert not path.exists()


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))
    refused("imagenet", download.IMAGENET_URL, tmp_path / "file", network="alexnet")


def test_a_head_has_a_limit_that_its_refusal_tells(tmp_path: Path) -> None:
    """A few bytes may claim any number of outputs; those of the network itself are no claim."""

    def head(outputs: int, expected: int = 10) -> State:
        state = {"fc.weight": torch.zeros(1, 1).expand(outputs, 2), "fc.bias": torch.zeros(1)}
        state["fc.bias"] = state["fc.bias"].expand(outputs)
        torch.save(state, tmp_path / "a.pth")
        shapes = {"fc.weight": (expected, 2), "fc.bias": (expected,)}
        return load(tmp_path / "a.pth", shapes, network="x", head="fc")

    assert len(head(65_536)["fc.bias"]) == 65_536
    assert len(head(70_000, expected=70_000)["fc.bias"]) == 70_000
    for outputs in (70_000, 2**40):
        with pytest.raises(WeightsError, match=f"65536 outputs, got {outputs}"):
            head(outputs)


def test_want_of_memory_has_its_own_cure(state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> torch.Tensor:
        return torch.empty(2**60)

    monkeypatch.setattr(torch.Tensor, "to", full)
    assert "float32" not in refused(state, "memory", "cure: ")


def test_a_negative_variance_is_refused() -> None:
    expected = {"bn1.running_var": (3,)}
    with pytest.raises(WeightsError, match=r"bn1\.running_var wanted variances of 0 or more"):
        load({"bn1.running_var": torch.tensor([1.0, -1.0, 2.0])}, expected, network="x")
