"""Rows: what became of each image, on disk as it comes, and what of it is there already.

A job's state is one file of JSON lines that only ever grows by whole rows, so that `--resume` can
go on. For JSON lines that file is the output itself. For a table (`tables.py`), which is nothing
without its end, it lies beside the output as `FILE.partial.jsonl`. How the rows were made
(`provenance.py`) lies beside the lines, as `FILE.jsonl.job.json` or
`FILE.parquet.partial.jsonl.job.json`, and in the metadata of Parquet; beside an array of features,
whether it is finished or not, as `FILE.npy.job.json`.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import sqlite3
import stat
from collections.abc import Iterable, Iterator
from errno import EACCES, EISDIR, ENAMETOOLONG
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..images import Listed
from . import provenance
from .kinds import PREDICTIONS, ImageRow, Kind, path_of
from .tables import GROUP, TABLES, Format, OutputError, foreign, paths_of

Existing = Literal["refuse", "resume", "retry", "overwrite"]

_LINES = (".jsonl", ".ndjson")


class Kept(NamedTuple):
    """A row that is in the output already, as far as resuming needs it."""

    path: str
    error: str | None


# The output


class Output:
    """The file that a job writes its rows to: a context manager, safe against whatever ends it.

    A path that ends in .parquet becomes Parquet of `schema(kind)`, of features one in .npy or
    .safetensors an array, one in .jsonl or .ndjson JSON lines (`ImageRow.to_dict`), and so does a
    device or pipe of any name, which keeps nothing. Every row goes to the operating system when it
    is written; one that was torn by a kill or a full disk is cut off. `existing` says what becomes
    of rows that are there already: they are refused, kept and continued ("resume", which may also
    find none), kept but for errors ("retry"), or replaced ("overwrite"); `resumed` says whether
    there are rows that are kept. How they were made is kept with them, and `agree` holds it against
    what is asked for now. Nothing is touched before the first new row is written. When the context
    is left, also by Ctrl-C or an error, a table is made of the rows so far in one piece; its
    partial file goes when the job is done.

    Raises OutputError, one line: at once for what cannot be written, for rows that are there and
    refused, for what no job wrote, and while another job writes to it; from `write` and on leaving
    for a full disk, and where somebody else moved, deleted or changed the file meanwhile.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        existing: Existing = "refuse",
        kind: Kind = PREDICTIONS,
    ) -> None:
        suffix = Path(path).suffix.lower()
        self._regular = not _is_stream(Path(path))
        # Behind a link, so that its record lies beside the rows whatever link leads to them.
        behind = self._regular and os.path.islink(path)
        self.path = Path(os.path.realpath(path) if behind else path)
        self.kind = kind  # may be set to one that is fitted, before any row
        self._existing = existing
        self._resuming = existing in ("resume", "retry")
        tables = TABLES if kind.packed else {".parquet": TABLES[".parquet"]}
        suffixes = (*_LINES, *tables)
        if self._regular and suffix not in suffixes and not os.path.isdir(self.path):
            raise OutputError(
                f"{self.path}: wanted a name that ends in {' or '.join(suffixes)}, got "
                f"{suffix or 'none'}; for example {self.path.with_suffix('.jsonl')}"
            )
        if self._resuming and not self._regular:
            raise OutputError(f"{self.path}: is no regular file: there is nothing to resume")
        self._table = tables.get(suffix) if self._regular else None
        self._lines = _beside(self.path, ".partial.jsonl") if self._table else self.path
        self._record = _beside(self._lines, provenance.BESIDE)
        self._files = [self.path, self._lines]
        if self._table:
            self._table.check()
            if self._table.beside:
                self._record = _beside(self.path, provenance.BESIDE)
                self._files.append(paths_of(self.path))
        for path in self._files:
            if existing == "refuse" and _size(path):
                raise OutputError(
                    f"{path}: holds something already; "
                    "go on with it (--resume), replace it (--overwrite), or name another file"
                )
        self._before = _identity(self.path)  # of a table that this job may replace
        self._created = self._begun = self._torn = False
        self.resumed = False
        self._made: dict[str, Any] = {}  # how the rows are made, those that are kept, too
        self._finished = False  # whether what is kept is in the table
        self._kept = 0  # bytes of whole rows in the lines that are kept
        self._size = 0  # bytes that are in the lines, unless somebody else changes them
        try:
            self._file = self._open()
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written: {error.strerror}") from error
        try:
            if self._regular:
                self._claim()
                self._look()
        except BaseException:
            self._close()
            raise

    def agree(self, **asked: Any) -> None:
        """Say what is asked for (see `provenance`), in parts as it gets known, before any row.

        Raises OutputError where the rows that are kept were made in another way.
        """
        if not self.resumed:
            self._made |= asked
        elif differs := provenance.difference(self._made, asked):
            raise OutputError(
                f"{self.path}: {differs}; go on as it was made, "
                "replace it (--overwrite), or name another file"
            )

    def kept(self) -> Iterator[Kept]:
        """The rows that were there when the job was resumed, in order, lazily; errors, too.

        Raises OutputError at a line that is no row.
        """
        rows = self._restored(wanted=False) if self._finished else self._whole()
        yield from (kept for kept, _ in rows)

    def write(self, row: ImageRow) -> None:
        """Append one row. Raises OutputError where it finds no room; the rows before it stay."""
        line = rest = _line(row.to_dict(packed=self._table is not None))
        self._check_untouched()
        try:
            if not self._begun:
                self._begin()
            self._torn = True
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except BrokenPipeError:  # nothing is told to a reader that has left
            raise
        except OSError as error:
            raise self._no_room(error) from error
        self._size += len(line)
        self._torn = False

    def __enter__(self) -> Output:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        try:
            if self._regular and (self._begun or error is None):
                self._check_untouched()
                self._end(error)
        except OSError as failed:
            raise self._no_room(failed) from failed
        finally:
            self._close()

    # Before the first row: nothing is touched

    def _open(self) -> int:
        if os.path.isdir(self.path):
            raise IsADirectoryError(EISDIR, os.strerror(EISDIR))
        if self._regular:  # its record will lie beside it
            longest = max(len(os.fsencode(path.name)) for path in (self._record, self._lines))
            length = longest + provenance.LONGER
            if (more := length - os.pathconf(self.path.parent, "PC_NAME_MAX")) > 0:
                raise OSError(ENAMETOOLONG, f"its name is too long, take {more} bytes off it")
            if not os.access(self.path.parent, os.W_OK):
                raise PermissionError(EACCES, "its folder is closed to us")
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        try:
            file = os.open(self._lines, flags | os.O_EXCL, 0o666)
        except FileExistsError:
            return os.open(self._lines, flags, 0o666)
        self._created = True
        return file

    def _claim(self) -> None:
        """Two jobs must not write to one file; where a file system has no locks, they may."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._taken() from None
        except OSError:
            return
        if not self._in_place():  # whoever had it ended, and took its empty file away
            raise self._taken()

    def _look(self) -> None:
        """What is there, and whether it is a job's."""
        self._size = _size(self._lines)
        made = self._read_record()
        if self._table and _size(self.path):
            self._finished = not self._size
            described = self._table.made(self.path, self.kind)
            if self._finished:
                made = described
            elif self._resuming and described != made:
                raise OutputError(
                    f"{self.path}: was not made by the job that left {self._lines}; "
                    "move one of them away, or replace both (--overwrite)"
                )
        if self._size and not self._begins_with_row(made is not None):
            raise foreign("its content", self._lines)
        if not self._resuming:  # it is to be replaced
            self._finished = False
        elif self._size or self._finished:
            if made is None:
                where = "its metadata" if self._finished else self._record
                raise OutputError(
                    f"{self.path}: how its rows were made should stand in {where} and does not; "
                    "replace it (--overwrite), or name another file"
                )
            self._kept = self._whole_bytes()
            self.resumed = self._kept > 0 or self._finished
            self._made = made if self.resumed else {}

    def _read_record(self) -> dict[str, Any] | None:
        try:
            text = self._record.read_bytes()
        except FileNotFoundError:
            return None
        if (record := provenance.decode(text, self.kind.verb)) is None:
            raise OutputError(
                f"{self._record}: is no record of a job that was `{self.kind.verb}`; "
                "delete it, or name another output"
            )
        return record

    def _begins_with_row(self, recorded: bool) -> bool:
        """Whether the first line is a row, or a part of one: without a record, one that says so."""
        with open(self._lines, "rb") as lines:
            line = lines.readline(GROUP)
        if line.endswith(b"\n"):
            return _kept(line, self.kind) is not None
        return _is_torn(line) if recorded else line.startswith(_ROW_BEGINS)

    def _whole_bytes(self) -> int:
        """Bytes of the lines but for a torn last row."""
        block = b""
        with open(self._lines, "rb") as lines:
            end = self._size
            while end and b"\n" not in block:
                end = max(0, end - io.DEFAULT_BUFFER_SIZE)
                lines.seek(end)
                block = lines.read(io.DEFAULT_BUFFER_SIZE)
            whole = end + block.rfind(b"\n") + 1
            lines.seek(whole)
            if not _is_torn(lines.read(len(_ROW_BEGINS))):
                raise foreign("its end", self._lines)
        return whole

    # The rows that are kept, each as what resuming needs and as its line

    def _whole(self) -> Iterator[tuple[Kept, bytes]]:
        with open(self._lines, "rb") if self._kept else io.BytesIO() as lines:
            end = 0
            for number, line in enumerate(lines, 1):
                if (row := _kept(line, self.kind)) is None:
                    raise foreign(f"line {number}", self._lines)
                yield row, line
                end += len(line)
                if end == self._kept:  # what follows was written since
                    return

    def _restored(self, wanted: bool = True) -> Iterator[tuple[Kept, bytes]]:
        assert self._table
        for row in self._table.records(self.path, self.kind, wanted):
            yield Kept(row["path"], row.get("error")), _line(row)

    # The first row, and what comes after

    def _begin(self) -> None:
        """Make the lines what the first new row follows; their record is there before they are."""
        if self._regular:
            if self._table and self._existing == "overwrite":
                self._check_table()
            os.ftruncate(self._file, self._kept)
            if self._table and self._existing == "overwrite":
                self.path.unlink(missing_ok=True)  # before its record is another one's
            if not self._kept:
                provenance.store(self._made, self._record, self.kind.verb)
            if self._finished:
                self._rewrite(self._restored())
            elif self._existing == "retry":
                self._rewrite(self._whole())
            self._size = os.fstat(self._file).st_size
        self._begun = True

    def _rewrite(self, rows: Iterable[tuple[Kept, bytes]]) -> None:
        """`rows`, but for errors to retry, in place of the lines only when they are complete."""
        with contextlib.ExitStack() as stack:
            with provenance.replacing(self._lines) as new:
                os.fchmod(new.fileno(), stat.S_IMODE(os.fstat(self._file).st_mode))
                for kept, line in rows:
                    if self._existing != "retry" or kept.error is None:
                        new.write(line)
                file = os.open(new.name, os.O_WRONLY | os.O_APPEND)
                stack.callback(os.close, file)
                with contextlib.suppress(OSError):  # no locks, as in `_claim`
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.dup2(file, self._file, inheritable=False)

    def _check_untouched(self) -> None:
        """Raises OutputError where somebody else changed the lines."""
        if not self._regular:
            return
        if not self._in_place():
            raise OutputError(
                f"{self._lines}: was moved, deleted or replaced while the job wrote to it; "
                "put it back and go on with --resume, or begin anew"
            )
        size = os.fstat(self._file).st_size
        if size < self._size or (size > self._size and not self._torn):
            raise OutputError(
                f"{self._lines}: holds {size} bytes where the job left {self._size}: something "
                "else changed it; look at it, then go on with --resume or begin anew"
            )

    def _in_place(self) -> bool:
        """Whether the file that is written to is still the one of that name."""
        there = _stat(self._lines)
        return there is not None and os.path.samestat(there, os.fstat(self._file))

    def _check_table(self) -> None:
        """Raises OutputError where somebody else made or changed the table."""
        if _identity(self.path) not in (None, self._before):
            raise OutputError(
                f"{self.path}: was put there or changed while the job ran; "
                "move it away, then go on with --resume"
            )

    def _end(self, error: BaseException | None) -> None:
        if self._begun or self._resuming:
            size = self._size if self._begun else self._kept
            os.ftruncate(self._file, size)  # a row may be torn
            if self._table and size and not isinstance(error, OutputError):
                self._render(self._table)
            recorded = size > 0
            if not size or (self._table and error is None):
                self._lines.unlink()
                beside = self._table is not None and self._table.beside
                recorded = beside and (size > 0 or self._finished)
            if not recorded:
                self._record.unlink(missing_ok=True)
            elif not self._record.exists():  # somebody else deleted it
                provenance.store(self._made, self._record, self.kind.verb)
            for path in {*self._files, self._record}:
                provenance.sweep(path)

    def _close(self) -> None:
        """Leave the folder as it was, where there was nothing and nothing was written."""
        try:
            if self._created and not self._begun and self._in_place() and not _size(self._lines):
                self._lines.unlink()
        finally:
            os.close(self._file)

    def _render(self, table: Format) -> None:
        """The table of all rows, in place of the last one only when it is complete."""
        with open(self._lines, "rb") as lines, provenance.replacing(self.path) as new:
            try:
                table.render(lines, new, self.path, self.kind, self._made)
            except (TypeError, ValueError):  # a line that looks like a row
                raise foreign("its content", self._lines) from None
            self._check_table()

    # Refusals

    def _taken(self) -> OutputError:
        return OutputError(f"{self.path}: another job is writing to it; wait for it")

    def _no_room(self, error: OSError) -> OutputError:
        cause = error.strerror or str(error)
        if self._regular:
            cause += f"; the rows so far are in {self._lines}, make room and go on with --resume"
        return OutputError(f"{self.path}: cannot be written: {cause}")


