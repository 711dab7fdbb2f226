"""torch.compile with the engine as its backend: the engine's own logits, whatever happens to it."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import alexnet_triton
import pytest
import torch
from alexnet_triton.engine import Engine, EngineError, dynamo
from alexnet_triton.engine.devices import single
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

IMAGE = (3, 9, 9)


def small() -> Any:
    """Every kind of layer with weights, on few pixels."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()),
        *(nn.Dropout(), nn.Linear(32, 5)),
    ).eval()


def compiled_of(model: nn.Module, backend: Any = alexnet_triton.backend) -> Any:
    return torch.compile(model, backend=backend)


def images(count: int) -> torch.Tensor:
    return torch.randn(count, *IMAGE, generator=torch.Generator().manual_seed(count))


@pytest.fixture(autouse=True)
def compiler() -> Iterator[None]:
    """Each test compiles for itself."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What was packed since, one entry a time."""
    times: list[object] = []
    pack = getattr(single, "pack")  # noqa: B009

    def counted(*args: Any) -> Any:
        times.append(args)
        return pack(*args)

    monkeypatch.setattr(single, "pack", counted)
    return times


def own(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The engine's logits of the weights that there are now."""
    return Engine.load(model, input_shape=IMAGE, device="cpu")(x)


@pytest.mark.interpreter
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_logits_are_the_engines_own(
    mode: Callable[[], Any], packed: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    """At any batch size, and after weights were changed in place or replaced."""
    model = small()
    compiled = compiled_of(model)
    with mode():
        for count in (2, 3, 5, 1, 2):
            x = images(count)
            got = compiled(x)
            assert got.dtype == torch.float32
            torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-5)
            assert len(packed) == 1
        model[8].weight.mul_(2)
        changed = compiled(x)
        assert not torch.equal(changed, got)
        model[0].weight = nn.Parameter(model[0].weight * 3)
        model[8].bias = nn.Parameter(torch.ones(5))
        replaced = compiled(x)
        assert not torch.equal(replaced, changed)
        model[4].running_mean.add_(1)
        moved = compiled(x)
        assert len(packed) == 4
        assert torch.equal(moved, own(model, x))
        model[4].running_mean.sub_(1)
        assert torch.equal(compiled(x), own(model, x))


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "other",
    [
        lambda x, a, b, m: F.conv2d(F.conv2d(F.conv2d(x, a), b), b).flatten(1) @ m,
        lambda x, a, b, m: F.conv2d(F.conv2d(F.conv2d(x, a), b), a).flatten(1) @ m.t(),
    ],
)
def test_the_same_weights_may_be_used_otherwise(other: Callable[..., torch.Tensor]) -> None:
    """Equal layers on the same tensors, which are two networks all the same."""

    def one(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.conv2d(F.conv2d(x, a), b), a).flatten(1) @ m

    torch.manual_seed(0)
    given = (images(2), *(torch.randn(3, 3, 3, 3) / 5 for _ in "ab"), torch.randn(27, 27) / 5)
    with torch.no_grad():
        for function in (one, other):
            got = torch.compile(function, backend=alexnet_triton.backend)(*given)
            torch.testing.assert_close(got, function(*given), rtol=1e-4, atol=1e-4)


@pytest.mark.interpreter
def test_what_a_weight_is_computed_from_is_noticed() -> None:
    model, x = small(), images(2)
    weight_norm(model[0])
    compiled = compiled_of(model)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
        model[0].parametrizations.weight.original0.mul_(2)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_mode_is_refused() -> None:
    compiled: Any = torch.compile(small(), backend=alexnet_triton.backend, mode="max-autotune")
    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match=r"EngineError: .*mode"):
        compiled(images(2))


@pytest.mark.interpreter
def test_what_cannot_be_noticed_is_noticed_after_a_reset() -> None:
    model, x = small(), images(2)
    compiled = compiled_of(model)
    with torch.inference_mode():
        before = compiled(x)
        model[8].bias.data.add_(1)
        assert torch.equal(compiled(x), before)
        torch.compiler.reset()
        assert torch.equal(compiled(x), own(model, x))


@pytest.mark.interpreter
def test_a_marked_batch_is_compiled_once(packed: list[object]) -> None:
    graphs: list[object] = []

    def counted(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return dynamo.backend(graph, inputs)

    model = small().half()
    compiled = compiled_of(model, counted)
    with torch.no_grad():
        for count in (2, 4):
            x = images(count).half()
            torch._dynamo.mark_dynamic(x, 0)
            got = compiled(x)
            assert got.dtype == torch.float16
            engine = Engine.load(model, input_shape=IMAGE, device="cpu", dtype="fp16")
            assert torch.equal(got, engine(x).half())
    assert len(graphs) == 1
    assert len(packed) == 3


@pytest.mark.interpreter
def test_a_call_that_needs_a_gradient_is_refused() -> None:
    compiled = compiled_of(small())
    with pytest.raises(EngineError, match="inference_mode"):
        compiled(images(2))
    with (
        torch.no_grad(),
        torch.autocast("cpu"),
        pytest.raises(Exception, match=r"autocast|aten"),
    ):
        compiled(images(2))
    frozen = small().requires_grad_(False)
    assert compiled_of(frozen)(images(2)).shape == (2, 5)


class Skip(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.conv(x)
        return y + x


REFUSED = {
    "operator": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU()), r"gelu.*not supported"),
    "branch": (Skip(), "branch"),
    "training": (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout()).train(), "train"),
    "no weights": (nn.MaxPool2d(2), "weights"),
    "bf16": (nn.Conv2d(3, 4, 3).bfloat16(), "bf16 on a CPU"),
    "fp64": (nn.Conv2d(3, 4, 3).double(), "float64"),
    "channels": (nn.Conv2d(4, 4, 3), "RGB"),
    "features": (nn.Linear(9, 3), r"\[N, C, H, W\]"),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("what", REFUSED)
def test_no_other_backend_is_taken_behind_ones_back(what: str) -> None:
    """One line, which torch quotes."""
    model, words = REFUSED[what]
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    x = torch.zeros(2, 9) if what == "features" else torch.zeros(2, 3, 9, 9)
    x = torch.zeros(2, 4, 9, 9) if what == "channels" else x
    compiled = compiled_of(model)
    with (
        torch.no_grad(),
        pytest.raises(BackendCompilerFailed, match=f"(Engine|Network)Error: .*{words}"),
    ):
        compiled(x.to(dtype))


@pytest.mark.interpreter
def test_an_installed_package_is_a_name_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the entry point that pyproject.toml declares."""
    from torch._dynamo.backends import registry

    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    group = "torch_dynamo_backends"
    ((name, target),) = tomllib.loads(text)["project"]["entry-points"][group].items()
    monkeypatch.setitem(registry._BACKENDS, name, EntryPoint(name, target, group))
    monkeypatch.setattr(registry, "_COMPILER_FNS", dict(registry._COMPILER_FNS))
    model, x = small(), images(2)
    with torch.inference_mode():
        got = compiled_of(model, "alexnet_triton")(x)
    assert torch.equal(got, own(model, x))
    assert EntryPoint(name, target, group).load() is alexnet_triton.backend
