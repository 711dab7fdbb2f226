"""An ONNX file as plain data: its image input, its stored tensors and its nodes in order.

The file is believed in nothing: the onnx package's checker has passed it, and every tensor in it
can be read. What the nodes mean is told in `graph.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import Error
from ..spec import Shape

if TYPE_CHECKING:
    import onnx

Array = np.ndarray[Any, Any]

UNKNOWN = int(np.iinfo(np.int64).min)
"""The N of a graph that leaves it open, a number that no shape holds."""

_OLDEST = 7  # before this opset Dropout, Gemm and BatchNormalization meant something else
_NEWEST = 28  # up to this opset `operators.py` was held against ONNX's list of changes
_DOMAINS = ("", "ai.onnx")  # two names of ONNX's own operators


class OnnxError(Error, ValueError):
    """An ONNX file that cannot be used: one line with the file, the node, wanted, got, cure."""


@dataclass(frozen=True, slots=True)
class Node:
    """One operator. `inputs` holds "" where an optional one is left out."""

    op: str
    name: str  # that of its first output if it has none
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]  # numbers, str, lists of them, arrays, a `Branch`

    def known(self, **defaults: Any) -> dict[str, Any]:
        """The attributes over `defaults`. One that is not among them is refused: it would count."""
        for name in self.attributes:
            if name not in defaults:
                wanted = ", ".join(defaults) or "none"
                raise self.refused(f"attribute {name!r} is not supported; known: {wanted}")
        return defaults | self.attributes

    def refused(self, reason: object) -> OnnxError:
        """The error that names this node."""
        return OnnxError(f"node {self.name!r} ({self.op}): {reason}")


@dataclass(frozen=True, slots=True)
class Branch:
    """What an If may do: nodes that also read what was made around it, and what comes out."""

    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Graph:
    """A valid graph with one input of images, [batch, *shape]; `batch` may be `UNKNOWN`."""

    image: str
    batch: int
    shape: Shape
    nodes: tuple[Node, ...]
    constants: dict[str, Array]
    outputs: tuple[str, ...]


def parse(path: Path) -> Graph:
    """The graph in a file. Raises OnnxError, which leaves it to the caller to name the file."""
    model = _model(path)
    opset = max((o.version for o in model.opset_import if o.domain in _DOMAINS), default=0)
    from onnx import defs

    newest = min(_NEWEST, defs.onnx_opset_version())  # the checker lets later ones pass unchecked
    if not _OLDEST <= opset <= newest:
        raise OnnxError(
            f"wanted an opset of {_OLDEST} to {newest}, got {opset}; "
            "cure: export with one of these, or onnx.version_converter"
        )
    for sparse in model.graph.sparse_initializer:
        raise OnnxError(f"tensor {sparse.values.name!r} wanted dense, got sparse; cure: densify it")
    image, batch, shape = _image(model.graph)
    return Graph(
        image,
        batch,
        shape,
        tuple(_node(node) for node in model.graph.node),
        {tensor.name: _array(tensor) for tensor in model.graph.initializer},
        tuple(value.name for value in model.graph.output),
    )


def _model(path: Path) -> onnx.ModelProto:
    """The checked model, with its external data in place."""
    try:
        from onnx import checker, external_data_helper, load
    except ImportError as error:
        raise OnnxError(
            f"ONNX wants the onnx package, got: {error}; cure: pip install -e '.[onnx]'"
        ) from None
    if path.is_dir():
        raise OnnxError("wanted a file, got a folder; cure: name the file in it")
    if not path.exists():
        raise OnnxError("no such file; cure: check the path")
    if path.stat().st_size == 0:
        raise OnnxError("the file is empty; cure: download or export it again")
    try:
        model = load(path, format="protobuf", load_external_data=False)
        checker.check_model(str(path))  # by its path: so it looks for external data, too
        external_data_helper.load_external_data_for_model(model, str(path.parent))
    except Exception as error:  # broken bytes raise nearly anything in the parsers below
        reason = shorten(f"{type(error).__name__}: {error}", 400)
        raise OnnxError(f"no valid ONNX ({reason}); cure: download or export it again") from None
    return model


def _image(graph: onnx.GraphProto) -> tuple[str, int, Shape]:
    """Name, N and (C, H, W) of the input that holds the images."""
    stored = {tensor.name for tensor in graph.initializer}
    read_first = {node.input[0] for node in graph.node if node.input}
    inputs = [value for value in graph.input if value.name not in stored]
    # A weight that is an input without values is left to the node that misses it.
    images = [value for value in inputs if value.name in read_first]
    if len(images) != 1:
        names = ", ".join(repr(value.name) for value in images or inputs) or "none"
        raise OnnxError(f"wanted one input, the images, got {names}")
    dims = [dim.dim_value or dim.dim_param for dim in images[0].type.tensor_type.shape.dim]
    shape = tuple(dim for dim in dims[1:] if isinstance(dim, int) and dim > 0)
    if len(dims) != 4 or len(shape) != 3:
        got = ", ".join(str(dim or "?") for dim in dims)
        raise OnnxError(
            f"input {images[0].name!r}: wanted [N, C, H, W] with fixed C, H and W, got [{got}]; "
            "cure: export with the size of an image fixed"
        )
    return images[0].name, dims[0] if isinstance(dims[0], int) else UNKNOWN, shape


def _node(proto: onnx.NodeProto) -> Node:
    from onnx import GraphProto, TensorProto, helper

    def value(attribute: onnx.AttributeProto) -> Any:
        match helper.get_attribute_value(attribute):
            case bytes() as text:
                return text.decode(errors="replace")
            case TensorProto() as tensor:
                return _array(tensor)
            case GraphProto() as branch if not branch.initializer:  # these may hide names outside
                outputs = tuple(value.name for value in branch.output)
                return Branch(tuple(_node(node) for node in branch.node), outputs)
            case other:
                return other

    return Node(
        proto.op_type if proto.domain in _DOMAINS else f"{proto.domain}.{proto.op_type}",
        proto.name or proto.output[0],
        tuple(proto.input),
        tuple(proto.output),
        {attribute.name: value(attribute) for attribute in proto.attribute},
    )


def _array(tensor: onnx.TensorProto) -> Array:
    from onnx import numpy_helper

    try:
        return numpy_helper.to_array(tensor)
    except Exception as error:  # as above: an unknown type of number is a KeyError
        reason = shorten(f"{type(error).__name__}: {error}", 200)
        raise OnnxError(
            f"tensor {tensor.name!r} cannot be read ({reason}); cure: download or export it again"
        ) from None
