"""Everyone else who computes a layer: right, as declared, and without a trace afterwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace

import pytest
import torch
from alexnet_triton.bench.measure import cudnn_graph
from alexnet_triton.bench.measure.peers import KINDS, Peer, fused_peers, libraries, peers, traced
from alexnet_triton.bench.measure.problem import (
    Problem,
    Tensors,
    expected,
    match,
    problems,
    tensors,
)
from alexnet_triton.engine import EngineError
from alexnet_triton.engine.devices.planner import Planner
from alexnet_triton.engine.plan import ARITHMETIC
from alexnet_triton.engine.spec import Conv2d
from alexnet_triton.engine.zoo import network
from torch.nn import functional as F

CPU = torch.device("cpu")


def one(name: str, batch: int = 2, dtype: str = "fp32", model: str = "digits") -> Problem:
    planner = Planner(network(model), ARITHMETIC[dtype], None)
    (found,) = problems(planner, dtype, batch, [name])
    return found


def check(peer: Peer, problem: Problem, given: Tensors) -> None:
    assert peer.prepare is not None, peer.note
    before = given.x.clone(), {name: tensor.clone() for name, tensor in given.state.items()}
    prepared = peer.prepare(given)
    prepared.run()
    first = prepared.output()
    prepared.run()  # nothing of the first run may be left in the second
    found = match(problem, prepared.output(), expected(problem, given))
    assert found.passed, f"{peer.name}: {found}"
    assert torch.equal(first, prepared.output())
    assert torch.equal(given.x, before[0])
    assert all(torch.equal(given.state[name], tensor) for name, tensor in before[1].items())


@pytest.mark.parametrize(
    "name", ["conv1", "pool1", "conv2+pool2", "fc6", "fc8", "conv5+pool5+avgpool+fc6"]
)
@pytest.mark.parametrize("batch", [1, 3])
def test_every_peer_of_a_cpu_matches(name: str, batch: int, generator: torch.Generator) -> None:
    problem = one(name, batch)
    given = tensors(problem, CPU, generator)
    found = peers(problem, CPU)
    assert found
    for peer in found:
        check(peer, problem, given)


@pytest.mark.parametrize(
    ("name", "model"),
    [("norm1", "alexnet2012"), ("softmax", "alexnet_single_tower"), ("fc8", "alexnet_keras_bn")],
)
def test_other_layers_have_peers_too(name: str, model: str, generator: torch.Generator) -> None:
    problem = one(name, 1, model=model)
    given = tensors(problem, CPU, generator)
    for peer in peers(problem, CPU):
        check(peer, problem, given)


CUDA = torch.device("cuda", 0)  # to ask needs no GPU, only to prepare does


@pytest.mark.parametrize(
    ("name", "batch", "device", "kinds", "found"),
    [
        ("conv2", 2, CPU, None, ["torch channels_last", "torch NCHW"]),
        ("fc6", 2, CPU, None, ["torch linear"]),
        ("fc6", 1, CPU, None, ["torch linear", "torch addmv"]),
        (
            *("conv2+pool2", 2, CUDA, None),
            [
                *("torch channels_last", "cudnn conv+relu", "torch NCHW", "torch.compile"),
                "cudnn frontend",
            ],
        ),
        (
            *("conv1", 2, CUDA, ["fused"]),
            ["cudnn conv+relu", "cudnn conv+relu C4", "cudnn conv+relu C8"],
        ),
        ("fc7", 2, CUDA, ["torch", "fused"], ["torch linear", "torch _addmm_activation"]),
        ("fc8", 2, CUDA, ["torch", "fused", "nchw", "frontend"], ["torch linear"]),
        ("pool2", 2, CUDA, ["fused", "frontend"], []),
    ],
)
def test_who_there_is(
    name: str, batch: int, device: torch.device, kinds: list[str] | None, found: list[str]
) -> None:
    assert [peer.name for peer in peers(one(name, batch), device, kinds)] == found


def test_what_a_peer_says_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudnn_graph, "missing", lambda: None)
    found = peers(one("conv2"), CUDA)
    assert [peer.name for peer in found if peer.straw_man] == ["torch NCHW"]
    assert [peer.name for peer in found if peer.slow] == ["torch.compile"]
    found = peers(one("conv2"), CPU, tuple(KINDS))
    reasons = {peer.name: peer.note for peer in found if peer.prepare is None}
    assert set(reasons) == {"cudnn conv+relu", "torch.compile", "cudnn frontend"}
    assert set(reasons.values()) == {"needs a GPU"}


def test_no_graph_api_is_a_reason() -> None:
    if cudnn_graph.missing() is None:
        pytest.skip("nvidia-cudnn-frontend is here")
    (peer,) = peers(one("conv2"), torch.device("cuda", 0), ["frontend"])
    assert peer.prepare is None
    assert peer.note == cudnn_graph.missing() == "nvidia-cudnn-frontend is not installed"


def test_a_broken_context_ends_the_search_for_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that fails alone is passed over; what it breaks for all others is told at once."""
    built: list[int] = []
    graph = SimpleNamespace(
        get_execution_plan_count=lambda: 4,
        build_plan_at_index=built.append,
        get_workspace_size_plan_at_index=lambda index: 0,
    )
    broken_at = 9

    def sampler(runs: list[object], clock: str, device: torch.device) -> Callable[[], float]:
        assert clock == "graph"
        if len(built) < 3:
            raise ValueError("CUDNN_STATUS_EXECUTION_FAILED")
        return lambda: 1.0

    def synchronize(device: object) -> None:
        if len(built) >= broken_at:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(cudnn_graph, "_built", lambda *_: (graph, ()))
    monkeypatch.setattr(cudnn_graph, "sampler", sampler)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    conv, search = Conv2d(8, 3), cudnn_graph._fastest.__wrapped__
    assert search(conv, ARITHMETIC["fp32"], (1, 8, 4, 4), CPU).index == 2
    assert built == [0, 1, 2, 3]
    built.clear()
    broken_at = 2
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        search(conv, ARITHMETIC["fp32"], (1, 8, 4, 4), CPU)
    assert built == [0, 1]


