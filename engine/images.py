"""From anything a user calls an image to what the engine reads: NCHW pixels.

Pictures become uint8 through torchvision's `ImageClassification` preset, which the pass over them
turns into `(value / 255 - mean) / std` while it loads them; see `to_batch` for all that is taken.

Every refusal is one `ImageError`, one line that names its item. `to_batch` raises the first,
`load_each` yields it in the item's place: bad input costs its own item, never the job.
"""

from __future__ import annotations

import glob
import importlib.resources
import io
import os
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, BinaryIO, Literal, TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from ..errors import Error, shortened
from .spec import Network, Preprocess
from .web import WebError, get

SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"),
    *(".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
)
"""What counts as an image in a folder or a glob; a file that is named may have any suffix."""

T = TypeVar("T")
Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Views = Literal["center", "ten-crop"]

_ARRAY_DTYPES: tuple[str, ...] = ("uint8", "float16", "float32", "float64")
_TENSOR_DTYPES = (*_ARRAY_DTYPES, "bfloat16")


class ImageError(Error, ValueError):
    """One item that is no image for us: `item` names it, `reason` says what was wanted and got."""

    def __init__(self, item: str, reason: str) -> None:
        super().__init__(item, reason)
        self.item = item
        self.reason = reason

    def __str__(self) -> str:
        return shortened(f"{self.item}: {self.reason}")


@dataclass(frozen=True, slots=True)
class Source:
    """Where an image lies: a path or a URL, and whether it was named itself or found there."""

    location: str
    named: bool


Listed = Source | ImageError  # what a word stands for, or why it stands for nothing
Encoded = str | os.PathLike[str] | bytes | Image.Image
Array = Tensor | np.ndarray[Any, Any]
Item = Encoded | Array | Listed
Images = Item | Iterable[Any]  # of items, or of batches with or without labels


# From the command line's words to files and URLs


def expand(sources: Iterable[str]) -> Iterator[Listed]:
    """Files, folders, globs and URLs to one `Source` an image, lazily and in sorted order.

    A folder gives every image file (by suffix) in it and below, following links, each folder once,
    hidden entries left out. A glob (`**` recurses) gives the image files that it matches. Both
    give an ImageError when that is none, and a folder one for each subfolder that cannot be read.
    Anything else is taken as named: if it does not exist, `decode` says so in its turn.
    """
    for source in sources:
        empty = True
        for found in _expand(source):
            empty = False
            yield found
        if empty:
            kind = "folder holds" if os.path.isdir(source) else "pattern matches"
            yield ImageError(source, f"this {kind} no image ({' '.join(SUFFIXES)})")


def _expand(source: str) -> Iterator[Listed]:
    if is_url(source):
        yield Source(source, named=True)
    elif os.path.isdir(source):
        yield from _walk(source)
    elif not os.path.lexists(source) and any(c in source for c in "*?["):
        for path in sorted(glob.iglob(source, recursive=True)):
            if _looks_like_image(path) and not os.path.isdir(path):
                yield Source(path, named=False)
    else:
        yield Source(source, named=True)


def _walk(folder: str) -> Iterator[Listed]:
    pending = [folder]
    entered = set()  # links may lead in circles
    while pending:
        path = pending.pop()
        if not os.path.isdir(path):
            yield Source(path, named=False)
            continue
        try:
            identity = os.stat(path)
            with os.scandir(path) as entries:
                names = [
                    entry.path
                    for entry in entries
                    if not entry.name.startswith(".")
                    and (_is_folder(entry) or _looks_like_image(entry.name))
                ]
        except OSError as error:
            yield ImageError(path, f"folder cannot be read: {error.strerror}")
            continue
        if (identity.st_dev, identity.st_ino) not in entered:
            entered.add((identity.st_dev, identity.st_ino))
            pending += sorted(names, reverse=True)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or into what is closed to us: it costs itself, in its turn
        return False


def _looks_like_image(path: str) -> bool:
    return path.lower().endswith(SUFFIXES)


def is_url(source: str) -> bool:
    """Whether an image is to be fetched from the web."""
    return source.lower().startswith(("http://", "https://"))


# From a file, a URL or bytes to RGB


def fetch(url: str, *, timeout: float = 10.0, limit: int = 64 << 20) -> bytes:
    """The body behind an http(s) URL: at most `limit` bytes, all of it within `timeout` seconds.

    Raises ImageError for what `web.get` refuses.
    """
    try:
        return get(url, timeout, limit)
    except WebError as error:
        raise ImageError(url, str(error)) from error


class OrientationWarning(UserWarning):
    """A picture that a viewer would turn; Python shows a warning once."""


