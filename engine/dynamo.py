"""What `torch.compile(model, backend="alexnet_triton")` calls: the engine as a compiler's backend.

Weights arrive as inputs of every call. They are packed once and shared by all compilations of the
same chain on them, whatever its batch size, and packed anew when one was replaced or changed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_arg
from torch.utils.weak import WeakTensorKeyDictionary

from .aten.graph import images_of, read
from .chain import State
from .load import EngineError
from .run import Engine
from .spec import Network

Weights = Sequence[torch.Tensor]


@dataclass(frozen=True, slots=True)
class _Packed:
    """An engine, and the weights that it has: which tensors they were, where, in which version."""

    engine: Engine
    tensors: tuple[ref[torch.Tensor], ...]
    stamps: tuple[tuple[int, int], ...]

    def holds(self, weights: Weights) -> bool:
        """Whether these are those weights, unchanged since."""
        same = all(then() is now for then, now in zip(self.tensors, weights, strict=True))
        return same and self.stamps == _stamps(weights)


# By the first of their weights, with which they go: compilations are apart, and know of no other.
_PACKED = WeakTensorKeyDictionary()
_TURN = threading.Lock()


def backend(
    model: GraphModule, example_inputs: Sequence[Any], **options: object
) -> Callable[..., tuple[torch.Tensor]]:
    """A graph of torch.compile's by the engine's kernels: `torch.compile(model, backend=backend)`.

    Each graph must be a chain as `Engine.load` takes a module for, with weights, from images
    [N, 3, H, W] to one output, which comes in the dtype and on the device that the model would
    give it. The engine computes in the weights' dtype; on a CPU, in Triton's interpreter. A weight
    that was replaced or changed in place is noticed before the next call, by which tensor it is,
    its address and its version; inference tensors have no version, so a change in place of one is
    not noticed. Nor is a write through `.data`, nor the step of an optimizer with fused=True: call
    torch.compiler.reset() after it.

    Raises NetworkError and EngineError while it compiles, which torch quotes in its
    BackendCompilerFailed; and EngineError for a call that needs a gradient, or within autocast.
    """
    if options:
        raise EngineError(f"torch.compile: wanted no mode and no options, got {options}")
    graph = _aten(model).graph
    images = images_of(graph)
    nodes = graph.find_nodes(op="placeholder")
    at = nodes.index(images)
    owned = [
        place
        for place, node in enumerate(nodes)
        if node.users and node is not images and isinstance(node.meta["val"], torch.Tensor)
    ]
    if not owned:
        raise EngineError(
            "torch.compile: wanted a graph with weights, got one without; if torch has cut the "
            "model, fullgraph=True says where"
        )
    roles = _roles([nodes[place] for place in owned])

    def canonical(inputs: Sequence[Any]) -> tuple[Network, State]:
        constants = {nodes[place].name: inputs[place].detach() for place in owned}
        return read(graph, constants, "torch.compile")

    def run(*inputs: Any) -> tuple[torch.Tensor]:
        pixels = inputs[at]
        tensors = [pixels, *(inputs[place] for place in owned)]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            raise EngineError(
                "torch.compile: the engine computes no gradients, and this call would need one; "
                "call it within torch.inference_mode() or torch.no_grad()"
            )
        if torch.is_autocast_enabled(pixels.device.type):
            raise EngineError("torch.compile: wanted a call outside of autocast; use model.half()")
        engine = _engine(chain, pixels, tensors[1:], lambda: canonical(inputs)[1])
        return (engine(pixels).to(pixels.dtype),)

    network, state = canonical(example_inputs)
    weights = [example_inputs[place] for place in owned]
    chain = network, roles
    _engine(chain, example_inputs[at], weights, lambda: state)  # refuses while it compiles
    return run


backend.reset = _PACKED.clear  # type: ignore[attr-defined]  # torch.compiler.reset() calls it


def _aten(model: GraphModule) -> GraphModule:
    """The functions of torch that dynamo recorded, as aten's operators, on its own fake tensors."""
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.traceback import preserve_node_meta

    fakes = [node.meta["example_value"] for node in model.graph.find_nodes(op="placeholder")]
    with torch.no_grad(), preserve_node_meta():
        return make_fx(Interpreter(model).run, pre_dispatch=True)(*fakes)


def _roles(weights: Sequence[Node]) -> tuple[str, ...]:
    """What is done with which weight: chains of equal layers may use the same ones differently."""
    said = {node: str(place) for place, node in enumerate(weights)}
    roles = []
    for node in weights[0].graph.nodes:
        if any(read in said for read in node.all_input_nodes):
            text = f"{node.target}{map_arg((node.args, node.kwargs), lambda n: said.get(n, ''))}"
            if all(read in said for read in node.all_input_nodes):
                said[node] = text
            else:
                roles.append(text)
    return tuple(roles)


def _engine(
    chain: tuple[Network, tuple[str, ...]],
    images: torch.Tensor,
    weights: Weights,
    state: Callable[[], State],
) -> Engine:
    """The engine that has these weights in these roles, packed anew only if there is none."""
    with _TURN:
        shared = _PACKED.setdefault(weights[0], {})
        key = chain, images.dtype, images.device
        packed: _Packed | None = shared.get(key)
        if packed is None or not packed.holds(weights):
            if packed is None:
                engine = Engine.load(chain[0], state(), images.device, images.dtype)
            else:
                engine = packed.engine.with_state(state())
            packed = _Packed(engine, tuple(map(ref, weights)), _stamps(weights))
            shared[key] = packed
        return packed.engine


def _stamps(weights: Weights) -> tuple[tuple[int, int], ...]:
    """Where each is, and how often it was changed in place, which inference tensors do not say."""
    return tuple((w.data_ptr(), 0 if w.is_inference() else w._version) for w in weights)
