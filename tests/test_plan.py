"""The map of a run: what is fused, which tiles, which memory, and what is refused."""

from __future__ import annotations

import itertools
from dataclasses import asdict, replace

import pytest
from alexnet_triton.engine import NetworkError
from alexnet_triton.engine.plan import ARITHMETIC, Options, Plan, plan, reconfigured
from alexnet_triton.engine.spec import Conv2d, MaxPool2d, Network, Preprocess, ReLU
from alexnet_triton.engine.zoo import ALEXNET, DIGITS, network
from alexnet_triton.kernels import tuning
from alexnet_triton.kernels.conv import Conv2dConfig, Conv2dShape
from alexnet_triton.kernels.gemm import LinearConfig, LinearShape
from alexnet_triton.kernels.tuning import Table, TunedRow, TuningError

FP16 = ARITHMETIC["fp16"]


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


def test_first_convolution_reads_channels_last_images() -> None:
    read, conv1 = plan(ALEXNET, 8, FP16, 90).steps[:2]
    assert (read.output, read.size) == ((224, 224, 8, 4), 2 * 8 * 224 * 224 * 4)
    assert (conv1.shape, conv1.output) == (
        Conv2dShape(8, 3, 224, 224, 64, 11, 11, stride=(4, 4), padding=(2, 2, 2, 2)),
        (55, 55, 8, 64),
    )
    assert conv1.kernel == "first_layer rows"
    assert plan(ALEXNET, 256, FP16, 90).steps[1].kernel == "first_layer images"


def test_a_first_convolution_over_many_channels_reads_an_activation() -> None:
    layers = (("conv1", Conv2d(8, 3, padding=1)), ("relu1", ReLU()))
    deep = replace(DIGITS, input_shape=(40, 9, 9), layers=layers)
    read, conv1 = plan(deep, 8, FP16, 90).steps
    assert (read.output, conv1.kernel) == ((9, 9, 8, 40), "conv2d rows")


def test_a_batch_invariant_plan_does_not_look_at_how_images_lie() -> None:
    """A pixel of three numbers puts products elsewhere in a window than a pixel of four."""
    for invariant, first in ((False, "conv1"), (True, "input")):
        planned = plan(ALEXNET, 8, FP16, 90, in_place=True, batch_invariant=invariant)
        assert planned.steps[0].name == first


def test_flops_leave_out_taps_in_the_padding() -> None:
    planned = plan(ALEXNET, 1, FP16, 90)
    convolutions = [s for s in planned.steps if s.name.startswith(("conv", "fc"))]
    flops = sum(step.work.flops for step in convolutions)
    padded = 2 * 714_188_480
    assert 0.90 < flops / padded < 0.95
    twice = plan(ALEXNET, 2, FP16, 90)
    assert sum(s.work.flops for s in twice.steps) == 2 * sum(s.work.flops for s in planned.steps)


@pytest.mark.parametrize("keep", [(), ("conv2", "pool2", "fc6")])
@pytest.mark.parametrize("batch", [1, 3, 100])
def test_what_is_alive_never_overlaps(keep: tuple[str, ...], batch: int) -> None:
    planned = plan(ALEXNET, batch, FP16, 90, keep=keep)
    steps = planned.steps
    for i, step in enumerate(steps):
        height, width, images, channels = step.output
        assert step.size >= height * width * images * channels * step.dtype.itemsize
        assert step.offset + step.size <= planned.workspace
        assert step.scratch_offset + 4 * step.scratch <= planned.workspace
        alive = [s for s in steps[:i] if s is steps[i - 1] or s.name in keep]
        spans = [(s.offset, s.offset + s.size) for s in (*alive, step)]
        if step.scratch:
            spans.append((step.scratch_offset, step.scratch_offset + 4 * step.scratch))
        for (_, end), (start, _) in itertools.pairwise(sorted(spans)):
            assert end <= start


def test_memory_is_the_most_that_is_alive_at_once() -> None:
    planned = plan(ALEXNET, 256, FP16, 90)
    together = max(a.size + b.size for a, b in itertools.pairwise(planned.steps))
    assert together <= planned.workspace <= together + 256 * len(planned.steps)
    assert plan(ALEXNET, 1, FP16, 90).workspace < 4e6


