"""Many machines: inference on Ray Data, the same rows as from any other job.

    dataset = ray.data.read_parquet("photos.parquet")  # a column path, and bytes if they are there
    alexnet_triton.engine.ray.classify(dataset, workers=8).write_parquet("labels")

Tasks on the CPUs read and decode; their pixels go to actors, an engine each, on a GPU each where
there are GPUs. How much is under way at once is decided by Ray, so memory stays bounded however
many images there are. The weights are read here, once, and travel to the engines. Ray itself is
imported when it is first needed.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from ... import weights as weight_sources
from ..images import ImageError, Listed, Pixels, Source, Views, batched, is_url, load
from ..load import (
    Backend,
    Classes,
    EngineError,
    at_least_one,
    dtype_name,
    find,
    load_state,
    named,
    one_of,
    read_classes,
    resolve,
)
from ..run import Engine
from ..spec import Network, Preprocess
from . import reaper
from .classify import answered, worker_item, worker_preset
from .kinds import PREDICTIONS, Features, ImageRow, Kind, Predictions, row, valid_text
from .tables import to_table, values

if TYPE_CHECKING:
    from ray.data import Dataset

LISTED = 1 << 20  # sources of one dataset, some 600 MB of paths; the next one starts new engines
DECODED = 32  # images of one call that decodes: what a task holds at most
_MARK = "ALEXNET_TRITON_CLUSTER"  # in the environment of every process of a Ray started here
_KEEP = "SPT_NOENV"  # with it in there, no new title of a process is written over its environment


def classify(
    dataset: Dataset,
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
    exif: bool = False,
    classes: Classes | None = None,
) -> Dataset:
    """A row for every image of a dataset, lazily: nothing runs until rows are asked for.

    `features` gives the activations of a layer in the same way.

    dataset: with a column `path` of files and URLs (string, or binary for file names that are no
    Unicode), which are opened on whatever machine a task runs; or besides it with a column `bytes`
    of encoded images, and then `path` only names them. The rows have the columns of
    `tables.schema()`, then all others of the dataset but `bytes`, in Ray's order. An image that
    cannot be read is a row with its error.

    workers: engines at once, on `num_gpus` GPUs each. None is one where the cluster has GPUs now,
    else none: then an engine is on a core. batch_size: images of one batch. The others are as for
    `Engine.load` and `Engine.classify`.

    Raises EngineError for a dataset without these columns, for more workers than GPUs, and without
    Ray; NetworkError and WeightsError as `Engine.load` does. That a picture has an orientation in
    its EXIF and lies otherwise is not told: warnings of Ray's workers stay there.
    """
    one_of("views", views, ("center", "ten-crop"))
    kind = Predictions(at_least_one("top", top), views)
    how: dict[str, Any] = {"model": model, "weights": weights, "dtype": dtype, "exif": exif}
    how |= {"backend": backend, "batch_size": batch_size, "workers": workers, "num_gpus": num_gpus}
    return answer(dataset, kind, classes=classes, **how)


def features(dataset: Dataset, *, layer: str = "fc7", **how: Any) -> Dataset:
    """A row with one layer's activations for every image of a dataset, lazily.

    layer: after its ReLU, by its own name or torchvision's; (C, H, W) comes as one list. `how` and
    the rest are as for `classify`, without top, views and classes. Raises NetworkError for no such
    layer, too.
    """
    return answer(dataset, Features(layer), **how)


def answer(
    dataset: Dataset,
    kind: Kind,
    *,
    model: str | Path | Network = "alexnet",
    weights: weight_sources.Source | None = None,
    dtype: str | None = None,
    backend: Backend = "triton",
    batch_size: int = 256,
    workers: int = 1,
    num_gpus: float | None = None,
    exif: bool = False,
    classes: Classes | None = None,
) -> Dataset:
    """A row of this kind for every image of a dataset, as `classify` says."""
    ray = _ray()
    dtype = dtype and dtype_name(dtype)
    one_of("backend", backend, ("triton", "torch"))
    for name, count in (("batch_size", batch_size), ("workers", workers)):
        at_least_one(name, count)
    _check_columns(dataset, kind)
    classes = read_classes(classes)  # here, not where the engines are
    network, published = find(model)
    network, state = load_state(network, published if weights is None else weights)
    named(network, classes)
    kind = kind.fitted(network)
    num_gpus = _gpus(workers) if num_gpus is None else num_gpus
    if not num_gpus:  # what actors refuse comes under a traceback each; here it is one line
        Engine.load(network, state, "cpu", dtype, backend, batch_size, classes=classes)
    engine = {
        "network": network,
        "device": "cuda" if num_gpus else "cpu",
        "dtype": dtype,
        "backend": backend,
        "max_batch": batch_size,
        "classes": classes,
    }
    preprocess = worker_preset(network.preprocess, kind.views)
    # Small blocks, for there must be more of them than engines.
    blocks: Any = dataset.repartition(target_num_rows_per_block=batch_size)
    pixels = blocks.map_batches(
        _decode,
        batch_format="pyarrow",
        batch_size=min(DECODED, batch_size),
        fn_args=(preprocess, exif, Image.MAX_IMAGE_PIXELS),
    )
    rows: Dataset = pixels.map_batches(
        _Engine,
        batch_format="pyarrow",
        batch_size=batch_size,
        fn_constructor_args=(engine, ray.put(state), preprocess.crop, kind),
        compute=ray.data.ActorPoolStrategy(size=workers),
        # Cores are for decoding: engines that held them all would wait for pixels forever. And Ray
        # lets the actors decode, one image after another, where they ask for what tasks ask for.
        num_cpus=0,
        num_gpus=num_gpus,
    )
    return rows


def run(
    sources: Iterable[Listed],
    address: str | None = None,
    kind: Kind = PREDICTIONS,
    *,
    model: str | Path | Network = "alexnet",
    weights: weight_sources.Source | None = None,
    device: str | None = None,
    **options: Any,
) -> Generator[ImageRow]:
    """A row for each of `sources` (what `listing` yields) as it is done, in any order.

    address: HOST:PORT of a running cluster's head, or "auto"; None is the cluster that this
    process is connected to, else Ray on this machine alone for as long as rows are asked for: no
    dashboard, no usage reports. Relative paths start from the working directory of this process,
    and every machine of the cluster must have them. device: of every engine, "cpu" or "cuda"; None
    is a GPU where the cluster has GPUs. The others are as for `answer`.

    A worker that dies costs nothing, Ray does its work again; but without end where a file kills
    whatever decodes it. A job without Ray makes that file a row with its error.

    Raises, in one line, EngineError for a cluster that cannot be reached or a worker that failed,
    and whatever `answer` raises.
    """
    _ray()
    network, published = find(model)
    network, state = load_state(network, published if weights is None else weights)
    num_gpus = _wanted_gpus(device, address)
    with _cluster(address), _quiet():
        for listed in batched(sources, LISTED):
            images = dict(enumerate(source for source in listed if isinstance(source, Source)))
            bad = (source for source in listed if isinstance(source, ImageError))
            yield from (row(source, source, kind) for source in bad)
            if images:
                options |= {"model": network, "weights": state, "num_gpus": num_gpus}
                yield from _run(images, kind, **options)


def _run(images: dict[int, Source], kind: Kind, **options: Any) -> Iterator[ImageRow]:
    ray = _ray()
    rows: Any = answer(ray.data.from_arrow(_table(images)), kind, **options)
    rows.context.enable_progress_bars = False
    try:
        for block in rows.iter_batches(batch_size=None, batch_format="pyarrow"):
            told = (block[name].to_pylist() for name in ("source", "path", "error"))
            for number, path, error, value in zip(
                *told, values(block[kind.key], kind), strict=True
            ):
                result = kind.result(value) if error is None else ImageError(path, error)
                yield row(images[number], result, kind)
    except ray.exceptions.RayError as error:
        raise EngineError(f"a Ray worker failed: {_cause(error)}") from error


def _table(images: dict[int, Source]) -> Any:
    """Where each source is, as bytes: not every file name is Unicode, which Arrow's strings are."""
    import pyarrow as pa

    places = (source.location for source in images.values())
    paths = [os.fsencode(p if is_url(p) else os.path.join(os.getcwd(), p)) for p in places]
    return pa.table({"path": pa.array(paths, pa.binary()), "source": pa.array(images, pa.int64())})


