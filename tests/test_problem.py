"""Layers and whole networks as problems: what is right matches float64, what is broken does not."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from alexnet_triton.bench.measure import problem as cut
from alexnet_triton.bench.measure.problem import Problem
from alexnet_triton.engine.devices.planner import Planner
from alexnet_triton.engine.plan import ARITHMETIC
from alexnet_triton.engine.spec import NetworkError
from alexnet_triton.engine.zoo import network
from alexnet_triton.kernels.conv import Conv2dConfig
from alexnet_triton.kernels.jit import architecture
from alexnet_triton.kernels.pool import PoolConfig


def one(name: str, batch: int = 2, dtype: str = "fp32", model: str = "digits") -> Problem:
    """A problem for the interpreter; "all" is the whole network."""
    planner = Planner(network(model), ARITHMETIC[dtype], None)
    if name == "all":
        return cut.network_problem(planner, dtype, batch)
    (found,) = cut.problems(planner, dtype, batch, [name])
    return found


@pytest.mark.parametrize(
    "name",
    ["conv1", "pool1", "conv2+pool2", "fc8", "conv1+pool1", "avgpool+fc6+fc7", "all"],
)
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.interpreter
def test_the_engine_matches(name: str, dtype: str, generator: torch.Generator) -> None:
    problem = one(name, dtype=dtype)
    given = cut.tensors(problem, "cpu", generator)
    bound = cut.ready(problem, given)
    wanted = cut.expected(problem, given)
    assert not cut.match(problem, bound.output(), wanted).passed  # poisoned
    bound()
    found = cut.match(problem, bound.output(), wanted)
    assert found.passed, found
    assert bound.output().shape == wanted.shape or bound.output().flatten(1).shape == wanted.shape


@pytest.mark.interpreter
def test_a_network_with_batch_norm_has_an_answer(generator: torch.Generator) -> None:
    problem = one("conv2", 1, model="alexnet_keras_bn")
    given = cut.tensors(problem, "cpu", generator)
    assert any(name.endswith("running_var") for name in given.state)
    bound = cut.ready(problem, given)
    bound()
    assert cut.match(problem, bound.output(), cut.expected(problem, given)).passed


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["conv1+pool1", "conv4", "pool5", "fc6"])
@pytest.mark.parametrize("dtype", ["fp32", "tf32", "fp16", "bf16"])
def test_the_engine_matches_on_a_gpu(name: str, dtype: str, device: torch.device) -> None:
    planner = Planner(network("alexnet"), ARITHMETIC[dtype], architecture(device))
    (problem,) = cut.problems(planner, dtype, 5, [name])
    given = cut.tensors(problem, device)
    bound = cut.ready(problem, given)
    bound()
    assert cut.match(problem, bound.output(), cut.expected(problem, given)).passed


def answer(problem: Problem, given: cut.Tensors) -> torch.Tensor:
    """The right one for every image, as a peer would give it."""
    return cut.expected(problem, given).float()


def test_one_wrong_number_is_no_match(generator: torch.Generator) -> None:
    problem = one("conv3", 3)
    given = cut.tensors(problem, "cpu", generator)
    wanted = cut.expected(problem, given)
    right = answer(problem, given)
    assert cut.match(problem, right, wanted).passed
    wrong = right.clone()
    wrong[2, 1, 0, 0] += 0.01 * wanted.abs().max().item()
    assert not cut.match(problem, wrong, wanted).passed
    for left in (torch.nan, torch.inf):
        wrong = right.clone()
        wrong[1, 0, 2, 2] = left
        assert not cut.match(problem, wrong, wanted).passed
    assert not cut.match(problem, right[:2], wanted).passed
    assert not cut.match(problem, right[:, :-1], wanted).passed
    assert not cut.match(problem, right.transpose(0, 1).reshape(right.shape), wanted).passed


def test_a_small_error_everywhere_is_no_match(generator: torch.Generator) -> None:
    problem = one("conv3")
    given = cut.tensors(problem, "cpu", generator)
    wanted = cut.expected(problem, given)
    biased = answer(problem, given) + 0.9 * problem.tolerance * wanted.abs().max().float()
    found = cut.match(problem, biased, wanted)
    assert found.max_error <= found.tolerance
    assert not found.passed


def test_every_image_of_a_long_batch_is_compared(generator: torch.Generator) -> None:
    problem = one("fc8", 100)
    wanted = cut.expected(problem, cut.tensors(problem, "cpu", generator))
    assert len(wanted) == 100
    made = wanted.float()
    assert cut.match(problem, made, wanted).passed
    for image, value in ((0, 0.0), (41, 0.0), (99, torch.nan)):
        wrong = made.clone()
        wrong[image] = value
        assert not cut.match(problem, wrong, wanted).passed


def test_work_counts_what_must_move() -> None:
    conv, pool, both = (one(name) for name in ("conv2", "pool2", "conv2+pool2"))
    height, width, images, channels = conv.step.output
    between = height * width * images * channels * 4
    assert both.work.flops == conv.work.flops + pool.work.flops
    assert both.work.bytes == conv.work.bytes + pool.work.bytes - 2 * between
    first = one("conv1")
    size = 2 * 3 * 64 * 64 + 8 * 3 * 11 * 11 + 8
    height, width, images, channels = first.step.output
    assert first.work.bytes == 4 * (size + height * width * images * channels)


def test_what_is_no_problem_is_refused() -> None:
    with pytest.raises(NetworkError, match=r"digits has no step 'conv9'; it has conv1, pool1"):
        one("conv1+conv9")
    with pytest.raises(NetworkError, match="conv1\\+conv2 are no neighbours"):
        one("conv1+conv2")
    with pytest.raises(NetworkError, match="pool1\\+conv1 are no neighbours"):
        one("pool1+conv1")


def test_by_default_every_step_is_a_problem() -> None:
    planner = Planner(network("alexnet"), ARITHMETIC["fp16"], 90)
    found = cut.problems(planner, "fp16", 64)
    assert [problem.name for problem in found] == [
        *("conv1", "pool1", "conv2", "pool2", "conv3", "conv4", "conv5", "pool5"),
        *("fc6", "fc7", "fc8"),
    ]
    assert [problem.reads_features for problem in found] == [False] * 8 + [True] * 3


def test_another_configuration_of_the_last_step_or_of_another() -> None:
    problem = one("conv2+pool2")
    conv, pool = (step.config for step in problem.plan.steps)
    assert isinstance(conv, Conv2dConfig)
    assert isinstance(pool, PoolConfig)
    assert cut.configured(problem, pool) == problem
    last = cut.configured(problem, replace(pool, num_warps=2))
    assert [step.config for step in last.plan.steps] == [conv, replace(pool, num_warps=2)]
    first = cut.configured(problem, replace(conv, num_warps=2), "conv2")
    assert [step.config for step in first.plan.steps] == [replace(conv, num_warps=2), pool]


# --- the whole network -----------------------------------------------------------------------


def test_layers_are_those_that_torch_must_compute_too() -> None:
    assert [name for name, _ in one("all", model="alexnet").layers] == [
        *("conv1", "relu1", "pool1", "conv2", "relu2", "pool2", "conv3", "relu3", "conv4"),
        *("relu4", "conv5", "relu5", "pool5", "flatten", "fc6", "relu6", "fc7", "relu7", "fc8"),
    ]


@pytest.mark.parametrize(("pixels", "size"), [(False, 4), (True, 1)])
def test_bytes_are_images_and_weights_and_logits_once(pixels: bool, size: int) -> None:
    planner = Planner(network("alexnet"), ARITHMETIC["fp32"], None)
    problem = cut.network_problem(planner, "fp32", 3, pixels)
    parameters = sum(map(math.prod, problem.network.parameter_shapes().values()))
    image = math.prod(problem.network.input_shape)
    assert problem.work.bytes == 3 * image * size + 4 * parameters + 4 * 3 * 1000


def test_pixels_are_normalised_by_the_yardstick(generator: torch.Generator) -> None:
    planner = Planner(network("digits"), ARITHMETIC["fp32"], None)
    problem = cut.network_problem(planner, "fp32", 2, pixels=True)
    given = cut.tensors(problem, "cpu", generator)
    assert given.x.dtype == torch.uint8
    mean, std = (
        torch.tensor(each, dtype=torch.float64)[:, None, None]
        for each in (problem.network.preprocess.mean, problem.network.preprocess.std)
    )
    same = cut.expected(one("all"), replace(given, x=(given.x / 255 - mean) / std))
    assert torch.allclose(cut.expected(problem, given), same)


def test_a_slip_in_the_first_layer_still_shows_in_the_logits(generator: torch.Generator) -> None:
    problem = one("all", 1, "fp16")
    given = cut.tensors(problem, "cpu", generator)
    first = next(name for name in given.state if name.endswith(".weight"))
    slipped = given.state | {first: 1.05 * given.state[first]}
    answer = cut.expected(problem, replace(given, state=slipped))
    assert not cut.match(problem, answer, cut.expected(problem, given)).passed


def test_copies_hold_the_same_numbers_elsewhere(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = SimpleNamespace(L2_cache_size=100)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    given = cut.tensors(one("conv2"), "cpu", generator)
    assert cut.rotation(given, 80, torch.device("cpu")) == [given]
    first, *copies = cut.rotation(given, 80, torch.device("cuda"))
    assert first is given
    assert len(copies) == 2
    for copy in copies:
        assert copy.x.is_contiguous(memory_format=torch.channels_last)
        pairs = [(given.x, copy.x)]
        pairs += [(given.state[name], copy.state[name]) for name in given.state]
        for one_tensor, other in pairs:
            assert torch.equal(one_tensor, other)
            assert one_tensor.data_ptr() != other.data_ptr()
