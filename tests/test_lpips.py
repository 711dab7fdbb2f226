"""LPIPS equals `lpips` 0.1.4 itself, with the same random AlexNet in both."""

from __future__ import annotations

import importlib
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from alexnet_triton import LPIPS, EngineError, ImageError, NetworkError, WeightsError
from alexnet_triton.engine.load import load_state
from alexnet_triton.engine.zoo import ALEXNET
from alexnet_triton.kernels import layout, lpips
from alexnet_triton.kernels.lpips import DistanceConfig, DistanceShape
from torch import Tensor, nn

Fenced = Callable[[Sequence[int], torch.dtype], Tensor]
Run = Callable[..., tuple[Tensor, Tensor]]
Close = Callable[..., None]
State = dict[str, Tensor]
Original = Callable[..., nn.Module]
Ours = Callable[..., LPIPS]


class AlexNet(nn.Module):
    """As much of torchvision's as `lpips` takes."""

    def __init__(self, pretrained: bool) -> None:
        super().__init__()
        assert not pretrained
        relu = partial(nn.ReLU, inplace=True)
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 64, 11, 4, 2), relu(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(64, 192, 5, 1, 2), relu(), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(192, 384, 3, 1, 1), relu()),
            *(nn.Conv2d(384, 256, 3, 1, 1), relu()),
            *(nn.Conv2d(256, 256, 3, 1, 1), relu(), nn.MaxPool2d(3, 2)),
        )


STAND_INS: dict[str, dict[str, Any]] = {
    "torchvision": {"models": SimpleNamespace(alexnet=AlexNet)},
    "scipy": {},
    "scipy.ndimage": {"zoom": None},
    "tqdm": {"tqdm": None},
}
"""What `lpips` imports, with what it looks up there."""


@pytest.fixture(scope="module")
def state() -> State:
    return load_state(ALEXNET, "random:0")[1]


