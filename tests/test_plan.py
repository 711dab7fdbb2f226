"""The map of a run: what is fused, which tiles, which memory, and what is refused."""

from __future__ import annotations

import pytest
from alexnet_triton.engine import NetworkError
from alexnet_triton.engine.plan import NUMBERS, Plan, plan
from alexnet_triton.engine.spec import Conv2d, MaxPool2d, Network, Preprocess, ReLU
from alexnet_triton.engine.zoo import ALEXNET, DIGITS
from alexnet_triton.kernels.conv import Conv2dConfig, Conv2dShape
from alexnet_triton.kernels.gemm import LinearConfig, LinearShape

FP16 = NUMBERS["fp16"]


def steps(planned: Plan) -> dict[str, tuple[str, ...]]:
    return {step.name: step.layers for step in planned.steps}


def test_every_layer_is_computed_once_and_relu_is_fused() -> None:
    planned = plan(ALEXNET, 8, FP16, 90)
    made = steps(planned)
    assert made["conv1"] == ("conv1", "relu1")
    assert made["fc7"] == ("fc7", "relu7")
    assert made["fc8"] == ("fc8",)
    computed = [name for step in planned.steps[1:] for name in step.layers]
    idle = {"avgpool", "flatten", "drop6", "drop7"}  # a 6x6 average pool to 6x6 changes nothing
    assert computed == [name for name, _ in ALEXNET.layers if name not in idle]
    assert "avgpool" in steps(plan(ALEXNET, 8, FP16, 90, image_shape=(3, 256, 256)))


def test_first_convolution_becomes_a_stem_and_a_small_convolution() -> None:
    stem, conv1 = plan(ALEXNET, 8, FP16, 90).steps[:2]
    assert stem.output == (57, 57, 8, 48)
    assert isinstance(conv1.shape, Conv2dShape)
    assert (conv1.shape.C, conv1.shape.KH, conv1.shape.stride) == (48, 3, (1, 1))
    assert conv1.output == (55, 55, 8, 64)


def test_flops_leave_out_taps_in_the_padding() -> None:
    planned = plan(ALEXNET, 1, FP16, 90)
    convolutions = [s for s in planned.steps if s.name.startswith(("conv", "fc"))]
    flops = sum(step.work.flops for step in convolutions)
    padded = 2 * 714_188_480
    assert 0.90 < flops / padded < 0.95
    twice = plan(ALEXNET, 2, FP16, 90)
    assert sum(s.work.flops for s in twice.steps) == 2 * sum(s.work.flops for s in planned.steps)


def test_neighbours_never_share_memory_and_every_slot_is_large_enough() -> None:
    for keep in ((), ("conv2", "pool2", "fc6")):
        planned = plan(ALEXNET, 3, FP16, 90, keep=keep)
        for before, after in zip(planned.steps, planned.steps[1:], strict=False):
            assert before.slot != after.slot
        for step in planned.steps:
            height, width, images, channels = step.output
            assert planned.slots[step.slot] >= height * width * images * channels
        kept = [step.slot for step in planned.steps if step.name in keep]
        others = {step.slot for step in planned.steps if step.name not in keep}
        assert len(set(kept)) == len(keep)
        assert not others & set(kept)


def test_few_images_tile_pixels_and_many_tile_images() -> None:
    for batch, tiling in ((1, "pixels"), (16, "pixels"), (64, "images"), (1024, "images")):
        for step in plan(ALEXNET, batch, FP16, 90).steps:
            if isinstance(step.config, Conv2dConfig):
                assert step.config.tiling == tiling


def test_a_small_piece_of_a_long_batch_keeps_the_long_batchs_configurations() -> None:
    long, tail = plan(ALEXNET, 256, FP16, 90), plan(ALEXNET, 3, FP16, 90, configured_for=256)
    for a, b in zip(long.steps, tail.steps, strict=True):
        if isinstance(a.shape, Conv2dShape | LinearShape):
            assert a.config == b.config
            assert b.output[2] == 3


def test_batch_invariant_configurations_do_not_see_the_batch() -> None:
    plans = [plan(ALEXNET, n, FP16, 90, batch_invariant=True) for n in (1, 7, 64, 1024)]
    for same in zip(*(p.steps for p in plans), strict=True):
        if isinstance(same[0].shape, Conv2dShape | LinearShape):
            assert len({step.config for step in same}) == 1
            config = same[0].config
            assert not (isinstance(config, LinearConfig) and config.SPLIT_K > 1)


def test_printing_shows_every_step_and_the_totals() -> None:
    text = str(plan(ALEXNET, 64, NUMBERS["tf32"], 90))
    assert "alexnet: 64 images 3x224x224, tf32, sm_90" in text
    for name in ("input", "conv1", "pool5", "fc8", "total"):
        assert f"\n{name}" in text
    assert "Triton's interpreter" in str(plan(DIGITS, 1, NUMBERS["fp32"], None))


def test_refusals_name_the_layer() -> None:
    with pytest.raises(NetworkError, match="alexnet has no features 'conv9'; it has conv1, pool1"):
        plan(ALEXNET, 1, FP16, 90, keep=["conv9"])
    with pytest.raises(NetworkError, match=r"alexnet, layer pool5: input .* is too small"):
        plan(ALEXNET, 1, FP16, 90, image_shape=(3, 40, 40))
    plain = Preprocess(8, 8, mean=(0.0,) * 3, std=(1.0,) * 3)
    layers = (("conv1", Conv2d(8, 3)), ("pool1", MaxPool2d(2, 2)), ("relu1", ReLU()))
    with pytest.raises(NetworkError, match=r"late, layer relu1: .* must follow a convolution"):
        plan(Network("late", (3, 8, 8), layers, plain, ""), 1, FP16, 90)
    with pytest.raises(NetworkError, match=r"pooled, layer pool1: .* start with a convolution"):
        plan(Network("pooled", (3, 8, 8), layers[1:2], plain, ""), 1, FP16, 90)
