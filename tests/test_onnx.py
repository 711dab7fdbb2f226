"""ONNX files: torch's exporters and hand-made graphs give the same outputs here, or a refusal.

The yardsticks are torch, which exported the graph, and the onnx package's reference evaluator. Its
LRN visits as many channels as there are images, so graphs with one run on as many as channels.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from alexnet_triton.engine import reference
from alexnet_triton.engine.onnx import file as onnx_file
from alexnet_triton.engine.onnx import graph as onnx_graph
from alexnet_triton.engine.onnx import operators as onnx_layers
from alexnet_triton.engine.onnx.file import Node, OnnxError
from alexnet_triton.engine.spec import (
    AdaptiveAvgPool2d,
    AvgPool2d,
    BatchNorm2d,
    Conv2d,
    Dropout,
    Flatten,
    Layer,
    Linear,
    LocalResponseNorm,
    MaxPool2d,
    Network,
    ReLU,
    Sigmoid,
    Softmax,
)
from alexnet_triton.engine.zoo import CAFFE_NORM, alexnet2012, network
from alexnet_triton.weights import load
from torch import nn

onnx = pytest.importorskip("onnx", reason="needs the onnx package, which is in the test extra")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
IMAGE = (4, 11, 11)


def last(net: Network, state: dict[str, torch.Tensor], x: np.ndarray[Any, Any]) -> torch.Tensor:
    """What the last layer makes of `x`."""
    return [*reference.forward(net, state, torch.from_numpy(x)).values()][-1]


def random(*shape: int, dtype: str = "float32") -> np.ndarray[Any, Any]:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(dtype)


def evaluated(model: Any, x: np.ndarray[Any, Any]) -> Any:
    """What the onnx package itself makes of `x`."""
    (output,) = ReferenceEvaluator(model).run(None, {"x": x})
    return output


# Models from torch


def export(
    model: nn.Module,
    image: Sequence[int],
    path: Path,
    dynamo: bool,
    batch: int | None = None,
    **how: Any,
) -> None:
    """torch.onnx by either exporter, with N left open if it is None."""
    x = torch.randn(batch or 2, *image)
    shapes: dict[str, Any] = {"input_names": ["x"], **how}
    if batch is None and dynamo:
        shapes["dynamic_shapes"] = ({0: torch.export.Dim("n")},)
    elif batch is None:
        shapes["dynamic_axes"] = {"x": {0: "n"}}
    with warnings.catch_warnings(action="ignore"):
        torch.onnx.export(model, (x,), str(path), dynamo=dynamo, verbose=False, **shapes)


AVERAGES = replace(
    network("digits"),
    input_shape=(3, 30, 33),
    layers=(
        ("conv1", Conv2d(8, 3, stride=2, padding=1, dilation=2)),
        ("relu1", ReLU()),
        ("pool1", AvgPool2d(3, 2, padding=1, ceil_mode=True)),
        ("conv2", Conv2d(8, 3, padding=1, groups=4)),
        ("pool2", AvgPool2d(2, 2, ceil_mode=True)),
        ("conv3", Conv2d(8, 3, padding=1)),
        ("pool3", AvgPool2d(3, 1, padding=1, count_include_pad=False)),
        ("avgpool", AdaptiveAvgPool2d(1)),
        ("flatten", Flatten()),
        ("fc4", Linear(6)),
        ("softmax", Softmax()),
    ),
)
ROUND_TRIPS = ("alexnet", "zfnet", "alexnet_keras_bn", "alexnet2012_caffe")

exporters = pytest.mark.parametrize("dynamo", [False, True], ids=["torchscript", "dynamo"])


@exporters
@pytest.mark.parametrize("name", [*ROUND_TRIPS, "averages"])
def test_what_torch_exports_comes_back(
    name: str,
    dynamo: bool,
    tmp_path: Path,
    narrowed: Callable[[Network], Network],
    twin: Callable[..., nn.Module],
) -> None:
    """The same layers by the same names, the same weights to the bit, the same outputs."""
    net = AVERAGES if name == "averages" else narrowed(network(name))
    state = load("random:1", net.parameter_shapes(), network=net.name)
    model, path = twin(net, state), tmp_path / "model.onnx"
    export(model, net.input_shape, path, dynamo)
    got, weights = onnx_graph.read(path)
    kept = [pair for pair in net.layers if not isinstance(pair[1], Dropout)]
    assert [*got.layers] == kept
    assert got.input_shape == net.input_shape
    assert [*weights] == [*state]
    assert all(torch.equal(weights[name], state[name]) for name in state)
    x = random(3, *net.input_shape)
    with torch.no_grad():
        wanted = model(torch.from_numpy(x))
    torch.testing.assert_close(last(got, weights, x), wanted, rtol=1e-4, atol=1e-4)


class Viewed(nn.Module):
    """The flatten of a thousand scripts; torch's optimisers also fold this BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 5, stride=2)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8 * 6 * 6, 5, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.max_pool2d(self.norm(self.conv(x)).relu(), 3, 2)
        return torch.sigmoid(self.fc(x.view(x.size(0), -1)))


@exporters
def test_batchnorm_before_relu_and_a_view(dynamo: bool, tmp_path: Path) -> None:
    model = Viewed().eval()
    load_norm = load("random:2", {"n.running_mean": (8,), "n.running_var": (8,)}, network="n")
    model.norm.load_state_dict(
        {name.removeprefix("n."): value for name, value in load_norm.items()}, strict=False
    )
    export(model, (3, 32, 32), tmp_path / "a.onnx", dynamo)
    x = random(3, 3, 32, 32)
    with torch.no_grad():
        wanted = model(torch.from_numpy(x))
    got = last(*onnx_graph.read(tmp_path / "a.onnx"), x)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    by_onnx = evaluated(onnx.load(tmp_path / "a.onnx"), x)
    np.testing.assert_allclose(got.numpy(), by_onnx, rtol=1e-4, atol=1e-4)