# What tasks and actors do


def _decode(table: Any, preprocess: Preprocess, exif: bool, pixel_limit: int | None) -> Any:
    """`table` with its images read: `pixels`, uint8 [3, crop, crop], or null with an `error`."""
    import pyarrow as pa

    Image.MAX_IMAGE_PIXELS = pixel_limit  # the caller may have raised it
    paths = _paths(table)
    encoded = table["bytes"].to_pylist() if "bytes" in table.column_names else paths
    pixels: list[bytes | None] = []
    errors: list[str | None] = []
    for item, path in zip(encoded, paths, strict=True):
        try:
            loaded = load(item, preprocess, str(path), exif=exif)
            pixels.append(loaded.contiguous().numpy().tobytes())
            errors.append(None)
        except ImageError as error:
            pixels.append(None)
            errors.append(valid_text(error.reason))
    kept = table.select([name for name in table.column_names if name != "bytes"])
    size = 3 * preprocess.crop * preprocess.crop
    return kept.append_column("error", pa.array(errors, pa.string())).append_column(
        "pixels", pa.array(pixels, pa.binary(size))
    )


class _Engine:
    """An actor: an engine that makes tables of rows out of tables of pixels."""

    def __init__(self, engine: dict[str, Any], state: Any, crop: int, kind: Kind) -> None:
        self.engine = Engine.load(weights=_ray().get(state), **engine)
        self.crop, self.kind = crop, kind

    def __call__(self, table: Any) -> Any:
        pairs = self._pairs(table)
        rows = to_table(answered(self.engine, pairs, self.engine.max_batch, self.kind), self.kind)
        for name in table.column_names:
            if name not in ("path", "error", "pixels"):
                rows = rows.append_column(name, table[name])
        return rows

    def _pairs(self, table: Any) -> Iterator[tuple[Source, Any]]:
        columns = _paths(table), self._pixels(table), table["error"].to_pylist()
        for path, pixels, error in zip(*columns, strict=True):
            decoded = pixels if error is None else ImageError(str(path), error)
            yield Source(str(path), named=False), worker_item(decoded, self.kind.views)

    def _pixels(self, table: Any) -> Pixels:
        """[N, 3, crop, crop], anything where the column is null, in memory that may be written."""
        column = table["pixels"].combine_chunks()
        pixels = np.frombuffer(column.buffers()[1], np.uint8).reshape(-1, 3, self.crop, self.crop)
        return pixels[column.offset : column.offset + len(column)].copy()


