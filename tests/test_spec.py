"""The vocabulary and the networks said in it: shapes, counts, and refusals by layer name."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import pytest
import torch
from alexnet_triton.engine import NetworkError, spec
from alexnet_triton.engine.spec import (
    AvgPool2d,
    Conv2d,
    Flatten,
    Linear,
    MaxPool2d,
    Network,
    Nonlinearity,
    Preprocess,
)
from alexnet_triton.engine.summary import summarise
from alexnet_triton.engine.zoo import ALEXNET, DIGITS, NETWORKS, network
from alexnet_triton.kernels.epilogue import ACTIVATIONS, check_activation
from hypothesis import assume, given
from hypothesis import strategies as st

PLAIN = Preprocess(8, 8, mean=(0.0,) * 3, std=(1.0,) * 3)

# Layer by layer, as published: Krizhevsky 2014 in torchvision's form.
ALEXNET_ROWS = {
    "conv1": ((64, 55, 55), 23_296, 70_276_800),
    "pool1": ((64, 27, 27), 0, 0),
    "conv2": ((192, 27, 27), 307_392, 223_948_800),
    "pool2": ((192, 13, 13), 0, 0),
    "conv3": ((384, 13, 13), 663_936, 112_140_288),
    "conv4": ((256, 13, 13), 884_992, 149_520_384),
    "conv5": ((256, 13, 13), 590_080, 99_680_256),
    "pool5": ((256, 6, 6), 0, 0),
    "fc6": ((4096,), 37_752_832, 37_748_736),
    "fc7": ((4096,), 16_781_312, 16_777_216),
    "fc8": ((1000,), 4_097_000, 4_096_000),
}

PARAMETERS = {
    "alexnet": 61_100_840,
    "digits": 899_378,
    "alexnet2012": 60_965_224,
    "alexnet2012_224": 60_965_224,
    "alexnet2012_caffe": 60_965_224,
    "alexnet_single_tower": 62_378_344,
    "alexnet_keras_bn": 21_586_689,
    "zfnet": 62_357_608,
    "vgg11": 132_863_336,
    "vgg13": 133_047_848,
    "vgg16": 138_357_544,
    "vgg19": 143_667_240,
}


def test_alexnet_is_torchvisions_row_by_row() -> None:
    summary = summarise(ALEXNET)
    rows = {row.name: (row.output_shape, row.parameters, row.macs) for row in summary.rows}
    assert {name: rows[name] for name in ALEXNET_ROWS} == ALEXNET_ROWS
    assert summary.parameters == 61_100_840
    assert summary.macs == 714_188_480


@pytest.mark.parametrize("name", NETWORKS)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    assert summarise(network(name)).parameters == PARAMETERS[name]


def test_single_tower_counts_layer_by_layer() -> None:
    rows = [row.parameters for row in summarise(network("alexnet_single_tower")).rows]
    assert [count for count in rows if count] == [
        34_944,
        614_656,
        885_120,
        1_327_488,
        884_992,
        37_752_832,
        16_781_312,
        4_097_000,
    ]


def test_keras_bn_shapes_and_what_does_not_train() -> None:
    net = network("alexnet_keras_bn")
    sizes = {name: shape[1] for name, _, _, shape in net.walk() if len(shape) == 3}
    assert [sizes[f"conv{i}"] for i in range(1, 6)] == [54, 22, 8, 6, 4]
    assert [sizes[f"pool{i}"] for i in (1, 2, 5)] == [26, 10, 1]
    shapes = net.parameter_shapes()
    assert sum(math.prod(s) for name, s in shapes.items() if "running" in name) == 704
    assert net.output_shape() == (1,)


def test_towers_have_halved_filters() -> None:
    shapes = network("alexnet2012").parameter_shapes()
    assert shapes["conv2.weight"] == (256, 48, 5, 5)
    assert shapes["conv4.weight"] == (384, 192, 3, 3)
    assert shapes["conv5.weight"] == (256, 192, 3, 3)
    assert network("alexnet2012").flattened() == {"fc6.weight": (256, 6, 6)}
    for name in ("alexnet2012", "alexnet2012_224"):
        assert next(network(name).walk())[3] == (96, 55, 55)


def test_digits_is_an_eighth_of_alexnet() -> None:
    for (name, wide), (_, narrow) in zip(ALEXNET.layers, DIGITS.layers, strict=True):
        if isinstance(wide, Conv2d) and isinstance(narrow, Conv2d):
            assert wide.out_channels == 8 * narrow.out_channels, name
        if isinstance(wide, Linear) and isinstance(narrow, Linear) and name != "fc8":
            assert wide.out_features == 8 * narrow.out_features, name


@given(
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    kernel=st.integers(1, 5),
    stride=st.integers(1, 6),
    padding=st.integers(0, 2),
    ceil=st.booleans(),
)
def test_pool_shapes_are_torchs(
    size: tuple[int, int], kernel: int, stride: int, padding: int, ceil: bool
) -> None:
    assume(padding <= kernel // 2)
    x = torch.zeros(1, 2, *size)
    for layer, pool in (
        (MaxPool2d(kernel, stride, padding, ceil), torch.nn.functional.max_pool2d),
        (AvgPool2d(kernel, stride, padding, ceil), torch.nn.functional.avg_pool2d),
    ):
        try:
            wanted = tuple(pool(x, kernel, stride, padding, ceil_mode=ceil).shape[1:])
        except RuntimeError:
            with pytest.raises(NetworkError, match="too small"):
                layer.output_shape((2, *size))
        else:
            assert layer.output_shape((2, *size)) == wanted


@given(
    size=st.tuples(st.integers(5, 30), st.integers(5, 30)),
    kernel=st.integers(1, 5),
    stride=st.integers(1, 4),
    padding=st.integers(0, 3),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2]),
)
def test_conv_shapes_and_macs_are_torchs(
    size: tuple[int, int], kernel: int, stride: int, padding: int, dilation: int, groups: int
) -> None:
    layer = Conv2d(6, kernel, stride, padding, dilation, groups)
    module = torch.nn.Conv2d(4, 6, kernel, stride, padding, dilation, groups)
    try:
        wanted = tuple(module(torch.zeros(1, 4, *size)).shape[1:])
    except RuntimeError:
        with pytest.raises(NetworkError, match="too small"):
            layer.output_shape((4, *size))
        return
    assert layer.output_shape((4, *size)) == wanted
    assert layer.parameter_shapes((4, *size))["weight"] == tuple(module.weight.shape)
    assert layer.macs((4, *size)) == math.prod(wanted) * module.weight[0].numel()


def test_every_activation_of_the_kernels_is_a_layer_with_its_parameters() -> None:
    layers = {cls.row: cls for cls in vars(spec).values() if is_activation(cls)}
    assert layers.keys() == ACTIVATIONS.keys()
    for row, cls in layers.items():
        assert tuple(field.name for field in fields(cls)) == ACTIVATIONS[row].parameters
        check_activation(row, cls().activation)


def is_activation(cls: Any) -> bool:
    return isinstance(cls, type) and issubclass(cls, Nonlinearity) and cls is not Nonlinearity


def test_refusals_name_network_layer_wanted_and_got() -> None:
    with pytest.raises(
        NetworkError, match=r"alexnet, layer pool5: input \(256, 2, 2\) is too small"
    ):
        ALEXNET.output_shape((3, 50, 50))
    odd = Network("odd", (3, 8, 8), (("conv1", Conv2d(6, 3, groups=2)),), PLAIN, "")
    with pytest.raises(
        NetworkError, match="odd, layer conv1: 3 to 6 channels do not divide into 2"
    ):
        odd.output_shape()
    unflat = Network("unflat", (3, 8, 8), (("fc1", Linear(6)),), PLAIN, "")
    with pytest.raises(NetworkError, match=r"unflat, layer fc1: Linear wants flattened .* Flatten"):
        unflat.output_shape()
    late = Network("late", (3, 8, 8), (("f", Flatten()), ("p", MaxPool2d(2, 2))), PLAIN, "")
    with pytest.raises(NetworkError, match=r"late, layer p: MaxPool2d wants .* got \(192,\)"):
        late.output_shape()
    with pytest.raises(NetworkError, match="unknown network 'lenet'; known: alexnet, "):
        network("lenet")
    ALEXNET.output_shape((3, 63, 63))  # torchvision's smallest
