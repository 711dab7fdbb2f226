"""[H, W, N, C] activations: there and back, aligned, and refused when they are something else."""

from __future__ import annotations

import pytest
import torch
from alexnet_triton.kernels import layout
from hypothesis import given
from hypothesis import strategies as st

sizes = st.tuples(st.integers(0, 3), st.integers(1, 20), st.integers(1, 4), st.integers(1, 4))
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.uint8])


@given(sizes, dtypes)
def test_pack_and_unpack(size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    n, c, h, w = size
    images = torch.arange(n * c * h * w).reshape(size).to(dtype)
    activation = layout.pack(images)
    assert activation.shape == (h, w, n, c)
    assert activation.dtype == dtype
    assert torch.equal(activation, images.permute(2, 3, 0, 1))
    back = layout.unpack(activation)
    assert back.is_contiguous()
    assert torch.equal(back, images)


def test_pack_takes_any_strides(generator: torch.Generator) -> None:
    images = torch.randn(4, 9, 8, 6, generator=generator)
    for view in (
        images.permute(0, 3, 1, 2),
        images[1:3, ::2, :, 2:],
        images[:1].expand(3, 9, 8, 6),
    ):
        assert torch.equal(layout.unpack(layout.pack(view)), view)


@given(sizes, st.sampled_from([torch.float32, torch.float16]))
def test_every_image_starts_at_a_multiple_of_16_bytes(
    size: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    """What the tensor memory accelerator asks of strides and of the start."""
    n, c, h, w = size
    activation = layout.empty(h, w, n, c, dtype, "cpu")
    pitch = layout.pitch(activation)
    assert c <= pitch < c + 8
    assert pitch * dtype.itemsize % 16 == 0
    assert activation.data_ptr() % 16 == 0
    if n:
        assert activation.stride() == (w * n * pitch, n * pitch, pitch, 1)


@pytest.mark.parametrize(
    "stranger",
    [
        torch.empty(2, 3, 4, 5),  # dense, not aligned
        torch.empty(2, 3, 4, 16)[..., :5],  # aligned, but too wide
        torch.empty(4, 8, 2, 3).permute(2, 3, 0, 1),  # packed by permuting alone
        torch.empty(2, 3, 8, 8)[:, :, ::2],  # every other image
        torch.empty(2, 6, 4, 8)[:, ::2],  # every other column
        torch.empty(2, 6, 4, 8)[:, :3],  # some columns
    ],
    ids=["dense", "wide", "permuted", "images", "columns", "crop"],
)
def test_another_layout_is_refused(stranger: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"wanted images 8 elements apart .* layout\.pack") as e:
        layout.pitch(stranger)
    assert f"{tuple(stranger.shape)} has strides {stranger.stride()}" in str(e.value)
    assert "\n" not in str(e.value)


def test_aligned() -> None:
    assert [layout.aligned(c) for c in (0, 1, 7, 8, 9, 16, 17)] == [0, 8, 8, 8, 16, 16, 24]


def test_more_rows_than_32_bits_count_are_refused() -> None:
    """The last tile is numbered to its end, so one more tile must fit."""
    layout.check_rows("linear", 2**31 - 64, 64)
    with pytest.raises(ValueError, match="linear: 2147483585 rows are more than a 32-bit index"):
        layout.check_rows("linear", 2**31 - 63, 64)
