"""From anything called an image to pixels: the preset, the layouts, the sources, the refusals."""

from __future__ import annotations

import functools
import gc
import importlib
import io
import math
import os
import pickle
import socket
import struct
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from alexnet_triton.engine import images
from alexnet_triton.engine.images import ImageError, Source, to_batch
from alexnet_triton.engine.spec import Preprocess
from alexnet_triton.engine.zoo import ALEXNET, NETWORKS
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

SMALL = Preprocess(resize=32, crop=28, mean=(0.5,) * 3, std=(0.5,) * 3)
Pixels = np.ndarray[Any, Any]


def noise(height: int, width: int, seed: int = 0) -> Pixels:
    """Random pixels smoothed by a gradient, so that shifts by one show."""
    random = np.random.default_rng(seed).integers(0, 256, (height, width, 3))
    ramp = np.linspace(0, 255, height * width * 3).reshape(height, width, 3)
    return ((random + ramp) / 2).astype(np.uint8)


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(noise(height, width, seed))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def refusal(call: Callable[[], object]) -> str:
    """The message of the ImageError that `call` raises; it must be one line."""
    with pytest.raises(ImageError) as caught:
        call()
    message = str(caught.value)
    assert message.isprintable(), message
    return message


def torchvision_models() -> Any:
    """torchvision where it imports; beside another build of torch it raises RuntimeError."""
    try:
        return importlib.import_module("torchvision.models")
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torchvision does not import: {error}")


# The preset


def bilinear(old: int, new: int) -> Pixels:
    """[new, old]: linear interpolation, its triangle as wide as the step when shrinking."""
    step = old / new
    centres = (np.arange(new) + 0.5) * step
    distances = np.abs(np.arange(old) + 0.5 - centres[:, None])
    weights = np.clip(1 - distances / max(step, 1), 0, None)
    normalised: Pixels = weights / weights.sum(1, keepdims=True)
    return normalised


