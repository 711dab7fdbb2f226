"""Who computes a problem, and what each looks like to its caller: the engine, then its peers.

A layer is a run of launches whichever clock times it. A whole network by the host's clock is what
its user would write: the engine as it is called, and on a GPU a peer as one CUDA graph, captured
once, with the images copied to where it reads them. Pixels are read by the engine as they are;
peers normalise them first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from ...engine.run import Engine
from ...engine.spec import Preprocess
from ..records import OURS
from .peers import Peer, Prepare, Prepared, kept, peers
from .problem import Problem, Tensors, ready
from .timing import capture


def contestants(
    problem: Problem, device: torch.device, kinds: Sequence[str] | None = None
) -> list[Peer]:
    """The engine's kernels and then its peers, of the kinds in `peers.KINDS`.

    Runs launch their work and return; on a GPU they can be captured. Raises EngineError, listing
    the kinds, for one that is none.
    """
    note = ""
    if problem.plan.steps[0].block is None and not problem.whole:
        note = "with the pass over the images"
    everyone = [kernels(problem, OURS, note)]
    for peer in peers(problem, device, kinds):
        if problem.pixels and peer.prepare is not None:
            peer = replace(peer, prepare=_after_normalising(peer.prepare, problem, _order(peer)))
        everyone.append(peer)
    return everyone


def kernels(problem: Problem, name: str, note: str = "") -> Peer:
    """The engine's bound launches alone: what it records, and a layer's kernels."""

    def prepare(given: Tensors) -> Prepared:
        bound = ready(problem, given)
        return Prepared(bound, bound.output, bound.poison)

    return Peer(name, prepare, note=note)


def called(one: Peer, problem: Problem, device: torch.device) -> Peer:
    """A contestant on a whole network as its user would call it."""
    if one.name == OURS:
        return replace(one, prepare=lambda given: _engine(problem, given))
    if one.prepare is None or device.type != "cuda":
        return one
    return replace(one, prepare=_as_a_graph(one.prepare, _order(one)))


def _engine(problem: Problem, given: Tensors) -> Prepared:
    engine = Engine.load(
        problem.network, given.state, given.x.device, problem.dtype, max_batch=problem.batch
    )
    return kept(lambda: engine(given.x))


def _order(peer: Peer) -> torch.memory_format:
    """In which order of channels it likes its images."""
    return torch.contiguous_format if peer.straw_man else torch.channels_last


def _after_normalising(prepare: Prepare, problem: Problem, order: torch.memory_format) -> Prepare:
    """The peer on pixels: one operation turns them into the floats that it reads."""
    dtype = problem.plan.arithmetic.dtype

    def prepared(given: Tensors) -> Prepared:
        scale, shift = _scale_and_shift(problem.network.preprocess, given.x.device)
        x = torch.empty_like(given.x, dtype=dtype, memory_format=order)

        def normalise() -> None:
            torch.addcmul(shift, given.x, scale, out=x)

        normalise()  # a peer may try its algorithms while it prepares
        peer = prepare(Tensors(x, given.state))

        def run() -> None:
            normalise()
            peer.run()

        return replace(peer, run=run)

    return prepared


def _scale_and_shift(
    preprocess: Preprocess, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [C, 1, 1], so that pixel * scale + shift is (pixel / 255 - mean) / std."""
    mean, std = (
        torch.tensor(each, dtype=torch.float32, device=device)[:, None, None]
        for each in (preprocess.mean, preprocess.std)
    )
    return 1 / (255 * std), -mean / std


def _replay(
    graph: torch.cuda.CUDAGraph, x: torch.Tensor, images: torch.Tensor, held: Prepared
) -> None:
    """Run a graph that reads x on these images.

    `held` is what it was captured from: a graph keeps none of the tensors that it reads, such as
    weights in the peer's own order, and memory that is given back may be anybody's, or nobody's.
    """
    x.copy_(images)
    graph.replay()


def _as_a_graph(prepare: Prepare, order: torch.memory_format) -> Prepare:
    """The peer as one CUDA graph on images of its own, which a call fills from the caller's."""

    def prepared(given: Tensors) -> Prepared:
        x = given.x.clone(memory_format=order)
        peer = prepare(Tensors(x, given.state))
        peer.run()  # compiles, and lets libraries choose
        graph = capture([peer.run], x.device)

        return replace(peer, run=partial(_replay, graph, x, given.x, peer))

    return prepared
