"""What each operator of aten means in the words of `spec.py`: exactly that, or a refusal.

An operator is told by its `Operation`. It gives the layers that the node becomes, each with the
stem of its name and its tensors; none where the node changes nothing.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.fx import Node

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

Made = list[tuple[str, Layer, dict[str, torch.Tensor]]]

_TORCH = os.path.dirname(torch.__file__)


@dataclass(frozen=True, slots=True)
class Operation:
    """A node where it stands: what comes, what it makes of it, and its arguments by name."""

    node: Node
    came: Shape  # of one image
    output: Shape
    arguments: Mapping[str, Any]  # those of its schema that are numbers
    tensors: Mapping[str, torch.Tensor]  # those that are constant

    def refused(self, reason: object) -> NetworkError:
        """The refusal of this node, to be raised."""
        return refused(self.node, reason)

    def tensor(self, name: str) -> torch.Tensor:
        """The constant that must be given by that name."""
        if name not in self.tensors:
            raise self.refused(f"wanted a constant {name}, got none")
        return self.tensors[name]

    def both(self, name: str, otherwise: int | None = None) -> int:
        """The one number of an argument that may have one for each axis; none is `otherwise`."""
        given = self.arguments[name]
        numbers = {*given} if isinstance(given, Sequence) else {given}
        if not numbers and otherwise is not None:
            return otherwise
        if len(numbers) != 1 or not all(type(number) is int for number in numbers):
            raise self.refused(f"wanted one {name} for both axes, got {given}")
        return int(numbers.pop())

    def only(self, **wanted: object) -> None:
        """Refuses arguments other than these."""
        for name, value in wanted.items():
            if self.arguments[name] != value:
                raise self.refused(f"wanted {name} {value}, got {self.arguments[name]}")


def refused(node: Node, reason: object) -> NetworkError:
    """The refusal of a node, to be raised: it says where in the module and in its code it is."""
    stack = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    lines = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    lines = [f"{os.path.basename(f)}:{n}" for f, n in lines if not f.startswith(_TORCH)]
    place = "".join(f", {where}" for where in (*stack[-1:], *lines[-1:]) if where)
    return NetworkError(f"node {node.name} ({node.target}{place}): {reason}")


# Layers


def _conv(site: Operation) -> Made:
    weight = site.tensor("weight")
    if weight.ndim != 4 or weight.shape[2] != weight.shape[3]:
        raise site.refused(f"wanted a square kernel, got weights {list(weight.shape)}")
    kernel, stride, dilation = weight.shape[2], site.both("stride"), site.both("dilation")
    padding = site.arguments["padding"]
    if padding == "same" and dilation * (kernel - 1) % 2:
        raise site.refused(f"wanted the same padding on all four sides, got 'same' of {kernel}")
    if isinstance(padding, str):
        padding = dilation * (kernel - 1) // 2 if padding == "same" else 0
    else:
        padding = site.both("padding")
    groups = site.both("groups")
    layer = Conv2d(len(weight), kernel, stride, padding, dilation, groups)
    return [("conv", layer, dict(site.tensors))]


def _linear(weight: str, *, transposed: bool) -> Callable[[Operation], Made]:
    def operator(site: Operation) -> Made:
        matrix = site.tensor(weight)
        if matrix.ndim != 2:
            raise site.refused(f"wanted a matrix of weights, got {list(matrix.shape)}")
        matrix = matrix.t() if transposed else matrix
        given = site.tensors.get("bias", site.tensors.get("self"))
        bias = {} if given is None else {"bias": given}
        for factor in ("alpha", "beta"):
            if factor in site.arguments:
                site.only(**{factor: 1})
        return [("fc", Linear(len(matrix)), {"weight": matrix, **bias})]

    return operator


def _batch_norm(site: Operation) -> Made:
    site.only(training=False)
    owned = {key: site.tensor(key) for key in ("running_mean", "running_var")}
    ones = torch.ones_like(owned["running_var"])
    owned["weight"] = site.tensors.get("weight", ones)
    owned["bias"] = site.tensors.get("bias", torch.zeros_like(ones))
    return [("bn", BatchNorm2d(site.arguments["eps"]), owned)]


def _max_pool(site: Operation) -> Made:
    if site.both("dilation") != 1:
        raise site.refused(f"wanted dilation 1, got {site.arguments['dilation']}")
    kernel, ceil = site.both("kernel_size"), site.arguments["ceil_mode"]
    pool = MaxPool2d(kernel, site.both("stride", kernel), site.both("padding"), ceil)
    return _made("pool", pool)


def _avg_pool(site: Operation) -> Made:
    site.only(divisor_override=None)
    kernel, padding = site.both("kernel_size"), site.both("padding")
    ceil, counted = (site.arguments[name] for name in ("ceil_mode", "count_include_pad"))
    pool = AvgPool2d(kernel, site.both("stride", kernel), padding, ceil, counted)
    return _made("pool", pool)


def _adaptive_pool(site: Operation) -> Made:
    return _made("avgpool", AdaptiveAvgPool2d(site.both("output_size")))


def _mean(site: Operation) -> Made:
    """The mean over height and width is how some code writes a global average."""
    site.only(dtype=None)
    axes = site.arguments["dim"]
    if len(site.came) != 3 or sorted(axis % 4 for axis in axes or ()) != [2, 3]:
        raise site.refused(f"wanted dim [2, 3] of [N, C, H, W], got {axes} of {_n(site.came)}")
    pool = _made("avgpool", AdaptiveAvgPool2d(1))
    return pool if site.arguments["keepdim"] else pool + _made("flatten", Flatten())


def _dropout(site: Operation) -> Made:
    site.only(train=False)
    return _made("drop", Dropout(site.arguments["p"]))


def _softmax(site: Operation) -> Made:
    site.only(dtype=None)
    if len(site.came) != 1 or site.arguments["dim"] not in (1, -1):
        got = f"dim {site.arguments['dim']} of {_n(site.came)}"
        raise site.refused(f"wanted dim 1 of [N, classes], got {got}")
    return _made("softmax", Softmax())


def _reshaped(site: Operation) -> Made:
    """Whatever it is asked by, by what it makes."""
    if site.output == site.came:
        return []
    features = math.prod(site.came)
    if site.output != (features,):
        got = _n(site.output)
        raise site.refused(f"wanted [N, {features}], as a Flatten makes it, got {got}")
    return _made("flatten", Flatten())


def _always(made: Made) -> Callable[[Operation], Made]:
    """An operator that means the same wherever it stands."""
    return lambda site: made


def _made(stem: str, layer: Layer) -> Made:
    return [(stem, layer, {})]


def _n(shape: Shape) -> str:
    return f"[{', '.join(map(str, ('N', *shape)))}]"


_RELU, _SIGMOID = _always(_made("relu", ReLU())), _always(_made("sigmoid", Sigmoid()))

OPERATORS: dict[str, Callable[[Operation], Made]] = {
    "adaptive_avg_pool2d": _adaptive_pool,
    "addmm": _linear("mat2", transposed=True),
    "alias": _always([]),
    "avg_pool2d": _avg_pool,
    "batch_norm": _batch_norm,
    "clone": _always([]),
    "contiguous": _always([]),
    "conv2d": _conv,
    "detach": _always([]),
    "dropout": _dropout,
    "dropout_": _dropout,
    "feature_dropout": _dropout,
    "flatten": _reshaped,
    "linear": _linear("weight", transposed=False),
    "matmul": _linear("other", transposed=True),
    "max_pool2d": _max_pool,
    "mean": _mean,
    "mm": _linear("mat2", transposed=True),
    "relu": _RELU,
    "relu_": _RELU,
    "reshape": _reshaped,
    "sigmoid": _SIGMOID,
    "sigmoid_": _SIGMOID,
    "softmax": _softmax,
    "squeeze": _reshaped,
    "to": _always([]),
    "view": _reshaped,
}
"""The layer that a node becomes, by its operator; `graph.py` takes biases and `TORCH_NORM`."""

TORCH_NORM = ["mul", "view", "pad", "avg_pool3d", "squeeze", "view", "mul", "add", "pow", "div"]
"""How torch writes local_response_norm: x / (k + alpha * mean of x * x) ** beta."""


def torch_norm(nodes: Sequence[Node], current: Node, came: Shape) -> LocalResponseNorm | None:
    """The layer, if `nodes` are that with its meaning.

    The first of them squares the input, the last divides the input by what became of it; between,
    the channels are taken as depth, padded with zeros and averaged.
    """
    if [operator(node) for node in nodes] != TORCH_NORM or len(came) != 3:
        return None
    square, deep, pad, mean, squeezed, back, scaled, shifted, power, quotient = nodes
    chained = all(after.args[0] is before for before, after in pairwise(nodes[:-1]))
    ends = (*square.args, *quotient.args) == (current, current, current, power)
    window: Any = mean.args[1]
    size, channels = window[0], came[0]
    sides = [list(node.meta["val"].shape)[1:] for node in (deep, pad, mean, squeezed, back)]
    padded = [[1, channels, *came[1:]], [1, channels + size - 1, *came[1:]]]
    exact = (
        pad.args[1:] == ([0, 0, 0, 0, size // 2, (size - 1) // 2],)
        and mean.args[1:] == ([size, 1, 1], [1, 1, 1])
        and sides == [*padded, padded[0], [*came], [*came]]
        and not any(node.kwargs for node in nodes)
    )
    alpha, beta, k = (node.args[1] for node in (scaled, power, shifted))
    if not (chained and ends and exact):
        return None
    if not isinstance(alpha, int | float) or not isinstance(beta, int | float):
        return None
    return LocalResponseNorm(size, alpha, beta, k) if isinstance(k, int | float) else None


def operator(node: Node) -> str:
    """`conv2d` of aten.conv2d.default; what is none of aten's is by its own name."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
        return str(target.overloadpacket.__name__)
    return str(target)


def is_function(node: Node) -> bool:
    """Whether it always makes the same of what it reads, and leaves that as it is."""
    target = node.target
    return (
        isinstance(target, torch._ops.OpOverload)
        and not target._schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in target.tags
    )
