"""The engine's door: heads of any width, names, types, and what may not pass."""

from __future__ import annotations

import copy
import enum
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import alexnet_triton
import numpy as np
import pytest
import torch
from alexnet_triton.engine import Engine, EngineError, ImageError, NetworkError, Options
from alexnet_triton.engine.load import Backend, find, load_state
from alexnet_triton.engine.spec import Conv2d, Flatten, Layer, Network, Preprocess, ReLU, Sigmoid
from alexnet_triton.engine.zoo import network
from alexnet_triton.errors import LONGEST, Error
from alexnet_triton.weights import WeightsError, download, save
from alexnet_triton.weights.digits import heldout

State = dict[str, torch.Tensor]
Capture = pytest.CaptureFixture[str]
PIXELS = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
BACKENDS: tuple[Backend, ...] = ("torch", "triton")


@pytest.fixture(scope="module")
def state() -> State:
    return load_state(*find("digits"))[1]


def with_head(state: State, rows: list[int]) -> State:
    """The digits' state fine-tuned: of its last layer these rows, in this order."""
    return state | {f"fc8.{key}": state[f"fc8.{key}"][rows] for key in ("weight", "bias")}


def torch_digits(weights: Any = None, **how: Any) -> Engine:
    return Engine.load("digits", weights, "cpu", backend="torch", **how)


# A fine-tuned head


@pytest.mark.parametrize("rows", [[7, 2, 1], [*range(10), 4, 2]])
def test_the_last_layers_weights_tell_the_classes(
    state: State, rows: list[int], tmp_path: Path
) -> None:
    tuned, image = with_head(state, rows), heldout()[100][0]
    torch.save({"state_dict": tuned}, tmp_path / "tuned.pth")
    save(tuned, tmp_path / "tuned.safetensors")
    wanted = torch_digits()(image)[:, rows]
    for weights in (tuned, tmp_path / "tuned.pth", tmp_path / "tuned.safetensors"):
        engine = torch_digits(weights)
        assert torch.allclose(engine(image), wanted, atol=1e-5)
        assert engine.class_names == tuple(map(str, range(len(rows))))
    interpreted = Engine.load("digits", tuned, "cpu")
    assert torch.allclose(interpreted(image), wanted, atol=1e-4)
    (best,) = interpreted.classify(image, top=len(rows))
    assert not isinstance(best, ImageError)
    scores = wanted.softmax(1)[0, [p.index for p in best]]
    assert torch.allclose(scores, torch.tensor([p.score for p in best]), atol=1e-4)
    assert len({p.index for p in best}) == len(rows)


def test_a_fine_tuned_alexnet_does_not_answer_with_imagenets_names() -> None:
    shapes = network("alexnet").parameter_shapes()
    shapes |= {"fc8.weight": (5, 4096), "fc8.bias": (5,)}
    net, state = load_state(
        network("alexnet"), {name: torch.zeros(shape) for name, shape in shapes.items()}
    )
    assert net.output_shape() == (5,)
    assert net.classes == ""
    assert state["fc8.weight"].shape == (5, 4096)


def test_one_output_is_a_number_and_no_class(state: State) -> None:
    engine, image = torch_digits(with_head(state, [3])), heldout()[0][0]
    assert torch.allclose(engine(image), torch_digits()(image)[:, [3]], atol=1e-5)
    with pytest.raises(EngineError, match="one output"):
        engine.classify(image)


def test_a_head_whose_end_means_something_else_is_refused() -> None:
    for name, outputs in (("alexnet_keras_bn", 3), ("alexnet_single_tower", 1)):
        shapes = network(name).with_outputs(outputs).parameter_shapes()
        weights = {key: torch.zeros(1).expand(shape) for key, shape in shapes.items()}
        with pytest.raises(EngineError, match="write the Network"):
            load_state(network(name), weights)


@pytest.mark.parametrize(
    "wrong",
    [
        {"fc8.bias": torch.zeros(9)},
        {"fc8.weight": torch.zeros(10, 511)},
        {"fc8.weight": torch.zeros(0, 512), "fc8.bias": torch.zeros(0)},
        {"fc8.weight": torch.zeros(10)},
        {"fc7.weight": torch.zeros(511, 512), "fc7.bias": torch.zeros(511)},
    ],
)
def test_a_head_that_does_not_fit_is_refused(state: State, wrong: State) -> None:
    with pytest.raises(WeightsError, match="wanted shape"):
        torch_digits(state | wrong)


