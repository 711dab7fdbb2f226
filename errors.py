"""What every refusal has in common, and how one ends a program. Under all floors; imports none."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


class Error(Exception):
    """A refusal of this package: one line that says what, where, wanted, got and the cure."""


def exit_status(program: str, verb: Callable[[], int]) -> int:
    """What `verb` returns, or what it was ended by: one line on standard error, and 1, or 130 for
    Ctrl-C. Nothing is said to a reader that has left, as `head` does.
    """
    try:
        status = verb()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Error, OSError) as error:
        named = isinstance(error, OSError) and error.filename is not None
        told = f"{error.filename}: {error.strerror}" if named else error  # type: ignore[union-attr]
        print(f"{program}: error: {told}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    return status
