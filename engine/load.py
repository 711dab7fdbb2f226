"""What `Engine.load` is asked for, found and checked: network, weights, devices, cards, numbers."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch

from .. import weights as weight_sources
from ..errors import Error
from ..kernels import tuning
from ..kernels.driver import SHARED_MEMORY
from ..kernels.jit import TooOld, architecture
from ..kernels.tuning import Table
from ..weights import Source
from .aten import module as torch_module
from .devices.cards import GPUS, find_card
from .dtypes import DTYPES
from .images import class_names
from .onnx import graph as onnx_graph
from .plan import ARITHMETIC, Arithmetic
from .spec import Network, Shape, Sigmoid, Softmax
from .zoo import network as network_named

Backend = Literal["triton", "torch"]
Split = Literal["pipeline", "towers"]
Classes = Sequence[str] | PathLike[str]
State = dict[str, torch.Tensor]


class EngineError(Error, ValueError):
    """A request the engine cannot serve: what was wanted, what came, what to do."""


@dataclass(frozen=True, slots=True)
class Target:
    """What plans are made for: an architecture, None to interpret, and what was tuned on a card.

    `name` is that of a card, or of an architecture, that was asked for and need not be here.
    """

    arch: int | None
    tuned: Table | None = None
    name: str | None = None


def find(network: object, input_shape: object = None) -> tuple[Network, Source | None]:
    """A network by name, by .onnx file, as a module or as itself, and the weights it comes with.

    Raises NetworkError for a name that is none and a module that is no chain, OnnxError for such a
    file, EngineError for what is neither.
    """
    if isinstance(network, torch.nn.Module):
        return torch_module.read(network, _image_shape(input_shape))
    if input_shape is not None:
        raise EngineError(f"input_shape: wanted beside a module alone, got {input_shape!r}")
    if isinstance(network, Network):
        return network, network.weights
    if not isinstance(network, str | PathLike):
        raise EngineError(
            "network: wanted a name, an .onnx file, a module or a Network, got "
            f"{type(network).__name__}"
        )
    word = os.fsdecode(network)
    if word.lower().endswith(".onnx"):
        return onnx_graph.read(word)
    named = network_named(word)
    return named, named.weights


def _image_shape(given: object) -> Shape:
    """The images that a module is for: torchvision's, unless others are asked for."""
    shape = (3, 224, 224) if given is None else given
    if (
        not isinstance(shape, Sequence)
        or len(shape) != 3
        or any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in shape)
    ):
        raise EngineError(f"input_shape: wanted (channels, height, width), got {given!r}")
    return tuple(shape)


def load_state(network: Network, source: Source | None) -> tuple[Network, State]:
    """The canonical state of `network` from any source, and the network with its outputs.

    A fine-tuned head may have another number of outputs than the published one: the weights of the
    last layer tell it. Raises WeightsError for weights that do not fit, EngineError for no source
    at all.
    """
    if source is None:
        raise EngineError(
            f"{network.name}: nobody publishes weights for it; name a file, a state dict or "
            "'random:SEED' as its weights"
        )
    state = weight_sources.load(
        source,
        network.parameter_shapes(),
        network=network.name,
        flattened=network.flattened(),
        head=network.head,
    )
    if network.head is None:
        return network, state
    outputs = len(state[f"{network.head}.weight"])
    end, before = network.layers[-1][1], network.output_shape()[0]
    # A softmax of one output is always 1, and sigmoids that were one are no classes.
    if isinstance(end, Sigmoid | Softmax) and (outputs == 1) != (before == 1):
        raise EngineError(
            f"{network.name}: wanted weights of {before} outputs for its {type(end).__name__}, got "
            f"{outputs}; write the Network that they are of"
        )
    return network.with_outputs(outputs), state


def read_classes(classes: object) -> tuple[str, ...] | None:
    """The names of classes that a caller gave: in order, or as a UTF-8 file, one a line.

    Raises EngineError for a file that cannot be read and for names that are none.
    """
    if classes is None:
        return None
    origin = "classes"
    if isinstance(classes, str | PathLike):
        origin = f"classes, {os.fsdecode(classes)}"
        try:
            text = Path(os.path.expanduser(os.fsdecode(classes))).read_text("utf-8-sig")
            classes = text.removesuffix("\n").split("\n")
        except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a NUL in the path
            cause = getattr(error, "strerror", None) or error
            raise EngineError(f"{origin}: cannot be read: {cause}") from None
    if not isinstance(classes, Sequence):
        kind = type(classes).__name__
        raise EngineError(f"{origin}: wanted names in order, or a file of them, got {kind}")
    for line, name in enumerate(classes, 1):
        if not isinstance(name, str) or not name.strip():
            raise EngineError(f"{origin}: wanted a name a class, got {name!r} as number {line}")
    return tuple(classes)


def named(network: Network, classes: tuple[str, ...] | None) -> tuple[str, ...]:
    """The words of the network's outputs, in order: the caller's, or else its own.

    Raises EngineError for another number of words than there are classes.
    """
    words = class_names(network) if classes is None else classes
    outputs, *maps = network.output_shape()
    if maps and classes is None:  # without classes nobody asks for words
        return words
    # One sigmoid says yes to the second of two classes.
    wanted = 2 if outputs == 1 and isinstance(network.layers[-1][1], Sigmoid) else outputs
    if maps or len(words) != wanted:
        raise EngineError(
            f"classes: wanted {'no' if maps else wanted} names, one a class of {network.name}, got "
            f"{len(words)}"
        )
    return words