def _paths(table: Any) -> list[Any]:
    paths = table["path"].to_pylist()
    return [os.fsdecode(path) if isinstance(path, bytes) else path for path in paths]


# The cluster


def _ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise EngineError(f"Ray cannot be imported ({error}); `pip install -e '.[ray]'`") from None
    return ray


@contextmanager
def _cluster(address: str | None) -> Iterator[None]:
    """A connection to the cluster at `address`, to the one there is, or to one started for this."""
    ray = _ray()
    if ray.is_initialized() and address is None:
        yield
        return
    with ExitStack() as end:
        if address is None:
            os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # what is started here reports to nobody
            marks = {_MARK: end.enter_context(_reaper()), _KEEP: "1"}
            os.environ.update(marks)
            try:
                _connect("local", include_dashboard=False)
            finally:
                for name in marks:  # what is not Ray's must not have them
                    del os.environ[name]
        else:
            _check_reachable(address)
            _connect(address)
        end.callback(ray.shutdown)
        yield


@contextmanager
def _reaper() -> Iterator[str]:
    """A process that outlives a kill of this one: it then kills what has `_MARK` with this value.

    Ray's daemons die with this process, but workers and agents are the raylet's children. These
    find out for themselves that they are not wanted, some in a minute, and what hangs never does.
    """
    value = secrets.token_hex()
    command = [sys.executable, "-I", "-S", reaper.__file__, str(os.getpid()), f"{_MARK}={value}"]
    nothing = subprocess.DEVNULL
    with subprocess.Popen(
        command, stdin=nothing, stdout=nothing, stderr=nothing, cwd="/", start_new_session=True
    ) as process:
        try:
            yield value
        finally:
            process.kill()


