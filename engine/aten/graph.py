"""A graph of aten's operators, as torch.export and torch.compile make it, as a network.

The graph must be one chain from images [N, C, H, W] to one output. Each node is exactly what
`operators.py` knows a layer for, or the graph is refused in one line that names the node. What a
node makes is read from the fake tensor that its tracer left with it, not computed anew, and every
layer is held against that. Only what is made of constants alone, as a pruned or a normalised weight
is, is computed, and is one. Sizes of images may be symbols: what depends on one is no number in the
graph, and is refused as an argument.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from ..chain import Chain, State, fitting
from ..fuse import fuse
from ..spec import Dropout, Layer, Network, NetworkError, Owner, Shape
from ..zoo import NETWORKS
from .operators import (
    OPERATORS,
    TORCH_NORM,
    Made,
    Operation,
    is_function,
    operator,
    refused,
    torch_norm,
)

Constants = Mapping[str, torch.Tensor]  # by the name of the placeholder


def read(graph: Graph, constants: Constants, name: str) -> tuple[Network, State]:
    """The network that the graph says, and its canonical state, a copy.

    `constants` are what the placeholders stand for, but the images' own. The network is called
    `name`, or is one of the zoo's if its layers are. Raises NetworkError for a graph outside the
    vocabulary and for weights that `weights.load` refuses.
    """
    try:
        chain = _AtenWalk(graph, constants, name).chain
    except NetworkError as error:
        raise NetworkError(f"{name}: {error}") from None
    network, state = _known(chain.network(), chain.state)
    if not fuse(network):
        raise NetworkError(f"{name}: wanted a layer that computes, got none")
    return network, state


def images_of(graph: Graph) -> Node:
    """The placeholder that the chain starts from: the data of the first convolution.

    Before it weights may be computed. A graph without one, which no network is, is read from its
    first node on.
    """
    nodes = [node for node in graph.nodes if node.op == "call_function" and _is_tensor(node)]
    for node in [node for node in nodes if operator(node) == "conv2d"] or nodes:
        first = node
        while first.op == "call_function" and (read := first.all_input_nodes):
            first = read[operator(first) == "addmm"]  # where the bias comes first
        if first.op == "placeholder" and _is_tensor(first):
            images: Node = first
            return images
        raise refused(node, "wanted images to work on, got a constant")
    raise NetworkError("wanted a chain of layers, got an empty graph")


class _AtenWalk:
    """Takes the nodes one after the other, and leaves them as `chain`."""

    def __init__(self, graph: Graph, constants: Constants, name: str) -> None:
        self._current = images = images_of(graph)
        self._known = {n: constants[n.name] for n in graph.nodes if n.name in constants}
        self._known.pop(images, None)
        if (axes := images.meta["val"].ndim) != 4:
            raise NetworkError(f"wanted images [N, C, H, W], got {axes} axes")
        self._batch, *came = images.meta["val"].shape
        self._kind = images.meta["val"].dtype, images.meta["val"].device
        self.chain = Chain(name, _numbers(came))
        nodes = [n for n in graph.nodes if n.op not in ("placeholder", "output") and _is_tensor(n)]
        while nodes:
            del nodes[: self._take(nodes)]
        (output,) = graph.output_node().args
        if output not in (self._current, (self._current,), [self._current]):
            raise NetworkError(f"wanted one output, {self._current}, got {output}")

    def _take(self, nodes: list[Node]) -> int:
        """Take the first node, or the few from there that are one layer; how many they were."""
        node, reads = nodes[0], nodes[0].all_input_nodes
        name, few = operator(node), nodes[: len(TORCH_NORM)]
        if reads and all(read in self._known for read in reads) and is_function(node):
            args, kwargs = map_arg((node.args, node.kwargs), self._known.__getitem__)
            self._known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            return 1
        if norm := torch_norm(few, self._current, self.chain.shape):
            self.chain.append("norm", norm)
            self._current = few[-1]
            return len(few)
        if name not in (*OPERATORS, "add", "add_"):
            known = ", ".join(sorted({*(each.rstrip("_") for each in OPERATORS), "add"}))
            raise refused(node, f"not supported; wanted a chain of {known}")
        site = self._site(node)
        made: Made = []
        bias = None
        if name in OPERATORS:
            made = OPERATORS[name](site)
        else:
            site.only(alpha=1)
            bias = site.tensor("self" if "self" in site.tensors else "other")
        with fitting(site.refused):
            for stem, layer, tensors in made:
                self.chain.append(stem, layer, tensors)
            if bias is not None:
                self.chain.add_bias(bias)
        if site.output != self.chain.shape:
            raise refused(node, f"wanted an output {self.chain.shape}, got {site.output}")
        self._current = node
        return 1

    def _site(self, node: Node) -> Operation:
        """The node with what it is given; refuses one that reads more than the one before."""
        value = node.meta["val"]
        batch, *sides = value.shape or (None,)
        if batch != self._batch or (value.dtype, value.device) != self._kind:
            wanted = "{} on {}".format(*self._kind)
            got = f"{value.dtype} on {value.device} {list(value.shape)}"
            raise refused(node, f"wanted {wanted} [{self._batch}, ...], got {got}")
        arguments: dict[str, Any] = {}
        tensors: dict[str, torch.Tensor] = {}
        reads = []
        for place, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
            default = node.kwargs.get(argument.name, argument.default_value)
            given = node.args[place] if place < len(node.args) else default
            if not isinstance(given, Node) or not _is_tensor(given):
                arguments[argument.name] = given
            elif given in self._known:
                tensors[argument.name] = self._known[given]
            else:
                reads.append(given)
        if reads != [self._current]:
            got = " and ".join(map(str, reads)) or "constants"
            raise refused(node, f"a branch: wanted {self._current}, the output before, got {got}")
        return Operation(node, self.chain.shape, _numbers(sides), arguments, tensors)


def _known(network: Network, state: State) -> tuple[Network, State]:
    """The zoo's network with these layers, up to dropout and the number of outputs, or this one."""
    for other in NETWORKS.values():
        published = other.with_outputs(network.output_shape()[0])
        if _essence(published) != _essence(network):
            continue
        if network.input_shape != other.input_shape:
            preset = network.preprocess
            published = replace(published, input_shape=network.input_shape, preprocess=preset)
        here, there = (
            [name for name, layer in net.layers if isinstance(layer, Owner)]
            for net in (network, published)
        )
        names = dict(zip(here, there, strict=True))
        owned = ((key.rpartition("."), tensor) for key, tensor in state.items())
        return published, {f"{names[layer]}.{key}": t for (layer, _, key), t in owned}
    return network, state


def _essence(network: Network) -> list[Layer]:
    return [layer for _, layer in network.layers if not isinstance(layer, Dropout)]


def _is_tensor(node: Node) -> bool:
    """Whether the node makes tensors: numbers, and what makes nothing, are not read as nodes."""
    numbers = int | float | torch.SymInt | torch.SymFloat | torch.SymBool | None
    return not isinstance(node.meta.get("val"), numbers)


def _numbers(sides: Any) -> Shape:
    """Sizes as they are, or as the example has them."""
    return tuple(side if isinstance(side, int) else side.node.hint for side in sides)
