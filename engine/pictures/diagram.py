"""A network as a picture: the volumes that flow through it, and the layers between them.

Every volume is a box: its height and width are those of its maps, its length along the flow is its
number of channels. On its face toward the next volume lies the window that one output reads. Where
a layer works in groups, the volumes it reads and makes stand one above the other, and the lines
from window to output show which tower sees which.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, assert_never

from ...kernels.epilogue import row_of
from ..fuse import Block, fuse
from ..spec import (
    AdaptiveAvgPool2d,
    AvgPool2d,
    BatchNorm2d,
    Conv2d,
    Dropout,
    Flatten,
    Gather,
    Layer,
    Linear,
    LocalResponseNorm,
    MaxPool2d,
    Network,
    Nonlinearity,
    Shape,
    Softmax,
)
from ..summary import summarise
from .canvas import check, sheet, text_width

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Point = tuple[float, float]

_POOLS = (MaxPool2d, AvgPool2d, AdaptiveAvgPool2d)
_MAKERS = (Conv2d, Linear, *_POOLS)
_MOST_TOWERS = 4  # more groups than that are written, not drawn
_SLANT = (0.42, 0.30)  # where a step along the width of a map leads on paper
_COLOURS = {"image": "#9aa5b1", "conv": "#4f86c6", "pool": "#e59f47", "linear": "#5aa469"}
_INK, _SOFT = "#22303c", "#6b7885"
_TEXT, _LINE, _GAP, _MARGIN = 7.0, 10.5, 16.0, 24.0  # points


def _side(size: float) -> float:
    """Points on paper of a height or a width."""
    return 8 * math.sqrt(size)


def _length(channels: float) -> float:
    """Points on paper of a number of channels or features."""
    return 6 * math.cbrt(channels)


_SCALE = (
    "Drawn to scale: heights and widths as the square roots of their sizes, "
    "channels and features as the cube roots of their numbers, windows as parts of their maps."
)


@dataclass(frozen=True, slots=True)
class Volume:
    """What one layer makes: `shape` (C, H, W) or (features,), and what is written under it.

    `towers` is in how many parts it is drawn, `groups` in how many its maker works, `window` the
    height and width of what one of its numbers reads of the volume before; None if all of it.
    """

    name: str
    kind: str  # a key of the colours
    shape: Shape
    lines: tuple[str, ...]
    towers: int = 1
    groups: int = 1
    window: int | None = None


def volumes(network: Network) -> list[Volume]:
    """The volumes of `network` in order, the image first.

    Activations, normalisations and dropout make no volume of their own: they are noted where they
    happen.
    """
    drawn: list[tuple[Block, list[str]]] = []
    blocks = {block.name: block for block in fuse(network)}
    for name, layer, _, output in network.walk():
        block = blocks.get(name)
        if block and isinstance(layer, _MAKERS):
            drawn.append((block, _operation(block)))
            continue
        note = _note(layer, output)
        if note and drawn:
            drawn[-1][1].append(note if isinstance(layer, Dropout | Softmax) else f"{name}: {note}")
    channels, height, width = network.input_shape
    size = f"{height} x {width} x {channels}"
    found = [Volume("image", "image", network.input_shape, (size, "normalised RGB"))]
    for index, (block, lines) in enumerate(drawn):
        kind = {Conv2d: "conv", Linear: "linear"}.get(type(block.layer), "pool")
        found.append(
            Volume(
                block.name,
                kind,
                block.output,
                tuple(dict.fromkeys(lines)),
                towers=_towers([b for b, _ in drawn], index),
                groups=_groups(block.layer),
                window=getattr(block.layer, "kernel_size", None),
            )
        )
    return found


def _groups(layer: Layer) -> int:
    return layer.groups if isinstance(layer, Conv2d) else 1


def _towers(blocks: Sequence[Block], index: int) -> int:
    """The groups of the convolution that made this volume or of the one that reads it.

    Pools hand on what they get; beyond another convolution or a linear layer nothing is seen.
    """
    if len(blocks[index].output) != 3:
        return 1
    maker = next(
        b.layer for b in [*blocks[index::-1], blocks[0]] if not isinstance(b.layer, _POOLS)
    )
    after = (b.layer for b in blocks[index + 1 :] if not isinstance(b.layer, _POOLS))
    reader = next(after, None)
    groups = max(_groups(maker), _groups(reader) if reader else 1)
    return groups if groups <= _MOST_TOWERS else 1


def _operation(block: Block) -> list[str]:
    """What is written under a volume: its size, and what made it."""
    layer, came, output = block.layer, block.came, block.output
    size = (*output[1:], output[0]) if len(output) == 3 else output
    lines = [" x ".join(f"{n:,}" if len(size) == 1 else str(n) for n in size)]
    match layer:
        case Conv2d(filters, k, stride, padding, dilation, groups):
            a_filter = came[0] // groups * k * k
            lines.append(f"{k}x{k}, stride {stride}, padding {padding}")
            if dilation > 1:
                lines.append(f"dilation {dilation}")
            lines.append(f"{k}x{k}x{came[0] // groups} = {a_filter:,} a filter")
            lines.append(f"{a_filter * filters:,} for {filters} filters")
            if groups > 1:
                lines.append(f"in {groups} groups of {filters // groups}")
        case MaxPool2d(k, stride, padding) | AvgPool2d(k, stride, padding):
            word = "max" if isinstance(layer, MaxPool2d) else "mean"
            lines += [f"{word} of {k}x{k}", f"stride {stride}, padding {padding}"]
            if layer.ceil_mode:
                lines.append("last window kept")
        case AdaptiveAvgPool2d(k):
            lines.append(f"mean, to {k}x{k}")
        case Linear(features):
            lines += [f"{came[0]:,} x {features:,}", f"= {came[0] * features:,} weights"]
    if block.activation:
        lines.append(row_of(block.activation)[0].label)
    return lines


def _note(layer: Layer, output: Shape) -> str | None:
    match layer:
        case LocalResponseNorm():
            apart = f", in {layer.groups} towers" if layer.groups > 1 else ""
            return f"LRN over {layer.size} maps{apart}"
        case BatchNorm2d():
            return f"BatchNorm, 4 x {output[0]}"
        case Softmax():
            return "softmax"
        case AdaptiveAvgPool2d():
            return f"mean to {output[1]}x{output[2]}: as it is"
        case Dropout():
            return "dropout: identity"
        case (
            Conv2d() | Linear() | MaxPool2d() | AvgPool2d() | Nonlinearity() | Flatten() | Gather()
        ):
            return None
        case _:
            assert_never(layer)


# On paper


@dataclass(frozen=True, slots=True)
class _Box:
    """One part of a volume on paper: the front's lower left corner and its three edges."""

    x: float
    y: float
    length: float
    height: float
    width: float

    def corner(self, along: float, up: float, back: float) -> Point:
        """The point at these fractions of the three edges."""
        depth = back * self.width
        return (
            self.x + along * self.length + depth * _SLANT[0],
            self.y + up * self.height + depth * _SLANT[1],
        )


