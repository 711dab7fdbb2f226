"""The canonical state: how tensors from anywhere get their names, and what they must pass."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch.nn.parameter import is_lazy

from ..errors import Error
from .pickled import Unbuilt

State = dict[str, torch.Tensor]
Shapes = Mapping[str, tuple[int, ...]]

_WRAPPERS = {"module", "_orig_mod", "model"}  # of DataParallel, torch.compile and Lightning
MAX_OUTPUTS = 2**16  # of a head that says so itself: a few bytes may claim any number of values
_SHOWN = 8  # names listed in an error before "and N more"

OF_THIS_NETWORK = "load the weights of this network"
_ALONE = "save model.state_dict() alone"
_AS_FLOAT32 = "store it as float32"
_SOUND = "save it again from a sound model"


class WeightsError(Error, ValueError):
    """Weights that cannot be used: one line naming the source, the tensor, wanted, got, cure."""


def unfit(what: str, wanted: object, got: object, cure: str) -> WeightsError:
    """The refusal of `what`, which is empty where it is the whole source."""
    return WeightsError(f"{what} wanted {wanted}, got {got}; cure: {cure}".lstrip())


@contextmanager
def named(origin: object) -> Iterator[None]:
    """Puts the name of the source before what is refused inside."""
    try:
        yield
    except WeightsError as error:
        raise WeightsError(f"{origin}: {error.args[0]}") from None


def canonical(state: object, expected: Shapes, head: str | None = None) -> State:
    """The tensors of `state` under the names and in the order of `expected`.

    Each is a float32, contiguous, finite CPU copy of the shape that `expected` says; only of the
    layer `head` the stored weight says how many outputs there are. `state` is what came out of a
    file or from a caller, so nothing is believed; whoever calls names it in errors (`named`).

    Raises WeightsError for anything but a state dict, for a missing, extra or twofold tensor, for
    more outputs than `MAX_OUTPUTS`, and for a tensor of a wrong shape or of no float dtype, or with
    values not finite in float32.
    """
    tensors = _tensors(state)
    stored = _stored_names(tensors, expected)
    missing = [name for name in expected if name not in stored]
    extra = [key for name, key in stored.items() if name not in expected]
    if missing or extra:
        lists = (("missing", missing), ("extra", extra))
        odd = "; ".join(f"{word} {listed(names)}" for word, names in lists if names)
        cure = "load the state dict of this network, whole and alone"
        raise unfit(f"{odd};", f"{len(expected)} tensors", len(tensors), cure)
    if head:
        weight = tensors[stored[f"{head}.weight"]]
        expected = with_outputs(expected, head, () if weight.is_nested else weight.shape)
    return {
        name: _converted(tensors[stored[name]], shape, _label(name, stored[name]))
        for name, shape in expected.items()
    }


def with_outputs(expected: Shapes, head: str, stored: Sequence[int]) -> Shapes:
    """`expected` with as many outputs of the layer `head` as its `stored` weight [out, in] has.

    A shape that no linear layer's weight has, which is refused later, and no outputs change
    nothing. Raises WeightsError for more than `MAX_OUTPUTS` and than there are.
    """
    outputs = stored[0] if len(stored) == 2 else 0
    limit = max(MAX_OUTPUTS, expected[f"{head}.weight"][0])
    if outputs > limit:
        raise unfit(head, f"up to {limit} outputs", outputs, OF_THIS_NETWORK)
    own = {f"{head}.weight", f"{head}.bias"} if outputs else set()
    return {n: (outputs, *shape[1:]) if n in own else shape for n, shape in expected.items()}


def check_finite(values: torch.Tensor, label: str) -> None:
    """Raises WeightsError, naming `label`, for float32 `values` that are NaN or infinite."""
    broken = ~values.isfinite()
    if broken.any():
        first = tuple(broken.nonzero()[0].tolist())
        got = f"{int(broken.sum())} NaN or infinite ({values[first].item()} at {first})"
        raise unfit(label, "finite float32 values", got, _SOUND)


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _tensors(state: object) -> State:
    """`state`, or the state dict nested in it, once it is known to be names and tensors."""
    if isinstance(state, Mapping) and "state_dict" in state:
        nested = state["state_dict"]
        state = nested if isinstance(nested, Mapping) else state
    if not isinstance(state, Mapping):
        raise unfit("", "a state dict of tensors", type(state).__name__, _ALONE)
    tensors: State = {}
    for key in state:
        if not isinstance(key, str):
            kind = key.kind if isinstance(key, Unbuilt) else type(key).__name__
            raise unfit("", "tensor names", f"a key of type {kind}", _ALONE)
        value = state[key]
        if isinstance(value, Unbuilt):
            raise unfit(repr(key), "dense floats", value.kind, "store it dense, as float32")
        if not isinstance(value, torch.Tensor) or is_lazy(value):
            raise unfit(repr(key), "a tensor", type(value).__name__, _ALONE)
        tensors[key] = torch.Tensor.detach(value)  # without what somebody set on it, as dim = 3
    return tensors


def _stored_names(tensors: State, expected: Shapes) -> dict[str, str]:
    """From the canonical name of each tensor to the name it was stored under."""
    bare = {key: ".".join(p for p in key.split(".") if p not in _WRAPPERS) for key in tensors}
    ranks = {bare[key]: tensor.dim() for key, tensor in tensors.items()}
    layers = _torchvision_layers(ranks, expected)
    stored: dict[str, str] = {}
    for key, name in bare.items():
        layer, dot, kind = name.rpartition(".")
        name = layers.get(layer, layer) + dot + kind
        if name in stored:
            raise unfit(
                "", f"one {name}", f"{stored[name]} and {key}", "keep the one that is meant"
            )
        stored[name] = key
    return stored


def _torchvision_layers(ranks: Mapping[str, int], expected: Shapes) -> dict[str, str]:
    """Canonical layers for `features.N` and `classifier.N`, of any AlexNet or VGG.

    torchvision numbers the modules of each half, so the i-th number that owns a convolution's
    weight is the i-th convolution expected; the classifier and the linear layers likewise.
    `ranks` tells how many dimensions the tensor of each name has.
    """
    layers: dict[str, str] = {}
    for half, rank in (("features", 4), ("classifier", 2)):
        weight = re.compile(rf"{half}\.([0-9]{{1,4}})\.weight")
        numbers = sorted(
            int(match[1])
            for name, dimensions in ranks.items()
            if dimensions == rank and (match := weight.fullmatch(name))
        )
        owners = [
            name.removesuffix(".weight")
            for name, shape in expected.items()
            if name.endswith(".weight") and len(shape) == rank
        ]
        layers |= {f"{half}.{n}": layer for n, layer in zip(numbers, owners, strict=False)}
    return layers


def _converted(tensor: torch.Tensor, shape: tuple[int, ...], label: str) -> torch.Tensor:
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_nested:
        kind = "meta" if tensor.is_meta else "nested" if tensor.is_nested else ""
        got = f"a {kind} tensor" if kind else f"layout {tensor.layout}"
        raise unfit(label, "dense values", got, "store it dense")
    if not tensor.is_floating_point():
        raise unfit(label, "a float dtype", tensor.dtype, _AS_FLOAT32)
    if tuple(tensor.shape) != tuple(shape):
        raise unfit(label, f"shape {tuple(shape)}", tuple(tensor.shape), OF_THIS_NETWORK)
    try:
        values = tensor.to("cpu", torch.float32, copy=True, memory_format=torch.contiguous_format)
    except NotImplementedError as error:  # of dtypes that hold two values in a byte
        got = f"{tensor.dtype} ({error})"
        raise unfit(label, "values that torch can convert", got, _AS_FLOAT32) from None
    except (RuntimeError, MemoryError) as error:  # of memory, where torch has one kind of error
        bytes_wanted = f"{4 * math.prod(shape)} bytes of memory"
        raise unfit(label, bytes_wanted, f"an error: {error}", "free memory") from None
    check_finite(values, label)
    if "running_var" in label and (values < 0).any():
        raise unfit(label, "variances of 0 or more", values.min().item(), _SOUND)
    return values


def _label(name: str, key: str) -> str:
    return name if name == key else f"{name} (stored as {key})"
