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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import zip_longest
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from .state import State, WeightsError, with_outputs

SUFFIXES = (".keras", ".h5")

Shape = tuple[int, ...]

# The canonical name of each variable, in Keras's order: gamma and beta train, the others do not.
VARIABLES: Mapping[str, tuple[str, ...]] = {
    "Conv2D": ("weight", "bias"),
    "Dense": ("weight", "bias"),
    "BatchNormalization": ("weight", "bias", "running_mean", "running_var"),
}
# Beside those, the layers that own nothing and leave channels, rows and columns in their places.
LAYERS = (
    *VARIABLES,
    "InputLayer",
    "ZeroPadding2D",
    "MaxPooling2D",
    "AveragePooling2D",
    "GlobalAveragePooling2D",
    "Activation",
    "ReLU",
    "Softmax",
    "Dropout",
    "Flatten",
)
_SWITCHES = {"use_bias": "bias", "center": "bias", "scale": "weight"}  # False leaves that one out
_LEFT_OUT = {"weight": 1.0, "bias": 0.0}
_REBUILD = f"cure: save a flat Sequential or Functional chain of {', '.join(LAYERS)}"
_STRAIGHTEN = "cure: save a model in which each layer reads the one before it"
_RESAVE = "cure: save it again with model.save('NAME.keras')"
_MIB = 2**20
_SHOWN = 8  # names listed in an error before "and N more"


@dataclass(frozen=True, slots=True)
class _Owner:
    """A layer with weights: class, its author's name for it, its group, the variables it kept."""

    kind: str
    name: str
    group: str
    kept: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r} ({self.group})"


def read(
    path: Path,
    expected: Mapping[str, Shape],
    flattened: Mapping[str, Shape],
    head: str | None = None,
) -> State:
    """The tensors of a `.keras` or `.weights.h5` file: canonical names, float32, finite.

    `expected` maps names to shapes in network order; `flattened` maps the weight of each linear
    layer after a flatten to the (C, H, W) it was flattened from, since Keras flattens (H, W, C).
    The file tells how many outputs the layer `head` has (see `state.with_outputs`).

    Raises WeightsError naming the file and its layer or array for whatever does not fit, before
    anything is returned; h5py, zipfile and json raise what they like on broken bytes.
    """
    origin = str(path)
    h5py = _h5py(origin)
    _check_flattened(expected, flattened, origin)
    zipped = path.suffix.lower() == ".keras"
    config, source = _unzipped(path) if zipped else (None, path)
    with h5py.File(source, "r") as file:
        if {"layer_names", "model_config"} & set(file.attrs):
            raise WeightsError(
                f"{origin}: wanted a Keras 3 file, got the older .h5 format; "
                "cure: keras.models.load_model(...).save('NAME.keras')"
            )
        arrays, names = _contents(h5py, file)
        wanted = _kinds(expected)
        if zipped:
            owners = _chained(config, names, origin)
            pairs = dict(_paired(wanted, owners, origin))
        else:
            owners = _counted(names, origin)
            pairs = _paired_by_kind(wanted, owners, origin)
        _check_variables(arrays, owners, origin)
        if head:
            expected = with_outputs(expected, head, _outputs(arrays, pairs[head]), origin)
        return _tensors(arrays, pairs, expected, flattened, origin)


def _unzipped(path: Path) -> tuple[Any, IO[bytes]]:
    """What `config.json` says, and the file of arrays. Keras compresses neither."""
    with zipfile.ZipFile(path) as archive:
        config = json.loads(_member(archive, "config.json", 16 * _MIB, str(path)))
        room = 4 * path.stat().st_size + 16 * _MIB
        return config, BytesIO(_member(archive, "model.weights.h5", room, str(path)))


def _h5py(origin: str) -> Any:
    try:
        import h5py
    except ImportError:
        raise WeightsError(
            f"{origin}: reading it needs h5py, which cannot be imported; "
            "cure: pip install -e '.[keras]'"
        ) from None
    return h5py


def _check_flattened(
    expected: Mapping[str, Shape], flattened: Mapping[str, Shape], origin: str
) -> None:
    """The first linear layer after a convolution reads its channels alone, or we know the rest."""
    channels = None
    for name, shape in expected.items():
        if len(shape) == 4:
            channels = shape[0]
        elif len(shape) == 2:
            if channels is not None and shape[1] != channels and name not in flattened:
                raise WeightsError(
                    f"{origin}: {name} reads {shape[1]} flattened features, which Keras orders "
                    "(H, W, C); wanted their (C, H, W), got none; cure: pass flattened="
                )
            channels = None


def _member(archive: zipfile.ZipFile, name: str, limit: int, origin: str) -> bytes:
    """One file of a zip, in memory: never on the disk, never more than `limit` bytes."""
    try:
        info = archive.getinfo(name)
    except KeyError:
        raise WeightsError(f"{origin}: wanted {name} in the zip, got none; {_RESAVE}") from None
    # The other methods unpack a block at once, however large it gets.
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise WeightsError(
            f"{origin}: wanted {name} stored or deflated, got zip method {info.compress_type}; "
            f"{_RESAVE}"
        )
    with archive.open(info) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise WeightsError(
            f"{origin}: {name} unpacks to more than {limit / _MIB:.0f} MiB: refused; {_RESAVE}"
        )
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


