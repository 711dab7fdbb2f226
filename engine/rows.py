"""Rows: what became of each image, on disk as it comes, and what of it is there already.

A job's state is one file of JSON lines that only ever grows by whole rows, so that whatever ends
the job, `--resume` can go on. For JSON lines that file is the output itself. For Parquet, whose
files are nothing without their end, it lies beside the output as `FILE.parquet.partial.jsonl`, and
`FILE.parquet` is made of it in one piece when the job ends, interrupted or not.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import math
import os
import sqlite3
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from errno import EISDIR
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

from ..errors import Error
from .images import ImageError, Source
from .run import Prediction

Existing = Literal["refuse", "resume", "overwrite"]

_GROUP = 8 << 20  # bytes of JSON lines that become one row group: flat memory, some 20,000 rows


class OutputError(Error):
    """Rows that cannot be kept: one line that names the file, the cause and the cure."""


@dataclass(frozen=True, slots=True)
class Row:
    """What became of one input: its predictions, or why there are none.

    `named` says whether the user named this very file, not a folder or glob it was found in; it is
    not stored.
    """

    path: str
    predictions: tuple[Prediction, ...]
    error: str | None
    named: bool

    def to_dict(self) -> dict[str, Any]:
        """`{"path", "predictions": [...]}` or `{"path", "error"}`: what is printed and stored."""
        if self.error is not None:
            return {"path": self.path, "error": self.error}
        best = [{"index": p.index, "label": p.label, "score": p.score} for p in self.predictions]
        return {"path": self.path, "predictions": best}


class Kept(NamedTuple):
    """A row that is in the output already, as far as resuming needs it."""

    path: str
    error: str | None


def path_of(source: Source | ImageError) -> str:
    """The path or URL that stands in a source's row, valid Unicode whatever the file is called.

    Bytes of a file name that are not UTF-8 are spelled out (`caf\\udce9.png`): JSON and Parquet
    have no other room for them.
    """
    path = source.item if isinstance(source, ImageError) else source.location
    return _text(path)


def row(source: Source | ImageError, result: Sequence[Prediction] | ImageError) -> Row:
    """The row of one source from what the engine, or its decoding, made of it.

    Scores that are not numbers, as after an overflow in fp16, are an error.
    """
    named = isinstance(source, ImageError) or source.named
    if isinstance(result, ImageError):
        return Row(path_of(source), (), _text(result.reason), named)
    if any(math.isnan(prediction.score) for prediction in result):
        return Row(path_of(source), (), "its scores are not numbers (NaN); try dtype fp32", named)
    return Row(path_of(source), tuple(result), None, named)


def _text(words: str) -> str:
    return words.encode("utf-8", "backslashreplace").decode()


# Parquet


def schema() -> Any:
    """The pyarrow.Schema of Parquet output: of `error` and `predictions` one is always null.

    path: string; error: string; predictions: list<struct<index: int32, label: string,
    score: float>>. Raises OutputError where pyarrow is missing.
    """
    pa = _pyarrow()
    prediction = pa.struct([("index", pa.int32()), ("label", pa.string()), ("score", pa.float32())])
    return pa.schema(
        [
            ("path", pa.string()),
            ("error", pa.string()),
            ("predictions", pa.list_(prediction)),
        ]
    )


def to_table(rows: Iterable[Row]) -> Any:
    """`rows` as a pyarrow.Table of `schema()`."""
    return _pyarrow().Table.from_pylist([row.to_dict() for row in rows], schema())


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.json
        import pyarrow.parquet
    except ImportError:
        raise OutputError(
            "Parquet needs pyarrow, which is not installed; "
            "`pip install -e '.[parquet]'`, or name a .jsonl file"
        ) from None
    return pyarrow


# The output


class Output:
    """The file that a job writes its rows to: a context manager, safe against whatever ends it.

    A path that ends in .parquet becomes Parquet of `schema()`, any other JSON lines
    (`Row.to_dict`). Every row goes to the operating system when it is written; one that was torn
    by a kill or a full disk is cut off. `existing` says what becomes of rows that are there
    already: they are refused, kept and continued ("resume", which may also find none), or replaced
    ("overwrite", when the first new row is written). Devices and pipes take JSON lines, too, and
    keep nothing. When the context is left, also by Ctrl-C or an error, a Parquet file is made of
    the rows so far; its partial file goes when the job is done.

    Raises OutputError, one line: at once for what cannot be written, for rows that are there and
    refused, and while another job writes to it; from `write` and on leaving for a full disk.
    """

    def __init__(self, path: str | os.PathLike[str], existing: Existing = "refuse") -> None:
        self.path = Path(path)
        self._parquet = self.path.suffix.lower() == ".parquet"
        self._lines = _beside(self.path, ".partial.jsonl") if self._parquet else self.path
        self._begun = existing != "overwrite"  # until then the rows to be replaced stand
        if self._parquet:
            _pyarrow()
        if existing == "refuse" and (_size(self.path) or _size(self._lines)):
            raise OutputError(
                f"{self.path}: holds something already; "
                "go on with it (--resume), replace it (--overwrite), or name another file"
            )
        try:
            self._file = self._open(existing)
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written: {error.strerror}") from error
        try:
            self._regular = stat.S_ISREG(os.fstat(self._file).st_mode)
            if self._regular:
                self._claim()
            self._kept = self._size = self._whole() if existing == "resume" else 0
        except BaseException:
            os.close(self._file)
            raise

    def kept(self) -> Iterator[Kept]:
        """The rows that were there when the job was resumed, in order, lazily.

        Raises OutputError at a line that is no row.
        """
        with open(self._lines, "rb") if self._kept else io.BytesIO() as lines:
            end = 0
            for number, line in enumerate(lines, 1):
                try:
                    found = json.loads(line)
                    row = Kept(found["path"], found.get("error"))
                    if not isinstance(row.path, str) or not isinstance(row.error, str | None):
                        raise TypeError
                except (ValueError, LookupError, TypeError, AttributeError):
                    raise self._foreign(f"line {number}") from None
                yield row
                end += len(line)
                if end == self._kept:  # what follows was written since
                    return

    def write(self, row: Row) -> None:
        """Append one row. Raises OutputError where it finds no room; the rows before it stay."""
        line = rest = _line(row.to_dict())
        try:
            if not self._begun:
                self._begin()
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError as error:
            raise self._no_room(error) from error
        self._size += len(line)

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if self._regular and self._begun:
                os.ftruncate(self._file, self._size)  # a row may be torn
                if self._parquet and self._size and not isinstance(error, OutputError):
                    self._render()
                    if error is None:
                        self._lines.unlink()
            if self._regular and not os.fstat(self._file).st_size:
                self._lines.unlink(missing_ok=True)
        finally:
            os.close(self._file)

    def _open(self, existing: Existing) -> int:
        if self._parquet and self.path.is_dir():
            raise IsADirectoryError(EISDIR, os.strerror(EISDIR))
        if self._parquet and existing == "resume" and not _size(self._lines) and _size(self.path):
            self._restore()
        return os.open(self._lines, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)

    def _claim(self) -> None:
        """Two jobs must not write to one file; where a file system has no locks, they may."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"{self.path}: another job is writing to it; wait for it") from None
        except OSError:
            return

    def _whole(self) -> int:
        """Cut off a torn last row; the bytes that are left."""
        if not self._regular:
            raise OutputError(f"{self.path}: is no regular file: there is nothing to resume")
        size = end = os.fstat(self._file).st_size
        block = b""
        while end and b"\n" not in block:
            end = max(0, end - io.DEFAULT_BUFFER_SIZE)
            block = os.pread(self._file, io.DEFAULT_BUFFER_SIZE, end)
        whole = end + block.rfind(b"\n") + 1
        torn = os.pread(self._file, len(_ROW_BEGINS), whole)
        # A power failure may leave zeros. Anything else was not written by a job: hands off.
        if torn.strip(b"\0") and not (_ROW_BEGINS.startswith(torn)):
            raise self._foreign("its end")
        if whole < size:
            os.ftruncate(self._file, whole)
        return whole

    def _begin(self) -> None:
        if self._regular:
            os.ftruncate(self._file, 0)
        if self._parquet:
            self.path.unlink(missing_ok=True)
        self._begun = True

    def _render(self) -> None:
        """The Parquet file of all rows, in place of the last one only when it is complete."""
        parquet = _pyarrow().parquet
        temporary = _beside(self.path, ".partial")
        try:
            with parquet.ParquetWriter(temporary, schema()) as writer:
                for group in self._groups():
                    writer.write_table(group)
            with open(temporary, "rb") as made:
                os.fsync(made.fileno())
            os.replace(temporary, self.path)
        except OSError as error:
            raise self._no_room(error) from error
        finally:
            temporary.unlink(missing_ok=True)

    def _groups(self) -> Iterator[Any]:
        """The rows so far as tables of `schema()`, each of one group of rows."""
        pa = _pyarrow()
        parse = pa.json.ParseOptions(explicit_schema=schema(), unexpected_field_behavior="ignore")
        with open(self._lines, "rb") as lines:
            while group := b"".join(lines.readlines(_GROUP)):
                read = pa.json.ReadOptions(use_threads=False, block_size=len(group))
                yield pa.json.read_json(io.BytesIO(group), read, parse)

    def _restore(self) -> None:
        """The partial file that a finished Parquet file was made of."""
        pa = _pyarrow()
        temporary = _beside(self._lines, ".new")
        try:
            with pa.parquet.ParquetFile(self.path) as file, open(temporary, "wb") as lines:
                if not file.schema_arrow.equals(schema()):
                    raise self._foreign("its schema")
                for batch in file.iter_batches(batch_size=1024):
                    for record in batch.to_pylist():
                        lines.write(_line({k: v for k, v in record.items() if v is not None}))
            os.replace(temporary, self._lines)
        except pa.ArrowInvalid:
            raise self._foreign("it") from None
        finally:
            temporary.unlink(missing_ok=True)

    def _foreign(self, what: str) -> OutputError:
        return OutputError(f"{self._lines}: {what} was not written by a job; name another file")

    def _no_room(self, error: OSError) -> OutputError:
        cause = error.strerror or str(error)
        if not self._regular:
            return OutputError(f"{self.path}: cannot be written: {cause}")
        return OutputError(
            f"{self.path}: cannot be written: {cause}; "
            f"the rows so far are in {self._lines}, make room and go on with --resume"
        )


