"""The canonical state: how tensors from anywhere get their names, and what they must pass."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

import torch
from torch.nn.parameter import is_lazy

from ..errors import Error
from .pickled import Unbuilt

State = dict[str, torch.Tensor]

_WRAPPERS = {"module", "_orig_mod", "model"}  # of DataParallel, torch.compile and Lightning
MAX_OUTPUTS = 2**16  # of a head that says so itself: a few bytes may claim any number of values
_SHOWN = 4  # names listed in an error before "and N more"


class WeightsError(Error, ValueError):
    """Weights that cannot be used: one line naming the source, the tensor, wanted, got, cure."""


def canonical(
    state: object, expected: Mapping[str, tuple[int, ...]], origin: str, head: str | None = None
) -> State:
    """The tensors of `state` under the names and in the order of `expected`.

    Each is a float32, contiguous, finite CPU copy of the shape that `expected` says; only of the
    layer `head` the stored weight says how many outputs there are. `state` is what came out of a
    file or from a caller, so nothing is believed; `origin` names it in errors.

    Raises WeightsError for anything but a state dict, for a missing, extra or twofold tensor, for
    more outputs than `MAX_OUTPUTS`, and for a tensor of a wrong shape or of no float dtype, or with
    values not finite in float32.
    """
    tensors = _tensors(state, origin)
    stored = _stored_names(tensors, expected, origin)
    missing = [name for name in expected if name not in stored]
    extra = [key for name, key in stored.items() if name not in expected]
    if missing or extra:
        lists = (("missing", missing), ("extra", extra))
        found = "; ".join(f"{word} {_listed(names)}" for word, names in lists if names)
        raise WeightsError(
            f"{origin}: {found}; wanted {len(expected)} tensors, got {len(tensors)}; "
            "cure: load the state dict of this network, whole and alone"
        )
    if head:
        outputs = _outputs(tensors[stored[f"{head}.weight"]])
        expected = with_outputs(expected, head, outputs, origin)
    return {
        name: _converted(tensors[stored[name]], shape, f"{origin}: {_label(name, stored[name])}")
        for name, shape in expected.items()
    }


def with_outputs(
    expected: Mapping[str, tuple[int, ...]], head: str, outputs: int, origin: str
) -> Mapping[str, tuple[int, ...]]:
    """`expected` with so many outputs of the layer `head`; 0 is as many as there are.

    Raises WeightsError, which names `origin`, for more than `MAX_OUTPUTS` and than there are.
    """
    limit = max(MAX_OUTPUTS, expected[f"{head}.weight"][0])
    if outputs > limit:
        raise WeightsError(
            f"{origin}: {head} wanted up to {limit} outputs, got {outputs}; "
            "cure: load the weights of this network"
        )
    own = {f"{head}.weight", f"{head}.bias"} if outputs else set()
    return {n: (outputs, *shape[1:]) if n in own else shape for n, shape in expected.items()}


def _outputs(weight: torch.Tensor) -> int:
    """How many a linear layer has; 0 for what is no weight of one, which is refused later."""
    return 0 if weight.is_nested or weight.dim() != 2 else len(weight)


def _tensors(state: object, origin: str) -> State:
    """`state`, or the state dict nested in it, once it is known to be names and tensors."""
    if isinstance(state, Mapping) and "state_dict" in state:
        nested = state["state_dict"]
        state = nested if isinstance(nested, Mapping) else state
    cure = "cure: save model.state_dict() alone"
    if not isinstance(state, Mapping):
        kind = type(state).__name__
        raise WeightsError(f"{origin}: wanted a state dict of tensors, got {kind}; {cure}")
    tensors: State = {}
    for key in state:
        if not isinstance(key, str):
            kind = key.kind if isinstance(key, Unbuilt) else type(key).__name__
            raise WeightsError(f"{origin}: wanted tensor names, got a key of type {kind}; {cure}")
        value = state[key]
        if isinstance(value, Unbuilt):
            raise WeightsError(
                f"{origin}: {key!r} wanted dense floats, got {value.kind}; "
                "cure: store it dense, as float32"
            )
        if not isinstance(value, torch.Tensor) or is_lazy(value):
            kind = type(value).__name__
            raise WeightsError(f"{origin}: {key!r} wanted a tensor, got {kind}; {cure}")
        tensors[key] = torch.Tensor.detach(value)  # without what somebody set on it, as dim = 3
    return tensors


def _stored_names(
    tensors: State, expected: Mapping[str, tuple[int, ...]], origin: str
) -> dict[str, str]:
    """From the canonical name of each tensor to the name it was stored under."""
    bare = {key: ".".join(p for p in key.split(".") if p not in _WRAPPERS) for key in tensors}
    ranks = {bare[key]: tensor.dim() for key, tensor in tensors.items()}
    layers = _torchvision_layers(ranks, expected)
    stored: dict[str, str] = {}
    for key, name in bare.items():
        layer, dot, kind = name.rpartition(".")
        name = layers.get(layer, layer) + dot + kind
        if name in stored:
            raise WeightsError(
                f"{origin}: wanted one {name}, got {stored[name]} and {key}; "
                "cure: keep the one that is meant"
            )
        stored[name] = key
    return stored


def _torchvision_layers(
    ranks: Mapping[str, int], expected: Mapping[str, tuple[int, ...]]
) -> dict[str, str]:
    """Canonical layers for `features.N` and `classifier.N`, of any AlexNet or VGG.

    torchvision numbers the modules of each half, so the i-th number that owns a convolution's
    weight is the i-th convolution expected; the classifier and the linear layers likewise.
    `ranks` tells how many dimensions the tensor of each name has.
    """
    layers: dict[str, str] = {}
    for half, rank in (("features", 4), ("classifier", 2)):
        weight = re.compile(rf"{half}\.([0-9]{{1,4}})\.weight")
        arithmetic = sorted(
            int(found[1])
            for name, dimensions in ranks.items()
            if dimensions == rank and (found := weight.fullmatch(name))
        )
        wanted = [
            name.removesuffix(".weight")
            for name, shape in expected.items()
            if name.endswith(".weight") and len(shape) == rank
        ]
        layers |= {f"{half}.{n}": layer for n, layer in zip(arithmetic, wanted, strict=False)}
    return layers


def _converted(tensor: torch.Tensor, shape: tuple[int, ...], label: str) -> torch.Tensor:
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_nested:
        kind = "meta" if tensor.is_meta else "nested" if tensor.is_nested else ""
        got = f"a {kind} tensor" if kind else f"layout {tensor.layout}"
        raise WeightsError(f"{label} wanted dense values, got {got}; cure: store it dense")
    if not tensor.is_floating_point():
        raise WeightsError(
            f"{label} wanted a float dtype, got {tensor.dtype}; cure: store it as float32"
        )
    if tuple(tensor.shape) != tuple(shape):
        raise WeightsError(
            f"{label} wanted shape {tuple(shape)}, got {tuple(tensor.shape)}; "
            "cure: load the weights of this network"
        )
    try:
        values = tensor.to("cpu", torch.float32, copy=True, memory_format=torch.contiguous_format)
    except NotImplementedError as error:  # of dtypes that hold two values in a byte
        raise WeightsError(
            f"{label} wanted values that torch can convert, got {tensor.dtype} ({error}); "
            "cure: store it as float32"
        ) from None
    except (RuntimeError, MemoryError) as error:  # of memory, where torch has one kind of error
        raise WeightsError(
            f"{label} wanted {4 * math.prod(shape)} bytes of memory, got an error: {error}; "
            "cure: free memory"
        ) from None
    broken = ~values.isfinite()
    if broken.any():
        first = tuple(broken.nonzero()[0].tolist())
        raise WeightsError(
            f"{label} wanted finite float32 values, got {int(broken.sum())} NaN or infinite "
            f"({values[first].item()} at {first}); cure: save it again from a sound model"
        )
    if "running_var" in label and (values < 0).any():
        raise WeightsError(
            f"{label} wanted variances of 0 or more, got {values.min().item()}; "
            "cure: save it again from a sound model"
        )
    return values


def _label(name: str, key: str) -> str:
    return name if name == key else f"{name} (stored as {key})"


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
