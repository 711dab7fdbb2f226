"""The stem against float64: pixels in any layout, zeros at the border, and the folded filter."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from alexnet_triton.kernels import conv, layout, stem
from alexnet_triton.kernels.conv import Conv2dShape
from alexnet_triton.kernels.stem import StemConfig, StemShape

Fenced = Callable[[Sequence[int], torch.dtype], torch.Tensor]
Close = Callable[..., None]
Run = Callable[..., torch.Tensor]

MEAN = torch.tensor([0.485, 0.456, 0.406])
STD = torch.tensor([0.229, 0.224, 0.225])


# 9x7 pixels fold by 2 into 6x5, with a border on every side.
SHAPE = StemShape(N=2, C=3, H=9, W=7, OH=6, OW=5, S=2, padding=(1, 2))
TILE = StemConfig(16)


def answer(
    fenced: Fenced,
    images: torch.Tensor,
    shape: StemShape,
    dtype: torch.dtype,
    config: StemConfig,
    mean: torch.Tensor = MEAN,
    std: torch.Tensor = STD,
) -> torch.Tensor:
    """The kernel's answer as an activation [OH, OW, N, S*S*C]; `images` lie on their device."""
    out = fenced((shape.OH, shape.OW, shape.N, shape.S**2 * shape.C), dtype)
    mean, std = (fenced(c.shape, torch.float32).copy_(c) for c in (mean, std))
    stem.stem(images, mean, std, out, shape, config)()
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


@pytest.mark.parametrize("kind", LAYOUTS)
def test_bytes_in_any_layout_to_every_precision(
    kind: str,
    dtype: torch.dtype,
    device: torch.device,
    run: Run,
    generator: torch.Generator,
    assert_close: Close,
) -> None:
    images = LAYOUTS[kind](generator)
    y = run(images.to(device), SHAPE, dtype, TILE)
    # A byte, a mean and a quotient are rounded: as many steps as a sum of three.
    assert_close(layout.unpack(y), stem.reference(images, MEAN, STD, SHAPE), dtype, 3)


def test_floats_are_taken_as_normalised(
    dtype: torch.dtype, device: torch.device, run: Run, generator: torch.Generator
) -> None:
    """And only moved: to the bit, NaN too, through a view."""
    images = torch.randn(2, 9, 9, 3, generator=generator).to(dtype).permute(0, 3, 1, 2)[..., 1:8]
    images[1, 2, 3, 4] = torch.nan
    y = layout.unpack(run(images.to(device), SHAPE, dtype, TILE)).cpu()
    wanted = stem.reference(images, MEAN, STD, SHAPE)
    assert int(wanted.isnan().sum()) == 1
    assert torch.equal(y.isnan(), wanted.isnan())
    assert torch.equal(y.double().nan_to_num(), wanted.nan_to_num())


# Folding


@pytest.mark.parametrize(
    ("stride", "kernel"),
    [(1, (3, 2)), (2, (4, 2)), (2, (3, 7)), (3, (5, 1)), (4, (8, 4)), (4, (11, 11)), (4, (3, 2))],
)
@pytest.mark.parametrize("padding", [(0, 0, 0, 0), (2, 1, 0, 3)])
def test_folded_convolution_equals_the_original(
    stride: int,
    kernel: tuple[int, int],
    padding: tuple[int, int, int, int],
    device: torch.device,
    arch: int | None,
    fenced: Fenced,
    run: Run,
    generator: torch.Generator,
    assert_close: Close,
) -> None:
    """Filters that the stride divides and that it does not, on an image that it does not."""
    problem = Conv2dShape(2, 3, 15, 17, 10, *kernel, stride=(stride, stride), padding=padding)
    shape, folded = stem.fold(problem)
    assert (folded.OH, folded.OW) == (problem.OH, problem.OW)
    assert folded.stride == (1, 1)

    images = pixels(2, 3, 15, 17, generator=generator)
    weight = torch.randn(10, 3, *kernel, generator=generator)
    bias = torch.randn(10, generator=generator)
    config = stem.default_config(shape, arch)
    y = run(images.to(device), shape, torch.float32, config)
    out = fenced((folded.OH, folded.OW, 2, 10), torch.float32)
    packed = conv.pack_weight(stem.pack_weight(weight, stride).to(device))
    tiles = conv.default_config(folded, torch.float32, "ieee", arch)
    conv.conv2d(y, packed, bias.to(device), out, folded, tiles)()

    normalised = (images.double() / 255 - MEAN[:, None, None]) / STD[:, None, None].double()
    wanted = conv.reference(normalised, weight, bias, problem)
    scale = conv.reference(normalised.abs(), weight.abs(), bias.abs(), problem)
    reduction = 3 * kernel[0] * kernel[1]
    assert_close(layout.unpack(out), wanted, torch.float32, reduction, scale=scale)


@pytest.mark.parametrize(
    "problem",
    [
        Conv2dShape(1, 4, 9, 9, 4, 3, 3, stride=(2, 1)),
        Conv2dShape(1, 4, 9, 9, 4, 3, 3, dilation=(1, 2)),
        Conv2dShape(1, 4, 9, 9, 4, 3, 3, groups=2),
    ],
    ids=["two strides", "dilation", "groups"],
)
def test_what_does_not_fold_stays_as_it_is(problem: Conv2dShape) -> None:
    """Its stem only normalises."""
    shape, left = stem.fold(problem)
    assert left == problem
    assert shape == StemShape(problem.N, problem.C, problem.H, problem.W, 9, 9, 1, (0, 0))


def test_work() -> None:
    work = stem.work(SHAPE, torch.uint8, torch.float16)
    assert work.flops == 2 * (2 * 3 * 9 * 7)
    assert work.bytes == 2 * 3 * 9 * 7 + 2 * (2 * 12 * 6 * 5)
    assert stem.work(SHAPE, torch.float16, torch.float16).flops == 0