def decode(source: Encoded, name: str, exif: bool = False) -> Image.Image:
    """A path, URL, encoded bytes or PIL image as an RGB PIL image, as torchvision's loader does it.

    That is the first frame, `convert("RGB")`: alpha is dropped, 16-bit grey is clipped at 255, not
    scaled, and the orientation in EXIF is not applied, of which an OrientationWarning tells; with
    `exif` it is applied. More pixels than PIL.Image.MAX_IMAGE_PIXELS
    are refused (from a PIL image they are taken: whoever opened it decided), and so is EPS, which
    Pillow would hand to another program. Raises ImageError naming `name`.
    """
    if isinstance(source, Image.Image):
        return _rgb(source, name, exif)
    with _open(source, name) as file:
        return _decode(file, name, exif)


def _open(source: str | os.PathLike[str] | bytes, name: str) -> BinaryIO:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    path = os.fsdecode(source)
    if is_url(path):
        return io.BytesIO(fetch(path))
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode):  # opening a pipe would wait for its writer
            return open(path, "rb")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise ImageError(name, f"cannot be opened: {_words(error)}") from error
    kind = "folder" if stat.S_ISDIR(mode) else "device, pipe or socket"
    raise ImageError(name, f"wanted an image file, got a {kind}")


def _decode(file: BinaryIO, name: str, exif: bool) -> Image.Image:
    try:
        image = Image.open(file)
    except UnidentifiedImageError:
        empty = file.seek(0, os.SEEK_END) == 0
        reason = "is empty" if empty else "is not in an image format that Pillow reads"
        raise ImageError(name, reason) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(name, f"{error} {_TRUST}") from None
    except Exception as error:  # what format readers raise on hostile bytes is not one family
        raise ImageError(name, f"cannot be decoded: {_words(error)}") from error
    # Pillow only warns up to twice its limit; filtering warnings is not safe in threads.
    _check_pixels(image.size, name, "is")
    if image.format == "EPS":
        raise ImageError(name, "is EPS, which is a program to run; wanted a raster image")
    return _rgb(image, name, exif)


def _rgb(image: Image.Image, name: str, exif: bool) -> Image.Image:
    try:
        image.load()  # here, where an error is one: a PNG's EXIF may lie behind its pixels
        turn = _turn(image)
        if exif and turn is not None:
            image = image.transpose(turn)
        picture = image.convert("RGB")
    except Exception as error:  # as above: the bytes are read only here
        raise ImageError(name, f"cannot be decoded: {_words(error)}") from error
    if turn is not None and not exif:
        tell_of_orientation()
    return picture


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture of each orientation in EXIF upright; 1 is upright."""


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What it takes to see a picture as it is meant to be; broken EXIF says nothing."""
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        return None


def tell_of_orientation() -> None:
    """Warn, in words that are always the same, so that Python shows them once."""
    warnings.warn(
        "a picture has an orientation in its EXIF and is taken as it lies in the file, as "
        "torchvision does; --exif, in Python exif=True, turns it as viewers do",
        OrientationWarning,
        stacklevel=2,
    )


