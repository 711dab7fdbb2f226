"""The pass over the images against float64: any strides in, any out, and zeros beyond."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from alexnet_triton.kernels import channels_last as passing
from alexnet_triton.kernels.channels_last import ChannelsLastConfig, ChannelsLastShape
from alexnet_triton.kernels.jit import MAX_TILE
from hypothesis import given
from hypothesis import strategies as st

Fenced = Callable[[Sequence[int], torch.dtype], torch.Tensor]
Close = Callable[..., None]
Run = Callable[..., torch.Tensor]

MEAN = torch.tensor([0.485, 0.456, 0.406])
STD = torch.tensor([0.229, 0.224, 0.225])


def answer(
    fenced: Fenced,
    images: torch.Tensor,
    shape: ChannelsLastShape,
    dtype: torch.dtype,
    block: int,
    activation: bool = False,
) -> torch.Tensor:
    """The kernel's answer [N, rows, columns, pixel]: in rows, or seen so in an activation."""
    n, rows, columns, pixel = shape.N, shape.rows, shape.columns, shape.pixel
    if activation:
        out = fenced((rows, columns, n, pixel), dtype).permute(2, 0, 1, 3)
    else:
        out = fenced((n, rows, columns * pixel), dtype).unflatten(2, (columns, pixel))
    mean, std = (fenced((shape.C,), torch.float32).copy_(t[: shape.C]) for t in (MEAN, STD))
    passing.channels_last(images, mean, std, out, shape, ChannelsLastConfig(block))()
    return out


def pixels(*size: int, generator: torch.Generator) -> torch.Tensor:
    """Random bytes."""
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)


# Pixels of every kind, [2, 3, 9, 7] each; all but the first are views into something larger.
LAYOUTS: dict[str, Callable[[torch.Generator], torch.Tensor]] = {
    "NCHW": lambda g: pixels(2, 3, 9, 7, generator=g),
    "NHWC": lambda g: pixels(2, 9, 7, 3, generator=g).permute(0, 3, 1, 2),
    "HWNC": lambda g: pixels(9, 7, 2, 3, generator=g).permute(2, 3, 0, 1),
    "crop": lambda g: pixels(4, 5, 14, 12, generator=g)[1:3, 1:4, 2:11, 4:11],
    "every other": lambda g: pixels(4, 6, 18, 14, generator=g)[::2, ::2, ::2, ::2],
    "one image twice": lambda g: pixels(1, 3, 9, 7, generator=g).expand(2, 3, 9, 7),
    "grey": lambda g: pixels(2, 1, 9, 7, generator=g).expand(2, 3, 9, 7),
}

# Where they go; a tile of 64 pixels ends in the middle of all of them.
OUTPUTS = {
    "rows and columns beyond": (ChannelsLastShape(2, 3, 9, 7, 12, 10, 4), False),
    "nothing beyond": (ChannelsLastShape(2, 3, 9, 7, 9, 7, 4), False),
    "activation": (ChannelsLastShape(2, 3, 9, 7, 9, 7, 8), True),
    "pixels of 24": (ChannelsLastShape(2, 3, 9, 7, 10, 7, 24), True),
}


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("where", OUTPUTS)
def test_bytes_in_any_layout_to_every_precision(
    kind: str,
    where: str,
    dtype: torch.dtype,
    device: torch.device,
    run: Run,
    generator: torch.Generator,
    assert_close: Close,
) -> None:
    images = LAYOUTS[kind](generator)
    shape, activation = OUTPUTS[where]
    y = run(images.to(device), shape, dtype, 64, activation)
    wanted = passing.reference(images, MEAN, STD, shape)
    # A byte, a mean and a quotient are rounded: as many steps as a sum of three.
    assert_close(y, wanted, dtype, 3)
    assert torch.equal(y.cpu() == 0, wanted == 0), "zeros are exact, and only beyond the image"


@pytest.mark.parametrize("pitch", [8, 9, 12])
def test_rows_further_apart_than_they_are_long(
    pitch: int, device: torch.device, run: Run, generator: torch.Generator
) -> None:
    """All else being a multiple of 8."""
    images = torch.randn(2, 3, 8, pitch, generator=generator)[..., :8]
    shape = ChannelsLastShape(2, 3, 8, 8, 8, 8, 4)
    y = run(images.to(device), shape, torch.float32, 32).cpu()
    assert torch.equal(y.double(), passing.reference(images, MEAN, STD, shape))


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_any_channels(
    channels: int, device: torch.device, run: Run, generator: torch.Generator, assert_close: Close
) -> None:
    """In the power of two that holds them; several rows a tile."""
    images = pixels(3, channels, 5, 6, generator=generator)
    pixel = {1: 1, 2: 2, 3: 4}[channels]
    shape = ChannelsLastShape(3, channels, 5, 6, 8, 8, pixel)
    y = run(images.to(device), shape, torch.float32, 32)
    mean, std = MEAN[:channels], STD[:channels]
    assert_close(y, passing.reference(images, mean, std, shape), torch.float32, 3)


