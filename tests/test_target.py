"""Every door of the engine as a card would go through it: the card's plan, interpreted.

The interpreter pays for each program and each step of its loop, whatever the channels, so these
networks have few pixels and yet two blocks and a ragged one of filters, of channels and, at some of
the batches, of rows. CONTRIBUTING.md's ledger gives this file three minutes on two cores.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from alexnet_triton import Engine, EngineError, NetworkError, Prediction
from alexnet_triton.bench.__main__ import main as bench
from alexnet_triton.bench.records import load as load_results
from alexnet_triton.engine import foretell, reference
from alexnet_triton.engine.__main__ import main
from alexnet_triton.engine.bind import bind, pack
from alexnet_triton.engine.demo import demo
from alexnet_triton.engine.devices.cards import GPUS
from alexnet_triton.engine.devices.graph import Recording
from alexnet_triton.engine.devices.single import Single
from alexnet_triton.engine.devices.towers import half
from alexnet_triton.engine.load import aim
from alexnet_triton.engine.plan import ARITHMETIC, Options, plan
from alexnet_triton.engine.spec import (
    AdaptiveAvgPool2d,
    BatchNorm2d,
    Conv2d,
    Flatten,
    Layer,
    Linear,
    LocalResponseNorm,
    MaxPool2d,
    Network,
    Preprocess,
    ReLU,
    Softmax,
)
from alexnet_triton.engine.summary import summarise
from alexnet_triton.engine.verify import verify
from alexnet_triton.engine.zoo import ALEXNET, DIGITS
from alexnet_triton.engine.zoo import network as zoo
from alexnet_triton.kernels import tuning
from alexnet_triton.kernels.conv import Conv2dConfig, Conv2dShape
from alexnet_triton.kernels.first_layer import FirstLayerConfig
from alexnet_triton.kernels.jit import Launch, architecture
from alexnet_triton.kernels.tuning import TunedRow, without_batch
from alexnet_triton.weights import load
from alexnet_triton.weights.digits import heldout

pytestmark = pytest.mark.interpreter

CPU = torch.device("cpu")
# Of the whole chain, relative to its largest number. TF32 cuts both factors of a product off: each
# of the six products of the chain loses about 2^-10, and all in the same direction.
BOUNDS = {"fp32": 2e-6, "tf32": 1e-2, "fp16": 4e-3}


def chain(
    name: str, convs: tuple[int, int, int, int], units: int, groups: int, *before: Layer
) -> Network:
    """An AlexNet in small: conv1 makes 3x3, the maps after it are 2x2, from conv3 on 1x1."""
    after_relu1 = tuple((f"extra{i}", layer) for i, layer in enumerate(before, start=1))
    layers: tuple[tuple[str, Layer], ...] = (
        *(("conv1", Conv2d(convs[0], 11, stride=4, padding=2)), ("relu1", ReLU())),
        *after_relu1,
        ("pool1", MaxPool2d(2, stride=1)),
        *(("conv2", Conv2d(convs[1], 3, padding=1, groups=groups)), ("relu2", ReLU())),
        *(("conv3", Conv2d(convs[2], 2)), ("relu3", ReLU())),
        *(("conv4", Conv2d(convs[3], 1, groups=groups)), ("relu4", ReLU())),
        *(("avgpool", AdaptiveAvgPool2d(2)), ("flatten", Flatten())),
        *(("fc6", Linear(units)), ("relu6", ReLU())),
        *(("fc7", Linear(units // 2 + 4)), ("relu7", ReLU()), ("fc8", Linear(10))),
    )
    if groups > 1:
        layers += (("softmax", Softmax()),)
    preset = Preprocess(15, 15, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
    return Network(name, (3, 15, 15), layers, preset, "digits.txt")


# Blocks on tensor cores are 64 to 256 filters by 32 or 64 channels, plain products' 32 by 16.
NORM = LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0, groups=2)
WIDE = chain("wide", (40, 136, 192, 256), 264, 1, BatchNorm2d())
TOWERS = chain("towers", (48, 272, 384, 272), 264, 2, NORM)
NETWORKS = {
    ("fp16", 0): WIDE,
    ("fp16", 1): TOWERS,
    ("tf32", 0): WIDE,
    ("tf32", 1): TOWERS,
    ("fp32", 0): chain("wide_ieee", (40, 72, 40, 72), 72, 1, BatchNorm2d()),
    ("fp32", 1): chain("towers_ieee", (48, 144, 40, 144), 72, 2, NORM),
}


def state_of(network: Network) -> dict[str, torch.Tensor]:
    return load("random:3", network.parameter_shapes(), network=network.name)


def pixels(network: Network, n: int, seed: int = 0) -> torch.Tensor:
    shape, generator = (n, *network.input_shape), torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def float64(network: Network, images: torch.Tensor) -> dict[str, torch.Tensor]:
    wide = {name: tensor.double() for name, tensor in state_of(network).items()}
    x = reference.normalise(images, network.preprocess, torch.float64)
    return reference.forward(network, wide, x)


def error(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    assert actual.shape == wanted.shape
    assert actual.dtype == torch.float32
    return ((actual.double() - wanted).abs().max() / wanted.abs().max()).item()


def on_card(network: Network = WIDE, **settings: object) -> Engine:
    settings = {"target": "sm_90", "max_batch": 64, **settings}
    return Engine.load(network, state_of(network), **settings)  # type: ignore[arg-type]


Tiles = tuple[object, ...]


def tiles(launch: Launch) -> Tiles:
    """What a card's configuration decides of a launch."""
    blocks = sorted((k, v) for k, v in launch.arguments.items() if "BLOCK" in k or k == "SPLIT_K")
    return launch.kernel.__name__, *blocks, launch.num_warps, launch.num_stages


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> set[Tiles]:
    """All that was launched, so that no door can leave the target out."""
    seen: set[Tiles] = set()
    call = Launch.__call__

    def spy(launch: Launch) -> None:
        seen.add(tiles(launch))
        call(launch)

    monkeypatch.setattr(Launch, "__call__", spy)
    monkeypatch.setattr(foretell, "_spent", lambda launch, programs: 0.0)  # it runs launches, too
    return seen


