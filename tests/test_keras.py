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


def narrowed(net: Network, input_shape: tuple[int, int, int]) -> Network:
    """The same layers at a sixteenth of the width: fast, and every shape still its own."""

    def thin(layer: Layer) -> Layer:
        if isinstance(layer, Conv2d):
            return replace(layer, out_channels=layer.out_channels // 16)
        if isinstance(layer, Linear):
            return replace(layer, out_features=max(1, layer.out_features // 16))
        return layer

    layers = tuple((name, thin(layer)) for name, layer in net.layers)
    return replace(net, input_shape=input_shape, layers=layers)


def keras_layers(keras: Any, layer: Layer, **options: Any) -> list[Any]:
    """What a Keras user writes for a layer of the zoo's; `options` go to the one that counts."""
    make = keras.layers
    match layer:
        case Conv2d(channels, size, stride, padding, 1, 1) if padding in (0, (size - 1) // 2):
            assert not padding or stride == 1, "Keras pads that one otherwise"
            mode = "same" if padding else "valid"
            return [make.Conv2D(channels, size, strides=stride, padding=mode, **options)]
        case MaxPool2d(size, stride, 0, False):
            return [make.MaxPooling2D(size, strides=stride, **options)]
        case Linear(features):
            return [make.Dense(features, **options)]
        case BatchNorm2d(eps):
            return [make.BatchNormalization(epsilon=eps, **options)]
        case ReLU():
            return [make.ReLU(**options)]
        case Sigmoid():
            return [make.Activation("sigmoid", **options)]
        case Softmax():
            return [make.Softmax(**options)]
        case Dropout(p):
            return [make.Dropout(p, **options)]
        case Flatten():
            return [make.Flatten(**options)]
    raise AssertionError(f"no Keras layer for {layer}")


def sequential(keras: Any, net: Network) -> Any:
    """Unnamed layers, activations inside the layers before them: the short way to write it."""
    channels, height, width = net.input_shape
    layers = [keras.Input((height, width, channels))]
    inside = {ReLU: "relu", Sigmoid: "sigmoid", Softmax: "softmax"}
    owners = (keras.layers.Conv2D, keras.layers.Dense)
    for _, layer in net.layers:
        if type(layer) in inside and isinstance(layers[-1], owners):
            layers[-1].activation = keras.activations.get(inside[type(layer)])
        else:
            layers += keras_layers(keras, layer)
    return keras.Sequential(layers)


def functional(keras: Any, net: Network, **options: bool) -> Any:
    """Every layer by the name that the zoo gives it, called on the one before."""
    channels, height, width = net.input_shape
    x = entry = keras.Input((height, width, channels))
    for name, layer in net.layers:
        for made in keras_layers(keras, layer, name=name, **options):
            x = made(x)
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
    "net",
    [narrowed(SINGLE_TOWER, (3, 99, 131)), narrowed(KERAS_BN, (3, 227, 259)), TINY],
    ids=lambda net: net.name,
)
@both_formats
def test_the_same_outputs_as_keras(
    suffix: str, net: Network, build: Callable[[Any, Network], Any], keras: Any, tmp_path: Path
) -> None:
    assert min(next(iter(net.flattened().values()))[1:]) > 1, "a flatten with nothing to permute"
    assert_agrees(keras, randomised(build(keras, net)), net, tmp_path / f"model{suffix}")


@both_formats
def test_a_head_of_other_classes(suffix: str, keras: Any, tmp_path: Path) -> None:
    tuned = TINY.with_outputs(5)
    model = randomised(sequential(keras, tuned))
    path = save(model, tmp_path / f"tuned{suffix}")
    net, state = load_state(TINY, path)
    assert net == tuned
    x = images(tuned)
    torch.testing.assert_close(
        our_output(net, state, x), keras_output(keras, model, x), rtol=0, atol=1e-4
    )


@both_formats
def test_a_head_has_a_limit_that_its_refusal_tells(suffix: str, changed: Changed) -> None:
    path = "layers/dense_1/vars/0"

    def claim(file: Any) -> None:
        features = file[path].shape[0]
        del file[path]
        file.create_dataset(path, (features, 70_000), np.float32, chunks=(1, 1))

    with pytest.raises(WeightsError, match="65536 outputs, got 70000"):
        load_state(TINY, changed(suffix, claim))


@pytest.mark.parametrize(
    ("net", "parameters", "frozen"),
    [(SINGLE_TOWER, 62_378_344, 0), (KERAS_BN, 21_586_689, 704)],
    ids=lambda value: getattr(value, "name", None),
)
def test_at_full_size_the_zoo_and_keras_own_the_same(
    net: Network, parameters: int, frozen: int, keras: Any
) -> None:
    with keras.device("meta"):  # shapes without numbers
        model = functional(keras, net)
    assert model.count_params() == parameters
    assert sum(int(np.prod(w.shape)) for w in model.non_trainable_weights) == frozen
    turned = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}
    shapes = [tuple(w.shape[i] for i in turned[len(w.shape)]) for w in model.weights]
    assert shapes == list(net.parameter_shapes().values())


@both_formats
def test_the_tenth_layer_does_not_come_second(suffix: str, keras: Any, tmp_path: Path) -> None:
    """Twelve convolutions of one shape, which h5py lists by name: conv2d_10 before conv2d_2."""
    convs = tuple((f"conv{i}", Conv2d(3, 3, padding=1)) for i in range(12))
    net = replace(TINY, layers=(*convs, ("flatten", Flatten()), ("fc", Linear(3))))
    assert_agrees(keras, randomised(functional(keras, net)), net, tmp_path / f"model{suffix}")


@both_formats
def test_the_order_of_the_flatten_matters(suffix: str, keras: Any, tmp_path: Path) -> None:
    """So the outputs above would show it if the features stayed as Keras orders them."""
    model = randomised(sequential(keras, TINY))
    x = images(TINY)
    spread(keras, model, x)
    path = save(model, tmp_path / f"model{suffix}")
    assert TINY.flattened() == {"fc1.weight": (4, 4, 5)}
    told = {"fc1.weight": (80, 1, 1)}
    unturned = load(path, TINY.parameter_shapes(), network="tiny", flattened=told)
    difference = our_output(TINY, unturned, x) - keras_output(keras, model, x)
    assert difference.abs().max() > 1e-2


def test_the_flattened_volume_must_be_told(saved: dict[str, Path]) -> None:
    for path in saved.values():
        with pytest.raises(WeightsError, match=r"fc1\.weight reads 80 .*\(H, W, C\).*flattened="):
            load(path, TINY.parameter_shapes(), network="tiny")


@both_formats
def test_every_class_of_layer(suffix: str, keras: Any, tmp_path: Path) -> None:
    """Also those that own nothing have a group in the file, under the name that we expect."""
    make = keras.layers
    x = entry = keras.Input((9, 9, 3))
    options = {
        "Conv2D": (4, 3),
        "Dense": (5,),
        "ZeroPadding2D": (1,),
        "MaxPooling2D": (2,),
        "AveragePooling2D": (2,),
        "Activation": ("tanh",),
        "Dropout": (0.5,),
    }
    last = ("GlobalAveragePooling2D", "Flatten", "Dense")
    for kind in [*(k for k in LAYERS if k not in (*last, "InputLayer")), *last]:
        x = getattr(make, kind)(*options.get(kind, ()))(x)
    model = randomised(keras.Model(entry, x))
    assert {type(layer).__name__ for layer in model.layers} == set(LAYERS)
    names = ("conv.weight", "conv.bias", *(f"bn.{key}" for key in BN), "fc.weight", "fc.bias")
    shapes = ((4, 3, 3, 3), (4,), (4,), (4,), (4,), (4,), (5, 4), (5,))
    expected = dict(zip(names, shapes, strict=True))
    state = load(save(model, tmp_path / f"model{suffix}"), expected, network="all")
    for tensor, weight in zip(state.values(), model.weights, strict=True):
        values = keras.ops.convert_to_numpy(weight)
        assert np.array_equal(np.sort(tensor.numpy().ravel()), np.sort(values.ravel()))


BN = ("weight", "bias", "running_mean", "running_var")


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
    contents = (tmp_path / f"model{suffix}").read_bytes()
    assert b"optimizer" in contents


@both_formats
def test_a_batchnorm_that_was_born_frozen(suffix: str, keras: Any, tmp_path: Path) -> None:
    last = (("flatten", Flatten()), ("fc", Linear(3)))
    net = replace(TINY, layers=(("bn", BatchNorm2d(eps=1e-3)), *last))
    model = randomised(functional(keras, net, trainable=False))
    assert_agrees(keras, model, net, tmp_path / f"model{suffix}")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@both_formats
def test_dtypes(suffix: str, dtype: str, keras: Any, tmp_path: Path) -> None:
    with_dtype = keras.dtype_policies.DTypePolicy(dtype)
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(with_dtype)
    try:
        model = randomised(sequential(keras, TINY))
    finally:
        keras.config.set_dtype_policy(before)
    state = loaded(save(model, tmp_path / f"model{suffix}"))
    kernel = model.layers[0].kernel.value.detach()
    assert kernel.dtype == getattr(torch, dtype)
    assert torch.equal(state["conv1.weight"], kernel.permute(3, 2, 0, 1).float())


# What was left out of a model


def shorn(keras: Any, layer: str, **options: bool) -> Any:
    """TINY with one layer built with `options`."""
    channels, height, width = TINY.input_shape
    layers = [keras.Input((height, width, channels))]
    for name, made in TINY.layers:
        extra = options if name == layer else {}
        layers += keras_layers(keras, made, name=name, **extra)
    return randomised(keras.Sequential(layers))


@pytest.mark.parametrize(
    ("layer", "options", "kept"),
    [
        ("conv2", {"use_bias": False}, "weight"),
        ("fc1", {"use_bias": False}, "weight"),
        ("bn1", {"scale": False}, "bias, running_mean, running_var"),
        ("bn2", {"center": False}, "weight, running_mean, running_var"),
        ("bn2", {"center": False, "scale": False}, "running_mean, running_var"),
    ],
)
def test_what_config_says_was_left_out_is_filled_in(
    layer: str, options: dict[str, bool], kept: str, keras: Any, tmp_path: Path
) -> None:
    model = shorn(keras, layer, **options)
    assert_agrees(keras, model, TINY, tmp_path / "model.keras")
    state = loaded(tmp_path / "model.keras")
    for key in {"weight", "bias"} - set(kept.split(", ")):
        assert torch.equal(
            state[f"{layer}.{key}"], torch.full((state[f"{layer}.bias"].shape), key == "weight")
        )
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


def refused(path: Path, *parts: object, net: Network = TINY) -> None:
    """`load` refuses the file in one line that names it and holds every one of `parts`."""
    with pytest.raises(WeightsError) as caught:
        loaded(path, net)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for part in (f"{path}: ", "; cure: ", *parts):
        assert str(part) in message


def delete(path: str) -> Edit:
    def edit(file: Any) -> None:
        del file[path]

    return edit


def put(path: str, values: Any) -> Edit:
    def edit(file: Any) -> None:
        if path in file:
            del file[path]
        file[path] = values

    return edit


def swap(one: str, other: str) -> Edit:
    def edit(file: Any) -> None:
        file.move(one, "kept")
        file.move(other, one)
        file.move("kept", other)

    return edit


def nameless(file: Any) -> None:
    """As Keras wrote its files before 3.5 or so."""

    def forget(path: str, item: Any) -> None:
        item.attrs.pop("name", None)

    file.visititems(forget)


@both_formats
def test_files_of_earlier_versions_name_no_layers(
    suffix: str, changed: Changed, saved: dict[str, Path]
) -> None:
    state, wanted = loaded(changed(suffix, nameless)), loaded(saved[suffix])
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)


@both_formats
def test_a_missing_array(suffix: str, changed: Changed) -> None:
    refused(
        changed(suffix, delete("layers/conv2d_1/vars/1")),
        "Conv2D 'conv2' (layers/conv2d_1) wanted 'vars/0', 'vars/1' (weight, bias), got 'vars/0';",
    )
    refused(
        changed(suffix, delete("layers/batch_normalization/vars/3")),
        "BatchNormalization 'bn1' (layers/batch_normalization)",
        "got 'vars/0', 'vars/1', 'vars/2';",
    )
    # Its group goes too, and in a bare file with it all that told of the layer.
    refused(changed(suffix, delete("layers/conv2d_2")), "conv3", "got none")


@both_formats
def test_an_array_too_many(suffix: str, changed: Changed) -> None:
    some = np.ones(4, np.float32)
    refused(
        changed(suffix, put("layers/dense/vars/2", some)),
        "Dense 'fc1' (layers/dense) wanted 'vars/0', 'vars/1'",
        "got 'vars/0', 'vars/1', 'vars/2'",
    )
    refused(changed(suffix, put("vars/0", some)), "vars/0 is left over")
    refused(changed(suffix, put("layers/flatten/vars/0", some)), "layers/flatten/vars/0 is left")
    refused(changed(suffix, put("layers/my_own/vars/0", some)), "layers/my_own")


@both_formats
def test_a_wrong_shape(suffix: str, changed: Changed) -> None:
    refused(
        changed(suffix, put("layers/conv2d_1/vars/0", np.ones((5, 5, 4, 4), np.float32))),
        "Conv2D 'conv2', layers/conv2d_1/vars/0 for conv2.weight, wanted shape (3, 3, 4, 4), "
        "got (5, 5, 4, 4)",
    )
    refused(
        changed(suffix, swap("layers/dense", "layers/dense_1")),
        "layers/dense",
        "got 'fc2'" if suffix == ".keras" else "for fc1.weight, wanted shape (80, 6), got (6, 3)",
    )


@both_formats
@pytest.mark.parametrize("values", [np.float32("nan"), np.float16("-inf"), np.float64(1e39)])
def test_values_that_are_not_finite(suffix: str, values: Any, changed: Changed) -> None:
    refused(
        changed(suffix, put("layers/batch_normalization_1/vars/3", np.full(4, values))),
        "'bn2', layers/batch_normalization_1/vars/3 for bn2.running_var,",
        "got 4 NaN or infinite",
    )


@both_formats
@pytest.mark.parametrize("dtype", ["int8", "complex64", "S3", "V2"])
def test_values_that_are_no_floats(suffix: str, dtype: str, changed: Changed) -> None:
    refused(
        changed(suffix, put("layers/dense_1/vars/1", np.zeros(3, dtype))),
        "'fc2', layers/dense_1/vars/1 for fc2.bias, wanted a float dtype, got",
    )


@both_formats
def test_arrays_that_lie_elsewhere(suffix: str, changed: Changed, tmp_path: Path) -> None:
    """Nothing but the file is opened, and no more than its own size is unpacked."""
    path = "layers/dense_1/vars/1"
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["secret"] = np.zeros(3, np.float32)
    (tmp_path / "raw").write_bytes(bytes(12))

    def external(file: Any) -> None:
        del file[path]
        file.create_dataset(path, (3,), "f4", external=[(str(tmp_path / "raw"), 0, 12)])

    def virtual(file: Any) -> None:
        del file[path]
        layout = h5py.VirtualLayout((3,), "f4")
        layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "secret", (3,))
        file.create_virtual_dataset(path, layout)

    def oversized(file: Any) -> None:
        del file[path]
        file.create_dataset(path, (3,), "f4", maxshape=(None,), chunks=(2**20,), compression="gzip")

    for edit in (external, virtual, oversized):
        refused(changed(suffix, edit), path, "external, virtual or oversized")
    other = str(tmp_path / "other.h5")
    for link in (h5py.ExternalLink(other, "secret"), h5py.SoftLink("/layers/dense/vars/1")):
        refused(changed(suffix, put(path, link)), "Dense 'fc2' (layers/dense_1)", "got 'vars/0'")
    huge = h5py.File(io.BytesIO(), "w").create_dataset
    assert huge("x", (2**50,), "f4", chunks=(1024,)).nbytes == 2**52  # costs nothing to write

    def bomb(file: Any) -> None:
        del file[path]
        file.create_dataset(path, (2**50,), "f4", chunks=(1024,))

    refused(changed(suffix, bomb), path, "wanted shape (3,), got (1125899906842624,)")


