"""Binaries before anybody wants them, compiled in many processes.

A launch on tensors without memory has the binary of the one that will run. Who launches finds it in
Triton's cache, or compiles it himself if it is not there: nothing here has to succeed, or to end.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator

from ...kernels.jit import Launch
from ..worker import Lost, Worker
from .compiled import binary_name, compile_for

Make = Callable[[], Iterable[Launch]]  # on "meta", and in another process: it can be pickled
Named = tuple[str, Make, frozenset[str]]  # who wants them, and the names of their binaries
PATIENCE = 120.0  # seconds for what one Make makes


def named(work: Iterable[tuple[str, Make]], arch: int) -> Iterator[Named]:
    """Each with its binaries, none of which is compiled."""
    for wanted_by, make in work:
        try:
            names = frozenset(binary_name(launch, arch) for launch in make())
        except Exception as error:  # whoever compiles it tells; those after it are wanted, too
            names = frozenset({repr(error)})
        yield wanted_by, make, names


def distinct(work: Iterable[Named]) -> Iterator[Named]:
    """Those with a binary that none before has."""
    known: set[str] = set()
    for one in work:
        if not one[2] <= known:
            known |= one[2]
            yield one


def compile_all(make: Make, arch: int) -> None:
    """What a process does."""
    for launch in make():
        compile_for(launch, arch)


@contextlib.contextmanager
def compiling(
    work: Iterable[tuple[str, Make]],
    arch: int,
    told: Callable[[str], None],
    jobs: int | None = None,
) -> Iterator[None]:
    """While it lasts, `work` is compiled in its order, by default on all cores but one.

    What fails is told and changes nothing else. Nothing outlives it, done or not.
    """
    jobs = jobs or max(1, (os.cpu_count() or 1) - 1)
    workers = [Worker(compile_all, quiet=True) for _ in range(jobs)]
    shared, lock, over = distinct(named(work, arch)), threading.Lock(), threading.Event()

    def drain(worker: Worker[[Make, int], None]) -> None:
        while not over.is_set():
            try:
                with lock:
                    found = next(shared, None)
                if found is None:
                    return
                worker.ask(PATIENCE, found[1], arch)
            except Exception as error:  # a plan that cannot be made, a compiler that dies
                if not over.is_set():
                    told(f"compiling ahead: {error.reason if isinstance(error, Lost) else error}")

    for worker in workers:
        worker.start()  # all at once: to import torch and Triton takes each of them seconds
    threads = [threading.Thread(target=drain, args=(worker,), daemon=True) for worker in workers]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for worker in workers:
            worker.close()
        for thread in threads:
            thread.join()