@pytest.fixture(scope="module")
def original(state: State) -> Iterator[Original]:
    """`original(spatial=False)` is `lpips.LPIPS` on the same AlexNet, in float32 on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        for name, holds in STAND_INS.items():
            try:
                importlib.import_module(name)
            except (ImportError, RuntimeError):  # or it is there, beside another build of torch
                stand_in = ModuleType(name)
                vars(stand_in).update(holds)
                patch.setitem(sys.modules, name, stand_in)
        theirs = pytest.importorskip("lpips")

    def original(spatial: bool = False) -> nn.Module:
        net: nn.Module = theirs.LPIPS(pnet_rand=True, verbose=False, spatial=spatial)
        convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d) and m.bias is not None]
        for number, layer in enumerate(convolutions, 1):
            layer.load_state_dict({k: state[f"conv{number}.{k}"] for k in ("weight", "bias")})
        assert number == 5
        return net.requires_grad_(False)

    yield original
    for name in [name for name in sys.modules if name.partition(".")[0] == "lpips"]:
        del sys.modules[name]  # it holds stand-ins


@pytest.fixture(scope="module")
def ours(state: State, device: torch.device) -> Ours:
    """`ours(**options)` is LPIPS on it, in float32, two pairs at a time; loaded once."""
    return cache(partial(LPIPS, state, device, "fp32", max_batch=2))


def images(count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Noise of several sizes of grain from -1 to 1, float32 [count, 3, height, width]."""
    grains = (
        torch.rand(count, 3, -(-height // size), -(-width // size), generator=generator)
        for size in (1, 4, 16)
    )
    upsample = partial(nn.functional.interpolate, size=(height, width), mode="bilinear")
    return sum(map(upsample, grains), torch.zeros(())) / 1.5 - 1


# --- the kernel ------------------------------------------------------------------------------


def answer(
    fenced: Fenced, a: Tensor, b: Tensor, weight: Tensor, config: DistanceConfig
) -> tuple[Tensor, Tensor]:
    """The kernels' answers to [N, C, H, W]: of every pixel [N, H, W], and their means [N]."""
    n, c, height, width = a.shape
    laid = [fenced((height, width, n, c), x.dtype).copy_(layout.pack(x)) for x in (a, b)]
    heads = fenced((c,), torch.float32).copy_(weight)
    y, mean = fenced((height * width * n,), torch.float32), fenced((n,), torch.float32)
    shape = DistanceShape(n, c, height, width)
    lpips.distances(laid[0], laid[1], heads, y, shape, config)()
    lpips.means(y, mean, shape, config)()
    return y.reshape(height, width, n).permute(2, 0, 1).cpu(), mean.cpu()


def activations(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator).relu().to(dtype)


@pytest.mark.parametrize("channels", [1, 9, 64])
def test_pixels_and_means_equal_float64(
    channels: int, dtype: torch.dtype, run: Run, generator: torch.Generator, assert_close: Close
) -> None:
    """On tiles that end inside an image, and means of several blocks."""
    a, b = (activations((3, channels, 5, 7), dtype, generator) for _ in range(2))
    weight = torch.rand(channels, generator=generator)
    y, mean = run(a, b, weight, DistanceConfig(8, 16))
    wanted = lpips.reference(a, b, weight)
    scale = lpips.reference(a.abs(), -b.abs(), weight)  # what was added, before it cancels
    assert_close(y, wanted, torch.float32, channels, scale=scale)
    assert_close(mean, wanted.mean((1, 2)), torch.float32, channels, scale=scale.mean((1, 2)))


def test_pixels_of_zeros_and_near(run: Run, generator: torch.Generator) -> None:
    """Norms around the 1e-10 that is added to them, where it stands is seen."""
    a, b = (activations((8, 24, 3, 1), torch.float32, generator) for _ in range(2))
    sizes = torch.tensor([0, 0, 1e-14, 1e-11, 1e-10, 1e-9, 1e-6, 1e9])[:, None, None, None]
    a, b = a * sizes, b * sizes.roll(-1, 0)
    assert a[0].count_nonzero() == b[0].count_nonzero() == 0
    weight = torch.ones(24)
    y, _ = run(a, b, weight, DistanceConfig(16, 16))
    torch.testing.assert_close(y.double(), lpips.reference(a, b, weight), rtol=1e-5, atol=1e-12)
    assert y[0].count_nonzero() == 0


def test_a_nan_costs_its_own_pixel_and_pair(run: Run, generator: torch.Generator) -> None:
    a, b = (activations((3, 16, 2, 3), torch.float32, generator) for _ in range(2))
    a[1, 3, 1, 2] = torch.nan
    y, mean = run(a, b, torch.ones(16), DistanceConfig(8, 16))
    assert y.isnan().nonzero().tolist() == [[1, 1, 2]]
    assert mean.isnan().tolist() == [False, True, False]


def test_work() -> None:
    work = lpips.work(DistanceShape(2, 10, 3, 5), torch.float16)
    assert work.flops == 30 * 10 * 12
    assert work.bytes == 2 * 30 * 10 * 2 + 2 * 30 * 4  # a and b; y, written and read


# --- the whole -------------------------------------------------------------------------------


def test_pairs_of_any_size(original: Original, ours: Ours, request: pytest.FixtureRequest) -> None:
    """By torch's convolutions and by the engine's own; `--every-candidate`: 200 pairs and 12."""
    every, theirs = request.config.getoption("--every-candidate"), original()
    numbers, extremes = random.Random(0), {1: (31, 31), 2: (256, 341)}
    for backend, count in (("torch", 200 if every else 3), ("triton", 12 if every else 1)):
        mine = ours(backend=backend)
        for pair in range(count):
            sides = numbers.randint(31, 256), numbers.randint(31, 341)
            generator = torch.Generator().manual_seed(pair)
            a, b = images(2, *extremes.get(pair, sides), generator).split(1)
            if pair % 2:  # as often alike as not
                b = (0.9 * a + 0.1 * b).clamp(-1, 1)
            (got, parts), (wanted, layers) = mine(a, b, True), theirs(a, b, True)
            assert wanted.item() > 1e-4
            for our, their in zip([got, *parts], [wanted, *layers], strict=True):
                torch.testing.assert_close(our.cpu(), their, rtol=0, atol=1e-6)


@pytest.mark.parametrize("normalize", [False, True])
def test_a_distance_of_every_pixel(
    normalize: bool, original: Original, ours: Ours, generator: torch.Generator
) -> None:
    a, b = (images(2, 40, 61, generator) for _ in range(2))
    if normalize:
        a, b = (a + 1) / 2, (b + 1) / 2
    got, parts = ours(backend="torch", spatial=True)(a, b, retPerLayer=True, normalize=normalize)
    wanted, layers = original(spatial=True)(a, b, retPerLayer=True, normalize=normalize)
    assert got.shape == (2, 1, 40, 61)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(parts, layers, rtol=0, atol=1e-6)
    assert len(got.unique()) > 1000


def test_a_pair_has_one_distance(
    ours: Ours, original: Original, generator: torch.Generator
) -> None:
    """To the bit, in either order, also in the smaller last piece of a batch; equal images none."""
    x, y, z = images(3, 31, 33, generator).split(1)
    a, b = torch.cat([x, z, y]), torch.cat([y, z, x])
    got = ours(backend="triton")(a, b)
    assert got.shape == (3, 1, 1, 1)
    assert got[0] == got[2]
    assert got[1] == 0
    torch.testing.assert_close(got.cpu(), original()(a, b), rtol=0, atol=1e-6)


def test_a_card_by_target(original: Original, state: State, generator: torch.Generator) -> None:
    x, y, z, w = images(4, 31, 31, generator).split(1)
    a, b = torch.cat([x, z, z, y]), torch.cat([y, w, z, x])
    got = LPIPS(state, target="h200")(a, b)
    assert got[0] == got[3]
    assert got[2] == 0
    torch.testing.assert_close(got, original()(a, b), rtol=0, atol=1e-4)


def test_one_image_against_a_batch(
    ours: Ours, original: Original, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the original, which broadcasts, grey too; pieces are configured for the first's images."""
    mine = ours(backend="torch")
    many, one = images(5, 40, 44, generator), images(1, 40, 44, generator)
    told, running = [], mine._engine._running

    def listening(piece: Tensor, keep: tuple[str, ...], configured_for: int) -> Any:
        told.append((len(piece), configured_for))
        return running(piece, keep, configured_for)

    monkeypatch.setattr(mine._engine, "_running", listening)
    wanted = mine(many, one.expand(5, -1, -1, -1))
    for got in (mine(many, one), mine(one, many)):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)
    assert told == [(4, 4), (4, 4), (2, 4), *2 * [(3, 3), (3, 3), (2, 3)]]
    assert mine(one[:0], one[:0]).shape == (0, 1, 1, 1)
    grey = many[:, :1], one[:, 1:2]
    torch.testing.assert_close(mine(*grey).cpu(), original()(*grey), rtol=0, atol=1e-6)


def test_torchs_default_dtype_changes_nothing(
    ours: Ours, state: State, generator: torch.Generator
) -> None:
    a, b = (images(1, 40, 44, generator) for _ in range(2))
    wanted = ours(backend="torch")(a, b)
    torch.set_default_dtype(torch.float16)
    try:
        got = LPIPS(state, wanted.device, "fp32", backend="torch")(a, b)
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.dtype == torch.float32
    assert got.equal(wanted)


def test_only_what_is_measured_is_planned_and_packed(state: State) -> None:
    """And weights are any that an engine takes: here fine-tuned ones, under torchvision's names."""
    tuned = {**state, "fc8.weight": torch.zeros(7, 4096), "fc8.bias": torch.zeros(7)}
    ours = LPIPS(tuned, "cpu")
    assert ours._engine.plan.steps[-1].name == "conv5"
    assert ours._engine.memory.weights < 10e6
    with pytest.raises(WeightsError, match=r"fc6\.weight"):
        LPIPS({name: tensor for name, tensor in state.items() if name != "fc6.weight"}, "cpu")


def test_bad_input_is_one_line(ours: Ours, state: State, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = ours(backend="torch")
    good = torch.zeros(2, 3, 32, 40)
    for bad, words in (
        (good.byte(), r"in1: wanted floats from -1 to 1, got uint8.*127\.5 - 1"),
        (good[:, :, 1:], r"in1: wanted \[2, 3, 32, 40\].*got \[2, 3, 31, 40\]"),
        (torch.cat([good, good]), r"in1: wanted \[2, 3, 32, 40\].*got \[4, 3, 32, 40\]"),
        (good[:, :2], r"in1: .*wanted shape \[N, 3, H, W\]"),
        (torch.zeros_like(good, requires_grad=True), "in1: .*requires grad.*inference_mode"),
        ("no.jpg", r"in1: no\.jpg"),
        (None, "in1: .*NoneType"),
    ):
        with pytest.raises(ImageError, match=words) as refusal:
            mine(good, bad)  # type: ignore[arg-type]
        assert "\n" not in str(refusal.value)
    with pytest.raises(NetworkError, match="from 31x31 fit"):
        mine(good[:, :, :30], good[:, :, :30])
    for wrong in ({"spatial": "yes"}, {"max_batch": 0}, {"dtype": "int8"}):
        with pytest.raises(EngineError, match=next(iter(wrong))):
            LPIPS(state, **wrong)
    there = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: there + 1)
    with pytest.raises(EngineError, match="fork"):
        mine(good, good)
