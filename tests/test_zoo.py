"""Every network of the zoo through the kernels, against torch modules of the same network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from alexnet_triton import Engine, EngineError
from alexnet_triton.engine.plan import ARITHMETIC, plan
from alexnet_triton.engine.reference import normalise
from alexnet_triton.engine.spec import (
    AvgPool2d,
    BatchNorm2d,
    Conv2d,
    Flatten,
    Layer,
    Linear,
    LocalResponseNorm,
    MaxPool2d,
    Network,
    Preprocess,
    ReLU,
    Sigmoid,
    Softmax,
)
from alexnet_triton.engine.zoo import ALEXNET_KERAS_BN, NETWORKS, alexnet2012, network, vgg
from alexnet_triton.weights import load
from torch import nn

Check = Callable[..., None]
PLAIN = Preprocess(64, 64, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))


def relative(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((actual.double().cpu() - wanted).abs().max() / wanted.abs().max()).item()


@pytest.fixture
def check(
    twin: Callable[..., nn.Module], device: torch.device, generator: torch.Generator
) -> Check:
    """`check(network, images=1)`: the engine's answer to random pixels is its twin's in float64."""
    return partial(_check, twin, device, generator)


def _check(
    twin: Callable[..., nn.Module],
    device: torch.device,
    generator: torch.Generator,
    net: Network,
    images: int = 1,
) -> None:
    state = load("random:5", net.parameter_shapes(), network=net.name)
    engine = Engine.load(net, state, device=device, dtype="fp32")
    pixels = torch.randint(
        0, 256, (images, *net.input_shape), dtype=torch.uint8, generator=generator
    )
    with torch.inference_mode():
        wanted = twin(net, state).double()(normalise(pixels, net.preprocess, torch.float64))
    assert relative(engine(pixels), wanted) < 1e-4


@pytest.mark.parametrize("name", NETWORKS)
def test_shapes_are_those_of_torchs_modules(name: str, module: Callable[..., nn.Module]) -> None:
    net = network(name)
    with torch.device("meta"):
        x = torch.empty(1, *net.input_shape)
        for layer_name, layer, came, output in net.walk():
            x = module(layer, came).eval()(x)
            assert tuple(x.shape[1:]) == output, layer_name


@pytest.mark.parametrize(
    ("name", "outputs"),
    [("alexnet2012", 10), ("alexnet_single_tower", 10), ("alexnet_keras_bn", 1), ("zfnet", 10)],
)
def test_every_other_alexnet_is_its_torch_twin(
    name: str, outputs: int, narrowed: Callable[[Network], Network], check: Check
) -> None:
    """A sixteenth of the filters on all pixels; `test_run.py` has one at its full width."""
    check(narrowed(network(name)).with_outputs(outputs))


@pytest.mark.parametrize("stages", [(1, 1, 2, 2, 2), (2, 2, 4, 4, 4)])
def test_narrow_vgg_is_its_torch_twin(stages: tuple[int, ...], check: Check) -> None:
    layers = vgg(stages, width=1 / 16)
    net = Network("narrow_vgg", (3, 64, 64), layers, PLAIN, "imagenet.txt")
    check(net, images=2)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["vgg11", "vgg19"])
def test_full_size_vgg_on_a_gpu(name: str, check: Check) -> None:
    check(network(name))


@pytest.mark.parametrize("settings", [{"padding": 2}, {"norm": LocalResponseNorm(5, k=1.0)}])
def test_narrow_2012_variants(settings: dict[str, object], check: Check) -> None:
    layers = alexnet2012(width=1 / 8, **settings)  # type: ignore[arg-type]
    check(Network("narrow", (3, 95, 99), layers, PLAIN, "imagenet.txt"), 3)


def test_batchnorm_before_a_relu_is_folded_and_after_it_is_not(check: Check) -> None:
    """Scales of both signs, and a max-pool behind them, which a negative scale does not pass."""
    layers: tuple[tuple[str, Layer], ...] = (
        ("conv1", Conv2d(12, 3, stride=2)),
        ("bn1", BatchNorm2d()),
        ("relu1", ReLU()),
        ("bn2", BatchNorm2d(eps=1e-3)),
        ("pool1", MaxPool2d(3, 2)),
        ("conv2", Conv2d(9, 3)),
        ("bn3", BatchNorm2d()),
        ("pool2", AvgPool2d(2, 2, ceil_mode=True, padding=1, count_include_pad=False)),
        ("flatten", Flatten()),
        ("fc3", Linear(7)),
        ("sigmoid", Sigmoid()),
    )
    net = Network("normed", (3, 31, 31), layers, PLAIN, "")
    planned = plan(net, 2, ARITHMETIC["fp32"], None)
    assert [step.layers for step in planned.steps] == [
        (),
        ("conv1", "bn1", "relu1", "bn2"),
        ("pool1",),
        ("conv2", "bn3"),
        ("pool2",),
        ("fc3", "sigmoid"),
    ]
    check(net, images=3)


def test_classify_gives_probabilities_of_every_kind_of_output(
    narrowed: Callable[[Network], Network], device: torch.device, generator: torch.Generator
) -> None:
    pixels = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8, generator=generator)
    engine = Engine.load(narrowed(ALEXNET_KERAS_BN), "random:1", device=device, dtype="fp32")
    yes = engine(pixels)
    assert yes.shape == (2, 1)
    for predictions, p in zip(engine.classify(pixels), yes[:, 0].tolist(), strict=True):
        assert isinstance(predictions, list)
        found = {prediction.label: prediction.score for prediction in predictions}
        assert found == pytest.approx({"dog": p, "cat": 1 - p})
    layers = (("conv1", Conv2d(4, 3)), ("flatten", Flatten()), ("fc2", Linear(6)))
    for tail in ((), (("softmax", Softmax()),)):
        net = Network("tiny", (3, 8, 8), (*layers, *tail), replace(PLAIN, crop=8), "")
        engine = Engine.load(net, "random:1", device=device, dtype="fp32")
        predictions = engine.classify(pixels[:1, :, :8, :8], top=6)[0]
        assert isinstance(predictions, list)
        assert sum(p.score for p in predictions) == pytest.approx(1, abs=1e-5)
        assert {p.label for p in predictions} == {str(i) for i in range(6)}


def test_a_network_without_published_weights_says_so(device: torch.device) -> None:
    with pytest.raises(EngineError, match="vgg16: nobody publishes weights for it; name a file"):
        Engine.load("vgg16", device=device)


def test_torchvisions_vgg_names_are_understood() -> None:
    net = Network("vgg", (3, 32, 32), vgg((1, 1, 1, 1, 1), width=1 / 32), PLAIN, "")
    state = load("random:0", net.parameter_shapes(), network="vgg")
    numbered = {f"conv{stage}_1": f"features.{3 * stage - 3}" for stage in range(1, 6)}
    numbered |= {f"fc{6 + i}": f"classifier.{3 * i}" for i in range(3)}
    split = {name: name.split(".") for name in state}
    theirs = {f"{numbered[layer]}.{key}": state[name] for name, (layer, key) in split.items()}
    back = load(theirs, net.parameter_shapes(), network="vgg")
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_an_onnx_file_is_a_network_with_its_weights(
    tmp_path: Path, device: torch.device, generator: torch.Generator
) -> None:
    pytest.importorskip("onnx", reason="the onnx extra is not installed")
    model = nn.Sequential(
        nn.Conv2d(3, 8, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Flatten(), nn.Linear(392, 5)
    ).eval()
    pixels = torch.randn(2, 3, 64, 64, generator=generator)
    file = tmp_path / "small.onnx"
    torch.onnx.export(model, (pixels[:1],), str(file), dynamo=False)
    with torch.inference_mode():
        wanted = model(pixels)
    engine = Engine.load(file, device=device, dtype="fp32")
    assert relative(engine(pixels), wanted.double()) < 1e-5
    assert engine.class_names == tuple("01234")
    grey = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2))
    torch.onnx.export(grey, (torch.zeros(1, 1, 8, 8),), str(file), dynamo=False)
    with pytest.raises(
        EngineError, match=r"small: wanted a network of RGB images, got \(1, 8, 8\)"
    ):
        Engine.load(file, device=device)


@pytest.mark.parametrize("first", [Conv2d(6, 3, dilation=2), Conv2d(6, 3, stride=2, groups=3)])
def test_a_first_convolution_that_does_not_fold(first: Conv2d, check: Check) -> None:
    layers = (("conv1", first), ("relu1", ReLU()), ("flatten", Flatten()), ("fc2", Linear(5)))
    check(Network("unfolded", (3, 13, 12), layers, PLAIN, ""), images=2)


def test_imagenets_pixels_are_normalised_as_torchvision_publishes_it() -> None:
    """What black and white become in red, green and blue."""
    ends = torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 3, 1, 1)
    black, white = normalise(ends, network("alexnet").preprocess, torch.float64).flatten(1)
    torch.testing.assert_close(black.float(), torch.tensor([-2.11790, -2.03571, -1.80444]))
    torch.testing.assert_close(white.float(), torch.tensor([2.24891, 2.42857, 2.64]))
