"""What each ONNX operator means in the words of `spec.py`: exactly that, or a refusal.

An operator is told by its `Site`: the node, the shape that comes, and the constants it reads.

Padding: ONNX pads each side on its own, our layers have one padding for all. What a window reads
depends on where the first one begins and on how many there are, not on padding that none of them
reaches: pads of [0, 0, 1, 1] may be a pool in ceil_mode, or no padding at all. So both axes must
begin alike and the layer must make as many windows; what is left is refused as asymmetric.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from ..spec import (
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
    NetworkError,
    ReLU,
    Shape,
    Sigmoid,
    Softmax,
)
from .file import UNKNOWN, Array, Branch, Node, OnnxError


@dataclass(frozen=True, slots=True)
class Site:
    """A node where it stands: on `batch` images (maybe `UNKNOWN`) of `shape`, among constants."""

    node: Node
    batch: int
    shape: Shape
    constants: Mapping[str, Array]

    def optional(self, index: int) -> Array | None:
        """The constant that is input number `index`, None where it is left out."""
        inputs = self.node.inputs
        return self.constants[inputs[index]] if index < len(inputs) and inputs[index] else None

    def constant(self, index: int, what: str) -> Array:
        """The constant that must be input number `index`."""
        found = self.optional(index)
        if found is None:
            raise self.node.refused(f"wanted {what} as input {index}, got none")
        return found

    def output_shape(self, layer: Layer) -> Shape:
        """What `layer` makes here; a refusal names the node."""
        try:
            return layer.output_shape(self.shape)
        except NetworkError as error:
            raise self.node.refused(error) from None


@dataclass(frozen=True, slots=True)
class Made:
    """A layer, the stem of its name, and its tensors by key; a bias that is left out is zero."""

    stem: str
    layer: Layer
    tensors: Mapping[str, Array]


def _made(stem: str, layer: Layer, **tensors: Array | None) -> tuple[Made]:
    return (Made(stem, layer, {k: v for k, v in tensors.items() if v is not None}),)


# Convolutions and linear layers


def _conv(site: Site) -> tuple[Made, ...]:
    node, weight = site.node, site.constant(1, "weights")
    known = node.known(**_WINDOW, group=1)
    if weight.ndim != 4 or known["group"] < 1:
        raise node.refused(
            "wanted weights [out, in, height, width] and a group of 1 or more, "
            f"got {weight.shape} and {known['group']}"
        )
    known["kernel_shape"] = known["kernel_shape"] or weight.shape[2:]
    w = _windows(site, known)
    layer = Conv2d(len(weight), w.kernel, w.stride, w.padding, w.dilation, known["group"])
    if site.output_shape(layer)[1:] != w.counts:
        raise _asymmetric(node, known)
    return _made("conv", layer, weight=weight, bias=site.optional(2))


def _gemm(site: Site) -> tuple[Made, ...]:
    node, weight, bias = site.node, site.constant(1, "weights"), site.optional(2)
    known = node.known(alpha=1.0, beta=1.0, transA=0, transB=0)
    if known["transA"]:
        raise node.refused("wanted transA 0, got 1, which takes images for columns")
    for name in ("alpha", "beta"):
        if known[name] != 1 and (name == "alpha" or bias is not None):
            raise node.refused(
                f"wanted {name} 1, got {known[name]:g}; cure: multiply it into the weights"
            )
    return _linear(site, weight if known["transB"] else weight.T, bias)


def _matmul(site: Site) -> tuple[Made, ...]:
    site.node.known()
    return _linear(site, site.constant(1, "weights").T, None)


def _linear(site: Site, weight: Array, bias: Array | None) -> tuple[Made, ...]:
    """`weight` is [out, in]."""
    if weight.ndim != 2:
        raise site.node.refused(f"wanted a matrix of weights, got {weight.shape}")
    return _made("fc", Linear(len(weight)), weight=weight, bias=bias)


# Windows


_WINDOW: dict[str, Any] = {
    "auto_pad": "NOTSET",
    "dilations": (1, 1),
    "kernel_shape": None,
    "pads": (0, 0, 0, 0),
    "strides": (1, 1),
}


@dataclass(frozen=True, slots=True)
class _Windows:
    """The windows of a convolution or pool, alike on both axes but for how many there are."""

    kernel: int
    stride: int
    dilation: int
    padding: int  # how far before the image the first window begins
    symmetric: bool  # whether the end is padded as the beginning is
    counts: Shape


def _windows(site: Site, known: dict[str, Any]) -> _Windows:
    """Where ONNX's formulas put the windows."""
    node, sides = site.node, site.shape[1:]
    if len(sides) != 2:
        raise node.refused(f"wanted (channels, height, width), got {site.shape}")
    kernel, stride, dilation = (
        _both(node, name, known[name]) for name in ("kernel_shape", "strides", "dilations")
    )
    reach, mode, ceil = dilation * (kernel - 1) + 1, known["auto_pad"], known.get("ceil_mode")
    if ceil and mode != "NOTSET":
        raise node.refused(f"wanted ceil_mode 0 beside auto_pad {mode}, got {ceil}")
    if stride > reach and mode.startswith("SAME"):
        # The formula's padding may be negative there, and runtimes read that differently.
        raise node.refused(f"wanted strides up to {reach} beside auto_pad {mode}, got {stride}")
    match mode:
        case "SAME_UPPER" | "SAME_LOWER":
            pads = [_same(side, reach, stride, mode) for side in sides]
        case "VALID":
            pads = [(0, 0), (0, 0)]
        case _:
            top, left, bottom, right = known["pads"]
            pads = [(top, bottom), (left, right)]
    begins, ends = zip(*pads, strict=True)
    if begins[0] != begins[1] or min(begins + ends) < 0:
        raise _asymmetric(node, known)
    counts = []
    for side, (begin, end) in zip(sides, pads, strict=True):
        room = side + begin + end - reach
        count = (math.ceil(room / stride) if ceil else room // stride) + 1
        # In ceil_mode a last window that would begin behind the image is left out.
        counts.append(count - (bool(ceil) and (count - 1) * stride >= side + begin))
    if min(counts) < 1:
        raise node.refused(f"input {site.shape} is too small for a kernel that spans {reach}")
    return _Windows(kernel, stride, dilation, begins[0], begins == ends, tuple(counts))


def _both(node: Node, name: str, values: Sequence[int]) -> int:
    """The one value of an attribute that has one for each axis."""
    if len(values) != 2 or values[0] != values[1] or values[0] < 1:
        raise node.refused(f"wanted {name} of two equal numbers, got {[*values]}")
    return values[0]


def _same(side: int, reach: int, stride: int, mode: str) -> tuple[int, int]:
    """Padding before and after an axis by which it gets ceil(side / stride) windows."""
    total = max((math.ceil(side / stride) - 1) * stride + reach - side, 0)
    less, more = total // 2, total - total // 2
    return (less, more) if mode == "SAME_UPPER" else (more, less)


def _asymmetric(node: Node, known: dict[str, Any]) -> OnnxError:
    auto = known["auto_pad"] != "NOTSET"
    got = f"auto_pad {known['auto_pad']}" if auto else f"pads {[*known['pads']]}"
    return node.refused(f"wanted the same padding on all four sides, got {got}: asymmetric here")


# Pools


def _max_pool(site: Site) -> tuple[Made, ...]:
    # storage_order is about the indices, the second output.
    known = site.node.known(**_WINDOW, ceil_mode=0, storage_order=0)
    w = _pool_windows(site, known)
    return _pool(site, known, w, MaxPool2d(w.kernel, w.stride, w.padding))


def _average_pool(site: Site) -> tuple[Made, ...]:
    known = site.node.known(**_WINDOW, ceil_mode=0, count_include_pad=0)
    w = _pool_windows(site, known)
    _, height, width = site.shape
    if w.kernel == w.stride == 1 and w.counts == (height, height) == (width, width):
        # How exporters write an adaptive pool to the size that there is already.
        return _made("avgpool", AdaptiveAvgPool2d(height))
    # Where padding is counted it must be there in both; where it is not, only pixels matter.
    if known["count_include_pad"] and not w.symmetric:
        raise _asymmetric(site.node, known)
    counted = bool(known["count_include_pad"]) or not w.padding
    layer = AvgPool2d(w.kernel, w.stride, w.padding, count_include_pad=counted)
    return _pool(site, known, w, layer)


def _pool_windows(site: Site, known: dict[str, Any]) -> _Windows:
    w = _windows(site, known)
    if w.dilation != 1:
        raise site.node.refused(f"wanted dilations of 1, got {w.dilation}")
    if w.padding > w.kernel // 2:
        raise site.node.refused(f"wanted pads up to half the kernel {w.kernel}, got {w.padding}")
    return w


def _pool(
    site: Site, known: dict[str, Any], windows: _Windows, pool: MaxPool2d | AvgPool2d
) -> tuple[Made, ...]:
    for layer in (pool, replace(pool, ceil_mode=True)):
        try:
            counts = layer.output_shape(site.shape)[1:]
        except NetworkError:  # no window fits without ceil_mode
            continue
        if counts == windows.counts:
            return _made("pool", layer)
    raise _asymmetric(site.node, known)


def _reduce_mean(site: Site) -> tuple[Made, ...]:
    """The mean over height and width is how some exporters write a global average."""
    known = site.node.known(axes=(), keepdims=1, noop_with_empty_axes=0)
    given = site.optional(1)
    axes = [*known["axes"]] if given is None else np.ravel(given).tolist()
    if {axis % 4 for axis in axes} != {2, 3}:
        raise site.node.refused(f"wanted axes [2, 3] of [N, C, H, W], got {axes}")
    pool = _made("avgpool", AdaptiveAvgPool2d(1))
    return pool if known["keepdims"] else pool + _made("flatten", Flatten())


# Normalisation


def _batch_norm(site: Site) -> tuple[Made, ...]:
    known = site.node.known(epsilon=1e-5, momentum=0.9, spatial=1, training_mode=0)
    # Before opset 14 more than one output meant training, after it there are none without.
    if known["training_mode"] or len(site.node.outputs) > 1:
        raise site.node.refused("wanted inference, got training; cure: export for inference")
    if not known["spatial"]:
        raise site.node.refused("wanted spatial 1, statistics for each channel, got 0")
    keys = ("weight", "bias", "running_mean", "running_var")
    tensors = {key: site.constant(i, key) for i, key in enumerate(keys, start=1)}
    return _made("bn", BatchNorm2d(_decimal(known["epsilon"])), **tensors)


def _lrn(site: Site) -> tuple[Made, ...]:
    known = site.node.known(size=0, alpha=1e-4, beta=0.75, bias=1.0)
    size = known["size"]
    if size < 1 or size % 2 == 0:
        raise site.node.refused(
            f"wanted an odd size, got {size}: ONNX and torch centre an even one differently"
        )
    alpha, beta, k = (_decimal(known[name]) for name in ("alpha", "beta", "bias"))
    return _made("norm", LocalResponseNorm(size, alpha, beta, k))


TORCH_NORM = ("Mul", "Reshape", "Pad", "AveragePool", "Squeeze", "Mul", "Add", "Pow", "Div")
"""How torch.onnx writes local_response_norm: x / (k + alpha * mean of x * x) ** beta."""

_ASKED = ("Shape", "Gather", "Equal", "If", "Reshape")
OLDER_NORM = (*TORCH_NORM[:4], *_ASKED, *TORCH_NORM[5:])
"""How its older exporter does: squeezed if the axis is 1 long, which it always is, then shaped."""

_LOOK = ("AveragePool", "Shape", "If")  # the nodes between the first and the last without constants


def torch_norm(site: Site, nodes: Sequence[Node]) -> tuple[Made, ...]:
    """The layer, if `nodes` at `site` are one of the two with its meaning; nothing if they are not.

    The first of them squares the input, the last divides the input by what became of it; between,
    the channels are taken as depth, padded with zeros and averaged.
    """
    ops = tuple(node.op for node in nodes)
    if ops not in (TORCH_NORM, OLDER_NORM) or len(site.shape) != 3:
        return ()
    square, *between, quotient = nodes
    x, power = square.inputs[0], between[-1]
    chained = all(after.inputs[0] == before.outputs[0] for before, after in pairwise(nodes[:-1]))
    if not chained or square.inputs[1] != x or quotient.inputs != (x, power.outputs[0]):
        return ()
    reads = [[name for name in node.inputs[1:] if name] for node in between]
    if [len(names) for names in reads] != [node.op not in _LOOK for node in between]:
        return ()
    if any(name not in site.constants for names in reads for name in names):
        return ()
    given = [np.ravel(site.constants[name]).tolist() for names in reads for name in names]
    target, pads, *squeezed, alpha, k, beta = given
    pad, mean = between[1:3]
    if ops == OLDER_NORM:
        shape, gather, _, choice = between[3:7]
        index, length, back = squeezed
        asked = gather.attributes.get("axis", 0) == 0 and not shape.attributes
        if not asked or (index, length) != ([1], [1]) or not _fits(back, (site.batch, *site.shape)):
            return ()
        squeezed = [_squeezed(choice.attributes["then_branch"], mean.outputs[0])]
    size = mean.attributes["kernel_shape"][0]
    averages = {"kernel_shape": [size, 1, 1], "strides": [1, 1, 1], "pads": [0] * 6}
    plain = {"auto_pad": "NOTSET", "dilations": [1, 1, 1], "mode": "constant", **averages}
    attributes = pad.attributes | mean.attributes
    if (
        not _fits(target, (site.batch, 1, *site.shape))
        or pads != [0, 0, size // 2, 0, 0, 0, 0, (size - 1) // 2, 0, 0]
        or squeezed != [[1]]
        or any(attributes.get(name, wanted) != wanted for name, wanted in plain.items())
        or any(len(term) != 1 for term in (alpha, k, beta))
    ):
        return ()
    layer = LocalResponseNorm(size, _decimal(alpha[0]), _decimal(beta[0]), _decimal(k[0]))
    return _made("norm", layer)


def _fits(target: Sequence[int], shape: Shape) -> bool:
    """Whether a Reshape to `target` makes `shape`."""
    sides = zip(target, shape, strict=False)
    alike = len(target) == len(shape) and all(side in (-1, wanted) for side, wanted in sides)
    return alike and target.count(-1) <= 1


def _squeezed(branch: Any, x: str) -> list[int]:
    """The axes that a branch squeezes of `x`, which is all that it does; none if it does not."""
    match branch:
        case Branch((Node("Squeeze", _, (only,), outputs, before_13),), ends) if (
            only == x and outputs == ends
        ):
            return [*before_13.get("axes", ())]
        case Branch(
            (Node("Constant", _, _, (axes,), constant), Node("Squeeze", _, inputs, outputs)), ends
        ) if inputs == (x, axes) and outputs == ends:
            squeezed: list[int] = np.ravel(constant.get("value", ())).tolist()
            return squeezed
    return []


def _decimal(number: Any) -> float:
    """A float32 as the shortest decimal that means it: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(np.asarray(number).item())))


# Everything else


def _always(*made: Made) -> Callable[[Site], tuple[Made, ...]]:
    """An operator without attributes and constants, which means the same wherever it stands."""

    def operator(site: Site) -> tuple[Made, ...]:
        site.node.known()
        return made

    return operator


def _softmax(site: Site) -> tuple[Made, ...]:
    # Opset 13 changed the default axis and the meaning of the others; not for [N, classes].
    axis = site.node.known(axis=-1)["axis"]
    if len(site.shape) != 1 or axis not in (1, -1):
        raise site.node.refused(
            f"wanted axis 1 of [N, classes], got axis {axis} of N times {site.shape}"
        )
    return _made("softmax", Softmax())


def _dropout(site: Site) -> tuple[Made, ...]:
    known = site.node.known(ratio=0.5, seed=None)
    ratio, training = site.optional(1), site.optional(2)
    if training is not None and training.any():
        raise site.node.refused("wanted training_mode false, got true; cure: export for inference")
    return _made("drop", Dropout(_decimal(known["ratio"] if ratio is None else ratio)))


def _flatten(site: Site) -> tuple[Made, ...]:
    axis = site.node.known(axis=1)["axis"]
    if axis % (1 + len(site.shape)) != 1:
        raise site.node.refused(f"wanted axis 1, got {axis}")
    return _flat(site)


def _reshape(site: Site) -> tuple[Made, ...]:
    target = np.ravel(site.constant(1, "a shape")).tolist()
    features = math.prod(site.shape)
    copied = [] if site.node.known(allowzero=0)["allowzero"] else [0]
    if (
        len(target) != 2
        or target[0] not in (-1, site.batch, *copied)
        or target[1] not in (-1, features)
        or target == [-1, -1]
    ):
        got = ", ".join("N" if side == UNKNOWN else str(side) for side in target)
        raise site.node.refused(f"wanted [N, {features}], as a Flatten makes it, got [{got}]")
    return _flat(site)


def _flat(site: Site) -> tuple[Made, ...]:
    return _made("flatten", Flatten()) if len(site.shape) > 1 else ()


OPERATORS: dict[str, Callable[[Site], tuple[Made, ...]]] = {
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Conv": _conv,
    "Dropout": _dropout,
    "Flatten": _flatten,
    "Gemm": _gemm,
    "GlobalAveragePool": _always(*_made("avgpool", AdaptiveAvgPool2d(1))),
    "Identity": _always(),
    "LRN": _lrn,
    "MatMul": _matmul,
    "MaxPool": _max_pool,
    "ReduceMean": _reduce_mean,
    "Relu": _always(*_made("relu", ReLU())),
    "Reshape": _reshape,
    "Sigmoid": _always(*_made("sigmoid", Sigmoid())),
    "Softmax": _softmax,
}
"""The layers that a node becomes, by its operator."""