def wanted_of(
    network: Network, *pieces: int, dtype: str = "fp16", arch: int | None = 90, **settings: Any
) -> set[Tiles]:
    """What a card launches for pieces of a batch of so many images."""
    found: set[Tiles] = set()
    shapes = network.parameter_shapes().items()
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes}
    for n in pieces:
        how = {"configured_for": max(pieces), **settings}
        planned = plan(network, n, ARITHMETIC[dtype], arch, **how)
        bound = bind(planned, pack(network, state, planned.arithmetic, "meta"))
        images = torch.empty((n, *network.input_shape), dtype=torch.uint8, device="meta")
        found |= {tiles(launch) for launch in bound.every_launch(images)}
    return found


# --- engine(x): every batch by every card -------------------------------------------------------

BATCHES = (0, 1, 8, 3, 64, 257, 130)  # in this order every dtype meets all kinds of tiles
TARGETS = (None, "sm_80", "sm_90", "sm_100")
DTYPES = ("fp16", "tf32", "fp32")
# Every batch meets every card; so do any two of batch, card, dtype and kind of network.
MEETINGS = [
    (batch, target, DTYPES[(i + j) % 3], (i // 2 + j) % 2)
    for i, batch in enumerate(BATCHES)
    for j, target in enumerate(TARGETS)
]


def test_the_meetings_are_pairwise_at_least() -> None:
    kinds = (BATCHES, TARGETS, DTYPES, (0, 1))
    for i, one in enumerate(kinds):
        for j, other in enumerate(kinds[:i]):
            assert len({(m[i], m[j]) for m in MEETINGS}) == len(one) * len(other), (i, j)


@pytest.mark.parametrize(("batch", "target", "dtype", "kind"), MEETINGS)
def test_logits(
    batch: int, target: str | None, dtype: str, kind: int, launched: set[Tiles]
) -> None:
    network = NETWORKS[dtype, kind]
    images = pixels(network, batch)
    state = state_of(network)
    logits = Engine.load(network, state, device="cpu", dtype=dtype, target=target)(images)
    assert logits.shape == (batch, 10)
    if batch:
        assert error(logits, float64(network, images)["softmax" if kind else "fc8"]) < BOUNDS[dtype]
        arch = aim(target, CPU).arch
        pieces = [min(256, batch - start) for start in range(0, batch, 256)]
        assert launched == wanted_of(network, *pieces, dtype=dtype, arch=arch)


def test_tiles_have_two_blocks_and_a_ragged_one() -> None:
    """What this file's networks are for, read off their plans; (.., False): one and a ragged one.

    Tiles of the rows tiling start anew with each output row. Those of pixels are for few images,
    and for any number where that must not matter.
    """
    seen = set()
    meetings = (m for m in MEETINGS if m[0] and m[1])
    for (batch, target, dtype, kind), same in itertools.product(meetings, (False, True)):
        network, arch = NETWORKS[dtype, kind], aim(target, CPU).arch
        planned = plan(network, batch, ARITHMETIC[dtype], arch, batch_invariant=same)
        for step in planned.steps:
            if isinstance(step.shape, Conv2dShape) and isinstance(step.config, Conv2dConfig):
                shape, config = step.shape, step.config
                rows = shape.OW * shape.N
                if config.tiling == "pixels":
                    rows *= shape.OH
                for which, size, block in (
                    ("M", rows, config.BLOCK_M + config.BLOCK_M2),
                    ("N", shape.OC // shape.groups, config.BLOCK_N + config.BLOCK_N2),
                    ("K", shape.C // shape.groups, config.BLOCK_K),
                ):
                    if size > block and size % block:
                        seen.add((which, config.tiling, dtype, size > 2 * block))
    for dtype in DTYPES:
        for which in "NK":
            assert (which, "rows", dtype, True) in seen, (which, dtype)
            assert (which, "pixels", dtype, True) in seen, (which, dtype)
        assert ("M", "pixels", dtype, True) in seen
        assert ("M", "rows", dtype, True) in seen


@pytest.mark.parametrize(
    ("name", "batch", "size"),
    [
        ("alexnet", 8, (63, 91)),
        ("alexnet2012", 1, None),
        ("alexnet_single_tower", 1, None),
        ("alexnet_keras_bn", 1, None),
    ],
)
def test_the_networks_at_a_sixteenth_of_their_width(
    name: str,
    batch: int,
    size: tuple[int, int] | None,
    narrowed: Callable[[Network], Network],
) -> None:
    """Every layer with its own pixels, filter, stride, padding and groups."""
    network = narrowed(zoo(name))
    if size:
        network = replace(network, input_shape=(3, *size))
    images = pixels(network, batch)
    *_, wanted = float64(network, images).values()
    names = [str(i) for i in range(max(2, wanted.shape[1]))]  # one number is of two classes
    logits = on_card(network, max_batch=batch, classes=names)(images)
    assert error(logits, wanted) < BOUNDS["fp16"]


@pytest.mark.parametrize(
    ("target", "batch", "form", "copied"),
    [
        ("sm_80", 3, "pointers", False),
        ("sm_90", 1, "rows", False),
        ("sm_90", 3, "images", False),
        ("sm_90", 3, "images", True),
    ],
)
def test_images_read_in_place(
    target: str, batch: int, form: str, copied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a copy that the graph reads, or where the caller has them."""
    monkeypatch.setattr("alexnet_triton.engine.devices.graph.COPIED", 2**30 if copied else 0)
    network = replace(WIDE, input_shape=(3, 16, 16))  # rows of 96 bytes
    floats = reference.normalise(pixels(network, batch), network.preprocess, torch.float64).half()
    wanted = float64(network, floats)["fc8"]
    images = floats.contiguous(memory_format=torch.channels_last)
    engine = on_card(network, target=target, max_batch=batch)
    for _ in range(2):  # the second finds everything bound
        assert error(engine(images), wanted) < BOUNDS["fp16"]
    assert torch.equal(images, floats), "the caller's images are the caller's"
    assert isinstance(engine._runner, Single)
    (call,) = engine._runner._ready.values()
    assert isinstance(call.launches, Recording)
    assert call.launches.bound.plan.steps[0].kernel == f"in_place {form}"
    assert error(engine(floats), wanted) < BOUNDS["fp16"], "not channels last: by the pass"


# --- every other door, with a full and a ragged piece -------------------------------------------

FULL_AND_RAGGED = 70  # max_batch is 64


def test_features(launched: set[Tiles]) -> None:
    images = pixels(WIDE, FULL_AND_RAGGED)
    names = ("conv1", "pool1", "conv3", "fc6", "fc8")
    found = on_card().features(images, names)
    wanted = float64(WIDE, images)
    last = {"conv1": "extra1", "conv3": "relu3", "fc6": "relu6"}
    for name in names:
        assert error(found[name], wanted[last.get(name, name)]) < BOUNDS["fp16"], name
    assert launched == wanted_of(WIDE, 64, 6)


def test_classify_and_stream(launched: set[Tiles]) -> None:
    engine, images = on_card(), pixels(WIDE, FULL_AND_RAGGED)
    scores, classes = float64(WIDE, images)["fc8"].softmax(1).topk(2)
    sure = scores[:, 0] - scores[:, 1] > 0.02
    assert sure.sum() > 35
    for results in (engine.classify(images, top=3), [*engine.stream(images, batch_size=33, top=3)]):
        assert len(results) == FULL_AND_RAGGED
        for one, wanted, clear in zip(results, classes[:, 0].tolist(), sure.tolist(), strict=True):
            assert isinstance(one, list)
            assert [type(found) for found in one] == [Prediction] * 3
            assert not clear or one[0].index == wanted
    # Each group of a stream is a batch of its own.
    assert launched == set.union(*(wanted_of(WIDE, n) for n in (64, 6, 33, 4)))


def test_out_max_batch_and_places(launched: set[Tiles]) -> None:
    """`out` is filled, a long batch is cut, and the same image has the same bits everywhere."""
    images = pixels(WIDE, 1).repeat(FULL_AND_RAGGED, 1, 1, 1)
    out = torch.full((FULL_AND_RAGGED, 10), torch.nan)
    assert on_card()(images, out=out) is out
    assert (out == out[0]).all()
    assert error(out, float64(WIDE, images)["fc8"]) < BOUNDS["fp16"]
    assert launched == wanted_of(WIDE, 64, 6)


def test_pipeline(launched: set[Tiles]) -> None:
    images = pixels(WIDE, FULL_AND_RAGGED)
    two = ("cpu", "cpu")
    piped = on_card(devices=two, split="pipeline", at="conv3", micro_batch=64)(images)
    assert error(piped, float64(WIDE, images)["fc8"]) < BOUNDS["fp16"]
    assert launched == wanted_of(WIDE, 64)


def test_towers(launched: set[Tiles]) -> None:
    images = pixels(TOWERS, FULL_AND_RAGGED)
    both = on_card(TOWERS, devices=("cpu", "cpu"), split="towers")(images)
    assert error(both, float64(TOWERS, images)["softmax"]) < BOUNDS["fp16"]
    assert launched == wanted_of(half(TOWERS), 64, 6)


def test_batch_invariant(launched: set[Tiles]) -> None:
    engine, images = on_card(batch_invariant=True, max_batch=33), pixels(WIDE, 40)
    together = engine(images)
    assert error(together, float64(WIDE, images)["fc8"]) < BOUNDS["fp16"]
    assert torch.equal(torch.cat([engine(images[:1]), engine(images[1:])]), together)
    pieces = ((33, 7), (1,), (33, 6))
    assert launched == set.union(*(wanted_of(WIDE, *n, batch_invariant=True) for n in pieces))


def test_demo(launched: set[Tiles]) -> None:
    seen = demo(target="sm_90", images=40)
    assert seen.images == 40
    assert seen.passed
    assert "sm_90" in seen.device
    assert seen.dtype == "fp16"
    assert launched == wanted_of(DIGITS, 40)


@pytest.mark.parametrize("dtype", ["fp16", "tf32"])
def test_verify(dtype: str, launched: set[Tiles]) -> None:
    """Every step by itself, over memory that was poisoned."""
    result = verify(TOWERS, state_of(TOWERS), dtype, CPU, pixels(TOWERS, 66), target="sm_90")
    assert result.first_failure is None, str(result)
    assert any(check.kernel == "conv2d rows" for check in result.checks)
    assert "the plan of sm_90 interpreted" in str(result)
    assert launched == wanted_of(TOWERS, 66, dtype=dtype)


# --- what a card's table asks for ---------------------------------------------------------------


@pytest.fixture
def h200_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """`h200_table(rows)` ships a table of an H200 for the time of a test."""

    def ship(*rows: TunedRow) -> None:
        monkeypatch.setattr(tuning, "TUNED", tmp_path)
        monkeypatch.setattr(tuning, "path_of", lambda device: tmp_path / f"{device}.json")
        tuning.table.cache_clear()
        tuning.save(tmp_path / "NVIDIA H200.json", "NVIDIA H200", rows)

    yield ship
    tuning.table.cache_clear()


def test_a_cards_name_brings_its_tuned_table(
    h200_table: Callable[..., None], launched: set[Tiles]
) -> None:
    """A tuned tile, slices and dependent launch: planned, bound, kept in the plan, and run."""
    (conv3,) = (s for s in plan(WIDE, 70, ARITHMETIC["fp16"], 90).steps if s.name == "conv3")
    tile = {"tiling": "rows", "BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64, "BLOCK_N2": 64}
    how = {"slice_images": 33, "slice_until": "pool1", "pdl": True}
    run = {"network": "wide", "C": 3, "H": 15, "W": 15}
    h200_table(
        TunedRow("conv2d", without_batch(conv3.shape), "fp16", 70, tile, 1.0, "", "", ""),
        TunedRow("run", run, "fp16", 70, how, 1.0, "", "", ""),
    )
    images = pixels(WIDE, 70)
    wanted = float64(WIDE, images)["fc8"]
    for name in ("h200", "NVIDIA H200"):
        engine = on_card(target=name, max_batch=70)
        assert engine.plan.options == Options(33, "pool1", True)
        assert [step.name for step in engine.plan.steps if step.tuned] == ["conv3"]
    launched.clear()
    assert error(engine(images), wanted) < BOUNDS["fp16"]
    ran = set(launched)
    assert not any(step.tuned for step in on_card(target="sm_90", max_batch=70).plan.steps)
    # verify holds what the engine runs: the tiles of a slice, though all images go at once.
    launched.clear()
    result = verify(WIDE, state_of(WIDE), "fp16", CPU, images, target="h200")
    assert result.first_failure is None, str(result)
    assert launched == ran


def test_undescribed_descriptors_through_pointers() -> None:
    """For a driver that refuses strides out of order: of images, or of groups."""
    images = pixels(TOWERS, 34)
    made = []
    for pointers in (False, True):
        engine = on_card(TOWERS, max_batch=34, options=Options(pointers=pointers))
        steps = {step.name: step.config for step in engine.plan.steps}
        conv1, conv2 = steps["conv1"], steps["conv2"]
        assert isinstance(conv1, FirstLayerConfig)
        assert isinstance(conv2, Conv2dConfig)
        assert ((conv1.form == "pointers"), conv2.descriptors) == (pointers, not pointers)
        made.append(engine.features(images, ("conv1", "conv2", "softmax")))
    for name, through_descriptors in made[0].items():
        assert torch.equal(made[1][name], through_descriptors), name


# --- what is said and what is refused -----------------------------------------------------------


def test_what_a_target_says_of_itself(capsys: pytest.CaptureFixture[str]) -> None:
    engine = on_card()
    assert "sm_90: its untuned plan runs in Triton's interpreter" in capsys.readouterr().err
    assert engine.dtype == "fp16"
    assert engine.plan.arch == 90
    told = str(engine.summary())
    assert "steps in fp16 on sm_90, 64 images" in told
    assert "conv2d rows" in told
    rows = {row.name: row.step for row in engine.summary().rows}
    assert rows["relu3"] == "in conv3"
    assert json.dumps(engine.summary().to_dict())
    assert summarise(DIGITS).plan is None


def test_every_card_is_a_target() -> None:
    for key, card in GPUS.items():
        assert aim(key, CPU).arch == aim(card.device, CPU).arch == card.arch


def test_a_target_and_a_batch_that_are_none_are_refused() -> None:
    with pytest.raises(EngineError, match="target: wanted device='cpu' to run 'sm_90', got 'cuda'"):
        aim("sm_90", torch.device("cuda"))
    with pytest.raises(NetworkError, match="digits: wanted a batch of 1 or more images, got 0"):
        plan(DIGITS, 0, ARITHMETIC["fp16"], 90)


def test_a_card_too_old_is_refused_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")

    def fails(device: object) -> None:
        raise RuntimeError("CUDA error: out of memory")

    cuda, wanted = torch.device("cuda"), "Tesla T4: .* compute capability 8.0 or newer, got 7.5"
    with pytest.raises(RuntimeError, match=wanted):
        architecture(cuda)
    with pytest.raises(EngineError, match=rf"{wanted}; .*backend='torch'\) runs there"):
        aim(None, cuda)
    assert aim(None, cuda, "torch").arch is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", fails)
    with pytest.raises(RuntimeError, match="out of memory"):  # which is no refusal of ours
        aim(None, cuda, "torch")


def test_how_long_is_said_before_a_long_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine, images = on_card(), pixels(WIDE, 65)
    monkeypatch.setattr(foretell, "_spent", lambda launch, programs: 1.0)
    monkeypatch.setattr(Single, "run", lambda *batch: 1 / 0)  # no run, only the words
    with pytest.raises(ZeroDivisionError):
        engine(images)
    assert "65 images in Triton's interpreter: about " in capsys.readouterr().err
    monkeypatch.setattr(foretell, "_spent", lambda launch, programs: 1e-6)
    with pytest.raises(ZeroDivisionError):
        engine(images[:64])
    assert capsys.readouterr().err == ""


# --- the shell ----------------------------------------------------------------------------------


def test_verbs_take_a_target(capsys: pytest.CaptureFixture[str], launched: set[Tiles]) -> None:
    digit = str(heldout()[100][0])
    for words, wanted in (
        ("plan digits --target sm_86 --batch 70", "digits: 70 images 3x64x64, fp16 on sm_86"),
        ("plan digits --card a100 --devices 2", "predicted for A100 80GB"),
        ("summary digits --target rtx4090", "steps in fp16 on sm_89, 256 images"),
        ("verify digits --target h200 --images 1", "the plan of H200 interpreted"),
        (f"classify {digit} --model digits --top 1 --target sm_90", "%  2"),
    ):
        assert main(words.split()) == 0, words
        assert wanted in capsys.readouterr().out, words
    assert launched == wanted_of(DIGITS, 1)  # of both that ran, verify and classify
    for words, wanted in (
        ("plan digits --target sm_90 --devices 2", "--target for --devices 2: wanted one of h200"),
        (f"classify {digit} --model digits --target sm_90 --ray", "--target: wanted without --ray"),
        ("verify digits --target volta", "target: wanted one of a100"),
        ("verify digits --target sm_90 --device banana", "device: wanted 'cpu', 'cuda'"),
    ):
        assert main(words.split()) == 1, words
        assert wanted in capsys.readouterr().err, words


def test_layers_of_a_target_have_matches_and_no_times(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], launched: set[Tiles]
) -> None:
    kept = tmp_path / "layers.json"
    words = f"layers conv4 fc8 --model digits --batch 66 --target h200 --json {kept}"
    assert bench(words.split()) == 0
    assert "The plan of H200 in Triton's interpreter: matches, no times." in capsys.readouterr().out
    rows = load_results(kept).rows
    assert [row.problem for row in rows] == ["conv4", "fc8"]
    assert all(row.matched and row.median_us is None and row.dtype == "fp16" for row in rows)
    assert launched
    assert launched < wanted_of(DIGITS, 66)


def test_alexnet_plans_of_every_card_are_different_from_the_interpreters() -> None:
    for target in ("sm_80", "sm_90", "sm_100"):
        found = plan(ALEXNET, 256, ARITHMETIC["fp16"], aim(target, CPU).arch)
        own = plan(ALEXNET, 256, ARITHMETIC["fp16"], None)
        assert [s.config for s in found.steps] != [s.config for s in own.steps]
