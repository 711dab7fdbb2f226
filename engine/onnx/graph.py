"""An ONNX file as a network and its weights: `network, state = read("alexnet.onnx")`.

The graph must be one chain from images `[N, C, H, W]`, with C, H and W fixed, to `[N, classes]`.
Each node is exactly what `operators.py` knows a layer for, or the file is refused in one line
that names the node; nothing half-loads.

Names: as in `zoo.py` (conv1, relu1, norm1, pool1, ..., fc6) by a running count of the layers with
weights. What the file calls its nodes appears in errors only.

What ONNX does not say: pictures are prepared by torchvision's preset for a crop of H, or merely
scaled to 0..1 if there are not three channels; 1000 outputs are ImageNet's classes, and any other
number has no names (`classes` is "").

Weights may be float32, float16, bfloat16 or float64, in the file or in external data beside it,
which the onnx package reads from the file's own folder only.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from os.path import expanduser
from pathlib import Path

import numpy as np
import torch

from ... import weights
from ...errors import printable
from ..spec import Conv2d, Layer, Linear, Network, Owner, Preprocess, Shape
from .file import UNKNOWN, Array, Graph, Node, OnnxError, parse
from .operators import OPERATORS, Made, Site, per_channel, torch_norm

State = dict[str, torch.Tensor]

_FILLED = 2**31  # bytes that ConstantOfShape may make: what a file without external data can hold
_INT64 = 7  # as ONNX numbers the types
_SMALL = 16  # numbers in a constant that a shape is computed from
_FLOATS = ("float16", "float32", "float64")
_ALONE = ("avgpool", "flatten", "sigmoid", "softmax")  # names without a number


def read(path: str | PathLike[str]) -> tuple[Network, State]:
    """The network that an ONNX file says, and its canonical state (see `weights.load`).

    The network is called after the file; its `input_shape` is the (C, H, W) of the file. Raises
    OnnxError, one line, for a file that is missing, broken or no valid ONNX, for a graph outside
    the vocabulary, and for weights that `weights.load` refuses.
    """
    path = Path(expanduser(path))
    try:
        graph = parse(path)
        chain = _Chain(graph, path.stem)
        chain.walk()
        classes = chain.finish()
    except OnnxError as error:
        raise OnnxError(f"{path}: {error}") from None
    network = Network(
        printable(path.stem),
        graph.shape,
        tuple(chain.layers),
        _preset(*graph.shape[:2]),
        classes="imagenet.txt" if classes == 1000 else "",
    )
    return network, chain.state


def _preset(channels: int, crop: int) -> Preprocess:
    resize = round(crop * 256 / 224)
    if channels != 3:
        return Preprocess(resize, crop, mean=(0.0,) * channels, std=(1.0,) * channels)
    return Preprocess(resize, crop, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


@contextmanager
def _named(node: Node) -> Iterator[None]:
    """Whatever goes wrong with a node names it: the checker lets constants of odd sizes pass."""
    try:
        yield
    except OnnxError:
        raise
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise node.refused(f"malformed: {error}") from None


class _Chain:
    """Collects layers and state while the nodes are walked, the first node always the next."""

    def __init__(self, graph: Graph, name: str) -> None:
        self.layers: list[tuple[str, Layer]] = []
        self.state: State = {}
        self._name = name
        self._graph = graph
        self._constants = dict(graph.constants)
        self._current = graph.image
        self._shape = graph.shape
        self._shapes = {self._current: self._shape}  # of every output in the chain so far
        self._reads = Counter(name for node in graph.nodes for name in node.inputs)
        self._names: Counter[str] = Counter()  # without the number that tells twins apart
        self._weighted = 0
        self._unbiased: str | None = None  # the last layer, where a bias may still follow
        self._fillable = _FILLED

    def walk(self) -> None:
        """Take all nodes."""
        start = 0
        while start < len(self._graph.nodes):
            with _named(self._graph.nodes[start]):
                start += self._take(start)

    def _take(self, start: int) -> int:
        """Take the node there, or the few from there that are one layer; how many they were."""
        node = self._graph.nodes[start]
        if self._settled(node):
            return 1
        site = Site(node, self._graph.batch, self._shape, self._constants)
        if node.op == "Mul" and node.inputs[0] == self._current and (taken := self._norm(start)):
            return taken
        if node.op not in (*OPERATORS, "Add"):
            known = ", ".join(sorted((*OPERATORS, "Add")))
            raise node.refused(f"not supported; wanted a chain of {known}")
        self._follows(node)
        if node.op == "Add":
            self._add_bias(node)
        made = OPERATORS[node.op](site) if node.op in OPERATORS else ()
        self._append(site, made, node.outputs[0])
        return 1

    def _settled(self, node: Node) -> bool:
        """Whether the node is worth a constant, which is then known."""
        with _named(node):
            if node.op == "Shape" and node.inputs[0] in self._shapes:
                known = node.known(start=0, end=None)
                shape = (self._graph.batch, *self._shapes[node.inputs[0]])
                side = shape[known["start"] : known["end"]]
                self._constants[node.outputs[0]] = np.array(side, np.int64)
            elif all(name in self._constants for name in node.inputs if name):
                self._constants[node.outputs[0]] = self._folded(node)
            else:
                return False
        return True

    def _norm(self, start: int) -> int:
        """Take what torch writes for a LocalResponseNorm, if it is that; how many nodes it was."""
        nodes = self._graph.nodes
        site = Site(nodes[start], self._graph.batch, self._shape, self._constants)
        left: list[Node] = []
        for count, at in enumerate(range(start, len(nodes)), start=1):
            node = nodes[at]
            if self._settled(node):
                continue
            left.append(node)
            if node.op == "Div":  # the last of them
                made = torch_norm(site, left)
                if made:
                    self._append(site, made, node.outputs[0])
                return count if made else 0
        return 0

    def finish(self) -> int:
        """The number of classes. Refuses a graph whose one output is not the end of the chain."""
        if self._graph.outputs != (self._current,):
            got = ", ".join(map(repr, self._graph.outputs))
            raise OnnxError(
                f"wanted one output, {self._current!r} at the end of the chain, got {got}"
            )
        if not self.layers or len(self._shape) != 1:
            got = ", ".join(map(str, self._shape))
            raise OnnxError(
                f"output {self._current!r}: wanted [N, classes], got [N, {got}]; "
                "cure: end the graph with Flatten or Gemm"
            )
        return self._shape[0]

    def _follows(self, node: Node) -> None:
        """Refuse a node that reads anything but the output before it and constants."""
        reads = [name for name in node.inputs if name and name not in self._constants]
        for name in reads:
            if name not in self._shapes:
                raise node.refused(
                    f"tensor {name!r} is missing; cure: export with the weights in the file"
                )
        if reads != [self._current]:
            got = " and ".join(map(repr, reads))
            raise node.refused(f"a branch: wanted {self._current!r}, the output before, got {got}")
        if node.inputs[0] != self._current and node.op != "Add":
            raise node.refused(f"wanted {self._current!r} as input 0, got {node.inputs[0]!r}")
        for name in node.outputs[1:]:
            if name and (self._reads[name] or name in self._graph.outputs):
                raise node.refused(f"a branch: its second output {name!r} is used")

    def _append(self, site: Site, made: tuple[Made, ...], output: str) -> None:
        """The layers that a node became, with its tensors; then the chain goes on from `output`."""
        for part in made:
            here = Site(site.node, site.batch, self._shape, site.constants)
            shape = here.output_shape(part.layer)
            name = self._named(part.stem)
            if isinstance(part.layer, Owner):
                tensors = dict(part.tensors)
                self._unbiased = None
                if isinstance(part.layer, Conv2d | Linear) and "bias" not in tensors:
                    tensors["bias"] = np.zeros(len(tensors["weight"]), np.float32)
                    self._unbiased = name
                self._keep(site.node, name, tensors, part.layer.parameter_shapes(self._shape))
            self.layers.append((name, part.layer))
            self._shape = shape
        self._current = output
        self._shapes[output] = self._shape

    def _keep(
        self, node: Node, name: str, tensors: Mapping[str, Array], shapes: Mapping[str, Shape]
    ) -> None:
        given = {f"{name}.{key}": _tensor(node, tensor) for key, tensor in tensors.items()}
        expected = {f"{name}.{key}": shape for key, shape in shapes.items()}
        try:
            self.state |= weights.load(given, expected, network=self._name)
        except weights.WeightsError as error:
            raise node.refused(error) from None

    def _add_bias(self, node: Node) -> None:
        """An Add is the bias of the layer before it, where the exporter wrote it apart."""
        name = self._unbiased
        if name is None or name != self.layers[-1][0]:
            raise node.refused("wanted a Conv, Gemm or MatMul without a bias before it")
        (given,) = (self._constants[n] for n in node.inputs if n in self._constants)
        bias = per_channel(node, given, self._shape)
        self._keep(node, name, {"bias": bias}, {"bias": bias.shape})
        self._unbiased = None

    def _named(self, stem: str) -> str:
        """As `zoo.py` would call it: numbered by the layer with weights that it goes with."""
        if stem in ("conv", "fc"):
            self._weighted += 1
        number = self._weighted + (stem == "drop")  # a dropout goes with the layer after it
        name = stem if stem in _ALONE else f"{stem}{number}"
        self._names[name] += 1
        again = self._names[name]
        return name if again == 1 else f"{name}_{again}"

    # What nodes make of constants

    def _folded(self, node: Node) -> Array:
        """Constants of one value, and the few nodes that exporters compute a shape with."""
        inputs = [self._constants[name] for name in node.inputs if name]
        small = all(x.size <= _SMALL for x in inputs)
        match node.op, inputs:
            case "Constant", []:
                return _stored(node)
            case "Identity", [x]:
                return x
            case "ConstantOfShape", [shape]:
                return self._filled(node, shape.tolist())
            case "Gather", [x, indices] if small:
                return np.asarray(np.take(x, indices, node.known(axis=0)["axis"]))
            case "Unsqueeze", [x, *rest] if small:
                axes = rest[0].tolist() if rest else node.known(axes=())["axes"]
                return np.expand_dims(x, tuple(axes))
            case "Concat", [_, *_] if small:
                return np.concatenate(inputs, node.known(axis=None)["axis"])
            case "Reshape", [x, shape] if small:
                return x.reshape(shape)
            case "Transpose", [x] if small:
                return np.transpose(x, node.known(perm=None)["perm"])
            case "Slice", [x, start, end, axis, step] if small:
                cuts = [slice(None)] * x.ndim
                cuts[axis.item()] = slice(_bound(node, start), _bound(node, end), step.item())
                return x[tuple(cuts)]
            case "Cast", [x] if x.dtype == np.int64 and node.attributes["to"] == _INT64:
                return x
        raise node.refused("not supported on constants; cure: export with constant folding")

    def _filled(self, node: Node, shape: list[int]) -> Array:
        value = node.known(value=np.zeros(1, np.float32))["value"]
        self._fillable -= math.prod(shape) * value.itemsize
        if self._fillable < 0:
            raise node.refused(f"wanted at most {_FILLED} bytes filled so, got more with {shape}")
        return np.broadcast_to(value, shape)


def _bound(node: Node, index: Array) -> int:
    """Where a slice begins or ends."""
    bound: int = index.item()
    if bound == UNKNOWN:
        raise node.refused("wanted a slice that does not depend on N")
    return bound


def _stored(node: Node) -> Array:
    match [*node.attributes.items()]:
        case [("value" | "value_float" | "value_floats" | "value_int" | "value_ints", value)]:
            return np.asarray(value)
    raise node.refused(f"wanted a tensor or numbers, got {', '.join(node.attributes) or 'none'}")


def _tensor(node: Node, array: Array) -> torch.Tensor:
    if array.dtype.name == "bfloat16":  # numpy's, which torch does not know
        array = array.astype(np.float32)
    if array.dtype.name not in _FLOATS:
        raise node.refused(f"wanted weights of a float type, got {array.dtype}")
    return torch.from_numpy(np.array(array))
