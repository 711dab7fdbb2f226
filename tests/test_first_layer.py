"""The first convolution against float64, in every form, in place and behind the pass.

Images lie between fences, and what lies between an image row and its pitch is NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import pytest
import torch
from alexnet_triton.kernels import channels_last, conv, first_layer, layout
from alexnet_triton.kernels.channels_last import ChannelsLastShape
from alexnet_triton.kernels.conv import Conv2dShape
from alexnet_triton.kernels.first_layer import FirstLayerConfig
from alexnet_triton.kernels.jit import MAX_TILE
from hypothesis import assume, given
from hypothesis import strategies as st

Fenced = Callable[[Sequence[int], torch.dtype], torch.Tensor]
Close = Callable[..., None]
Run = Callable[..., torch.Tensor]
Affine = tuple[torch.Tensor, torch.Tensor]
Form = Literal["images", "rows", "pointers"]

FORMS: tuple[Form, Form, Form] = ("images", "rows", "pointers")
each_form = pytest.mark.parametrize("form", FORMS)


def net(n: int, c: int, h: int, w: int, oc: int, k: int, s: int, p: int) -> Conv2dShape:
    """A square filter with one stride and one padding."""
    return Conv2dShape(n, c, h, w, oc, k, k, (s, s), (p, p, p, p))


# Problem, numbers a pixel, columns, BLOCK_N, BLOCK_N2, BLOCK_K: the first layers of known networks
# on small images, one for every way a window can lie, and what no network has.
CASES: dict[str, tuple[Conv2dShape, int, int, int, int, int]] = {
    "alexnet": (net(3, 3, 19, 27, 64, 11, 4, 2), 3, 3, 128, 64, 64),
    "alexnet, pixels of four": (net(2, 3, 19, 19, 64, 11, 4, 2), 4, 2, 128, 0, 64),
    "alexnet 2012": (net(2, 3, 19, 19, 96, 11, 4, 0), 3, 2, 128, 64, 64),
    "zfnet": (net(2, 3, 13, 15, 96, 7, 2, 1), 3, 2, 128, 64, 64),
    "zfnet, one column": (net(1, 3, 11, 9, 96, 7, 2, 1), 3, 1, 128, 0, 32),
    "vgg": (net(1, 3, 6, 11, 64, 3, 1, 1), 3, 4, 256, 0, 32),
    "vgg, eight shifts": (net(1, 3, 4, 9, 64, 3, 1, 1), 3, 1, 64, 0, 16),
    "odd": (net(2, 3, 22, 21, 64, 11, 4, 2), 3, 3, 128, 64, 64),
    "oblong": (net(1, 3, 8, 69, 64, 11, 4, 2), 3, 3, 128, 64, 64),
    "grey": (net(3, 1, 40, 14, 20, 5, 2, 2), 1, 3, 64, 0, 16),
    "window in three": (net(2, 3, 9, 13, 16, 11, 4, 2), 4, 1, 16, 0, 16),
    "blocks of filters": (net(2, 3, 9, 9, 37, 3, 2, 1), 4, 3, 32, 16, 32),
    "two strides": (
        Conv2dShape(2, 2, 11, 13, 9, 3, 5, (3, 2), (0, 3, 4, 1)),
        *(2, 2, 32, 0, 16),
    ),
    "strides over the filter": (net(17, 3, 9, 8, 8, 2, 5, 0), 4, 2, 16, 0, 32),
    "windows outside the image": (net(2, 3, 3, 4, 8, 2, 3, 5), 4, 1, 16, 0, 16),
    "one of everything": (net(1, 1, 1, 1, 1, 1, 1, 0), 1, 1, 16, 0, 16),
}


def case(name: str, form: Form) -> tuple[Conv2dShape, int, FirstLayerConfig]:
    """Problem, numbers a pixel and configuration of a case."""
    shape, pixel, *tiles = CASES[name]
    block_m = 256 if form == "pointers" else 16
    return shape, pixel, FirstLayerConfig(form, tiles[0], block_m, *tiles[1:])


def random_operands(
    shape: Conv2dShape, dtype: torch.dtype, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images [N, C, H, W], filters [OC, C, KH, KW] and bias [OC], rounded to `dtype`."""
    sizes = (
        (shape.N, shape.C, shape.H, shape.W),
        (shape.OC, shape.C, shape.KH, shape.KW),
        (shape.OC,),
    )
    x, weight, bias = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    return x, weight, bias


