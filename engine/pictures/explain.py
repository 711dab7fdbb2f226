"""How one output number of a convolution or a linear layer comes about, and that the engine agrees.

The layer's input is what the engine's own step before made; from there on every product is summed
again in float64, so the explanation is exact and the engine's value may differ from it by rounding
alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ...kernels.epilogue import activated, row_of, rule
from ...weights.digits import heldout
from .. import reference
from ..fuse import Block, fuse
from ..images import to_batch
from ..load import Backend
from ..plan import ARITHMETIC
from ..run import Engine
from ..spec import (
    BatchNorm2d,
    Conv2d,
    Linear,
    Network,
    NetworkError,
    Nonlinearity,
    Shape,
)
from ..table import Columns, line
from ..verify import tolerance

_PARTS = 8  # at most so many partial sums are shown


@dataclass(frozen=True, slots=True)
class Window:
    """What a filter lies on: rows and columns of the input; those outside it are padding."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    padding: int  # taps of one channel that fall outside, and read zero


@dataclass(frozen=True, slots=True)
class Part:
    """The sum of the products of channels `first` to `last` of the input, both included."""

    first: int
    last: int
    value: float


@dataclass(frozen=True, slots=True)
class Stage:
    """What is done to the sum afterwards: the layer, its rule with its numbers, the result."""

    layer: str
    rule: str
    value: float


@dataclass(frozen=True, slots=True)
class Explanation:
    """One number: what it is read from, how it is summed, and what the engine made of it.

    `at` is (row, column) of the output and `window` what lies under the filter there, both None for
    a linear layer. `tower` is the group that the filter belongs to, counted from 1, of `towers`.
    `bound` is how far rounding in the engine's dtype may take its value from ours.
    """

    network: str
    layer: str
    kind: str
    filter: int
    at: tuple[int, int] | None
    dtype: str
    device: str
    reads: str
    input_shape: Shape
    tower: int
    towers: int
    window: Window | None
    products: int
    parts: tuple[Part, ...]
    bias: float
    sum: float
    stages: tuple[Stage, ...]
    engine_value: float
    bound: float

    @property
    def value(self) -> float:
        """The number, as summed here."""
        return self.stages[-1].value if self.stages else self.sum

    @property
    def equal(self) -> bool:
        """Whether the engine's value is ours within `bound`; NaN never is."""
        return abs(self.engine_value - self.value) <= self.bound

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        return asdict(self) | {"value": self.value, "equal": self.equal}

    def __str__(self) -> str:
        place = "" if self.at is None else f" at row {self.at[0]}, column {self.at[1]}"
        shape = "x".join(map(str, self.input_shape))
        lines = [
            f"{self.network}, {self.layer} ({self.kind}), filter {self.filter}{place}",
            f"reads     {self.reads}, {shape}"
            + (f", tower {self.tower} of {self.towers} only" if self.towers > 1 else ""),
        ]
        if self.window is not None:
            lines += _window_lines(self.window, self.input_shape)
        kind = "feature" if len(self.input_shape) == 1 else "channel"
        numbers = [
            *((_span(kind, part.first, part.last), part.value, "") for part in self.parts),
            ("bias", self.bias, ""),
            ("sum", self.sum, ""),
            *((stage.layer, stage.value, stage.rule) for stage in self.stages),
            (f"engine ({self.dtype}, {self.device})", self.engine_value, ""),
        ]
        difference = abs(self.engine_value - self.value)
        lines += [
            f"products  {self.products:,}, summed in float64:",
            *(line(number, _COLUMNS) for number in numbers),
            f"equal: {'yes' if self.equal else 'no'} (they differ by {difference:.1e}, rounding "
            f"to {self.dtype} allows {self.bound:.1e})",
        ]
        return "\n".join(lines)


_COLUMNS: Columns[tuple[str, float, str]] = [
    ("", -28, lambda number: f"  {number[0]}"),
    ("", 16, lambda number: f"{number[1]:+.8f}"),
    ("", 0, lambda number: f" {number[2]}"),
]


def _span(kind: str, first: int, last: int) -> str:
    return f"{kind} {first}" if first == last else f"{kind}s {first}-{last}"


