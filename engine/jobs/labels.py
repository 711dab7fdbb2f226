"""What class each image is said to be of: the folder that it lies in, or a row of a CSV file."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from ..images import Listed, Source, expand, is_url
from ..load import EngineError

Labelled = tuple[Listed, str, str]  # an image, the word for its class, and where that word stands


def labelled(folder: str, labels: str | None = None) -> Iterator[Labelled]:
    """Each image of `folder` with the word for its class, lazily.

    Without `labels` each folder in it is a class, whose word is its name, and holds images at any
    depth; images beside these folders have no class and are left out, as torchvision's ImageFolder
    does. `labels` is a CSV file in UTF-8 of rows `path,label`, with or without these words above
    them; paths start from `folder`, and may be URLs.

    Raises EngineError for a folder or file that is not there or holds none of this.
    """
    if not os.path.isdir(folder):
        raise EngineError(f"{folder}: wanted a folder, and there is none here; check its spelling")
    return _by_folder(folder) if labels is None else _by_row(folder, labels)


def meanings(words: Mapping[str, str], names: Sequence[str]) -> dict[str, int]:
    """Which class each word means, by its index among `names`; `words` says where each stands.

    A word is the name of a class, or its number. If no word is either and there are as many as
    classes, they are the classes in sorted order, which is the rule of torchvision's ImageFolder.

    Raises EngineError for a word that means no class, or that might mean two.
    """
    times, numbers = Counter(names), [str(index) for index in range(len(names))]

    def find(word: str) -> int | None:
        if word in times:
            return names.index(word) if times[word] == 1 else None
        number = int(word) if word.isascii() and word.isdigit() and len(word) < 10 else len(names)
        return number if number < len(names) else None

    known = {word: index for word in words if (index := find(word)) is not None}
    in_order = {word: index for index, word in enumerate(sorted(words))}
    if not known and len(words) == len(names):
        return in_order
    for word, where in words.items():
        if word not in known:
            others = f"among {len(words)} words"
            beside = f"beside {next(iter(known))!r}, which is one" if known else others
            raise EngineError(
                f"{where}: wanted the name of one class, its number below {len(names)}, or "
                f"{len(names)} words that are neither: the classes in sorted order; got {word!r} "
                f"{beside}; --classes FILE names the classes in order"
            )
    if len(words) == len(names) and list(names) == numbers and known != in_order:
        word = next(word for word in words if known[word] != in_order[word])
        raise EngineError(
            f"{words[word]}: {word!r} may be number {known[word]}, or number {in_order[word]} in "
            "sorted order, as torchvision's ImageFolder counts; write numbers of one length, "
            f"{known[word]:0{len(numbers[-1])}}, or name the classes in order with --classes FILE"
        )
    return known


def _by_folder(folder: str) -> Iterator[Labelled]:
    paths = {name: os.path.join(folder, name) for name in sorted(os.listdir(folder))}
    paths = {n: path for n, path in paths.items() if n[0] != "." and os.path.isdir(path)}
    if not paths:
        raise EngineError(
            f"{folder}: wanted a folder of each class in it, got none; --labels FILE labels images "
            "wherever they lie, by rows of path,label"
        )
    for name, path in paths.items():
        for source in expand([path]):
            yield source, name, path


def _by_row(folder: str, labels: str) -> Iterator[Labelled]:
    if not os.path.isfile(labels):
        raise EngineError(f"{labels}: wanted a CSV file of rows path,label, and there is none here")
    empty = True
    with open(labels, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        rows = csv.reader(file, skipinitialspace=True)
        try:
            for number, row in enumerate(rows):
                where = f"{labels}, line {rows.line_num}"
                row = [word.strip() for word in row]
                if not row or (number == 0 and [word.lower() for word in row] == ["path", "label"]):
                    continue
                if len(row) != 2 or not all(row):
                    raise EngineError(f"{where}: wanted path,label, got {','.join(row)!r}")
                path, word = row
                empty = False
                path = path if is_url(path) else os.path.join(folder, path)
                yield Source(path, named=False), word, where
        except csv.Error as error:
            where = f"{labels}, line {rows.line_num}"
            raise EngineError(f"{where}: cannot be read as CSV: {error}") from None
    if empty:
        raise EngineError(f"{labels}: wanted rows path,label, got none")