def test_classes_have_the_callers_names(state: State, tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    file.write_text("cat\ndog\ncrème brûlée\n", "utf-8")
    names = ("cat", "dog", "crème brûlée")
    bom = tmp_path / "bom.txt"
    bom.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    for classes in (names, list(names), str(file), file, bom):
        engine = torch_digits(with_head(state, [5, 3, 1]), classes=classes)
        assert engine.class_names == names
    (best,) = engine.classify(heldout()[0][0], top=3)
    assert not isinstance(best, ImageError)
    assert {p.label for p in best} == set(names)
    assert torch_digits(classes=[f"<{n}>" for n in range(10)]).class_names[3] == "<3>"


def test_names_that_do_not_fit_are_refused_before_weights_are_read(tmp_path: Path) -> None:
    binary, short = tmp_path / "binary", tmp_path / "short"
    binary.write_bytes(b"\xff\xfe\x00")
    short.write_text("one\n\nthree\n")
    wrong: list[Any] = [
        *("~nobody-has-this-name/x", "x" * 5000, tmp_path / "none", tmp_path, binary, short),
        *(5, {"a", "b"}, ["a", 5], [""]),
    ]
    for classes in wrong:
        with pytest.raises(EngineError, match="classes"):
            torch_digits("nowhere.pth", classes=classes)
    for count in (0, 9, 11):
        with pytest.raises(EngineError, match=f"classes: wanted 10 names.* got {count}"):
            torch_digits(classes=["x"] * count)


def test_a_networks_own_names_fit_it_too() -> None:
    wrong = replace(network("digits"), classes="imagenet.txt")
    with pytest.raises(EngineError, match="wanted 10 names"):
        Engine.load(wrong, "random:0", "cpu", backend="torch")


def test_one_sigmoid_has_two_names() -> None:
    loaded = Engine.load(
        "alexnet_keras_bn", "random:0", "cpu", backend="torch", classes=["no", "yes"]
    )
    assert loaded.class_names == ("no", "yes")


# Weights by other words


class AlexNetWeights(enum.Enum):
    """What torchvision's enum is to us: members whose value has a url."""

    IMAGENET1K_V1 = SimpleNamespace(url="https://example.org/models/alexnet-owt-7be5be79.pth")
    SEALED = SimpleNamespace(url="https://example.org/models/vgg11-8a719046.pth")
    ODD = SimpleNamespace(url="https://example.org/models/vgg16_features-amdegroot-88682ab5.pth")


def test_torchvisions_words_for_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def fetch(url: str, sha256: str) -> Path:
        asked.append((url, sha256))
        raise WeightsError("asked for")

    monkeypatch.setattr(download, "fetch", fetch)
    for source in ("DEFAULT", "IMAGENET1K_V1", "imagenet", AlexNetWeights.IMAGENET1K_V1):
        with pytest.raises(WeightsError, match="asked for"):
            Engine.load("alexnet", source, "cpu", backend="torch")
    with pytest.raises(WeightsError, match="asked for"):
        Engine.load("vgg11", AlexNetWeights.SEALED, "cpu", backend="torch")
    assert asked == [
        *[(download.IMAGENET_URL, "7be5be79")] * 3,
        (AlexNetWeights.IMAGENET1K_V1.value.url, "7be5be79"),
        (AlexNetWeights.SEALED.value.url, "8a719046"),
    ]
    for source in (AlexNetWeights.ODD, AlexNetWeights.SEALED):
        with pytest.raises(WeightsError, match="weights"):
            Engine.load("alexnet", source, "cpu", backend="torch")


def test_a_module_is_no_state_and_the_refusal_says_what_is() -> None:
    with pytest.raises(WeightsError, match=r"model\.state_dict\(\)"):
        torch_digits(torch.nn.Linear(2, 2))


def test_weights_that_require_grad_are_taken_detached(state: State) -> None:
    trained = {name: tensor.clone().requires_grad_() for name, tensor in state.items()}
    logits = torch_digits(trained)(PIXELS)
    assert not logits.requires_grad
    assert torch.equal(logits, torch_digits(state)(PIXELS))


# Types


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        *((dtype, "fp16") for dtype in (torch.float16, "float16")),
        *((dtype, "fp32") for dtype in (torch.float32, "float32")),
        *((dtype, "bf16") for dtype in (torch.bfloat16, "bfloat16")),
        ("tf32", "tf32"),
    ],
)
def test_dtypes_by_torchs_names(dtype: Any, name: str) -> None:
    assert torch_digits(dtype=dtype).dtype == name