def test_groups_in_another_order_than_config(changed: Changed) -> None:
    """Of one shape, so that only the names tell."""
    refused(
        changed(".keras", swap("layers/conv2d_1", "layers/conv2d_2")),
        "layers/conv2d_1 wanted layer 'conv2' as config.json has them in order, got 'conv3'",
    )


def test_counters_with_a_gap_tell_no_order(changed: Changed) -> None:
    def gap(file: Any) -> None:
        file.move("layers/conv2d_1", "layers/conv2d_7")

    refused(changed(".weights.h5", gap), "layers/conv2d_2 without layers/conv2d_1", CHAIN)


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
    fewer = [name for name in names if name != "conv2"]
    refused(
        of(*fewer),
        "conv2 wanted a Conv2D, got BatchNormalization 'bn2' (layers/batch_normalization_1)"
        if suffix == ".keras"
        else "conv3 wanted a Conv2D, got none",
    )


def test_layers_in_another_order(keras: Any, tmp_path: Path) -> None:
    """The network's own arrays, but its second BatchNorm stands behind the third convolution."""
    order = [*range(5), 6, 7, 5, *range(8, 14)]
    net = replace(TINY, layers=tuple(TINY.layers[i] for i in order))
    path = save(functional(keras, net), tmp_path / "model.keras")
    refused(path, "bn2 wanted a BatchNormalization, got Conv2D 'conv3' (layers/conv2d_2)")


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
    for name in (None, "", "Conv2D"):  # no other name
        assert torch.equal(
            loaded(under(name, 1))["conv1.bias"], loaded(saved[".keras"])["conv1.bias"]
        )


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
    refused(path, "wanted a Sequential or Functional model, got 'Subclassed'", CHAIN)
    reconfigured(path, path, lambda config: config.update(module="keras"))
    refused(path, "wanted a Sequential or Functional model, got 'Subclassed'", CHAIN)
    reconfigured(path, path, lambda config: config.update(class_name="Functional", module=None))
    refused(path, "wanted a Sequential or Functional model, got 'Functional'", CHAIN)
    path = save(model, tmp_path / "model.weights.h5")
    refused(path, "fc ('", "is no layer that is read", CHAIN)