_ROW_BEGINS = b'{"path": "'


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _size(path: Path) -> int:
    """Bytes of a regular file; 0 for anything else and for nothing."""
    try:
        found = path.stat()
    except OSError:
        return 0
    return found.st_size if stat.S_ISREG(found.st_mode) else 0


# Resuming


def pair(
    sources: Iterable[Source | ImageError], kept: Iterable[Kept]
) -> Iterator[tuple[Source | ImageError, Kept | None]]:
    """Each source with the row that is kept of it, or with None where it is still to be done.

    Expansion has one order, so both are read in step, in constant memory, until they part: because
    files came or went, or because the rows were written out of order. From there on what is left
    of the rows waits in a temporary database on disk. A source that comes twice takes two rows.
    """
    sources, kept = iter(sources), iter(kept)
    for source in sources:
        row = next(kept, None)
        if row is not None and row.path != path_of(source):
            yield from _pair_in_any_order(chain([source], sources), chain([row], kept))
            return
        yield source, row


def _pair_in_any_order(
    sources: Iterable[Source | ImageError], kept: Iterable[Kept]
) -> Iterator[tuple[Source | ImageError, Kept | None]]:
    with contextlib.closing(sqlite3.connect("", check_same_thread=False)) as left:
        left.execute("CREATE TABLE kept (path TEXT, error TEXT)")
        left.executemany("INSERT INTO kept VALUES (?, ?)", kept)
        left.execute("CREATE INDEX by_path ON kept (path)")
        for source in sources:
            find = "SELECT rowid, path, error FROM kept WHERE path = ? LIMIT 1"
            found = left.execute(find, (path_of(source),)).fetchone()
            if found is not None:
                left.execute("DELETE FROM kept WHERE rowid = ?", found[:1])
            yield source, None if found is None else Kept(*found[1:])
