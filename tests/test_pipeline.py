"""Two devices in a row: at every cut the single device's answer, whatever the batch sizes."""

from __future__ import annotations

import pytest
import torch
from alexnet_triton import Engine, EngineError, NetworkError
from alexnet_triton.engine.devices.pipeline import Pipeline, balanced_cut, cost, cut, cuts
from alexnet_triton.engine.plan import ARITHMETIC, plan
from alexnet_triton.engine.spec import Network
from alexnet_triton.engine.zoo import ALEXNET, DIGITS
from alexnet_triton.weights import load

BATCHES = (0, 1, 7, 4)  # the last after a longer one: no row of it may come back


def relative(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((actual.double() - wanted.double()).abs().max() / wanted.abs().max()).item()


def images(net: Network, generator: torch.Generator, count: int = 7) -> torch.Tensor:
    shape = (count, *net.input_shape)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("invariant", [False, pytest.param(True, marks=pytest.mark.bits)])
def test_every_legal_cut_is_the_single_device(
    invariant: bool, tiny2012: Network, device: torch.device, generator: torch.Generator
) -> None:
    net = tiny2012 if invariant else DIGITS
    state = load("random:3", net.parameter_shapes(), network=net.name)
    pixels = images(net, generator)
    settings = {"dtype": "fp32", "max_batch": 7, "batch_invariant": invariant}
    wanted = Engine.load(net, state, device=device, **settings)(pixels)  # type: ignore[arg-type]
    legal = cuts(plan(net, 4, ARITHMETIC["fp32"], None))
    assert (legal[0], legal[-1]) == (("norm1", "fc7") if invariant else ("pool1", "fc8"))
    for at in legal:
        split = {"devices": (device, device), "split": "pipeline", "at": at, "micro_batch": 4}
        engine = Engine.load(net, state, **settings, **split)  # type: ignore[arg-type]
        for count in BATCHES if at == "fc6" else (4,):
            logits = engine(pixels[:count])
            assert logits.shape == (count, wanted.shape[1])
            if count and invariant:
                assert torch.equal(logits, wanted[:count]), f"cut at {at}, batch {count}"
            elif count:
                assert relative(logits, wanted[:count]) < 1e-5, f"cut at {at}, batch {count}"


def test_features_of_both_stages(device: torch.device, generator: torch.Generator) -> None:
    pixels = images(DIGITS, generator, 5)
    single = Engine.load("digits", device=device, dtype="fp32")
    both = Engine.load(
        "digits", dtype="fp32", devices=(device, device), split="pipeline", at="fc6", micro_batch=2
    )
    wanted = single.features(pixels)
    for name, feature in both.features(pixels).items():
        assert feature.shape == wanted[name].shape
        assert relative(feature, wanted[name]) < 1e-5, name


def test_each_device_holds_its_stages_weights_only(device: torch.device) -> None:
    engine = Engine.load("digits", devices=(device, device), split="pipeline", at="fc6")
    assert isinstance(engine._runner, Pipeline)
    first, second = engine._runner._packed
    assert {*first.unpacked, *first.weight} == {f"conv{i}" for i in range(1, 6)}
    assert {*second.unpacked, *second.weight} == {"fc6", "fc7", "fc8"}


def test_the_automatic_cut_makes_the_slower_stage_fastest() -> None:
    planned = plan(ALEXNET, 64, ARITHMETIC["fp16"], 90)
    names = [step.name for step in planned.steps]

    def at(**milliseconds: float) -> str:
        return balanced_cut(planned, [milliseconds.get(name, 0.0) for name in names])

    # As early as may be among the equally good.
    assert at(conv1=3, conv2=2, fc6=4, fc7=1) == "pool2"  # 5 | 5
    assert at(conv1=1, conv2=1, fc6=5, fc7=4) == "fc7"  # 7 | 4
    assert at(conv1=9, fc6=1, fc7=1) == "pool1"  # 9 | 2
    one = plan(ALEXNET, 1, ARITHMETIC["fp16"], 90)  # a stream of weights, most of them fc6's
    assert balanced_cut(one, [cost(step) for step in one.steps]) in ("fc6", "fc7")


def test_cut_gives_all_steps_once() -> None:
    planned = plan(ALEXNET, 4, ARITHMETIC["fp32"], None)
    first, second = cut(planned, "conv3")
    names = [step.name for step in planned.steps]
    assert [step.name for step in (*first.steps, *second.steps)] == names
    assert second.steps[0].name == "conv3"
    assert first.workspace + second.workspace < 2 * planned.workspace  # each its own memory


def test_refusals(device: torch.device) -> None:
    pair = (device, device)
    with pytest.raises(NetworkError, match=r"digits cannot be cut at 'conv1'; .* pool1, conv2"):
        Engine.load("digits", devices=pair, split="pipeline", at="conv1")
    for wrong, message in (
        ({"devices": pair}, "split: wanted one of pipeline, towers, got 'None'"),
        ({"devices": pair, "split": "data"}, "split: wanted one of pipeline, towers, got 'data'"),
        ({"split": "pipeline"}, "devices: wanted two with split='pipeline', got none"),
        ({"split": "pipeline", "devices": (device,)}, "devices: wanted two .*, got 1"),
        ({"split": "pipeline", "devices": pair, "backend": "torch"}, "only the triton backend"),
        ({"split": "pipeline", "devices": pair, "micro_batch": 0}, "micro_batch: wanted 1 or"),
        ({"split": "pipeline", "devices": pair, "device": "cpu"}, "wanted devices alone"),
    ):
        with pytest.raises(EngineError, match=message):
            Engine.load("digits", **wrong)


@pytest.mark.gpu
def test_streams_do_not_race(generator: torch.Generator) -> None:
    """Calls from several streams and with several image shapes share one engine's memory."""
    pair = ("cuda:0", "cuda:0")
    pixels = [images(DIGITS, generator, n).cuda() for n in (5, 16, 9, 13)]
    wider = [torch.nn.functional.pad(batch, (0, 31)) for batch in pixels]
    single = Engine.load("digits", device="cuda", dtype="fp32", batch_invariant=True)
    for split in ("pipeline", "towers", None):
        engine = single
        if split is not None:
            engine = Engine.load(
                "digits", dtype="fp32", batch_invariant=True, devices=pair, split=split
            )
        wanted = [single(batch) for batch in (*pixels, *wider)]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in range(4)]
        for _ in range(5):
            made = []
            for i, batch in enumerate((*pixels, *wider)):
                with torch.cuda.stream(streams[i % 4]):
                    made.append(engine(batch))
            torch.cuda.synchronize()
            for got, want in zip(made, wanted, strict=True):
                assert torch.equal(got, want), split


@pytest.mark.gpu
def test_the_measured_cut_is_legal() -> None:
    engine = Engine.load("digits", devices=("cuda:0", "cuda:0"), split="pipeline")
    planned = plan(DIGITS, 4, ARITHMETIC["fp16"], 90)
    assert isinstance(engine._runner, Pipeline)
    assert engine._runner.at in cuts(planned)
