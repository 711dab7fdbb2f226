"""What each verb of the shell does: `run_VERB` takes its options and returns its exit status.

It is imported when a verb runs and not before (`__main__.py`). The verbs that make rows are
in a room of their own, `jobs/`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from .. import weights
from ..errors import printable
from ..weights import Source
from .demo import demo
from .devices.advice import advise
from .devices.cards import CARDS, find_card
from .devices.planner import Planner
from .images import to_batch
from .load import State, aim, arithmetic, find, load_state, one_of, resolve
from .onnx import graph as onnx_graph
from .pictures.canvas import check
from .pictures.diagram import draw
from .pictures.explain import default_image, explain
from .pictures.maps import draw_filters, draw_maps
from .plan import ARITHMETIC
from .run import Engine
from .spec import Network
from .summary import summarise
from .verify import verify


def run_demo(options: argparse.Namespace) -> int:
    """The held-out digits; 1 if an answer is not torch's."""
    seen = demo(options.device, options.dtype, options.target, options.images)
    _print(seen, options)
    return 0 if seen.passed else 1


def run_summary(options: argparse.Namespace) -> int:
    """The table of layers, and the picture of them if one is wanted."""
    net = find(options.model)[0]
    if options.diagram:
        draw(net, options.diagram)
        print(f"{printable(str(options.diagram))}: the diagram", file=sys.stderr)
    planned = None
    if options.target is not None:
        planned = _planner(net, options.target, options.dtype)(options.batch)
    _print(summarise(net, planned), options)
    return 0


def run_explain(options: argparse.Namespace) -> int:
    """One output number taken apart; 1 if the engine's is another."""
    found = find(options.model)
    net = found[0]
    image = to_batch(options.image, net.preprocess) if options.image else default_image(net)
    place = (options.layer, options.filter, options.at)
    seen = explain(*_weighted(found, options), *place, image, **_how(options))
    _print(seen, options)
    return 0 if seen.equal else 1


def draw_features(options: argparse.Namespace, image: str) -> int:
    """Pictures of a layer's maps, and of the first layer's filters if they are wanted."""
    check(options.output)
    net, state = _weighted(find(options.model), options)
    engine = Engine.load(net, state, **_how(options), max_batch=1)
    written = {options.output: draw_maps(engine, image, options.layer, options.output)}
    if options.filters:
        path = options.output.with_suffix(f".filters{options.output.suffix}")
        written[path] = draw_filters(net, state, path)
    if options.json:
        named = [{"output": str(p), "width": w, "height": h} for p, (w, h) in written.items()]
        print(json.dumps({"model": net.name, "layer": options.layer, "pictures": named}, indent=2))
    else:
        for path, (width, height) in written.items():
            print(f"{printable(str(path))}: {width} x {height}")
    return 0


def run_verify(options: argparse.Namespace) -> int:
    """Every layer beside float64; 1 if one is out of tolerance."""
    net, state = _weighted(find(options.model), options)
    device = resolve(options.device or (options.target and "cpu"))
    generator = torch.Generator().manual_seed(options.seed)
    shape = (options.images, *net.input_shape)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    dtype, _ = arithmetic(options.dtype, device, "triton", options.target)
    result = verify(net, state, dtype, device, images, options.target)
    _print(result, options)
    return 0 if result.first_failure is None else 1


def run_plan(options: argparse.Namespace) -> int:
    """The map of a run on one card, and advice for two of it; needs neither card nor weights."""
    planner = _planner(find(options.model)[0], options.target, options.dtype)
    planned = planner(options.batch)
    advice = None
    if options.devices == 2:
        key = find_card(options.target) or options.target
        one_of("--target for --devices 2", key, CARDS)  # whose rates are known
        card = CARDS[key]
        advice = advise(planner, options.dtype, options.batch, card, options.micro_batch)
    if options.json:
        print(json.dumps({"plan": planned.to_dict(), "advice": advice and advice.to_dict()}))
        return 0
    print(planned)
    if advice:
        print(f"\n{advice}")
    return 0


def _planner(network: Network, target: str, dtype: str) -> Planner:
    """Plans as an engine on that card makes them; nothing runs, so any dtype will do."""
    aimed = aim(target, torch.device("cpu"))
    return Planner(network, ARITHMETIC[dtype], aimed.arch, tuned=aimed.tuned, options=None)


def run_convert(options: argparse.Namespace) -> int:
    """The canonical state of any source as one file."""
    if Path(options.source).suffix.lower() == ".onnx":
        net, state = onnx_graph.read(options.source)
    else:
        net = find(options.model)[0]
        net, state = load_state(net, options.source)
    weights.save(state, options.output)
    written = {
        "model": net.name,
        "output": str(options.output),
        "tensors": len(state),
        "parameters": sum(tensor.numel() for tensor in state.values()),
    }
    if options.json:
        print(json.dumps(written, indent=2))
    else:
        print(
            f"{printable(str(options.output))}: {written['tensors']} tensors of {net.name}, "
            f"{written['parameters']:,} parameters"
        )
    return 0


def _weighted(
    found: tuple[Network, Source | None], options: argparse.Namespace
) -> tuple[Network, State]:
    """A network with the weights of `--weights`, or else those that it comes with."""
    net, published = found
    return load_state(net, published if options.weights is None else options.weights)


def _how(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("device", "dtype", "backend")}


def _print(result: Any, options: argparse.Namespace) -> None:
    print(json.dumps(result.to_dict(), indent=2) if options.json else result)
