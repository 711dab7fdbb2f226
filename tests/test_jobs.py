"""Jobs that survive: a row for every input, whatever is in the folder and whatever ends the job."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import pty
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from alexnet_triton.engine import Engine, EngineError
from alexnet_triton.engine.__main__ import main
from alexnet_triton.engine.images import ImageError, Source, expand
from alexnet_triton.engine.jobs import workers
from alexnet_triton.engine.jobs.classify import Tally, classify, remaining
from alexnet_triton.engine.jobs.kinds import PREDICTIONS, path_of, row
from alexnet_triton.engine.jobs.rows import Kept, pair
from alexnet_triton.engine.jobs.workers import CHUNK
from alexnet_triton.engine.run import Prediction
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

Capture = pytest.CaptureFixture[str]

DIGITS = ("--model", "digits", "--backend", "torch")
IMAGES, BAD = 1000, 40

CAUSES = {  # the eight ways in which an image of the big folder is none
    "corrupt": "cannot be decoded: broken data stream",
    "empty": "is empty",
    "giant": "Image size (3000000000 pixels) exceeds limit",
    "loop": "cannot be opened: Too many levels of symbolic links",
    "pipe": "wanted an image file, got a device, pipe or socket",
    "text": "is not in an image format that Pillow reads",
    "truncated": "cannot be decoded: image file is truncated",
    "vanished": "cannot be opened: No such file or directory",
}


# What the jobs work on


def png(seed: int, side: int = 24) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG", compress_level=0)
    return file.getvalue()


def spoil(path: Path, kind: str, good: bytes) -> None:
    """Put at `path` what `CAUSES` calls `kind`."""
    match kind:
        case "corrupt":
            path.write_bytes(good.replace(b"IDATx", b"IDAT?"))
        case "empty":
            path.touch()
        case "giant":
            path.write_bytes(b"P6 60000 50000 255\n")
        case "loop":
            path.symlink_to(path.name)
        case "pipe":
            os.mkfifo(path)
        case "text":
            path.write_text("a thousand words")
        case "truncated":
            path.write_bytes(good[: len(good) // 2])
        case "vanished":
            path.symlink_to("nowhere.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,000 files in two folders; the 40 bad ones lie anywhere and say in their names why."""
    root = tmp_path_factory.mktemp("job") / "photos"
    (root / "more").mkdir(parents=True)
    kinds = [*CAUSES] * (BAD // len(CAUSES)) + [""] * (IMAGES - BAD)
    random.Random(0).shuffle(kinds)
    for number, kind in enumerate(kinds):
        path = root / ("" if number % 3 else "more") / f"{number:04}{kind}.png"
        good = png(number)
        if kind:
            spoil(path, kind, good)
        else:
            path.write_bytes(good)
    return root


@pytest.fixture(scope="module")
def unbroken(folder: Path) -> list[dict[str, Any]]:
    """The rows of a job over `folder` that nothing ends."""
    output = folder.parent / "unbroken.jsonl"
    assert main(["classify", str(folder), *DIGITS, "--output", str(output)]) == 0
    return read(output)


def lines_of(output: Path) -> Path:
    """The file of JSON lines that grows while a job writes."""
    parquet = output.suffix == ".parquet"
    return output.with_name("rows.parquet.partial.jsonl") if parquet else output


def left_by(output: Path) -> list[Path]:
    """What is in the folder of an output whose job is done: JSON lines have their record beside."""
    record = output.with_name(output.name + ".job.json")
    return [output] if output.suffix == ".parquet" else [output, record]


def few(folder: Path, count: int) -> list[str]:
    """`count` good images in `folder`, which is made."""
    folder.mkdir(exist_ok=True)
    for number in range(count):
        (folder / f"{number:03}.png").write_bytes(png(number))
    return [str(path) for path in sorted(folder.iterdir())]


def read(output: Path) -> list[dict[str, Any]]:
    if output.suffix == ".jsonl":
        return [json.loads(line) for line in output.read_bytes().splitlines()]
    parquet = pytest.importorskip("pyarrow.parquet")
    found = parquet.read_table(output).to_pylist()
    return [{name: value for name, value in row.items() if value is not None} for row in found]


def assert_same(rows: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    """The same rows in the same order; scores may differ in the last bits, as batches differ."""
    assert [row["path"] for row in rows] == [row["path"] for row in wanted]
    for got, want in zip(rows, wanted, strict=True):
        assert got.get("error") == want.get("error")
        best, expected = got.get("predictions", ()), want.get("predictions", ())
        assert [p["label"] for p in best] == [p["label"] for p in expected]
        scores = [p["score"] for p in expected]
        assert [p["score"] for p in best] == pytest.approx(scores, abs=1e-5)


def run(capsys: Capture, *arguments: object) -> tuple[int, str, str]:
    status = main(["classify", *map(str, arguments), *DIGITS])
    out, err = capsys.readouterr()
    return status, out, err


SESSION = """
import os, signal, sys
from alexnet_triton.engine.__main__ import main
os.setsid()
# A suite that a shell runs behind a `&` ignores Ctrl-C, and so would its children.
signal.signal(signal.SIGINT, signal.default_int_handler)
for number, name in enumerate(("stdout", "stderr"), 1):  # those of its workers, too
    os.dup2(os.open(f"{told}/{name}", os.O_CREAT | os.O_WRONLY), number)
sys.exit(main(job))
"""


def start(told: Path, *arguments: object) -> BaseProcess:
    """The command in a process and a session of its own, which write into the folder `told`.

    It comes from the server that workers come from: there torch is imported already.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([workers.__name__])
    job = ["classify", *DIGITS, *map(str, arguments)]
    process = context.Process(target=exec, args=(SESSION, {"job": job, "told": told}))
    process.start()
    return process


def wait_for_bytes(path: Path, size: float, alive: Callable[[], bool]) -> None:
    """Until `path` has grown to `size` bytes, or the process that writes it has ended."""
    deadline = time.monotonic() + 600
    while (path.stat().st_size if path.exists() else 0) < size and alive():
        assert time.monotonic() < deadline, f"{path} does not grow"
        time.sleep(0.002)


# A row for every input


def test_a_bad_image_is_a_row_that_names_its_cause(
    folder: Path, unbroken: list[dict[str, Any]]
) -> None:
    assert [row["path"] for row in unbroken] == sorted(str(path) for path in folder.rglob("*.png"))
    assert len(unbroken) == IMAGES
    bad = [row for row in unbroken if "error" in row]
    assert len(bad) == BAD
    seen: Counter[str] = Counter()
    for found in bad:
        kind = Path(found["path"]).stem[4:]
        assert found["error"].startswith(CAUSES[kind])
        assert "predictions" not in found
        seen[kind] += 1
    assert seen == dict.fromkeys(CAUSES, BAD // len(CAUSES))
    assert all(len(row["predictions"]) == 5 for row in unbroken if "error" not in row)


def test_workers_give_the_same_rows(
    folder: Path, unbroken: list[dict[str, Any]], tmp_path: Path, capsys: Capture
) -> None:
    output = tmp_path / "rows.jsonl"
    status, out, err = run(capsys, folder, "--output", output, "--workers", 2)
    assert status == 0
    assert out == f"{output}: {IMAGES} rows\n"
    assert err == f"alexnet-triton: {BAD} of {IMAGES} images had errors\n"
    assert_same(read(output), unbroken)


def test_a_named_bad_file_or_no_good_one_fails_the_job(tmp_path: Path, capsys: Capture) -> None:
    paths = few(tmp_path / "photos", 3)
    spoil(tmp_path / "photos" / "bad.png", "text", b"")
    bad = tmp_path / "photos" / "bad.png"
    output = tmp_path / "rows.jsonl"
    common = ("--output", output, "--overwrite")
    assert run(capsys, tmp_path / "photos", *common)[0] == 0
    assert run(capsys, tmp_path / "photos" / "*.png", *common)[0] == 0
    assert run(capsys, paths[0], bad, *common)[0] == 1
    assert run(capsys, tmp_path / "photos" / "b*.png", *common)[0] == 1
    (tmp_path / "photos" / "notes.txt").touch()
    assert run(capsys, tmp_path / "photos" / "no*", *common)[0] == 1
    assert "pattern matches no image" in read(output)[0]["error"]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load("digits", device="cpu", backend="torch", max_batch=16)


def test_what_happens_to_files_while_the_job_runs(engine: Engine, tmp_path: Path) -> None:
    """A file that goes or becomes a folder after it was listed, or is closed to us, is a row."""
    paths = few(tmp_path / "photos", 6)

    def listed() -> Iterator[Source | ImageError]:
        for source in expand([str(tmp_path / "photos")]):
            path = Path(path_of(source))
            if path.name == "001.png":
                path.unlink()
            if path.name == "002.png":
                path.unlink()
                path.mkdir()
            yield source

    Path(paths[3]).chmod(0)
    (tmp_path / "photos").chmod(0o777)
    with as_nobody(tmp_path):
        rows = list(classify(engine, listed()))
    assert [row.path for row in rows] == paths
    assert [row.error for row in rows] == [
        None,
        "cannot be opened: No such file or directory",
        "wanted an image file, got a folder",
        "cannot be opened: Permission denied",
        None,
        None,
    ]


@contextlib.contextmanager
def as_nobody(folder: Path) -> Iterator[None]:
    """Root may read anything: be somebody else meanwhile, who may enter `folder`."""
    if os.geteuid():
        yield
        return
    closed = [parent for parent in (folder, *folder.parents) if not parent.stat().st_mode & 0o001]
    modes = {parent: parent.stat().st_mode for parent in closed}
    for parent in closed:
        parent.chmod(0o755)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
        for parent, mode in modes.items():
            parent.chmod(mode)


def test_scores_that_are_no_numbers_are_an_error() -> None:
    source = Source("a.png", named=False)
    best = Prediction(3, "three", float("nan"))
    made = row(source, [best, Prediction(1, "one", 0.5)], PREDICTIONS)
    assert made.result is None
    assert made.error is not None
    assert "NaN" in made.error


def test_a_name_that_is_not_unicode_has_a_row_that_resumes(
    tmp_path: Path, output: Path, capsys: Capture
) -> None:
    few(tmp_path / "photos", 1)
    odd = os.fsencode(tmp_path / "photos") + b"/caf\xe9.png"
    Path(os.fsdecode(odd)).write_bytes(png(1))
    assert run(capsys, tmp_path / "photos", "--output", output)[0] == 0
    rows = read(output)
    assert rows[1]["path"].endswith("photos/caf\\udce9.png")
    assert run(capsys, tmp_path / "photos", "--output", output, "--resume")[0] == 0
    assert read(output) == rows
    status, out, _ = run(capsys, tmp_path / "photos")
    assert status == 0
    assert "caf\\udce9.png" in out


def test_json_without_rows_is_an_array(tmp_path: Path, capsys: Capture) -> None:
    paths = few(tmp_path / "photos", 3)
    run(capsys, *paths, "--output", tmp_path / "rows.jsonl")
    _, out, _ = run(capsys, *paths, "--json", "--resume", "--output", tmp_path / "rows.jsonl")
    assert json.loads(out) == [], "the rows of this run: there was nothing left to do"


def test_parquet_has_its_schema_whatever_the_rows_are(tmp_path: Path, capsys: Capture) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    few(tmp_path / "good", 2)
    (tmp_path / "bad").mkdir()
    spoil(tmp_path / "bad" / "a.png", "text", b"")
    prediction = pa.struct([("index", pa.int32()), ("label", pa.string()), ("score", pa.float32())])
    fields = [("path", pa.string()), ("error", pa.string()), ("predictions", pa.list_(prediction))]
    for name in ("good", "bad"):
        run(capsys, tmp_path / name, "--output", tmp_path / f"{name}.parquet")
        table = parquet.read_table(tmp_path / f"{name}.parquet")
        assert table.schema.equals(pa.schema(fields))
        assert table["error"].null_count == (2 if name == "good" else 0)
        assert table["predictions"].null_count == (0 if name == "good" else 1)
        run(capsys, tmp_path / name, "--output", tmp_path / f"{name}.jsonl")
        assert read(tmp_path / f"{name}.parquet") == read(tmp_path / f"{name}.jsonl")


# Workers


class Deadly(Source):
    """A source that kills whichever process unpickles it: a worker that is about to decode it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (9,)


class Counted:
    """Sources, and how many of them somebody has taken."""

    def __init__(self, paths: list[str]) -> None:
        self.paths, self.taken = paths, 0

    def __iter__(self) -> Iterator[Source]:
        for path in self.paths:
            self.taken += 1
            yield Source(path, named=False)


def test_an_image_that_kills_its_worker_is_an_error_row(engine: Engine, tmp_path: Path) -> None:
    paths = few(tmp_path / "photos", 2 * CHUNK)
    sources = [Source(path, named=False) for path in paths]
    sources[3] = Deadly(paths[3], named=False)
    rows = list(classify(engine, sources, workers=1))
    assert [row.path for row in rows] == paths
    assert [row.path for row in rows if row.error] == [paths[3]]
    assert rows[3].error == "a process that decoded it died, twice"


def test_a_worker_that_is_killed_costs_nothing(engine: Engine, tmp_path: Path) -> None:
    """What a worker had in hand is decoded again; the second kill strikes other files."""
    paths = few(tmp_path / "photos", 40 * CHUNK)
    sources = Counted(paths)
    wanted = list(classify(engine, [*sources]))
    sources.taken = again = kills = 0
    rows = []
    for made in classify(engine, sources, batch_size=8, workers=2):
        rows.append(made)
        if len(rows) == again + 1:
            again, kills = sources.taken, kills + 1
            for worker in multiprocessing.active_children():
                worker.kill()
    assert kills >= 2
    assert [(row.path, row.error) for row in rows] == [(path, None) for path in paths]
    assert [r.result[0].label for r in rows] == [r.result[0].label for r in wanted]
    assert not multiprocessing.active_children()


def test_workers_read_no_further_ahead_than_they_should_and_end_with_their_job(
    engine: Engine, tmp_path: Path
) -> None:
    sources = Counted(few(tmp_path / "photos", 40 * CHUNK))
    rows = classify(engine, sources, batch_size=8, workers=2)
    next(rows)
    assert (
        sources.taken <= 2 * 8 + 8 + (2 + 2) * CHUNK
    )  # batches at the engine, ahead, at the workers
    assert multiprocessing.active_children()
    rows.close()
    assert not multiprocessing.active_children()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_workers_cut_ten_views_and_obey_pillows_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine.load("alexnet", "random:0", device="cpu", backend="torch", max_batch=2)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)).save(
        tmp_path / "a.png"
    )
    (tmp_path / "b.png").write_bytes(png(0, side=360))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300 * 400)
    sources = [*expand([str(tmp_path)])]
    here, there = (
        list(classify(engine, sources, views="ten-crop", workers=workers)) for workers in (0, 1)
    )
    assert here == there
    assert here[0].result
    assert here[1].error is not None
    assert "Pillow's limit is 120000" in here[1].error