def test_floats_are_taken_as_normalised(
    dtype: torch.dtype, device: torch.device, run: Run, generator: torch.Generator
) -> None:
    """And only moved: to the bit, NaN too, through a view."""
    images = torch.randn(2, 9, 9, 3, generator=generator).to(dtype).permute(0, 3, 1, 2)[..., 1:8]
    images[1, 2, 3, 4] = torch.nan
    shape, _ = OUTPUTS["rows and columns beyond"]
    y = run(images.to(device), shape, dtype, 64).cpu()
    wanted = passing.reference(images, MEAN, STD, shape)
    assert int(wanted.isnan().sum()) == 1
    assert torch.equal(y.isnan(), wanted.isnan())
    assert torch.equal(y.double().nan_to_num(), wanted.nan_to_num())


def test_writes_beside_nothing(device: torch.device, generator: torch.Generator) -> None:
    """Into some images of a larger batch, between other pixels."""
    images = torch.randn(2, 3, 4, 5, generator=generator).to(device)
    many = torch.full((5, 6, 9, 4), torch.nan, device=device)
    out = many[1:5:2, 1:, 2:7]
    shape = ChannelsLastShape(2, 3, 4, 5, 5, 5, 4)
    zero = torch.zeros(3, device=device)
    passing.channels_last(images, zero, zero, out, shape, ChannelsLastConfig(32))()
    assert torch.equal(out.cpu().double(), passing.reference(images.cpu(), MEAN, STD, shape))
    assert int(many.isnan().sum()) == many.numel() - out.numel()


@given(
    st.integers(0, 300),
    st.integers(1, 40),
    st.integers(1, 300),
    st.sampled_from([None, 80, 90, 100, 120]),
)
def test_default_configuration(n: int, channels: int, side: int, arch: int | None) -> None:
    shape = ChannelsLastShape(n, channels, side, side, side, side, channels)
    config = passing.default_config(shape, arch)
    assert config.BLOCK.bit_count() == 1
    assert config.BLOCK * channels <= MAX_TILE
    assert arch is None or config.BLOCK * channels <= 8192


def test_what_would_be_silently_wrong_is_refused() -> None:
    shape = ChannelsLastShape(2, 3, 5, 6, 8, 8, 4)
    images, config = torch.zeros(2, 3, 5, 6), ChannelsLastConfig(32)
    for out, problem in (
        (torch.zeros(2, 8, 8, 8)[..., ::2], shape),
        (torch.zeros(2, 8, 8, 6)[..., :4], shape),
        (torch.zeros(2, 8, 7, 4), shape),
        (torch.zeros(2, 8, 8, 2), ChannelsLastShape(2, 3, 5, 6, 8, 8, 2)),
        (torch.zeros(2, 4, 8, 4), ChannelsLastShape(2, 3, 5, 6, 4, 8, 4)),
    ):
        with pytest.raises(ValueError, match=r"channels_last: out .* wanted .* in steps of"):
            passing.channels_last(images, MEAN, STD, out, problem, config)
    many = ChannelsLastShape(2**22, 3, 600, 1, 601, 1, 4)
    pictures = torch.empty((2**22, 3, 600, 1), dtype=torch.uint8, device="meta")
    out = torch.empty((2**22, 601, 1, 4), device="meta")
    with pytest.raises(ValueError, match=r"channels_last: 2520776704 rows .* smaller batch"):
        passing.channels_last(pictures, MEAN, STD, out, many, config)


def test_work() -> None:
    shape = ChannelsLastShape(2, 3, 9, 7, 12, 8, 4)
    work = passing.work(shape, torch.uint8, torch.float16)
    assert work.flops == 2 * (2 * 3 * 9 * 7)
    assert work.bytes == 2 * 3 * 9 * 7 + 2 * (2 * 12 * 8 * 4)
    assert passing.work(shape, torch.float16, torch.float16).flops == 0
