"""What a user would call instead: the same layers by torch, cuDNN and cuBLAS, as well as they can.

Every peer reads the problem's own tensors in the dtype of the problem. Weights in the layout that
it likes best, and a copy of the images where it wants other strides, are prepared outside of what
is timed. Outputs are allocated anew by each run, as torch does, and the last one is kept: copies of
a peer then write to different memory, as copies of the engine's kernels do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from operator import attrgetter
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from ...engine import reference
from ...engine.load import one_of
from ...engine.plan import Arithmetic
from ...engine.spec import Conv2d, Layer, Linear, Nonlinearity, ReLU
from ...kernels.epilogue import activated
from ..choices import KINDS as KINDS
from . import cudnn_graph
from .problem import Problem, Tensors, copies

ON_A_CPU = ("torch", "nchw")
COMPILED = "max-autotune, weights frozen where they overflow the L2 cache"

SWITCHES: dict[str, Any] = {
    "cudnn.benchmark": True,  # cuDNN chooses by trying
    "cudnn.benchmark_limit": 0,  # among all that it has
    "cuda.matmul.allow_fp16_reduced_precision_reduction": True,
    "cuda.matmul.allow_bf16_reduced_precision_reduction": True,
    "cuda.matmul.allow_fp16_accumulation": False,  # ours adds up in float32, and so do they
}
"""How torch.backends are while anybody is measured; results tell it."""

Layers = Sequence[tuple[str, Layer]]
State = Mapping[str, torch.Tensor]
Stage = Callable[[torch.Tensor, State], torch.Tensor]
Fuse = Callable[[str, Conv2d], Stage]
"""A convolution with its bias and ReLU as one call."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A contestant bound to one set of tensors: `run` computes, `output` gives what it made."""

    run: Callable[[], object]
    output: Callable[[], torch.Tensor]  # [N, C, H, W] or [N, features], after a run
    poison: Callable[[], object] | None = None  # what a run writes, if `output` is a copy of it


Prepare = Callable[[Tensors], Prepared]


@dataclass(frozen=True, slots=True)
class Peer:
    """A contestant by name; without `prepare` it cannot run here, and the note says why."""

    name: str
    prepare: Prepare | None
    straw_man: bool = False
    note: str = ""
    slow: str = ""  # what to say before it is prepared, where that takes long


def peers(problem: Problem, device: torch.device, kinds: Sequence[str] | None = None) -> list[Peer]:
    """Everyone but the engine who computes `problem`; kinds None: all that run on this device.

    A kind that has nothing to say to this problem (no activation to fuse, nothing in NCHW) gives
    no peer. Raises EngineError, listing the kinds, for one that is none.
    """
    cuda = device.type == "cuda"
    if kinds is None:
        kinds = tuple(KINDS) if cuda else ON_A_CPU
    everyone: list[Peer] = []
    for kind in kinds:
        one_of("peers", kind, KINDS)
        of_kind = list(_of_kind(kind, problem))
        if not cuda and kind not in ON_A_CPU:
            of_kind = [Peer(peer.name, None, note="needs a GPU") for peer in of_kind]
        everyone += of_kind
    return everyone


@contextmanager
def libraries(arithmetic: Arithmetic) -> Iterator[None]:
    """SWITCHES, and float32 products as asked; all as before afterwards."""
    tf32 = arithmetic.precision == "tf32"
    wanted = SWITCHES | {"cudnn.allow_tf32": tf32, "cuda.matmul.allow_tf32": tf32}
    before = {name: attrgetter(name)(torch.backends) for name in wanted}
    try:
        _switch(wanted)
        yield
    finally:
        _switch(before)