NEW_NORM = {
    "target": np.array([-1, 1, *IMAGE]),
    "pads": np.array([0, 0, 2, 0, 0, 0, 0, 2, 0, 0]),
    "axes": np.array([1]),
    "alpha": np.float32(5e-4),
    "k": np.float32(2),
    "beta": np.float32(0.75),
}


def new_norm(pad: str = "pads", squeeze: str = "axes", **constants: Any) -> Any:
    """What torch's newer exporter writes for a normalisation, with other constants."""
    nodes = spelled(f"Mul x x > square; Reshape square target > volume; Pad volume {pad} > padded")
    nodes += spelled("AveragePool padded > mean", kernel_shape=[5, 1, 1])
    nodes += spelled(
        f"Squeeze mean {squeeze} > flat; Mul flat alpha > scaled; Add scaled k > shifted;"
        "Pow shifted beta > power; Div x power > y; Flatten y > z"
    )
    return graph(nodes, tensors=NEW_NORM | constants, outputs=["z"])


def test_torchs_normalisation_is_known_by_its_constants_too(tmp_path: Path) -> None:
    assert agrees(new_norm(), tmp_path) == [LocalResponseNorm(5, 5e-4, 0.75, 2.0), Flatten()]
    for other in (
        new_norm(pads=np.array([0, 0, 1, 0, 0, 0, 0, 3, 0, 0])),
        new_norm(target=np.array([-1, 1, 11, 4, 11])),
        new_norm(axes=np.array([2])),
        new_norm(alpha=np.array([5e-4] * 11, np.float32)),
        # As many constants, but one of them is what is padded with.
        new_norm(pad="pads one", squeeze="", one=np.float32(1)),
    ):
        refused_graph(other, tmp_path, "node 'it' (Mul)")


def normalised(size: int) -> nn.Module:
    """Two of them, alone: nothing that a difference could hide in."""
    norms = nn.LocalResponseNorm(size, 0.5, 0.75, 2.0), nn.LocalResponseNorm(1, 0.25, 0.5, 1.0)
    return nn.Sequential(*norms, nn.Flatten())