def test_an_unknown_kind_is_one_line() -> None:
    with pytest.raises(EngineError, match=r"peers: wanted one of torch, fused, .* 'cublas'"):
        peers(one("conv2"), CPU, ["cublas"])


def fuse(name: str, layer: Conv2d) -> Callable[..., torch.Tensor]:
    """A convolution with bias and ReLU that a CPU has."""

    def stage(x: torch.Tensor, state: Mapping[str, torch.Tensor]) -> torch.Tensor:
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        sizes = layer.stride, layer.padding, layer.dilation, layer.groups
        return F.conv2d(x, weight, bias, *sizes).relu()

    return stage


@pytest.mark.parametrize("name", ["conv1", "conv1+pool1", "conv3+conv4", "conv5+pool5+avgpool+fc6"])
def test_fused_calls_take_their_relu_with_them(name: str, generator: torch.Generator) -> None:
    problem = one(name)
    given = tensors(problem, CPU, generator)
    found = list(fused_peers(problem, "fused", fuse))
    assert len(found) == (3 if name.startswith("conv1") else 1)
    for peer in found:
        check(peer, problem, given)


def test_no_relu_is_paid_twice(generator: torch.Generator) -> None:
    problem = one("conv3")
    (peer,) = fused_peers(problem, "negated", lambda *layer: lambda *x: -fuse(*layer)(*x))
    assert peer.prepare is not None
    prepared = peer.prepare(tensors(problem, CPU, generator))
    prepared.run()
    assert prepared.output().min() < 0  # another one would leave nothing


@pytest.mark.parametrize("name", ["conv1+pool1", "fc6"])
def test_what_is_compiled_is_the_problem(name: str, generator: torch.Generator) -> None:
    problem = one(name)
    given = tensors(problem, CPU, generator)
    graph = traced(problem, given)
    other = tensors(problem, CPU, generator)  # no number of the first is left in the graph
    made = graph(other.x, *other.state.values())
    assert match(problem, made, expected(problem, other)).passed
    compiled = torch.compile(graph, backend="eager", fullgraph=True)
    with torch.inference_mode():
        assert torch.equal(compiled(other.x, *other.state.values()), made)


def test_compiled_weights_are_frozen(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is compiled has the images as its only input, and the compiler is told so in time."""
    compile, traced_inputs = torch.compile, []

    def backend(graph: torch.fx.GraphModule, given: list[torch.Tensor]) -> torch.fx.GraphModule:
        traced_inputs.append((len(given), torch._inductor.config.freezing))
        return graph

    monkeypatch.setattr(
        torch, "compile", lambda graph, options, **how: compile(graph, backend=backend, **how)
    )
    problem = one("fc6+fc7")
    (peer,) = peers(problem, CUDA, ["compile"])
    with torch.inference_mode():
        check(peer, problem, tensors(problem, CPU, generator))
    assert traced_inputs == [(1, True)]
    assert not torch._inductor.config.freezing


def test_switches_are_taken_and_given_back() -> None:
    def switches() -> list[object]:
        cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
        return [
            *(cudnn.benchmark, cudnn.benchmark_limit, matmul.allow_fp16_accumulation),
            matmul.allow_bf16_reduced_precision_reduction,
            *(cudnn.allow_tf32, matmul.allow_tf32),
        ]

    torch.backends.cuda.matmul.allow_fp16_accumulation = True
    before = switches()
    for dtype, wanted in (("tf32", True), ("fp32", False), ("fp16", False)):
        with libraries(ARITHMETIC[dtype]):
            assert switches() == [True, 0, False, True, wanted, wanted]
        assert switches() == before
    with pytest.raises(ZeroDivisionError), libraries(ARITHMETIC["tf32"]):
        raise ZeroDivisionError
    assert switches() == before
    torch.backends.cuda.matmul.allow_fp16_accumulation = False


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["conv1+pool1", "conv2", "conv4", "pool5", "fc6", "fc8"])
@pytest.mark.parametrize("dtype", ["fp32", "tf32", "fp16", "bf16"])
def test_every_peer_of_a_gpu_matches(name: str, dtype: str) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    problem = one(name, 1, dtype, "alexnet")
    given = tensors(problem, device)
    kinds = [kind for kind in KINDS if kind != "compile"]
    with libraries(problem.plan.arithmetic), torch.inference_mode():
        for peer in peers(problem, device, kinds):
            if peer.prepare is not None:
                check(peer, problem, given)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["conv5+pool5", "fc7"])
def test_compilation_on_a_gpu_matches(name: str) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    problem = one(name, 8, "fp16", "alexnet")
    with libraries(problem.plan.arithmetic), torch.inference_mode():
        (peer,) = peers(problem, device, ["compile"])
        check(peer, problem, tensors(problem, device))
