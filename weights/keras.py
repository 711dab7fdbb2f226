"""Keras 3 files: their layers found and put in order, their arrays in the canonical layout.

Nothing of a file is ever run, and Keras is not imported: the JSON of a `.keras` is read as JSON and
its arrays, like those of a `.weights.h5`, by h5py. What Keras writes, read off `saving_lib.py` and
the files of versions 3.0 to 3.15 (later ones also write each layer's own name, which is checked):

- `layers/conv2d`, `layers/conv2d_1`, ...: the model's layers, named by class and counted class by
  class in model order, whatever their author called them. Their variables are `vars/0`, `vars/1`
  and so on: those that train first, and of one kind in the order of `VARIABLES`.
- A `.keras` is a zip of such a file and `config.json`, which has the layers in order, how they are
  wired, and which of a layer's variables were left out. A convolution or dense layer without bias
  has zeros for one, and a BatchNorm with no centre or scale zeros or ones: exact, so filled in.
- A `.weights.h5` has the counters alone. In a chain they are enough: the n-th convolution is the
  n-th convolution. Of a BatchNorm's three arrays nobody can tell which is missing: refused.

Only chains of `LAYERS` with channels last are taken. What a file tells beyond its weights (strides,
padding, activations, where they stand) is not compared with the network; a `.weights.h5` does not
tell it, nor how its layers were wired: that one the caller vouches for.
"""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from .state import (
    OF_THIS_NETWORK,
    Shapes,
    State,
    WeightsError,
    check_finite,
    listed,
    unfit,
    with_outputs,
)

SUFFIXES = (".keras", ".h5")

# The canonical name of each variable, in Keras's order: gamma and beta train, the others do not.
VARIABLES: Mapping[str, tuple[str, ...]] = {
    "Conv2D": ("weight", "bias"),
    "Dense": ("weight", "bias"),
    "BatchNormalization": ("weight", "bias", "running_mean", "running_var"),
}
# Beside those, the layers that own nothing and leave channels, rows and columns in their places.
LAYERS = (
    *VARIABLES,
    *("InputLayer", "ZeroPadding2D", "MaxPooling2D", "AveragePooling2D", "GlobalAveragePooling2D"),
    *("Activation", "ReLU", "Softmax", "Dropout", "Flatten"),
)
_SWITCHES = {"use_bias": "bias", "center": "bias", "scale": "weight"}  # False leaves that one out
_LEFT_OUT = {"weight": 1.0, "bias": 0.0}
_REBUILD = f"save a flat Sequential or Functional chain of {', '.join(LAYERS)}"
_STRAIGHTEN = "save a model in which each layer reads the one before it"
_RESAVE = "save it again with model.save('NAME.keras')"
_MIB = 2**20


@dataclass(frozen=True, slots=True)
class _Owner:
    """A layer with weights: class, its author's name for it, its group, the variables it kept."""

    kind: str
    name: str
    group: str
    kept: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r} ({self.group})"

    def path(self, key: str) -> str:
        """Where the file has the variable of that canonical name."""
        return f"{self.group}/vars/{self.kept.index(key)}"


def read(path: Path, expected: Shapes, flattened: Shapes, head: str | None = None) -> State:
    """The tensors of a `.keras` or `.weights.h5` file: canonical names, float32, finite.

    `expected` maps names to shapes in network order; `flattened` maps the weight of each linear
    layer after a flatten to the (C, H, W) it was flattened from, since Keras flattens (H, W, C).
    The file tells how many outputs the layer `head` has (see `state.with_outputs`).

    Raises WeightsError naming the layer or array for whatever does not fit, before anything is
    returned; h5py, zipfile and json raise what they like on broken bytes.
    """
    h5py = _h5py()
    _check_flattened(expected, flattened)
    zipped = path.suffix.lower() == ".keras"
    config, source = _unzipped(path) if zipped else (None, path)
    with h5py.File(source, "r") as file:
        if {"layer_names", "model_config"} & set(file.attrs):
            cure = "keras.models.load_model(...).save('NAME.keras')"
            raise unfit("", "a Keras 3 file", "the older .h5 format", cure)
        arrays, names = _contents(h5py, file)
        owners = _chained(config, names) if zipped else _counted(names)
        pairs = _paired(_kinds(expected), owners, in_order=zipped)
        _check_variables(arrays, owners)
        if head:
            weight = arrays[pairs[head].path("weight")]
            expected = with_outputs(expected, head, weight.shape[::-1])
        return {
            name: _tensor(arrays, pairs[name.rpartition(".")[0]], name, shape, flattened.get(name))
            for name, shape in expected.items()
        }


