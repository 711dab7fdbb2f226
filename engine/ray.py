"""Many machines: classification on Ray Data, the same rows as from any other job.

    dataset = ray.data.read_parquet("photos.parquet")  # a column path, and bytes if they are there
    alexnet_triton.engine.ray.classify(dataset, workers=8).write_parquet("labels")

Tasks on the CPUs read and decode; their pixels go to actors, an engine each, on a GPU each where
there are GPUs. How much is under way at once is decided by Ray, so memory stays bounded however
many images there are. The weights are read here, once, and travel to the engines; paths are opened
where the tasks run. Ray itself is imported when it is first needed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import weights as weight_sources
from .images import ImageError, Source, Views, expand, load
from .plan import NUMBERS
from .rows import Row, row
from .run import Backend, Engine, EngineError, Prediction, find, load_state
from .spec import Network, Preprocess

if TYPE_CHECKING:
    import ray.data

LISTED = 1 << 20  # inputs that are listed in memory at a time, some 100 MB; then engines start anew
DECODED = 32  # images of one call that decodes: what a task holds in memory at most

_ADDED = ("error", "predictions", "pixels")


def classify(
    dataset: ray.data.Dataset,
    *,
    model: str | Path | Network = "alexnet",
    weights: weight_sources.Source | None = None,
    dtype: str | None = None,
    backend: Backend = "triton",
    top: int = 5,
    batch_size: int = 256,
    workers: int = 1,
    num_gpus: float | None = None,
    views: Views = "center",
) -> ray.data.Dataset:
    """A row for every image of a dataset, lazily: nothing runs until the rows are consumed.

    The dataset has a column `path` (string, or binary for file names that are not Unicode) of
    files and URLs that every machine of the cluster can read; or besides it a column `bytes` of
    encoded images, and `path` only names them. The rows have the columns of `rows.schema()`, then
    all others of the dataset but `bytes`, in any order. An image that cannot be read is a row with
    its error.

    workers: engines at once, each on `num_gpus` GPUs: None is one where the cluster has GPUs, else
    none, and then each computes on one core. model, weights, dtype, backend, top, views: as for
    `Engine.load` and `Engine.classify`; batch_size: images of one batch.

    Raises EngineError for columns that do not fit and for Ray missing, NetworkError and
    WeightsError as `Engine.load` does.
    """
    ray = _ray()
    _check(dataset)
    for name, value, legal in (
        ("dtype", dtype, (None, *NUMBERS)),
        ("backend", backend, ("triton", "torch")),
        ("views", views, ("center", "ten-crop")),
    ):
        if value not in legal:
            raise EngineError(
                f"{name}: wanted one of {', '.join(filter(None, legal))}, got {value!r}"
            )
    for name, count in (("top", top), ("batch_size", batch_size), ("workers", workers)):
        if count < 1:
            raise EngineError(f"{name}: wanted 1 or more, got {count}")
    network, published = find(model)
    state = ray.put(load_state(network, published if weights is None else weights))
    has = ray.cluster_resources()
    if num_gpus is None:
        num_gpus = min(1.0, has.get("GPU", 0.0))
    engine = {
        "network": network,
        "device": "cuda" if num_gpus else "cpu",
        "dtype": dtype,
        "backend": backend,
        "max_batch": batch_size,
    }
    return (
        dataset.repartition(target_num_rows_per_block=batch_size)
        .map_batches(
            _decode,
            batch_format="pyarrow",
            batch_size=min(DECODED, batch_size),
            fn_kwargs={"preprocess": network.preprocess, "views": views},
        )
        .map_batches(
            _Classifier,
            batch_format="pyarrow",
            batch_size=batch_size,
            fn_constructor_kwargs={"engine": engine, "state": state, "top": top, "views": views},
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_gpus=num_gpus,
            # Half of the cores stay free to decode: engines that held all would wait forever.
            num_cpus=0 if num_gpus else min(1.0, has.get("CPU", 2.0) / (2 * workers)),
        )
    )


def run(
    sources: Iterable[Source | ImageError],
    *,
    address: str | None = None,
    **options: Any,
) -> Iterator[Row]:
    """A row for every source, in any order, as `jobs.classify` yields them but for that.

    address: of a running cluster's head, HOST:PORT or "auto"; None starts Ray on this machine
    alone for as long as the rows are read, or uses the one that this process is connected to.
    options: as for `classify`.

    Raises EngineError for a cluster that cannot be reached or a worker that failed, and as
    `classify` does, all in one line.
    """
    with _cluster(address):
        remaining = iter(sources)
        while listed := list(islice(remaining, LISTED)):
            yield from _run(listed, options)


def paths(words: Iterable[str]) -> Iterator[Source | ImageError]:
    """`images.expand`, and the column `path` of every word that ends in .parquet.

    Raises EngineError for a Parquet file that cannot be read or has no such column.
    """
    for word in words:
        if word.lower().endswith(".parquet"):
            yield from _parquet(word)
        else:
            yield from expand([word])


def _run(listed: list[Source | ImageError], options: dict[str, Any]) -> Iterator[Row]:
    ray = _ray()
    import pyarrow as pa

    images = {i: s for i, s in enumerate(listed) if isinstance(s, Source)}
    for source in listed:
        if isinstance(source, ImageError):
            yield row(source, source)
    if not images:
        return
    table = pa.table(
        {
            "path": pa.array([os.fsencode(s.location) for s in images.values()], pa.binary()),
            "source": pa.array(images, pa.int64()),
        }
    )
    try:
        rows = classify(ray.data.from_arrow(table), **options)
        rows.context.enable_progress_bars = False
        for block in rows.iter_batches(batch_size=None, batch_format="pyarrow"):
            for record in block.to_pylist():
                yield _row(images[record["source"]], record)
    except ray.exceptions.RayError as error:
        raise EngineError(f"a Ray worker failed: {_last_line(error)}") from error


def _row(source: Source, record: dict[str, Any]) -> Row:
    if record["error"] is not None:
        return row(source, ImageError(record["path"], record["error"]))
    return row(source, [Prediction(**found) for found in record["predictions"]])


# What runs in tasks and actors


def _decode(table: Any, preprocess: Preprocess, views: Views) -> Any:
    """The images of a table read: `pixels`, uint8 as bytes, or null with `error` in its place."""
    import pyarrow as pa

    crop = preprocess.crop
    size = 3 * crop * crop * (10 if views == "ten-crop" else 1)
    names = [_name(path) for path in table["path"].to_pylist()]
    encoded = table["bytes"].to_pylist() if "bytes" in table.column_names else names
    pixels: list[bytes | None] = []
    errors: list[str | None] = []
    for item, name in zip(encoded, names, strict=True):
        try:
            pixels.append(load(item, preprocess, name, views).contiguous().numpy().tobytes())
            errors.append(None)
        except ImageError as error:
            pixels.append(None)
            errors.append(error.reason)
    if "bytes" in table.column_names:
        table = table.drop_columns(["bytes"])
    table = table.append_column("error", pa.array(errors, pa.string()))
    return table.append_column("pixels", pa.array(pixels, pa.binary(size)))


class _Classifier:
    """An actor's engine: tables of pixels in, tables of rows out."""

    def __init__(self, engine: dict[str, Any], state: Any, top: int, views: Views) -> None:
        self.engine = Engine.load(weights=_ray().get(state), **engine)
        self.top = top
        self.views = views

    def __call__(self, table: Any) -> Any:
        raise NotImplementedError


def _name(path: object) -> str:
    return os.fsdecode(path) if isinstance(path, bytes | str) else str(path)
