"""Pictures of the flow, and one number explained: the right words, the right size, the engine's."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from alexnet_triton import NetworkError
from alexnet_triton.engine.__main__ import main
from alexnet_triton.engine.pictures.canvas import PictureError
from alexnet_triton.engine.pictures.diagram import draw, volumes
from alexnet_triton.engine.pictures.explain import default_image, explain
from alexnet_triton.engine.pictures.maps import draw_filters
from alexnet_triton.engine.reference import forward, normalise
from alexnet_triton.engine.spec import BatchNorm2d, Conv2d, Network, Preprocess, ReLU, Sigmoid
from alexnet_triton.engine.zoo import DIGITS, alexnet2012, network
from alexnet_triton.weights import load
from alexnet_triton.weights.digits import heldout
from PIL import Image

Capture = pytest.CaptureFixture[str]
State = dict[str, torch.Tensor]

PLAIN = Preprocess(64, 64, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
NARROW = Network("narrow2012", (3, 67, 67), alexnet2012(width=1 / 8), PLAIN, "imagenet.txt")
NORMED = Network(
    "normed",
    (3, 16, 16),
    (
        ("conv1", Conv2d(8, 3, padding=1)),
        ("relu1", ReLU()),
        ("bn1", BatchNorm2d(eps=1e-3)),
        ("conv2", Conv2d(8, 3, stride=2, padding=2, dilation=2)),
        ("bn2", BatchNorm2d()),
        ("sigmoid2", Sigmoid()),
    ),
    PLAIN,
    "digits.txt",
)


def state_of(net: Network) -> State:
    return load(net.weights or "random:3", net.parameter_shapes(), network=net.name)


def test_the_single_tower_says_its_weights(tmp_path: Path) -> None:
    path = tmp_path / "flow.svg"
    draw(network("alexnet_single_tower"), path)
    text = path.read_text()
    for words in (
        *("227 x 227 x 3", "13 x 13 x 384", "3x3x256 = 2,304 a filter"),
        *("884,736 for 384 filters", "9,216 x 4,096", "62,378,344 parameters", "square roots"),
        *("max of 3x3", "softmax", "dropout: identity", "11x11, stride 4, padding 0"),
    ):
        assert words in text, words
    assert "tower 1" not in text
    before = path.read_bytes()
    draw(network("alexnet_single_tower"), path)
    assert path.read_bytes() == before


def test_the_net_of_2012_stands_in_two_towers(tmp_path: Path) -> None:
    path = tmp_path / "flow.svg"
    draw(network("alexnet2012"), path)
    text = path.read_text()
    halves = (48, 48, 128, 128, 192, 192, 128, 128)  # conv1 to pool5
    for tower in (1, 2):
        assert [text.count(f"tower {tower}: {maps}<") for maps in (48, 128, 192)] == [
            halves.count(maps) for maps in (48, 128, 192)
        ]
    assert "norm1: LRN over 5 maps, in 2 towers" in text
    assert "5x5x48 = 1,200 a filter" in text
    shown = {volume.name: volume.towers for volume in volumes(network("alexnet2012"))}
    assert shown["image"] == shown["fc6"] == 1


@pytest.mark.parametrize("name", ["alexnet", "alexnet_keras_bn", "zfnet", "vgg11"])
def test_volumes_are_those_of_the_network(name: str) -> None:
    net = network(name)
    shapes = {layer: shape for layer, _, _, shape in net.walk()}
    drawn = volumes(net)[1:]
    assert {v.name: v.shape for v in drawn} == {v.name: shapes[v.name] for v in drawn}
    assert [v.name for v in drawn if v.kind == "conv"] == [n for n in shapes if "conv" in n]
    assert [v.name for v in drawn if v.kind == "pool"] == [n for n in shapes if n[:4] == "pool"]


@pytest.mark.parametrize(
    ("net", "layer", "filter", "at"),
    [
        (DIGITS, "conv1", 3, (0, 0)),
        (DIGITS, "conv1", 1, (14, 7)),
        (DIGITS, "conv2", 16, (6, 6)),
        (DIGITS, "fc6", 11, None),
        (DIGITS, "fc8", 9, None),
        (NARROW, "conv2", 19, (3, 0)),
        (NARROW, "conv4", 47, (0, 2)),
        (NORMED, "conv1", 3, (15, 0)),
        (NORMED, "conv2", 4, (0, 7)),
    ],
)
def test_a_number_is_float64s_and_the_engines(
    net: Network, layer: str, filter: int, at: tuple[int, int] | None, device: torch.device
) -> None:
    state, image = state_of(net), default_image(net)
    seen = explain(net, state, layer, filter, at, image, device=device, dtype="fp32")
    assert seen.equal
    assert abs(seen.engine_value - seen.value) < 1e-4
    # The whole network in float64, which explain never ran: after all that is fused.
    wide = {name: tensor.double() for name, tensor in state.items()}
    outputs = forward(net, wide, normalise(image, net.preprocess, torch.float64))
    last = seen.stages[-1].layer if seen.stages else layer
    place = (0, filter, *at) if at else (0, filter)
    assert seen.sum == pytest.approx(outputs[layer][place].item(), rel=1e-4, abs=1e-5)
    assert seen.value == pytest.approx(outputs[last][place].item(), rel=1e-4, abs=1e-5)
    assert seen.value != 0, "a ReLU's zero proves little: choose another filter"
    assert math.fsum([p.value for p in seen.parts] + [seen.bias]) == pytest.approx(seen.sum)
    weight = state[f"{layer}.weight"][filter]
    assert seen.products == weight.numel()
    assert len(seen.parts) <= 8
    assert "equal: yes" in str(seen)


def test_a_filter_sees_its_own_tower_and_its_window(device: torch.device) -> None:
    seen = explain(NARROW, state_of(NARROW), "conv2", 20, (3, 0), default_image(NARROW))
    assert (seen.tower, seen.towers, seen.reads) == (2, 2, "pool1")
    assert (seen.parts[0].first, seen.parts[-1].last) == (6, 11)  # of 12 maps the second half
    assert seen.window is not None
    assert seen.window.columns == (-2, -1, 0, 1, 2)
    outside = sum(not 0 <= row < seen.input_shape[1] for row in seen.window.rows)
    assert seen.window.padding == 25 - (5 - outside) * 3
    assert "tower 2 of 2 only" in str(seen)


def test_another_number_is_not_equal(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from alexnet_triton.engine.run import Engine

    features = Engine.features
    monkeypatch.setattr(
        Engine,
        "features",
        lambda *a: {name: value + 0.01 * (name == "fc8") for name, value in features(*a).items()},
    )
    image = default_image(DIGITS)
    seen = explain(DIGITS, state_of(DIGITS), "fc8", 0, None, image, device=device, dtype="fp32")
    assert not seen.equal
    assert "equal: no" in str(seen)


@pytest.mark.parametrize(
    ("layer", "filter", "at", "words"),
    [
        ("pool1", 0, (0, 0), "wanted one of conv1, conv2.*got 'pool1'"),
        ("conv1", 8, (0, 0), "filter: wanted 0 to 7, got 8"),
        ("conv1", -1, (0, 0), "filter: wanted 0 to 7, got -1"),
        ("conv1", 0, (15, 0), "row of 0 to 14 .* got 15,0"),
        ("conv1", 0, None, "got none"),
        ("fc6", 0, (0, 0), "linear layer has no rows"),
    ],
)
def test_what_is_not_there_is_refused(
    layer: str, filter: int, at: tuple[int, int] | None, words: str
) -> None:
    with pytest.raises(NetworkError, match=words) as refused:
        explain(DIGITS, {}, layer, filter, at, default_image(DIGITS))
    assert "\n" not in str(refused.value)


def test_explain_in_the_shell(capsys: Capture) -> None:
    picture = str(heldout()[0][0])
    place = ["--layer", "conv3", "--filter", "4", "--at", "1,2"]
    assert main(["explain", "digits", *place, picture, "--json"]) == 0  # the order
    seen = json.loads(capsys.readouterr().out)
    assert seen["equal"]
    assert seen["at"] == [1, 2]
    assert main(["explain", "digits", picture, *place, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == seen
    assert main(["explain", "digits", "--layer", "conv3", "--at", "3,3"]) == 1
    assert "row of 0 to 2" in capsys.readouterr().err


def test_maps_and_filters_in_the_shell(capsys: Capture, tmp_path: Path) -> None:
    path = tmp_path / "maps.png"
    digit = str(heldout()[100][0])
    arguments = ["features", digit, "--model", "digits", "--output", str(path), "--filters"]
    assert main([*arguments, "--json"]) == 0
    pictures = json.loads(capsys.readouterr().out)["pictures"]
    assert [Path(p["output"]).name for p in pictures] == ["maps.png", "maps.filters.png"]
    for entry in pictures:
        with Image.open(entry["output"]) as picture:
            assert picture.size == (entry["width"], entry["height"])
    # 8 maps of 15x15, each value 5x5 pixels, 12 between two tiles, 16 on each side
    assert pictures[0]["width"] == 8 * 75 + 7 * 12 + 2 * 16
    with Image.open(path) as picture:
        pixels = torch.from_numpy(np.array(picture.convert("L")))
    tile = pixels[40:115, 16:91]
    assert (tile.view(15, 5, 15, 5) == tile[::5, ::5].reshape(15, 1, 15, 1)).all()
    assert tile.max() > 200 > 50 > tile.min()
    assert main([*arguments[:-1], "--layer", "fc6"]) == 1
    assert "512 features" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["flow.gif", "flow", "nowhere/flow.svg"])
def test_a_bad_place_for_a_picture_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(PictureError, match=r"wanted a name|no folder"):
        draw(DIGITS, tmp_path / name)


def test_without_matplotlib_the_cure_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(PictureError, match=r"pip install -e '\.\[plot\]'"):
        draw(DIGITS, tmp_path / "flow.svg")


def test_filters_want_colours(tmp_path: Path) -> None:
    grey = Network("grey", (1, 8, 8), (("conv1", Conv2d(2, 3)),), PLAIN, "digits.txt")
    with pytest.raises(PictureError, match="grey, conv1"):
        draw_filters(grey, {}, tmp_path / "filters.png")
