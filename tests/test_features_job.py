"""Features of a folder: rows like any other job's, as tables and as arrays; and layers' names."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from alexnet_triton.engine import Engine, NetworkError
from alexnet_triton.engine.__main__ import main
from alexnet_triton.engine.images import Source
from alexnet_triton.engine.jobs.kinds import Features, ImageRow, row
from alexnet_triton.engine.jobs.listing import listing
from alexnet_triton.engine.jobs.rows import Existing, Output
from alexnet_triton.engine.jobs.tables import OutputError
from alexnet_triton.engine.names import canonical
from alexnet_triton.engine.spec import Dropout
from alexnet_triton.engine.zoo import DIGITS, network
from PIL import Image
from safetensors.numpy import save

Capture = pytest.CaptureFixture[str]
Floats = np.ndarray[Any, np.dtype[np.float32]]

KIND = Features("conv2").fitted(DIGITS)
SUFFIXES = ("jsonl", "parquet", "npy", "safetensors")


@pytest.fixture(params=SUFFIXES)
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "parquet":
        pytest.importorskip("pyarrow")
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / f"rows.{request.param}"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six images, of which one is none."""
    (tmp_path / "photos").mkdir()
    for number in range(5):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    (tmp_path / "photos" / "1bad.png").write_bytes(b"")
    return tmp_path / "photos"


def run(capsys: Capture, *arguments: object) -> tuple[int, str, str]:
    given = ["features", *map(str, arguments), "--backend", "torch", "--device", "cpu"]
    status = main([*given, "--model", "digits"])
    out, err = capsys.readouterr()
    return status, out, err


def read(output: Path, shape: tuple[int, ...] = KIND.shape) -> tuple[list[dict[str, Any]], Floats]:
    """The rows without their features, and these, NaN where there are none."""
    if output.suffix in (".npy", ".safetensors"):
        lines = output.with_name(output.name + ".paths.jsonl").read_bytes().splitlines()
        rows = [json.loads(line) for line in lines]
        if output.suffix == ".npy":
            return rows, np.load(output)
        from safetensors.numpy import load_file

        return rows, load_file(output)["features"]
    if output.suffix == ".jsonl":
        rows = [json.loads(line) for line in output.read_bytes().splitlines()]
    else:
        found = pytest.importorskip("pyarrow.parquet").read_table(output)
        assert json.loads(found.schema.metadata[b"shape"]) == [*shape]
        rows = [{k: v for k, v in row.items() if v is not None} for row in found.to_pylist()]
    values = [np.array(row.pop("features", np.nan), np.float32) for row in rows]
    return rows, np.stack([np.resize(value, shape) for value in values])


def names(output: Path) -> list[str]:
    return [Path(row["path"]).name for row in read(output)[0]]


# What an output holds


def test_every_format_has_the_engines_own_bits(photos: Path, output: Path, capsys: Capture) -> None:
    status, out, err = run(capsys, photos, "--layer", "features.4", "--output", output)
    assert (status, out) == (0, f"{output}: 6 rows\n")
    assert err == "alexnet-triton: 1 of 6 images had errors\n"
    rows, values = read(output)
    assert [Path(row["path"]).name for row in rows] == [
        *("0.png", "1.png", "1bad.png", "2.png", "3.png", "4.png")
    ]
    assert [row.get("error") for row in rows] == [None, None, "is empty", None, None, None]
    engine = Engine.load("digits", backend="torch", device="cpu")
    paths = [row["path"] for row in rows if "error" not in row]
    wanted = engine.features(paths, ["conv2"])["conv2"].numpy()
    assert values.dtype == np.float32
    assert np.isnan(values[2]).all()
    assert np.array_equal(np.delete(values, 2, axis=0), wanted)


