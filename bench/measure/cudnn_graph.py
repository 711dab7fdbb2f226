"""Convolution + bias + ReLU by cuDNN's graph API: execution plans timed, the fastest kept.

It needs the package nvidia-cudnn-frontend (`import cudnn`), which nothing else here does. torch
tries ten plans at most, and its plain convolution adds the bias in a kernel of its own; this is the
most that cuDNN itself has for a layer. Many plans are compiled when they are built, so they are
tried in cuDNN's own order for SEARCH seconds, each timed as a CUDA graph. Plans that would round
float32 products are left out by their numerical notes, as torch does. API: NVIDIA, cuDNN Frontend,
`pygraph`.
"""

from __future__ import annotations

import functools
import importlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...engine.plan import Arithmetic
from ...engine.spec import Conv2d
from .timing import sampler

WORKSPACE = 1 << 30  # bytes that a plan may ask for at most
SEARCH = 1.0  # seconds for the plans of one convolution
REMEMBERED = 64  # convolutions whose plan is not chosen again


@functools.cache
def missing() -> str | None:
    """Why there is no graph API here; None if there is."""
    try:
        importlib.import_module("cudnn")
    except ImportError:
        return "nvidia-cudnn-frontend is not installed"
    except OSError as error:
        return f"nvidia-cudnn-frontend finds no cuDNN: {error}"
    return None


def conv_relu(
    name: str, layer: Conv2d, arithmetic: Arithmetic
) -> Callable[[torch.Tensor, Mapping[str, torch.Tensor]], torch.Tensor]:
    """The layer with its bias and ReLU on x [N, C, H, W] and a state, both channels last.

    The plan is chosen at the first call with an x of its shape, which raises RuntimeError if cuDNN
    has none.
    """
    chosen: dict[torch.Size, _Plan] = {}

    def stage(x: torch.Tensor, state: Mapping[str, torch.Tensor]) -> torch.Tensor:
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        plan = chosen.get(x.shape)
        if plan is None:
            fastest = _fastest(layer, arithmetic, tuple(x.shape), x.device)
            plan = chosen[x.shape] = fastest.with_workspace(x.device)
        return plan(x, weight, bias)

    return stage


@dataclass(frozen=True, slots=True)
class _Plan:
    """One execution plan of a graph."""

    graph: Any
    ends: tuple[Any, ...]  # x, weight, bias and output, as the graph names them
    index: int
    size: int  # bytes
    workspace: torch.Tensor | None = None

    def with_workspace(self, device: torch.device) -> _Plan:
        """The same with memory of its own to work in."""
        return replace(self, workspace=torch.empty(self.size, dtype=torch.uint8, device=device))

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        cudnn, handle = importlib.import_module("cudnn"), _handle(x.device)
        shape = tuple(self.ends[3].get_dim())
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        cudnn.set_stream(handle, torch.cuda.current_stream(x.device).cuda_stream)
        memory = dict(zip(self.ends, (x, weight, bias, out), strict=True))
        self.graph.execute_plan_at_index(memory, self.workspace, self.index, handle=handle)
        return out


@functools.cache
def _handle(device: torch.device) -> Any:
    with torch.cuda.device(device):
        return importlib.import_module("cudnn").create_handle()


@functools.lru_cache(REMEMBERED)
def _fastest(
    layer: Conv2d, arithmetic: Arithmetic, shape: tuple[int, ...], device: torch.device
) -> _Plan:
    """The fastest on random images of this shape and random weights.

    Raises RuntimeError if none runs, and at once what torch raises for a context that one broke.
    """
    filters = layer.out_channels, shape[1] // layer.groups, layer.kernel_size, layer.kernel_size
    x, weight = (
        torch.randn(size, device=device, dtype=arithmetic.dtype).contiguous(
            memory_format=torch.channels_last
        )
        for size in (shape, filters)
    )
    bias = torch.randn(layer.out_channels, device=device, dtype=arithmetic.dtype)
    graph, ends = _built(layer, arithmetic, x, weight, bias)
    best: tuple[float, _Plan] | None = None
    end = time.monotonic() + SEARCH
    for index in range(graph.get_execution_plan_count()):
        if best is not None and time.monotonic() > end:
            break
        try:
            graph.build_plan_at_index(index)
            size = max(graph.get_workspace_size_plan_at_index(index), 1)
            plan = _Plan(graph, ends, index, size)
            run = functools.partial(plan.with_workspace(device), x, weight, bias)
            take = sampler([run], "graph", device)  # as it will be timed
            took = min(take(), take())
        except Exception:  # cuDNN has kinds of its own: not built, or not for this GPU
            torch.cuda.synchronize(device)  # raises if the plan broke the GPU's context
            continue
        if best is None or took < best[0]:
            best = took, plan
    if best is None:
        raise RuntimeError("cuDNN has no plan that runs")
    return best[1]


def _built(
    layer: Conv2d, arithmetic: Arithmetic, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> tuple[Any, tuple[Any, ...]]:
    """The graph with all its plans, none built, and the tensors at its ends."""
    cudnn = importlib.import_module("cudnn")
    types = cudnn.data_type
    own = {
        torch.float16: types.HALF,
        torch.bfloat16: types.BFLOAT16,
        torch.float32: types.FLOAT,
    }
    graph = cudnn.pygraph(
        handle=_handle(x.device),
        io_data_type=own[x.dtype],
        intermediate_data_type=types.FLOAT,
        compute_data_type=types.FLOAT,
    )
    image, filters = (
        graph.tensor(dim=list(t.shape), stride=_channels_last(t), data_type=t.dtype)
        for t in (x, weight)
    )
    outputs = len(bias)
    shift = graph.tensor(
        dim=[1, outputs, 1, 1], stride=[outputs, 1, outputs, outputs], data_type=bias.dtype
    )
    stride, padding, dilation = (
        [size] * 2 for size in (layer.stride, layer.padding, layer.dilation)
    )
    convolved = graph.conv_fprop(
        image=image, weight=filters, padding=padding, stride=stride, dilation=dilation
    )
    out = graph.relu(input=graph.bias(input=convolved, bias=shift))
    out.set_output(True)
    graph.validate()
    graph.build_operation_graph()
    modes = cudnn.heur_mode
    graph.create_execution_plans([modes.A, modes.B, modes.FALLBACK])
    if arithmetic.dtype == torch.float32:
        notes = cudnn.numerical_note
        unlike = [notes.DOWN_CONVERT_INPUTS]
        graph.deselect_numeric_notes(
            unlike if arithmetic.precision == "tf32" else [*unlike, notes.TENSOR_CORE]
        )
    graph.deselect_workspace_greater_than(WORKSPACE)
    graph.check_support()
    return graph, (image, filters, shift, out)


def _channels_last(tensor: torch.Tensor) -> list[int]:
    """Strides of [N, C, H, W] with channels innermost, also where a size of 1 hides them."""
    _, channels, height, width = tensor.shape
    return [height * width * channels, 1, width * channels, channels]
