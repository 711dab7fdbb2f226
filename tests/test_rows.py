"""Whose rows an output holds, and what a job may do with them: nothing before it knows."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from alexnet_triton import weights
from alexnet_triton.engine import Engine
from alexnet_triton.engine.__main__ import main
from alexnet_triton.engine.jobs.kinds import ImageRow
from alexnet_triton.engine.jobs.listing import listing
from alexnet_triton.engine.jobs.provenance import by_content, difference, fingerprint
from alexnet_triton.engine.jobs.rows import Existing, Output
from alexnet_triton.engine.jobs.tables import OutputError
from alexnet_triton.engine.load import find, load_state
from alexnet_triton.engine.run import Prediction
from PIL import Image

Capture = pytest.CaptureFixture[str]

BEST = (Prediction(0, "zéro", 0.75), Prediction(1, "one", 0.25))
KEEP = ("--resume", "--retry-errors")


def row(name: str, error: str | None = None) -> ImageRow:
    return ImageRow(name, () if error else BEST, error, named=False)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three digits, and a file that is none."""
    (tmp_path / "photos").mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    (tmp_path / "photos" / "1bad.png").write_bytes(b"")
    return tmp_path / "photos"


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    pytest.importorskip("pyarrow")
    return tmp_path / "rows.parquet"


def lines_of(output: Path) -> Path:
    """The file of JSON lines that grows while a job writes."""
    return output if output.suffix == ".jsonl" else output.with_name("rows.parquet.partial.jsonl")


def record_of(output: Path) -> Path:
    return output.with_name(lines_of(output).name + ".job.json")


@contextlib.contextmanager
def untouched(folder: Path) -> Iterator[None]:
    """Nothing in a folder comes, goes, changes or is written again."""

    def snapshot() -> dict[str, tuple[bytes, int]]:
        return {
            path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()
        }

    before = snapshot()
    yield
    assert snapshot() == before


def read(output: Path) -> list[dict[str, Any]]:
    if output.suffix == ".jsonl":
        return [json.loads(line) for line in output.read_bytes().splitlines()]
    found = pytest.importorskip("pyarrow.parquet").read_table(output).to_pylist()
    return [{name: value for name, value in row.items() if value is not None} for row in found]


def names(output: Path) -> list[str]:
    return [Path(row["path"]).name for row in read(output)]


def run(capsys: Capture, *arguments: object) -> tuple[int, str, str]:
    job = ["classify", *map(str, arguments), "--backend", "torch", "--device", "cpu"]
    status = main(job if "--model" in arguments else [*job, "--model", "digits"])
    out, err = capsys.readouterr()
    return status, out, err


def refusal(capsys: Capture, *arguments: object) -> str:
    """The one line that a job ends with before it did anything."""
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (1, "")
    assert err.startswith("alexnet-triton: error: ")
    assert err.count("\n") == 1
    return err


def write(
    output: Path, rows: Iterable[ImageRow], existing: Existing = "refuse", **asked: Any
) -> None:
    with Output(output, existing) as opened:
        opened.agree(**asked)
        for made in rows:
            opened.write(made)


def kept(output: Path, **asked: Any) -> list[str]:
    """Of which images a job that is resumed finds rows."""
    with Output(output, "resume") as opened:
        opened.agree(**asked)
        return [row.path for row in opened.kept()]


def killed(
    output: Path, rows: list[ImageRow], existing: Existing = "refuse", at: str = "", **asked: Any
) -> None:
    """What a job leaves that is killed when it has written `rows`, or calls `at` of os."""
    if not (child := os.fork()):
        try:
            if at:
                setattr(os, at, lambda *_, **__: os._exit(9))
            opened = Output(output, existing)
            opened.agree(**asked)
            for made in rows:
                opened.write(made)
        finally:
            os._exit(9)
    os.waitpid(child, 0)


# How the rows were made