@pytest.mark.parametrize("batch", [None, 1, 3])
@pytest.mark.parametrize(("opset", "size"), [(11, 4), (12, 5), (13, 5), (15, 4), (17, 3), (18, 11)])
def test_normalisation_by_torchs_older_exporter(
    opset: int, size: int, batch: int | None, tmp_path: Path
) -> None:
    """It writes a question into the graph, whose answer is always yes."""
    model, path = normalised(size), tmp_path / "a.onnx"
    export(model, IMAGE, path, dynamo=False, batch=batch, opset_version=opset)
    assert "If" in {node.op_type for node in onnx.load(path).graph.node}
    net, state = onnx_graph.read(path)
    first = LocalResponseNorm(size, 0.5, 0.75, 2.0)
    assert [layer for _, layer in net.layers] == [first, LocalResponseNorm(1, 0.25, 0.5), Flatten()]
    x = random(3, *IMAGE)
    wanted = model(torch.from_numpy(x))
    torch.testing.assert_close(last(net, state, x), wanted, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def older_norm(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("older") / "a.onnx"
    model = nn.Sequential(nn.LocalResponseNorm(5, 0.5, 0.75, 2.0), nn.Flatten())
    export(model, IMAGE, path, dynamo=False, batch=2, opset_version=17)
    return path.read_bytes()


def constant(op: str, input: int, values: list[int], which: int = 0) -> Callable[[Any], None]:
    """Puts other values into the constant that is an input of a node, the first unless told."""

    def change(graph: Any) -> None:
        reader = [node for node in graph.node if node.op_type == op][which]
        (maker,) = (node for node in graph.node if reader.input[input] in node.output)
        fill(maker.attribute[0].t, values)

    return change


def fill(tensor: Any, values: list[int]) -> None:
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    tensor.CopyFrom(numpy_helper.from_array(np.array(values, dtype)))


@pytest.mark.parametrize(
    "change",
    [
        constant("Gather", 1, [0]),
        constant("Equal", 1, [4]),
        constant("Concat", 0, [0, 0, 0, 0, 1, 3]),
        constant("Concat", 0, [0, 0, 2, 2, 0, 0]),
        constant("Slice", 4, [-2]),
        constant("Reshape", 1, [2, 1, 11, 4, -1]),
        constant("Reshape", 1, [2, 4, -1, -1], -1),
        constant("Reshape", 1, [2, 11, 4, 11], -1),
        constant("Add", 1, [1, 2]),
        *("axes", "branches", "initializer", "reader", "start", "squeezed", "more", "output"),
    ],
)
def test_the_older_exporters_normalisation_with_another_constant_or_question(
    change: str | Callable[[Any], None], older_norm: bytes, tmp_path: Path
) -> None:
    changed = onnx.load_from_string(older_norm)
    (choice,) = (node for node in changed.graph.node if node.op_type == "If")
    shape = next(node for node in changed.graph.node if node.op_type == "Shape")
    padded = next(node.output[0] for node in changed.graph.node if node.op_type == "Pad")
    then = next(a.g for a in choice.attribute if a.name == "then_branch")
    match change:
        case "axes":  # that are squeezed if the answer is yes
            fill(then.node[0].attribute[0].t, [0])
        case "branches":
            choice.attribute[0].name, choice.attribute[1].name = "else_branch", "then_branch"
        case "initializer":  # of a name outside, which it hides
            zeros = np.zeros((2, 1, *IMAGE), np.float32)
            then.initializer.append(numpy_helper.from_array(zeros, then.node[1].input[0]))
        case "reader":
            shape.input[0] = padded
        case "start":
            shape.attribute.append(helper.make_attribute("start", 1))
        case "squeezed":
            then.node[1].input[0] = padded
        case "output":
            then.output[0].name = then.node[0].output[0]
        case "more":
            then.node.append(helper.make_node("Neg", [then.output[0].name], ["negated"]))
            then.output[0].name = "negated"
        case _:
            assert callable(change)
            change(changed.graph)
    refused_graph(changed, tmp_path, "(Mul): ")


# Models made by hand


def graph(
    nodes: Sequence[Any],
    *,
    image: Sequence[int | str] = IMAGE,
    batch: int | str = "n",
    tensors: dict[str, Any] | None = None,
    inputs: Sequence[str] = (),
    outputs: Sequence[str],
    opset: int = 20,
) -> Any:
    """A model on "x" [batch, *image], which the checker is not asked about."""

    def value(name: str, shape: Sequence[int | str]) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    made = helper.make_graph(
        nodes,
        "made",
        [value("x", [batch, *image]), *(value(name, [1]) for name in inputs)],
        [value(name, ["n", "any"]) for name in outputs],
        [numpy_helper.from_array(np.asarray(t), name) for name, t in (tensors or {}).items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


TENSORS: dict[str, Any] = {
    "w": random(6, 4, 3, 3),
    "w2": random(6, 2, 3, 3),
    "b": random(6),
    "b4": random(1, 6, 1, 1),
    "scale": random(4),
    "mean": random(4),
    "var": abs(random(4)) + 0.5,
    "m": random(484, 5) / 22,
    "mt": random(5, 484) / 22,
    "c": random(5),
    "c2": random(1, 5),
    "c1": np.float32(0.5),
    "half": np.float32(0.5),
    "false": np.array(False),
    "hw": np.array([2, 3]),
    "hw_back": np.array([-1, -2]),
    "0,-1": np.array([0, -1]),
    "-1,484": np.array([-1, 484]),
    "4,484": np.array([4, 484]),
}


def step(op: str, *constants: str, first: bool = True, **attributes: Any) -> Any:
    """A node of a chain: its other input and its output are told by where it stands."""
    named = [*constants[:1], "", *constants[1:]] if not first else ["", *constants]
    return helper.make_node(op, named, [""], **attributes)


def chain(*steps: Any, tensors: dict[str, Any] | None = None, **options: Any) -> Any:
    """The model of nodes n0, n1, ..., each on the output of the one before: t0, t1, ..."""
    nodes = []
    for index, given in enumerate(steps):
        node = type(given)()
        node.CopyFrom(given)
        came = f"t{index - 1}" if index else "x"
        empty = [*node.input].index("")
        node.input[empty], node.output[0], node.name = came, f"t{index}", f"n{index}"
        nodes.append(node)
    outputs = [nodes[-1].output[0]]
    return graph(nodes, tensors=TENSORS | (tensors or {}), outputs=outputs, **options)


def saved(model: Any, tmp_path: Path) -> Path:
    onnx.save(model, tmp_path / "a.onnx")
    return tmp_path / "a.onnx"


def agrees(model: Any, tmp_path: Path) -> list[Layer]:
    """Ours equals the reference evaluator on four images; the layers."""
    net, state = onnx_graph.read(saved(model, tmp_path))
    x = random(4, *net.input_shape)
    wanted = evaluated(model, x)
    np.testing.assert_allclose(last(net, state, x).numpy(), wanted, rtol=1e-4, atol=1e-4)
    return [layer for _, layer in net.layers]


FLAT = step("Flatten")
STATS = ("scale", "scale", "mean", "var")
NORM = step("BatchNormalization", *STATS, epsilon=0.1)
WINDOW: dict[str, Any] = {"kernel_shape": [3, 3], "strides": [2, 2]}
HALVES: dict[str, Any] = {"kernel_shape": [2, 2], "strides": [2, 2]}  # one pixel is left over


@pytest.mark.parametrize(
    ("node", "layer"),
    [
        (step("Conv", "w", "b"), Conv2d(6, 3)),
        (step("Conv", "w"), Conv2d(6, 3)),
        (step("Conv", "w", "b", pads=[1] * 4, **WINDOW), Conv2d(6, 3, 2, 1)),
        (step("Conv", "w2", "b", group=2, dilations=[2, 2]), Conv2d(6, 3, dilation=2, groups=2)),
        (step("Conv", "w", pads=[0, 0, 1, 1], **WINDOW), Conv2d(6, 3, 2)),
        (step("Conv", "w", pads=[1, 1, 0, 0], strides=[3, 3]), Conv2d(6, 3, 3, 1)),
        (step("Conv", "w", "b", auto_pad="SAME_UPPER"), Conv2d(6, 3, padding=1)),
        (step("Conv", "w", auto_pad="SAME_LOWER", strides=[2, 2]), Conv2d(6, 3, 2, 1)),
        (step("Conv", "w", auto_pad="VALID", strides=[3, 3]), Conv2d(6, 3, 3)),
        (step("Relu"), ReLU()),
        (step("Sigmoid"), Sigmoid()),
        (step("MaxPool", **WINDOW), MaxPool2d(3, 2)),
        (step("MaxPool", pads=[1] * 4, **WINDOW), MaxPool2d(3, 2, 1)),
        (step("MaxPool", ceil_mode=1, **HALVES), MaxPool2d(2, 2, ceil_mode=True)),
        (step("MaxPool", ceil_mode=1, **WINDOW), MaxPool2d(3, 2)),
        (step("MaxPool", ceil_mode=1, kernel_shape=[2, 2], strides=[4, 4]), MaxPool2d(2, 4)),
        (step("MaxPool", pads=[0, 0, 1, 1], **HALVES), MaxPool2d(2, 2, ceil_mode=True)),
        (step("MaxPool", auto_pad="SAME_UPPER", **HALVES), MaxPool2d(2, 2, ceil_mode=True)),
        (step("MaxPool", storage_order=1, **WINDOW), MaxPool2d(3, 2)),
        (step("AveragePool", **WINDOW), AvgPool2d(3, 2)),
        (step("AveragePool", pads=[1] * 4, **WINDOW), AvgPool2d(3, 2, 1, False, False)),
        (step("AveragePool", pads=[1] * 4, count_include_pad=1, **WINDOW), AvgPool2d(3, 2, 1)),
        (step("AveragePool", ceil_mode=1, **HALVES), AvgPool2d(2, 2, ceil_mode=True)),
        (step("AveragePool", pads=[0, 0, 1, 1], **HALVES), AvgPool2d(2, 2, ceil_mode=True)),
        (step("AveragePool", kernel_shape=[1, 1]), AdaptiveAvgPool2d(11)),
        (step("GlobalAveragePool"), AdaptiveAvgPool2d(1)),
        (step("ReduceMean", "hw"), AdaptiveAvgPool2d(1)),
        (step("ReduceMean", "hw_back", keepdims=0), AdaptiveAvgPool2d(1)),
        (step("LRN", size=5), LocalResponseNorm(5)),
        (step("LRN", size=3, alpha=0.5, beta=0.5, bias=2.0), LocalResponseNorm(3, 0.5, 0.5, 2.0)),
        (step("BatchNormalization", *STATS), BatchNorm2d(1e-5)),
        (
            step("BatchNormalization", "scale", "mean", "mean", "var", epsilon=0.1),
            BatchNorm2d(0.1),
        ),
        (step("Dropout", "half", "false"), Dropout(0.5)),
    ],
    ids=lambda part: part.op_type if hasattr(part, "op_type") else str(part),
)
def test_a_layer(node: Any, layer: Layer, tmp_path: Path) -> None:
    layers = agrees(chain(node, FLAT), tmp_path)
    assert layers == [layer, Flatten()]


@pytest.mark.parametrize(
    ("nodes", "layers"),
    [
        ([FLAT, step("Gemm", "m", "c")], [Flatten(), Linear(5)]),
        ([FLAT, step("Gemm", "mt", "c2", transB=1)], [Flatten(), Linear(5)]),
        ([FLAT, step("Gemm", "m", "c1")], [Flatten(), Linear(5)]),
        ([FLAT, step("Gemm", "mt", transB=1, beta=0.0)], [Flatten(), Linear(5)]),
        ([FLAT, step("MatMul", "m")], [Flatten(), Linear(5)]),
        ([FLAT, step("MatMul", "m"), step("Add", "c")], [Flatten(), Linear(5)]),
        ([FLAT, step("MatMul", "m"), step("Add", "c2", first=False)], [Flatten(), Linear(5)]),
        ([FLAT, step("MatMul", "m"), step("Relu")], [Flatten(), Linear(5), ReLU()]),
        ([FLAT, step("Gemm", "m"), step("Softmax")], [Flatten(), Linear(5), Softmax()]),
        ([FLAT, step("Gemm", "m"), step("Softmax", axis=1)], [Flatten(), Linear(5), Softmax()]),
        ([FLAT, step("Identity"), FLAT, step("Flatten", axis=-1)], [Flatten()]),
        (
            [step("Conv", "w"), step("Add", "b4"), step("Relu"), FLAT],
            [Conv2d(6, 3), ReLU(), Flatten()],
        ),
        (
            [step("ReduceMean", "hw", keepdims=0), step("Gemm", "narrow")],
            [AdaptiveAvgPool2d(1), Flatten(), Linear(5)],
        ),
        *(
            ([step("Relu"), flatten], [ReLU(), Flatten()])
            for flatten in (
                step("Flatten", axis=-3),
                step("Reshape", "0,-1"),
                step("Reshape", "-1,484"),
                step("Reshape", "4,484"),
                step("Reshape", "-1,484", allowzero=1),
            )
        ),
    ],
)
def test_a_chain(nodes: list[Any], layers: list[Layer], tmp_path: Path) -> None:
    model = chain(*nodes, batch=4, tensors={"narrow": random(4, 5)})
    assert agrees(model, tmp_path) == layers


@pytest.mark.parametrize("opset", [7, 9, 11, 12, 13, 17, 21])
def test_old_and_new_opsets(opset: int, tmp_path: Path) -> None:
    """Dropout's ratio moved, and Softmax's default axis."""
    dropout = step("Dropout", ratio=0.25) if opset < 12 else step("Dropout", "quarter")
    nodes = [FLAT, dropout, step("Gemm", "m", "c"), step("Softmax")]
    model = chain(*nodes, tensors={"quarter": np.float32(0.25)}, opset=opset)
    assert agrees(model, tmp_path) == [Flatten(), Dropout(0.25), Linear(5), Softmax()]


@pytest.mark.parametrize("opset", [7, 9])
def test_old_batch_normalization(opset: int, tmp_path: Path) -> None:
    """Which the evaluator takes for training, whatever the number of outputs says."""
    old = onnx_graph.read(saved(chain(NORM, FLAT, opset=opset), tmp_path))
    new = onnx_graph.read(saved(chain(NORM, FLAT), tmp_path))
    assert old[0] == new[0]
    assert [*old[1]] == [f"bn0.{key}" for key in ("weight", "bias", "running_mean", "running_var")]
    assert all(torch.equal(old[1][name], tensor) for name, tensor in new[1].items())


def test_weights_from_constants_and_fills(tmp_path: Path) -> None:
    quarter = numpy_helper.from_array(np.array([0.25], np.float32))
    nodes = spelled("Constant > value", value=numpy_helper.from_array(TENSORS["w"]))
    nodes += spelled("Identity value > weight; Constant > six", value_ints=[6])
    nodes += spelled("ConstantOfShape six > fill", value=quarter)
    nodes += spelled("Conv x weight fill > y; Flatten y > z")
    model = graph(nodes, outputs=["z"])
    assert agrees(model, tmp_path) == [Conv2d(6, 3), Flatten()]
    _, state = onnx_graph.read(tmp_path / "a.onnx")
    assert torch.equal(state["conv1.weight"], torch.from_numpy(TENSORS["w"]))
    assert torch.equal(state["conv1.bias"], torch.full((6,), 0.25))


@pytest.mark.parametrize("dtype", ["FLOAT16", "BFLOAT16", "DOUBLE"])
def test_float_dtypes_become_float32(dtype: str, tmp_path: Path) -> None:
    kept = {"FLOAT16": torch.float16, "BFLOAT16": torch.bfloat16, "DOUBLE": torch.float64}[dtype]
    weight = torch.from_numpy(TENSORS["w"]).to(kept)
    stored = helper.make_tensor(
        "w", getattr(TensorProto, dtype), (6, 4, 3, 3), weight.double().flatten().tolist()
    )
    model = chain(step("Conv", "w"), FLAT)
    kept_names = [t for t in model.graph.initializer if t.name != "w"]
    del model.graph.initializer[:]
    model.graph.initializer.extend([*kept_names, stored])
    _, state = onnx_graph.read(saved(model, tmp_path))
    assert state["conv1.weight"].dtype == torch.float32
    assert torch.equal(state["conv1.weight"], weight.float())


def test_names_follow_the_layers_with_weights(tmp_path: Path) -> None:
    nodes = [
        step("Relu"),
        step("Conv", "w"),
        step("Relu"),
        step("Relu"),
        step("MaxPool", **WINDOW),
        step("Dropout"),
        FLAT,
        step("Gemm", "small"),
    ]
    net, _ = onnx_graph.read(saved(chain(*nodes, tensors={"small": random(96, 3)}), tmp_path))
    assert net.name == "a"
    assert [name for name, _ in net.layers] == [
        *("relu0", "conv1", "relu1", "relu1_2", "pool1", "drop2", "flatten", "fc2")
    ]


def test_what_onnx_does_not_say(tmp_path: Path) -> None:
    def loaded(channels: int, side: int, classes: int) -> Network:
        weight = {"v": np.zeros((channels, classes), np.float32)}
        nodes = [step("GlobalAveragePool"), FLAT, step("Gemm", "v")]
        model = chain(*nodes, image=(channels, side, side + 1), tensors=weight)
        return onnx_graph.read(saved(model, tmp_path))[0]

    assert loaded(3, 224, 1000).preprocess == network("alexnet").preprocess
    assert loaded(3, 224, 1000).classes == network("alexnet").classes
    assert loaded(3, 28, 10).classes == ""
    other = loaded(1, 28, 10)
    assert (other.input_shape, other.preprocess.resize, other.preprocess.crop) == (
        (1, 28, 29),
        32,
        28,
    )
    assert (other.preprocess.mean, other.preprocess.std) == ((0.0,), (1.0,))


# The graphs that the onnx package ships


def test_the_two_tower_alexnet_of_the_onnx_package(tmp_path: Path) -> None:
    net, state = onnx_graph.read(LIGHT / "light_bvlc_alexnet.onnx")
    published = network("alexnet2012").parameter_shapes()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == published
    assert sum(tensor.numel() for tensor in state.values()) == 60_965_224
    # Caffe's, but on 224: so its last pool reaches one pixel further.
    wanted = dict(alexnet2012(norm=CAFFE_NORM)) | {"pool5": MaxPool2d(3, 2, ceil_mode=True)}
    layers = {name: layer for name, layer in net.layers if not isinstance(layer, Dropout)}
    dropped = {name: layer for name, layer in wanted.items() if not isinstance(layer, Dropout)}
    assert layers == dropped | {"softmax": Softmax()}
    answer = TensorProto()
    answer.ParseFromString((LIGHT / "light_bvlc_alexnet_output_0.pb").read_bytes())
    got = last(net, state, random(1, 3, 224, 224))
    np.testing.assert_allclose(got.numpy(), numpy_helper.to_array(answer), rtol=1e-4)


# Refusals


def refused(path: Path, *parts: str) -> str:
    """`read` refuses the file in one line that names it and holds every one of `parts`."""
    with pytest.raises(OnnxError) as caught:
        onnx_graph.read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert len(message.splitlines()) == 1
    assert message.isprintable()
    for part in parts:
        assert part in message
    return message


def refused_graph(model: Any, tmp_path: Path, *parts: str) -> None:
    refused(saved(model, tmp_path), *parts)


# A node, before which there is nothing and behind which comes a Flatten, or all nodes; and what the
# refusal says.
BAD_NODES: list[tuple[Any, ...]] = [
    # what there is no layer for
    (step("Clip"), "n0' (Clip): not supported; wanted a chain of Add, AveragePool"),
    (step("Transpose", perm=[0, 2, 3, 1]), "node 'n0' (Transpose): not supported"),
    (step("Relu", domain="my.own"), "node 'n0' (my.own.Relu): not supported"),
    (step("Re\x1b[2m\nlu", domain="my.own"), r"(my.own.Re\x1b[2m\nlu): not supp"),
    # windows
    (step("Conv", "w", pads=[0, 0, 1, 1]), "'n0' (Conv)", "pads [0, 0, 1, 1]: asym"),
    (step("Conv", "w", pads=[0, 1, 0, 1]), "'n0' (Conv)", "pads [0, 1, 0, 1]: asym"),
    (step("Conv", "w", pads=[0, 1, 0, 0], strides=[2, 2]), "pads [0, 1, 0, 0]: asym"),
    (step("Conv", "w", pads=[-1] * 4), "'n0' (Conv)", "pads [-1, -1, -1, -1]"),
    (step("Conv", "w", strides=[2, 1]), "'n0' (Conv)", "strides of two equal", "2, 1"),
    (step("Conv", "w", dilations=[2, 1]), "dilations of two equal numbers"),
    (step("Conv", "wide"), "kernel_shape of two equal numbers, got [3, 5]"),
    (step("Conv", "w", kernel_shape=[5, 5]), "conv1.weight", "5, 5)", "got (6, 4, 3, 3)"),
    (step("Conv", "w2"), "'n0' (Conv)", "conv1.weight", "(6, 4, 3, 3), got (6, 2, 3,"),
    (step("Conv", "w", group=3), "'n0' (Conv)", "4 to 6 channels", "3 groups"),
    (step("Conv", "w", group=0), "'n0' (Conv)", "group of 1 or more", "and 0"),
    (step("Conv", "m"), "'n0' (Conv)", "[out, in, height, width]", "(484, 5)"),
    (step("Conv", "w", "c"), "'n0' (Conv)", "conv1.bias", "(6,), got (5,)"),
    (step("Conv", "w", dilations=[6, 6]), "'n0' (Conv)", "too small", "spans 13"),
    (step("Conv", "ints"), "'n0' (Conv)", "float type, got int64"),
    (step("Conv", "nans"), "'n0' (Conv)", "conv1.weight", "finite", "(nan at"),
    ([FLAT, step("Conv", "w")], "'n1' (Conv)", "(channels, height, width), got (484,)"),
    (step("MaxPool", dilations=[2, 2], **WINDOW), "(MaxPool)", "dilations of 1, got 2"),
    (step("MaxPool", pads=[2] * 4, **WINDOW), "half the kernel 3, got 2"),
    (step("MaxPool", pads=[0, 0, 2, 2], **WINDOW), "(MaxPool)", "asymmetric"),
    (step("MaxPool", auto_pad="SAME_UPPER", ceil_mode=1, **WINDOW), "0 beside auto_pad SAME_U"),
    (
        step("MaxPool", auto_pad="SAME_LOWER", kernel_shape=[1, 1], strides=[2, 2]),
        "strides up to 1 beside auto_pad SAME_LOWER, got 2",
    ),
    (step("MaxPool", auto_pad="SAME_LOWER", kernel_shape=[4, 4]), "SAME_LOWER: asymmetric"),
    (step("AveragePool", pads=[0, 0, 1, 1], count_include_pad=1, **HALVES), "0, 1, 1]: asymm"),
    (step("ReduceMean", "one"), "(ReduceMean)", "axes [2, 3] of", "got [1]"),
    # normalisation
    (step("LRN", size=4), "'n0' (LRN)", "odd size, got 4"),
    (step("BatchNormalization", "c", "c", "c", "c"), "'n0' (B", "bn0.weight", "(4,), got (5,)"),
    (step("BatchNormalization", *STATS, training_mode=1), "inference, got training", "cure: "),
    ([FLAT, NORM], "'n1' (BatchN", "(channels, height, width), got (484,)"),
    # linear layers
    ([step("Gemm", "m")], "'n0' (Gemm)", "Linear wants flattened features, got (4, 11, 11)"),
    ([FLAT, step("Gemm", "mt")], "'n1' (Gemm)", "fc1.weight", "(484, 484), got (484, 5)"),
    ([FLAT, step("Gemm", "m", "c", alpha=2.0)], "'n1' (Gemm)", "alpha 1, got 2", "multiply"),
    ([FLAT, step("Gemm", "m", "c", beta=0.5)], "'n1' (Gemm)", "beta 1, got 0.5", "multiply"),
    ([FLAT, step("Gemm", "m", transA=1)], "'n1' (Gemm)", "transA 0, got 1"),
    ([FLAT, step("Gemm", "m", "tall")], "'n1' (Gemm)", "fits (1, 5), got (4, 5)"),
    ([FLAT, step("Gemm", "c")], "'n1' (Gemm)", "matrix of weights, got (5,)"),
    ([FLAT, step("MatMul", "m", first=False)], "'n1' (MatMul)", "'t0' as input 0, got 'm'"),
    ([step("Relu"), step("Add", "b4"), FLAT], "'n1' (Add)", "without a bias before it"),
    ([step("Conv", "w"), step("Relu"), step("Add", "b4"), FLAT], "'n2' (Add)", "without a"),
    ([step("Conv", "w", "b"), step("Add", "b4"), FLAT], "'n1' (Add)", "without a bias"),
    ([step("Conv", "w"), step("Add", "b"), FLAT], "'n1' (Add)", "(1, 6, 1, 1), got (6,)"),
    # shapes
    ([FLAT, step("Softmax", axis=0)], "'n1' (Softmax)", "axis 1 of [N, classes], got axis 0"),
    (step("Softmax", axis=1), "'n0' (Softmax)", "of N times (4, 11, 11)"),
    ([step("Flatten", axis=2)], "'n0' (Flatten)", "axis 1, got 2"),
    ([step("Reshape", "44,11")], "'n0' (Reshape)", "[N, 484]", "got [-1, 44, 11]"),
    ([step("Reshape", "1,-1")], "'n0' (Reshape)", "[N, 484]", "got [1, -1]"),
    ([step("Reshape", "0,-1", allowzero=1)], "'n0' (Reshape)", "got [0, -1]"),
    ([FLAT, step("Dropout", "half", "true")], "'n1' (Dropout)", "training_mode false", "true"),
    ([FLAT, step("Dropout", "c")], "'n1' (Dropout)", "malformed"),
]


@pytest.mark.parametrize("case", BAD_NODES, ids=lambda case: case[1])
def test_a_node_is_refused(case: tuple[Any, ...], tmp_path: Path) -> None:
    tensors = {
        "wide": random(6, 4, 3, 5),
        "ints": np.ones((6, 4, 3, 3), np.int64),
        "nans": np.full((6, 4, 3, 3), np.nan, np.float32),
        "tall": random(4, 5),
        "one": np.array([1]),
        "44,11": np.array([-1, 44, 11]),
        "1,-1": np.array([1, -1]),
        "true": np.array(True),
    }
    nodes, *parts = case
    model = chain(*(nodes if isinstance(nodes, list) else [nodes, FLAT]), tensors=tensors)
    model.opset_import.append(helper.make_opsetid("my.own", 1))
    refused_graph(model, tmp_path, *parts)


def spelled(text: str, name: str = "it", **attributes: Any) -> list[Any]:
    """Nodes written as "Op input input > output; Op input > output"; attributes are the last's."""
    nodes = [helper.make_node("Flatten", ["x"], ["y"]) for _ in text.split(";")]
    for node, words in zip(nodes, text.split(";"), strict=True):
        (op, *inputs), outputs = (side.split() for side in words.split(">"))
        last = attributes if node is nodes[-1] else {}
        node.CopyFrom(helper.make_node(op, inputs, outputs, name=name, **last))
    return nodes


HIDE = "evil\n\x1b[32mall is well"
BAD_GRAPHS: list[tuple[list[Any], str, str]] = [
    (spelled("Relu x > a; Conv a w > b; Add b a > c"), "c", "(Add): a branch: wanted 'b', the out"),
    (spelled("Relu x > a; Sigmoid x > b; Flatten b > c"), "c", "(Sigmoid): a branch: wanted 'a'"),
    (spelled("Relu x > a", ""), "a b", "'b'"),
    (spelled("Flatten x > a; Relu a > b"), "a", "output, 'b' at the end of the chain, got 'a'"),
    (spelled("Flatten x > a; Relu a > b"), "a b", "got 'a', 'b'"),
    (spelled("Relu x > a"), "a", "output 'a': wanted [N, classes], got [N, 4, 11, 11]"),
    (spelled("Identity x > a"), "a", "output 'a'"),
    (
        spelled("MaxPool x > a which", kernel_shape=[2, 2]) + spelled("Flatten a > b"),
        "b which",
        "node 'it' (MaxPool): a branch: its second output 'which' is used",
    ),
    (spelled("Dropout x > a mask; Flatten mask > b"), "b", "(Dropout): a branch: its second"),
    (spelled("BatchNormalization x s s s s > a m v; Flatten a > b"), "b", "wanted inference, got"),
    # tensors that are not there, or not to be had without running more
    (spelled("Conv x given > a; Flatten a > b"), "b", "(Conv): tensor 'given' is missing; cure: "),
    (spelled("Conv x gone > a"), "a", "no valid ONNX"),
    (spelled("Transpose w > v; Conv x v > a"), "a", "(Transpose): not supported on constants"),
    (
        spelled("Conv x w > a; Shape x > size", end=2)
        + spelled("GlobalAveragePool a > b; Reshape b size > c"),
        "c",
        "node 'it' (Reshape): wanted [N, 6], as a Flatten makes it, got [N, 4]",
    ),
    (spelled("ConstantOfShape huge > v; Conv x v > a"), "a", "at most 2147483648 bytes"),
    (spelled("ConstantOfShape shape > v; Conv x v > a"), "a", "(ConstantOfShape): malformed"),
    (
        spelled("Constant > v", value_string="weights") + spelled("Conv x v > a"),
        "a",
        "node 'it' (Constant): wanted a tensor or numbers, got value_string",
    ),
    (
        spelled("Constant > v; Conv x v > a"),
        "a",
        "(Constant): wanted a tensor or numbers, got none",
    ),
    (spelled("Clip x > a", HIDE), "a", r"node 'evil\n\x1b[32mall is well' (Clip)"),
    (spelled("Clip x > unnamed", ""), "unnamed", "node 'unnamed' (Clip)"),
]


@pytest.mark.parametrize(("nodes", "outputs", "part"), BAD_GRAPHS, ids=lambda part: str(part)[-30:])
def test_a_graph_is_refused(nodes: list[Any], outputs: str, part: str, tmp_path: Path) -> None:
    tensors = {"huge": np.array([2**20, 2**20]), "shape": np.array([-2, 3])}
    tensors |= {"w": TENSORS["w"], "s": TENSORS["scale"]}
    model = graph(nodes, tensors=tensors, inputs=["given"], outputs=outputs.split())
    refused_graph(model, tmp_path, part)


def with_(change: Callable[[Any], object]) -> Any:
    """A good model, changed."""
    model = chain(step("Conv", "w", "b"), FLAT)
    change(model)
    return model


def sparse(model: Any) -> None:
    values = numpy_helper.from_array(np.ones(1, np.float32), "thin")
    indices = numpy_helper.from_array(np.zeros(1, np.int64), "where")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [6]))


def cut_short(model: Any) -> None:
    model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[:-4]


def images_of(*sides: int | str) -> Any:
    return chain(FLAT, image=sides)


SUM = graph(spelled("Relu x > a; Relu given > b; Add a b > c"), inputs=["given"], outputs=["c"])
BAD_MODELS: list[tuple[Any, ...]] = [
    (images_of(3, "h", "w"), "input 'x': wanted [N, C, H, W]", "[n, 3, h, w]", "size of an image"),
    (images_of(3, 224), "input 'x'", "got [n, 3, 224]"),
    (images_of(3, 0, 224), "input 'x'", "got [n, 3, ?, 224]"),
    (SUM, "wanted one input, the images, got 'x', 'given'"),
    (with_(lambda m: setattr(m, "ir_version", onnx.IR_VERSION + 1)), "ir_version", "cure: "),
    (chain(step("BatchNormalization", *STATS, spatial=0), FLAT, opset=8), "'n0' (Batch", "spatial"),
    (with_(sparse), "tensor 'thin' wanted dense, got sparse"),
    (with_(cut_short), "w", "cure: "),
    (
        with_(lambda m: setattr(m.graph.initializer[0], "data_type", 74)),
        "'w' cannot be read",
        "cure: ",
    ),
]


@pytest.mark.parametrize("case", BAD_MODELS, ids=lambda case: case[1])
def test_a_model_is_refused(case: tuple[Any, ...], tmp_path: Path) -> None:
    refused_graph(case[0], tmp_path, *case[1:])


def test_opsets_before_and_behind_those_read_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def model(opset: int) -> Any:
        return chain(step("Relu"), FLAT, opset=opset)

    newest = onnx_file._NEWEST
    refused_graph(model(6), tmp_path, f"opset of 7 to {newest}, got 6; cure: ")
    refused_graph(model(newest + 1), tmp_path, f"opset of 7 to {newest}, got {newest + 1}; cure: ")
    # What the onnx package does not know, it has not checked.
    monkeypatch.setattr(onnx.defs, "onnx_opset_version", lambda: 20)
    assert onnx_graph.read(saved(model(20), tmp_path))[0].layers
    refused_graph(model(21), tmp_path, "opset of 7 to 20, got 21; cure: ")


def test_the_operators_are_held_against_all_opsets_that_the_package_knows() -> None:
    """One that changed behind `_NEWEST` must be read before files with it are."""
    ours = {*onnx_layers.OPERATORS, *onnx_layers.TORCH_NORM, *onnx_layers.OLDER_NORM}
    changed = {s.name: s.since_version for s in onnx.defs.get_all_schemas() if not s.domain}
    assert max(changed[name] for name in ours) <= onnx_file._NEWEST


def test_an_attribute_of_some_later_opset_is_refused() -> None:
    """Today's checker would not let it come so far."""
    later = Node("Relu", "n7", ("x",), ("y",), {"leak": 0.1})
    assert later.known(leak=0.0) == {"leak": 0.1}
    with pytest.raises(OnnxError, match=r"node 'n7' \(Relu\): attribute 'leak' is not supported"):
        later.known()


def test_a_chain_takes_work_in_proportion_to_its_length(tmp_path: Path) -> None:
    def lines(length: int) -> int:
        """How many of the lines of `graph.py` run."""
        seen = 0

        def trace(frame: FrameType, event: str, _: object) -> Any:
            nonlocal seen
            seen += event == "line"
            return trace if frame.f_code.co_filename == onnx_graph.__file__ else None

        names = ["x", *(f"r{i}" for i in range(length))]
        steps = "; ".join(f"Relu {a} > {b}" for a, b in pairwise(names))
        nodes = spelled(f"{steps}; Flatten {names[-1]} > y", name="")
        path = saved(graph(nodes, outputs=["y"]), tmp_path)
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            net, _ = onnx_graph.read(path)
        finally:
            sys.settrace(before)
        assert [name for name, _ in net.layers[:3]] == ["relu0", "relu0_2", "relu0_3"]
        return seen

    assert lines(400) < 2.5 * lines(200)


# Files that cannot be read


def test_no_file_or_a_part_of_one(tmp_path: Path) -> None:
    path = tmp_path / "a.onnx"
    refused(path, "no such file")
    refused(tmp_path, "got a folder")
    path.touch()
    refused(path, "the file is empty")
    whole = saved(chain(step("Conv", "w", "b"), FLAT), tmp_path).read_bytes()
    ends = (1, 7, 100, 1000, len(whole) // 2, len(whole) - 1000, len(whole) - 1)
    for content in (b"<html>404</html>\n" * 9, b"\xff" * 64, b"\n", *(whole[:n] for n in ends)):
        path.write_bytes(content)
        refused(path, "no valid ONNX", "cure: ")


def outside(model: Any, folder: Path) -> Path:
    """The model with its tensors in "weights.bin" beside it."""
    path = folder / "a.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


def test_external_data(tmp_path: Path) -> None:
    model = chain(step("Conv", "w", "b"), FLAT)
    net, state = onnx_graph.read(saved(model, tmp_path))
    path = outside(model, tmp_path)
    same, others = onnx_graph.read(path)
    assert same == net
    assert all(torch.equal(others[name], state[name]) for name in state)
    whole = (tmp_path / "weights.bin").read_bytes()
    (tmp_path / "weights.bin").write_bytes(whole[:99])
    refused(path, "cure: ")
    (tmp_path / "weights.bin").unlink()
    refused(path, "no valid ONNX", "weights.bin")


@pytest.mark.parametrize("location", ["../weights.bin", "/etc/hostname"])
def test_external_data_from_elsewhere_are_refused(location: str, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    path = outside(chain(step("Conv", "w", "b"), FLAT), tmp_path / "sub")
    (tmp_path / "sub" / "weights.bin").rename(tmp_path / "weights.bin")
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        tensor.external_data[0].value = location
    path.write_bytes(model.SerializeToString())
    refused(path, "no valid ONNX", "cure: ")


def test_the_package_is_wanted_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    refused(tmp_path / "a.onnx", "onnx package", "cure: pip install -e '.[onnx]'")
