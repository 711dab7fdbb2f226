"""What every test takes: the device, fresh random numbers, fences, and one measure of closeness.

`assert_close(actual, reference, dtype, reduction, precision="ieee", scale=None)` compares a result
with its float64 reference on the same inputs, which were rounded to `dtype` before both. Its bound
is derived, not tuned: see `_unit`.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from alexnet_triton.engine.spec import (
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
    Network,
    Preprocess,
    ReLU,
    Shape,
    Sigmoid,
    Softmax,
)
from alexnet_triton.kernels.jit import interpreter_problem
from hypothesis import settings
from torch import nn

settings.register_profile(
    "suite", deadline=None, max_examples=40, derandomize="CI" in os.environ, print_blob=True
)
settings.load_profile("suite")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`make codegen` asks for more than a sample."""
    told = "compile, and race, all that tests/test_codegen.py and test_race.py know, not a sample"
    parser.addoption("--every-candidate", action="store_true", help=told)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none, and the interpreter where it cannot run."""
    problem = interpreter_problem()
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("interpreter") and problem:
            item.add_marker(pytest.mark.skip(reason=problem))


LEDGER = {"doors by target": 3.0, "core types": 1.5, "all else": 7.5}
"""Minutes that the suite may take on two cores; CONTRIBUTING.md has it too."""


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """What each entry of the ledger took: told and not judged, since machines differ."""
    workers = getattr(config.option, "numprocesses", None) or 1
    spent = dict.fromkeys(LEDGER, 0.0)
    for report in itertools.chain.from_iterable(terminalreporter.stats.values()):
        if isinstance(report, pytest.TestReport):
            file = report.nodeid.partition("::")[0].rpartition("/")[2]
            entry = {"test_target.py": "doors by target", "test_core_types.py": "core types"}
            spent[entry.get(file, "all else")] += report.duration / workers / 60
    told = (f"{name} {spent[name]:.1f} of {least:g}" for name, least in LEDGER.items())
    terminalreporter.write_line(f"minutes on {workers} workers: {', '.join(told)}")


@pytest.fixture(params=["jsonl", "parquet"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Where a job is to write, alone in its folder, in either format."""
    if request.param == "parquet":
        pytest.importorskip("pyarrow")
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / f"rows.{request.param}"


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU where there is one, so that kernels compile; else the CPU, which interprets them."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def generator() -> torch.Generator:
    """Random numbers on the CPU, the same on every machine and in any order of tests."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def arch(device: torch.device) -> int | None:
    """What a `default_config` wants to know: the compute capability (90), None to interpret."""
    if device.type == "cpu":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@pytest.fixture
def fenced(
    device: torch.device,
) -> Iterator[Callable[[Sequence[int], torch.dtype], torch.Tensor]]:
    """`fenced(shape, dtype)` makes a tensor of NaN between two fences of infinity.

    Its last dimension is padded as `kernels.layout` pads channels, with NaN too, so that whatever a
    kernel reads or leaves unwritten where it should not shows. At the end the fences must stand.
    """
    fence = 512  # elements: a multiple of every alignment, and longer than a row of these tests
    buffers = []

    def make(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        pitch = -(-shape[-1] // 8) * 8
        size = math.prod(shape[:-1]) * pitch
        buffer = torch.full((size + 2 * fence,), torch.inf, dtype=dtype, device=device)
        buffers.append(buffer)
        field: torch.Tensor = buffer[fence:-fence].fill_(torch.nan).view(*shape[:-1], pitch)
        return field[..., : shape[-1]]

    yield make
    for buffer in buffers:
        ends = torch.cat([buffer[:fence], buffer[-fence:]])
        assert ends.eq(torch.inf).all(), "a kernel wrote outside its tensor"


@pytest.fixture
def run(
    request: pytest.FixtureRequest, fenced: Callable[[Sequence[int], torch.dtype], torch.Tensor]
) -> Callable[..., torch.Tensor]:
    """The kernel's `answer`, as the test's file defines it, to operands between fences."""
    return partial(request.module.answer, fenced)


@pytest.fixture(
    params=[
        torch.float32,
        torch.float16,
        pytest.param(torch.bfloat16, marks=pytest.mark.gpu),  # the interpreter truncates it
    ],
    ids=str,
)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """What kernels compute in, each in turn."""
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def tiny2012() -> Network:
    """Two towers with few pixels, for what compares bits under one BLAS after another."""
    layers = (
        ("conv1", Conv2d(16, 11, stride=4)),
        ("relu1", ReLU()),
        ("norm1", LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0, groups=2)),
        ("conv2", Conv2d(72, 3, padding=1, groups=2)),
        ("relu2", ReLU()),
        ("conv3", Conv2d(40, 1)),
        ("relu3", ReLU()),
        ("flatten", Flatten()),
        ("fc6", Linear(72)),
        ("relu6", ReLU()),
        ("fc7", Linear(40)),
    )
    preset = Preprocess(15, 15, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
    return Network("tiny2012", (3, 15, 15), layers, preset, "")


@pytest.fixture(scope="session")
def module() -> Callable[[Layer, Shape], nn.Module]:
    """`module(layer, shape)`: torch's own module for a layer that receives this shape."""
    return _module


@pytest.fixture(scope="session")
def twin() -> Callable[[Network, dict[str, torch.Tensor]], nn.Sequential]:
    """`twin(network, state)`: the network in torch's modules with these weights, evaluating."""

    def twin(net: Network, state: dict[str, torch.Tensor]) -> nn.Sequential:
        model = nn.Sequential()
        for name, layer, shape, _ in net.walk():
            model.add_module(name, _module(layer, shape))
        missing, extra = model.load_state_dict(state, strict=False)
        assert all(name.endswith("num_batches_tracked") for name in missing)
        assert extra == []
        return model.eval()

    return twin