def test_another_way_is_refused_and_nothing_touched(
    photos: Path, output: Path, capsys: Capture
) -> None:
    job = (photos, "http://localhost:1/x", "--output", output)
    assert run(capsys, *job, "--top", 2)[0] == 1
    with untouched(output.parent):
        for other, said in (
            (("--top", 3), "--top 2, got --top 3"),
            (("--top", 2, "--views", "ten-crop"), "--views center, got --views ten-crop"),
            (("--top", 2, "--weights", "random:1"), "--weights digits, got --weights random:1"),
            (("--top", 2, "--model", "alexnet"), "--model digits, got --model alexnet"),
            (("--top", 2, "--exif"), "no --exif, got --exif"),
            (("--top", 2, "--classes", photos / "0.png"), "no --classes, got --classes"),
            (("--top", 2, photos / "0.png"), f"sources: '{photos / '0.png'}' is new"),
        ):
            for keep in KEEP:
                assert said in (err := refusal(capsys, *job, keep, *other))
                assert "--overwrite" in err, "the cure"
        fewer = refusal(capsys, photos, "--output", output, "--resume", "--top", 2)
        assert "'http://localhost:1/x' is missing" in fewer


def test_another_way_is_refused_after_a_kill(output: Path) -> None:
    killed(output, [row("a.png")], top=2)
    assert lines_of(output).exists()
    with untouched(output.parent), pytest.raises(OutputError, match="--top 2, got"):
        write(output, [], "resume", top=3)


def test_what_computes_may_change_and_folders_grow(
    photos: Path, output: Path, capsys: Capture, tmp_path: Path
) -> None:
    more = photos / "2.png"
    assert run(capsys, f"{photos}/", more, "--output", output)[0] == 0
    (photos / "3.png").write_bytes((photos / "0.png").read_bytes())
    (tmp_path / "copy").mkdir()
    same = tmp_path / "copy" / "same.safetensors"
    weights.save(load_state(*find("digits"))[1], same)
    job = (more, photos, "--output", output, "--resume", "--batch-size", 2)
    status, out, _ = run(capsys, *job, "--weights", same)
    assert (status, out) == (0, f"{output}: 6 rows\n")
    assert names(output) == ["0.png", "1.png", "1bad.png", "2.png", "2.png", "3.png"]


def test_sources_are_the_same_with_slashes_unless_they_are_urls(
    photos: Path, output: Path, capsys: Capture
) -> None:
    url = "http://localhost:1/x"
    assert run(capsys, photos, url, "--output", output)[0] == 1
    before = read(output)
    assert run(capsys, f"{photos}//", url, "--output", output, "--resume")[0] == 1
    assert read(output) == before
    assert f"'{url}/' is new" in refusal(capsys, photos, f"{url}/", "--output", output, "--resume")