def draw(network: Network, path: str | os.PathLike[str]) -> None:
    """Draw `network` into a .svg, .png or .pdf file. Raises PictureError, NetworkError, OSError."""
    check(path)
    columns = volumes(network)
    widths = [_column_width(column) for column in columns]
    tallest = max(sum(_part_heights(column)) for column in columns)
    rows = max(len(column.lines) for column in columns) + 1
    summary = summarise(network)
    title = (
        f"{summary.parameters:,} parameters, {summary.macs:,} multiply-accumulates for an image "
        + "x".join(map(str, network.input_shape[1:]))
    )
    words = max(text_width(title, 9), text_width(_SCALE, _TEXT))
    width = max(sum(widths) + _GAP * (len(widths) - 1), words) + 2 * _MARGIN
    middle = 44 + rows * _LINE + 14 + tallest / 2 + _MARGIN
    height = middle + tallest / 2 + 58
    with sheet(path, width, height, pixels=2) as axes:
        left = width / 2 - (sum(widths) + _GAP * (len(widths) - 1)) / 2
        before: list[_Box] = []
        for column, wide in zip(columns, widths, strict=True):
            centre = left + wide / 2
            boxes = list(_boxes(column, centre, middle))
            _connect(axes, before, boxes, column)
            for index, box in enumerate(boxes, start=1):
                _draw_box(axes, box, _COLOURS[column.kind])
                if column.towers > 1:
                    x, maps = box.x + box.length / 2, column.shape[0] // column.towers
                    name = f"tower {index}: {maps}"
                    axes.text(x, box.y - 3, name, size=6, ha="center", va="top", color=_SOFT)
            _write(axes, column, centre, middle - tallest / 2 - 20)
            before, left = boxes, left + wide + _GAP
        axes.text(_MARGIN, height - 26, network.name, size=15, weight="bold", color=_INK)
        axes.text(_MARGIN, height - 41, title, size=9, color=_SOFT)
        axes.text(_MARGIN, 20, _SCALE, size=_TEXT, color=_SOFT)


