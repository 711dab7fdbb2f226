"""A network as a table: what each layer is, makes, owns and costs."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from .plan import Plan
from .spec import Conv2d, Dropout, Linear, Network, Owner, Pool, Shape
from .table import Columns, columns


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One layer for one image; kernel, stride and padding are None where a layer has none."""

    name: str
    kind: str
    kernel_size: int | None
    stride: int | None
    padding: int | None
    output_shape: Shape
    parameters: int
    macs: int
    note: str
    step: str | None = None  # the kernel and its tile, or the step that does it too; of a plan


@dataclass(frozen=True, slots=True)
class Summary:
    """All rows of a network. `str` is the table, `to_dict` what `--json` prints.

    `plan` says whose steps the rows name: "sm_90, fp16, 256 images".
    """

    network: str
    input_shape: Shape
    rows: tuple[LayerRow, ...]
    plan: str | None = None

    @property
    def parameters(self) -> int:
        """Numbers the network owns."""
        return sum(row.parameters for row in self.rows)

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image."""
        return sum(row.macs for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """`{"network", "input_shape", "plan", "layers": [...], "parameters", "macs"}`."""
        return {
            "network": self.network,
            "input_shape": list(self.input_shape),
            "plan": self.plan,
            "layers": [asdict(row) for row in self.rows],
            "parameters": self.parameters,
            "macs": self.macs,
        }

    def __str__(self) -> str:
        size = "x".join(map(str, self.input_shape))
        planned = f", steps in {self.plan}" if self.plan else ""
        lines = [
            f"{self.network}, one image {size}{planned}",
            *columns(self.rows, [*_COLUMNS, (" step" if self.plan else "", 0, _words)]),
            f"{'total':<60}{self.parameters:>12,} {self.macs:>13,}",
        ]
        return "\n".join(lines)


def _number(value: int | None) -> str:
    return "" if value is None else str(value)


def _words(row: LayerRow) -> str:
    return " " + "  ".join(word for word in (row.step, row.note) if word)


_COLUMNS: Columns[LayerRow] = [
    ("layer", -9, lambda row: row.name),
    ("kind", -18, lambda row: row.kind),
    ("kernel", 6, lambda row: _number(row.kernel_size)),
    ("stride", 6, lambda row: _number(row.stride)),
    ("pad", 4, lambda row: _number(row.padding)),
    ("output", 12, lambda row: "x".join(map(str, row.output_shape))),
    ("parameters", 12, lambda row: f"{row.parameters:,}"),
    ("MACs", 13, lambda row: f"{row.macs:,}"),
]


def summarise(network: Network, planned: Plan | None = None) -> Summary:
    """The table of `network` at the image size it is published for.

    With a plan, each row names the step that computes it.
    """
    steps: dict[str, str] = {}
    for step in planned.steps if planned else ():
        own = f"{step.kernel} {step.tile}".rstrip()
        steps |= {name: f"in {step.name}" if i else own for i, name in enumerate(step.layers)}
    rows = []
    for name, layer, shape, output in network.walk():
        owned = layer.parameter_shapes(shape) if isinstance(layer, Owner) else {}
        window = layer if isinstance(layer, Conv2d | Pool) else None
        rows.append(
            LayerRow(
                name=name,
                kind=type(layer).__name__,
                kernel_size=window.kernel_size if window else None,
                stride=window.stride if window else None,
                padding=window.padding if window else None,
                output_shape=output,
                parameters=sum(map(math.prod, owned.values())),
                macs=layer.macs(shape) if isinstance(layer, Conv2d | Linear) else 0,
                note="identity: this is inference" if isinstance(layer, Dropout) else "",
                step=steps.get(name),
            )
        )
    where = f"{planned.where}, {planned.batch} images" if planned else None
    return Summary(network.name, network.input_shape, tuple(rows), where)