# What is asked of pictures and of names


def scores(row: dict[str, Any]) -> torch.Tensor:
    """By class: a place in a batch may cost torch's backend a bit."""
    found = sorted(row["predictions"], key=lambda prediction: prediction["index"])
    return torch.tensor([prediction["score"] for prediction in found])


def test_exif_turns_pictures_and_else_one_line_says_that_they_lie(
    tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "photos").mkdir()
    picture = Image.open(io.BytesIO(png(5, side=40))).crop((0, 0, 40, 28))
    for number, orientation in enumerate((6, 8, 3, 1)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        picture.save(tmp_path / "photos" / f"{number}.png", exif=exif)
    args = (tmp_path / "photos", "--json", "--top", 10)
    told = {}
    for flags in ((), ("--exif",), ("--workers", 2), ("--workers", 2, "--exif")):
        status, out, err = run(capsys, *args, *flags)
        assert status == 0
        assert err.count("EXIF") == ("--exif" not in flags), "once, whoever decodes"
        assert len(err.splitlines()) == ("--exif" not in flags)
        told[flags] = json.loads(out)
    plain, turned, *by_workers = (list(map(scores, rows)) for rows in told.values())
    assert all(map(torch.allclose, by_workers[0], plain))
    assert all(map(torch.allclose, by_workers[1], turned))
    upright = plain[3]
    assert all(torch.allclose(row, upright) for row in plain), "they lie alike in their files"
    assert torch.allclose(turned[3], upright)
    assert not any(torch.allclose(row, upright, atol=1e-3) for row in turned[:3])


def test_classes_have_the_names_in_a_file(tmp_path: Path, capsys: Capture) -> None:
    paths, names = few(tmp_path / "photos", 1), tmp_path / "names.txt"
    names.write_text("".join(f"digit {n}\x1b[31m\n" for n in range(10)))
    status, out, _ = run(capsys, *paths, "--json", "--classes", names, "--top", 10)
    assert status == 0
    for best in json.loads(out)[0]["predictions"]:
        assert best["label"] == f"digit {best['index']}\x1b[31m"
    _, out, _ = run(capsys, *paths, "--classes", names)
    assert out.replace("\n", "").isprintable()
    names.write_text("one\ntwo\n")
    status, out, err = run(capsys, *paths, "--classes", names)
    assert (status, out) == (1, "")
    assert "wanted 10 names" in err


def test_names_of_files_reach_a_terminal_printable(tmp_path: Path, capsys: Capture) -> None:
    odd = tmp_path / "photos" / "a\x1b[2J\nb.png"
    odd.parent.mkdir()
    odd.write_bytes(png(1))
    (odd.parent / "bad\r.png").write_bytes(b"")
    status, out, err = run(capsys, odd.parent)
    assert status == 0
    assert all(line.isprintable() for text in (out, err) for line in text.split("\n"))
    assert r"a\x1b[2J\nb.png" in out
    assert r"bad\r.png" in out
    assert json.loads(run(capsys, odd, "--json")[1])[0]["path"] == str(odd)
    output = tmp_path / "o\nut.jsonl"
    assert run(capsys, odd, "--output", output)[1].count("\n") == 1


def test_a_resumed_job_may_name_what_has_gone(tmp_path: Path, capsys: Capture) -> None:
    paths, output = few(tmp_path / "photos", 3), tmp_path / "rows.jsonl"
    job = (*paths, "--output", output)
    assert run(capsys, *job)[0] == 0
    Path(paths[1]).unlink()
    status, _, err = run(capsys, *job, "--overwrite")
    assert status == 1
    assert paths[1] in err
    assert run(capsys, *job, "--resume")[0] == 0
    assert [row["path"] for row in read(output)] == paths


# What ends a job


def test_killed_three_times_and_resumed_it_has_the_same_rows(
    folder: Path,
    unbroken: list[dict[str, Any]],
    output: Path,
    tmp_path: Path,
    capsys: Capture,
) -> None:
    lines = lines_of(output)
    whole = sum(len(json.dumps(row)) + 1 for row in unbroken)
    dice = random.Random(0)
    job = (folder, "--batch-size", 64, "--resume", "--output", output)
    sizes = []
    for part in range(3):
        process = start(tmp_path, *job)
        wait_for_bytes(lines, whole * (part + dice.random()) / 5, process.is_alive)
        time.sleep(dice.random() / 100)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "it was through before it was killed"
        sizes.append(lines.stat().st_size)
        assert lines == output or not output.exists(), "nobody takes a part for the whole"
    assert sizes == sorted(sizes)
    assert 0 < sizes[0] < whole
    status, out, err = run(capsys, folder, "--resume", "--output", output)
    assert status == 0
    assert out == f"{output}: {IMAGES} rows\n"
    assert err == f"alexnet-triton: {BAD} of {IMAGES} images had errors\n"
    assert_same(read(output), unbroken)
    assert sorted(output.parent.iterdir()) == left_by(output)


@pytest.mark.parametrize(
    ("output", "how", "workers"),
    [("parquet", signal.SIGINT, 2), ("jsonl", signal.SIGTERM, 0)],
    indirect=["output"],
)
def test_interrupted_it_leaves_a_valid_output_that_resumes(
    folder: Path,
    unbroken: list[dict[str, Any]],
    output: Path,
    tmp_path: Path,
    capsys: Capture,
    how: signal.Signals,
    workers: int,
) -> None:
    job = (folder, "--output", output, "--batch-size", 16, "--workers", workers)
    process = start(tmp_path, *job)
    assert process.pid
    wait_for_bytes(lines_of(output), 20_000, process.is_alive)
    # A terminal's Ctrl-C reaches the workers, too.
    (os.killpg if how == signal.SIGINT else os.kill)(process.pid, how)
    process.join(600)
    assert process.exitcode == 130
    assert (tmp_path / "stdout").read_text() == ""
    told = f"interrupted; {output} holds the rows so far, go on with --resume"
    assert (tmp_path / "stderr").read_text() == f"alexnet-triton: {told}\n"
    rows = read(output)
    assert 0 < len(rows) < IMAGES
    assert_same(rows, unbroken[: len(rows)])
    assert gone(process.pid), "workers are left"
    assert run(capsys, folder, "--output", output)[0] == 1, "not without --resume"
    assert run(capsys, folder, "--output", output, "--resume")[0] == 0
    assert_same(read(output), unbroken)
    assert sorted(output.parent.iterdir()) == left_by(output)


def gone(session: int) -> bool:
    """Whether every process of the session ends, in as long as a busy machine may need."""
    for _ in range(6000):
        try:
            os.killpg(session, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    return False


def test_workers_do_not_outlive_a_job_that_is_killed(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    process = start(tmp_path, folder, "--output", output, "--batch-size", 16, "--workers", 2)
    assert process.pid
    wait_for_bytes(output, 20_000, process.is_alive)
    process.kill()
    process.join()
    assert gone(process.pid)


# What is there already


def test_parquet_without_pyarrow_names_the_cure(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    status, _, err = run(capsys, "x.png", "--output", tmp_path / "rows.parquet")
    assert status == 1
    assert err.count("\n") == 1
    assert "pip install -e '.[parquet]'" in err


def test_a_finished_job_goes_on_where_the_folder_has_changed(
    tmp_path: Path, output: Path, capsys: Capture
) -> None:
    photos = tmp_path / "photos"
    paths = few(photos, 6)
    spoil(photos / "bad.png", "empty", b"")
    assert run(capsys, photos, "--output", output)[0] == 0
    before = read(output)
    Path(paths[1]).unlink()
    (photos / "0000.png").write_bytes(png(7))
    (photos / "zzz.png").write_bytes(png(8))
    status, out, err = run(capsys, photos, "--resume", "--output", output)
    assert status == 0
    after = read(output)
    assert after[: len(before)] == before, "rows stay, also those of images that are gone"
    assert [Path(row["path"]).name for row in after[len(before) :]] == ["0000.png", "zzz.png"]
    assert out == f"{output}: 8 rows\n"
    assert err == "alexnet-triton: 1 of 8 images had errors\n"


@given(
    st.lists(st.integers(0, 8)),
    st.lists(st.integers(0, 8)),
    st.integers(0, 12),
)
def test_pairing_loses_and_doubles_nothing(before: list[int], now: list[int], same: int) -> None:
    """Whatever was done, in whatever order, each source is done once for each time it comes."""
    kept = [Kept(str(number), None) for number in now[:same] + before]
    sources = [Source(str(number), named=False) for number in now]
    paired = [*pair(sources, kept)]
    assert [source for source, _ in paired] == sources
    assert all(row is None or row.path == path_of(source) for source, row in paired)
    done = Counter(row.path for _, row in paired if row is not None)
    assert done == Counter(map(str, now)) & Counter(row.path for row in kept)


def test_resuming_in_step_is_lazy() -> None:
    """As long as sources and rows agree, neither is read further than the other."""
    read = 0

    def rows() -> Iterator[Kept]:
        nonlocal read
        for number in range(1000):
            read += 1
            yield Kept(str(number), "is empty" if number % 2 else None)

    tally = Tally()
    sources = (Source(str(number), named=number == 1) for number in range(1002))
    todo = remaining(sources, rows(), tally)
    assert path_of(next(todo)) == "1000"
    assert read == 1000
    assert (tally.kept, tally.good, tally.bad, tally.named_bad) == (1000, 500, 500, 1)


# Memory and time


PEAKS = """
import json, sys
from alexnet_triton.engine.__main__ import main
for job in json.loads(sys.argv[1]):
    assert main(job) == 0
    print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""


def test_memory_is_flat(tmp_path: Path) -> None:
    """5,000 images take no more memory than 500: a kilobyte for each would show."""
    images = few(tmp_path / "few", 20)
    counts, jobs = (500, 5000), []
    for count in counts:
        photos = tmp_path / str(count)
        photos.mkdir()
        for number in range(count):
            os.link(images[number % len(images)], photos / f"{number:05}.png")
        output = str(tmp_path / f"{count}.jsonl")
        jobs += [["classify", str(photos), *DIGITS, "--output", output, "--batch-size", "32"]]
    done = subprocess.run(
        [sys.executable, "-c", PEAKS, json.dumps(jobs)],
        # Threads make malloc's peaks random, and so does what it keeps of freed arrays.
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=True,
    )
    for count in counts:
        assert (tmp_path / f"{count}.jsonl").read_bytes().count(b"\n") == count
    before, after = (int(line) for line in done.stdout.splitlines() if line.isdecimal())
    assert after - before < 4000, "kilobytes"


class Small:
    """What `classify` needs of an engine, with memory for `room` images at a time."""

    def __init__(self, engine: Engine, room: int) -> None:
        self.network = engine.network
        self.max_batch = 64
        self._engine = engine
        self._room = room
        self.sizes: list[int] = []

    def stream(self, source: Iterable[Any], batch_size: int, **options: Any) -> Iterator[Any]:
        """As the engine's: the results of a batch come when the next one is under way."""
        waiting: list[Any] = []
        items = iter(source)
        while group := list(islice(items, batch_size)):
            self.sizes.append(len(group))
            if len(group) > self._room:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            waiting.append(self._engine.stream(group, **options))
            if len(waiting) == 2:
                yield from waiting.pop(0)
        for results in waiting:
            yield from results


@pytest.mark.parametrize("workers", [0, 1])
def test_out_of_gpu_memory_the_batch_is_halved(
    engine: Engine, tmp_path: Path, capsys: Capture, workers: int
) -> None:
    paths = few(tmp_path / "photos", 70)
    spoil(tmp_path / "photos" / "040bad.png", "empty", b"")
    small: Any = Small(engine, room=20)
    sources = [*expand([str(tmp_path / "photos")])]
    rows = list(classify(small, iter(sources), workers=workers))
    assert [row.path for row in rows] == [path_of(source) for source in sources]
    assert [row.path for row in rows if row.error is None] == paths
    assert small.sizes[:3] == [64, 32, 16]
    assert set(small.sizes[3:-1]) == {16}
    assert capsys.readouterr().err == "out of GPU memory with batches of 64: halving them\n"


def test_one_image_that_does_not_fit_is_refused(engine: Engine, tmp_path: Path) -> None:
    few(tmp_path / "photos", 3)
    small: Any = Small(engine, room=0)
    with pytest.raises(EngineError, match="one image is too much for the GPU's memory"):
        list(classify(small, expand([str(tmp_path / "photos")])))


def test_progress_tells_rate_and_remaining_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few(tmp_path / "photos", 100)
    ours, theirs = pty.openpty()
    seen = bytearray()

    def drain() -> None:
        with contextlib.suppress(OSError):  # what the other end's closing gives
            while part := os.read(ours, 4096):
                seen.extend(part)

    reader = threading.Thread(target=drain)
    reader.start()
    with open(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setenv("COLUMNS", "120")
        monkeypatch.setenv("TERM", "xterm")
        output = str(tmp_path / "rows.jsonl")
        photos = str(tmp_path / "photos")
        assert main(["classify", photos, *DIGITS, "--output", output, "--batch-size", "16"]) == 0
    reader.join()
    os.close(ours)
    text = re.sub(r"\x1b\[[0-9;]*m", "", seen.decode())  # without colours
    assert "/100" in text
    assert "images/s" in text
    assert "left 0:00:0" in text
