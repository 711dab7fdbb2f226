"""An ONNX file as a network and its weights: `network, state = read("alexnet.onnx")`.

The graph must be one chain from images `[N, C, H, W]`, with C, H and W fixed, to `[N, classes]`.
Each node is exactly what `operators.py` knows a layer for, or the file is refused in one line
that names the node; nothing half-loads.

Names, preprocessing and classes are as `chain.py` says. What the file calls its nodes appears in
errors only.

Weights may be float32, float16, bfloat16 or float64, in the file or in external data beside it,
which the onnx package reads from the file's own folder only.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from os.path import expanduser
from pathlib import Path

import numpy as np
import torch

from ...errors import printable
from ..chain import Chain, State, fitting
from ..spec import Network
from .file import UNKNOWN, Array, Graph, Node, OnnxError, parse
from .operators import OPERATORS, Made, Site, torch_norm

_FILLED = 2**31  # bytes that ConstantOfShape may make: what a file without external data can hold
_INT64 = 7  # as ONNX numbers the types
_SMALL = 16  # numbers in a constant that a shape is computed from
_FLOATS = ("float16", "float32", "float64")


def read(path: str | PathLike[str]) -> tuple[Network, State]:
    """The network that an ONNX file says, and its canonical state (see `weights.load`).

    The network is called after the file; its `input_shape` is the (C, H, W) of the file. Raises
    OnnxError, one line, for a file that is missing, broken or no valid ONNX, for a graph outside
    the vocabulary, and for weights that `weights.load` refuses.
    """
    path = Path(expanduser(path))
    try:
        chain = _Walk(parse(path), printable(path.stem)).chain
    except OnnxError as error:
        raise OnnxError(f"{path}: {error}") from None
    return chain.network(), chain.state


@contextmanager
def _named(node: Node) -> Iterator[None]:
    """Whatever goes wrong with a node names it: the checker lets constants of odd sizes pass."""
    try:
        yield
    except OnnxError:
        raise
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise node.refused(f"malformed: {error}") from None


class _Walk:
    """Takes all nodes of a graph, the first node always the next, and leaves them as `chain`."""

    def __init__(self, graph: Graph, name: str) -> None:
        self.chain = Chain(name, graph.shape)
        self._graph = graph
        self._constants = dict(graph.constants)
        self._current = graph.image
        self._shapes = {self._current: graph.shape}  # of every output in the chain so far
        self._reads = Counter(name for node in graph.nodes for name in node.inputs)
        self._fillable = _FILLED
        start = 0
        while start < len(graph.nodes):
            with _named(graph.nodes[start]):
                start += self._take(start)
        self._finish()

    def _take(self, start: int) -> int:
        """Take the node there, or the few from there that are one layer; how many they were."""
        node = self._graph.nodes[start]
        if self._settled(node):
            return 1
        site = Site(node, self._graph.batch, self.chain.shape, self._constants)
        if node.op == "Mul" and node.inputs[0] == self._current and (taken := self._norm(start)):
            return taken
        if node.op not in (*OPERATORS, "Add"):
            known = ", ".join(sorted((*OPERATORS, "Add")))
            raise node.refused(f"not supported; wanted a chain of {known}")
        self._follows(node)
        if node.op == "Add":
            (given,) = (self._constants[n] for n in node.inputs if n in self._constants)
            with fitting(node.refused):
                self.chain.add_bias(_tensor(node, given))
        made = OPERATORS[node.op](site) if node.op in OPERATORS else ()
        self._append(node, made, node.outputs[0])
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
        site = Site(nodes[start], self._graph.batch, self.chain.shape, self._constants)
        left: list[Node] = []
        for count, at in enumerate(range(start, len(nodes)), start=1):
            node = nodes[at]
            if self._settled(node):
                continue
            left.append(node)
            if node.op == "Div":  # the last of them
                made = torch_norm(site, left)
                if made:
                    self._append(site.node, made, node.outputs[0])
                return count if made else 0
        return 0

    def _finish(self) -> None:
        """Refuse a graph whose one output is not the end of the chain, [N, classes]."""
        if self._graph.outputs != (self._current,):
            got = ", ".join(map(repr, self._graph.outputs))
            raise OnnxError(
                f"wanted one output, {self._current!r} at the end of the chain, got {got}"
            )
        if not self.chain.layers or len(self.chain.shape) != 1:
            got = ", ".join(map(str, self.chain.shape))
            raise OnnxError(
                f"output {self._current!r}: wanted [N, classes], got [N, {got}]; "
                "cure: end the graph with Flatten or Gemm"
            )

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

    def _append(self, node: Node, made: tuple[Made, ...], output: str) -> None:
        """The layers that a node became, with its tensors; then the chain goes on from `output`."""
        for part in made:
            tensors = {key: _tensor(node, array) for key, array in part.tensors.items()}
            with fitting(node.refused):
                self.chain.append(part.stem, part.layer, tensors)
        self._current = output
        self._shapes[output] = self.chain.shape

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
