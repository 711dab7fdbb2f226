"""A whole network as a problem: the engine and its peers from the same images to logits.

Two ways in. Floats are the network's input as a torch model takes it, channels last, which is what
the peers like best. Pixels are what a decoder gives, uint8 and channels last too: the engine reads
them as they are, the peers normalise them first.

By the host's clock a peer on a GPU is what its careful user would write: one CUDA graph, captured
once, and the images copied to where it reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from ...engine import reference
from ...engine.bind import bind, pack
from ...engine.devices.planner import Planner
from ...engine.plan import ARITHMETIC
from ...engine.run import Engine
from ...engine.spec import AdaptiveAvgPool2d, Dropout, Network, Preprocess
from ..records import OURS
from .peers import Peer, Prepare, Prepared, peers
from .problem import Problem, Tensors, checked, tuned_planner
from .timing import Clock, capture

State = Mapping[str, torch.Tensor]


def planner(network: Network, dtype: str, device: torch.device) -> Planner:
    """As the engine plans on this device: with its tuned configurations and its order of launches.

    Raises TuningError for a table that cannot be read.
    """
    return replace(tuned_planner(network, ARITHMETIC[dtype], device), options=None)


def problem(planner: Planner, dtype: str, batch: int, pixels: bool = False) -> Problem:
    """The network from images to logits; `dtype` is the planner's, pixels are uint8.

    Its name is the network's, with " uint8" behind it for pixels: that is a race of its own. The
    layers are those that torch must compute too: no dropout, no pool that changes nothing.
    """
    network = planner.network
    layers = tuple(
        (name, layer)
        for name, layer, came, made in network.walk()
        if not isinstance(layer, Dropout)
        and not (isinstance(layer, AdaptiveAvgPool2d) and came == made)
    )
    images = torch.uint8 if pixels else planner.arithmetic.dtype
    name = f"{network.name} uint8" if pixels else network.name
    return Problem(name, dtype, planner(batch, image_dtype=images), layers, None)


def reads_pixels(whole: Problem) -> bool:
    """Whether its images are uint8."""
    return whole.name != whole.network.name


def tensors(
    whole: Problem,
    state: State,
    device: torch.device,
    generator: torch.Generator | None = None,
) -> Tensors:
    """Fresh random images [N, C, H, W], channels last, and the state in the problem's dtype.

    `generator` is the device's.
    """
    dtype, shape = whole.plan.arithmetic.dtype, (whole.batch, *whole.plan.image_shape)
    if reads_pixels(whole):
        x = torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=generator)
    else:
        x = torch.randn(shape, dtype=dtype, device=device, generator=generator)
    x = x.contiguous(memory_format=torch.channels_last)
    return Tensors(x, {name: tensor.to(device, dtype) for name, tensor in state.items()})


def copies(given: Tensors, count: int) -> list[Tensors]:
    """The same numbers in other memory, `given` first."""
    more = [
        Tensors(given.x.clone(), {name: tensor.clone() for name, tensor in given.state.items()})
        for _ in range(1, count)
    ]
    return [given, *more]


def expected(whole: Problem, given: Tensors) -> torch.Tensor:
    """float64 logits [n, classes] of the images of `problem.checked`, from the same state."""
    network = whole.network
    sample = given.x[checked(whole).to(given.x.device)]
    pixels = reference.normalise(sample, network.preprocess, torch.float64)
    state = {name: tensor.double() for name, tensor in given.state.items()}
    *_, logits = reference.forward(network, state, pixels).values()
    return logits


def contestants(
    whole: Problem, device: torch.device, clock: Clock, kinds: Sequence[str] | None = None
) -> list[Peer]:
    """The engine and then its peers, of the kinds in `peers.KINDS`, ready for this clock.

    Runs launch their work and return; by the clocks of a GPU they can be captured. Raises
    EngineError, listing the kinds, for one that is none.
    """
    engine = _engine if clock == "host" else kernels
    found = [Peer(OURS, lambda given: engine(whole, given))]
    for peer in peers(whole, device, kinds):
        prepare = peer.prepare
        if prepare is None:
            found.append(peer)
            continue
        order = torch.contiguous_format if peer.straw_man else torch.channels_last
        if reads_pixels(whole):
            prepare = _after_normalising(prepare, whole, order)
        if clock == "host" and device.type == "cuda":
            prepare = _as_a_graph(prepare, order)
        found.append(replace(peer, prepare=prepare))
    return found


# --- the engine ------------------------------------------------------------------------------


def kernels(whole: Problem, given: Tensors) -> Prepared:
    """The bound launches alone: what the engine records."""
    packed = pack(whole.network, given.state, whole.plan.arithmetic, given.x.device)
    bound = bind(whole.plan, packed)
    logits = bound.outputs[whole.step.name][0, 0]
    return Prepared(lambda: bound.run(given.x), lambda: logits)


def _engine(whole: Problem, given: Tensors) -> Prepared:
    """The engine as a user calls it."""
    engine = Engine.load(
        whole.network, given.state, given.x.device, whole.dtype, max_batch=whole.batch
    )
    return _kept(lambda: engine(given.x))


def _kept(make: Callable[[], torch.Tensor]) -> Prepared:
    """A run whose last output can be asked for."""
    kept: list[torch.Tensor] = []

    def run() -> None:
        kept[:] = [make()]

    return Prepared(run, lambda: kept[0])


# --- what surrounds a peer -------------------------------------------------------------------


def _after_normalising(prepare: Prepare, whole: Problem, order: torch.memory_format) -> Prepare:
    """The peer on pixels: one operation turns them into the floats that it reads."""
    dtype = whole.plan.arithmetic.dtype

    def prepared(given: Tensors) -> Prepared:
        scale, shift = _scale_and_shift(whole.network.preprocess, given.x.device)
        x = torch.empty_like(given.x, dtype=dtype, memory_format=order)

        def normalise() -> None:
            torch.addcmul(shift, given.x, scale, out=x)

        normalise()  # a peer may try its algorithms while it prepares
        peer = prepare(Tensors(x, given.state))

        def run() -> None:
            normalise()
            peer.run()

        return Prepared(run, peer.output)

    return prepared


def _scale_and_shift(
    preprocess: Preprocess, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [C, 1, 1], so that pixel * scale + shift is (pixel / 255 - mean) / std."""
    mean, std = (
        torch.tensor(arithmetic, dtype=torch.float32, device=device)[:, None, None]
        for arithmetic in (preprocess.mean, preprocess.std)
    )
    return 1 / (255 * std), -mean / std


def _as_a_graph(prepare: Prepare, order: torch.memory_format) -> Prepare:
    """The peer as one CUDA graph on images of its own, which a call fills from the caller's."""

    def prepared(given: Tensors) -> Prepared:
        x = given.x.clone(memory_format=order)
        peer = prepare(Tensors(x, given.state))
        peer.run()  # compiles, and lets libraries choose
        graph = capture([peer.run], x.device)

        def run() -> None:
            x.copy_(given.x)
            graph.replay()

        return Prepared(run, peer.output)

    return prepared