class _Towers(nn.Module):
    """A module without weights on each tower by itself."""

    def __init__(self, inner: nn.Module, towers: int) -> None:
        super().__init__()
        self.inner, self.towers = inner, towers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.inner(part) for part in x.chunk(self.towers, 1)], 1)


def _module(layer: Layer, shape: Shape) -> nn.Module:
    match layer:
        case Conv2d(channels, kernel, stride, padding, dilation, groups):
            return nn.Conv2d(shape[0], channels, kernel, stride, padding, dilation, groups)
        case Linear(features):
            return nn.Linear(shape[0], features)
        case MaxPool2d(kernel, stride, padding, ceil_mode):
            return nn.MaxPool2d(kernel, stride, padding, ceil_mode=ceil_mode)
        case AvgPool2d(kernel, stride, padding, ceil_mode, counted):
            return nn.AvgPool2d(kernel, stride, padding, ceil_mode, counted)
        case AdaptiveAvgPool2d(size):
            return nn.AdaptiveAvgPool2d(size)
        case BatchNorm2d(eps):
            return nn.BatchNorm2d(shape[0], eps)
        case LocalResponseNorm(size, alpha, beta, k, 1):
            return nn.LocalResponseNorm(size, alpha, beta, k)
        case LocalResponseNorm(size, alpha, beta, k, groups):
            return _Towers(nn.LocalResponseNorm(size, alpha, beta, k), groups)
        case Dropout(p):
            return nn.Dropout(p)
        case Softmax():
            return nn.Softmax(1)
        case ReLU() | Sigmoid() | Flatten():
            return getattr(nn, type(layer).__name__)()  # type: ignore[no-any-return]
    raise AssertionError(f"torch has no module for {layer}")


@pytest.fixture(scope="session")
def narrowed() -> Callable[[Network], Network]:
    """`narrowed(network)`: the same layers at a sixteenth of the width, every shape its own."""

    def thin(layer: Layer) -> Layer:
        if isinstance(layer, Conv2d):
            return replace(layer, out_channels=layer.out_channels // 16)
        if isinstance(layer, Linear):
            return replace(layer, out_features=max(1, layer.out_features // 16))
        return layer

    return lambda net: replace(net, layers=tuple((name, thin(each)) for name, each in net.layers))


@pytest.fixture(scope="session")
def assert_close() -> Callable[..., None]:
    """`assert_close(actual, reference, dtype, reduction, precision="ieee", scale=None)`."""
    return _assert_close


def _unit(size: torch.Tensor, dtype: torch.dtype, reduction: int, precision: str) -> torch.Tensor:
    """The error that one correctly computed number of magnitude `size` is worth.

    Half a unit in the last place for rounding the result to `dtype`; and for a sum of `reduction`
    products kept in float32, where each step adds half a unit of float32 with a random sign, the
    square root of as many. TF32 keeps 10 bits of each factor, so there a step costs a unit of that.
    """
    result = torch.finfo(dtype)
    step = 2.0**-10 if precision == "tf32" and dtype == torch.float32 else 2.0**-23
    relative = 0.5 * result.eps + 0.5 * step * math.sqrt(1 + reduction)
    return relative * size + result.tiny * result.eps


def _assert_close(
    actual: torch.Tensor,
    reference: torch.Tensor,
    dtype: torch.dtype,
    reduction: int,
    precision: str = "ieee",
    scale: torch.Tensor | float | None = None,
) -> None:
    """`actual` has the shape of the float64 `reference`, its NaNs and infinities, and its numbers.

    No error exceeds 4 units, nor their root mean square 1 (see `_unit`). `dtype` is what inputs and
    result are rounded to and `reduction` how many products are summed. `scale` is the magnitude of
    the numbers that were added: the same operation on absolute values is exact and the best choice,
    since sums cancel; without it the largest number of the reference stands for all.
    """
    assert actual.shape == reference.shape, f"{tuple(actual.shape)}, not {tuple(reference.shape)}"
    a, r = actual.detach().double().cpu(), reference.detach().double().cpu()
    odd = ~r.isfinite()
    same = torch.where(odd, (a == r) | (a.isnan() & r.isnan()), a.isfinite())
    assert same.all(), _where(~same, a, r, "wrong NaN or infinity")
    if not (~odd).any():
        return
    a, r = a.masked_fill(odd, 0), r.masked_fill(odd, 0)
    size = r.abs().max() if scale is None else torch.as_tensor(scale).double().cpu()
    size = torch.maximum(size, r.abs()).nan_to_num(0, 0, 0)
    errors = (a - r).abs() / _unit(size, dtype, reduction, precision)
    worst = errors.max().item()
    assert worst <= 4, _where(errors > 4, a, r, f"an error of {worst:.3g} units, 4 allowed")
    rms = errors[~odd].square().mean().sqrt().item()
    assert rms <= 1, f"root mean square error is {rms:.3g} units, 1 allowed"


def _where(bad: torch.Tensor, actual: torch.Tensor, reference: torch.Tensor, what: str) -> str:
    first = tuple(bad.nonzero()[0].tolist())
    return (
        f"{what}: {int(bad.sum())} of {bad.numel()}, first at {first}: "
        f"got {actual[first].item():.9g}, wanted {reference[first].item():.9g}"
    )