def _window_lines(window: Window, shape: Shape) -> list[str]:
    def span(name: str, places: tuple[int, ...], size: int) -> str:
        step = f" by {places[1] - places[0]}" if places[1:] and places[1] > places[0] + 1 else ""
        outside = [str(p) for p in places if not 0 <= p < size]
        note = f" (outside: {', '.join(outside)})" if outside else ""
        return f"{name} {places[0]} to {places[-1]}{step}{note}"

    taps = len(window.rows) * len(window.columns)
    rows = span("rows", window.rows, shape[1])
    columns = span("columns", window.columns, shape[2])
    return [
        f"window    {rows}, {columns}",
        f"          {taps} taps a channel, {window.padding} of them padding, which is zero",
    ]


def default_image(network: Network) -> torch.Tensor:
    """uint8 [1, C, H, W] for who names no image: a held-out digit for digits, else seeded noise."""
    if network.weights == "digits":
        return to_batch(heldout()[0][0], network.preprocess)
    generator = torch.Generator().manual_seed(0)
    shape = (1, *network.input_shape)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def explain(
    network: Network,
    state: Mapping[str, torch.Tensor],
    layer: str,
    filter: int,
    at: tuple[int, int] | None,
    image: torch.Tensor,
    *,
    device: str | torch.device | None = None,
    dtype: str | None = None,
    backend: Backend = "triton",
) -> Explanation:
    """Explain the output of `filter` of `layer` at row and column `at` for `image` [1, C, H, W].

    image: uint8 pixels, or normalised floats. at: None for a linear layer. Raises NetworkError for
    a layer, a filter or a place that is not there, and what `Engine.load` raises.
    """
    blocks = fuse(network, tuple(image.shape[1:]))
    block, before = _found(blocks, network, layer)
    _check_place(block, network, filter, at)

    engine = Engine.load(network, dict(state), device, dtype, backend, max_batch=1)
    arithmetic = ARITHMETIC[engine.dtype]
    seen = engine.features(image, [layer] if before is None else [before, layer])
    if before is None:
        pixels = image.cpu()
        x = reference.normalise(pixels, network.preprocess, torch.float64)[0]
        # Rounding acts on larger numbers than these, in which mean and pixel may cancel.
        added = replace(network.preprocess, mean=tuple(-m for m in network.preprocess.mean))
        size = reference.normalise(pixels, added, torch.float64)[0].abs()
        x = x.to(arithmetic.dtype).double()
    else:
        x = seen[before][0].double().cpu()
        size = x.abs()
    values = {key: tensor.to(arithmetic.dtype).double().cpu() for key, tensor in state.items()}
    weight, bias = values[f"{layer}.weight"][filter], values[f"{layer}.bias"][filter].item()

    window, tower, first = None, 0, 0
    if isinstance(block.layer, Conv2d):
        assert at is not None
        window = _window(block.layer, at, block.came)
        tower = filter // (block.layer.out_channels // block.layer.groups)
        first = tower * len(weight)
        x, size = (_under(t, block.layer, at)[first : first + len(weight)] for t in (x, size))
    products = (weight.reshape(x.shape) * x).reshape(len(x), -1)
    magnitude = (weight.reshape(size.shape).abs() * size).sum().item() + abs(bias)
    parts = _parts(products.sum(1), first)
    total = math.fsum([*products.flatten().tolist(), bias])
    stages, magnitude = _stages(block, dict(network.layers), values, filter, total, magnitude)
    place = (0, filter) if at is None else (0, filter, *at)
    return Explanation(
        network=network.name,
        layer=layer,
        kind=type(block.layer).__name__,
        filter=filter,
        at=at,
        dtype=engine.dtype,
        device=str(engine.device),
        reads=before or "the normalised image",
        input_shape=tuple(seen[before].shape[1:]) if before else block.came,
        tower=tower + 1,
        towers=block.layer.groups if isinstance(block.layer, Conv2d) else 1,
        window=window,
        products=products.numel(),
        parts=parts,
        bias=bias,
        sum=total,
        stages=stages,
        engine_value=seen[layer][place].item(),
        bound=magnitude * tolerance(arithmetic, products.numel()),
    )


