"""Work in a process of its own: whatever happens there, the parent is told and goes on."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
from alexnet_triton.bench.worker import Lost, Worker

LONG = 600.0  # seconds, for what will answer


@pytest.fixture
def worker() -> Iterator[Worker[..., Any]]:
    """A process that evaluates Python, what it is told of as work.py."""
    worker: Worker[..., Any] = Worker(eval, file="work.py", quiet=True)
    yield worker
    worker.close()


def gone(pid: int) -> bool:
    """Whether a process has ended, given a moment; a zombie that nobody waits for has."""
    for _ in range(1000):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize(
    ("task", "seconds", "status", "reason"),
    [
        ("1 / 0", LONG, "failed", "ZeroDivisionError: division by zero at work.py:1"),
        (
            "(_ for _ in ()).throw(KeyboardInterrupt)",
            *(LONG, "failed", "KeyboardInterrupt at work.py:1"),
        ),
        ("exit(2)", LONG, "failed", "SystemExit: 2 at work.py:1"),
        (
            "print('last words', flush=True) or __import__('os').abort()",
            *(LONG, "failed", "the process died with SIGABRT at work.py:1: last words"),
        ),
        ("__import__('os')._exit(3)", LONG, "failed", "the process died with status 3"),
        ("__import__('time').sleep(60)", 0.2, "timeout", "no answer within 0.2 s at work.py:1"),
    ],
)
def test_a_loss_is_told_with_its_place_and_a_new_process_answers(
    worker: Worker[..., Any], task: str, seconds: float, status: str, reason: str
) -> None:
    before = worker.ask(LONG, "__import__('os').getpid()")
    with pytest.raises(Lost) as lost:
        worker.ask(seconds, f"eval(compile({task!r}, 'work.py', 'eval'))")
    assert (lost.value.status, lost.value.reason) == (status, reason)
    assert gone(before)
    assert worker.ask(LONG, "1 + 1") == 2


def test_a_process_whose_parent_is_gone_before_it_is_ready_says_nothing() -> None:
    ours, theirs = Pipe()
    ours.close()
    command = [sys.executable, "-m", "alexnet_triton.bench.worker", str(theirs.fileno()), "2", ""]
    ended = subprocess.run(
        command,
        pass_fds=[theirs.fileno()],
        capture_output=True,
        start_new_session=True,
        timeout=LONG,
    )
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_its_children_end_with_it(worker: Worker[..., Any]) -> None:
    started = "__import__('subprocess').Popen(['sleep', '600']).pid"
    assert worker.ask(LONG, started) != (other := worker.ask(LONG, started))
    worker.close()
    assert gone(other)


def test_it_ends_with_its_parent(worker: Worker[..., Any]) -> None:
    """Nobody has closed it: the pipe is, as at the end of a process."""
    pid = worker.ask(LONG, "__import__('os').getpid()")
    assert worker._pipe is not None
    worker._pipe.close()
    assert worker._process is not None
    assert worker._process.wait(60) == 0
    assert gone(pid)


PARENT = """
import sys
from alexnet_triton.bench.worker import Worker
worker = Worker(eval, file="work.py", quiet=True)
print(worker.ask(600, "__import__('os').getpid()"), flush=True)
worker.ask(600, "__import__('time').sleep(600)")
"""


def test_it_ends_with_its_parent_in_the_middle_of_a_question() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
    assert gone(pid)


def test_an_interrupted_question_leaves_no_answer_behind(
    worker: Worker[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next question must not get the answer to the last."""

    def interrupt(self: object, seconds: float) -> None:
        raise KeyboardInterrupt

    worker.ask(LONG, "'ready'")
    with monkeypatch.context() as patch:
        patch.setattr(Worker, "_receive", interrupt)
        with pytest.raises(KeyboardInterrupt):
            worker.ask(LONG, "'old'")
    assert worker.ask(LONG, "'new'") == "new"


def test_what_it_prints_is_no_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    told: Worker[..., Any] = Worker(eval, env={**os.environ, "OWN": "mine"})
    try:
        told.ask(LONG, "print(__import__('os').environ['OWN'], flush=True)")
    finally:
        told.close()
    printed = capfd.readouterr()
    assert not printed.out
    assert printed.err == "mine\n"
