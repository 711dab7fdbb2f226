"""Work in a process of its own, which may crash or hang without harm to its parent.

A kernel that reads where it must not poisons its process's CUDA context, a compiler may abort, and
either may never end. So the parent never runs a candidate itself: it asks a child, waits as long as
it wants, and starts another child after one that was lost.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

START = 180.0  # seconds for a process to start, which imports torch and Triton

Task = TypeVar("Task")
Answer = TypeVar("Answer")


class Lost(RuntimeError):
    """No answer: the work raised, the process died, or it took too long."""

    def __init__(self, status: Literal["failed", "timeout"], reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


class Child(Generic[Task, Answer]):
    """A process that answers one task after the other with what `make` makes.

    `make` is called in the child and gives the function that does the work; both it and the tasks
    are pickled. The process starts with the first task.
    """

    def __init__(self, make: Callable[[], Callable[[Task], Answer]]) -> None:
        self._make = make
        self._process: Any = None
        self._pipe: Connection | None = None
        self._log: Path | None = None  # what the child and its compilers print

    def ask(self, task: Task, seconds: float) -> Answer:
        """The answer to a task. Raises Lost; the next task then meets a new process."""
        pipe = self._pipe or self._start()
        try:
            pipe.send(task)
            if not pipe.poll(seconds):
                self.close()
                raise Lost("timeout", f"no answer within {seconds:g} s")
            problem, answer = pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise Lost("failed", self._death()) from None
        if problem is not None:
            self.close()
            raise Lost("failed", problem)
        result: Answer = answer
        return result

    def close(self) -> None:
        """End the process at once."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
        if self._pipe is not None:
            self._pipe.close()
        if self._log is not None:
            self._log.unlink(missing_ok=True)
        self._process = self._pipe = self._log = None

    def _start(self) -> Connection:
        # Spawned, not forked: a forked process cannot use CUDA, nor trust its locks.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        handle, name = tempfile.mkstemp(suffix=".log")
        os.close(handle)
        self._log = Path(name)
        self._process = context.Process(target=_serve, args=(theirs, self._make, name), daemon=True)
        self._process.start()
        theirs.close()
        try:
            if not self._pipe.poll(START):
                self.close()
                raise Lost("timeout", f"the process did not start within {START:g} s")
            self._pipe.recv()
        except (EOFError, ConnectionResetError):
            raise Lost("failed", self._death()) from None
        return self._pipe

    def _death(self) -> str:
        """How the process ended, with the last that it printed."""
        self._process.join()
        code = self._process.exitcode
        how = f"status {code}" if code >= 0 else signal.Signals(-code).name
        printed = self._log.read_text(errors="replace").split("\n") if self._log else []
        last = next((line.strip() for line in reversed(printed) if line.strip()), "")
        self.close()
        return f"the process died with {how}" + (f": {last[:200]}" if last else "")


def summary(error: Exception) -> str:
    """An exception in one line.

    Triton's compiler quotes the kernel before its message; CUDA follows its message by advice.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    told = getattr(error, "error_message", None) or (
        lines[-1] if lines[0].startswith("at ") else lines[0]
    )
    return f"{type(error).__name__}: {told}"[:300].removesuffix(": ")


def _serve(pipe: Connection, make: Callable[[], Callable[[Any], Any]], log: str) -> None:
    written = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(written, 1)  # the parent's standard output may be JSON
    os.dup2(written, 2)
    work = make()
    pipe.send("ready")
    while True:
        try:
            task = pipe.recv()
        except EOFError:  # the parent has ended
            return
        try:
            answer = work(task)
        except Exception as error:
            # Nothing is trusted after an exception: the CUDA context may be broken for good.
            pipe.send((summary(error), None))
            return
        pipe.send((None, answer))