def test_slices_need_memory_for_a_slice() -> None:
    """But for the output of the last step that is sliced, which all slices fill."""
    whole = plan(ALEXNET, 1024, FP16, 90)
    cut = plan(ALEXNET, 1024, FP16, 90, options=Options(64, "pool1"))
    assert (whole.sliced, cut.sliced) == (0, 3)
    pool1, conv2 = cut.steps[2:4]
    assert pool1.size + conv2.size <= cut.workspace < 0.6 * whole.workspace
    early, late = cut.steps[1], cut.steps[3]
    assert early.config == plan(ALEXNET, 64, FP16, 90).steps[1].config
    assert late.config == whole.steps[3].config
    boundary = cut.steps[2]
    for step in cut.steps[:2]:  # alive while every slice writes its part of pool1
        one = -(-step.size // 1024) * 64
        assert step.offset + one <= boundary.offset or (
            boundary.offset + boundary.size <= step.offset
        )
    assert plan(ALEXNET, 64, FP16, 90, options=Options(64, "pool1")).sliced == 0
    kept = plan(ALEXNET, 1024, FP16, 90, options=Options(64, "pool1"), keep=["conv1"])
    assert kept.sliced == 0, "a slice would overwrite what is kept"
    with pytest.raises(NetworkError, match=r"alexnet has no step 'pool9' to slice until"):
        plan(ALEXNET, 1024, FP16, 90, options=Options(64, "pool9"))


def test_measured_configurations_come_before_defaults() -> None:
    conv1, conv4 = (
        step for step in plan(ALEXNET, 256, FP16, 90).steps if step.name in ("conv1", "conv4")
    )
    images = asdict(conv1.config) | {"BLOCK_M": 256} if conv1.config else {}
    assert isinstance(conv4.shape, Conv2dShape)
    tiles = {"tiling": "rows", "BLOCK_M": 256, "BLOCK_N": 128, "BLOCK_K": 64}
    rows = [
        TunedRow(op, tuning.without_batch(s), "fp16", 256, c, 1.0, "3.6.0", "now", "x")
        for op, s, c in (
            ("first_layer", conv1.shape, images),
            ("conv2d", conv4.shape, tiles),
        )
    ]
    table = Table("NVIDIA H200", tuple(rows))
    tuned = {s.name: s for s in plan(ALEXNET, 256, FP16, 90, tuned=table).steps}
    assert [name for name, step in tuned.items() if step.tuned] == ["conv1", "conv4"]
    assert tuned["conv4"].config == Conv2dConfig("rows", 256, 128, 64)
    assert not any(s.tuned for s in plan(ALEXNET, 4096, FP16, 90, tuned=table).steps), "too far"
    invariant = plan(ALEXNET, 256, FP16, 90, tuned=table, batch_invariant=True)
    assert not any(step.tuned for step in invariant.steps)
    assert "(tuned)" in str(plan(ALEXNET, 256, FP16, 90, tuned=table))


def test_another_configuration_of_one_step() -> None:
    planned = plan(ALEXNET, 64, FP16, 90)
    other = Conv2dConfig("pixels", 64, 64, 64, SPLIT_K=4)
    conv3 = next(s for s in reconfigured(planned, "conv3", other).steps if s.name == "conv3")
    assert (conv3.config, conv3.kernel) == (other, "conv2d pixels")
    assert conv3.scratch == 4 * 169 * 64 * 384
    before = next(s for s in planned.steps if s.name == "conv3").config
    assert before is not None
    again = reconfigured(reconfigured(planned, "conv3", other), "conv3", before)
    assert again == planned


def test_few_images_tile_pixels_and_others_tile_rows() -> None:
    for batch, tiling in ((1, "pixels"), (7, "pixels"), (8, "rows"), (100, "rows"), (1024, "rows")):
        for step in plan(ALEXNET, batch, FP16, 90).steps:
            if isinstance(step.config, Conv2dConfig):
                assert step.config.tiling == tiling
    # With a stride of 2 a tile stays in one column: rows want images enough.
    for batch, tiling in ((8, "pixels"), (64, "rows")):
        steps = {step.name: step for step in plan(network("zfnet"), batch, FP16, 90).steps}
        assert steps["conv2"].kernel == f"conv2d {tiling}"


@pytest.mark.parametrize(
    "config",
    [
        {"tiling": "images", "BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64},
        {"tiling": "rows", "BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "columns": 2},
    ],
)
def test_a_row_of_an_older_kernel_is_refused(config: dict[str, object]) -> None:
    (conv4,) = (step for step in plan(ALEXNET, 256, FP16, 90).steps if step.name == "conv4")
    row = TunedRow(
        "conv2d", tuning.without_batch(conv4.shape), "fp16", 256, config, 1.0, "", "", ""
    )
    with pytest.raises(TuningError, match=r"H200's table: conv2d .*; tune it again") as caught:
        plan(ALEXNET, 256, FP16, 90, tuned=Table("NVIDIA H200", (row,)))
    assert len(str(caught.value).splitlines()) == 1


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
    text = str(plan(ALEXNET, 64, ARITHMETIC["tf32"], 90))
    assert "alexnet: 64 images 3x224x224, tf32 on sm_90" in text
    for name in ("input", "conv1", "pool5", "fc8", "total"):
        assert f"\n{name}" in text
    assert "Triton's interpreter" in str(plan(DIGITS, 1, ARITHMETIC["fp32"], None))


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
