"""Files of rows that are nothing without their end: Parquet, NumPy and safetensors.

Each is made in one piece from the JSON lines of a job, in flat memory, and can be made lines again.
Parquet has everything in it. The two others hold the float32 numbers alone, [N, ...], NaN where a
row is an error; which row is whose, and its error, is told by `FILE.paths.jsonl` beside them.
"""

from __future__ import annotations

import io
import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ...errors import Error
from . import provenance
from .kinds import PREDICTIONS, ImageRow, Kind, pack, unpack

GROUP = 8 << 20  # bytes of JSON lines that become one row group: flat memory, some 20,000 rows
_METADATA = b"alexnet_triton"  # where a Parquet file tells how its rows were made


class OutputError(Error):
    """Rows that cannot be kept: one line that names the file, the cause and the cure."""


def foreign(what: str, path: Path) -> OutputError:
    """The refusal of a file that is somebody else's."""
    return OutputError(f"{path}: {what} was not written by a job; delete it, or name another file")


@dataclass(frozen=True, slots=True)
class Format:
    """A format: what it needs, how rows become a file, and how that file tells of them.

    `check` raises OutputError where a library is missing. `render` writes a file of JSON lines as
    a table. `made` gives how the rows of a table were made, None if it does not say; `records`
    gives them as dictionaries, without their values where they are not `wanted`. These two raise
    OutputError for what no job wrote. `beside` says whether other files belong to it.
    """

    check: Callable[[], object]
    render: Callable[[BinaryIO, BinaryIO, Path, Kind, provenance.Record], None]
    made: Callable[[Path, Kind], dict[str, Any] | None]
    records: Callable[[Path, Kind, bool], Iterator[dict[str, Any]]]
    beside: bool = False


# Parquet


def schema(kind: Kind = PREDICTIONS) -> Any:
    """The pyarrow.Schema of Parquet output: of `error` and the result one is always null.

    path: string; error: string; and predictions: list<struct<index: int32, label: string,
    score: float>>, features: list<float>, or distance: float. Raises OutputError where pyarrow is
    missing.
    """
    pa = _pyarrow()
    return pa.schema([("path", pa.string()), ("error", pa.string()), (kind.key, kind.arrow(pa))])


def to_table(rows: Iterable[ImageRow], kind: Kind = PREDICTIONS) -> Any:
    """`rows` as a pyarrow.Table of `schema(kind)`."""
    found = [
        {"path": row.path, kind.key: row.result.ravel()}
        if kind.packed and row.error is None
        else row.to_dict()
        for row in rows
    ]
    return _pyarrow().Table.from_pylist(found, schema(kind))


def values(column: Any, kind: Kind) -> list[Any]:
    """What is in a column of results: of numbers without end arrays, where lists took ten times."""
    if not kind.packed:
        return column.to_pylist()  # type: ignore[no-any-return]
    return [item.values.to_numpy() if item.is_valid else None for item in column]


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


def _parquet_render(
    lines: BinaryIO, new: BinaryIO, _: Path, kind: Kind, made: provenance.Record
) -> None:
    pa = _pyarrow()
    final = schema(kind)
    stored = final.set(2, pa.field(kind.key, pa.string())) if kind.packed else final
    parse = pa.json.ParseOptions(explicit_schema=stored, unexpected_field_behavior="ignore")
    about = {_METADATA: provenance.encode(made, kind.verb)} | kind.about()
    with pa.parquet.ParquetWriter(new, final.with_metadata(about)) as writer:
        while group := b"".join(lines.readlines(GROUP)):
            read = pa.json.ReadOptions(use_threads=False, block_size=len(group))
            table = pa.json.read_json(io.BytesIO(group), read, parse)
            if kind.packed:
                packed = table.column(2).to_pylist()
                values = [None if value is None else unpack(value) for value in packed]
                table = table.set_column(2, final.field(2), pa.array(values, final.field(2).type))
            writer.write_table(table)


def _parquet_file(path: Path, kind: Kind) -> Any:
    pa = _pyarrow()
    try:
        file = pa.parquet.ParquetFile(path)
    except PermissionError as error:
        raise OutputError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, OSError):  # names that are no text, too
        raise foreign("its content", path) from None
    if not file.schema_arrow.equals(schema(kind)):
        file.close()
        raise foreign("its schema", path)
    return file