def _kinds(expected: Mapping[str, Shape]) -> dict[str, str]:
    """The Keras class of each layer that owns weights: `{"conv1": "Conv2D", ...}`."""
    layers = dict.fromkeys(name.rpartition(".")[0] for name in expected)

    def kind(layer: str) -> str:
        if f"{layer}.running_var" in expected:
            return "BatchNormalization"
        return "Conv2D" if len(expected[f"{layer}.weight"]) == 4 else "Dense"

    return {layer: kind(layer) for layer in layers}


# Whose weights they are


def _group(kind: str, number: int) -> str:
    """Where Keras puts the layer of that class with that number: its name in snake case."""
    snake = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind).lower()
    return f"layers/{snake}_{number}" if number else f"layers/{snake}"


def _chained(model: Any, names: Mapping[str, str], origin: str) -> list[_Owner]:
    """The layers with weights of a `.keras`, in the order in which its config chains them."""
    if model["class_name"] not in ("Sequential", "Functional") or not _by_keras(model):
        raise WeightsError(
            f"{origin}: wanted a Sequential or Functional model, got {_told(model)}; {_REBUILD}"
        )
    layers = model["config"]["layers"]
    for layer in layers:
        _check_layer(layer, origin)
    if model["class_name"] == "Functional":
        _check_wiring(layers, _sources(model["config"]["output_layers"]), origin)
    arithmetic: Counter[str] = Counter()
    owners = []
    for layer in layers:
        kind, config = layer["class_name"], layer["config"]
        group = _group(kind, arithmetic[kind])
        arithmetic[kind] += 1
        called = names.get(group) or config["name"]
        if called != config["name"]:
            raise WeightsError(
                f"{origin}: {group} wanted layer {config['name']!r} as config.json has them in "
                f"order, got {called!r}; {_RESAVE}"
            )
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


def _told(item: Mapping[str, Any]) -> str:
    """The class, by both of its names if they differ, and whose it is if it is not Keras's."""
    kind, name = item["class_name"], _name(item)
    alias = "" if name == kind else f", registered as {name!r}"
    return f"{kind!r}{alias}" + ("" if _by_keras(item) else ", which is not Keras's own")


def _check_layer(layer: Mapping[str, Any], origin: str) -> None:
    kind, config = layer["class_name"], layer["config"]
    label = f"{origin}: layer {config['name']!r}"
    if kind not in LAYERS or not _by_keras(layer):
        raise WeightsError(f"{label} wanted a class that is read, got {_told(layer)}; {_REBUILD}")
    wanted = {"data_format": ("channels_last", None), "axis": (-1, 3)}
    for setting, values in wanted.items():
        if setting in config and config[setting] not in values:
            raise WeightsError(
                f"{label} ({kind}) wanted channels last, got {setting} {config[setting]!r}; "
                f"cure: build the model with {setting}={values[0]!r} and give it these weights"
            )


