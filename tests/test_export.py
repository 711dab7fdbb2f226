"""Modules through torch.export: the layers, names and weights that they are of, or a refusal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from alexnet_triton.engine import Engine, EngineError, NetworkError, reference
from alexnet_triton.engine.aten.module import read
from alexnet_triton.engine.spec import (
    AvgPool2d,
    BatchNorm2d,
    Conv2d,
    Dropout,
    Flatten,
    Linear,
    LocalResponseNorm,
    Network,
    Preprocess,
    ReLU,
    Sigmoid,
)
from alexnet_triton.engine.zoo import network
from alexnet_triton.errors import Error
from alexnet_triton.weights import load
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

SMALL = (3, 12, 13)


class TorchvisionAlexNet(nn.Module):
    """torchvision's AlexNet as it is written there, of any width."""

    def __init__(self, width: float = 1, classes: int = 1000) -> None:
        super().__init__()
        a, b, c, d, units = (int(n * width) for n in (64, 192, 384, 256, 4096))

        def relu() -> nn.Module:
            return nn.ReLU(inplace=True)

        self.features = nn.Sequential(
            *(nn.Conv2d(3, a, 11, stride=4, padding=2), relu(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(a, b, 5, padding=2), relu(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(b, c, 3, padding=1), relu(), nn.Conv2d(c, d, 3, padding=1), relu()),
            *(nn.Conv2d(d, d, 3, padding=1), relu(), nn.MaxPool2d(3, 2)),
        )
        self.avgpool = nn.AdaptiveAvgPool2d((6, 6))
        self.classifier = nn.Sequential(
            *(nn.Dropout(), nn.Linear(d * 36, units), relu()),
            *(nn.Dropout(), nn.Linear(units, units), relu(), nn.Linear(units, classes)),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))  # type: ignore[no-any-return]


class By(nn.Module):
    """A module with one convolution whose forward is given."""

    calls: torch.Tensor

    def __init__(self, forward: Callable[[By, torch.Tensor], Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.matrix, self.row = nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.randn(5))
        self.register_buffer("calls", torch.zeros(()))
        self.given = forward

    def forward(self, x: torch.Tensor) -> Any:
        return self.given(self, x)


def outputs(net: Network, state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return [*reference.forward(net, state, x).values()][-1]


def check(model: nn.Module, shape: tuple[int, ...] = SMALL) -> Network:
    """The network of `model`, seen to compute what it does."""
    net, state = read(model.eval(), shape)
    assert [*state] == [*net.parameter_shapes()]
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(outputs(net, state, x), model(x), rtol=1e-4, atol=1e-4)
    return net


def test_torchvisions_alexnet_is_the_zoos() -> None:
    """All 61 million parameters of it, by the zoo's names; a head of one's own has no words."""
    with torch.device("meta"):
        model = TorchvisionAlexNet(classes=1000)
    model = model.to_empty(device="cpu").eval()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.fill_(number)
    net, state = read(model, (3, 224, 224))
    assert net == network("alexnet")
    assert [*state] == [*net.parameter_shapes()]
    assert all(bool((tensor == number).all()) for number, tensor in enumerate(state.values()))
    assert check(TorchvisionAlexNet(1 / 8, 7), (3, 64, 64)) == network("digits").with_outputs(7)


def test_another_size_of_images_keeps_the_zoos_names_alone() -> None:
    net = check(TorchvisionAlexNet(1 / 8, 10), (3, 79, 79))
    assert net.name == "digits"
    assert net.input_shape == (3, 79, 79)
    assert net.preprocess.crop == 79
    assert check(TorchvisionAlexNet(1 / 8, 10), (3, 64, 64)) == network("digits")


@pytest.mark.parametrize("name", ["vgg11", "alexnet2012_caffe", "alexnet_keras_bn", "zfnet"])
def test_modules_of_the_zoos_layers_come_back(
    name: str, narrowed: Callable[[Network], Network], twin: Callable[..., nn.Module]
) -> None:
    """At a sixteenth of the width, which the zoo has not: by the names of an ONNX file."""
    net = narrowed(network(name))
    state = load("random:1", net.parameter_shapes(), network=name)
    got, copied = read(twin(net, state), net.input_shape)
    assert [layer for _, layer in got.layers] == [layer for _, layer in net.layers]
    for mine, wanted in zip(copied.values(), state.values(), strict=True):
        assert torch.equal(mine, wanted)


def test_every_operator_means_what_torch_means() -> None:
    model: Any = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding="valid", dilation=2, bias=False),
        *(nn.BatchNorm2d(8, affine=False), nn.ReLU(), nn.LocalResponseNorm(4, 0.1, 0.5, 2)),
        nn.Conv2d(8, 8, 5, padding="same", groups=4),
        *(nn.Sigmoid(), nn.AvgPool2d(3, 2, padding=1, ceil_mode=True, count_include_pad=False)),
        *(nn.Dropout2d(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 6, bias=False)),
        nn.Softmax(-1),
    )
    model[1].running_mean.uniform_(generator=torch.Generator().manual_seed(1))
    net = check(model)
    assert net.name == "Sequential"
    assert [name for name, _ in net.layers] == [
        *("conv1", "bn1", "relu1", "norm1", "conv2", "sigmoid"),
        *("pool2", "drop3", "avgpool", "flatten", "fc3", "softmax"),
    ]
    layers = dict(net.layers)
    assert layers["conv2"] == Conv2d(8, 5, padding=2, groups=4)
    assert layers["norm1"] == LocalResponseNorm(4, 0.1, 0.5, 2.0)
    assert layers["bn1"] == BatchNorm2d()
    assert layers["sigmoid"] == Sigmoid()
    assert layers["drop3"] == Dropout()
    assert layers["pool2"] == AvgPool2d(3, 2, 1, True, count_include_pad=False)


@pytest.mark.parametrize(
    "head",
    [
        lambda m, x: m.conv(x).relu().mean((2, 3)) @ m.matrix,
        lambda m, x: torch.addmm(m.row, m.conv(x).mean((-2, -1)), m.matrix),
        lambda m, x: m.row + F.linear(m.conv(x).mean((2, 3)), m.matrix.t()),
        lambda m, x: F.adaptive_avg_pool2d(m.conv(x), 1).flatten(1).mm(m.matrix),
        lambda m, x: m.conv(x).contiguous().clone().view(x.size(0), -1).detach(),
        lambda m, x: m.conv(x).reshape(-1, 3 * 12 * 13),
        lambda m, x: m.conv(x.to(m.row.device).float()).flatten(1),
    ],
    ids=["matmul", "addmm", "add", "mm", "view", "reshape", "to"],
)
def test_heads_as_people_write_them(head: Callable[..., torch.Tensor]) -> None:
    last = check(By(head)).layers[-1][1]
    assert last in (Linear(5), Flatten())


def pruned(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", 0.5)


@pytest.mark.parametrize("made", [pruned, weight_norm, spectral_norm])
def test_weights_may_be_computed(made: Callable[[nn.Module], object]) -> None:
    """From constants alone, by any operator, in the first layer, too."""
    torch.manual_seed(0)
    model = By(lambda m, x: m.conv(x).mean((2, 3)))
    made(model.conv)
    assert [name for name, _ in check(model).layers] == ["conv1", "avgpool", "flatten"]


def test_weights_are_copied() -> None:
    model: Any = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    _, state = read(model, SMALL)
    before = state["conv1.weight"].clone()
    with torch.no_grad():
        model[0].weight.zero_()
    assert torch.equal(state["conv1.weight"], before)


def test_an_engine_of_a_module_is_the_engine_of_its_state() -> None:
    model = TorchvisionAlexNet(1 / 8, 3).eval()
    preset = Preprocess(70, 64, mean=(0.0,) * 3, std=(1.0,) * 3)
    how: dict[str, Any] = {"backend": "torch", "classes": ["a", "b", "c"], "device": "cpu"}
    engine = Engine.load(model, input_shape=(3, 64, 64), preprocess=preset, **how)
    assert engine.class_names == ("a", "b", "c")
    assert engine.network.preprocess == preset
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(engine(x), Engine.load("digits", model.state_dict(), **how)(x))
    half = Engine.load(model.half(), input_shape=(3, 64, 64), **how)
    torch.testing.assert_close(half(x), engine(x), rtol=0.01, atol=0.01)


class Tagged(torch.Tensor):
    """A subclass of torch's."""


def tagged() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    model.register_buffer("x", torch.zeros(1).as_subclass(Tagged))
    return model


REFUSED: dict[str, tuple[nn.Module, tuple[str, ...]]] = {
    "operator": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU()), ("gelu", "1)", "conv2d")),
    "branch": (By(lambda m, x: m.conv(x) + x), ("add", "branch", "test_export.py")),
    "twice": (By(lambda m, x: m.conv(m.conv(x)) + m.conv(x)), ("branch",)),
    "scalar": (By(lambda m, x: m.conv(x) + 1), ("add", "constant")),
    "two outputs": (By(lambda m, x: (m.conv(x), x)), ("one output",)),
    "square": (nn.Conv2d(3, 4, (3, 1)), ("square", "[4, 3, 3, 1]")),
    "stride": (nn.Conv2d(3, 4, 3, stride=(1, 2)), ("stride", "both axes")),
    "mode": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), ("pad",)),
    "dilated pool": (nn.MaxPool2d(3, dilation=2), ("dilation",)),
    "device": (By(lambda m, x: m.conv(x).to("meta")), ("to", "on meta")),
    "dtype": (By(lambda m, x: m.conv(x).to(torch.float16)), ("to", "float16")),
    "noise": (By(lambda m, x: F.conv2d(x, F.dropout(m.conv.weight))), ("dropout",)),
    "divisor": (nn.AvgPool2d(2, divisor_override=3), ("divisor_override",)),
    "dropout": (By(lambda m, x: F.dropout(m.conv(x))), ("train",)),
    "statistics": (nn.BatchNorm2d(3, track_running_stats=False), ("training",)),
    "flatten": (By(lambda m, x: m.conv(x).flatten(2)), ("[N, 468]", "[N, 3, 156]")),
    "softmax": (nn.Softmax(1), ("[N, 3, 12, 13]",)),
    "data": (By(lambda m, x: m.conv(x) if x.sum() > 0 else x), ("torch.export",)),
    "size": (By(lambda m, x: m.conv(x) if len(x) == 2 else x), ("torch.export",)),
    "inputs": (nn.Bilinear(3, 3, 2), ("torch.export", "input2")),
    "subclass": (tagged(), ("x", "Tagged")),
    "wrapped": (nn.DataParallel(nn.Conv2d(3, 4, 3)), (".module",)),
    "no data": (nn.Conv2d(3, 4, 3, device="meta"), ("weight", "without data")),
    "nothing": (nn.Identity(), ("empty",)),
    "no layer": (nn.Flatten(), ("layer",)),
    "counter": (By(lambda m, x: (m.calls.add_(1), m.conv(x))[1]), ("add_", "test_export.py")),
    "random": (By(lambda m, x: F.conv2d(x, torch.rand_like(m.conv.weight))), ("rand_like",)),
    "scalar first": (By(lambda m, x: m.conv(m.calls - x)), ("images",)),
    "norm": (By(lambda m, x: m.conv(x) / (1 + m.conv(x) * m.conv(x))), ("",)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_chain_is_refused(what: str, caplog: pytest.LogCaptureFixture) -> None:
    model, words = REFUSED[what]
    with pytest.raises(NetworkError) as caught:
        read(model.eval(), SMALL)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in (type(model).__name__, *words))
    assert str(caught.value).count("node ") <= 1
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_module_that_trains_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout())
    with pytest.raises(NetworkError, match=r"eval\(\)"):
        Engine.load(model, input_shape=SMALL)
    model.eval()[1].train()
    with pytest.raises(NetworkError, match="its 1 is"):
        read(model, SMALL)


