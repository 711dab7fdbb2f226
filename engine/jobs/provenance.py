"""Provenance: what was asked for when a file of rows was made, kept with the rows.

Rows of two jobs in one file cannot be told apart, so a job goes on only with rows that were made as
it would make them. Kept is what was asked for: the model and its weights, classes an image, views,
sources and the folder that relative ones start from. How it was computed is not, and may change
from one part of a job to the next: device, backend, dtype, batch size, workers, Ray.

A record maps options to their values as JSON has them, None where one is not asked for. What a word
stands for may change, so weights and files are `by_content`, whatever path leads to them.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import secrets
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

Record = Mapping[str, Any]


def by_content(word: str, sha256: str) -> dict[str, str]:
    """A value that is the same where its content is; the word is for messages."""
    return {"word": word, "sha256": sha256}


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and numbers of a canonical state; 0.2 to 0.7 s for AlexNet's."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().numpy().data)
    return digest.hexdigest()


def of_file(path: str) -> dict[str, str]:
    """A file as a value. Raises OSError where it cannot be read."""
    with open(os.path.expanduser(path), "rb") as file:
        return by_content(path, hashlib.file_digest(file, "sha256").hexdigest())


def difference(made: Record, asked: Record) -> str | None:
    """The first of `asked` that rows were made without, in words; None if there is none."""
    for option, value in asked.items():
        before = made.get(option)
        if _identity(before) == _identity(value):
            continue
        if isinstance(before, list) and isinstance(value, list):
            return f"made from other {option}: {_changes(before, value)}"
        if (told := _told(option, before)) == _told(option, value):
            return f"made with {told}, whose content has changed since"
        return f"made with {told}, got {_told(option, value)}"
    return None


def _identity(value: Any) -> Any:
    return value["sha256"] if isinstance(value, dict) else value


def _told(option: str, value: Any) -> str:
    if option == "folder":
        return f"relative sources in {value}" if value else "no relative sources"
    if value is None or value is True:
        return f"--{option}" if value else f"no --{option}"
    return f"--{option} {value['word'] if isinstance(value, dict) else value}"


def _changes(before: list[str], now: list[str]) -> str:
    new, gone = Counter(now) - Counter(before), Counter(before) - Counter(now)
    words, what = ([*new], "new") if new else ([*gone], "missing")
    more = f" and {len(words) - 1} more are" if len(words) > 1 else " is"
    return f"{words[0]!r}{more} {what}"


# On disk


BESIDE = ".job.json"  # what a record's file is called after the file that it is of


def encode(record: Record, verb: str) -> str:
    """A record of a verb's rows as text; `decode` makes it a record again."""
    return json.dumps({verb: record})


def decode(text: bytes, verb: str) -> dict[str, Any] | None:
    """The record that a text is, None if it is none of that verb's."""
    try:
        record = json.loads(text)[verb]
    except (ValueError, LookupError, TypeError):
        return None
    return record if isinstance(record, dict) else None


def store(record: Record, path: Path, verb: str) -> None:
    """Write it so that it is on disk when this returns, whole or not at all. Raises OSError."""
    with replacing(path) as file:
        file.write(encode(record, verb).encode() + b"\n")
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # not every file system can
            os.fsync(folder)
    finally:
        os.close(folder)


LONGER = 14  # bytes that a name grows by while it is `replacing`


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file beside `path`, whose place it takes when the block ends well; else it goes.

    Nobody has a file of its name, and what a kill leaves of it is for `sweep`. Raises OSError.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
    with open(temporary, "xb") as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def sweep(path: Path) -> None:
    """Delete what kills left of files that were to replace `path`, while no job writes to it."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}.new"):
        with contextlib.suppress(OSError):  # somebody else's
            left.unlink()
