"""The candidates that ship: right on the layers of AlexNet, within the bounds that they state."""

from __future__ import annotations

import pytest
import torch
from alexnet_triton.bench.inspect.compiled import compile_for
from alexnet_triton.bench.measure.problem import Match, Problem, problems, tensors
from alexnet_triton.bench.race import proof
from alexnet_triton.bench.race.candidate import Candidate, Declined, load, locate, pose
from alexnet_triton.bench.race.candidates import shipped
from alexnet_triton.engine.devices.planner import Planner
from alexnet_triton.engine.plan import ARITHMETIC
from alexnet_triton.engine.zoo import network
from alexnet_triton.kernels.jit import Launch, architecture

CONVOLVE = ("im2col", "winograd")


def find(model: str, layer: str, arch: int | None, batch: int = 1, dtype: str = "fp32") -> Problem:
    planner = Planner(network(model), ARITHMETIC[dtype], arch)
    return problems(planner, dtype, batch, [layer])[0]


def named(name: str) -> Candidate:
    return load(locate(name))


def answer(candidate: Candidate, problem: Problem, device: torch.device) -> Match:
    """The match of one answer, made with NaN around every tensor."""
    config = candidate.configs(pose(problem))[0]
    given = proof.case(problem, device, 0, candidate.layout)
    return proof.compare(
        candidate.tolerance, problem, given.answer(candidate, config, proof.NAN), given.right
    )


@pytest.mark.parametrize("layer", ["conv1", "conv2", "conv3", "conv4", "conv5"])
@pytest.mark.parametrize("name", CONVOLVE)
def test_they_agree_with_float64(name: str, layer: str, device: torch.device) -> None:
    candidate, problem = named(name), find("alexnet", layer, architecture(device))
    if name == "winograd" and layer in ("conv1", "conv2"):
        with pytest.raises(Declined, match="wants 3x3 filters at stride 1"):
            candidate.configs(pose(problem))
        return
    assert answer(candidate, problem, device).passed


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("layer", ["conv2", "conv3"])
@pytest.mark.parametrize("name", CONVOLVE)
def test_several_images_in_any_dtype(
    name: str, layer: str, dtype: str, device: torch.device
) -> None:
    """Odd sizes and more than one image, and the whole proof: guards, poison, other seeds."""
    candidate = named(name)
    problem = find("digits", layer, architecture(device), batch=5, dtype=dtype)
    if name == "winograd" and layer == "conv2":
        return  # refused, as above
    config = candidate.configs(pose(problem))[0]
    first = proof.case(problem, device, 0, candidate.layout)
    seen = proof.examine(candidate, config, first)
    assert proof.confirm(candidate, config, seen, first, 0).passed


@pytest.mark.parametrize("name", CONVOLVE)
def test_groups(name: str, device: torch.device) -> None:
    """Winograd takes one group alone."""
    candidate, problem = named(name), find("alexnet2012", "conv4", architecture(device))
    if name == "im2col":
        assert answer(candidate, problem, device).passed
    else:
        with pytest.raises(Declined, match="one group"):
            answer(candidate, problem, device)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("layer", ["fc6", "fc8"])
def test_linear_layers(layer: str, dtype: str, device: torch.device) -> None:
    problem = find("digits", layer, architecture(device), 1, dtype)
    assert answer(named("matrix_vector"), problem, device).passed


def test_a_vector_is_one_image(device: torch.device) -> None:
    with pytest.raises(Declined, match="wants one image, got 3"):
        named("matrix_vector").configs(pose(find("digits", "fc6", architecture(device), 3)))


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("name", "layer", "batch"),
    [
        ("im2col", "conv1", 64),
        ("winograd", "conv3", 64),
        ("matrix_vector", "fc7", 1),
    ],
)
def test_they_compile_for_a_gpu(
    name: str, layer: str, batch: int, arch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest tiles fit, spill nothing, and use the matrix instructions where they should."""
    launches: list[Launch] = []
    monkeypatch.setattr(Launch, "__call__", lambda launch: launches.append(launch))
    candidate, problem = named(name), find("alexnet", layer, arch, batch, "fp16")
    posed = pose(problem)
    inputs, out = proof.arrange(tensors(problem, "cpu"), posed, candidate.layout)
    *_, config = candidate.configs(posed)
    weight = candidate.prepare(posed, inputs["weight"], config)
    candidate.run(posed, inputs["x"], weight, inputs["bias"], out, config)
    assert launches
    binaries = [compile_for(launch, arch) for launch in launches]
    assert all(binary.spills == binary.excess == 0 for binary in binaries)
    product = {80: "HMMA", 90: "HGMMA"}[arch]
    multiplies = any(binary.instructions[product] > 0 for binary in binaries)
    assert multiplies is (name != "matrix_vector")


def test_every_candidate_that_ships_is_tested() -> None:
    assert set(shipped()) == {*CONVOLVE, "matrix_vector"}