def _check_wiring(layers: Sequence[Mapping[str, Any]], outputs: Sequence[str], origin: str) -> None:
    """A Functional model is a chain: each layer reads the one before it, and the last comes out."""
    before: list[str] = []
    for layer in layers:
        sources = _sources(layer["inbound_nodes"])
        if sources != before:
            raise WeightsError(
                f"{origin}: layer {layer['config']['name']!r} ({layer['class_name']}) reads "
                f"{_listed(sources)}, wanted {_listed(before)}: not a chain; {_STRAIGHTEN}"
            )
        before = [layer["config"]["name"]]
    if outputs != before:
        raise WeightsError(
            f"{origin}: the model's outputs are {_listed(outputs)}, wanted {_listed(before)}: "
            f"not a chain; {_STRAIGHTEN}"
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


def _counted(names: Mapping[str, str], origin: str) -> list[_Owner]:
    """The layers with weights of a `.weights.h5`, class by class in the order of its counters."""
    kinds = {_group(kind, 0): kind for kind in LAYERS}
    arithmetic: dict[str, list[int]] = {kind: [] for kind in LAYERS}
    for group, name in names.items():
        if group.partition("/")[0] == "optimizer":
            continue
        counter = re.search(r"_([1-9]\d*)$", group)
        kind = kinds.get(group[: counter.start()] if counter else group)
        if kind is None:
            called = f" ({name!r})" if name else ""
            raise WeightsError(f"{origin}: {group}{called} is no layer that is read; {_REBUILD}")
        arithmetic[kind].append(int(counter[1]) if counter else 0)
    owners = []
    for kind in VARIABLES:
        for wanted, number in enumerate(sorted(arithmetic[kind])):
            group = _group(kind, number)
            if number != wanted:
                raise WeightsError(
                    f"{origin}: {group} without {_group(kind, wanted)}: the counters do not tell "
                    f"the order; {_REBUILD}"
                )
            name = names[group] or group.removeprefix("layers/")
            owners.append(_Owner(kind, name, group, VARIABLES[kind]))
    return owners


# Which of them is which layer of the network


def _paired_by_kind(
    wanted: Mapping[str, str], owners: Iterable[_Owner], origin: str
) -> dict[str, _Owner]:
    """Without an order between the classes: the n-th of its class is the n-th of its class."""
    pairs: dict[str, _Owner] = {}
    for kind in VARIABLES:
        layers = {layer: of for layer, of in wanted.items() if of == kind}
        pairs |= _paired(layers, [owner for owner in owners if owner.kind == kind], origin)
    return pairs


def _paired(
    wanted: Mapping[str, str], owners: Iterable[_Owner], origin: str
) -> Iterator[tuple[str, _Owner]]:
    cure = "cure: load the weights of this network"
    for layer, owner in zip_longest(wanted, owners):
        if layer is None:
            raise WeightsError(f"{origin}: {owner} is left over: no layer wants it; {cure}")
        if owner is None or owner.kind != wanted[layer]:
            got = owner or "none"
            raise WeightsError(f"{origin}: {layer} wanted a {wanted[layer]}, got {got}; {cure}")
        yield layer, owner


# Their arrays


def _check_variables(arrays: Mapping[str, Any], owners: Iterable[_Owner], origin: str) -> None:
    """Every array belongs to a layer, or to the optimizer, and every layer has its arrays."""
    rest = {path for path in arrays if not path.startswith("optimizer/")}
    for owner in owners:
        wanted = [f"vars/{i}" for i, _ in enumerate(owner.kept)]
        inside = f"{owner.group}/"
        got = sorted(path.removeprefix(inside) for path in rest if path.startswith(inside))
        if got != wanted:
            raise WeightsError(
                f"{origin}: {owner} wanted {_listed(wanted)} ({', '.join(owner.kept)}), "
                f"got {_listed(got)}; {_RESAVE}"
            )
        rest -= {inside + path for path in got}
    if rest:
        raise WeightsError(f"{origin}: {min(rest)} is left over: no layer owns it; {_RESAVE}")


def _tensors(
    arrays: Mapping[str, Any],
    pairs: Mapping[str, _Owner],
    expected: Mapping[str, Shape],
    flattened: Mapping[str, Shape],
    origin: str,
) -> State:
    state: State = {}
    for name, shape in expected.items():
        layer, _, key = name.rpartition(".")
        owner = pairs[layer]
        if key in owner.kept:
            path = f"{owner.group}/vars/{owner.kept.index(key)}"
            label = f"{origin}: {owner.kind} {owner.name!r}, {path} for {name},"
            values = _values(arrays[path], _keras_shape(shape), label)
            state[name] = _turned(values, flattened.get(name))
        else:
            state[name] = torch.full(shape, _LEFT_OUT[key])
    return state


def _outputs(arrays: Mapping[str, Any], owner: _Owner) -> int:
    """How many a dense layer has; 0 for what is no kernel of one, which is refused later."""
    shape = arrays[f"{owner.group}/vars/{owner.kept.index('weight')}"].shape
    return int(shape[1]) if len(shape) == 2 else 0


def _keras_shape(shape: Shape) -> Shape:
    """Of an OIHW kernel HWIO, of an [out, in] weight [in, out]."""
    return (*shape[2:], *shape[1::-1]) if len(shape) > 1 else shape


def _turned(values: torch.Tensor, volume: Shape | None) -> torch.Tensor:
    """The same numbers in torch's layout; `volume` is the (C, H, W) that a dense layer reads."""
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


def _values(array: Any, shape: Shape, label: str) -> torch.Tensor:
    """One dataset in float32. Its shape is checked first, so it fills no more than is wanted."""
    if array.shape != shape:
        raise WeightsError(
            f"{label} wanted shape {shape}, got {array.shape}; "
            "cure: load the weights of this network"
        )
    oversized = array.chunks is not None and math.prod(array.chunks) > math.prod(shape)
    if array.external or array.is_virtual or oversized:
        raise WeightsError(
            f"{label} wanted plain values, got an external, virtual or oversized dataset; {_RESAVE}"
        )
    if array.dtype == np.dtype("V2") and array.attrs.get("dtype") == "bfloat16":
        values = torch.from_numpy(array[()].view(np.int16)).view(torch.bfloat16).float()
    elif array.dtype.kind == "f":
        values = torch.from_numpy(array.astype(np.float32)[()])
    else:
        raise WeightsError(f"{label} wanted a float dtype, got {array.dtype}; {_RESAVE}")
    broken = int((~values.isfinite()).sum())
    if broken:
        raise WeightsError(
            f"{label} wanted finite values, got {broken} NaN or infinite; "
            "cure: save it again from a sound model"
        )
    return values


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more if names else "none"