def test_weights_that_are_no_numbers_are_refused_by_node() -> None:
    model = nn.Conv2d(3, 4, 3).eval()
    nn.init.constant_(model.weight, torch.nan)
    with pytest.raises(NetworkError, match=r"conv2d.*weight"):
        read(model, SMALL)


@pytest.mark.parametrize(
    "asked",
    [
        {"network": nn.Conv2d(3, 4, 3).eval(), "input_shape": (3, 0, 2)},
        {"network": nn.Conv2d(3, 4, 3).eval(), "input_shape": 224},
        {"network": "digits", "input_shape": (3, 64, 64)},
        {"network": "digits", "preprocess": (64, 64)},
    ],
    ids=str,
)
def test_bad_requests_are_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(EngineError, match=r"input_shape|preprocess"):
        Engine.load(**asked)


def test_a_lookalike_of_torchs_norm_is_refused() -> None:
    """One that subtracts the mean of other channels is not the layer."""

    def norm(m: By, x: torch.Tensor) -> torch.Tensor:
        x = m.conv(x)
        n, c, h, w = x.shape
        deep = F.pad((x * x).view(n, 1, c, h, -1), (0, 0, 0, 0, 1, 1))
        mean = F.avg_pool3d(deep, (2, 1, 1), stride=1)[:, :, :c].squeeze(1).view(n, c, h, w)
        return x / mean.mul(0.1).add(1.0).pow(0.5)

    with pytest.raises(Error, match="mul"):
        read(By(norm).eval(), SMALL)


def test_relu_is_the_zoos() -> None:
    net = check(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)))
    assert dict(net.layers)["relu1"] == ReLU()
    assert replace(net, name="x").classes == ""


class Forwards(nn.Module):
    """One whose forward names no argument."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *images: torch.Tensor) -> Any:
        return self.model(*images)


@pytest.mark.parametrize("wrapped", [Forwards, partial(torch.compile, backend="eager")])
def test_a_module_may_be_wrapped(wrapped: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    assert [name for name, _ in check(wrapped(model)).layers] == ["conv1", "relu1"]