def _switch(values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        where, _, last = name.rpartition(".")
        setattr(attrgetter(where)(torch.backends), last, value)


def traced(problem: Problem, given: Tensors) -> Callable[..., torch.Tensor]:
    """The layers as a graph of aten operations that takes x and the values of the state.

    torch.compile then meets none of this package's Python.
    """
    names = list(given.state)

    def forward(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        state = dict(zip(names, values, strict=True))
        for name, layer in problem.layers:
            x = reference.apply(name, layer, x, state)
        return x

    graph: Callable[..., torch.Tensor] = make_fx(forward)(given.x, *given.state.values())
    return graph


# --- who there is ----------------------------------------------------------------------------


def _of_kind(kind: str, problem: Problem) -> Iterator[Peer]:
    layers, last = problem.layers, torch.channels_last
    match kind:
        case "torch":
            linear = isinstance(layers[0][1], Linear)
            flat = "torch linear" if linear else "torch"
            name = flat if problem.reads_features else "torch channels_last"
            yield Peer(name, _chain(_plain(layers), last))
            if linear and problem.batch == 1:
                stages = (_matrix_vector(layers[0][0]), *_plain(layers[1:]))
                yield Peer("torch addmv", _chain(stages, last))
        case "fused":
            yield from fused_peers(problem, "cudnn conv+relu", _conv_relu)
            if _followed_by_relu(layers, Linear) and not _followed_by_relu(layers, Conv2d):
                yield Peer("torch _addmm_activation", _chain(_fused(layers, _conv_relu), last))
        case "nchw" if not problem.reads_features:
            in_order = torch.contiguous_format
            yield Peer("torch NCHW", _chain(_plain(layers), in_order), straw_man=True)
        case "compile":
            slow = "torch.compile tunes itself, about a minute"
            yield Peer("torch.compile", _compiled(problem), note=COMPILED, slow=slow)
        case "frontend":
            missing = cudnn_graph.missing()
            fuse = partial(cudnn_graph.conv_relu, arithmetic=problem.plan.arithmetic)
            for peer in fused_peers(problem, "cudnn frontend", fuse):
                absent = replace(peer, prepare=None, note=missing or "")
                yield absent if missing else peer


def fused_peers(problem: Problem, name: str, fuse: Fuse) -> Iterator[Peer]:
    """A peer whose convolutions are one call each with bias and ReLU; none where there are none.

    Tensor cores want channels by eights and cuDNN is slow where images have three (pytorch issue
    68506), so images are also offered with channels of zeros, and the copy that adds them counts.
    """
    if not _followed_by_relu(problem.layers, Conv2d):
        return
    calls = _fused(problem.layers, fuse)
    yield Peer(name, _chain(calls, torch.channels_last))
    first = problem.layers[0][1]
    if problem.source is None and isinstance(first, Conv2d) and first.groups == 1:
        for channels in (c for c in (4, 8) if c > problem.plan.image_shape[0]):
            prepare = partial(_padded, problem.layers[0][0], calls, channels)
            yield Peer(f"{name} C{channels}", prepare, note="pads the channels with a copy")


def _followed_by_relu(layers: Layers, kind: type[Layer]) -> bool:
    return any(
        isinstance(layer, kind) and isinstance(after, ReLU)
        for (_, layer), (_, after) in pairwise(layers)
    )


# --- layers as calls -------------------------------------------------------------------------


def _plain(layers: Layers) -> tuple[Stage, ...]:
    return tuple(partial(_apply, name, layer) for name, layer in layers)


def _apply(name: str, layer: Layer, x: torch.Tensor, state: State) -> torch.Tensor:
    """A layer as torch does it best: activations in place, which no problem starts with."""
    match layer:
        case Nonlinearity():
            return activated(x, layer.activation, in_place=True)
    return reference.apply(name, layer, x, state)


def _fused(layers: Layers, fuse: Fuse) -> tuple[Stage, ...]:
    """Every convolution and linear layer in one call with its ReLU, the rest as in `_plain`."""
    stages: list[Stage] = []
    rest = list(layers)
    while rest:
        (name, layer), *rest = rest
        takes_relu = bool(rest) and isinstance(rest[0][1], ReLU)
        if takes_relu and isinstance(layer, Conv2d):
            stages.append(fuse(name, layer))
        elif takes_relu and isinstance(layer, Linear):
            stages.append(_linear_relu(name))
        else:
            stages += _plain([(name, layer)])
            continue
        del rest[0]
    return tuple(stages)


def _conv_relu(name: str, layer: Conv2d) -> Stage:
    stride, padding, dilation = (
        [size] * 2 for size in (layer.stride, layer.padding, layer.dilation)
    )

    def stage(x: torch.Tensor, state: State) -> torch.Tensor:
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        made: torch.Tensor = torch.ops.aten.cudnn_convolution_relu(
            x, weight, bias, stride, padding, dilation, layer.groups
        )
        return made

    return stage


def _linear_relu(name: str) -> Stage:
    """cublasLt adds the bias and takes the ReLU before it writes."""

    def stage(x: torch.Tensor, state: State) -> torch.Tensor:
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        made: torch.Tensor = torch.ops.aten._addmm_activation(bias, x, weight.t())
        return made

    return stage


def _matrix_vector(name: str) -> Stage:
    """One image is a vector."""

    def stage(x: torch.Tensor, state: State) -> torch.Tensor:
        return torch.addmv(state[f"{name}.bias"], state[f"{name}.weight"], x[0])[None]

    return stage


# --- bound to tensors ------------------------------------------------------------------------


def _chain(stages: Sequence[Stage], memory_format: torch.memory_format) -> Prepare:
    """One stage after the other, on tensors in this order of channels."""

    def prepare(given: Tensors) -> Prepared:
        x, state = _arranged(given, memory_format)
        return kept(lambda: _run(stages, x, state))

    return prepare


def _padded(first: str, stages: Sequence[Stage], channels: int, given: Tensors) -> Prepared:
    """The same on images with channels of zeros added, which no run writes again."""
    x, state = _arranged(given, torch.channels_last)
    n, came, height, width = x.shape
    wide = torch.zeros(n, channels, height, width, dtype=x.dtype, device=x.device)
    wide = wide.contiguous(memory_format=torch.channels_last)
    weight = F.pad(state[f"{first}.weight"], (0, 0, 0, 0, 0, channels - came))
    state[f"{first}.weight"] = weight.contiguous(memory_format=torch.channels_last)
    inside = wide[:, :came]

    def make() -> torch.Tensor:
        inside.copy_(x)
        return _run(stages, wide, state)

    return kept(make)


def _compiled(problem: Problem) -> Prepare:
    """One compilation, whose kernels are timed like all others: without CUDA graphs of its own.

    Weights are frozen where they need no copies: they are constants then, each copy's a compilation
    of its own.
    """
    compiled: list[Callable[..., torch.Tensor]] = []

    def prepare(given: Tensors) -> Prepared:
        x, state = _arranged(given, torch.channels_last)
        frozen = copies(problem.work.bytes, x.device) == 1
        values = () if frozen else tuple(state.values())
        if not compiled:
            torch._dynamo.reset()  # or every problem would count as one more recompilation
            graph = traced(problem, Tensors(x, state))
            graph = _Frozen(graph, state.values()) if frozen else graph
            options = torch._inductor.list_mode_options("max-autotune-no-cudagraphs")
            # It would print a page for every layer.
            options |= {"autotune_num_choices_displayed": 0}
            options |= {"max_autotune_report_choices_stats": False}
            compiled.append(torch.compile(graph, fullgraph=True, dynamic=False, options=options))
            # As an option it would come too late: what traces the graph looks only here.
            with torch._inductor.config.patch(freezing=frozen):
                compiled[0](x, *values)
        return kept(lambda: compiled[0](x, *values))

    return prepare


class _Frozen(torch.nn.Module):
    """A graph that holds its weights: only a module's are frozen."""

    def __init__(self, graph: Callable[..., torch.Tensor], values: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.graph = graph
        for place, value in enumerate(values):
            self.register_buffer(f"value{place}", value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.graph(x, *self.buffers())


def _arranged(
    given: Tensors, memory_format: torch.memory_format
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """x and state, whatever has four axes in this order of channels."""

    def arranged(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous(memory_format=memory_format) if tensor.ndim == 4 else tensor

    return arranged(given.x), {name: arranged(tensor) for name, tensor in given.state.items()}


def _run(stages: Sequence[Stage], x: torch.Tensor, state: State) -> torch.Tensor:
    for stage in stages:
        x = stage(x, state)
    return x


def kept(make: Callable[[], torch.Tensor]) -> Prepared:
    """A run that lets go of its last output only when it has the next."""
    last: list[torch.Tensor] = []

    def run() -> None:
        last[:] = [make()]

    return Prepared(run, lambda: last[0])