def _words(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


_TRUST = "Crop it, or raise PIL.Image.MAX_IMAGE_PIXELS if it can be trusted."


def _check_pixels(size: tuple[int, int], name: str, what: str) -> None:
    width, height = size
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise ImageError(
            name, f"{what} {width}x{height} pixels, Pillow's limit is {limit} in all. {_TRUST}"
        )


# From RGB to the size the network is published for


def preset(image: Image.Image, preprocess: Preprocess, name: str = "image") -> Pixels:
    """uint8 [crop, crop, 3] of an RGB image: torchvision's preset up to its mean and std.

    The shorter side becomes `resize`, bilinear with antialias, the longer one is rounded down; the
    centre `crop`² is cut out, black where the image is smaller. Raises ImageError for an image
    without pixels, or so long and thin that resized it would pass PIL.Image.MAX_IMAGE_PIXELS.
    """
    return _centre(_resized(image, preprocess, name), preprocess.crop)


def ten_crop(image: Image.Image, preprocess: Preprocess, name: str = "image") -> Pixels:
    """uint8 [10, crop, crop, 3] of an RGB image: the views that the 2012 paper averages over.

    The four corners and the centre of the central `resize`² square, then their mirror images
    (Krizhevsky, Sutskever, Hinton, section 4.1). Raises as `preset` does.
    """
    square = _centre(_resized(image, preprocess, name), preprocess.resize)
    crop, last = preprocess.crop, preprocess.resize - preprocess.crop
    middle = _crop_start(preprocess.resize, crop)
    corners = ((0, 0), (0, last), (last, 0), (last, last), (middle, middle))
    views = [square[top : top + crop, left : left + crop] for top, left in corners]
    return np.stack([*views, *(view[:, ::-1] for view in views)])


def _resized(image: Image.Image, preprocess: Preprocess, name: str) -> Image.Image:
    short, long = sorted(image.size)
    if short == 0:
        raise ImageError(name, f"is {image.width}x{image.height} pixels: nothing to see")
    scaled = int(preprocess.resize * long / short)
    size = (preprocess.resize, scaled) if image.size[0] == short else (scaled, preprocess.resize)
    _check_pixels(size, name, f"is {image.width}x{image.height} pixels, resized it would be")
    return image.resize(size, Image.Resampling.BILINEAR)


def _centre(image: Image.Image, crop: int) -> Pixels:
    left, top = (_crop_start(side, crop) for side in image.size)
    # A box that reaches outside is filled with zeros.
    return np.array(image.crop((left, top, left + crop, top + crop)))


def _crop_start(side: int, crop: int) -> int:
    """Where torchvision's centre crop begins: half to even inside, rounded to zero outside."""
    return -((crop - side) // 2) if crop > side else round((side - crop) / 2)


# From all of these to a batch


def to_batch(images: Images, preprocess: Preprocess) -> Tensor:
    """`images` as one NCHW tensor, uint8 or float, ready for the network.

    - A tensor or array, [N, 3, H, W], [N, H, W, 3] or one image without N, comes back as a view
      where it is (same device, same size, any strides); an array that torch cannot view, such as a
      read-only or flipped one, is copied. The axis of length 3 is the channels; where both could
      be, NCHW wins. uint8 is raw pixels; float16, bfloat16, float32 and float64 are the network's
      input as torchvision's model takes it.
    - A path, http(s) URL, encoded bytes or PIL image goes through `decode` and `preset`.
    - An iterable of these is stacked; size, device and kind, uint8 or float, must agree. So is one
      of batches of arrays, alone or each with its labels behind it, as a DataLoader gives them. An
      empty one gives uint8 [0, 3, crop, crop].

    Raises ImageError for the first bad item: a path or URL by itself, others as `image INDEX`.
    """
    if isinstance(images, Tensor | np.ndarray):
        return _batch(images)
    pixels = []
    for loaded in load_each(images, preprocess):
        if isinstance(loaded, ImageError):
            raise loaded
        pixels.append(loaded)
    if not pixels:
        return torch.empty(0, 3, preprocess.crop, preprocess.crop, dtype=torch.uint8)
    return torch.stack(pixels)


def load_each(
    images: Images, preprocess: Preprocess, views: Views = "center", exif: bool = False
) -> Iterator[Tensor | ImageError]:
    """For each of `images` in turn its [3, H, W] pixels, or the ImageError in its place.

    With `views="ten-crop"`, its ten views [10, 3, crop, crop], of pictures only. With `exif`,
    pictures are turned first. Takes what
    `to_batch` takes, and what `expand` yields. The first good item sets size, device and kind; one
    that differs is an error, so that whatever tensors come can be stacked. A tensor or array that
    is no batch as a whole raises.
    """
    wanted = like = ""
    for index, item in enumerate(_items(images)):
        name = name_of(item, index)
        loaded: Tensor | ImageError
        try:
            loaded = load(item, preprocess, name, views, exif)
            got = _kind(loaded)
            if not wanted:
                wanted, like = got, name
            if got != wanted:
                raise ImageError(name, f"wanted {wanted} like {like}, got {got}")
        except ImageError as error:
            # A new one: the traceback of this one keeps the half-read image in memory.
            loaded = ImageError(error.item, error.reason)
        yield loaded


def load(
    item: Item, preprocess: Preprocess, name: str, views: Views = "center", exif: bool = False
) -> Tensor:
    """One image as [3, H, W], uint8 or float; raises ImageError, also one that it is given."""
    match item:
        case ImageError():
            raise item
        case Source():
            return load(item.location, preprocess, name, views, exif)
        case Tensor() | np.ndarray() if views != "center":
            raise ImageError(
                name,
                f"wanted a picture to cut {views} views from, got an array; use views='center'",
            )
        case Tensor() | np.ndarray():
            return _channels_first(item, name, (3,), "[3, H, W] or [H, W, 3]")
        case str() | os.PathLike() | bytes() | Image.Image():
            cut = preset if views == "center" else ten_crop
            pixels = torch.from_numpy(cut(decode(item, name, exif), preprocess, name))
            return pixels.movedim(-1, -3)
    raise ImageError(
        name, f"wanted a path, URL, bytes, PIL image, array or tensor, got {type(item).__name__}"
    )


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """`items` in lists of `size` and what is left, each read when it is asked for."""
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


def one_behind(
    loaded: Iterable[Tensor | ImageError], size: int, compute: Callable[[Tensor], T]
) -> Iterator[tuple[list[ImageError | None], T | None]]:
    """Batches of `size`: what is an error, and what `compute` makes of the others' pixels.

    Reading a result waits for the GPU, so the next batch is under way before anybody can.
    """
    waiting: list[tuple[list[ImageError | None], T | None]] = []
    for group in batched(loaded, size):
        errors = [item if isinstance(item, ImageError) else None for item in group]
        pixels = [item for item in group if isinstance(item, Tensor)]
        waiting.append((errors, compute(torch.stack(pixels)) if pixels else None))
        if len(waiting) == 2:
            yield waiting.pop(0)
    yield from waiting


def name_of(item: Item, index: int) -> str:
    """What messages call the item at this place, counted from 0."""
    match item:
        case ImageError():
            return item.item
        case Source():
            return item.location
        case str() | os.PathLike():
            return os.fsdecode(item)
    return f"image {index}"


def _items(images: Images) -> Iterable[Item]:
    match images:
        case Tensor() | np.ndarray():
            return _batch(images)
        case str() | bytes() | ImageError():  # iterable or not, these are one item
            return (images,)
        case Iterable():
            return (image for item in images for image in _unbatched(item))
    return (images,)


def _unbatched(item: Any) -> Iterable[Item]:
    """The images of what an iterable gives: one, or a DataLoader's batch, maybe with labels."""
    match item:
        case [Tensor() | np.ndarray() as images, *labels] if all(map(_is_label, labels)):
            item = images
    if _is_images(item) and item.ndim == 4 and 3 in (item.shape[1], item.shape[3]):
        batch: Iterable[Item] = item
        return batch
    return (item,)


def _is_label(item: Any) -> bool:
    """Whether it is what datasets put behind an image, and surely no image: numbers and words."""
    match item:
        case Tensor():
            return not _is_images(item) and item.layout is torch.strided and not item.is_nested
        case np.ndarray():
            return not _is_images(item)
        case list() | tuple():
            return all(map(_is_label, item))
        case dict():
            return all(map(_is_label, item.values()))
    return item is None or isinstance(item, str | int | float | np.generic)


def _is_images(item: Any) -> bool:
    """Whether it has the axes of an image or of a batch; a sparse or nested tensor is refused."""
    if isinstance(item, Tensor):
        return not item.is_nested and item.layout is torch.strided and item.ndim > 2
    return isinstance(item, np.ndarray) and item.ndim > 2


def _batch(array: Array) -> Tensor:
    shapes = "[N, 3, H, W] or [N, H, W, 3], N left out for one image"
    pixels = _channels_first(array, "images", (3, 4), shapes)
    return pixels if pixels.ndim == 4 else pixels[None]


def _channels_first(array: Array, name: str, axes: tuple[int, ...], shapes: str) -> Tensor:
    """The tensor of an array that has so many axes, the channels before the sides."""
    pixels = _tensor(array, name)
    if pixels.ndim in axes and pixels.shape[-3] == 3:
        return pixels
    if pixels.ndim in axes and pixels.shape[-1] == 3:
        return pixels.movedim(-1, -3)
    raise ImageError(name, f"wanted shape {shapes}, got {list(pixels.shape)}")


def _tensor(array: Array, name: str) -> Tensor:
    """A tensor on the same memory, if torch can have one; refuses all but uint8 and float."""
    if isinstance(array, np.ndarray):
        dtype, legal = array.dtype.name, _ARRAY_DTYPES
    else:
        dtype, legal = str(array.dtype).removeprefix("torch."), _TENSOR_DTYPES
    if dtype not in legal:
        floats = ", ".join(_TENSOR_DTYPES[1:])
        raise ImageError(name, f"wanted uint8 pixels or normalised floats ({floats}), got {dtype}")
    tensor = _from_numpy(array) if isinstance(array, np.ndarray) else array
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "a nested tensor" if tensor.is_nested else tensor.layout
        raise ImageError(name, f"wanted a dense tensor, got {kind}")
    if tensor.is_meta:
        raise ImageError(name, "wanted pixels, got a meta tensor, which has none")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ImageError(
            name,
            "requires grad, and this engine is for inference only; call it under "
            "torch.inference_mode(), or pass images.detach()",
        )
    return tensor.detach() if tensor.requires_grad else tensor


def _from_numpy(array: np.ndarray[Any, Any]) -> Tensor:
    # torch warns of a read-only array and refuses foreign byte order, flips and packed records.
    odd = any(step < 0 or step % array.itemsize for step in array.strides)
    if odd or not array.flags.writeable or not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return torch.from_numpy(array)


def _kind(pixels: Tensor) -> str:
    kind = "float" if pixels.is_floating_point() else "uint8"
    return f"{kind} {list(pixels.shape)} on {pixels.device}"


def class_names(network: Network) -> tuple[str, ...]:
    """The words of the network's outputs, in order; their numbers if it names no words."""
    if not network.classes:
        return tuple(map(str, range(network.output_shape()[0])))
    text = importlib.resources.files(__package__).joinpath(network.classes).read_text("utf-8")
    return tuple(text.splitlines())