def laid(fenced: Fenced, x: torch.Tensor, shape: Conv2dShape, pixel: int) -> torch.Tensor:
    """Images [N, C, H, W] as [N, rows, numbers], rows a multiple of the stride, NaN behind each."""
    rows = -(-shape.H // shape.stride[0]) * shape.stride[0]
    images = fenced((shape.N, rows, shape.W * pixel), x.dtype).fill_(0)
    images.unflatten(2, (shape.W, pixel))[:, : shape.H, :, : shape.C] = x.permute(0, 2, 3, 1)
    return images


def answer(
    fenced: Fenced,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    shape: Conv2dShape,
    pixel: int,
    config: FirstLayerConfig,
    activation: str | None = None,
    precision: str = "ieee",
    affine: Affine | None = None,
) -> torch.Tensor:
    """The kernel's answer [N, OC, OH, OW] to operands [N, C, H, W] and [OC, C, KH, KW]."""
    images = laid(fenced, x, shape, pixel)
    packed = first_layer.pack_weight(weight, shape, pixel, config.columns)
    filters = fenced(packed.shape, x.dtype).copy_(packed)
    offsets = None if bias is None else fenced(bias.shape, x.dtype).copy_(bias)
    if affine is not None:
        scale, shift = (fenced(t.shape, t.dtype).copy_(t) for t in affine)
        affine = (scale, shift)
    out = fenced((shape.OH, shape.OW, shape.N, shape.OC), x.dtype)
    first_layer.first_layer(
        images, filters, offsets, out, shape, pixel, config, activation, precision, affine
    )()
    return layout.unpack(out).cpu()


def magnitude(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, shape: Conv2dShape
) -> torch.Tensor:
    """What the sums would be if nothing cancelled."""
    return conv.reference(x.abs(), weight.abs(), None if bias is None else bias.abs(), shape)


def products(shape: Conv2dShape) -> int:
    """How many products make one output."""
    return shape.KH * shape.KW * shape.C


# Numbers

HALF = ("alexnet", "blocks of filters")


@each_form
@pytest.mark.parametrize(
    ("name", "dtype", "precision"),
    [
        *((name, torch.float32, "ieee") for name in CASES),
        *((name, torch.float16, "ieee") for name in HALF),
        *(pytest.param(n, torch.bfloat16, "ieee", marks=pytest.mark.gpu) for n in HALF),
        *(pytest.param(n, torch.float32, "tf32", marks=pytest.mark.gpu) for n in HALF),
    ],
)
def test_equals_float64(
    name: str,
    form: Form,
    dtype: torch.dtype,
    precision: str,
    run: Run,
    generator: torch.Generator,
    assert_close: Close,
) -> None:
    shape, pixel, config = case(name, form)
    if dtype.itemsize == 2 or precision == "tf32":  # what a tensor core wants of a tile
        config = replace(config, BLOCK_M=max(64, config.BLOCK_M))
    x, weight, bias = random_operands(shape, dtype, generator)
    y = run(x, weight, bias, shape, pixel, config, precision=precision)
    scale = magnitude(x, weight, bias, shape)
    wanted = conv.reference(x, weight, bias, shape)
    assert_close(y, wanted, dtype, products(shape), precision, scale)


@each_form
def test_bias_activation_scale_and_shift(
    form: Form, run: Run, generator: torch.Generator, assert_close: Close
) -> None:
    """Each filter its own at every column, in float32 whatever the rest."""
    shape, pixel, config = case("blocks of filters", form)
    x, weight, bias = random_operands(shape, torch.float16, generator)
    scale, shift = torch.randn(2, shape.OC, generator=generator)
    y = run(x, weight, bias, shape, pixel, config, "relu", affine=(scale, shift))
    wanted = conv.reference(x, weight, bias, shape, "relu")
    wanted = wanted * scale[:, None, None] + shift[:, None, None]
    size = magnitude(x, weight, bias, shape) * scale.abs()[:, None, None]
    size += shift.abs()[:, None, None]
    assert_close(y, wanted, torch.float16, products(shape) + 2, scale=size)
    none = run(x, weight, None, shape, pixel, config)
    size = magnitude(x, weight, None, shape)
    wanted = conv.reference(x, weight, None, shape)
    assert_close(none, wanted, torch.float16, products(shape), scale=size)


@each_form
@pytest.mark.parametrize("channels", [1, 3])
def test_bytes_through_the_pass(
    form: Form,
    channels: int,
    device: torch.device,
    fenced: Fenced,
    generator: torch.Generator,
    assert_close: Close,
) -> None:
    """Normalised, then padded; into half precision images and a float32 output."""
    shape = net(3, channels, 21, 22, 24, 5, 4, 2)
    pixel = {1: 1, 3: 4}[channels]
    pictures = torch.randint(0, 256, (3, channels, 21, 22), dtype=torch.uint8, generator=generator)
    mean, std = (torch.rand(channels, generator=generator) + 0.1 for _ in range(2))
    _, weight, bias = random_operands(shape, torch.float16, generator)
    height, width = first_layer.padded(shape, pixel)
    assert (height, width) == (24, {1: 24, 3: 22}[channels])
    room = ChannelsLastShape(3, channels, 21, 22, height, width, pixel)
    rows = fenced((3, height, width * pixel), torch.float16)
    channels_last.channels_last(
        *(pictures.to(device), mean.to(device), std.to(device)),
        *(rows.unflatten(2, (width, pixel)), room, channels_last.default_config(room, None)),
    )()
    config = FirstLayerConfig(form, 2, 64, 64, 0, 64)
    out = fenced((shape.OH, shape.OW, 3, 24), torch.float32)
    packed = first_layer.pack_weight(weight.to(device), shape, pixel, 2)
    first_layer.first_layer(rows, packed, bias.to(device), out, shape, pixel, config)()
    x = rows.unflatten(2, (width, pixel))[:, :21, :22, :channels].permute(0, 3, 1, 2).cpu()
    normalised = (pictures.double() / 255 - mean[:, None, None]) / std[:, None, None]
    assert torch.allclose(x.double(), normalised, rtol=1e-3, atol=1e-3)
    scale = magnitude(x, weight, bias, shape)
    wanted = conv.reference(x, weight, bias, shape)
    assert_close(layout.unpack(out), wanted, torch.float32, products(shape), scale=scale)


# In place


@pytest.mark.parametrize("form", ["images", "rows"])
def test_the_callers_own_images_into_a_view(
    form: Form, device: torch.device, generator: torch.Generator, assert_close: Close
) -> None:
    """A crop of some channels-last images of a larger batch, into rows [OH, N, OW, OC]."""
    shape = net(3, 3, 12, 11, 16, 5, 4, 2)
    x, weight, bias = random_operands(shape, torch.float16, generator)
    many = torch.full((7, 14, 24, 3), torch.nan, dtype=torch.float16, device=device)
    images = many[1:7:2, 1:13, 8:19].permute(0, 3, 1, 2).copy_(x)
    assert first_layer.in_place(images, torch.float16)
    assert first_layer.whole(shape, form)
    config = FirstLayerConfig(form, 2, 16, 32, 0, 64)
    packed = first_layer.pack_weight(weight.to(device), shape, 3, 2)
    rows = layout.empty(shape.OH, 5, shape.OW + 2, 16, torch.float16, device)
    rows = rows.fill_(torch.nan).transpose(1, 2)
    out = rows[:, 1:-1, 1:4]
    numbers = images.permute(0, 2, 3, 1).flatten(2)
    assert numbers.data_ptr() == images.data_ptr(), "nothing was copied"
    first_layer.first_layer(numbers, packed, bias.to(device), out, shape, 3, config)()
    scale = magnitude(x, weight, bias, shape)
    wanted = conv.reference(x, weight, bias, shape)
    assert_close(layout.unpack(out), wanted, torch.float16, products(shape), scale=scale)
    assert int(rows.isnan().sum()) == rows.numel() - out.numel(), "it wrote beside its view"


def test_which_images_can_be_read_in_place() -> None:
    half = torch.float16
    images = torch.zeros(2, 8, 16, 3, dtype=half).permute(0, 3, 1, 2)
    for given_images, dtype, expected in (
        (images, half, True),
        (torch.zeros(2, 1, 8, 16, dtype=half), half, True),  # grey
        (images, torch.float32, False),
        (images.contiguous(), half, False),
        (images[:, :2], half, False),
        (images[..., 1:], half, False),
        (torch.zeros(2, 8, 17, 3, dtype=half).permute(0, 3, 1, 2), half, False),
        (images[:1].expand(2, -1, -1, -1), half, False),
        (images[:, :, :1].expand(-1, -1, 8, -1), half, False),
    ):
        assert first_layer.in_place(given_images, dtype) == expected
    odd = net(2, 3, 9, 16, 8, 3, 2, 1)
    assert [form for form in FORMS if first_layer.whole(odd, form)] == ["images", "pointers"]
    assert all(first_layer.whole(replace(odd, H=8), form) for form in FORMS)


# Bits


@pytest.mark.bits
@pytest.mark.parametrize("name", ["blocks of filters", "two strides"])
def test_forms_agree_bit_for_bit(name: str, run: Run, generator: torch.Generator) -> None:
    """So do other columns and blocks of filters: zeros add nothing."""
    shape, pixel, config = case(name, "images")
    x, weight, bias = random_operands(shape, torch.float32, generator)
    y = run(x, weight, bias, shape, pixel, config)
    for other in (
        replace(config, form="rows"),
        replace(config, form="pointers", BLOCK_M=128),
        replace(config, form="pointers", BLOCK_M=64, columns=1, BLOCK_N=16, BLOCK_N2=0),
    ):
        assert torch.equal(run(x, weight, bias, shape, pixel, other), y), other


@pytest.mark.bits
@each_form
def test_an_image_does_not_see_its_neighbours(
    form: Form, dtype: torch.dtype, run: Run, generator: torch.Generator
) -> None:
    """The same bits wherever in a batch it stands, and from run to run."""
    shape = net(17, 3, 2, 5, 20, 3, 2, 1)
    x, weight, bias = random_operands(shape, dtype, generator)
    config = FirstLayerConfig(form, 2, 16, 64, 0, 32)
    y = run(x, weight, bias, shape, 4, config, "relu")
    order = torch.randperm(shape.N, generator=generator)
    again = run(x[order], weight, bias, shape, 4, config, "relu")
    assert torch.equal(again, y[order])


@pytest.mark.bits
@pytest.mark.parametrize("images", [1, 7])
def test_batch_invariant_configuration(
    images: int, arch: int | None, run: Run, generator: torch.Generator
) -> None:
    """An image gives the same bits alone and in a batch of any size."""
    batch = net(20, 3, 6, 9, 24, 3, 2, 1)
    x, weight, bias = random_operands(batch, torch.float32, generator)
    whole, some = (
        run(
            *(x[: shape.N], weight, bias, shape, 4),
            first_layer.default_config(shape, 4, torch.float32, "ieee", arch, True),
        )
        for shape in (batch, replace(batch, N=images))
    )
    assert torch.equal(some, whole[:images])


@each_form
def test_nan_stays_in_its_image(form: Form, run: Run, generator: torch.Generator) -> None:
    """It reaches what its window reaches, and infinity likewise."""
    shape, pixel, config = case("vgg", form)
    shape = replace(shape, N=3)
    x, weight, bias = random_operands(shape, torch.float32, generator)
    x[1, 2, 4, 5] = torch.nan
    y = run(x, weight, bias, shape, pixel, config)
    assert y[1, :, 3:6, 4:7].isnan().all()
    assert y[[0, 2]].isfinite().all()
    assert y[1, :, :3].isfinite().all()
    assert y[1, :, 6:].isfinite().all()


# Default configurations


@st.composite
def problems(draw: st.DrawFn) -> tuple[Conv2dShape, int]:
    """First layers as large as networks have them, and their pixels; nothing is run on these."""
    kernel = draw(st.integers(1, 11))
    side = draw(st.integers(kernel, 300))
    images = draw(st.sampled_from([0, 1, 2, 63, 64, 100, 127, 128, 1024]))
    channels, filters = draw(st.integers(1, 4)), draw(st.integers(1, 600))
    stride, padding = draw(st.integers(1, 5)), draw(st.integers(0, kernel))
    pixel = draw(st.sampled_from([channels, 1 << (channels - 1).bit_length()]))
    shape = net(images, channels, side, side, filters, kernel, stride, padding)
    assume(first_layer.fits(shape, pixel))
    return shape, pixel


@given(
    problems(),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.sampled_from(["ieee", "tf32"]),
    st.sampled_from([None, 80, 86, 89, 90, 100, 120]),
    st.booleans(),
)
def test_default_configuration(
    problem: tuple[Conv2dShape, int],
    dtype: torch.dtype,
    precision: str,
    arch: int | None,
    invariant: bool,
) -> None:
    shape, pixel = problem
    config = first_layer.default_config(shape, pixel, dtype, precision, arch, invariant)
    second = [config.BLOCK_N2] * bool(config.BLOCK_N2)
    blocks = (config.BLOCK_M, config.BLOCK_N, config.BLOCK_K, *second)
    assert all(block.bit_count() == 1 and block >= 16 for block in blocks)  # what tl.dot wants
    assert config.BLOCK_M * max(config.BLOCK_N, config.BLOCK_K) <= MAX_TILE
    assert config.num_warps in (4, 8)
    reach = first_layer.window(shape, pixel, config.columns)
    assert reach <= first_layer.LARGEST
    if arch is None or arch < 90:
        assert config.form == "pointers"
    if arch is not None:
        rows = config.BLOCK_M + config.BLOCK_N + config.BLOCK_N2
        boxes = -(-reach // config.BLOCK_K)
        tile_bytes = boxes * rows * config.BLOCK_K * dtype.itemsize
        shared = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes; the others have sm_86's
        assert config.num_stages * tile_bytes <= shared.get(arch, 101_376)
    if invariant:
        for n in (1, 65, 5000):
            other = replace(shape, N=n)
            given_config = first_layer.default_config(other, pixel, dtype, precision, arch, True)
            assert given_config == config


def test_what_would_be_silently_wrong_is_refused() -> None:
    shape = net(2, 3, 8, 8, 4, 3, 2, 1)
    config = FirstLayerConfig("rows", 2, 16, 16, 0, 32)
    weight = first_layer.pack_weight(torch.zeros(4, 3, 3, 3), shape, 4, 2)
    images, out = torch.zeros(2, 8, 32), layout.empty(4, 4, 2, 4, torch.float32, "cpu")
    far = torch.empty_strided((4, 4, 2, 4), (2**33, 2**30, 8, 1), device="meta")
    for operand, problem, target, activation, message in (
        (images, replace(shape, groups=3), out, None, "dilated, grouped or wider"),
        (images, replace(shape, dilation=(1, 2)), out, None, "dilated, grouped or wider"),
        (images, replace(shape, KW=16), out, None, "dilated, grouped or wider"),
        (images, replace(shape, OC=5), out, None, r"wanted \(3, 10, 24\).*pack_weight"),
        (torch.zeros(2, 8, 33)[..., :32], shape, out, None, "multiples of 4"),
        (torch.zeros(2, 8, 64)[..., ::2], shape, out, None, "dense numbers"),
        (torch.zeros(2, 7, 32), shape, out, None, r"wanted \[2, 8, 32\] or more"),
        (torch.zeros(2, 9, 36), replace(shape, H=9), out, None, "a multiple of 2 rows"),
        (images, shape, far, None, "2 columns .* 32-bit"),
        (images, shape, out, "gelu", r"first_layer: activation must be one of .* got 'gelu'"),
    ):
        with pytest.raises(ValueError, match=message):
            first_layer.first_layer(operand, weight, None, target, problem, 4, config, activation)