def _column_width(column: Volume) -> float:
    texts = [text_width(column.name, 9, bold=True)]
    texts += [text_width(line, _TEXT) for line in column.lines]
    box = next(_boxes(column, 0, 0))
    return max(*texts, box.corner(1, 0, 1)[0] - box.x)


def _part_heights(column: Volume) -> list[float]:
    """Points that each part takes on paper, with the space between two."""
    box = next(_boxes(column, 0, 0))
    high = box.corner(0, 1, 1)[1] - box.y
    return [high + (22 if index else 0) for index in range(column.towers)]


def _boxes(column: Volume, centre: float, middle: float) -> Iterator[_Box]:
    """The parts of a volume, the first tower on top; features are a bar that stands."""
    channels, *size = column.shape
    if size:
        length, height, width = _length(channels / column.towers), *map(_side, size)
    else:
        length, height, width = _side(1), _length(channels), _side(1)
    wide, high = length + width * _SLANT[0], height + width * _SLANT[1]
    pitch = high + 22
    top = middle + (column.towers - 1) * pitch / 2
    for tower in range(column.towers):
        yield _Box(centre - wide / 2, top - tower * pitch - high / 2, length, height, width)


def _draw_box(axes: Axes, box: _Box, colour: str) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Polygon

    faces = (  # front, top, and the side toward the next volume: lit differently
        (0.0, ((0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 1, 0))),
        (0.45, ((0, 1, 0), (1, 1, 0), (1, 1, 1), (0, 1, 1))),
        (0.25, ((1, 0, 0), (1, 0, 1), (1, 1, 1), (1, 1, 0))),
    )
    for light, corners in faces:
        face = tuple(part + (1 - part) * light for part in to_rgb(colour))
        points = [box.corner(*corner) for corner in corners]
        axes.add_patch(Polygon(points, facecolor=face, edgecolor="white", linewidth=0.6, zorder=2))


def _connect(axes: Axes, sources: Sequence[_Box], boxes: Sequence[_Box], column: Volume) -> None:
    """From the window on each volume that is read to each that is made of it."""
    from matplotlib.patches import Polygon

    for index, box in enumerate(boxes):
        for number, source in enumerate(sources):
            parted = column.groups > 1 or column.kind == "pool"
            if parted and len(sources) == len(boxes) and number != index:
                continue  # its own tower's maps alone
            side = (source.height / _side(1)) ** 2  # of the map that the window lies on
            part = min(column.window / side, 1.0) if column.window else 1.0
            low, high = 0.5 - part / 2, 0.5 + part / 2
            ends = ((low, low), (low, high), (high, high), (high, low))
            window = [source.corner(1, up, back) for up, back in ends]
            goal = box.corner(0, 0.5, 0.0)
            for corner in window:
                axes.plot(*zip(corner, goal, strict=True), color=_SOFT, lw=0.45, zorder=3)
            axes.add_patch(
                Polygon(window, facecolor="#ffffff66", edgecolor=_INK, linewidth=0.6, zorder=4)
            )


def _write(axes: Axes, column: Volume, x: float, y: float) -> None:
    axes.text(x, y, column.name, size=9, weight="bold", ha="center", va="top", color=_INK)
    for row, line in enumerate(column.lines, start=1):
        colour = _INK if row == 1 else _SOFT
        axes.text(x, y - 3 - row * _LINE, line, size=_TEXT, ha="center", va="top", color=colour)