def resolve(device: str | torch.device | None) -> torch.device:
    """A device that is there; None is the GPU if there is one, else the CPU. Raises EngineError."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError):
        raise EngineError(f"device: wanted 'cpu', 'cuda' or 'cuda:N', got {device!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise EngineError(f"device: wanted 'cpu', 'cuda' or 'cuda:N', got '{device}'")
    if device.type == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise EngineError(f"device: wanted '{device}', got a machine with {count} GPUs; use 'cpu'")
    return torch.device(
        "cuda", torch.cuda.current_device() if device.index is None else device.index
    )


def aim(target: str | None, device: torch.device, backend: Backend = "triton") -> Target:
    """What plans on `device` are made for: the device itself, or the card that `target` names.

    target: "sm_90", or a card by our name ("h200") or its driver's ("NVIDIA H200"), whose tuned
    table is then used. Raises EngineError for a target there is none of, one that is to run
    elsewhere than in the interpreter, or a GPU that is too old.
    """
    if target is None:
        try:
            return Target(architecture(device), tuning.table_of(device))
        except TooOld as error:
            if backend == "torch":  # whose plan is only looked at
                return Target(None)
            raise EngineError(f"{error}; Engine.load(backend='torch') runs there") from None
    if backend == "torch":
        raise EngineError(f"target: only the triton backend plans for a card, got {target!r}")
    if device.type != "cpu":
        raise EngineError(f"target: wanted device='cpu' to run {target!r}, got '{device}'")
    if (key := find_card(str(target))) is not None:
        card = GPUS[key]
        return Target(int(card.arch), tuning.table(card.device), card.name)
    archs = {f"sm_{arch}": arch for arch in SHARED_MEMORY}
    asked = str(target).strip().lower()
    if asked in archs:
        return Target(archs[asked], None, asked)
    legal = ", ".join([*GPUS, *archs])
    raise EngineError(f"target: wanted one of {legal}, got {target!r}")


def dtype_name(dtype: str | torch.dtype) -> str:
    """Our name of a dtype that torch, too, may have named. Raises EngineError."""
    name = str(dtype).removeprefix("torch.")
    name = {full: short for short, (full, how) in DTYPES.items() if how == "ieee"}.get(name, name)
    one_of("dtype", name, ARITHMETIC)
    return name


def arithmetic(
    dtype: str | torch.dtype | None,
    device: torch.device,
    backend: Backend,
    target: str | None = None,
) -> tuple[str, Arithmetic]:
    """The name and meaning of a dtype, None: fp16 on a GPU and for a target, fp32 on a CPU.

    torch's dtypes and their names are taken for ours. Raises EngineError.
    """
    if dtype is None:
        dtype = "fp32" if device.type == "cpu" and target is None else "fp16"
    name = dtype_name(dtype)
    if name == "bf16" and device.type == "cpu" and backend == "triton":
        raise EngineError(
            "dtype bf16 on a CPU: Triton's interpreter computes bfloat16 wrongly; "
            "use fp32 or fp16 here, or backend='torch'"
        )
    return name, ARITHMETIC[name]


def places(
    device: str | torch.device | None,
    devices: Any,
    split: Split | None,
    backend: Backend,
) -> tuple[torch.device, ...]:
    """The one device or the two that were asked for. Raises EngineError."""
    if split is None and devices is None:
        return (resolve(device),)
    one_of("split", str(split), ("pipeline", "towers"))
    if device is not None:
        raise EngineError(f"device: wanted devices alone with split={split!r}, got {device!r} too")
    if backend == "torch":
        raise EngineError(f"split: only the triton backend can, got {split!r} with 'torch'")
    if not isinstance(devices, tuple | list) or len(devices) != 2:
        got = len(devices) if isinstance(devices, tuple | list) else repr(devices)
        raise EngineError(
            f"devices: wanted two with split={split!r}, got {'none' if devices is None else got}"
        )
    first, second = (resolve(place) for place in devices)
    if first.type != second.type:
        raise EngineError(f"devices: wanted two of a kind, got {first} and {second}")
    return first, second


def one_of(argument: str, value: object, legal: Collection[str]) -> None:
    """Raises EngineError, listing the legal values, for any other."""
    if not isinstance(value, str) or value not in legal:
        raise EngineError(f"{argument}: wanted one of {', '.join(legal)}, got {value!r}")


def at_least_one(argument: str, value: object) -> int:
    """A count. Raises EngineError for what is none, or below 1."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise EngineError(f"{argument}: wanted a whole number, got {value!r}")
    if value < 1:
        raise EngineError(f"{argument}: wanted 1 or more, got {value}")
    return int(value)


def of_kind(argument: str, value: object, kind: type) -> None:
    """Raises EngineError for a value of another kind."""
    if not isinstance(value, kind):
        raise EngineError(f"{argument}: wanted {kind.__name__}, got {value!r}")
