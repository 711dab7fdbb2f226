"""What a layer sees, as one picture: its maps for an image, or the first layer's filters."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ..run import Engine
from ..spec import Conv2d, Network
from .canvas import PictureError, check, sheet

_GAP, _EDGE, _TITLE = 12, 16, 40  # pixels; the gap below a tile holds its number
_TILE = 64  # pixels a side at least, as far as whole multiples go
_WIDEST = 14  # at most so many tiles a row, unless that made the picture too tall

Array = np.ndarray[Any, np.dtype[Any]]


def draw_maps(
    engine: Engine, image: Any, layer: str, path: str | os.PathLike[str]
) -> tuple[int, int]:
    """Draw all maps of `layer` after its activation for one image; gives the size in pixels.

    image: anything that `images.to_batch` takes, one of it. Raises PictureError for a layer without
    maps or for more than one image, NetworkError for no such layer, ImageError, OSError.
    """
    check(path)
    features = engine.features(image, [layer])[layer]
    if features.dim() != 4:
        raise PictureError(f"{layer}: wanted a layer with maps, got {features.shape[1]} features")
    if len(features) != 1:
        raise PictureError(f"image: wanted one, got {len(features)}")
    maps = features[0].double().cpu()
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    # A map that is the same everywhere has no range: it is drawn dark.
    shades = ((maps - low) / (high - low).where(high > low, torch.ones(()).double())).numpy()
    from matplotlib import colormaps

    count, height, width = shades.shape
    title = f"{engine.network.name}, {layer}: {count} maps of {height} x {width}"
    note = "each from its own least value (dark) to its largest (bright)"
    return _draw(colormaps["magma"](shades)[..., :3], title, note, path)


def draw_filters(
    network: Network, state: Mapping[str, torch.Tensor], path: str | os.PathLike[str]
) -> tuple[int, int]:
    """Draw the filters of the first layer in the colours they look for; gives the size in pixels.

    Raises PictureError if that layer is no convolution of RGB images.
    """
    check(path)
    name, layer = network.layers[0]
    if not isinstance(layer, Conv2d) or network.input_shape[0] != 3 or layer.groups != 1:
        raise PictureError(f"{network.name}, {name}: wanted a convolution of RGB images to draw")
    weight = state[f"{name}.weight"].double().cpu()
    largest = weight.abs().amax((1, 2, 3), keepdim=True)
    shades = 0.5 + 0.5 * weight / largest.where(largest > 0, torch.ones(()).double())
    count, _, height, width = weight.shape
    title = f"{network.name}, {name}: {count} filters of {height} x {width} x 3"
    note = "weights as RGB, grey is zero, each by its own largest"
    return _draw(shades.permute(0, 2, 3, 1).numpy(), title, note, path)


def _draw(tiles: Array, title: str, note: str, path: str | os.PathLike[str]) -> tuple[int, int]:
    """Tiles [N, H, W, 3] of 0 to 1 in a grid, whole pixels a value, numbered from 0."""
    count, height, width, _ = tiles.shape
    zoom = max(1, -(-_TILE // max(height, width)))
    tiles = tiles.repeat(zoom, axis=1).repeat(zoom, axis=2)
    tall, wide = height * zoom + _GAP, width * zoom + _GAP
    columns = min(count, max(_WIDEST, math.isqrt(count)))
    while columns > 1 and -(-count // (columns - 1)) == -(-count // columns):
        columns -= 1  # as even as so many rows allow
    rows = -(-count // columns)
    size = (max(2 * _EDGE + columns * wide - _GAP, 420), _TITLE + rows * tall + _EDGE)
    picture = np.ones((size[1], size[0], 3))
    left = (size[0] - columns * wide + _GAP) // 2
    corners = [
        (left + index % columns * wide, _TITLE + index // columns * tall) for index in range(count)
    ]
    for tile, (x, y) in zip(tiles, corners, strict=True):
        picture[y : y + height * zoom, x : x + width * zoom] = tile
    with sheet(path, *size) as axes:
        axes.imshow(picture, extent=(0, size[0], 0, size[1]), interpolation="none", aspect="auto")
        axes.text(_EDGE, size[1] - 16, title, size=10, weight="bold", color="#22303c")
        axes.text(_EDGE, size[1] - 29, note, size=8, color="#6b7885")
        for index, (x, y) in enumerate(corners):
            bottom = size[1] - y - height * zoom
            axes.text(x, bottom - 2, str(index), size=7, va="top", color="#6b7885")
    return size
