"""The verb `validate`: how often the first guess, and the first five, are right.

Images stream as in any job (`classify.py`), and only counts are kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.progress import track

from ...errors import printable, shortened
from ..images import Listed, Views
from ..load import EngineError
from ..run import Engine
from ..table import Columns, columns
from .classify import classify
from .labels import labelled, meanings

BEST = 5  # guesses, of which one is to be right
ROUNDED = 0.0005  # percent that the table rounds by: what it shows may be expected
SHOWN = 10  # classes in the table, the worst; all are in the JSON


@dataclass(frozen=True, slots=True)
class Score:
    """How the images of one class fared; `right` by the first guess, `among` the first five."""

    index: int
    label: str
    images: int
    right: int
    among: int

    @property
    def top1(self) -> float:
        """How much of the images got the right first guess."""
        return self.right / self.images

    @property
    def top5(self) -> float:
        """How much of the images got it among the first five guesses."""
        return self.among / self.images

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        return asdict(self) | {"top1": self.top1, "top5": self.top5}


@dataclass(frozen=True, slots=True)
class Validation:
    """A score for every class that images were read of, in the classes' order, and what was not.

    `top1` and `top5` are means over images, not over classes; `errors` counts the images that could
    not be read, which are in no score.
    """

    network: str
    dtype: str
    backend: str
    device: str
    views: str
    classes: tuple[Score, ...]
    errors: int

    @property
    def total(self) -> Score | None:
        """All classes together; None if no image could be read."""
        counts = [(score.images, score.right, score.among) for score in self.classes]
        return Score(-1, "all", *map(sum, zip(*counts, strict=True))) if counts else None

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints: `top1` and `top5` are fractions of `images`."""
        total = self.total.to_dict() if self.total else dict.fromkeys(("top1", "top5"))
        whole = {name: total.get(name, 0) for name in ("images", "top1", "top5")}
        return asdict(self) | whole | {"classes": [score.to_dict() for score in self.classes]}

    def __str__(self) -> str:
        worst = sorted(self.classes, key=lambda score: score.top1)[:SHOWN]
        rows = [*worst, *([self.total] if self.total else [])]
        lines = [
            f"{self.network}, {self.dtype}, {self.backend} on {self.device}, {self.views} view",
            *columns(rows, _COLUMNS),
        ]
        if len(worst) < len(self.classes):
            lines.insert(-1, f"and {len(self.classes) - len(worst):,} better ones, in --json")
        if self.errors:
            lines.append(f"left out: {self.errors:,} that could not be read")
        return "\n".join(lines)


_COLUMNS: Columns[Score] = [
    ("worst classes", -32, lambda score: printable(score.label)[:32]),
    ("images", 8, lambda score: f"{score.images:,}"),
    ("top-1", 10, lambda score: f"{score.top1:.3%}"),
    ("top-5", 10, lambda score: f"{score.top5:.3%}"),
]


def validate(
    engine: Engine,
    folder: str,
    labels: str | None = None,
    *,
    batch_size: int = 256,
    views: Views = "center",
    exif: bool = False,
    workers: int = 0,
) -> Validation:
    """Score the images of `folder`, labelled by its folders or by rows of `labels`.

    What an image or a label may be is said in `labels.py`; the rest is as for `classify`. An image
    that cannot be read is told on standard error, where a bar shows how far the run is.

    Raises EngineError for what cannot be, before the first image is read.
    """
    words: dict[str, str] = {}
    count = 0
    for _, word, where in labelled(folder, labels):
        words.setdefault(word, where)
        count += 1
    meaning = meanings(words, engine.class_names)
    due: deque[int] = deque()  # the classes of images on their way

    def sources() -> Iterator[Listed]:
        for source, word, where in labelled(folder, labels):
            if word not in meaning:
                raise EngineError(f"{where}: {word!r} was not there when the run began")
            due.append(meaning[word])
            yield source

    counts = [[0, 0, 0] for _ in engine.class_names]
    errors = 0
    console, quiet = Console(stderr=True), not sys.stderr.isatty()
    with closing(classify(engine, sources(), batch_size, BEST, views, workers, exif)) as rows:
        for row in track(rows, "validating", count, console=console, transient=True, disable=quiet):
            truth = due.popleft()
            if row.error is not None:
                errors += 1
                print(f"{printable(row.path)}: {shortened(row.error)}", file=sys.stderr)
                continue
            guesses = [guess.index for guess in row.result]
            for place, true in enumerate((True, truth == guesses[0], truth in guesses)):
                counts[truth][place] += true
    return Validation(
        network=engine.network.name,
        dtype=engine.dtype,
        backend=engine.backend,
        device=str(engine.device),
        views=views,
        classes=tuple(
            Score(index, name, *counted)
            for index, (name, counted) in enumerate(zip(engine.class_names, counts, strict=True))
            if counted[0]
        ),
        errors=errors,
    )


def run_validate(options: argparse.Namespace) -> int:
    """Exit 1 if no image could be read, and where so much is expected, if one could not or fewer
    first guesses are right.
    """
    given = vars(options)
    next(labelled(options.folder, options.labels), None)  # refused before weights are fetched
    engine = Engine.load(
        options.model,
        max_batch=options.batch_size,
        **{n: given[n] for n in ("weights", "device", "dtype", "backend", "classes", "target")},
    )
    how = {name: given[name] for name in ("batch_size", "views", "exif", "workers")}
    seen = validate(engine, options.folder, options.labels, **how)
    print(json.dumps(seen.to_dict(), indent=2) if options.json else seen)
    if options.expect is None or seen.total is None:
        return 0 if seen.total else 1
    missed = []
    if 100 * seen.total.top1 < options.expect - ROUNDED:
        missed.append(f"top-1 is {seen.total.top1:.3%}, expected were {options.expect:g}%")
    if seen.errors:
        missed.append(f"{seen.errors:,} could not be read")
    if missed:
        print(f"alexnet-triton: {'; '.join(missed)}", file=sys.stderr)
    return 1 if missed else 0
