"""Two devices in a row: at every cut the single device's answer, whatever the batch sizes."""

from __future__ import annotations

import pytest
import torch
from alexnet_triton import Engine, EngineError, NetworkError
from alexnet_triton.engine.pipeline import balanced_cut, cost, cut, cuts
from alexnet_triton.engine.plan import NUMBERS, plan
from alexnet_triton.engine.spec import Network, Preprocess
from alexnet_triton.engine.zoo import ALEXNET, DIGITS, alexnet2012
from alexnet_triton.weights import load

PLAIN = Preprocess(64, 64, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
TOWERS = Network("narrow2012", (3, 67, 67), alexnet2012(width=1 / 8), PLAIN, "imagenet.txt")
BATCHES = (0, 1, 7, 16, 10)  # the last after a longer one: no row of it may come back


def relative(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((actual.double() - wanted.double()).abs().max() / wanted.abs().max()).item()


def images(net: Network, generator: torch.Generator, count: int = 16) -> torch.Tensor:
    shape = (count, *net.input_shape)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(("net", "invariant"), [(DIGITS, False), (TOWERS, True)])
def test_every_legal_cut_is_the_single_device(
    net: Network, invariant: bool, device: torch.device, generator: torch.Generator
) -> None:
    state = load("random:3", net.parameter_shapes(), network=net.name)
    pixels = images(net, generator)
    settings = {"dtype": "fp32", "max_batch": 16, "batch_invariant": invariant}
    wanted = Engine.load(net, state, device=device, **settings)(pixels)  # type: ignore[arg-type]
    legal = cuts(plan(net, 4, NUMBERS["fp32"], None))
    assert legal[0] == ("norm1" if net is TOWERS else "pool1")
    assert legal[-1] == "fc8"
    for at in legal:
        split = {"devices": (device, device), "split": "pipeline", "at": at, "micro_batch": 6}
        engine = Engine.load(net, state, **settings, **split)  # type: ignore[arg-type]
        for count in BATCHES if at == "fc6" else (7,):
            logits = engine(pixels[:count])
            assert logits.shape == (count, wanted.shape[1])
            if count and invariant:
                assert torch.equal(logits, wanted[:count]), f"cut at {at}, batch {count}"
            elif count:
                assert relative(logits, wanted[:count]) < 1e-5, f"cut at {at}, batch {count}"


def test_full_size_alexnet_cut_at_fc6(device: torch.device, generator: torch.Generator) -> None:
    state = load("random:1", ALEXNET.parameter_shapes(), network="alexnet")
    pixels = torch.randn(3, 3, 63, 63, generator=generator)
    single = Engine.load(ALEXNET, state, device=device, dtype="fp32", batch_invariant=True)
    both = Engine.load(
        ALEXNET,
        state,
        dtype="fp32",
        batch_invariant=True,
        devices=(device, device),
        split="pipeline",
        at="fc6",
        micro_batch=2,
    )
    assert torch.equal(both(pixels), single(pixels))


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
    first, second = engine._runner._packed  # type: ignore[attr-defined]
    assert set(first.weight) == {f"conv{i}" for i in range(1, 6)}
    assert set(second.weight) == {"fc6", "fc7", "fc8"}


def test_the_automatic_cut_balances_counted_work() -> None:
    planned = plan(ALEXNET, 64, NUMBERS["fp16"], 90)
    costs = [cost(step) for step in planned.steps]
    at = balanced_cut(planned, costs)
    names = [step.name for step in planned.steps]

    def slower(name: str) -> float:
        where = names.index(name)
        return max(sum(costs[:where]), sum(costs[where:]))

    assert slower(at) == min(slower(name) for name in cuts(planned))
    # One image is a stream of weights, nearly all of them in the linear layers: cut behind fc6's.
    one = plan(ALEXNET, 1, NUMBERS["fp16"], 90)
    assert balanced_cut(one, [cost(step) for step in one.steps]) in ("fc6", "fc7")


def test_cut_gives_all_steps_once() -> None:
    planned = plan(ALEXNET, 4, NUMBERS["fp32"], None)
    first, second = cut(planned, "conv3")
    assert first.steps + second.steps == planned.steps
    assert second.steps[0].name == "conv3"


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
            Engine.load("digits", **wrong)  # type: ignore[arg-type]
