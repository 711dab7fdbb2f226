"""What every refusal has in common, and how one ends a program. Under all floors; imports none."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn

LONGEST = 1000  # characters of a refusal: half a screen of 80 x 24


class Error(Exception):
    """A refusal of this package: one line that says what, where, wanted, got and the cure.

    It may quote files, names and servers that nobody vouches for, so it is printable and no longer
    than `LONGEST`: what is cut out lies in the middle, between what is wrong and its cure.
    """

    def __str__(self) -> str:
        return shortened(super().__str__())


def printable(text: str) -> str:
    """`text` with line breaks, terminal codes and lone surrogates spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shortened(text: str) -> str:
    """`text`, printable, as one line that fits a screen."""
    half = (LONGEST - 5) // 2
    first, last = printable(text[:LONGEST]), printable(text[LONGEST:][-LONGEST:])
    if len(text) <= 2 * LONGEST and len(first + last) <= LONGEST:
        return first + last
    return f"{first[:half]} ... {(first + last)[-half:]}"


def _told(program: str) -> Callable[..., None]:
    """A warning is a line like those of errors, without the place in the code where it arose."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        print(f"{program}: {shortened(str(message))}", file=sys.stderr)

    return show


class Parser(argparse.ArgumentParser):
    """One whose usage errors are printable: they quote words that a shell may have found."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def exit_status(program: str, verb: Callable[[], int]) -> int:
    """What `verb` returns, or what it was ended by: one line on standard error, and 1, or 130 for
    Ctrl-C. Nothing is said to a reader that has left, as `head` does.
    """
    with contextlib.suppress(AttributeError):  # not every stream can
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _told(program)
            status = verb()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (Error, OSError, Warning) as error:  # warnings, where Python is told to raise them
        named = isinstance(error, OSError) and error.filename is not None
        told = f"{error.filename}: {error.strerror}" if named else error  # type: ignore[union-attr]
        print(f"{program}: error: {shortened(str(told))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    return status
