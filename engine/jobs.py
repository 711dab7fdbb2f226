"""Offline classification: sources in, one row each out, whatever happens to single images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from .images import ImageError, Source, Views, expand
from .run import Engine, Prediction


@dataclass(frozen=True, slots=True)
class Row:
    """What became of one input: its predictions, or why there are none.

    `named` says whether the user named this very file, not a folder or glob it was found in.
    """

    path: str
    predictions: tuple[Prediction, ...]
    error: str | None
    named: bool

    def to_dict(self) -> dict[str, Any]:
        """`{"path", "predictions": [...]}` or `{"path", "error"}`: what is printed and stored."""
        if self.error is not None:
            return {"path": self.path, "error": self.error}
        return {"path": self.path, "predictions": [asdict(p) for p in self.predictions]}


def classify(
    engine: Engine,
    sources: Iterable[str],
    batch_size: int = 256,
    top: int = 5,
    views: Views = "center",
) -> Iterator[Row]:
    """A row for every image behind `sources` (files, folders, globs, URLs), in order, lazily.

    A source that gives no image at all is a row with an error, too.
    """
    pending: list[Source | ImageError] = []

    def items() -> Iterator[Source | ImageError]:
        for source in expand(sources):
            pending.append(source)
            yield source

    for result in engine.stream(items(), batch_size=batch_size, top=top, views=views):
        source = pending.pop(0)
        path = source.item if isinstance(source, ImageError) else source.location
        named = isinstance(source, ImageError) or source.named
        if isinstance(result, ImageError):
            yield Row(path, (), result.reason, named)
        else:
            yield Row(path, tuple(result), None, named)