_ROW_BEGINS = b'{"path": "'


def _is_torn(piece: bytes) -> bool:
    """Whether a job may have left it at the end: a part of a row, or a power failure's zeros."""
    begins = piece[: len(_ROW_BEGINS)]
    return _ROW_BEGINS.startswith(begins) or not begins.strip(b"\0")


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"


def _kept(line: bytes, kind: Kind) -> Kept | None:
    """The row that a line is, None if it is none."""
    try:
        found = json.loads(line)
        path, error, value = found["path"], found.get("error"), found.get(kind.key)
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    answered = isinstance(value, kind.values) if error is None else isinstance(error, str)
    return Kept(path, error) if isinstance(path, str) and answered else None


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _is_stream(path: Path) -> bool:
    """Whether it is a device or a pipe, or a name of a file that this process has open."""
    if str(path).startswith(("/dev/fd/", "/dev/std", "/proc/")):
        return True
    there = _stat(path)
    return there is not None and not (stat.S_ISREG(there.st_mode) or stat.S_ISDIR(there.st_mode))


def _identity(path: Path) -> tuple[int, ...] | None:
    """What changes with a file and what is in it; None where there is none."""
    there = _stat(path)
    return there and (there.st_dev, there.st_ino, there.st_size, there.st_mtime_ns)


def _size(path: Path) -> int:
    """Bytes of a regular file; 0 for anything else and for nothing."""
    there = _stat(path)
    return there.st_size if there is not None and stat.S_ISREG(there.st_mode) else 0


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


# Resuming


def pair(sources: Iterable[Listed], kept: Iterable[Kept]) -> Iterator[tuple[Listed, Kept | None]]:
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
    sources: Iterable[Listed], kept: Iterable[Kept]
) -> Iterator[tuple[Listed, Kept | None]]:
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
