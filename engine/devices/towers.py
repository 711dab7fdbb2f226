"""Two devices side by side, as in 2012: each holds half of every layer's filters.

A grouped convolution reads its own tower's maps only. A layer that reads everything (conv3, the
linear layers) first needs the other tower's half: there the towers exchange what they made. Each
device runs an ordinary plan of a half network, made from the network by `half`; weights are halved
along their first axis, whatever the layer. The same device may be named twice.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ..bind import Bound, State, bind, pack
from ..plan import Step
from ..spec import (
    Conv2d,
    Flatten,
    Gather,
    Layer,
    Linear,
    LocalResponseNorm,
    Network,
    NetworkError,
    Softmax,
)
from .planner import Planner
from .runner import synchronize, to_nchw

TOWERS = 2


def half(network: Network) -> Network:
    """What each device runs: half of every layer's filters, and a `Gather` wherever a layer reads
    both towers' maps.

    Raises NetworkError, naming the layer, where filters do not divide or a layer mixes the towers.
    """
    layers: list[tuple[str, Layer]] = []
    halved = False  # whether the activation so far is one tower's half

    def gather(name: str) -> None:
        nonlocal halved
        if halved:
            layers.append((f"join_{name}", Gather(TOWERS)))
        halved = False

    for name, layer in network.layers:
        where = f"{network.name} in two towers, layer {name}"
        match layer:
            case Conv2d(groups=1) | Linear() | Softmax() | Flatten():
                gather(name)  # before a flatten, while channels are still channels
            case Conv2d(groups=groups) if groups != TOWERS or not halved:
                raise NetworkError(f"{where}: wanted 1 or {TOWERS} groups, got {groups}")
            case LocalResponseNorm(groups=groups) if halved and groups != TOWERS:
                raise NetworkError(
                    f"{where}: it normalises across the towers; wanted groups={TOWERS}"
                )
        match layer:
            case Conv2d(out_channels=filters) | Linear(filters) if filters % TOWERS:
                raise NetworkError(
                    f"{where}: {filters} outputs do not divide by {TOWERS}; "
                    "split='pipeline' takes any"
                )
            case Conv2d():
                layer = replace(layer, out_channels=layer.out_channels // TOWERS, groups=1)
                halved = True
            case Linear():
                layer = replace(layer, out_features=layer.out_features // TOWERS)
                halved = True
            case LocalResponseNorm() if halved:
                layer = replace(layer, groups=1)
        layers.append((name, layer))
    gather("output")
    return replace(network, layers=tuple(layers))


def exchanged(network: Network, itemsize: int) -> int:
    """Bytes that the towers send each other for one image, both ways together."""
    walk = half(network).walk()
    joined = [torch.Size(output) for _, layer, _, output in walk if isinstance(layer, Gather)]
    return sum(output.numel() for output in joined) * (TOWERS - 1) * itemsize


class Towers:
    """The Triton kernels over two devices, half of every layer on each."""

    def __init__(
        self, planner: Planner, state: State, devices: tuple[torch.device, torch.device]
    ) -> None:
        self.devices = devices
        self.planner = planner
        self._half = replace(planner, network=half(planner.network))
        self._packed = [
            pack(
                self._half.network,
                {name: tensor.chunk(TOWERS)[tower] for name, tensor in state.items()},
                planner.arithmetic,
                device,
            )
            for tower, device in enumerate(devices)
        ]
        self._bound: dict[object, list[Bound]] = {}

    def run(
        self, images: torch.Tensor, keep: tuple[str, ...], configured_for: int
    ) -> dict[str, torch.Tensor]:
        """Outputs of the steps in `keep`, both towers' halves joined."""
        key = (images.shape, images.dtype, keep, configured_for)
        if key not in self._bound:
            planned = self._half(
                len(images), tuple(images.shape[1:]), images.dtype, keep, configured_for
            )
            synchronize(self.devices)  # a kernel may still write what is about to be freed
            self._bound = {}  # one batch shape at a time keeps its memory
            self._bound[key] = [bind(planned, packed) for packed in self._packed]
        towers = self._bound[key]
        for bound, device in zip(towers, self.devices, strict=True):
            bound.first(images.to(device, non_blocking=True))()
        before = "input"
        for i, step in enumerate(towers[0].plan.steps[1:]):
            if isinstance(step.block and step.block.layer, Gather):
                self._exchange(towers, before, step.name)
            else:
                for bound in towers:
                    for launch in bound.launches[i][1]:
                        launch()
            before = step.name
        kept = [step for step in towers[0].plan.steps if step.name in keep]
        return {step.name: self._joined(towers, step) for step in kept}

    def _exchange(self, towers: list[Bound], source: str, target: str) -> None:
        """Put every tower's `source` side by side into every tower's `target`.

        A copy between two GPUs is ordered after the current streams of both, and they after it.
        """
        for reader in towers:
            whole = reader.outputs[target]
            parts = whole.chunk(len(towers), dim=-1)
            for part, writer in zip(parts, towers, strict=True):
                part.copy_(writer.outputs[source], non_blocking=True)

    def _joined(self, towers: list[Bound], step: Step) -> torch.Tensor:
        """A step's output of the whole network: every tower's part, or what they all have."""
        parts = [to_nchw(step, bound.outputs[step.name]).to(self.devices[-1]) for bound in towers]
        shapes = {name: shape for name, _, _, shape in self.planner.network.walk()}
        (channels, *_) = shapes[step.name]
        return parts[0] if parts[0].shape[1] == channels else torch.cat(parts, 1)