def test_branches(keras: Any, tmp_path: Path) -> None:
    make = keras.layers
    entry = keras.Input((8, 10, 3), name="picture")
    first = make.Conv2D(4, 3, name="first")
    shared = make.ReLU(name="shared")
    left, right = make.ReLU(name="left"), make.ReLU(name="right")
    x = first(entry)
    other = keras.Input((8, 10, 3), name="mask")
    for inputs, outputs, words in (
        (
            entry,
            make.Add(name="sum")([left(x), right(x)]),
            "layer 'sum' wanted a class that is read, got 'Add'",
        ),
        (entry, [left(x), right(x)], "layer 'right' (ReLU) reads 'first', wanted 'left'"),
        (entry, [x, left(x)], "output reads 'first', 'left', wanted 'left'"),
        (entry, shared(shared(x)), "layer 'shared' (ReLU) reads 'first', 'shared', wanted 'first'"),
        ([entry, other], [first(entry), left(other)], "reads none, wanted 'picture'"),
    ):
        path = save(keras.Model(inputs, outputs), tmp_path / "model.keras")
        refused(path, words)


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
    refused(
        save(model, tmp_path / "model.keras"),
        f"layer 'odd' ({kind}) wanted channels last, got {setting} {value!r}",
    )


@pytest.mark.filterwarnings("ignore")
def test_the_older_format(keras: Any, tmp_path: Path) -> None:
    randomised(sequential(keras, TINY)).save(tmp_path / "model.h5")
    refused(tmp_path / "model.h5", "older .h5 format", "load_model(...).save('NAME.keras')")
    with h5py.File(tmp_path / "model.h5", "r+") as file:
        weights = file["model_weights"]
        with h5py.File(tmp_path / "old.weights.h5", "w") as old:
            old.attrs["layer_names"] = weights.attrs["layer_names"]
    refused(tmp_path / "old.weights.h5", "older .h5 format")


