"""Two devices side by side, as in 2012: half the filters each, the single device's answer."""

from __future__ import annotations

import pytest
import torch
from alexnet_triton import Engine, NetworkError
from alexnet_triton.engine.devices.towers import exchanged, half
from alexnet_triton.engine.spec import (
    Gather,
    Linear,
    Network,
    Preprocess,
)
from alexnet_triton.engine.zoo import ALEXNET, alexnet2012, network
from alexnet_triton.weights import load

PLAIN = Preprocess(64, 64, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
NARROW = Network("narrow2012", (3, 67, 67), alexnet2012(width=1 / 8), PLAIN, "imagenet.txt")


def relative(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((actual.double() - wanted.double()).abs().max() / wanted.abs().max()).item()


def test_the_half_network_is_that_of_2012() -> None:
    net = half(network("alexnet2012"))
    shapes = {name: shape for name, _, _, shape in net.walk()}
    assert [shapes[f"conv{i}"][0] for i in range(1, 6)] == [48, 128, 192, 192, 128]
    assert shapes["fc6"] == shapes["fc7"] == (2048,)
    joins = [name for name, layer in net.layers if isinstance(layer, Gather)]
    assert joins == ["join_conv3", "join_flatten", "join_fc7", "join_fc8", "join_output"]
    assert net.output_shape() == (1000,)
    weights = net.parameter_shapes()
    assert weights["conv2.weight"] == (128, 48, 5, 5)  # its own tower's maps
    assert weights["conv3.weight"] == (192, 256, 3, 3)  # both
    assert weights["fc6.weight"] == (2048, 9216)


def test_bytes_exchanged_per_image_are_the_gathers() -> None:
    # Each tower receives the other's half: conv3's and fc6's inputs, two times 4096 units, 1000.
    halves = 256 * 13 * 13 + 256 * 6 * 6 + 4096 + 4096 + 1000
    assert exchanged(network("alexnet2012"), 2) == 2 * halves


@pytest.mark.parametrize("invariant", [False, pytest.param(True, marks=pytest.mark.bits)])
def test_small_towers_are_the_single_device(
    invariant: bool, tiny2012: Network, device: torch.device, generator: torch.Generator
) -> None:
    net = tiny2012 if invariant else NARROW
    state = load("random:3", net.parameter_shapes(), network=net.name)
    shape = (6, *net.input_shape)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    single = Engine.load(
        net, state, device=device, dtype="fp32", max_batch=6, batch_invariant=invariant
    )
    both = Engine.load(
        net,
        state,
        dtype="fp32",
        max_batch=6,
        batch_invariant=invariant,
        devices=(device, device),
        split="towers",
    )
    wanted = single(pixels)
    for count in (0, 1, 6, 4):
        logits = both(pixels[:count])
        assert logits.shape == (count, wanted.shape[1])
        if count and invariant:
            assert torch.equal(logits, wanted[:count]), f"batch {count}"
        elif count:
            assert relative(logits, wanted[:count]) < 1e-5, f"batch {count}"
    small = ("conv1", "norm1", "conv2", "conv3", "fc6", "fc7")
    names = small if invariant else ("conv1", "pool2", "conv4", "pool5", "fc7", "fc8")
    ours, theirs = both.features(pixels[:3], names), single.features(pixels[:3], names)
    for name in names:
        assert ours[name].shape == theirs[name].shape
        assert relative(ours[name], theirs[name]) < 1e-5, name


def test_towers_without_groups_work_and_exchange_more() -> None:
    assert exchanged(ALEXNET, 2) > 0
    joins = [name for name, layer in half(ALEXNET).layers if isinstance(layer, Gather)]
    assert joins[:3] == ["join_conv2", "join_conv3", "join_conv4"]


def test_what_cannot_be_halved_is_refused_by_layer() -> None:
    with pytest.raises(NetworkError, match="alexnet2012_caffe in two towers, layer norm1: it norm"):
        half(network("alexnet2012_caffe"))
    odd = Network("odd", (3, 64, 64), (*ALEXNET.layers[:-1], ("fc8", Linear(7))), PLAIN, "")
    with pytest.raises(NetworkError, match="odd in two towers, layer fc8: 7 outputs do not divide"):
        half(odd)