def test_floats_come_back_from_text_and_numbers_alike(output: Path) -> None:
    """Every float32 there is, but for those that are not finite, which are an error."""
    kind = Features("fc6", (4096,))
    bits = np.random.default_rng(0).integers(0, 2**32, 4096, dtype=np.uint32)
    some = bits.view(np.float32)
    some = np.where(np.isfinite(some), some, np.float32(5e-45))
    with Output(output, "refuse", kind) as opened:
        opened.write(row(Source("a.png", named=False), some, kind))
        opened.write(row(Source("b.png", named=False), some * np.float32(np.inf), kind))
    rows, values = read(output, (4096,))
    assert values[0].tobytes() == some.tobytes()
    assert "fp32" in rows[1]["error"]


def test_an_array_is_made_in_flat_memory(tmp_path: Path) -> None:
    values, kind = np.ones((64, 256), np.float32), Features("conv1", (64, 256))
    tracemalloc.start()
    try:
        with Output(tmp_path / "rows.npy", "refuse", kind) as opened:
            for number in range(100):
                opened.write(ImageRow(str(number), values, None, False, kind))
        assert tracemalloc.get_traced_memory()[1] < 2e6, "of 6.5 MB"
    finally:
        tracemalloc.stop()
    assert np.load(tmp_path / "rows.npy", mmap_mode="r").shape == (100, 64, 256)


# What ends a job


