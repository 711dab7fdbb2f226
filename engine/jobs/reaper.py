"""Kills what a killed process leaves running: `python reaper.py PID MARK`, started by process PID.

It waits for the end of PID, then kills every process that was born with MARK, a line of the
environment. It is run by its path with the standard library alone, so as to be there at once, and
asks every while who its parent is: a pipe would stay open as long as anybody had inherited it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

LOOKS = 20  # in a row that find nothing: what was just being started still shows its mark


def reap(parent: int, mark: bytes) -> None:
    """Wait for the end of `parent`, then kill what has the mark until nothing has, `LOOKS` times.

    Looks are counted, not seconds: on a busy machine a second may pass between two lines.
    """
    while os.getppid() == parent:
        time.sleep(0.1)
    empty = 0
    while empty < LOOKS:
        empty = 0 if _killed(mark) else empty + 1
        time.sleep(0.05)


def _killed(mark: bytes) -> int:
    """How many processes had the mark; each was looked at just before, so its number is its own."""
    count = 0
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError):  # gone, or somebody else's
            if mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                os.kill(int(pid), signal.SIGKILL)
                count += 1
    return count


if __name__ == "__main__":
    reap(int(sys.argv[1]), os.fsencode(sys.argv[2]))