WRONG: list[dict[str, Any]] = [
    *({"max_batch": value} for value in ("5", 2.5, True, None, [1], torch.ones(()))),
    *({"dtype": value} for value in (torch.float64, torch.int8, "half?", 16, ["fp16"])),
    *({"device": value} for value in (1.5, ["cpu"], object())),
    *({"backend": value} for value in (None, ["torch"], 1)),
    *({"batch_invariant": value} for value in ("no", 1, None)),
    *({"options": value} for value in ({"pdl": True}, "pdl")),
    *({"weights": value} for value in (5, 2.5, ["random:0"], b"random:0", object())),
    *({"weights": value} for value in ("x" * 5000, "", "~nobody-has-this-name/x.pth")),
    *({"network": value} for value in ("x" * 5000, "", "~nobody-has-this-name/x.onnx")),
    *({name: value} for name, value in (("at", "conv3"), ("micro_batch", 4))),
    *({"network": value} for value in (5, None, ["digits"], b"digits", "lenet", object())),
    *({"target": value} for value in (90, "sm_75", ["h200"])),
    *({"device": None, "devices": value, "split": "towers"} for value in (5, "cpu", ["cpu"])),
    *({"device": None, "split": value} for value in ("both", 2)),
    {"device": None, "devices": ("cpu", "cpu"), "split": "pipeline", "micro_batch": "4"},
]


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_types_are_refusals(wrong: dict[str, Any]) -> None:
    right = {"network": "digits", "device": "cpu"}
    with pytest.raises(Error) as refused:
        Engine.load(**right | wrong)
    assert str(refused.value).isprintable()


TORCH = {"backend": "torch"}
TWO = {"devices": ("cpu", "cpu"), "split": "pipeline"}
OPTIONS = {"pdl": Options(pdl=True), "slices": Options(-1), "until": Options(2, "conv9")}


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [
        (EngineError, {"dtype": "fp64"}, "dtype: wanted one of fp32, tf32, fp16, bf16, got 'fp64'"),
        (EngineError, {"backend": "onnx"}, "backend: wanted one of triton, torch, got 'onnx'"),
        (EngineError, {"max_batch": 0}, "max_batch: wanted 1 or more, got 0"),
        (EngineError, {"device": "tpu"}, "device: wanted 'cpu', 'cuda' or 'cuda:N', got 'tpu'"),
        (EngineError, {"device": "cuda:99"}, "device: wanted 'cuda:99', got a machine with"),
        (EngineError, {"device": "cpu", "dtype": "bf16"}, "bfloat16 wrongly; use fp32 or fp16"),
        (EngineError, TORCH | {"batch_invariant": True}, "only the triton backend promises it"),
        (EngineError, TORCH | {"options": OPTIONS["pdl"]}, "only the triton backend has them"),
        (EngineError, TORCH | {"target": "sm_90"}, "target: only the triton backend plans"),
        (EngineError, TWO | {"target": "sm_90", "options": OPTIONS["pdl"]}, "for one device"),
        (EngineError, {"target": "sm_75"}, "target: wanted one of a100, .*, sm_120, got 'sm_75'"),
        (EngineError, {"target": "sm_90", "dtype": "bf16"}, "computes bfloat16 wrongly"),
        (NetworkError, {"target": "sm_80", "options": OPTIONS["pdl"]}, "9.0 or newer, got sm_80"),
        (NetworkError, {"target": "sm_80", "options": OPTIONS["slices"]}, "0 or more, got -1"),
        (NetworkError, {"target": "sm_80", "options": OPTIONS["until"]}, "no step 'conv9'"),
        (NetworkError, {"network": "lenet"}, "unknown network 'lenet'"),
        (WeightsError, {"network": "alexnet", "weights": "digits"}, "'digits', got 'alexnet'"),
    ],
)
def test_refusals_at_the_door(kind: type[Error], wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(kind, match=message):
        Engine.load(**{"network": "digits"} | wrong)


def test_counts_of_numpy_are_counts() -> None:
    assert torch_digits(max_batch=np.int64(4)).max_batch == 4


def test_wrong_types_of_calls_are_refusals(state: State) -> None:
    engine = torch_digits()
    calls: list[Callable[[], object]] = [
        lambda: engine(PIXELS, out=np.zeros((1, 10), np.float32)),  # type: ignore[arg-type]
        lambda: engine(PIXELS, out=[0.0] * 10),  # type: ignore[arg-type]
        lambda: engine(PIXELS, out=torch.zeros(1, 10, dtype=torch.float64)),
        lambda: engine(PIXELS, out=torch.zeros(1, 10, device="meta")),
        lambda: engine(torch.zeros(1, 3, 64, 64, device="meta")),
        lambda: engine.classify(PIXELS, top="5"),  # type: ignore[arg-type]
        lambda: engine.classify(PIXELS, top=2.5),  # type: ignore[arg-type]
        lambda: engine.classify(PIXELS, top=0),
        lambda: engine.classify([], views="all"),  # type: ignore[arg-type]
        lambda: list(engine.stream([], batch_size=True)),
        lambda: list(engine.stream([], batch_size=0)),
        lambda: list(engine.stream([], exif="no")),  # type: ignore[arg-type]
        lambda: engine(PIXELS, out=torch.zeros(1, 1).expand(1, 10)),
        lambda: engine(PIXELS, out=torch.zeros(1, 10).to_sparse()),
        lambda: engine.features(PIXELS, 5),  # type: ignore[arg-type]
        lambda: engine.features(PIXELS, ["conv9"]),
        lambda: torch_digits(options=Options()),
    ]
    for call in calls:
        with pytest.raises(Error) as refused:
            call()
        assert str(refused.value).isprintable()


# One engine, one process


def test_an_engine_is_neither_pickled_nor_copied() -> None:
    engine = torch_digits()
    for way in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(EngineError, match="one in each process"):
            way(engine)


def test_an_engine_does_not_run_in_a_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = torch_digits()
    there = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: there + 1)
    with pytest.raises(EngineError, match="one in each process"):
        engine(PIXELS)


