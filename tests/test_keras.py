"""Models built, saved and run by Keras itself: the same outputs here, or a refusal that names why.

Keras runs on torch and on the CPU, where its numbers are those of a float32 convolution.
"""

from __future__ import annotations

import io
import json
import os
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from alexnet_triton.engine import reference
from alexnet_triton.engine.load import load_state
from alexnet_triton.engine.spec import (
    BatchNorm2d,
    Conv2d,
    Dropout,
    Flatten,
    Layer,
    Linear,
    MaxPool2d,
    Network,
    ReLU,
    Sigmoid,
    Softmax,
)
from alexnet_triton.engine.zoo import network
from alexnet_triton.weights import WeightsError, load
from alexnet_triton.weights.keras import LAYERS

h5py = pytest.importorskip("h5py", reason="Keras files are read by h5py, of the test extra")

CHAIN = "save a flat Sequential or Functional chain of Conv2D, Dense, BatchNormalization, "
SUFFIXES = (".keras", ".weights.h5")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
both_formats = pytest.mark.parametrize("suffix", SUFFIXES)

SINGLE_TOWER, KERAS_BN = network("alexnet_single_tower"), network("alexnet_keras_bn")

# Every kind of layer, two convolutions of one shape, and a flatten that is 4 by 5.
TINY = replace(
    KERAS_BN,
    name="tiny",
    input_shape=(3, 8, 10),
    layers=(
        ("conv1", Conv2d(4, 3, padding=1)),
        ("relu1", ReLU()),
        ("bn1", BatchNorm2d(eps=1e-3)),
        ("pool1", MaxPool2d(2, stride=2)),
        ("conv2", Conv2d(4, 3, padding=1)),
        ("bn2", BatchNorm2d(eps=1e-3)),
        ("relu2", ReLU()),
        ("conv3", Conv2d(4, 3, padding=1)),
        ("flatten", Flatten()),
        ("drop", Dropout()),
        ("fc1", Linear(6)),
        ("relu3", ReLU()),
        ("fc2", Linear(3)),
        ("softmax", Softmax()),
    ),
)