def reference_preset(pixels: Pixels, preprocess: Preprocess) -> Pixels:
    """torchvision's rule once more, in float64."""
    height, width, _ = pixels.shape
    resize, crop = preprocess.resize, preprocess.crop
    if width <= height:
        new_height, new_width = int(resize * height / width), resize
    else:
        new_height, new_width = resize, int(resize * width / height)
    rows, columns = bilinear(height, new_height), bilinear(width, new_width)
    resized = np.einsum("ph,qw,hwc->pqc", rows, columns, pixels, optimize=True)
    # Pad to the crop (the smaller half first), then cut it out of the middle, half to even.
    missing = [max(crop - side, 0) for side in resized.shape[:2]]
    padded = np.pad(resized, [*((side // 2, side - side // 2) for side in missing), (0, 0)])
    top, left = (round((side - crop) / 2.0) for side in padded.shape[:2])
    return padded[top : top + crop, left : left + crop]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.integers(1, 45))
@example(300, 200, 256, 224)
@example(375, 500, 256, 224)
@example(257, 256, 256, 224)
@example(256, 301, 256, 224)
@example(20, 30, 256, 224)
@example(640, 97, 256, 224)
@example(41, 67, 20, 33)
@example(67, 40, 20, 32)
def test_preset_scales_rounds_and_pads(height: int, width: int, resize: int, crop: int) -> None:
    pixels, preprocess = noise(height, width), Preprocess(resize, crop, SMALL.mean, SMALL.std)
    got = images.preset(Image.fromarray(pixels), preprocess)
    assert got.dtype == np.uint8
    assert got.shape == (crop, crop, 3)
    # Pillow rounds after each of its two passes, the reference never does.
    assert np.abs(got - reference_preset(pixels, preprocess)).max() <= 1.0 + 1e-6


def test_preset_leaves_an_image_of_that_size_alone() -> None:
    pixels = noise(32, 32)
    assert np.array_equal(images.preset(Image.fromarray(pixels), SMALL), pixels[2:30, 2:30])


@pytest.mark.parametrize("size", [(300, 200), (200, 301), (20, 30), (256, 256), (9, 400)])
def test_preset_equals_torchvision(size: tuple[int, int]) -> None:
    models = torchvision_models()
    image = picture(*size)
    wanted = models.AlexNet_Weights.IMAGENET1K_V1.transforms()(image)
    preprocess = ALEXNET.preprocess
    pixels = torch.from_numpy(images.preset(image, preprocess)).permute(2, 0, 1)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (preprocess.mean, preprocess.std))
    assert torch.equal((pixels.float() / 255 - mean) / std, wanted)


@pytest.mark.parametrize("size", [(1, 100_000), (100_000, 1)])
def test_preset_refuses_a_thread(size: tuple[int, int]) -> None:
    message = refusal(lambda: images.preset(picture(*size), ALEXNET.preprocess, "thread"))
    assert message.startswith("thread: is ")
    assert "25600000" in message
    assert "PIL.Image.MAX_IMAGE_PIXELS" in message


def test_preset_refuses_an_image_without_pixels() -> None:
    message = refusal(lambda: to_batch([Image.new("RGB", (0, 5))], SMALL))
    assert message == "image 0: is 0x5 pixels: nothing to see"


# Encoded images


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *[("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("GIF", "P"), ("GIF", "L")],
        *[("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "LA"), ("PNG", "P"), ("PNG", "1")],
        *[("BMP", "RGB"), ("TIFF", "RGB"), ("TIFF", "CMYK"), ("PPM", "RGB"), ("WEBP", "RGB")],
    ],
)
def test_formats_and_modes_come_out_as_rgb(kind: str, mode: str, tmp_path: Path) -> None:
    path = tmp_path / f"picture.{kind.lower()}"
    path.write_bytes(encoded(picture(40, 50).convert(mode), kind))
    with Image.open(path) as opened:
        wanted = images.preset(opened.convert("RGB"), SMALL)
    from_path = to_batch(path, SMALL)
    assert from_path.shape == (1, 3, 28, 28)
    assert from_path.dtype is torch.uint8
    assert np.array_equal(from_path[0].permute(1, 2, 0).numpy(), wanted)
    for same in (str(path), path.read_bytes(), Source(str(path), named=True)):
        assert torch.equal(to_batch(same, SMALL), from_path)


def test_alpha_is_dropped_and_deep_grey_clipped_as_pillow_does() -> None:
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert images.decode(encoded(clear, "PNG"), "x").getpixel((0, 0)) == (10, 20, 30)
    deep = Image.fromarray(np.array([[3, 255], [256, 65535]], dtype=np.uint16))
    grey = np.asarray(images.decode(encoded(deep, "PNG"), "x"))[..., 0]
    assert grey.tolist() == [[3, 255], [255, 255]]


def test_the_first_frame_is_taken() -> None:
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    gif = encoded(red, "GIF", save_all=True, append_images=[blue])
    assert images.decode(gif, "x").getpixel((4, 4)) == (255, 0, 0)


def test_a_pil_image_is_taken_in_any_mode_and_left_as_it_was(tmp_path: Path) -> None:
    grey = picture(40, 50).convert("L")
    assert to_batch(grey, SMALL).shape == (1, 3, 28, 28)
    assert grey.mode == "L"
    grey.save(tmp_path / "lazy.png")
    with Image.open(tmp_path / "lazy.png") as lazy:
        assert torch.equal(to_batch(lazy, SMALL), to_batch(grey, SMALL))


# Encoded images that are none


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "PPM", "WEBP"])
@pytest.mark.parametrize("kept", [0.98, 0.6, 0.1])
def test_a_truncated_image_is_an_error_not_grey_pixels(kind: str, kept: float) -> None:
    data = encoded(picture(80, 90), kind)
    message = refusal(lambda: images.decode(data[: int(len(data) * kept)], f"cut.{kind}"))
    assert message.startswith(f"cut.{kind}: ")


def test_a_file_that_is_no_image_says_why(tmp_path: Path) -> None:
    picture(4, 4).save(tmp_path / "a.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("no pixels here")
    (tmp_path / "x.eps").write_bytes(encoded(picture(8, 8), "EPS"))
    reasons = {
        tmp_path / "empty.jpg": "is empty",
        tmp_path / "text.jpg": "is not in an image format that Pillow reads",
        tmp_path / "x.eps": "is EPS, which is a program to run; wanted a raster image",
        tmp_path / "gone.png": "cannot be opened: No such file or directory",
        tmp_path / "a.png" / "b.png": "cannot be opened: Not a directory",
        tmp_path / "loop.png": "cannot be opened: Too many levels of symbolic links",
        tmp_path / "n\0ul.png": "cannot be opened: embedded null byte",
        tmp_path: "wanted an image file, got a folder",
        tmp_path / "pipe.png": "wanted an image file, got a device, pipe or socket",
        Path(os.devnull): "wanted an image file, got a device, pipe or socket",
    }
    for path, reason in reasons.items():
        message = refusal(functools.partial(to_batch, path, SMALL))
        assert message == f"{path!s}: {reason}".replace("\0", "\\x00")


@pytest.mark.parametrize("action", ["ignore", "error"])
@pytest.mark.parametrize("over", [1.5, 3])
def test_a_decompression_bomb_is_refused(over: float, action: Any) -> None:
    # Up to twice the limit Pillow only warns, whatever the caller does with warnings we refuse.
    assert Image.MAX_IMAGE_PIXELS is not None
    side = math.isqrt(int(Image.MAX_IMAGE_PIXELS * over))
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        message = refusal(lambda: images.decode(b"P6 %d %d 255\n" % (side, side), "bomb.png"))
    assert message.startswith("bomb.png: ")
    assert "limit" in message
    assert "PIL.Image.MAX_IMAGE_PIXELS" in message


def test_pillows_limit_can_be_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(picture(40, 40), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1599)
    with pytest.warns(Image.DecompressionBombWarning):
        assert "limit is 1599" in refusal(lambda: images.decode(data, "x"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert images.decode(data, "x").size == (40, 40)


def test_a_closed_pil_image_is_named(tmp_path: Path) -> None:
    picture(8, 8).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as closed:
        pass
    message = refusal(lambda: to_batch([picture(8, 8), closed], SMALL))
    assert message.startswith("image 1: cannot be decoded: ")


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP"]), st.data())
def test_damaged_bytes_give_pixels_or_an_image_error(kind: str, data: st.DataObject) -> None:
    good = bytearray(encoded(picture(12, 17), kind))
    for _ in range(data.draw(st.integers(1, 6))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about what it found odd
        (loaded,) = images.load_each([bytes(good)], SMALL)
    assert isinstance(loaded, ImageError) or loaded.shape == (3, 28, 28)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_no_file_is_left_open(tmp_path: Path, url: str) -> None:
    good = encoded(picture(40, 40), "PNG")
    for name, data in {"bad.png": good[:900], "good.png": good, "none.png": b"none"}.items():
        (tmp_path / name).write_bytes(data)
    urls = [f"{url}/good.png", f"{url}/garbage", f"{url}/missing", f"{url}/cut"]
    gc.collect()
    before = open_files()
    kept = []  # errors, whose tracebacks would keep a file alive that is not closed
    for source in [*(str(path) for path in sorted(tmp_path.iterdir())), *urls]:
        try:
            images.decode(source, source)
        except ImageError as error:
            kept.append(error)
    with pytest.raises(ImageError) as long:
        images.fetch(f"{url}/long", limit=1 << 16)
    assert [error.item for error in [*kept, long.value]] == [
        *[str(tmp_path / "bad.png"), str(tmp_path / "none.png")],
        *[f"{url}/{name}" for name in ("garbage", "missing", "cut", "long")],
    ]
    deadline = time.monotonic() + 300  # the server's ends of the sockets are ours, too
    while open_files() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert open_files() <= before


# Messages


def test_a_message_is_one_line_whatever_the_name_holds() -> None:
    error = ImageError("a\nb\x1b[2J\udcff.png", "line\r\nend")
    assert str(error) == "a\\nb\\x1b[2J\\udcff.png: line\\r\\nend"
    assert error.item == "a\nb\x1b[2J\udcff.png"


def test_an_image_error_crosses_processes() -> None:
    error = pickle.loads(pickle.dumps(ImageError("a.png", "is empty")))
    assert (error.item, error.reason, str(error)) == ("a.png", "is empty", "a.png: is empty")


# Tensors and arrays

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", [torch.uint8, *FLOATS])
def test_layouts_of_a_tensor(dtype: torch.dtype) -> None:
    nchw = torch.from_numpy(np.stack([noise(5, 7, seed) for seed in range(2)])).to(dtype)
    nchw = nchw.permute(0, 3, 1, 2).contiguous()
    for given_ in (nchw, nchw.permute(0, 2, 3, 1), nchw.permute(0, 2, 3, 1).contiguous()):
        batch = to_batch(given_, SMALL)
        assert torch.equal(batch, nchw)
        assert batch.dtype is dtype
        assert batch.data_ptr() == given_.data_ptr()
    for given_ in (nchw[1], nchw[1].permute(1, 2, 0)):
        batch = to_batch(given_, SMALL)
        assert torch.equal(batch, nchw[1:])
        assert batch.data_ptr() == given_.data_ptr()
    both = torch.rand(2, 3, 5, 3)  # either axis could be the channels
    assert torch.equal(to_batch(both, SMALL), both)
    assert torch.equal(to_batch(both[0], SMALL), both[:1])


@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32", "float64"])
def test_layouts_of_an_array(dtype: str) -> None:
    nhwc = np.stack([noise(5, 7, seed) for seed in range(2)]).astype(dtype)
    wanted = torch.from_numpy(nhwc.transpose(0, 3, 1, 2).copy())
    batch = to_batch(nhwc, SMALL)
    assert torch.equal(batch, wanted)
    assert batch.data_ptr() == nhwc.ctypes.data
    assert torch.equal(to_batch(nhwc.transpose(0, 3, 1, 2), SMALL), wanted)
    assert torch.equal(to_batch(nhwc[1], SMALL), wanted[1:])


def test_arrays_that_torch_cannot_view_are_copied_without_a_word() -> None:
    rgb = noise(5, 7)
    wanted = torch.from_numpy(rgb.copy()).permute(2, 0, 1)[None]
    frozen = rgb.copy()
    frozen.flags.writeable = False
    records = np.zeros((5, 7, 3), dtype=[("pad", "u1"), ("value", "<f4")])
    records["value"] = rgb
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(to_batch(frozen, SMALL), wanted)
        assert torch.equal(to_batch(np.asarray(Image.fromarray(rgb)), SMALL), wanted)
        assert torch.equal(to_batch(rgb[..., ::-1], SMALL), wanted.flip(1))
        assert torch.equal(to_batch(rgb.astype(">f4"), SMALL), wanted.float())
        assert torch.equal(to_batch(records["value"], SMALL), wanted.float())


def test_nothing_is_an_empty_batch() -> None:
    for shape in ((0, 3, 9, 8), (0, 9, 8, 3)):
        batch = to_batch(torch.empty(shape, dtype=torch.float16), SMALL)
        assert (batch.shape, batch.dtype) == ((0, 3, 9, 8), torch.float16)
    nothings: list[Iterable[Pixels]] = [[], (), iter([])]
    for nothing in nothings:
        batch = to_batch(nothing, SMALL)
        assert (batch.shape, batch.dtype) == ((0, 3, 28, 28), torch.uint8)


def test_images_that_require_grad_are_refused_where_it_would_be_dropped() -> None:
    wants = torch.rand(1, 3, 4, 4, requires_grad=True)
    calls: list[Callable[[], object]] = [
        lambda: to_batch(wants, SMALL),
        lambda: to_batch([wants[0]], SMALL),
        lambda: to_batch(wants * 2, SMALL),
    ]
    for call in calls:
        assert "requires grad" in refusal(call)
        assert "detach()" in refusal(call)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert not to_batch(wants, SMALL).requires_grad
    assert torch.equal(to_batch(wants.detach(), SMALL), wants.detach())


OTHER_DTYPES: list[torch.dtype | str] = [
    *(torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn),
    *("uint16", "int32", "bool", "complex128", "object", "str", "V0"),
]


@pytest.mark.parametrize("dtype", OTHER_DTYPES)
def test_other_dtypes_are_refused_by_name(dtype: torch.dtype | str) -> None:
    odd: Any
    if isinstance(dtype, str):
        odd = np.empty((1, 3, 4, 4), dtype)
    else:
        odd = torch.empty(1, 3, 4, 4, dtype=dtype)
    name = str(getattr(odd.dtype, "name", odd.dtype)).removeprefix("torch.")
    floats = "float16, float32, float64, bfloat16"
    assert refusal(lambda: to_batch(odd, SMALL)) == (
        f"images: wanted uint8 pixels or normalised floats ({floats}), got {name}"
    )


@pytest.mark.parametrize(
    "shape", [(), (3,), (224, 224), (1, 28, 28), (28, 28, 4), (2, 1, 28, 28), (2, 28, 28, 4)]
)
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    message = refusal(lambda: to_batch(torch.zeros(shape, dtype=torch.uint8), SMALL))
    assert message == (
        "images: wanted shape [N, 3, H, W] or [N, H, W, 3], N left out for one image, "
        f"got {list(shape)}"
    )
    message = refusal(lambda: to_batch([np.zeros(shape, dtype="f4")], SMALL))
    assert message == f"image 0: wanted shape [3, H, W] or [H, W, 3], got {list(shape)}"


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_without_dense_values_are_refused() -> None:
    ragged = [torch.zeros(3, 4, 4), torch.zeros(3, 5, 5)]
    odd: list[torch.Tensor] = [
        torch.zeros(1, 3, 4, 4).to_sparse(),
        torch.nested.nested_tensor(ragged),
        torch.zeros(1, 3, 4, 4, device="meta"),
    ]
    for tensor in odd:
        for given_ in (tensor, [tensor], [[tensor, 5]]):
            assert "wanted" in refusal(functools.partial(to_batch, given_, SMALL))


def test_a_dataloaders_batches_are_a_stream_of_images() -> None:
    pixels = torch.from_numpy(np.stack([noise(28, 28, seed) for seed in range(5)]))
    pixels = pixels.permute(0, 3, 1, 2)
    labels = torch.arange(5)
    dataset = torch.utils.data.TensorDataset(pixels, labels)
    streams: list[Iterable[Any]] = [
        torch.utils.data.DataLoader(dataset, batch_size=2),
        [dataset[index] for index in range(5)],  # image and label one by one
        [pixels[:3], pixels[3:]],
        [(pixels[:3], ["a", "b", "c"]), [pixels[3:]]],
        [(pixels[:3], {"at": labels[:3], "file": ["x.png"] * 3}), (pixels[3:], None, 0.5)],
        [pixels[:3].permute(0, 2, 3, 1).numpy(), pixels[3], pixels[4:].numpy()],
    ]
    for stream in streams:
        assert torch.equal(to_batch(stream, SMALL), pixels)
        got = list(images.load_each(stream, SMALL))
        assert [isinstance(item, torch.Tensor) for item in got] == [True] * 5


def test_no_image_is_dropped_for_a_label() -> None:
    """What looks like images behind a batch is no label: whatever it is, it is not left out."""
    one = torch.zeros(3, 28, 28)
    behind: list[Any] = [one, one[None], np.zeros((2, 28, 28)), picture(4, 4), GOOD, Path("a.png")]
    behind += [
        Source("a.png", named=True),
        ImageError("a", "b"),
        one.to_sparse(),
        [one],
        {"x": one},
    ]
    pairs = [
        kind([first, x]) for kind in (list, tuple) for first in (one, one[None]) for x in behind
    ]
    for pair in pairs:
        assert "got " + type(pair).__name__ in refusal(lambda: to_batch([pair], SMALL))  # noqa: B023


def test_a_bad_batch_costs_its_own_place() -> None:
    good = torch.zeros(2, 3, 28, 28)
    stream = [good, torch.zeros(2, 1, 28, 28), good]
    kinds = [isinstance(item, ImageError) for item in images.load_each(stream, SMALL)]
    assert kinds == [False, False, True, False, False]


@pytest.mark.parametrize("thing", [5, None, [5], [[picture(4, 4)]]])
def test_things_that_are_no_image_are_refused(thing: Any) -> None:
    got = type(thing[0] if isinstance(thing, list) else thing).__name__
    message = refusal(lambda: to_batch(thing, SMALL))
    assert message == (f"image 0: wanted a path, URL, bytes, PIL image, array or tensor, got {got}")


# Lists


def test_a_list_may_mix_whatever_comes_out_alike(tmp_path: Path) -> None:
    picture(40, 50).save(tmp_path / "a.png")
    chw = torch.from_numpy(noise(28, 28)).permute(2, 0, 1)
    mixed: list[images.Item] = [
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        picture(40, 50),
        chw,
        noise(28, 28),
    ]
    batch = to_batch(mixed, SMALL)
    assert batch.shape == (5, 3, 28, 28)
    assert torch.equal(batch[0], batch[1])
    assert torch.equal(batch[0], batch[2])
    assert torch.equal(batch[3], chw)
    assert torch.equal(batch[4], chw)
    assert torch.equal(to_batch(tuple(mixed), SMALL), batch)
    assert torch.equal(to_batch(iter(mixed), SMALL), batch)


def test_a_bad_item_costs_itself_alone(tmp_path: Path) -> None:
    picture(40, 50).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"")
    items: list[Any] = [
        *[tmp_path / "bad.png", torch.zeros(3, 4), tmp_path / "good.png", noise(27, 28)],
        *[noise(28, 28).astype("f4"), 5, ImageError("earlier", "was bad"), picture(40, 50)],
    ]
    loaded = list(images.load_each(items, SMALL))
    said = [str(item) if isinstance(item, ImageError) else item.shape for item in loaded]
    like = f"uint8 [3, 28, 28] on cpu like {tmp_path / 'good.png'}"
    assert said == [
        f"{tmp_path / 'bad.png'}: is empty",
        "image 1: wanted shape [3, H, W] or [H, W, 3], got [3, 4]",
        (3, 28, 28),
        f"image 3: wanted {like}, got uint8 [3, 27, 28] on cpu",
        f"image 4: wanted {like}, got float [3, 28, 28] on cpu",
        "image 5: wanted a path, URL, bytes, PIL image, array or tensor, got int",
        "earlier: was bad",
        (3, 28, 28),
    ]


def test_an_error_that_is_kept_keeps_no_pixels_alive() -> None:
    data = encoded(picture(80, 90), "PNG")
    (error,) = images.load_each([data[:-2000]], SMALL)
    assert isinstance(error, ImageError)
    assert (error.__traceback__, error.__cause__, error.__context__) == (None, None, None)


def test_load_each_takes_what_to_batch_takes(tmp_path: Path) -> None:
    picture(40, 50).save(tmp_path / "a.png")
    for whole in (np.stack([noise(5, 7), noise(5, 7, 1)]), noise(5, 7), tmp_path / "a.png"):
        each = [item for item in images.load_each(whole, SMALL) if not isinstance(item, ImageError)]
        assert torch.equal(torch.stack(each), to_batch(whole, SMALL))
    refusal(lambda: list(images.load_each(torch.zeros(2, 4, 5, 5), SMALL)))


# The command line's sources


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Empty files: what is found is a matter of names."""
    for name in (
        "b.JPG",
        "a.png",
        "sub/d.webp",
        "sub/deep/c.tiff",
        "sub/readme.txt",
        ".hidden.png",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "x.png").touch()
    return tmp_path


def found(folder: Path, *sources: str) -> list[str]:
    """What `expand` finds, without the folder's name, all of it unnamed."""
    items = list(images.expand(f"{folder}/{source}" for source in sources))
    assert all(isinstance(item, Source) and not item.named for item in items)
    return [os.path.relpath(item.location, folder) for item in items if isinstance(item, Source)]


def test_a_folder_gives_its_images_sorted(folder: Path) -> None:
    assert found(folder, "") == ["a.png", "b.JPG", "sub/d.webp", "sub/deep/c.tiff"]
    assert found(folder, "sub", "") == [
        *["sub/d.webp", "sub/deep/c.tiff"],
        *["a.png", "b.JPG", "sub/d.webp", "sub/deep/c.tiff"],
    ]


def test_a_glob_gives_the_images_it_matches(folder: Path) -> None:
    (folder / "folder.png").mkdir()
    assert found(folder, "*") == ["a.png", "b.JPG"]
    assert found(folder, "sub/*", "[ab].*") == ["sub/d.webp", "a.png", "b.JPG"]
    assert found(folder, "**") == ["a.png", "b.JPG", "sub/d.webp", "sub/deep/c.tiff"]


def test_named_files_and_urls_are_taken_as_they_are(folder: Path) -> None:
    odd = folder / "what[1]*.dat"
    odd.touch()
    sources = [str(odd), str(folder / "gone.png"), "https://example.org/a?b=*", "HTTP://x/[y]"]
    assert list(images.expand(sources)) == [Source(source, named=True) for source in sources]
    (missing,) = images.load_each(images.expand(sources[1:2]), SMALL)
    assert str(missing) == f"{sources[1]}: cannot be opened: No such file or directory"


def test_links_are_followed_once(folder: Path) -> None:
    (folder / "sub" / "deep" / "up").symlink_to(folder)
    (folder / "other").symlink_to(folder / "sub" / "deep")
    (folder / "z.png").symlink_to("nowhere")
    assert found(folder, "") == ["a.png", "b.JPG", "other/c.tiff", "sub/d.webp", "z.png"]


def test_a_source_without_images_is_an_error_in_its_place(folder: Path) -> None:
    (folder / "bare").mkdir()
    sources = [str(folder / name) for name in ("bare", "*.gif", "a.png")]
    bare, pattern, file = images.expand(sources)
    assert isinstance(bare, ImageError)
    assert str(bare).startswith(f"{sources[0]}: this folder holds no image (.avif .bmp ")
    assert isinstance(pattern, ImageError)
    assert str(pattern).startswith(f"{sources[1]}: this pattern matches no image (.avif ")
    assert file == Source(sources[2], named=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_a_folder_that_may_not_be_read_costs_itself(folder: Path) -> None:
    (folder / "sub").chmod(0)
    try:
        items = list(images.expand([str(folder)]))
    finally:
        (folder / "sub").chmod(0o700)
    assert str(items[-1]) == f"{folder / 'sub'}: folder cannot be read: Permission denied"
    assert len(items) == 3


# URLs

GOOD = encoded(picture(40, 50), "PNG")


REDIRECTS = {
    "/away": "/good.png",
    "/file": "file:///etc/passwd",
    "/ftp": "ftp://127.0.0.1/good.png",
    "/nowhere": "http://127.0.0.1:99999999999999999999/x",
}


class _Server(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        match self.path:
            case "/good.png" | "/gr%C3%BCn%20%20.png":
                self._answer(GOOD)
            case "/garbage":
                self._answer(b"<html>no picture</html>")
            case "/long":
                self._answer(bytes(1 << 20))
            case "/cut":
                self._answer(GOOD[:-2000], promised=len(GOOD))
            case path if path in REDIRECTS:
                self._redirect(REDIRECTS[path])
            case "/silent":
                time.sleep(600)
            case "/dripping-headers":
                self.send_response(200)
                self.flush_headers()
                self._drip()
            case "/flood":
                self._redirect("/good.png")
                for _ in range(4000):
                    self.wfile.write(bytes(1 << 16))
            case path if path.startswith("/round"):
                time.sleep(0.05)
                self._redirect(f"/round{int(path[6:] or 0) + 1}")
            case "/short-chunks":
                self.protocol_version = "HTTP/1.1"
                self.send_response(200)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                self.wfile.write(b"%x\r\n" % len(GOOD) + GOOD[:-2000])
            case "/drip":
                self._answer(b"", promised=1000)
                self._drip()
            case _:
                self.send_error(404)

    def _drip(self) -> None:
        for _ in range(12_000):
            time.sleep(0.05)
            self.wfile.write(b"x")

    def _redirect(self, where: str) -> None:
        self.send_response(302)
        self.send_header("Location", where)
        self.end_headers()

    def _answer(self, body: bytes, promised: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body) if promised is None else promised))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


class _Quiet(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hung up is what the tests are about."""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch, _Quiet(("127.0.0.1", 0), _Server) as server:
        patch.setenv("no_proxy", "127.0.0.1")
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("path", ["/good.png", "/away", "/grün  .png", "/gr%C3%BCn%20%20.png"])
def test_a_url_is_fetched(url: str, path: str) -> None:
    assert images.fetch(url + path) == GOOD
    assert torch.equal(to_batch([url + path], SMALL), to_batch(GOOD, SMALL))


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/missing", "server answered 404 Not Found"),
        ("/garbage", "is not in an image format that Pillow reads"),
        ("/cut", "ends 2000 bytes before "),
        ("/short-chunks", "cannot be fetched: "),
        ("/file", "server answered 302 "),
        ("/ftp", "cannot be fetched: "),
        ("/nowhere", "cannot be fetched: "),
    ],
)
def test_a_url_that_gives_no_image_is_refused(url: str, path: str, reason: str) -> None:
    assert refusal(lambda: to_batch(url + path, SMALL)).startswith(f"{url}{path}: {reason}")


@pytest.mark.parametrize("path", ["/silent", "/drip", "/dripping-headers", "/round"])
def test_a_slow_server_costs_the_timeout_only(url: str, path: str) -> None:
    """Not the ten minutes that the server would take, nor a time-out for each of its redirects."""
    message = refusal(lambda: images.fetch(url + path, timeout=0.2))
    assert message == f"{url}{path}: cannot be fetched: no complete answer within 0.2 s"


def test_the_body_of_a_redirect_is_not_endless(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alexnet_triton.engine.web._HEADERS", 1 << 16)
    message = refusal(lambda: images.fetch(url + "/flood", limit=1 << 20))
    assert "sends more than is fetched" in message


def test_a_hosts_other_address_is_tried(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one takes no connection, as where a machine has IPv6 and its network has none."""
    port = int(url.rpartition(":")[2])
    full = socket.socket()
    full.bind(("127.0.0.2", port))  # nobody listens
    one, two = (
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port))
        for host in ("127.0.0.2", "127.0.0.1")
    )
    real = socket.getaddrinfo

    def looked_up(host: str, *more: Any, **named: Any) -> Any:
        return [one, two] if host == "two.example" else real(host, *more, **named)

    monkeypatch.setattr(socket, "getaddrinfo", looked_up)
    monkeypatch.setenv("no_proxy", "two.example")
    assert images.fetch(f"http://two.example:{port}/good.png") == GOOD
    full.close()


def test_a_long_body_is_refused(url: str) -> None:
    assert images.fetch(f"{url}/good.png", limit=len(GOOD)) == GOOD
    message = refusal(lambda: images.fetch(f"{url}/good.png", limit=len(GOOD) - 1))
    assert message == (f"{url}/good.png: is longer than the {len(GOOD) - 1} bytes that are fetched")


@pytest.mark.parametrize(
    "address", ["http://", "http://127.0.0.1:1/a.png", "http://[::1/a", "http://x/\udcff"]
)
def test_a_url_that_leads_nowhere_is_refused(address: str) -> None:
    shown = str(ImageError(address, "cannot be fetched: "))
    assert refusal(lambda: to_batch(address, SMALL)).startswith(shown)


# Class names


def test_every_network_has_a_word_for_every_output() -> None:
    for network in NETWORKS.values():
        names = images.class_names(network)
        (outputs,) = network.output_shape()
        assert len(names) == max(outputs, 2)  # one output says yes or no: two words
        assert all(name == name.strip() != "" for name in names)
    names = images.class_names(ALEXNET)
    assert (names[0], names[281], names[-1]) == ("tench", "tabby", "toilet tissue")


def test_imagenets_words_are_torchvisions() -> None:
    models = torchvision_models()
    categories = models.AlexNet_Weights.IMAGENET1K_V1.meta["categories"]
    assert images.class_names(ALEXNET) == tuple(categories)


# Orientation


def turned(orientation: int) -> bytes:
    """A JPEG of a picture that is to be seen as its EXIF says."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture(40, 60), "JPEG", exif=exif.tobytes(), quality=95)


@pytest.mark.parametrize(("orientation", "steps"), [(3, 2), (6, 3), (8, 1)])
def test_exif_turns_a_picture_and_else_it_lies_as_in_the_file(orientation: int, steps: int) -> None:
    data = turned(orientation)
    with Image.open(io.BytesIO(data)) as file:
        plain = file.convert("RGB")
    with pytest.warns(images.OrientationWarning, match="exif"):
        assert images.decode(data, "x").tobytes() == plain.tobytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        seen = np.asarray(images.decode(data, "x", exif=True))
        assert np.array_equal(seen, np.rot90(np.asarray(plain), steps))
        opened = images.decode(Image.open(io.BytesIO(data)), "x", exif=True)
        assert np.array_equal(np.asarray(opened), seen)
        (loaded,) = images.load_each([data], SMALL, exif=True)
        assert isinstance(loaded, torch.Tensor)
        assert torch.equal(loaded, to_batch(Image.fromarray(seen), SMALL)[0])
        for upright in (turned(1), turned(9), GOOD):
            images.decode(upright, "x")


def test_it_is_said_once_and_broken_exif_says_nothing() -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        list(images.load_each([turned(6), turned(8), turned(6)], SMALL))
    assert [one.category for one in told] == [images.OrientationWarning]
    broken = turned(6).replace(b"Exif\0\0", b"Exif\0\0\xff\xff\xff", 1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        images.decode(broken, "x")
    assert images.OrientationWarning not in [one.category for one in told]
    images.decode(broken, "x", exif=True)


def test_a_damaged_picture_is_refused_though_its_exif_lies_behind_the_damage() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    png = encoded(picture(40, 50), "PNG", exif=exif.tobytes(), compress_level=0)
    head, _, rest = png.partition(b"eXIf")
    length, rest = struct.unpack(">I", head[-4:])[0], b"eXIf" + rest
    chunk, after = head[-4:] + rest[: length + 8], rest[length + 8 :]
    late = head[:-4] + after[:-12] + chunk + after[-12:]  # before IEND, where PNG allows it, too
    with pytest.warns(images.OrientationWarning):
        images.decode(late, "x")
    for damaged in (late.replace(b"IDATx", b"IDAT?"), late[:3000]):
        for flag in (False, True):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                refusal(functools.partial(images.decode, damaged, "x", flag))