def test_relative_sources_are_those_of_their_folder(
    photos: Path, output: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = photos.parent / "other"
    shutil.copytree(photos, other / "photos")
    monkeypatch.chdir(photos.parent)
    assert run(capsys, "photos", "--output", output)[0] == 0
    monkeypatch.chdir(other)
    with untouched(output.parent):
        err = refusal(capsys, "photos", "--output", output, "--resume")
    assert f"{photos.parent}, " in err
    assert str(other) in err
    assert run(capsys, photos, "--output", output, "--overwrite")[0] == 0
    monkeypatch.chdir(photos.parent)
    assert run(capsys, photos, "--output", output, "--resume")[0] == 0, "absolute ones have none"


def test_relative_paths_in_parquet_are_those_of_their_folder(
    photos: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    job = (tmp_path / "set.parquet", "--output", tmp_path / "rows.jsonl")
    parquet.write_table(pa.table({"path": ["0.png"]}), job[0])
    monkeypatch.chdir(photos)
    assert run(capsys, *job)[0] == 0
    monkeypatch.chdir(tmp_path)
    assert str(photos) in refusal(capsys, *job, "--resume")


def test_a_weights_file_that_was_replaced_is_noticed(
    photos: Path, output: Path, capsys: Capture, tmp_path: Path
) -> None:
    file, (network, _) = tmp_path / "w.safetensors", find("digits")
    job = (photos, "--weights", file, "--output", output)
    weights.save(load_state(network, "random:0")[1], file)
    assert run(capsys, *job)[0] == 0
    file.unlink()
    weights.save(load_state(network, "random:1")[1], file)
    with untouched(output.parent):
        assert "changed since" in refusal(capsys, *job, "--resume")


def test_a_fingerprint_is_of_names_shapes_and_numbers() -> None:
    state = {"a": torch.zeros(2, 3), "b": torch.ones(4)}
    others = (
        {"a": torch.zeros(3, 2), "b": torch.ones(4)},
        {"c": torch.zeros(2, 3), "b": torch.ones(4)},
        {"a": torch.zeros(2, 3), "b": torch.tensor([1.0, 1, 1, 1 + 2**-23])},
    )
    assert len({fingerprint(some) for some in (state, *others)}) == 4
    assert fingerprint({"a": torch.zeros(3, 2).T, "b": torch.ones(4)}) == fingerprint(state)


def test_what_differs_is_said() -> None:
    made = {"model": by_content("a.onnx", "1"), "exif": None, "top": 5}
    assert difference(made, {"model": by_content("b/a.onnx", "1"), "exif": None}) is None
    assert difference(made, {"other": None}) is None, "which nobody asked for then, nor now"
    assert difference(made, {"exif": True}) == "made with no --exif, got --exif"
    changed = difference(made, {"top": 5, "model": by_content("a.onnx", "2")})
    assert changed == "made with --model a.onnx, whose content has changed since"


def test_rows_without_a_record_are_not_resumed(photos: Path, output: Path, capsys: Capture) -> None:
    job = (photos, "--output", output)
    assert run(capsys, *job)[0] == 0
    if output.suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(parquet.read_table(output).replace_schema_metadata(), output)
    else:
        record_of(output).unlink()
    with untouched(output.parent):
        assert "--overwrite" in refusal(capsys, *job, "--resume")
        write(output, [], "overwrite")  # no row came to replace them
    assert run(capsys, *job, "--overwrite")[0] == 0, "they are rows"
    assert run(capsys, *job, "--resume")[0] == 0


def test_a_finished_parquet_suffices_and_is_left_as_it_is(
    photos: Path, parquet: Path, capsys: Capture
) -> None:
    assert run(capsys, photos, "--output", parquet)[0] == 0
    folder = parquet.with_name("out")
    folder.mkdir()
    parquet.rename(folder / "moved.parquet")
    with untouched(folder):
        assert run(capsys, photos, "--output", folder / "moved.parquet", "--resume")[0] == 0


def test_without_rows_a_job_begins_anew(output: Path) -> None:
    killed(output, [], top=2)
    write(output, [], "resume", top=3)
    assert not os.listdir(output.parent)
    killed(output, [row("a.png")], top=2)
    lines_of(output).write_bytes(b'{"path": "a.pn')  # torn
    write(output, [row("b.png")], "resume", top=3)
    assert kept(output, top=3) == ["b.png"]


def test_the_record_is_there_before_the_first_row(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = os.write, []

    def look(file: int, line: bytes) -> int:
        seen.append(json.loads(record_of(output).read_bytes()))
        return real(file, line)

    with Output(output) as opened:
        opened.agree(top=3)
        monkeypatch.setattr(os, "write", look)
        opened.write(row("a.png"))
        monkeypatch.undo()
    assert seen == [{"classify": {"top": 3}}]


def test_a_record_that_was_deleted_meanwhile_is_there_at_the_end(output: Path) -> None:
    def rows() -> Iterator[ImageRow]:
        yield row("a.png")
        record_of(output).unlink()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(output, rows(), top=3)
    assert kept(output, top=3) == ["a.png"]


# Rows torn, replaced and done again


def test_a_row_torn_anywhere_is_cut_off(tmp_path: Path) -> None:
    output, rows = tmp_path / "rows.jsonl", [row("0"), row("1", "is empty"), row("2")]
    write(output, rows)
    whole = output.read_bytes()
    for size in range(len(whole)):
        output.write_bytes(whole[:size])
        with Output(output, "resume") as opened:
            count = len([*opened.kept()])
            assert count == whole[:size].count(b"\n")
            for made in rows[count:]:
                opened.write(made)
        assert output.read_bytes() == whole
    output.write_bytes(whole[:-10] + bytes(50))  # as after a power failure
    assert kept(output) == ["0", "1"]


def test_overwriting_replaces_the_rows_with_the_first_new_one(output: Path) -> None:
    write(output, [row("0"), row("1")])
    with pytest.raises(RuntimeError), Output(output, "overwrite"):
        raise RuntimeError
    assert names(output) == ["0", "1"], "nothing was put in their place"
    write(output, [row("2", "is empty")], "overwrite")
    assert read(output) == [row("2", "is empty").to_dict()]
    left = {output} if output.suffix == ".parquet" else {output, record_of(output)}
    assert {*output.parent.iterdir()} == left


def test_errors_are_done_again_and_good_rows_stay(
    photos: Path, output: Path, capsys: Capture
) -> None:
    job = (photos, "--output", output)
    assert run(capsys, *job)[0] == 0
    before = read(output)
    assert run(capsys, *job, "--retry-errors")[0] == 0
    assert sorted(map(str, read(output))) == sorted(map(str, before)), "it is as bad as it was"
    (photos / "1bad.png").write_bytes((photos / "0.png").read_bytes())
    assert run(capsys, *job, "--resume")[0] == 0
    assert names(output).count("1bad.png") == 1
    status, out, err = run(capsys, *job, *KEEP)
    assert (status, out, err) == (0, f"{output}: 4 rows\n", "")
    after = read(output)
    assert after[:3] == [row for row in before if "error" not in row]
    assert [Path(row["path"]).name for row in after[3:]] == ["1bad.png"]
    assert "error" not in after[3]


def test_a_kill_while_errors_are_done_again_loses_and_doubles_nothing(output: Path) -> None:
    write(output, [row("0"), row("1", "is empty"), row("2"), row("3", "is empty")])
    before = sorted(os.listdir(output.parent))
    for again, at, there in (
        ([], "", "0123"),
        ([row("1")], "replace", "0123"),
        ([row("1")], "dup2", "02"),
        ([row("1")], "", "021"),
    ):
        killed(output, again, "retry", at)
        assert kept(output) == [*there]
        assert sorted(os.listdir(output.parent)) == before, "what the kill left is gone"
    write(output, [row("3")], "resume")
    assert read(output) == [row(name).to_dict() for name in "0213"]


# A disk that is full


@contextlib.contextmanager
def at_most(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: to who writes, a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_line_and_what_is_there_stays(
    photos: Path, output: Path, capsys: Capture
) -> None:
    lines = lines_of(output)
    with at_most(1000):
        assert refusal(capsys, photos, "--output", output) == (
            f"alexnet-triton: error: {output}: cannot be written: File too large; "
            f"the rows so far are in {lines}, make room and go on with --resume\n"
        )
    assert 0 < len(read(lines)) < 4
    assert lines.read_bytes().endswith(b"\n")
    assert run(capsys, photos, "--output", output, "--resume")[0] == 0
    assert names(output) == ["0.png", "1.png", "1bad.png", "2.png"]


def test_a_disk_that_fills_up_as_the_parquet_file_is_made_costs_no_row(parquet: Path) -> None:
    rows = [row("0"), row("1", "is empty")]
    with pytest.raises(OutputError, match="cannot be written"), at_most(400):
        write(parquet, rows)
    assert {*parquet.parent.iterdir()} == {lines_of(parquet), record_of(parquet)}
    write(parquet, [], "resume")
    assert read(parquet) == [row.to_dict() for row in rows]


def test_a_device_that_is_full_is_one_line(photos: Path, capsys: Capture) -> None:
    err = refusal(capsys, photos, "--output", "/dev/full")
    assert err.endswith("/dev/full: cannot be written: No space left on device\n")
    for _ in range(2):
        assert run(capsys, photos, "--output", "/dev/null", "--overwrite")[0] == 0


# What others do to the file meanwhile


def test_files_of_other_names_are_nobodys_but_the_users(output: Path) -> None:
    ends = ("", ".partial.jsonl")
    names = [f"{output.name}{end}{new}" for end in ends for new in (".job.new", ".job.json.new")]
    mine = [output.with_name(name) for name in (*names, f"{output.name}.partial")]
    for path in mine:
        path.write_bytes(b"mine")
    modes: tuple[Existing, ...] = ("refuse", "retry", "resume", "overwrite")
    for existing in modes:
        write(output, [row("a", "is empty")], existing)
    assert [path.read_bytes() for path in mine] == [b"mine"] * len(mine)


@pytest.mark.parametrize("existing", ["refuse", "resume", "overwrite"])
@pytest.mark.parametrize("late", [False, True])
def test_parquet_that_somebody_else_puts_there_stays(
    parquet: Path, existing: Any, late: bool
) -> None:
    if existing != "refuse":
        write(parquet, [row("a")])

    def rows() -> Iterator[ImageRow]:
        if late:
            yield row("b")
        parquet.unlink(missing_ok=True)
        parquet.write_bytes(b"mine")
        if not late:
            yield row("b")

    with pytest.raises(OutputError):
        write(parquet, rows(), existing)
    assert parquet.read_bytes() == b"mine"
    parquet.unlink()
    stays = {"refuse": ["b"], "resume": ["a", "b"], "overwrite": ["b"]}
    assert kept(parquet) == (stays[existing] if late or existing == "refuse" else [])
    assert late or existing == "refuse" or not os.listdir(parquet.parent)


def test_rows_of_one_job_beside_a_table_of_another_are_told(parquet: Path) -> None:
    killed(parquet, [row("a.png")], top=2)
    write(parquet.with_name("other.parquet"), [row("b.png")], top=1)
    parquet.with_name("other.parquet").rename(parquet)
    modes: tuple[Existing, ...] = ("resume", "retry")
    for existing in modes:
        with untouched(parquet.parent), pytest.raises(OutputError, match=r"partial\.jsonl"):
            Output(parquet, existing)


@pytest.mark.parametrize("more", [[row("c")], []])  # told at once, and at the latest at the end
@pytest.mark.parametrize(
    "how", ["deleted", "moved", "replaced", "truncated", "appended", "folder moved"]
)
def test_a_file_that_somebody_else_changes_is_told(
    output: Path, how: str, more: list[ImageRow]
) -> None:
    lines, folder = lines_of(output), output.parent
    left = contextlib.ExitStack()

    def rows() -> Iterator[ImageRow]:
        yield from (row("a"), row("b"))
        match how:
            case "deleted":
                lines.unlink()
            case "moved":
                lines.rename(lines.with_name("elsewhere"))
            case "replaced":
                os.replace(lines, lines.with_name("old"))
                lines.write_bytes(lines.with_name("old").read_bytes())
            case "truncated":
                os.truncate(lines, 0)
            case "appended":
                with open(lines, "a") as file:
                    file.write("mine\n")
            case "folder moved":
                folder.rename(folder.with_name("elsewhere"))
                folder.write_bytes(b"a file")
        if folder.is_dir():
            left.enter_context(untouched(folder))
        yield from more

    with left, pytest.raises(OutputError, match=r"moved, deleted|something else changed"):
        write(output, rows())


def test_a_job_whose_output_is_gone_fails(
    photos: Path, output: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(words: list[str], **how: bool) -> Iterator[Any]:
        for _ in range(4):
            yield from listing(words)
        lines_of(output).unlink()

    monkeypatch.setattr("alexnet_triton.engine.jobs.job.listing", gone)
    assert "deleted" in refusal(capsys, photos, "--output", output, "--batch-size", 1)
    assert not output.exists()


# Names, places and options


def test_what_cannot_be_written_is_refused_before_any_work(
    photos: Path, output: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "load", lambda *_, **__: pytest.fail("work was begun"))
    (photos / "folder" / output.name).mkdir(parents=True)
    write(output, [row("a.png")])
    to = ("--output", output)
    for options, said in (
        (to, f" {output}: holds something already"),
        (("--output", photos / "nowhere" / output.name), "No such file"),
        (("--output", photos / "folder" / output.name), "Is a directory"),
        ((*to, "--retry-errors", "--overwrite"), "leave one out"),
        ((*to, "--resume", "--overwrite"), "leave one out"),
        (("--resume",), "--output"),
        (("--overwrite",), "--output"),
        (("--retry-errors",), "--output"),
    ):
        with untouched(output.parent):
            assert said in refusal(capsys, photos, *options)
    with Output(output, "resume"):
        assert "another job" in refusal(capsys, photos, "--resume", *to)
    assert kept(output) == ["a.png"]


def test_what_a_kill_left_is_named(output: Path, capsys: Capture) -> None:
    killed(output, [row("a.png")])
    assert f" {lines_of(output)}: " in refusal(capsys, "x.png", "--output", output)


def test_a_typo_is_refused_where_nothing_is_kept(output: Path, capsys: Capture) -> None:
    for options in ((), *((keep,) for keep in KEEP)):
        with untouched(output.parent):
            word = output.parent / "nosuch.png"
            assert "spelling" in refusal(capsys, word, "--output", output, *options)


def test_an_empty_file_stays_where_a_job_is_refused(
    photos: Path, output: Path, capsys: Capture
) -> None:
    for path in (output, lines_of(output)):
        path.touch()
    for options in ((), ("--resume",), ("--overwrite",)):
        with untouched(output.parent):
            refusal(capsys, photos, "--output", output, "--weights", "none.pth", *options)


def test_a_name_must_say_its_format(photos: Path, tmp_path: Path, capsys: Capture) -> None:
    before = [*tmp_path.iterdir()]
    for name in ("labels.csv", "labels.json", "labels", "labels.jsonl.gz"):
        for options in ((), ("--resume",), ("--overwrite",)):
            err = refusal(capsys, photos, "--output", tmp_path / name, *options)
            assert ".jsonl or .ndjson or .parquet" in err
    assert [*tmp_path.iterdir()] == before
    assert run(capsys, photos, "--output", tmp_path / "labels.NDJSON")[0] == 0


def test_a_name_too_long_for_its_record_is_refused_at_once(tmp_path: Path) -> None:
    for length in (233, 245, 300):
        with untouched(tmp_path), pytest.raises(OutputError):
            Output(tmp_path / ("x" * (length - 6) + ".jsonl"))
    write(tmp_path / ("x" * 226 + ".jsonl"), [row("a")])


def test_a_link_to_nothing_is_one_where_a_job_fails(tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    output.symlink_to("target")
    with pytest.raises(RuntimeError), Output(output):
        raise RuntimeError
    assert os.listdir(tmp_path) == ["rows.jsonl"]
    write(output, [row("a")])
    assert len((tmp_path / "target").read_bytes().splitlines()) == 1


def test_a_link_leads_to_the_rows_and_to_their_record(
    photos: Path, output: Path, capsys: Capture
) -> None:
    disk = output.parent / "disk"
    disk.mkdir()
    output.symlink_to(disk / output.name)
    job = ("--output", output, "--top", 2)
    assert run(capsys, photos, *job)[0] == 0
    assert {path.parent for path in output.parent.rglob("*.*") if path != output} == {disk}
    straight = ("--output", disk / output.name)
    assert "--top 2, got --top 1" in refusal(capsys, photos, *straight, "--resume", "--top", 1)
    assert run(capsys, photos, *straight, "--overwrite", "--top", 1)[0] == 0
    assert "--top 1, got --top 2" in refusal(capsys, photos, *job, "--resume")
    assert output.is_symlink()


def test_pipes_have_any_name(photos: Path, tmp_path: Path, capsys: Capture) -> None:
    pipe = tmp_path / "labels.csv"
    os.mkfifo(pipe)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    assert run(capsys, photos, "--output", pipe)[0] == 0
    reader.join()
    ours, theirs = os.pipe()
    assert run(capsys, photos, "--output", f"/dev/fd/{theirs}")[0] == 0
    os.close(theirs)
    with open(ours, "rb") as end:
        assert end.read() == read[0]
    assert len([json.loads(line) for line in read[0].splitlines()]) == 4
    assert sorted(os.listdir(tmp_path)) == ["labels.csv", "photos"]
    assert "nothing to resume" in refusal(capsys, photos, "--output", pipe, "--resume")


@pytest.mark.parametrize("name", ["-", "/dev/stdout"])
def test_standard_output_gets_json_lines_alone(photos: Path, capsys: Capture, name: str) -> None:
    status, out, err = run(capsys, photos, "--output", name)
    assert status == 0
    found = [Path(json.loads(line)["path"]).name for line in out.splitlines()]
    assert found == ["0.png", "1.png", "1bad.png", "2.png"]
    assert "4 rows" in err
    for option in ("--json", "--resume", "--retry-errors", "--overwrite"):
        assert option in refusal(capsys, photos, "--output", name, option)


# What no job wrote

FOREIGN: dict[str, Callable[[], bytes]] = {
    "binary": lambda: bytes(range(256)),
    "text": lambda: b"dear diary",
    "other lines": lambda: b'{"text": "a"}\n{"text": "b"}\n',
    "paths": lambda: b'{"path": "a.png", "text": "b"}\n',
    "zeros": lambda: bytes(100),
    "table": lambda: _parquet_of_paths(),
}


def _parquet_of_paths() -> bytes:
    pa = pytest.importorskip("pyarrow")
    sink = pa.BufferOutputStream()
    pytest.importorskip("pyarrow.parquet").write_table(pa.table({"path": ["a.png"]}), sink)
    return bytes(sink.getvalue())


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_no_job_wrote_is_not_touched(
    photos: Path, output: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(Engine, "load", lambda *_, **__: pytest.fail("work was begun"))
    for path in (output, lines_of(output), record_of(output)):
        path.write_bytes(FOREIGN[kind]())
        for options in ((), ("--overwrite",), *((keep,) for keep in KEEP)):
            with untouched(output.parent):
                assert "name another" in refusal(capsys, photos, "--output", output, *options)
        path.unlink()


@pytest.mark.parametrize("notes", [b"my only notes\n", b"my only notes", b'{"path": 1}\n'])
@pytest.mark.parametrize("existing", ["resume", "retry", "overwrite"])
def test_a_record_vouches_for_no_other_content(
    output: Path, notes: bytes, existing: Existing
) -> None:
    killed(output, [row("a.png")], top=2)
    lines_of(output).write_bytes(notes)
    with untouched(output.parent), pytest.raises(OutputError, match="name another"):
        Output(output, existing)


@pytest.mark.parametrize("existing", ["resume", "overwrite"])
def test_parquet_with_a_broken_end_is_named(parquet: Path, existing: Existing) -> None:
    write(parquet, [row("a.png")])
    whole = parquet.read_bytes()
    parquet.write_bytes(whole[:-200] + b"\xff" * 192 + whole[-8:])
    with pytest.raises(OutputError, match=str(parquet)):
        Output(parquet, existing)


@pytest.mark.parametrize("line", [b'{"text": "mine"}\n', b"1\n", b"[]\n"])
def test_rows_that_turn_into_something_else_are_not_touched(
    photos: Path, output: Path, capsys: Capture, line: bytes
) -> None:
    sources: dict[str, Any] = {"sources": [str(photos)], "model": "digits", "top": 5}
    _, state = load_state(*find("digits"))
    digits = by_content("digits", fingerprint(state))
    killed(output, [row(str(photos / "0.png"))], **sources, views="center", weights=digits)
    with open(lines_of(output), "ab") as file:
        file.write(line + b'{"path": "torn')
    for keep in KEEP:
        with untouched(output.parent):
            err = refusal(capsys, photos, "--output", output, keep)
            assert "line 2 was not written by a job" in err
