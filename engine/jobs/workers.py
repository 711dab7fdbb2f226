"""Decoding in worker processes: in order, in bounded memory, and a death costs one image.

Pillow does not decode faster in threads than in one, so a machine's cores are used by processes.
They are forked from a server that has imported everything once and has never touched a GPU. A
worker reads from a pipe until that ends, so none outlives the process that it works for.
"""

from __future__ import annotations

import multiprocessing
import signal
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from PIL import Image

from ..images import (
    ImageError,
    Listed,
    OrientationWarning,
    Pixels,
    batched,
    load,
    name_of,
    tell_of_orientation,
)
from ..spec import Preprocess

CHUNK = 8
"""Images a message: its cost is small beside theirs, and few are decoded again after a death."""

Decoded = Pixels | ImageError
Decode = Callable[[Listed], Pixels]


def picture(source: Listed, preprocess: Preprocess, exif: bool = False) -> Pixels:
    """The pixels of a source, uint8 [3, crop, crop]. Raises ImageError."""
    return load(source, preprocess, name_of(source, 0), exif=exif).contiguous().numpy()


def decode_ahead(
    sources: Iterable[Listed], decode: Decode, workers: int, ahead: int, size: int = CHUNK
) -> Generator[tuple[Listed, Decoded]]:
    """Each source with what `decode` makes of it, or with the ImageError that it raises.

    `workers` processes, each asked for `size` at a time, decode up to about `ahead` images that
    nobody has asked for yet. When one of them dies, each image that it was at is decoded once more,
    alone, in a new one; an image that kills that one, too, is an error. `decode` must pickle.
    """
    team = [_Worker(decode) for _ in range(workers)]
    idle = deque(team)
    threads = ThreadPoolExecutor(workers)  # each waits for one worker

    def decoded(chunk: list[Listed]) -> list[Decoded]:
        worker = idle.popleft()
        try:
            return worker.decode(chunk)
        finally:
            idle.append(worker)

    window: deque[tuple[list[Listed], Future[list[Decoded]]]] = deque()
    try:
        for chunk in batched(sources, size):
            window.append((chunk, threads.submit(decoded, chunk)))
            if len(window) > workers + ahead // size:
                first, answers = window.popleft()
                yield from zip(first, answers.result(), strict=True)
        for first, answers in window:
            yield from zip(first, answers.result(), strict=True)
    finally:
        for worker in team:
            worker.stop()
        threads.shutdown(cancel_futures=True)
        for worker in team:
            worker.close()


class _Worker:
    """One process and the pipe to it, renewed when it dies."""

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._stopped = False
        self._start()

    def decode(self, sources: list[Listed]) -> list[Decoded]:
        answers = self._ask(sources)
        if answers is not None:
            return answers
        return [(self._ask([source]) or [_killer(source)])[0] for source in sources]

    def stop(self) -> None:
        """Whoever waits for an answer gets an EOFError."""
        self._stopped = True
        self._process.kill()

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._pipe, theirs = context.Pipe()
        limit = Image.MAX_IMAGE_PIXELS  # the caller may have raised it
        self._process: BaseProcess = context.Process(
            target=_serve, args=(theirs, self._decode, limit), daemon=True
        )
        self._process.start()
        theirs.close()  # else the pipe would not end with the process

    def _ask(self, sources: list[Listed]) -> list[Decoded] | None:
        """None if the worker died of it; then there is a new one."""
        try:
            self._pipe.send(sources)
            answers: list[Decoded]
            answers, turned = self._pipe.recv()
        except (EOFError, OSError):
            if self._stopped:
                raise
            self.close()
            self._start()
            return None
        if turned:  # each worker would say so: whoever started them does
            tell_of_orientation()
        return answers


def _serve(pipe: Connection, decode: Decode, pixel_limit: int | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits for us
    Image.MAX_IMAGE_PIXELS = pixel_limit
    turned: list[object] = []
    show = warnings.showwarning

    def look(message: Any, category: Any, filename: str, lineno: int, *more: Any) -> None:
        if issubclass(category, OrientationWarning):
            turned.append(message)
        else:
            show(message, category, filename, lineno, *more)

    warnings.simplefilter("always", OrientationWarning)
    warnings.showwarning = look  # type: ignore[assignment]
    try:
        while True:
            sources = pipe.recv()
            turned.clear()
            decoded = [decoded_or_error(source, decode) for source in sources]
            pipe.send((decoded, bool(turned)))
    except (EOFError, OSError):
        return


def decoded_or_error(source: Listed, decode: Decode) -> Decoded:
    """What `decode` makes of a source, or the ImageError that it raises."""
    try:
        return decode(source)
    except ImageError as error:
        return error


def _killer(source: Listed) -> ImageError:
    return ImageError(name_of(source, 0), "a process that decoded it died, twice")