def _found(blocks: list[Block], network: Network, layer: str) -> tuple[Block, str | None]:
    """The block of that name and the step before it, None for the image."""
    before = None
    for block in blocks:
        if block.name == layer and isinstance(block.layer, Conv2d | Linear):
            return block, before
        before = block.name
    legal = ", ".join(b.name for b in blocks if isinstance(b.layer, Conv2d | Linear))
    raise NetworkError(f"{network.name}, layer: wanted one of {legal}, got {layer!r}")


def _check_place(block: Block, network: Network, filter: int, at: tuple[int, int] | None) -> None:
    count, *size = block.output
    where = f"{network.name}, {block.name}"
    if not 0 <= filter < count:
        raise NetworkError(f"{where}, filter: wanted 0 to {count - 1}, got {filter}")
    if not size:
        if at is not None:
            raise NetworkError(f"{where}, at: a linear layer has no rows and columns; leave it out")
        return
    legal = f"wanted a row of 0 to {size[0] - 1} and a column of 0 to {size[1] - 1}"
    if at is None or not all(0 <= place < side for place, side in zip(at, size, strict=True)):
        got = "none" if at is None else ",".join(map(str, at))
        raise NetworkError(f"{where}, at: {legal}, got {got}")


def _window(layer: Conv2d, at: tuple[int, int], came: Shape) -> Window:
    rows, columns = (
        tuple(
            place * layer.stride - layer.padding + tap * layer.dilation
            for tap in range(layer.kernel_size)
        )
        for place in at
    )
    inside = sum(0 <= row < came[1] for row in rows) * sum(0 <= c < came[2] for c in columns)
    return Window(rows, columns, len(rows) * len(columns) - inside)


def _under(x: torch.Tensor, layer: Conv2d, at: tuple[int, int]) -> torch.Tensor:
    """[C, K, K] of [C, H, W]: what lies under the filter, with zeros for padding."""
    padded = torch.nn.functional.pad(x, (layer.padding,) * 4)
    reach = (layer.kernel_size - 1) * layer.dilation + 1
    rows, columns = (slice(p * layer.stride, p * layer.stride + reach, layer.dilation) for p in at)
    return padded[:, rows, columns]


def _parts(sums: torch.Tensor, first: int) -> tuple[Part, ...]:
    """Sums of the products of each channel, joined to as few neighbours as make `_PARTS` parts."""
    length = -(-len(sums) // _PARTS)
    parts = []
    for start in range(0, len(sums), length):
        piece = sums[start : start + length].tolist()
        parts.append(Part(first + start, first + start + len(piece) - 1, math.fsum(piece)))
    return tuple(parts)


def _stages(
    block: Block,
    layers: Mapping[str, object],
    values: Mapping[str, torch.Tensor],
    channel: int,
    value: float,
    magnitude: float,
) -> tuple[tuple[Stage, ...], float]:
    """What is fused after the sum, and the magnitude of the terms of its result."""
    stages = []
    for name in block.layers[1:]:
        match layer := layers[name]:
            case BatchNorm2d():
                weight, bias, mean, variance = (
                    values[f"{name}.{key}"][channel].item()
                    for key in ("weight", "bias", "running_mean", "running_var")
                )
                scale = weight / math.sqrt(variance + layer.eps)
                value = (value - mean) * scale + bias
                magnitude = (magnitude + abs(mean)) * abs(scale) + abs(bias)
                words = (
                    f"BatchNorm: (x - {mean:.6g}) / sqrt({variance:.6g} + {layer.eps:g}) "
                    f"* {weight:.6g} + {bias:.6g}"
                )
            case Nonlinearity(activation=activation):  # none is steeper than 1
                number = torch.tensor(value, dtype=torch.float64)
                value, words = activated(number, activation).item(), rule(activation)
                magnitude += row_of(activation)[0].rounding
            case _:
                raise AssertionError(f"{name}: {layer} is fused, but not explained")
        stages.append(Stage(name, words, value))
    return tuple(stages), magnitude
