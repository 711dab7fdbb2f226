"""Offline inference: sources in, one row each out, whatever happens to single images."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from PIL import Image

from ..images import ImageError, Item, Listed, Views
from ..load import EngineError
from ..run import Engine
from ..spec import Preprocess
from .kinds import ImageRow, Kind, Predictions, row
from .rows import Kept, pair
from .workers import Decoded, decode_ahead, picture

Pairs = Iterator[tuple[Listed, Item]]


@dataclass(slots=True)
class Tally:
    """How a job fares: rows kept from before, and all rows with and without a result."""

    kept: int = 0
    good: int = 0
    bad: int = 0
    named_bad: int = 0

    @property
    def total(self) -> int:
        return self.good + self.bad

    @property
    def failed(self) -> bool:
        """Whether an image that was named itself, or every image, has no result."""
        return bool(self.named_bad or not self.good)

    def add(self, error: str | None, named: bool) -> None:
        self.good += error is None
        self.bad += error is not None
        self.named_bad += error is not None and named


def remaining(
    sources: Iterable[Listed], kept: Iterable[Kept], tally: Tally, retry: bool = False
) -> Iterator[Listed]:
    """The sources that have no row, or with `retry` an error; what is done counts in `tally`."""
    for source, done in pair(sources, kept):
        if done is None or (retry and done.error is not None):
            yield source
        else:
            tally.kept += 1
            tally.add(done.error, isinstance(source, ImageError) or source.named)


def classify(
    engine: Engine,
    sources: Iterable[Listed],
    batch_size: int = 256,
    top: int = 5,
    views: Views = "center",
    workers: int = 0,
    exif: bool = False,
) -> Generator[ImageRow]:
    """A row for each of `sources` (what `images.expand` yields), in order, lazily.

    `exif` turns pictures. For the rest see `answer`.
    """
    return answer(engine, sources, Predictions(top, views), batch_size, workers, exif)


def answer(
    engine: Engine,
    sources: Iterable[Listed],
    kind: Kind,
    batch_size: int = 256,
    workers: int = 0,
    exif: bool = False,
) -> Generator[ImageRow]:
    """A row of this kind for each of `sources`, in order, lazily.

    `workers` processes decode; with 0, this one does between batches. When a batch is too large for
    the GPU's memory, it and all after it are halved until they fit, which one line on standard
    error says; a single image that does not fit raises EngineError.
    """
    if not workers:
        itself = ((source, source) for source in sources)
        yield from answered(engine, itself, batch_size, kind, exif)
        return
    preprocess = worker_preset(engine.network.preprocess, kind.views)
    decode = partial(picture, preprocess=preprocess, exif=exif)
    ahead = decode_ahead(sources, decode, workers, batch_size)
    with closing(ahead):
        pairs = ((source, worker_item(decoded, kind.views)) for source, decoded in ahead)
        yield from answered(engine, pairs, batch_size, kind)


def answered(
    engine: Any, pairs: Pairs, batch_size: int, kind: Kind, exif: bool = False
) -> Iterator[ImageRow]:
    """A row for every source, from what the engine is to take for it, in batches that fit."""
    size = min(batch_size, engine.max_batch)
    unanswered: deque[tuple[Listed, Item]] = deque()
    while True:
        pairs = chain(list(unanswered), pairs)
        unanswered.clear()
        items = _recorded(pairs, unanswered)
        try:
            for result in kind.stream(engine, items, size, exif):
                yield row(unanswered.popleft()[0], result, kind)
            return
        except torch.cuda.OutOfMemoryError as error:
            if size == 1:
                raise EngineError(f"one image is too much for the GPU's memory: {error}") from None
            if size == min(batch_size, engine.max_batch):
                print(f"out of GPU memory with batches of {size}: halving them", file=sys.stderr)
        # Only here is the failed batch's memory free: the exception held it.
        torch.cuda.empty_cache()
        size //= 2


def _recorded(
    pairs: Iterable[tuple[Listed, Item]], record: deque[tuple[Listed, Item]]
) -> Iterator[Item]:
    for source, item in pairs:  # not `yield from`, which would end `pairs` with us
        record.append((source, item))
        yield item


def worker_preset(preprocess: Preprocess, views: Views) -> Preprocess:
    """What makes a worker cut out no more than all views need: the square they are cut from."""
    return preprocess if views == "center" else replace(preprocess, crop=preprocess.resize)


def worker_item(decoded: Decoded, views: Views) -> Any:
    """A worker's pixels as the engine takes them: for several views, as a picture to cut."""
    if isinstance(decoded, ImageError):
        return decoded
    if views == "center":
        return torch.from_numpy(decoded)
    return Image.fromarray(decoded.transpose(1, 2, 0).copy())