def _connect(address: str, **how: Any) -> None:
    ray = _ray()
    terminated = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **how)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise EngineError(f"Ray at {address}: {' '.join(str(error).split())}") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, terminated or signal.SIG_DFL)  # ray.init takes it


def _check_reachable(address: str) -> None:
    """Ray itself tries for minutes and then ends the process."""
    if address == "auto":
        return
    try:
        place = urlsplit(address if "://" in address else f"//{address}")
        host, port = place.hostname, place.port
    except ValueError:
        host = port = None
    if not host or not port:
        raise EngineError(f"Ray at {address!r}: wanted HOST:PORT of a cluster's head, or 'auto'")
    try:
        socket.create_connection((host, port), timeout=10).close()
    except OSError as error:
        cause = error.strerror or error
        raise EngineError(f"Ray at {address}: cannot be reached: {cause}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Ray Data tells its story to a logger and bars; here whoever takes the rows tells it."""
    log = logging.getLogger("ray.data")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)


def _gpus(workers: int) -> float:
    """The GPUs of one engine in this cluster as it is now."""
    there = float(_ray().cluster_resources().get("GPU", 0))
    if there and workers > there:
        raise EngineError(
            f"workers: wanted at most {there:g}, one a GPU, got {workers}; "
            "num_gpus=0.5 would let two share one"
        )
    return 1.0 if there else 0.0


def _wanted_gpus(device: str | None, address: str | None) -> float | None:
    match device:
        case None:
            return None
        case "cpu":
            return 0.0
        case "cuda":
            if address is None:
                resolve(device)  # Ray would wait for a GPU to come
            return 1.0
    raise EngineError(f"device: wanted 'cpu' or 'cuda', Ray chooses which GPU, got {device!r}")


# Refusals


def _check_columns(dataset: Dataset, kind: Kind) -> None:
    import pyarrow as pa

    schema = dataset.schema()
    if schema is None:  # of a dataset without rows
        return
    types = dict(zip(schema.names, schema.types, strict=True))
    if "path" not in types:
        raise EngineError(
            f"dataset: wanted a column 'path', and 'bytes' if images are in it, got "
            f"{', '.join(types)}; dataset.rename_columns() renames"
        )
    if types.get("bytes", pa.binary()) not in (pa.binary(), pa.large_binary(), object):
        raise EngineError(f"dataset: wanted binary in its column 'bytes', got {types['bytes']}")
    if taken := {"error", kind.key, "pixels"} & types.keys():
        raise EngineError(
            f"dataset: wanted no column {', '.join(sorted(taken))}, which rows get here; "
            "dataset.rename_columns() renames"
        )


def _cause(error: Exception) -> str:
    """What went wrong in a worker: the last error that is no wrapping of Ray's, of all it tells."""
    raised = re.findall(r"^(?!ray\.)[\w.]+(?:Error|Exception): .*$", str(error), re.MULTILINE)
    return raised[-1] if raised else " ".join(str(error).split())