def _unzipped(path: Path) -> tuple[Any, IO[bytes]]:
    """What `config.json` says, and the file of arrays. Keras compresses neither."""
    with zipfile.ZipFile(path) as archive:
        config = json.loads(_member(archive, "config.json", 16 * _MIB))
        room = 4 * path.stat().st_size + 16 * _MIB
        return config, BytesIO(_member(archive, "model.weights.h5", room))


def _h5py() -> Any:
    try:
        import h5py
    except ImportError:
        raise WeightsError(
            "reading it needs h5py, which cannot be imported; cure: pip install -e '.[keras]'"
        ) from None
    return h5py


def _check_flattened(expected: Shapes, flattened: Shapes) -> None:
    """The first linear layer after a convolution reads its channels alone, or we know the rest."""
    channels = None
    for name, shape in expected.items():
        if len(shape) == 4:
            channels = shape[0]
        elif len(shape) == 2:
            if channels not in (None, shape[1]) and name not in flattened:
                what = f"{name} reads {shape[1]} flattened features, which Keras orders (H, W, C);"
                raise unfit(what, "their (C, H, W)", "none", "pass flattened=")
            channels = None


def _member(archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    """One file of a zip, in memory: never on the disk, never more than `limit` bytes."""
    try:
        info = archive.getinfo(name)
    except KeyError:
        raise unfit("", f"{name} in the zip", "none", _RESAVE) from None
    # The other methods unpack a block at once, however large it gets.
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        got = f"zip method {info.compress_type}"
        raise unfit("", f"{name} stored or deflated", got, _RESAVE)
    with archive.open(info) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        size = f"{limit / _MIB:.0f} MiB"
        raise WeightsError(f"{name} unpacks to more than {size}: refused; cure: {_RESAVE}")
    return content


def _contents(h5py: Any, file: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """The datasets by path, and what each layer calls itself by the path of its group.

    visititems follows neither soft nor external links, so no other file is opened.
    """
    arrays: dict[str, Any] = {}
    names: dict[str, str] = {}

    def visit(path: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            arrays[path] = item
        elif path.endswith("/vars"):
            name = item.attrs.get("name")
            names[path.removesuffix("/vars")] = name if isinstance(name, str) else ""

    file.visititems(visit)
    return arrays, names


def _kinds(expected: Shapes) -> dict[str, str]:
    """The Keras class of each layer that owns weights: `{"conv1": "Conv2D", ...}`."""
    kinds: dict[str, str] = {}
    for name, shape in expected.items():
        layer, _, key = name.rpartition(".")
        if key == "running_var":
            kinds[layer] = "BatchNormalization"
        elif key == "weight":
            kinds[layer] = "Conv2D" if len(shape) == 4 else "Dense"
    return kinds


# Whose weights they are


def _group(kind: str, number: int) -> str:
    """Where Keras puts the layer of that class with that number: its name in snake case."""
    snake = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind).lower()
    return f"layers/{snake}_{number}" if number else f"layers/{snake}"


def _chained(model: Any, names: Mapping[str, str]) -> list[_Owner]:
    """The layers with weights of a `.keras`, in the order in which its config chains them."""
    if model["class_name"] not in ("Sequential", "Functional") or not _by_keras(model):
        raise unfit("", "a Sequential or Functional model", _class(model), _REBUILD)
    layers = model["config"]["layers"]
    for layer in layers:
        _check_layer(layer)
    if model["class_name"] == "Functional":
        _check_wiring(layers, model["config"]["output_layers"])
    numbers: Counter[str] = Counter()
    owners = []
    for layer in layers:
        kind, config = layer["class_name"], layer["config"]
        group = _group(kind, numbers[kind])
        numbers[kind] += 1
        called = names.get(group) or config["name"]
        if called != config["name"]:
            wanted = f"layer {config['name']!r} as config.json has them in order"
            raise unfit(group, wanted, repr(called), _RESAVE)
        if kind in VARIABLES:
            dropped = {key for switch, key in _SWITCHES.items() if config.get(switch) is False}
            kept = tuple(key for key in VARIABLES[kind] if key not in dropped)
            owners.append(_Owner(kind, config["name"], group, kept))
    return owners


def _by_keras(item: Mapping[str, Any]) -> bool:
    """Whether this class is Keras's own, and not one of the same name.

    Keras gives its public classes no registered name, its others that of the class; and whatever
    else is registered under a name comes before its own when it loads.
    """
    return str(item["module"]).partition(".")[0] == "keras" and _name(item) == item["class_name"]


def _name(item: Mapping[str, Any]) -> Any:
    return item.get("registered_name") or item["class_name"]


def _class(item: Mapping[str, Any]) -> str:
    """The class, by both of its names if they differ, and whose it is if it is not Keras's."""
    kind, name = item["class_name"], _name(item)
    alias = "" if name == kind else f", registered as {name!r}"
    return f"{kind!r}{alias}" + ("" if _by_keras(item) else ", which is not Keras's own")


def _check_layer(layer: Mapping[str, Any]) -> None:
    kind, config = layer["class_name"], layer["config"]
    label = f"layer {config['name']!r}"
    if kind not in LAYERS or not _by_keras(layer):
        raise unfit(label, "a class that is read", _class(layer), _REBUILD)
    for setting, values in (("data_format", ("channels_last", None)), ("axis", (-1, 3))):
        if setting in config and config[setting] not in values:
            cure = f"build the model with {setting}={values[0]!r} and give it these weights"
            got = f"{setting} {config[setting]!r}"
            raise unfit(f"{label} ({kind})", "channels last", got, cure)


def _check_wiring(layers: Sequence[Mapping[str, Any]], outputs: Any) -> None:
    """A Functional model is a chain: each layer reads the one before it, and the last comes out."""
    names = [layer["config"]["name"] for layer in layers]
    readers = [
        (f"layer {name!r} ({layer['class_name']})", layer["inbound_nodes"])
        for name, layer in zip(names, layers, strict=True)
    ]
    befores = [[], *([name] for name in names)]
    for (reader, node), before in zip([*readers, ("the output", outputs)], befores, strict=True):
        if (sources := _sources(node)) != before:
            read, wanted = _quoted(sources), _quoted(before)
            raise WeightsError(
                f"{reader} reads {read}, wanted {wanted}: not a chain; cure: {_STRAIGHTEN}"
            )


def _sources(node: Any) -> list[str]:
    """The layers whose outputs are mentioned anywhere below: a history is [layer, node, tensor]."""
    match node:
        case [str(layer), int(), int(), *_]:
            return [layer]
        case dict():
            return [layer for value in node.values() for layer in _sources(value)]
        case list():
            return [layer for value in node for layer in _sources(value)]
        case _:
            return []


def _counted(names: Mapping[str, str]) -> list[_Owner]:
    """The layers with weights of a `.weights.h5`, class by class in the order of its counters."""
    kinds = {_group(kind, 0): kind for kind in LAYERS}
    numbers: dict[str, list[int]] = {kind: [] for kind in LAYERS}
    for group, name in names.items():
        if group.partition("/")[0] == "optimizer":
            continue
        counter = re.search(r"_([1-9]\d*)$", group)
        kind = kinds.get(group[: counter.start()] if counter else group)
        if kind is None:
            called = f" ({name!r})" if name else ""
            raise WeightsError(f"{group}{called} is no layer that is read; cure: {_REBUILD}")
        numbers[kind].append(int(counter[1]) if counter else 0)
    owners = []
    for kind, kept in VARIABLES.items():
        for place, number in enumerate(sorted(numbers[kind])):
            group = _group(kind, number)
            if number != place:
                gap = f"{group} without {_group(kind, place)}"
                raise WeightsError(f"{gap}: the counters do not tell the order; cure: {_REBUILD}")
            owners.append(_Owner(kind, names[group] or group.removeprefix("layers/"), group, kept))
    return owners


# Which of them is which layer of the network


def _paired(
    kinds: Mapping[str, str], owners: Iterable[_Owner], in_order: bool
) -> dict[str, _Owner]:
    """Whose weights each layer gets: the n-th the n-th's.

    Where the owners have no order between the classes, the n-th of a class gets those of the n-th
    of its class.
    """
    pairs: dict[str, _Owner] = {}
    for classes in [[*VARIABLES]] if in_order else [[kind] for kind in VARIABLES]:
        layers = (layer for layer, kind in kinds.items() if kind in classes)
        for layer, owner in zip_longest(layers, (o for o in owners if o.kind in classes)):
            if layer is None:
                left = f"{owner} is left over: no layer wants it"
                raise WeightsError(f"{left}; cure: {OF_THIS_NETWORK}")
            if owner is None or owner.kind != kinds[layer]:
                raise unfit(layer, f"a {kinds[layer]}", owner or "none", OF_THIS_NETWORK)
            pairs[layer] = owner
    return pairs


# Their arrays


def _check_variables(arrays: Mapping[str, Any], owners: Iterable[_Owner]) -> None:
    """Every array belongs to a layer, or to the optimizer, and every layer has its arrays."""
    rest = {path for path in arrays if not path.startswith("optimizer/")}
    for owner in owners:
        wanted = [f"vars/{i}" for i, _ in enumerate(owner.kept)]
        inside = f"{owner.group}/"
        got = sorted(path.removeprefix(inside) for path in rest if path.startswith(inside))
        if got != wanted:
            kept = f"{_quoted(wanted)} ({', '.join(owner.kept)})"
            raise unfit(str(owner), kept, _quoted(got), _RESAVE)
        rest -= {inside + path for path in got}
    if rest:
        raise WeightsError(f"{min(rest)} is left over: no layer owns it; cure: {_RESAVE}")


def _tensor(
    arrays: Mapping[str, Any],
    owner: _Owner,
    name: str,
    shape: tuple[int, ...],
    volume: tuple[int, ...] | None,
) -> torch.Tensor:
    """The tensor `name` in torch's layout; `volume` is the (C, H, W) that a dense layer reads."""
    key = name.rpartition(".")[2]
    if key not in owner.kept:
        return torch.full(shape, _LEFT_OUT[key])
    path = owner.path(key)
    # Of an OIHW kernel HWIO, of an [out, in] weight [in, out].
    theirs = (*shape[2:], *shape[1::-1]) if len(shape) > 1 else shape
    values = _values(arrays[path], theirs, f"{owner.kind} {owner.name!r}, {path} for {name},")
    match values.dim(), volume:
        case 4, _:
            return values.permute(3, 2, 0, 1)
        case 2, (channels, height, width):
            kernel = values.reshape(height, width, channels, -1)
            return kernel.permute(3, 2, 0, 1).flatten(1)
        case 2, _:
            return values.T
        case _:
            return values


def _values(array: Any, shape: tuple[int, ...], label: str) -> torch.Tensor:
    """One dataset in float32. Its shape is checked first, so it fills no more than is wanted."""
    if array.shape != shape:
        raise unfit(label, f"shape {shape}", array.shape, OF_THIS_NETWORK)
    oversized = array.chunks is not None and math.prod(array.chunks) > math.prod(shape)
    if array.external or array.is_virtual or oversized:
        got = "an external, virtual or oversized dataset"
        raise unfit(label, "plain values", got, _RESAVE)
    if array.dtype == np.dtype("V2") and array.attrs.get("dtype") == "bfloat16":
        values = torch.from_numpy(array[()].view(np.int16)).view(torch.bfloat16).float()
    elif array.dtype.kind == "f":
        values = torch.from_numpy(array.astype(np.float32)[()])
    else:
        raise unfit(label, "a float dtype", array.dtype, _RESAVE)
    check_finite(values, label)
    return values


def _quoted(names: Sequence[str]) -> str:
    return listed([*map(repr, names)]) or "none"
