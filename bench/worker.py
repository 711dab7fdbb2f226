"""Work in a process of its own, which may crash or hang without harm to its parent.

A kernel that reads where it must not poisons its process's CUDA context, a compiler may abort, and
either may never end. So the parent never runs such work itself: it asks a worker, waits as long as
it wants, and gets another process after one that was lost. A worker that is late ends itself, and
is killed if it cannot; where it hung or crashed is read off the trace that Python's faulthandler
leaves. It leads a process group of its own, so Ctrl-C is its parent's alone, and whatever it has
started ends with it; once its parent is gone it ends too.

The process runs this module with two file descriptors, a pipe and a file for traces.
"""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import IO, Any, Generic, Literal, ParamSpec, TypeVar

START = 180.0  # seconds for a process to start, which imports torch and Triton
GRACE = 2.0  # seconds for one that is late to leave its trace

Asked = ParamSpec("Asked")
Answer = TypeVar("Answer")


class Lost(RuntimeError):
    """No answer: the work raised, the process died, or it took too long; one line says which."""

    def __init__(self, status: Literal["failed", "timeout"], reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


class Worker(Generic[Asked, Answer]):
    """A process that calls `work`; close it in the end.

    `work` is pickled, and keeps in the process what it changes in itself; so are arguments and
    answers. Of errors and crashes the place in `file` is told. What the process prints goes to
    standard error, never to standard output; of a `quiet` one it goes nowhere, but a death is told
    with the last line. `env` is the process's environment, by default the parent's.
    """

    def __init__(
        self,
        work: Callable[Asked, Answer],
        *,
        file: str = "",
        quiet: bool = False,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._work, self._file, self._quiet, self._env = work, file, quiet, env
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._ready = False
        self._trace: IO[bytes] | None = None
        self._log: IO[bytes] | None = None

    def start(self) -> None:
        """Start the process unless there is one; it gets ready by itself, and `ask` waits for it.

        Without this it starts with the first question, which is then the slower.
        """
        if self._process is not None:
            return
        self._pipe, theirs = Pipe()
        self._trace = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._log = tempfile.TemporaryFile() if self._quiet else None  # noqa: SIM115
        passed = (theirs.fileno(), self._trace.fileno())
        printed = 2 if self._log is None else self._log.fileno()
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, *map(str, passed), self._file],
            pass_fds=passed,
            env=self._env,
            stdin=subprocess.DEVNULL,
            stdout=printed,  # not the parent's, which may be JSON
            stderr=printed,
            start_new_session=True,
        )
        theirs.close()
        with suppress(OSError):  # who asks will hear of its end
            self._pipe.send(self._work)

    def ask(self, seconds: float, *args: Asked.args, **kwargs: Asked.kwargs) -> Answer:
        """What `work` returns. Raises Lost after so many seconds, or if there is no answer.

        After that, or an interrupt, the next question meets a new process.
        """
        try:
            self.start()
            assert self._pipe is not None
            if not self._ready:
                self._receive(START)
                self._ready = True
            with suppress(OSError):
                self._pipe.send((seconds, args, kwargs))
            answer: Answer = self._receive(seconds)
            return answer
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the process and whatever it started, at once."""
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for each in (self._pipe, self._trace, self._log):
            if each is not None:
                each.close()
        self._pipe = self._trace = self._log = None
        self._ready = False

    def _receive(self, seconds: float) -> Any:
        asked = time.monotonic()
        try:
            assert self._pipe is not None
            if self._pipe.poll(seconds + GRACE):
                reason, answer = self._pipe.recv()
                if reason is None:
                    return answer
                raise Lost("failed", reason)
        except (EOFError, OSError):  # it is gone
            pass
        if time.monotonic() - asked >= seconds:
            raise Lost("timeout", f"no answer within {seconds:g} s{self._place()}")
        raise Lost("failed", self._death())

    def _death(self) -> str:
        """How the process ended, where, and the last that it printed."""
        if self._process is None:
            return "the process was closed"
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE)
        code = self._process.poll()
        if code is None:
            return "the process hung up"
        how = f"status {code}" if code >= 0 else signal.Signals(-code).name
        printed = [line.strip() for line in _text(self._log).splitlines() if line.strip()]
        last = f": {printed[-1][:200]}" if printed else ""
        return f"the process died with {how}{self._place()}{last}"

    def _place(self) -> str:
        """Where in `file` it was, as far as the fault handler could tell."""
        found = re.search(rf'File "{re.escape(self._file)}", line (\d+)', _text(self._trace))
        return f" at {os.path.basename(self._file)}:{found[1]}" if found else ""


def summary(error: BaseException, file: str = "") -> str:
    """An exception in one line, with the line of `file` that it came from.

    Triton wraps what a kernel raises, and its compiler quotes the kernel before its message; CUDA
    follows its message by advice.
    """
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    places = [
        frame.lineno
        for link in chain
        for frame in traceback.extract_tb(link.__traceback__)
        if frame.filename == file
    ]
    text = [line.strip() for line in str(chain[-1]).splitlines() if line.strip()] or [""]
    message = getattr(chain[-1], "error_message", None) or (
        text[-1] if text[0].startswith("at ") else text[0]
    )
    place = f" at {os.path.basename(file)}:{places[-1]}" if places else ""
    return f"{type(chain[-1]).__name__}: {message}"[:300].removesuffix(": ") + place


def _text(file: IO[bytes] | None) -> str:
    if file is None:
        return ""
    file.seek(0)
    return file.read().decode(errors="replace")


def _serve(pipe: Connection, trace: int, file: str) -> None:
    """The process: answer until the parent hangs up or something is raised.

    Nothing is trusted after an exception: the CUDA context may be broken for good.
    """
    faulthandler.enable(trace)
    threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start()
    with suppress(EOFError, BrokenPipeError):
        work = pipe.recv()
        pipe.send((None, None))
        while True:
            seconds, args, kwargs = pipe.recv()
            faulthandler.dump_traceback_later(max(seconds, 1e-3), exit=True, file=trace)
            try:
                answer = work(*args, **kwargs)
            except BaseException as error:  # an exit or an interrupt, too
                pipe.send((summary(error, file), None))
                return
            faulthandler.cancel_dump_traceback_later()
            pipe.send((None, answer))


def _follow(parent: int) -> None:
    """End this process and what it started once its parent is gone: nobody waits for an answer."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])), int(sys.argv[2]), sys.argv[3])
