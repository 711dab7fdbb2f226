"""The verb `distance`: how far apart two images look, or those of two folders with one name."""

from __future__ import annotations

import argparse
import heapq
import math
import os
from collections import defaultdict
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
from PIL import Image

from ..images import ImageError, Listed, Pixels, Source, decode, expand, is_url, one_behind
from ..load import EngineError, arithmetic, load_state, resolve
from ..lpips import LPIPS, TRUNK
from ..zoo import ALEXNET
from . import provenance
from .classify import Pairs, answered, worker_item
from .job import Job, asked_of_sources, run
from .kinds import ImageRow, Kind
from .listing import plain
from .rows import Output
from .workers import decode_ahead, decoded_or_error

HELD = 64 << 20  # bytes of pixels: of pairs that wait for others of their size, and of one batch


@dataclass(frozen=True, slots=True)
class ImagePair(Source):
    """Two images to compare; `location` is what their row is called."""

    first: str
    second: str


@dataclass(frozen=True, slots=True)
class Distances(Kind):
    """LPIPS of a pair: 0 for equal images, and some 1 for such that have nothing in common."""

    verb = "distance"
    key = "distance"
    values = (float,)

    def stream(
        self, engine: LPIPS, items: Iterator[Any], batch_size: int, exif: bool
    ) -> Iterator[float | ImageError]:
        def measured(pairs: Any) -> list[float]:
            a, b = (pairs.to(engine.device).float() / 127.5 - 1).unbind(1)
            found: list[float] = engine(a, b).flatten().tolist()
            return found

        for shape, same in groupby(items, _shape):
            for errors, found in one_behind(same, _batch(shape, batch_size), measured):
                rows = iter(found or ())
                yield from (next(rows) if error is None else error for error in errors)

    def fault(self, result: float) -> str | None:
        return None if math.isfinite(result) else "its distance is no number; in fp16 try fp32"

    def text(self, result: float) -> list[str]:
        return [f"  {result:.6f}"]

    def arrow(self, pa: Any) -> Any:
        return pa.float32()


def run_distance(options: argparse.Namespace) -> int:
    """A row for each pair; see `job.run`."""
    words = [plain(options.first), plain(options.second)]
    limit = Image.MAX_IMAGE_PIXELS
    if options.size and limit and options.size**2 > limit:
        raise EngineError(
            f"--size: wanted at most {math.isqrt(limit)}, Pillow's limit of pixels, got "
            f"{options.size}"
        )
    asked = {"size": options.size, **asked_of_sources(options, sorted(words))}  # in either order
    job = Job(Distances(), asked, lambda _: pairs(*words), partial(_rows, options), items="pairs")
    return run(options, job)


def _rows(
    options: argparse.Namespace, sources: Iterator[Listed], output: Output | None
) -> Generator[ImageRow]:
    arithmetic(options.dtype, resolve(options.device), options.backend, options.target)
    word = options.weights or "imagenet"
    state = load_state(ALEXNET, word)[1]
    if output:
        used = {name: state[name] for name in TRUNK.parameter_shapes()}
        output.agree(weights=provenance.by_content(word, provenance.fingerprint(used)))
    how = {name: getattr(options, name) for name in ("device", "dtype", "backend", "target")}
    lpips = LPIPS(state, **how, max_batch=options.batch_size)
    return distances(
        lpips, sources, options.size, options.batch_size, options.workers, options.exif
    )


def pairs(first: str, second: str) -> Iterator[Listed]:
    """The pair of two images, or those of two folders, in order of their relative names.

    A name that is in one folder alone is a pair, too, which cannot be loaded. Raises EngineError at
    once for a word that is nothing, and for a folder beside an image.
    """
    for word in (first, second):
        if not is_url(word) and not os.path.lexists(word):
            raise EngineError(f"{word}: wanted an image, a folder or a URL, and there is none here")
    folders = [word for word in (first, second) if os.path.isdir(word)]
    if len(folders) == 1:
        raise EngineError(f"{folders[0]}: is a folder; wanted two folders or two images")
    if not folders:
        # One name in either order, for the distance is the same and so is the job.
        return iter([ImagePair(min(first, second), True, first, second)])
    # Both are walked in one order, by the parts of a name, so nothing is kept of what came.
    found = heapq.merge(_walked(first), _walked(second), key=itemgetter(0))
    return (
        _matched(os.path.join(*parts), first, second, [listed for _, listed in same])
        for parts, same in groupby(found, itemgetter(0))
    )


