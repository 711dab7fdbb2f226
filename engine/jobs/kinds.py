"""What became of an input, as a row; and what rows hold, which is declared for each verb's job.

A kind says how an engine makes its results and how they are kept. A result is what Python has, a
value is the same as JSON and Arrow have it.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ...errors import printable
from ..fuse import fuse
from ..images import ImageError, Listed, Views, load_each, one_behind
from ..names import canonical
from ..run import Engine, Prediction
from ..spec import Network, NetworkError, Shape

Vector = np.ndarray[Any, np.dtype[np.float32]]


class Kind:
    """What rows hold: results of the verb `verb`, which stand at `key` in a row.

    `values` are the types that a value may have in a line. One that is `packed` is numbers without
    end, and in a partial file what `pack` makes of them.
    """

    verb: ClassVar[str]
    key: ClassVar[str]
    values: ClassVar[tuple[type, ...]]
    packed: ClassVar[bool] = False
    views: Views = "center"

    def fitted(self, network: Network) -> Kind:
        """The same of this network's results. Raises NetworkError for what it does not have."""
        return self

    def stream(
        self, engine: Any, items: Iterator[Any], batch_size: int, exif: bool
    ) -> Iterator[Any]:
        """The result of every item, or its ImageError, in order, lazily."""
        raise NotImplementedError

    def fault(self, result: Any) -> str | None:
        """What is wrong with a result, as after an overflow in fp16; it is then an error."""
        raise NotImplementedError

    def value(self, result: Any) -> Any:
        """A result as JSON has it."""
        return result

    def result(self, value: Any) -> Any:
        """A value as Python has it."""
        return value

    def text(self, result: Any) -> list[str]:
        """A result in lines for a person."""
        raise NotImplementedError

    def arrow(self, pa: Any) -> Any:
        """The pyarrow.DataType of a value."""
        raise NotImplementedError

    def about(self) -> dict[str, str]:
        """What a reader of the values must know, for the metadata of a table."""
        return {}


@dataclass(frozen=True, slots=True)
class Predictions(Kind):
    """The most likely classes of an image, best first."""

    verb = "classify"
    key = "predictions"
    values = (list,)

    top: int = 5
    views: Views = "center"

    def stream(
        self, engine: Engine, items: Iterator[Any], batch_size: int, exif: bool
    ) -> Iterator[list[Prediction] | ImageError]:
        top, views = self.top, self.views
        return engine.stream(items, batch_size=batch_size, top=top, views=views, exif=exif)

    def fault(self, result: Iterable[Prediction]) -> str | None:
        if any(math.isnan(prediction.score) for prediction in result):
            return "its scores are not numbers (NaN); in fp16 try fp32"
        return None

    def value(self, result: Iterable[Prediction]) -> list[dict[str, Any]]:
        return [{"index": p.index, "label": p.label, "score": p.score} for p in result]

    def result(self, value: Iterable[dict[str, Any]]) -> tuple[Prediction, ...]:
        return tuple(Prediction(**best) for best in value)

    def text(self, result: Iterable[Prediction]) -> list[str]:
        return [f"  {best.score:7.2%}  {printable(best.label)}" for best in result]

    def arrow(self, pa: Any) -> Any:
        fields = [("index", pa.int32()), ("label", pa.string()), ("score", pa.float32())]
        return pa.list_(pa.struct(fields))


PREDICTIONS = Predictions()


@dataclass(frozen=True, slots=True)
class Features(Kind):
    """One layer's activations of an image; `shape` is (C, H, W), or (features,) if it has no maps.

    As values they are one list in that order, from which every float32 comes back exactly.
    """

    verb = "features"
    key = "features"
    values = (list, str)
    packed = True

    layer: str
    shape: Shape = ()

    def fitted(self, network: Network) -> Features:
        """By the network's own name, if torchvision's was given. NetworkError for no such layer."""
        name = canonical(network, self.layer)
        shapes = {block.name: block.output for block in fuse(network)}
        if name not in shapes:
            raise NetworkError(
                f"{network.name} has no features {self.layer!r}; it has {', '.join(shapes)}"
            )
        return Features(name, shapes[name])

    def stream(
        self, engine: Engine, items: Iterator[Any], batch_size: int, exif: bool
    ) -> Iterator[Vector | ImageError]:
        loaded = load_each(items, engine.network.preprocess, exif=exif)
        computed = one_behind(loaded, batch_size, lambda x: engine.features(x, [self.layer]))
        for errors, found in computed:
            rows = iter(() if found is None else found[self.layer].cpu().numpy())
            yield from (next(rows) if error is None else error for error in errors)

    def fault(self, result: Vector) -> str | None:
        return None if np.isfinite(result).all() else "its features overflow; in fp16 try fp32"

    def value(self, result: Vector) -> list[float]:
        return result.ravel().tolist()

    def result(self, value: list[float]) -> Vector:
        return np.asarray(value, np.float32)

    def text(self, result: Vector) -> list[str]:
        return [f"  {self.layer}: {' x '.join(map(str, self.shape))} features"]

    def arrow(self, pa: Any) -> Any:
        return pa.list_(pa.float32())

    def about(self) -> dict[str, str]:
        return {"layer": self.layer, "shape": str(list(self.shape))}


def pack(values: Vector) -> str:
    """Numbers as base64 of their bytes: a quarter of their text, and quicker by far."""
    return base64.b64encode(values.astype("<f4").tobytes()).decode()


def unpack(text: str) -> Vector:
    """What `pack` was given, flat."""
    return np.frombuffer(base64.b64decode(text), "<f4")


# Rows


@dataclass(frozen=True, slots=True)
class ImageRow:
    """What became of one input: its result, or why there is none.

    `named` says whether the user named this very file, not a folder or glob it was found in; it is
    not stored.
    """

    path: str
    result: Any
    error: str | None
    named: bool
    kind: Kind = PREDICTIONS

    def to_dict(self, packed: bool = False) -> dict[str, Any]:
        """`{"path", KEY: value}` or `{"path", "error"}`: what is printed and stored."""
        if self.error is not None:
            return {"path": self.path, "error": self.error}
        pack_it = packed and self.kind.packed
        value = pack(self.result) if pack_it else self.kind.value(self.result)
        return {"path": self.path, self.kind.key: value}


def row(source: Listed, result: Any, kind: Kind) -> ImageRow:
    """The row of one source from what the engine, or its decoding, made of it."""
    named = isinstance(source, ImageError) or source.named
    if isinstance(result, ImageError):
        error: str | None = valid_text(result.reason)
    else:
        error = kind.fault(result)
    return ImageRow(path_of(source), None if error else result, error, named, kind)


def path_of(source: Listed) -> str:
    """The path or URL that stands in a source's row, valid Unicode whatever the file is called.

    Bytes of a file name that are not UTF-8 are spelled out (`caf\\udce9.png`): JSON and Parquet
    have no other room for them.
    """
    path = source.item if isinstance(source, ImageError) else source.location
    return valid_text(path)


def valid_text(words: str) -> str:
    """Words with what is no Unicode spelled out."""
    return words.encode("utf-8", "backslashreplace").decode()