@pytest.fixture(scope="module")
def keras(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Keras on torch, on the CPU, with a home of its own; the environment is put back after."""
    home = str(tmp_path_factory.mktemp("keras"))
    with mock.patch.dict(os.environ, KERAS_BACKEND="torch", KERAS_HOME=home):
        keras = pytest.importorskip("keras", reason="needs Keras 3, which is in the test extra")
        if keras.backend.backend() != "torch":
            pytest.skip("needs Keras on torch, and here it was imported on something else")
        with keras.device("cpu"):
            yield keras


# Models


def keras_layer(keras: Any, layer: Layer, **options: Any) -> Any:
    """What a Keras user writes for a layer of the zoo's."""
    make = keras.layers
    match layer:
        case Conv2d(channels, size, stride, padding, 1, 1) if padding in (0, (size - 1) // 2):
            assert not padding or stride == 1, "Keras pads that one otherwise"
            mode = "same" if padding else "valid"
            return make.Conv2D(channels, size, strides=stride, padding=mode, **options)
        case MaxPool2d(size, stride, 0, False):
            return make.MaxPooling2D(size, strides=stride, **options)
        case Linear(features):
            return make.Dense(features, **options)
        case BatchNorm2d(eps):
            return make.BatchNormalization(epsilon=eps, **options)
        case Sigmoid():
            return make.Activation("sigmoid", **options)
        case Dropout(p):
            return make.Dropout(p, **options)
        case ReLU() | Softmax() | Flatten():
            return getattr(make, type(layer).__name__)(**options)
    raise AssertionError(f"no Keras layer for {layer}")


def sequential(keras: Any, net: Network) -> Any:
    """Layers by the names that Keras gives them, in a list: the short way to write it."""
    channels, height, width = net.input_shape
    layers = [keras_layer(keras, layer) for _, layer in net.layers]
    return keras.Sequential([keras.Input((height, width, channels)), *layers])


def functional(keras: Any, net: Network, **options: bool) -> Any:
    """Every layer by the name that the zoo gives it, called on the one before."""
    channels, height, width = net.input_shape
    x = entry = keras.Input((height, width, channels))
    for name, layer in net.layers:
        x = keras_layer(keras, layer, name=name, **options)(x)
    return keras.Model(entry, x)


def randomised(model: Any, seed: int = 0) -> Any:
    """Random weights for all of it; BatchNorm's far from what an untrained model has."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        shape, name = tuple(weight.shape), weight.name
        values = rng.standard_normal(shape)
        if name == "kernel":
            values *= (2 / np.prod(shape[:-1])) ** 0.5
        elif name == "moving_variance":
            values = rng.uniform(0.1, 6, shape)
        elif name == "moving_mean":
            values += 2
        weight.assign(values)
    return model


def images(net: Network) -> torch.Tensor:
    return torch.randn(3, *net.input_shape, generator=torch.Generator().manual_seed(1))


def spread(keras: Any, model: Any, x: torch.Tensor) -> None:
    """Scale the last layer so that its logits differ, and no softmax or sigmoid is saturated."""
    head = next(layer for layer in reversed(model.layers) if isinstance(layer, keras.layers.Dense))
    features = keras_output(keras, keras.Model(model.inputs, head.input), x)
    kernel, bias = head.get_weights()
    logits = features.numpy() @ kernel + bias
    head.set_weights([kernel / logits.std(0), (bias - logits.mean(0)) / logits.std(0)])


def keras_output(keras: Any, model: Any, x: torch.Tensor) -> torch.Tensor:
    output = model(keras.ops.convert_to_tensor(x.permute(0, 2, 3, 1).numpy()), training=False)
    return torch.from_numpy(keras.ops.convert_to_numpy(output))


def our_output(net: Network, state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    wide = {name: tensor.double() for name, tensor in state.items()}
    return list(reference.forward(net, wide, x.double()).values())[-1].float()


def loaded(path: Path, net: Network = TINY) -> dict[str, torch.Tensor]:
    return load(path, net.parameter_shapes(), network=net.name, flattened=net.flattened())


def save(model: Any, path: Path) -> Path:
    model.save(path) if path.suffix == ".keras" else model.save_weights(path)
    return path


def assert_agrees(keras: Any, model: Any, net: Network, path: Path) -> None:
    """The saved model gives the canonical state, and with it the outputs that Keras computes."""
    x = images(net)
    spread(keras, model, x)
    state = loaded(save(model, path), net)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert list(shapes.items()) == list(net.parameter_shapes().items())
    assert all(t.dtype == torch.float32 and t.is_contiguous() for t in state.values())
    theirs = keras_output(keras, model, x)
    assert theirs.std(0).max() > 1e-2, "the images all look alike, so this test shows little"
    torch.testing.assert_close(our_output(net, state, x), theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("build", [sequential, functional])
@pytest.mark.parametrize(
    ("net", "size"),
    [(SINGLE_TOWER, (99, 131)), (KERAS_BN, (227, 259)), (TINY, None)],
    ids=["single tower", "batchnorm", "tiny"],
)
@both_formats
def test_the_same_outputs_as_keras(
    suffix: str,
    net: Network,
    size: tuple[int, int] | None,
    build: Callable[[Any, Network], Any],
    keras: Any,
    tmp_path: Path,
    narrowed: Callable[[Network], Network],
) -> None:
    net = replace(narrowed(net), input_shape=(3, *size)) if size else net
    assert min(next(iter(net.flattened().values()))[1:]) > 1, "a flatten with nothing to permute"
    assert_agrees(keras, randomised(build(keras, net)), net, tmp_path / f"model{suffix}")


@both_formats
def test_a_head_of_other_classes(suffix: str, keras: Any, tmp_path: Path) -> None:
    tuned = TINY.with_outputs(5)
    model = randomised(sequential(keras, tuned))
    net, state = load_state(TINY, save(model, tmp_path / f"tuned{suffix}"))
    assert net == tuned
    x = images(tuned)
    torch.testing.assert_close(
        our_output(net, state, x), keras_output(keras, model, x), rtol=0, atol=1e-4
    )


ENDING = (("flatten", Flatten()), ("fc", Linear(3)))
TWELVE = tuple((f"conv{i}", Conv2d(3, 3, padding=1)) for i in range(12))


@pytest.mark.parametrize(
    ("layers", "options"),
    [(TWELVE, {}), ((("bn", BatchNorm2d(eps=1e-3)),), {"trainable": False})],
    ids=["conv2d_10 is listed before conv2d_2", "a BatchNorm that was born frozen"],
)
@both_formats
def test_order(suffix: str, layers: Any, options: Any, keras: Any, tmp_path: Path) -> None:
    net = replace(TINY, layers=(*layers, *ENDING))
    model = randomised(functional(keras, net, **options))
    assert_agrees(keras, model, net, tmp_path / f"model{suffix}")


@both_formats
def test_every_class_of_layer(suffix: str, keras: Any, tmp_path: Path) -> None:
    """Also those that own nothing have a group in the file, under the name that we expect."""
    x = entry = keras.Input((9, 9, 3))
    options: dict[str, tuple[object, ...]] = {
        **{"Conv2D": (4, 3), "Dense": (5,), "ZeroPadding2D": (1,), "MaxPooling2D": (2,)},
        **{"AveragePooling2D": (2,), "Activation": ("tanh",), "Dropout": (0.5,)},
    }
    last = ("GlobalAveragePooling2D", "Flatten", "Dense")
    for kind in [*(k for k in LAYERS if k not in (*last, "InputLayer")), *last]:
        x = getattr(keras.layers, kind)(*options.get(kind, ()))(x)
    model = randomised(keras.Model(entry, x))
    assert {type(layer).__name__ for layer in model.layers} == set(LAYERS)
    bn = ("bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    names = ("conv.weight", "conv.bias", *bn, "fc.weight", "fc.bias")
    shapes = ((4, 3, 3, 3), (4,), (4,), (4,), (4,), (4,), (5, 4), (5,))
    expected = dict(zip(names, shapes, strict=True))
    state = load(save(model, tmp_path / f"model{suffix}"), expected, network="all")
    for tensor, weight in zip(state.values(), model.weights, strict=True):
        values = keras.ops.convert_to_numpy(weight)
        assert np.array_equal(np.sort(tensor.numpy().ravel()), np.sort(values.ravel()))


@both_formats
def test_a_trained_and_frozen_model(suffix: str, keras: Any, tmp_path: Path) -> None:
    """The optimizer's arrays are passed over, and a frozen layer's keep their order."""
    model = randomised(functional(keras, TINY))
    model.get_layer("bn2").trainable = False
    model.compile(optimizer="adam", loss="categorical_crossentropy", metrics=["accuracy"])
    with torch.enable_grad():
        x = images(TINY).permute(0, 2, 3, 1).numpy()
        model.fit(x, np.eye(3, dtype=np.float32), epochs=1, verbose=0)
    assert_agrees(keras, model, TINY, tmp_path / f"model{suffix}")
    assert b"optimizer" in (tmp_path / f"model{suffix}").read_bytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@both_formats
def test_dtypes(suffix: str, dtype: str, keras: Any, tmp_path: Path) -> None:
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(keras.dtype_policies.DTypePolicy(dtype))
    try:
        model = randomised(sequential(keras, TINY))
    finally:
        keras.config.set_dtype_policy(before)
    state = loaded(save(model, tmp_path / f"model{suffix}"))
    kernel = model.layers[0].kernel.value.detach()
    assert kernel.dtype == getattr(torch, dtype)
    assert torch.equal(state["conv1.weight"], kernel.permute(3, 2, 0, 1).float())


@pytest.mark.parametrize(
    ("layer", "options", "kept"),
    [
        ("conv2", {"use_bias": False}, {"weight"}),
        ("fc1", {"use_bias": False}, {"weight"}),
        ("bn1", {"scale": False}, {"bias"}),
        ("bn2", {"center": False}, {"weight"}),
        ("bn2", {"center": False, "scale": False}, set()),
    ],
)
def test_what_config_says_was_left_out_is_filled_in(
    layer: str, options: dict[str, bool], kept: set[str], keras: Any, tmp_path: Path
) -> None:
    channels, height, width = TINY.input_shape
    layers = [keras.Input((height, width, channels))]
    for name, each in TINY.layers:
        extra = options if name == layer else {}
        layers.append(keras_layer(keras, each, name=name, **extra))
    model = randomised(keras.Sequential(layers))
    assert_agrees(keras, model, TINY, tmp_path / "model.keras")
    state = loaded(tmp_path / "model.keras")
    for key in {"weight", "bias"} - kept:
        assert state[f"{layer}.{key}"].eq(key == "weight").all()
    # A bare file does not say which, so there it is refused.
    refused(save(model, tmp_path / "model.weights.h5"), f"'{layer}' (layers/", "save('NAME.keras')")


# Files that were changed


@pytest.fixture(scope="module")
def saved(keras: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """TINY with random weights in a file of each format."""
    folder = tmp_path_factory.mktemp("saved")
    model = randomised(functional(keras, TINY))
    return {suffix: save(model, folder / f"tiny{suffix}") for suffix in SUFFIXES}


Edit = Callable[[Any], object]
Changed = Callable[[str, Edit], Path]


@pytest.fixture
def changed(saved: dict[str, Path], tmp_path: Path) -> Changed:
    """`changed(suffix, edit)`: a copy of which `edit` got the file of arrays, open in h5py."""

    def change(suffix: str, edit: Edit) -> Path:
        path = tmp_path / f"changed{suffix}"
        content = saved[suffix].read_bytes()
        buffer = io.BytesIO(member(content) if suffix == ".keras" else content)
        with h5py.File(buffer, "r+") as file:
            edit(file)
        if suffix == ".keras":
            return rezipped(saved[suffix], path, {"model.weights.h5": buffer.getvalue()})
        path.write_bytes(buffer.getvalue())
        return path

    return change


def member(content: bytes, name: str = "model.weights.h5") -> bytes:
    return zipfile.ZipFile(io.BytesIO(content)).read(name)


def rezipped(
    source: Path, target: Path, members: dict[str, bytes], method: int = zipfile.ZIP_STORED
) -> Path:
    """A copy of a zip with some of its files replaced, or added."""
    with zipfile.ZipFile(source) as old:
        content = {name: old.read(name) for name in old.namelist()} | members
    with zipfile.ZipFile(target, "w", method) as new:
        for name, data in content.items():
            new.writestr(name, data)
    return target


def reconfigured(source: Path, target: Path, edit: Callable[[Any], object]) -> Path:
    """A copy of a `.keras` whose config went through `edit`."""
    config = json.loads(member(source.read_bytes(), "config.json"))
    edit(config)
    return rezipped(source, target, {"config.json": json.dumps(config).encode()})


def refused(path: Path, *parts: str, net: Network = TINY) -> None:
    """`load` refuses the file in one line that names it and holds every one of `parts`."""
    with pytest.raises(WeightsError) as caught:
        loaded(path, net)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for part in (f"{path}: ", "; cure: ", *parts):
        assert part in message


def put(path: str, values: Any) -> Edit:
    """Puts `values` where there may be others; None only takes those away."""

    def edit(file: Any) -> None:
        if path in file:
            del file[path]
        if values is not None:
            file[path] = values

    return edit


def dataset(path: str, *how: Any, **options: Any) -> Edit:
    """Puts a dataset made with options of h5py."""

    def edit(file: Any) -> None:
        del file[path]
        file.create_dataset(path, *how, **options)

    return edit


def moved(*moves: tuple[str, str]) -> Edit:
    def edit(file: Any) -> None:
        for source, target in moves:
            file.move(source, target)

    return edit


def swapped(one: str, other: str) -> Edit:
    return moved((one, "kept"), (other, one), ("kept", other))


SOME, BIAS, VAR = np.ones(4, np.float32), "layers/dense_1/vars/1", "batch_normalization_1/vars/3"
WIDE = np.ones((5, 5, 4, 4), np.float32)
NO_FLOATS = "'fc2', layers/dense_1/vars/1 for fc2.bias, wanted a float dtype, got"
NOT_FINITE = (f"'bn2', layers/{VAR} for bn2.running_var,", "got 4 NaN or infinite")
ELSEWHERE = (BIAS, "external, virtual or oversized")
NO_BIAS = ("Dense 'fc2' (layers/dense_1)", "got 'vars/0'")

CHANGES: dict[str, tuple[Edit, *tuple[str, ...]]] = {
    "no bias": (
        put("layers/conv2d_1/vars/1", None),
        "Conv2D 'conv2' (layers/conv2d_1) wanted 'vars/0', 'vars/1' (weight, bias), got 'vars/0';",
    ),
    "no variance": (
        put("layers/batch_normalization/vars/3", None),
        "BatchNormalization 'bn1' (layers/batch_normalization)",
        "got 'vars/0', 'vars/1', 'vars/2';",
    ),
    # Its group goes too, and in a bare file with it all that told of the layer.
    "no convolution": (put("layers/conv2d_2", None), "conv3", "got none"),
    "a third variable": (
        put("layers/dense/vars/2", SOME),
        "Dense 'fc1' (layers/dense) wanted 'vars/0', 'vars/1'",
        "got 'vars/0', 'vars/1', 'vars/2'",
    ),
    "nobody's": (put("vars/0", SOME), "vars/0 is left over"),
    "a flatten's": (put("layers/flatten/vars/0", SOME), "layers/flatten/vars/0 is left"),
    "another class's": (put("layers/my_own/vars/0", SOME), "layers/my_own"),
    "a wrong shape": (
        put("layers/conv2d_1/vars/0", WIDE),
        "Conv2D 'conv2', layers/conv2d_1/vars/0 for conv2.weight, wanted shape (3, 3, 4, 4), "
        "got (5, 5, 4, 4)",
    ),
    "another layer's": (swapped("layers/dense", "layers/dense_1"), "layers/dense"),
    **{
        f"{values} of {values.dtype}": (put(f"layers/{VAR}", np.full(4, values)), *NOT_FINITE)
        for values in (np.float32("nan"), np.float16("-inf"), np.float64(1e39))
    },
    **{
        f"no floats: {dtype}": (put(BIAS, np.zeros(3, dtype)), NO_FLOATS)
        for dtype in ("int8", "complex64", "S3", "V2")
    },
    "oversized": (
        dataset(BIAS, (3,), "f4", maxshape=(None,), chunks=(2**20,), compression="gzip"),
        *ELSEWHERE,
    ),
    "a bomb": (  # which costs nothing to write
        dataset(BIAS, (2**50,), "f4", chunks=(1024,)),
        BIAS,
        "wanted shape (3,), got (1125899906842624,)",
    ),
    "a link": (put(BIAS, h5py.SoftLink("/layers/dense/vars/1")), *NO_BIAS),
    "outputs without end": (
        dataset("layers/dense_1/vars/0", (6, 70_000), np.float32, chunks=(1, 1)),
        "65536 outputs, got 70000",
    ),
}


@both_formats
@pytest.mark.parametrize(("edit", "parts"), [(e, p) for e, *p in CHANGES.values()], ids=CHANGES)
def test_changed_arrays_are_refused(
    suffix: str, edit: Edit, parts: list[str], changed: Changed
) -> None:
    path = changed(suffix, edit)
    with pytest.raises(WeightsError) as caught:
        load_state(TINY, path)
    for part in (f"{path}: ", "; cure: ", *parts):
        assert part in str(caught.value)


@both_formats
def test_arrays_that_lie_elsewhere(suffix: str, changed: Changed, tmp_path: Path) -> None:
    """Nothing but the file is opened."""
    other = str(tmp_path / "other.h5")
    with h5py.File(other, "w") as file:
        file["secret"] = np.zeros(3, np.float32)
    (tmp_path / "raw").write_bytes(bytes(12))

    def virtual(file: Any) -> None:
        del file[BIAS]
        layout = h5py.VirtualLayout((3,), "f4")
        layout[:] = h5py.VirtualSource(other, "secret", (3,))
        file.create_virtual_dataset(BIAS, layout)

    external = dataset(BIAS, (3,), "f4", external=[(str(tmp_path / "raw"), 0, 12)])
    for edit in (external, virtual):
        refused(changed(suffix, edit), *ELSEWHERE)
    refused(changed(suffix, put(BIAS, h5py.ExternalLink(other, "secret"))), *NO_BIAS)


@pytest.mark.parametrize(
    ("suffix", "edit", "part"),
    [
        (  # of one shape, so that only the names tell
            ".keras",
            swapped("layers/conv2d_1", "layers/conv2d_2"),
            "layers/conv2d_1 wanted layer 'conv2' as config.json has them in order, got 'conv3'",
        ),
        (
            ".weights.h5",
            moved(("layers/conv2d_1", "layers/conv2d_7")),
            "layers/conv2d_2 without layers/conv2d_1",
        ),
    ],
)
def test_groups_in_an_order_that_nobody_tells(
    suffix: str, edit: Edit, part: str, changed: Changed
) -> None:
    refused(changed(suffix, edit), part)


@both_formats
def test_files_of_earlier_versions_name_no_layers(
    suffix: str, changed: Changed, saved: dict[str, Path]
) -> None:
    def nameless(file: Any) -> None:
        """As Keras wrote its files before 3.5 or so."""
        file.visititems(lambda _, item: item.attrs.pop("name", None) and None)

    state, expected = loaded(changed(suffix, nameless)), loaded(saved[suffix])
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_the_flattened_volume_must_be_told(saved: dict[str, Path]) -> None:
    for path in saved.values():
        with pytest.raises(WeightsError, match=r"fc1\.weight reads 80 .*\(H, W, C\).*flattened="):
            load(path, TINY.parameter_shapes(), network="tiny")


# Models that are something else


@both_formats
def test_a_model_of_another_network(suffix: str, keras: Any, tmp_path: Path) -> None:
    def of(*names: str) -> Path:
        net = replace(TINY, layers=tuple((n, layer) for n, layer in TINY.layers if n in names))
        return save(functional(keras, net), tmp_path / f"model{suffix}")

    names = [name for name, _ in TINY.layers]
    refused(of(*names[:-2]), "fc2 wanted a Dense, got none")
    shorter = replace(TINY, layers=TINY.layers[:-2])
    refused(of(*names), "Dense 'fc2' (layers/dense_1) is left over", net=shorter)
    told = "conv2 wanted a Conv2D, got BatchNormalization 'bn2' (layers/batch_normalization_1)"
    bare = "conv3 wanted a Conv2D, got none"
    fewer = (name for name in names if name != "conv2")
    refused(of(*fewer), told if suffix == ".keras" else bare)


def test_classes_that_are_not_read(keras: Any, tmp_path: Path) -> None:
    make = keras.layers

    class Own(make.Dense):  # type: ignore[misc, name-defined]
        pass

    @keras.saving.register_keras_serializable()
    class Dense(make.Dense):  # type: ignore[misc, name-defined]
        pass

    inner = keras.Sequential([make.Dense(2, name="inside")], name="inner")
    for layer, group, words in (
        (make.Lambda(lambda x: x + 1, name="add_one"), "layers/lambda", "'Lambda'"),
        (make.DepthwiseConv2D(2, name="deep"), "layers/depthwise_conv2d", "'DepthwiseConv2D'"),
        (make.Permute((2, 1, 3), name="turn"), "layers/permute", "'Permute'"),
        (Own(2, name="own"), "layers/own", "'Own', which is not Keras's own"),
        (inner, "layers/sequential", "'Sequential'"),
        (Dense(2, name="alike"), "", "'Dense', registered as 'Custom>Dense', which is not Keras's"),
    ):
        model = keras.Sequential([keras.Input((8, 10, 3)), layer])
        path = save(model, tmp_path / "model.keras")
        refused(path, f"layer '{layer.name}' wanted a class that is read, got {words}", CHAIN)
        if group:
            refused(save(model, tmp_path / "model.weights.h5"), group, CHAIN)


def test_a_class_registered_under_another_name(saved: dict[str, Path], tmp_path: Path) -> None:
    """Which Keras would load instead of its own, though the file says Conv2D of keras.layers."""

    def under(name: object, layer: int | None) -> Path:
        def edit(config: Any) -> None:
            item = config if layer is None else config["config"]["layers"][layer]
            item["registered_name"] = name

        return reconfigured(saved[".keras"], tmp_path / "other.keras", edit)

    words = "'Conv2D', registered as 'mypkg>Conv2D', which is not Keras's own"
    refused(under("mypkg>Conv2D", 1), "layer 'conv1'", f"got {words}")
    words = "'Functional', registered as 'mypkg>Net', which is not Keras's own"
    refused(under("mypkg>Net", None), f"wanted a Sequential or Functional model, got {words}")
    refused(under(["Conv2D"], 1), "layer 'conv1'")
    bias = loaded(saved[".keras"])["conv1.bias"]
    for name in (None, "", "Conv2D"):  # no other name
        assert torch.equal(loaded(under(name, 1))["conv1.bias"], bias)


def test_a_model_class_of_its_authors_own(keras: Any, tmp_path: Path) -> None:
    class Subclassed(keras.Model):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.fc = keras.layers.Dense(2)
            self.out = keras.layers.Dense(2)

        def call(self, x: Any) -> Any:
            return self.out(self.fc(x))

    model = Subclassed()
    model(np.zeros((1, 2), np.float32))
    path = save(model, tmp_path / "model.keras")
    kind = "wanted a Sequential or Functional model, got"
    refused(path, f"{kind} 'Subclassed'", CHAIN)
    reconfigured(path, path, lambda config: config.update(module="keras"))
    refused(path, f"{kind} 'Subclassed'", CHAIN)
    reconfigured(path, path, lambda config: config.update(class_name="Functional", module=None))
    refused(path, f"{kind} 'Functional'", CHAIN)
    refused(save(model, tmp_path / "model.weights.h5"), "fc ('", "is no layer that is read", CHAIN)


def test_branches(keras: Any, tmp_path: Path) -> None:
    make = keras.layers
    entry, other = keras.Input((8, 10, 3), name="picture"), keras.Input((8, 10, 3), name="mask")
    first, shared = make.Conv2D(4, 3, name="first"), make.ReLU(name="shared")
    left, right = make.ReLU(name="left"), make.ReLU(name="right")
    x = first(entry)
    summed = make.Add(name="sum")([left(x), right(x)])
    for inputs, outputs, words in (
        (entry, summed, "layer 'sum' wanted a class that is read, got 'Add'"),
        (entry, [left(x), right(x)], "layer 'right' (ReLU) reads 'first', wanted 'left'"),
        (entry, [x, left(x)], "output reads 'first', 'left', wanted 'left'"),
        (entry, shared(shared(x)), "layer 'shared' (ReLU) reads 'first', 'shared', wanted 'first'"),
        ([entry, other], [first(entry), left(other)], "reads none, wanted 'picture'"),
    ):
        refused(save(keras.Model(inputs, outputs), tmp_path / "model.keras"), words)


@pytest.mark.parametrize(
    ("kind", "setting", "value"),
    [
        ("Conv2D", "data_format", "channels_first"),
        ("MaxPooling2D", "data_format", "channels_first"),
        ("Flatten", "data_format", "channels_first"),
        ("BatchNormalization", "axis", 1),
    ],
)
def test_channels_first(kind: str, setting: str, value: object, keras: Any, tmp_path: Path) -> None:
    arguments = {"Conv2D": (4, 3)}.get(kind, ())
    layer = getattr(keras.layers, kind)(*arguments, name="odd", **{setting: value})
    model = keras.Sequential([keras.Input((8, 10, 3)), layer])
    words = f"layer 'odd' ({kind}) wanted channels last, got {setting} {value!r}"
    refused(save(model, tmp_path / "model.keras"), words)


@pytest.mark.filterwarnings("ignore")
def test_the_older_format(keras: Any, tmp_path: Path) -> None:
    randomised(sequential(keras, TINY)).save(tmp_path / "model.h5")
    refused(tmp_path / "model.h5", "older .h5 format", "load_model(...).save('NAME.keras')")
    with h5py.File(tmp_path / "old.weights.h5", "w") as old:
        old.attrs["layer_names"] = ["conv1"]
    refused(tmp_path / "old.weights.h5", "older .h5 format")


# Bytes that are broken, or mean harm; test_weights.py has what is no Keras file at all


@both_formats
def test_truncated_anywhere(suffix: str, saved: dict[str, Path], tmp_path: Path) -> None:
    whole = saved[suffix].read_bytes()
    path = tmp_path / f"short{suffix}"
    for kept in (1, 100, len(whole) // 2, len(whole) - 1000, len(whole) - 1):
        path.write_bytes(whole[:kept])
        refused(path, f"cannot be read as {path.suffix}")


def test_a_flipped_bit_in_a_zip(saved: dict[str, Path], tmp_path: Path) -> None:
    content = bytearray(saved[".keras"].read_bytes())
    kernel = loaded(saved[".keras"])["fc2.bias"].numpy().tobytes()
    content[content.index(kernel)] ^= 1
    (tmp_path / "flipped.keras").write_bytes(content)
    refused(tmp_path / "flipped.keras", "cannot be read as .keras", "CRC")


@pytest.mark.parametrize("name", ["config.json", "model.weights.h5"])
def test_a_zip_bomb_or_a_zip_without_its_file(
    name: str, saved: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "bomb.keras"
    zeros = {name: bytes(20 * 2**20)}
    rezipped(saved[".keras"], path, zeros, zipfile.ZIP_DEFLATED)
    refused(path, f"{name} unpacks to more than 16 MiB")
    # A directory that lies about the size does not help.
    content = path.read_bytes()
    size = (20 * 2**20).to_bytes(4, "little")
    path.write_bytes(content.replace(size, (1000).to_bytes(4, "little")))
    refused(path, "cannot be read as .keras")
    rezipped(saved[".keras"], path, {name: b"0"}, zipfile.ZIP_BZIP2)
    refused(path, "stored or deflated, got zip method 12")
    path.write_bytes(saved[".keras"].read_bytes().replace(name.encode(), name.upper().encode()))
    refused(path, f"wanted {name} in the zip, got none")


def test_a_compressed_zip_is_fine_and_nothing_is_unpacked_to_the_disk(
    saved: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "folder" / "model.keras"
    path.parent.mkdir()
    evil = {"../evil": b"x", "assets/evil": b"x"}
    rezipped(saved[".keras"], path, evil, zipfile.ZIP_DEFLATED)
    state, expected = loaded(path), loaded(saved[".keras"])
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert [p.name for p in tmp_path.rglob("*")] == ["folder", "model.keras"]


@pytest.mark.parametrize(
    "config", [b"", b"{", b"null", b"[]", b"{}", b"[" * 99_999, b'{"class_name": 3, "module": 4}']
)
def test_a_config_that_is_none(config: bytes, saved: dict[str, Path], tmp_path: Path) -> None:
    refused(rezipped(saved[".keras"], tmp_path / "odd.keras", {"config.json": config}))


def test_names_in_a_config_cannot_break_the_line(saved: dict[str, Path], tmp_path: Path) -> None:
    def rename(config: Any) -> None:
        layer = config["config"]["layers"][3]
        layer["class_name"] = layer["config"]["name"] = "x\n\x1b[32mall is well"

    path = reconfigured(saved[".keras"], tmp_path / "odd.keras", rename)
    refused(path, r"'x\n\x1b[32mall is well'")


@both_formats
def test_keras_is_not_needed_and_h5py_is(
    suffix: str, saved: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "keras"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert loaded(saved[suffix])
    monkeypatch.setitem(sys.modules, "h5py", None)
    refused(saved[suffix], "h5py", "cure: pip install -e '.[keras]'")
