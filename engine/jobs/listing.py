"""From the words of a command line to the images they stand for: `images.expand`, and Parquet."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from typing import Any

from ..images import ImageError, Listed, Source, expand, is_url
from ..load import EngineError


def listing(words: Iterable[str], *, gone: bool = False) -> Iterator[Listed]:
    """What `expand` yields, and for a word that ends in .parquet the paths and URLs in it.

    Such a file, or folder of files as Ray and Spark write them, has them in its column `path`, of
    strings; those that are not absolute start from the working directory. They are found there,
    not named, and come in the file's order. Words are taken as `plain`.

    Raises EngineError at once for a Parquet file that is not one or lacks that column, and for a
    word that is nothing at all, unless it may be `gone`, as when a job is resumed.
    """
    words = list(words)
    for word in words:
        there = is_url(word) or os.path.lexists(word) or any(glob.iglob(word, recursive=True))
        if not (gone or there):
            raise EngineError(
                f"{word}: wanted an image file, a folder, a URL or a pattern that matches, and "
                "there is no such thing here; check its spelling"
            )
    words = [plain(word) for word in words]
    tables = {
        word: _opened(word)
        for word in words
        if is_table(word) and not (gone and not os.path.lexists(word))
    }
    return (
        source
        for word in words
        for source in (_paths(word, tables[word]) if word in tables else expand([word]))
    )


def plain(word: str) -> str:
    """A word without the slashes at its end, which shells like to add to folders; URLs stay."""
    return word if is_url(word) else word.rstrip("/") or word[:1]


def is_table(word: str) -> bool:
    """Whether a plain word is Parquet, a file or a folder of files."""
    return word.lower().endswith(".parquet")


def _opened(word: str) -> Any:
    try:
        import pyarrow.dataset
    except ImportError:
        raise EngineError(
            f"{word}: Parquet needs pyarrow, which is not installed; "
            "`pip install -e '.[parquet]'`, or name files and folders"
        ) from None
    try:
        table = pyarrow.dataset.dataset(word, format="parquet")
    except (OSError, ValueError) as error:  # pyarrow's own errors are of these, too
        cause = " ".join(str(error).split())
        raise EngineError(f"{word}: cannot be read as Parquet: {cause}") from error
    types = dict(zip(table.schema.names, table.schema.types, strict=True))
    if "path" not in types:
        raise EngineError(f"{word}: wanted a column 'path', got {', '.join(types) or 'none'}")
    if types["path"] not in (pyarrow.string(), pyarrow.large_string()):
        raise EngineError(f"{word}: wanted strings in its column 'path', got {types['path']}")
    return table


def _paths(word: str, table: Any) -> Iterator[Listed]:
    scan = table.to_batches(columns=["path"], batch_readahead=1, fragment_readahead=1)
    paths = (path for batch in scan for path in batch.column(0).to_pylist())
    for index, path in enumerate(paths):
        if path is None:
            yield ImageError(word, f"row {index} has no path")
        else:
            yield Source(path, named=False)