def _parquet_made(path: Path, kind: Kind) -> dict[str, Any] | None:
    with _parquet_file(path, kind) as file:
        metadata = file.schema_arrow.metadata or {}
    return provenance.decode(metadata.get(_METADATA, b""), kind.verb)


def _parquet_records(path: Path, kind: Kind, wanted: bool) -> Iterator[dict[str, Any]]:
    columns = None if wanted else ["path", "error"]
    size = 16 if kind.packed and wanted else 1024
    try:
        with _parquet_file(path, kind) as file:
            for batch in file.iter_batches(batch_size=size, columns=columns):
                found = values(batch.column(2), kind) if wanted else [None] * len(batch)
                for row, value in zip(batch.select([0, 1]).to_pylist(), found, strict=True):
                    if value is not None:
                        row[kind.key] = pack(value) if kind.packed else value
                    yield {name: of for name, of in row.items() if of is not None}
    except (_pyarrow().ArrowInvalid, OSError):
        raise foreign("its content", path) from None


# Arrays


def paths_of(path: Path) -> Path:
    """The file that tells whose the rows of an array are: JSON lines of `path` and `error`."""
    return path.with_name(path.name + ".paths.jsonl")


def _array_render(
    lines: BinaryIO, new: BinaryIO, path: Path, kind: Kind, made: provenance.Record
) -> None:
    count = sum(1 for _ in lines)
    lines.seek(0)
    shape = (count, *json.loads(kind.about()["shape"]))
    lost = np.full(shape[1:], np.nan, "<f4").tobytes()
    if path.suffix.lower() == ".npy":
        header: Any = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(new, header)
    else:
        new.write(_safetensors_header(shape, kind))
    with provenance.replacing(paths_of(path)) as names:
        for line in lines:
            row = json.loads(line)
            value = row.pop(kind.key, None)
            new.write(lost if value is None else unpack(value).reshape(shape[1:]).tobytes())
            names.write(json.dumps(row).encode() + b"\n")


def _safetensors_header(shape: tuple[int, ...], kind: Kind) -> bytes:
    """As the format's page has it; its library writes only what is in memory as a whole."""
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * math.prod(shape)]}
    text = json.dumps({"__metadata__": kind.about(), kind.key: entry}).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _array(path: Path, kind: Kind) -> Any:
    """The numbers where they lie on disk, [N, ...]."""
    try:
        if path.suffix.lower() == ".npy":
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            with open(path, "rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                shape = tuple(json.loads(file.read(min(length, GROUP)))[kind.key]["shape"])
            array = np.memmap(path, "<f4", "r", 8 + length, shape)
        sound = array.dtype == "<f4" and array.ndim > 1
    except PermissionError as error:
        raise OutputError(f"{path}: cannot be read: {error.strerror}") from error
    except Exception:  # what damaged headers raise is not one family
        raise foreign("its content", path) from None
    if not sound:
        raise foreign("its shape", path)
    return array


def _array_made(path: Path, kind: Kind) -> dict[str, Any] | None:
    _array(path, kind)
    record = path.with_name(path.name + provenance.BESIDE)
    try:
        return provenance.decode(record.read_bytes(), kind.verb)
    except FileNotFoundError:  # there is no other sign of whose such numbers are
        raise foreign(f"its content, with no {record.name} beside it,", path) from None


def _array_records(path: Path, kind: Kind, wanted: bool) -> Iterator[dict[str, Any]]:
    array, count = _array(path, kind), 0
    try:
        with open(paths_of(path), "rb") as lines:
            for count, line in enumerate(lines, 1):
                row = json.loads(line)
                if not (isinstance(row["path"], str) and isinstance(row.get("error", ""), str)):
                    raise TypeError
                if wanted and "error" not in row:
                    row[kind.key] = pack(array[count - 1])
                yield row
    except (OSError, ValueError, LookupError, TypeError):
        count = -1
    if count != len(array):
        raise foreign("its content", paths_of(path))


_ARRAY = Format(lambda: None, _array_render, _array_made, _array_records, beside=True)
TABLES = {
    ".parquet": Format(_pyarrow, _parquet_render, _parquet_made, _parquet_records),
    ".npy": _ARRAY,
    ".safetensors": _ARRAY,
}
"""The formats by the suffixes of their names."""
