"""Many machines, here one: Ray gives the rows that any other job gives, also after a kill."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from alexnet_triton.engine import Engine, EngineError, NetworkError
from alexnet_triton.engine.__main__ import main
from alexnet_triton.engine.jobs import ray as on_ray
from alexnet_triton.engine.jobs import reaper
from alexnet_triton.engine.jobs.classify import answer, classify
from alexnet_triton.engine.jobs.kinds import Features, ImageRow
from alexnet_triton.engine.jobs.listing import listing
from alexnet_triton.engine.jobs.tables import schema
from alexnet_triton.engine.zoo import network
from PIL import Image

ray = pytest.importorskip("ray", reason="needs Ray: pip install -e '.[ray]'")
pytest.importorskip("ray.data", reason="needs Ray Data: pip install -e '.[ray]'")

Capture = pytest.CaptureFixture[str]

CORES = "RAY_OVERRIDE_RESOURCES"  # for each of Ray's cores a process imports torch
IMAGES = 400
DIGITS: dict[str, Any] = {"model": "digits", "backend": "torch"}

BAD = ("empty", "text", "truncated", "vanished", "pipe", "bomb", "sliver")


def spoil(path: Path, kind: str) -> None:
    """Make an image one that is none."""
    good = path.read_bytes()
    path.unlink()
    match kind:
        case "empty":
            path.touch()
        case "text":
            path.write_text("a thousand words")
        case "truncated":
            path.write_bytes(good[: len(good) // 2])
        case "vanished":
            path.symlink_to("nowhere")
        case "pipe":
            os.mkfifo(path)
        case "bomb":
            path.write_bytes(b"P6 60000 50000 255\n")
        case "sliver":
            Image.new("L", (1, 60000)).save(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small images, one in ten of them bad, and one with a name that is no Unicode."""
    root = tmp_path_factory.mktemp("photos")
    numbers = np.random.default_rng(0)
    for index in range(IMAGES):
        path = root / f"{index:03}.png"
        Image.fromarray(numbers.integers(0, 256, (20, 24, 3), np.uint8)).save(path)
        if index % 10 == 3:
            spoil(path, BAD[index // 10 % len(BAD)])
    (root / "000.png").rename(root / os.fsdecode(b"caf\xe9.png"))
    return root


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[ImageRow]:
    """The rows of a job without Ray."""
    return list(classify(Engine.load("digits", backend="torch"), listing([str(folder)])))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Ray started for this process, of which nothing is left in the end."""
    mark = str(tmp_path_factory.mktemp("cluster"))
    with ExitStack() as end:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("A_JOB_OF_THIS_TEST", mark)
            patch.setenv(CORES, '{"CPU": 2}')
            try:
                end.enter_context(on_ray._cluster(None))
            except EngineError as error:
                pytest.skip(f"Ray cannot start on this machine: {error}")
        yield ray.get_runtime_context().gcs_address
    nothing_but([], mark)


def answers(rows: Iterable[dict[str, Any]]) -> list[Any]:
    """Rows without what may differ: their order, and the last bits that a batch's size decides."""
    return sorted(
        (
            row["path"],
            row.get("error"),
            [(p["index"], p["label"], round(p["score"], 5)) for p in row.get("predictions") or ()],
        )
        for row in rows
    )


def by_path(rows: Iterable[ImageRow]) -> list[ImageRow]:
    return sorted(rows, key=lambda row: (row.path, row.named))


def dicts(rows: Iterable[ImageRow]) -> list[dict[str, Any]]:
    return [row.to_dict() for row in rows]


# The same rows


def test_features_of_relative_paths_listed_a_few_at_a_time(
    cluster: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(on_ray, "LISTED", 6)
    words = ["00*.png", "003.png", "none"]
    engine = Engine.load("digits", backend="torch")
    kind = Features("features.12").fitted(network("digits"))
    plain = by_path(answer(engine, listing(words, gone=True), kind))
    found = by_path(on_ray.run(listing(words, gone=True), None, kind, **DIGITS))
    assert [row.path for row in found if row.named] == words[1:], "only these were named"
    for ours, made in zip(found, plain, strict=True):
        assert (ours.path, ours.error, ours.named) == (made.path, made.error, made.named)
        if made.error is None:
            assert np.allclose(ours.result, made.result.ravel(), atol=1e-5)
    dataset = ray.data.from_items([{"path": row.path} for row in plain])
    with pytest.raises(NetworkError, match=r"ask for 'features\.1'"):
        on_ray.features(dataset, layer="features.0", **DIGITS)


# A dataset that somebody has


def test_a_dataset_of_bytes_keeps_its_other_columns_also_of_ten_views(
    cluster: str, folder: Path
) -> None:
    paths = [str(path) for path in sorted(folder.glob("00[124-8].png"))]
    data = [b"no image" if i % 3 else Path(path).read_bytes() for i, path in enumerate(paths)]
    items = [{"path": path, "bytes": data[i], "id": i} for i, path in enumerate(paths)]
    how: dict[str, Any] = {"top": 2, "views": "ten-crop", "num_gpus": 0, "batch_size": 2}
    found = on_ray.classify(ray.data.from_items(items), **DIGITS, **how).materialize()
    # Were they one, the engines would decode, one image after another.
    assert "MapBatches(_decode)->MapBatches(_Engine)" not in found.stats()
    table = found.to_arrow_refs()
    rows = sorted((r for ref in table for r in ray.get(ref).to_pylist()), key=lambda r: r["id"])
    assert [row["path"] for row in rows] == paths
    assert [row["error"] is None for row in rows] == [i % 3 == 0 for i in range(7)]
    plain = classify(
        Engine.load("digits", backend="torch"), listing(paths[::3]), top=2, views="ten-crop"
    )
    assert answers(rows[::3]) == answers(dicts(plain))
    assert ray.get(table[0]).schema.names == [*schema().names, "id"]
    assert ray.get(table[0]).select(schema().names).schema.equals(schema())


def test_the_example(
    cluster: str, tmp_path: Path, expected: list[ImageRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    # Else Ray starts 32 processes that look into one file.
    monkeypatch.setenv("RAY_DATA_PARQUET_FOOTER_NUM_ACTORS", "1")
    wanted = {row.path: row for row in expected[:9]}
    table = pa.table({"path": list(wanted), "shelf": list(range(9))})
    pa.parquet.write_table(table, tmp_path / "photos.parquet")
    example = Path(__file__).parents[1] / "examples" / "ray_data.py"
    arguments = [str(tmp_path / "photos.parquet"), str(tmp_path / "labels")]
    run = runpy.run_path(str(example))["main"]
    run([*arguments, "--model", "digits", "--backend", "torch"])
    rows = pyarrow.parquet.read_table(tmp_path / "labels").to_pylist()
    assert sorted(row["shelf"] for row in rows) == list(range(9))
    for row in rows:
        plain = wanted[row["path"]].to_dict()
        assert row["error"] == plain.get("error")
        assert row["label"] == plain.get("predictions", [{"label": None}])[0]["label"]
    assert {row["label"] is None for row in rows} == {True, False}, "one of them is bad"


def test_a_dataset_without_rows(cluster: str) -> None:
    assert on_ray.classify(ray.data.from_items([]), **DIGITS).take_all() == []


def test_workers_run_this_code_with_a_thread_each(cluster: str) -> None:
    def look() -> tuple[str, str | None]:
        import alexnet_triton

        return alexnet_triton.__file__, os.environ.get("OMP_NUM_THREADS")

    import alexnet_triton

    assert ray.get(ray.remote(look).remote()) == (alexnet_triton.__file__, "1")


# Kills


def environments(pids: Iterable[int]) -> dict[int, bytes]:
    """What they were born with, less what is gone or somebody else's; a zombie's is empty."""
    found = {}
    for pid in pids:
        with suppress(OSError):
            found[pid] = Path("/proc", str(pid), "environ").read_bytes()
    return found


def running(mark: str) -> dict[int, str]:
    """What runs with this value in its environment: numbers and names."""
    there = processes()
    born = environments(there)
    return {pid: there[pid][1] for pid in born if os.fsencode(mark) in born[pid]}


AGENTS = ("ray::DashboardA", "ray::RuntimeEnv")  # a name has 15 characters


def processes() -> dict[int, tuple[int, str]]:
    """What runs, zombies left out: numbers, their parents' numbers, and names."""
    found = {}
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError):
            start, _, rest = Path("/proc", pid, "stat").read_text().rpartition(") ")
            state, parent, *_ = rest.split()
            if state not in "ZX":
                found[int(pid)] = (int(parent), start.partition("(")[2])
    return found


def titled(ancestor: int) -> dict[int, str]:
    """What Ray has given a title of those that descend from a process: numbers and names."""
    there = processes()
    family = {ancestor}
    while more := {pid for pid, (parent, _) in there.items() if parent in family} - family:
        family |= more
    return {pid: there[pid][1] for pid in family if there[pid][1].startswith("ray::")}


def signal_all(pids: Iterable[int], what: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, what)


def nothing_but(pids: Iterable[int], mark: str) -> None:
    """Wait until no more than these run, for as long as a busy machine may need; then end them."""
    end = time.monotonic() + 60
    try:
        while not running(mark).keys() <= set(pids):
            assert time.monotonic() < end, running(mark)
            time.sleep(0.05)
        assert running(mark).keys() == set(pids)
    finally:
        signal_all(running(mark), signal.SIGKILL)


def test_killed_and_resumed_it_has_the_rows_of_a_job_without_ray(
    cluster: str, folder: Path, expected: list[ImageRow], tmp_path: Path, capsys: Capture
) -> None:
    """Killed on a Ray of its own, of which nothing is left, not even what hangs.

    Ray's workers look themselves whether they are still wanted, so here they hang; so do its
    agents, once they have their titles, which must not lie over what they are found by.
    """
    import pyarrow.parquet

    output = tmp_path / "rows.parquet"
    partial = tmp_path / "rows.parquet.partial.jsonl"
    arguments = ["classify", "--model", "digits", "--backend", "torch", str(folder)]
    arguments += ["--output", str(output), "--ray"]
    command = [sys.executable, "-m", "alexnet_triton.engine", *arguments, "--batch-size", "4"]
    marked = os.environ | {"A_JOB_OF_THIS_TEST": str(tmp_path), CORES: '{"CPU": 1}'}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=marked) as job:
        while job.poll() is None and not (partial.exists() and partial.stat().st_size):
            time.sleep(0.01)
        workers = titled(job.pid)
        signal_all(workers, signal.SIGSTOP)
        end = time.monotonic() + 60
        while not {*AGENTS} <= {*titled(job.pid).values()} and time.monotonic() < end:
            time.sleep(0.01)
        signal_all(titled(job.pid), signal.SIGSTOP)
        born = [*environments(titled(job.pid)).values()]
        job.kill()
    assert job.returncode == -signal.SIGKILL, "it was through before it was killed"
    assert workers
    assert not [each for each in born if b"\0\0" in each], "a title lies over the mark"
    done = len(partial.read_bytes().splitlines())
    assert 0 < done < IMAGES
    nothing_but([], str(tmp_path))

    assert main([*arguments, "--resume", "--workers", "2", "--batch-size", "32"]) == 0
    assert capsys.readouterr().out == f"{output}: {IMAGES} rows\n"
    rows = pyarrow.parquet.read_table(output).to_pylist()
    assert answers(rows) == answers(dicts(expected))
    assert sum(row.error is not None for row in expected) == IMAGES // 10
    assert len({row.error for row in expected}) == 1 + len(BAD)
    assert not partial.exists()


def test_a_cluster_that_was_there_outlives_a_killed_job(cluster: str, tmp_path: Path) -> None:
    """And nothing imports Ray before it is needed."""
    code = """
import sys
from alexnet_triton.engine import __main__, ray
assert not {"ray", "pyarrow", "pandas"} & sys.modules.keys()
with ray._cluster(sys.argv[1]):
    print("connected", flush=True)
    input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code, cluster],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"A_JOB_OF_THIS_TEST": str(tmp_path)},
    ) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == b"connected\n"
        assert [*running(str(tmp_path))] == [job.pid], "it starts nothing"
        job.kill()
    assert ray.get(ray.remote(lambda: 1).remote()) == 1


def test_a_reaper_kills_what_has_its_mark_alone(tmp_path: Path) -> None:
    code = """
import os, subprocess, sys
for mark in ("one", "one more", "another"):
    print(subprocess.Popen(["sleep", "1000"], env=os.environ | {"MARK": mark}).pid)
print(subprocess.Popen([sys.executable, *sys.argv[1:], str(os.getpid()), "MARK=one"]).pid)
sys.stdout.flush()
input()
"""
    path = reaper.__file__
    with subprocess.Popen(
        [sys.executable, "-c", code, "-I", "-S", path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"A_JOB_OF_THIS_TEST": str(tmp_path)},
    ) as parent:
        assert parent.stdout is not None
        _, *others, _ = (int(parent.stdout.readline()) for _ in range(4))
        assert len(running(str(tmp_path))) == 5
        parent.kill()
    nothing_but(others, str(tmp_path))


# Refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ray", "nonsense"], "wanted HOST:PORT of a cluster's head, or 'auto'"),
        (["--ray", "//[::1"], "wanted HOST:PORT of a cluster's head, or 'auto'"),
        (["--ray", "localhost:port"], "wanted HOST:PORT of a cluster's head, or 'auto'"),
        (["--ray", "127.0.0.1:1"], "Ray at 127.0.0.1:1: cannot be reached: Connection refused"),
        (["--ray", "--device", "cuda:1"], "wanted 'cpu' or 'cuda', Ray chooses which GPU"),
        (["--ray", "--weights", "nowhere.pth"], "nowhere.pth"),
        (["--ray", "--output", "/no/such/folder/rows.parquet"], "/no/such/folder"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(
    capsys: Capture, arguments: list[str], message: str
) -> None:
    status = main(["classify", ".", "--model", "digits", *arguments])
    out, err = capsys.readouterr()
    assert (status, out) == (1, "")
    assert len(err.splitlines()) == 1, err
    assert err.startswith("alexnet-triton: error: ")
    assert message in err


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"url": "x", "id": 1}, {}, "wanted a column 'path', .* got url, id"),
        ({"path": "x", "bytes": "x"}, {}, "wanted binary in its column 'bytes', got string"),
        ({"path": "x", "error": "x"}, {}, "wanted no column error"),
        ({"path": "x"}, {"dtype": "fp99"}, "dtype: wanted one of fp32, .*, got 'fp99'"),
        ({"path": "x"}, {"views": "all"}, "views: wanted one of center, ten-crop, got 'all'"),
        ({"path": "x"}, {"workers": 0}, "workers: wanted 1 or more, got 0"),
        ({"path": "x"}, {"backend": "triton", "dtype": "bf16", "num_gpus": 0}, "bf16 on a CPU"),
    ],
)
def test_a_dataset_or_option_that_cannot_be_is_refused(
    cluster: str, row: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        on_ray.classify(ray.data.from_items([row]), **(DIGITS | options))


def test_more_workers_than_gpus_are_refused(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0, "GPU": 2.0})
    with pytest.raises(EngineError, match="workers: wanted at most 2, one a GPU, got 3"):
        on_ray.classify(ray.data.from_items([{"path": "x"}]), **DIGITS, workers=3)


def test_a_worker_that_fails_is_told_in_one_line(cluster: str, folder: Path) -> None:
    digits = network("digits")
    broken = replace(digits, preprocess=replace(digits.preprocess, resize=0))
    with pytest.raises(EngineError, match=r"^a Ray worker failed: ValueError: .*> 0") as refused:
        list(on_ray.run(listing([str(folder / "001.png")]), model=broken, backend="torch"))
    assert "\n" not in str(refused.value)


def test_without_ray_one_line_names_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(EngineError, match=r"pip install -e '\.\[ray\]'"):
        list(on_ray.run([], **DIGITS))