def test_interrupted_it_leaves_what_is_done_and_goes_on(
    photos: Path, output: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = (photos, "--layer", "conv2", "--output", output, "--batch-size", 1)

    def interrupted(words: list[str], gone: bool) -> Iterator[Any]:
        for number, source in enumerate(listing(words, gone=gone)):
            if number == 4:
                raise KeyboardInterrupt
            yield source

    with monkeypatch.context() as patch:
        patch.setattr("alexnet_triton.engine.jobs.job.listing", interrupted)
        assert run(capsys, *job)[0] == 130
    rows, values = read(output)
    assert 0 < len(rows) == len(values) < 6
    assert run(capsys, *job)[0] == 1, "not without --resume"
    assert run(capsys, *job[:2], "conv3", *job[3:], "--resume")[0] == 1, "nor another layer"
    assert run(capsys, *job, "--resume")[0] == 0
    assert names(output) == ["0.png", "1.png", "1bad.png", "2.png", "3.png", "4.png"]
    (photos / "1bad.png").write_bytes((photos / "0.png").read_bytes())
    assert run(capsys, *job, "--retry-errors")[0] == 0
    rows, values = read(output)
    assert [Path(row["path"]).name for row in rows][-1] == "1bad.png"
    assert np.array_equal(values[-1], values[0])
    assert not np.isnan(values).any()
    before = {path: path.read_bytes() for path in output.parent.iterdir()}
    assert not [path for path in before if "partial" in path.name]
    assert run(capsys, *job, "--resume")[0] == 0, "there is nothing to do"
    assert {path: path.read_bytes() for path in output.parent.iterdir()} == before


def made(name: str, error: str | None = None) -> ImageRow:
    values = np.full(KIND.shape, len(name), np.float32)
    return ImageRow(name, None if error else values, error, False, KIND)


def interrupted() -> Iterator[ImageRow]:
    yield made("a")
    raise KeyboardInterrupt


def write(output: Path, rows: Iterable[ImageRow], existing: Existing, exits_at: int = 0) -> None:
    """Write rows; with `exits_at`, in a process that ends when it puts that file in its place."""
    if exits_at and (child := os.fork()):
        os.waitpid(child, 0)
        return
    calls, replace = 0, os.replace

    def counted(*paths: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == exits_at:
            os._exit(9)
        replace(*paths)

    try:
        if exits_at:
            pytest.MonkeyPatch().setattr(os, "replace", counted)
        with Output(output, existing, KIND) as opened:
            opened.agree(layer="conv2")
            for each in rows:
                opened.write(each)
    finally:
        if exits_at:
            os._exit(9)


@pytest.mark.parametrize("output", ["npy", "safetensors", "parquet"], indirect=True)
def test_killed_as_the_table_is_made_it_loses_and_doubles_nothing(output: Path) -> None:
    """The first file put in its place is the record, the last one the table."""
    files = 2 if output.suffix == ".parquet" else 3
    for exits_at in range(2, files + 1):
        write(output, [made("a"), made("bb", "is empty")], "overwrite", exits_at)
        assert not output.exists(), "nobody takes a part for the whole"
        write(output, [made("ccc")], "resume")
        rows, values = read(output)
        assert [row["path"] for row in rows] == ["a", "bb", "ccc"]
        assert values[:, 0, 0, 0].tolist() == [1.0, pytest.approx(np.nan, nan_ok=True), 3.0]
    with pytest.raises(KeyboardInterrupt):
        write(output, interrupted(), "overwrite")  # there is a table of what is done
    for exits_at in range(1, files):
        write(output, [made("bb")], "resume", exits_at)
    write(output, [], "resume")
    assert names(output) == ["a", *["bb"] * (files - 1)]
    write(output, [made("dddd")], "overwrite", files)
    write(output, [], "resume")
    assert names(output) == ["dddd"], "what was overwritten is gone"


@pytest.mark.parametrize("suffix", ["npy", "safetensors"])
def test_an_array_of_somebody_else_is_not_touched(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"mine.{suffix}"
    np.save(tmp_path / "mine.npy", np.zeros((3, 2), np.float64))
    contents = [b"dear diary", b"\0" * 100, (tmp_path / "mine.npy").read_bytes()]
    numbers = np.zeros((3, 2), np.float32)  # as a job's but for its record
    np.save(tmp_path / "mine.npy", numbers)
    contents += [(tmp_path / "mine.npy").read_bytes(), save({"features": numbers})]
    for content in contents:
        path.write_bytes(content)
        modes: tuple[Existing, ...] = ("refuse", "resume", "retry", "overwrite")
        for existing in modes:
            with pytest.raises(OutputError, match=r"name another file$"):
                Output(path, existing, KIND)
        assert path.read_bytes() == content
    write(tmp_path / f"ours.{suffix}", [made("a"), made("b")], "refuse")
    beside = tmp_path / f"ours.{suffix}.paths.jsonl"
    beside.write_bytes(beside.read_bytes().splitlines()[0])
    with pytest.raises(OutputError, match=r"paths\.jsonl: its content was not written"):
        write(tmp_path / f"ours.{suffix}", [made("c")], "resume")


@pytest.mark.parametrize("output", ["npy", "safetensors", "parquet"], indirect=True)
def test_rows_that_were_damaged_are_refused_by_their_file(output: Path) -> None:
    lines = output.with_name(output.name + ".partial.jsonl")
    lengths = ["AAAA", "AAAAAA=="][: 1 if output.suffix == ".parquet" else 2]  # 0.75 and 1 float
    for value in lengths:
        with pytest.raises(KeyboardInterrupt):
            write(output, interrupted(), "overwrite")
        with lines.open("a") as file:
            file.write(f'{{"path": "b", "features": "{value}"}}\n')
        with pytest.raises(OutputError, match=r"partial\.jsonl: its content was not written"):
            write(output, [made("c")], "resume")
    if output.suffix != ".parquet":
        write(output, [made("a"), made("b")], "overwrite")
        for line in ("null", "[]", "5", "{}", '{"path": 5}', '{"path": "b", "error": 5}'):
            beside = output.with_name(output.name + ".paths.jsonl")
            beside.write_text(f'{{"path": "a"}}\n{line}\n')
            with pytest.raises(OutputError, match=r"paths\.jsonl: its content was not written"):
                write(output, [made("c")], "resume")


# What cannot be


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}", "--output", "rows.csv"], ".npy or .safetensors, got .csv"),
        (["{}", "--output", "rows.npy", "--filters"], "--filters: wanted a picture"),
        (["{}", "--output", "rows.npy", "--layer", "conv9"], "no features 'conv9'; it has conv1"),
        (["{}", "--output", "rows.npy", "--layer", "features.0"], "ask for 'features.1'"),
        (["{}/0.png", "{}/2.png", "--output", "maps.png"], "wanted one, got 2"),
        (["{}", "--output", "maps.png"], "got a folder"),
        *(
            (["{}/0.png", "--output", "maps.png", *words], f"{words[0]} is about rows")
            for words in (["--resume"], ["--overwrite"], ["--workers", "2"], ["--ray"])
        ),
    ],
)
def test_what_cannot_be_is_one_line(
    photos: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(photos.parent)
    status, out, err = run(capsys, *(word.format(photos) for word in arguments))
    assert (status, out) == (1, "")
    assert err.count("\n") == 1
    assert message in err
    assert os.listdir() == ["photos"]


def test_rows_of_one_verb_are_not_those_of_another(
    photos: Path, output: Path, capsys: Capture
) -> None:
    assert run(capsys, photos, "--layer", "conv2", "--output", output)[0] == 0
    before = output.read_bytes()
    for mode in ("--resume", "--overwrite"):
        assert main(["classify", str(photos), "--output", str(output), mode]) == 1
    assert output.read_bytes() == before


# Names of layers


@pytest.mark.parametrize(
    ("model", "names"),
    [  # counted in torchvision's source
        ("alexnet", {"features.1": "conv1", "features.2": "pool1", "features.12": "pool5"}),
        ("alexnet", {"features.7": "conv3", "classifier.2": "fc6", "classifier.5": "fc7"}),
        ("digits", {"classifier.6": "fc8", "conv4": "conv4", "avgpool": "avgpool"}),
        ("vgg11", {"features.1": "conv1_1", "features.2": "pool1", "features.20": "pool5"}),
        ("vgg16", {"features.29": "conv5_3", "features.30": "pool5", "classifier.1": "fc6"}),
        ("vgg19", {"features.36": "pool5", "classifier.4": "fc7", "classifier.6": "fc8"}),
        ("alexnet2012", {"features.1": "features.1"}),  # which torchvision does not have
    ],
)
def test_torchvisions_names_are_the_networks(model: str, names: dict[str, str]) -> None:
    assert {theirs: canonical(network(model), theirs) for theirs in names} == names


@pytest.mark.parametrize(
    ("model", "name", "cure"),
    [
        ("alexnet", "features.0", "ask for 'features.1', which is 'conv1'"),
        ("alexnet", "classifier.4", "ask for 'classifier.5', which is 'fc7'"),
        ("vgg16", "classifier.0", "ask for 'classifier.1', which is 'fc6'"),
    ],
)
def test_before_its_relu_a_layer_has_no_features(model: str, name: str, cure: str) -> None:
    with pytest.raises(NetworkError, match=cure):
        canonical(network(model), name)


def test_without_its_dropouts_a_network_is_not_numbered_as_torchvisions() -> None:
    """As an exporter writes it: the fourth of the classifier would be fc8, and not fc7."""
    layers = [(name, layer) for name, layer in DIGITS.layers if not isinstance(layer, Dropout)]
    exported = replace(DIGITS, layers=tuple(layers))
    for name in ("classifier.1", "classifier.4", "features.2"):
        with pytest.raises(NetworkError, match=f"has no features '{name}'; it has conv1"):
            Features(name).fitted(exported)


def test_features_keep_the_names_that_they_were_asked_by() -> None:
    engine = Engine.load("digits", backend="torch", device="cpu")
    image = np.random.default_rng(0).integers(0, 256, (1, 3, 64, 64), dtype=np.uint8)
    found = engine.features(image, ["features.1", "classifier.5", "conv1"])
    own = engine.features(image, ["conv1", "fc7"])
    assert [*found] == ["features.1", "classifier.5", "conv1"]
    assert found["features.1"].equal(own["conv1"])
    assert found["conv1"].equal(own["conv1"])
    assert found["classifier.5"].equal(own["fc7"])
    for name in ("classifier.3", "features.13", "features.0"):
        with pytest.raises(NetworkError, match=f"digits has no features '{name}'"):
            engine.features(image, name)