# Bytes that are broken, or mean harm


@both_formats
def test_truncated_anywhere(suffix: str, saved: dict[str, Path], tmp_path: Path) -> None:
    whole = saved[suffix].read_bytes()
    path = tmp_path / f"short{suffix}"
    for kept in (1, 100, len(whole) // 2, len(whole) - 1000, len(whole) - 1):
        path.write_bytes(whole[:kept])
        refused(path, f"cannot be read as {path.suffix}")


@both_formats
@pytest.mark.parametrize("content", [b"", b"<html>404 Not Found</html>\n" * 9, b"\xff" * 64])
def test_empty_or_something_else(suffix: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"odd{suffix}"
    path.write_bytes(content)
    refused(path, "empty" if not content else f"cannot be read as {path.suffix}")


def test_a_flipped_bit_in_a_zip(saved: dict[str, Path], tmp_path: Path) -> None:
    content = bytearray(saved[".keras"].read_bytes())
    kernel = loaded(saved[".keras"])["fc2.bias"].numpy().tobytes()
    content[content.index(kernel)] ^= 1
    (tmp_path / "flipped.keras").write_bytes(content)
    refused(tmp_path / "flipped.keras", "cannot be read as .keras", "CRC")


@pytest.mark.parametrize("name", ["config.json", "model.weights.h5"])
def test_zip_bombs(name: str, saved: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "bomb.keras"
    zeros = {name: bytes(20 * 2**20)}
    rezipped(saved[".keras"], path, zeros, zipfile.ZIP_DEFLATED)
    refused(path, f"{name} unpacks to more than 16 MiB")
    # A directory that lies about the size does not help.
    content = path.read_bytes()
    size = (20 * 2**20).to_bytes(4, "little")
    path.write_bytes(content.replace(size, (1000).to_bytes(4, "little")))
    refused(path, "cannot be read as .keras")
    rezipped(saved[".keras"], path, zeros, zipfile.ZIP_BZIP2)
    refused(path, "stored or deflated, got zip method 12")


def test_a_compressed_zip_is_fine_and_nothing_is_unpacked_to_the_disk(
    saved: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "folder" / "model.keras"
    path.parent.mkdir()
    evil = {"../evil": b"x", "assets/evil": b"x"}
    rezipped(saved[".keras"], path, evil, zipfile.ZIP_DEFLATED)
    state, wanted = loaded(path), loaded(saved[".keras"])
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    assert [p.name for p in tmp_path.rglob("*")] == ["folder", "model.keras"]


def test_a_zip_without_its_files(saved: dict[str, Path], tmp_path: Path) -> None:
    for name in ("config.json", "model.weights.h5"):
        path = tmp_path / "part.keras"
        with zipfile.ZipFile(path, "w") as archive:
            content = saved[".keras"].read_bytes()
            for other in {"config.json", "model.weights.h5"} - {name}:
                archive.writestr(other, member(content, other))
        refused(path, f"wanted {name} in the zip, got none")


@pytest.mark.parametrize(
    "config", [b"", b"{", b"null", b"[]", b"{}", b"[" * 99_999, b'{"class_name": 3, "module": 4}']
)
def test_a_config_that_is_none(config: bytes, saved: dict[str, Path], tmp_path: Path) -> None:
    path = rezipped(saved[".keras"], tmp_path / "odd.keras", {"config.json": config})
    refused(path)


def test_names_in_a_config_cannot_break_the_line(saved: dict[str, Path], tmp_path: Path) -> None:
    def rename(config: Any) -> None:
        layer = config["config"]["layers"][3]
        layer["class_name"] = layer["config"]["name"] = "x\n\x1b[32mall is well"

    path = reconfigured(saved[".keras"], tmp_path / "odd.keras", rename)
    refused(path, r"'x\n\x1b[32mall is well'")


@both_formats
def test_without_h5py(suffix: str, saved: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    refused(saved[suffix], "h5py", "cure: pip install -e '.[keras]'")


@both_formats
def test_keras_itself_is_not_needed(
    suffix: str, saved: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "keras"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert loaded(saved[suffix])
