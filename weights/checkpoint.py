"""The two formats of torch.save, read into tensors without running or trusting anything in them.

Since 2020 it is a zip archive: a pickle, and one record for each storage. Every record is read
once, and its CRC-32 is checked as it is read, which torch.load does not do. Before, it was five
pickles in a row and then the storages; that format has no checksums.
"""

from __future__ import annotations

import os
from io import BufferedReader, BytesIO
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import torch

from .pickled import STORED, unpickled

MAX_DIRECTORY = 4 << 20  # bytes of an archive's directory; a record takes about a hundred
_CHUNK = 1 << 20
_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001  # how the format before 2020 begins


def read(path: Path) -> Any:
    """What torch.save wrote to `path`, its tensors on the CPU.

    Raises UnpicklingError for what no checkpoint of tensors holds (see `pickled`), BadZipFile for
    a damaged archive, and nearly anything, as other parsers do, for broken bytes.
    """
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\3\4"
        file.seek(0)
        return _zipped(file) if zipped else _in_a_row(file)


def _zipped(file: BufferedReader) -> Any:
    records = _records(file)
    if records.get("byteorder", b"little") != b"little":
        raise UnpicklingError("its numbers are not little-endian")

    dtypes: dict[str, torch.dtype] = {}

    def storage(identity: Any) -> torch.Tensor:
        dtype, key, numel, _ = _identified(identity)
        record = records[f"data/{key}"]
        if dtypes.setdefault(key, dtype) != dtype:
            raise ValueError(f"its storage {key} has two dtypes")
        if len(record) != numel * dtype.itemsize:
            raise ValueError(f"its storage {key} has another size than its pickle says")
        return torch.frombuffer(record, dtype=dtype) if record else torch.empty(0, dtype=dtype)

    return unpickled(BytesIO(records["data.pkl"]), storage)


def _records(file: BufferedReader) -> dict[str, bytearray]:
    """The records of an archive by name, without the folder that all of them are in."""
    size = os.stat(file.fileno()).st_size
    file.seek(max(size - 98, 0))
    end = file.read()  # of the directory: in 64 bits, where the 64 bits are, and in 32 bits
    if end[76:80] != b"PK\5\6" or end[96:] != b"\0\0":
        raise BadZipFile("the file does not end where its directory does")
    wide = int.from_bytes(end[40:48], "little") if end[56:60] == b"PK\6\7" else 0
    if max(wide, int.from_bytes(end[88:92], "little")) > MAX_DIRECTORY:
        raise UnpicklingError(f"its directory has more than {MAX_DIRECTORY} bytes")
    records: dict[str, bytearray] = {}
    with ZipFile(file) as archive:
        listed = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        if "constants.pkl" in listed:
            raise UnpicklingError("it is a TorchScript archive, which holds a program")
        if len(listed) != len(archive.infolist()):
            raise BadZipFile("two of its records have one name")
        if sum(info.file_size for info in listed.values()) > size:
            raise BadZipFile("its records are larger than the file")
        for name, info in listed.items():
            if info.compress_type != ZIP_STORED or info.compress_size != info.file_size:
                raise BadZipFile(f"its record {name} is compressed")
            records[name] = record = bytearray(info.file_size)
            with archive.open(info) as stored, memoryview(record) as view:
                for start in range(0, len(record), _CHUNK):  # the last one checks the CRC-32
                    view[start : start + _CHUNK] = stored.read(_CHUNK)
    return records


def _in_a_row(file: BufferedReader) -> Any:
    """The format before 2020: magic number, version, system, object, keys; then the storages."""
    room = os.stat(file.fileno()).st_size
    storages: dict[str, torch.Tensor] = {}

    def none(identity: Any) -> torch.Tensor:
        raise UnpicklingError("its pickle has a storage where there can be none")

    def storage(identity: Any) -> torch.Tensor:
        nonlocal room
        dtype, key, numel, cut = _identified(identity)
        if key not in storages:
            room -= numel * dtype.itemsize
            if room < 0:
                raise ValueError("its storages are larger than the file")
            storages[key] = torch.empty(numel, dtype=dtype)  # filled below
        if (storages[key].dtype, len(storages[key])) != (dtype, numel):
            raise ValueError(f"its storage {key} has two dtypes or sizes")
        match cut:
            case None:
                return storages[key]
            case (str(), int(offset), int(length)) if 0 <= offset <= offset + length <= numel:
                return storages[key][offset : offset + length]
        raise UnpicklingError("its pickle cuts a storage in no way of torch.save")

    if unpickled(file, none) != _MAGIC or unpickled(file, none) != _VERSION:
        raise UnpicklingError("it is no pickle of torch.save")
    if not unpickled(file, none)["little_endian"]:
        raise UnpicklingError("its numbers are not little-endian")
    content = unpickled(file, storage)
    keys = unpickled(file, none)
    if not all(isinstance(key, str) for key in keys) or sorted(keys) != sorted(storages):
        raise ValueError("its storages are others than its pickle says")
    for key in keys:
        values = storages[key].view(torch.uint8)
        numel = int.from_bytes(file.read(8), "little")
        if numel != len(storages[key]) or file.readinto(values.numpy().data) != len(values):
            raise ValueError(f"its storage {key} has another size than its pickle says")
    if file.read(1):
        raise ValueError("it goes on after its last storage")
    return content


def _identified(identity: Any) -> tuple[torch.dtype, str, int, Any]:
    """dtype, key, length and, in the format before 2020, the cut of the storage that is meant."""
    if isinstance(identity, tuple) and len(identity) == 5:
        identity = (*identity, None)
    match identity:
        case ("storage", torch.dtype() as dtype, str(key), str(place), int(numel), cut) if (
            dtype in STORED and place != "meta" and numel >= 0
        ):
            return dtype, key, numel, cut
    raise UnpicklingError("its pickle names a storage in no way of torch.save")