# Networks of other ends


def ending(*layers: tuple[str, Layer]) -> Network:
    preset = Preprocess(resize=32, crop=28, mean=(0.5,) * 3, std=(0.5,) * 3)
    return Network("ending", (3, 28, 28), layers, preset, classes="")


def test_a_network_without_classes_gives_maps_of_any_size_and_no_labels() -> None:
    headless = ending(("conv1", Conv2d(4, 3, stride=2)), ("relu1", ReLU()))
    for backend in BACKENDS:
        engine = Engine.load(headless, "random:0", "cpu", backend=backend)
        assert engine(torch.zeros(2, 3, 28, 28)).shape == (2, 4, 13, 13)
        assert engine(torch.zeros(2, 3, 21, 40)).shape == (2, 4, 10, 19)
        assert set(engine.features(torch.zeros(1, 3, 28, 28))) == {"conv1"}
        with pytest.raises(EngineError, match=r"\[N, classes\], got \[N, 4, 13, 13\]"):
            engine.classify(torch.zeros(1, 3, 28, 28))


def test_one_map_of_sigmoids_is_no_class_and_loads() -> None:
    mask = ending(("conv1", Conv2d(1, 3)), ("sigmoid1", Sigmoid()))
    engine = Engine.load(mask, "random:0", "cpu", backend="torch")
    assert engine(torch.zeros(2, 3, 28, 28)).shape == (2, 1, 26, 26)


def test_a_flatten_at_the_end_is_no_step_but_shapes_the_answer() -> None:
    flat = ending(("conv1", Conv2d(4, 14, stride=14)), ("relu1", ReLU()), ("flatten", Flatten()))
    for backend in BACKENDS:
        engine = Engine.load(flat, "random:0", "cpu", backend=backend)
        maps = engine.features(torch.ones(2, 3, 28, 28), "conv1")["conv1"]
        assert torch.equal(engine(torch.ones(2, 3, 28, 28)), maps.flatten(1))
        (best, _) = engine.classify(torch.ones(2, 3, 28, 28), top=16)
        assert not isinstance(best, ImageError)
        assert len(best) == 16
        assert engine(torch.ones(1, 3, 42, 28)).shape == (1, 24)
        with pytest.raises(EngineError, match="24 outputs, its classes are 16"):
            engine.classify(torch.ones(1, 3, 42, 28))


def test_features_of_a_vgg_are_its_own_layers() -> None:
    engine = Engine.load("vgg11", "random:0", "cpu", backend="torch", max_batch=1)
    made = engine.features(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    assert set(made) == {n for n, layer in engine.network.layers if n[:4] == "conv"} | {
        "fc6",
        "fc7",
    }


# Refusals


def test_every_refusal_is_exported_with_its_base() -> None:
    children = {
        kind.__name__ for kind in Error.__subclasses__() if ".bench." not in kind.__module__
    }
    private = {"WebError"}  # an ImageError by the time that anybody sees it
    assert children - private <= set(alexnet_triton.__all__)
    for name in children - private:
        assert issubclass(getattr(alexnet_triton, name), alexnet_triton.Error)


def test_a_refusal_is_one_printable_line_that_fits_a_screen() -> None:
    hostile = "a\x1b[31m\n\r\u2028\udce9" + "x" * 100_000 + "; cure: this"
    for error in (
        Error(hostile),
        WeightsError(hostile),
        alexnet_triton.ImageError(hostile, hostile),
    ):
        line = str(error)
        assert line.isprintable()
        assert len(line) <= LONGEST
        assert line.startswith(r"a\x1b[31m\n\r\u2028\udce9x")
        assert line.endswith("cure: this")