def _walked(folder: str) -> Iterator[tuple[list[str], Listed]]:
    for listed in expand([folder]):
        path = listed.item if isinstance(listed, ImageError) else listed.location
        yield os.path.relpath(path, folder).split(os.sep), listed


def _matched(name: str, first: str, second: str, found: list[Listed]) -> Listed:
    for listed in found:
        if isinstance(listed, ImageError):
            return ImageError(name, f"{listed.item}: {listed.reason}")
    return ImagePair(name, False, os.path.join(first, name), os.path.join(second, name))


def distances(
    lpips: LPIPS,
    sources: Iterable[Listed],
    side: int | None = None,
    batch_size: int = 64,
    workers: int = 0,
    exif: bool = False,
) -> Generator[ImageRow]:
    """A row for each of `sources` (what `pairs` yields), lazily, those of one size together.

    side: both images become a square of it; without, they must have one size. `workers` decode
    a pair or two each ahead. Memory and what is raised are as for `classify.answer`.
    """
    load = partial(load_pair, side=side, exif=exif)
    ahead = (
        decode_ahead(sources, load, workers, ahead=workers, size=1)  # each may be large
        if workers
        else ((source, decoded_or_error(source, load)) for source in sources)
    )
    with closing(ahead):
        items = ((source, worker_item(decoded, "center")) for source, decoded in ahead)
        yield from answered(lpips, by_size(items, batch_size), batch_size, Distances())


def load_pair(source: Listed, side: int | None = None, exif: bool = False) -> Pixels:
    """uint8 [2, 3, H, W]; `side` resizes both, bilinear with antialias.

    Raises ImageError, which says which image it was, and for two sizes and for one that is too
    small.
    """
    if not isinstance(source, ImagePair):
        raise source if isinstance(source, ImageError) else TypeError(source)
    images = []
    for path in (source.first, source.second):
        try:
            images.append(decode(path, path, exif))
        except ImageError as error:
            raise ImageError(source.location, str(error)) from None
    sizes = " and ".join(f"{image.width}x{image.height}" for image in images)
    if side is None and images[0].size != images[1].size:
        raise ImageError(source.location, f"wanted images of one size, got {sizes}; --size resizes")
    if side is not None:
        images = [image.resize((side, side), Image.Resampling.BILINEAR) for image in images]
    least = TRUNK.least_side() or 1
    if min(images[0].size) < least:
        wanted = f"wanted images from {least}x{least} up"
        raise ImageError(source.location, f"{wanted}, got {sizes}; --size resizes")
    return np.stack([np.asarray(image).transpose(2, 0, 1) for image in images])


def by_size(items: Pairs, batch_size: int) -> Pairs:
    """The same items, a batch of one size after another, for each size is a plan of its own.

    At most `HELD` bytes and a pair wait for others of their size.
    """
    waiting: dict[Any, list[tuple[Listed, Any]]] = defaultdict(list)
    held = 0
    for source, item in items:
        if isinstance(item, ImageError):
            yield source, item
            continue
        shape = _shape(item)
        waiting[shape].append((source, item))
        held += math.prod(shape)
        if len(waiting[shape]) < _batch(shape, batch_size):
            if held <= HELD:
                continue
            shape = max(waiting, key=lambda shape: len(waiting[shape]) * math.prod(shape))
        ready = waiting.pop(shape)
        held -= len(ready) * math.prod(shape)
        yield from ready
    for ready in waiting.values():
        yield from ready


def _shape(item: Any) -> tuple[int, ...]:
    return () if isinstance(item, ImageError) else tuple(item.shape)


def _batch(shape: tuple[int, ...], batch_size: int) -> int:
    return max(1, min(batch_size, HELD // math.prod(shape)))
