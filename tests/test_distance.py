"""The verb `distance`: pairs as rows, whatever their sizes are and whatever ends the job."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from alexnet_triton.engine import LPIPS, EngineError
from alexnet_triton.engine.__main__ import main
from alexnet_triton.engine.images import ImageError, Source
from alexnet_triton.engine.jobs import distance
from alexnet_triton.engine.jobs.distance import ImagePair, by_size, distances, load_pair, pairs
from alexnet_triton.engine.load import find, load_state
from PIL import Image

Capture = pytest.CaptureFixture[str]

SIZES = {"0": (31, 31), "1": (40, 33), "2": (31, 31), "3": (40, 33), "4": (31, 31)}


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return load_state(find("alexnet")[0], "random:0")[1]


@pytest.fixture(scope="module")
def lpips(state: dict[str, torch.Tensor]) -> LPIPS:
    return LPIPS(state, device="cpu", backend="torch")


def picture(path: Path, seed: int, size: tuple[int, int]) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    width, height = size
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def folders(tmp_path: Path) -> tuple[str, str]:
    """Five good pairs of two sizes, of which number 2 is one image twice."""
    a, b = tmp_path / "a", tmp_path / "b"
    for number, (name, size) in enumerate(SIZES.items()):
        picture(a / f"{name}.png", number, size)
        picture(b / f"{name}.png", number if name == "2" else number + 10, size)
    return str(a), str(b)


@pytest.fixture
def bad(folders: tuple[str, str]) -> dict[str, str]:
    """Five bad ones more, and what is said of each."""
    a, b = map(Path, folders)
    (a / "empty.png").touch()
    picture(b / "empty.png", 0, (31, 31))
    picture(a / "first.png", 0, (31, 31))
    picture(b / "sub" / "second.png", 0, (31, 31))
    for path, size in ((a, (32, 40)), (b, (32, 48))):
        picture(path / "sub" / "sizes.png", 0, size)
        picture(path / "tiny.png", 0, (30, 31))
    return {
        "empty.png": f"{a}/empty.png: is empty",
        "first.png": f"{b}/first.png: cannot be opened: No such file",
        "sub/second.png": f"{a}/sub/second.png: cannot be opened: No such file",
        "sub/sizes.png": "wanted images of one size, got 32x40 and 32x48; --size",
        "tiny.png": "wanted images from 31x31 up, got 30x31 and 30x31; --size",
    }


def run(capsys: Capture, *arguments: object) -> tuple[int, str, str]:
    given = ["distance", *map(str, arguments), "--backend", "torch", "--device", "cpu"]
    status = main([*given, "--weights", "random:0"])
    out, err = capsys.readouterr()
    return status, out, err


def read(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.read_bytes().splitlines()]


# Which images are compared


def test_folders_are_matched_by_relative_names(tmp_path: Path) -> None:
    """Whatever sorts before what: names with dots, blanks and slashes beside one another."""
    names = ["a.png", "a b.png", "a/z.png", "a.b/z.png", "a-b.png", "b/a/c.png", "b.png"]
    for side, without in (("x", "b.png"), ("y", "a.png")):
        for name in names:
            if name != without:
                (tmp_path / side / name).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / side / name).touch()
    x, y = f"{tmp_path}/x", f"{tmp_path}/y"
    wanted = {ImagePair(name, False, f"{x}/{name}", f"{y}/{name}") for name in names}
    assert Counter(pairs(x, y)) == Counter(wanted), "each once"


def test_a_folder_without_images_is_an_error(folders: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    first, *others = pairs(str(tmp_path / "none"), folders[0])
    assert isinstance(first, ImageError)
    assert "holds no image" in first.reason
    assert len(others) == len(SIZES)


def test_words_that_do_not_match_are_refused(folders: tuple[str, str]) -> None:
    with pytest.raises(EngineError, match="wanted two folders or two images"):
        pairs(folders[0], f"{folders[1]}/0.png")
    with pytest.raises(EngineError, match=r"nowhere: wanted an image"):
        pairs(folders[0], "nowhere")
    assert [*pairs("http://localhost:1/x", f"{folders[0]}/0.png")]


# Their rows


@pytest.mark.parametrize("workers", [0, 1])
def test_rows_are_lpips_of_each_pair(
    lpips: LPIPS, folders: tuple[str, str], bad: dict[str, str], workers: int
) -> None:
    made = [*distances(lpips, pairs(*folders), batch_size=2, workers=workers)]
    rows = {row.path: row for row in made}
    assert len(rows) == len(made) == len(SIZES) + len(bad)
    for name, words in bad.items():
        assert (rows[name].error or "").startswith(words)
    for name in SIZES:
        two = [np.asarray(Image.open(f"{folder}/{name}.png")) for folder in folders]
        a, b = (torch.from_numpy(x / 127.5 - 1).float().permute(2, 0, 1)[None] for x in two)
        assert rows[f"{name}.png"].result == pytest.approx(lpips(a, b).item(), abs=1e-6)
    assert rows["2.png"].result == 0
    assert rows["0.png"].result > 0


def test_size_makes_pairs_comparable(folders: tuple[str, str], bad: dict[str, str]) -> None:
    for source in pairs(*folders):
        if isinstance(source, ImagePair) and source.location in ("sub/sizes.png", "tiny.png"):
            assert load_pair(source, side=48).shape == (2, 3, 48, 48)
            with pytest.raises(ImageError):
                load_pair(source)


def test_one_size_comes_after_another_and_little_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    read = 0

    def items(sizes: int) -> Iterator[Any]:
        nonlocal read
        for read in range(1, 101):
            side = 31 + read % sizes
            yield Source(str(read), named=False), torch.zeros(2, 3, side, side)

    found: Any = by_size(items(3), 4)
    sides = [item.shape[2] for _, item in found]
    assert len(sides) == 100
    assert all(len({*sides[n : n + 4]}) == 1 for n in range(0, 96, 4))
    next(iter(by_size(items(3), 4)))
    assert read == 10, "when there are four of a size"
    monkeypatch.setattr(distance, "HELD", 3 * 6 * 31 * 31)
    next(iter(by_size(items(50), 100)))
    assert read <= 4, "of large images fewer wait"


def test_workers_decode_few_pairs_ahead(
    folders: tuple[str, str], lpips: LPIPS, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pair of photographs is a hundred megabytes, and so a batch of its own."""
    monkeypatch.setattr(distance, "HELD", 1)
    one = ImagePair("0.png", False, *(f"{folder}/0.png" for folder in folders))
    waiting = iter([one] * 100)
    with closing(distances(lpips, waiting, batch_size=64, workers=1)) as rows:
        next(rows)
        assert len([*waiting]) >= 94


def test_a_distance_that_is_no_number_is_an_error(folders: tuple[str, str], lpips: LPIPS) -> None:
    class Overflown:
        device, max_batch = lpips.device, 4

        def __call__(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return torch.full((len(a), 1, 1, 1), torch.nan)

    broken: Any = Overflown()
    assert ["fp32" in (row.error or "") for row in distances(broken, pairs(*folders))] == [True] * 5


# In the shell


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch, state: dict[str, torch.Tensor]) -> None:
    """To make the weights takes longer than to use them."""
    monkeypatch.setattr(distance, "load_state", lambda *_: (None, state))


@pytest.mark.usefixtures("at_once")
def test_interrupted_it_goes_on_in_any_order(
    folders: tuple[str, str],
    bad: dict[str, str],
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "rows.jsonl"
    job = (*folders, "--output", output, "--batch-size", 2)

    def interrupted(*words: str) -> Iterator[Any]:
        for number, source in enumerate(pairs(*words)):
            if number == 4:
                raise KeyboardInterrupt
            yield source

    with monkeypatch.context() as patch:
        patch.setattr(distance, "pairs", interrupted)
        assert run(capsys, *job)[0] == 130
    first = [row["path"] for row in read(output)]
    assert first[0] == "0.png"
    assert 0 < len(first) < 4, "those of the other size waited"
    assert "made with no --size, got --size 48" in run(capsys, *job, "--resume", "--size", 48)[2]
    assert run(capsys, *job[1::-1], *job[2:], "--resume")[0] == 0, "either folder may come first"
    rows = read(output)
    assert sorted(row["path"] for row in rows) == sorted([*bad, *(f"{n}.png" for n in SIZES)])
    assert [row["path"] for row in rows if "error" in row] == sorted(bad)
    status, out, err = run(capsys, *job, "--resume")
    assert (status, out) == (0, f"{output}: 10 rows\n")
    assert err == "alexnet-triton: 5 of 10 pairs had errors\n"


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("side", [10**4, 10**12])
def test_a_size_beyond_pillows_limit_is_refused(
    side: int, folders: tuple[str, str], capsys: Capture
) -> None:
    """At once, as a picture of it would be."""
    status, out, err = run(capsys, *folders, "--size", side)
    assert (status, out) == (1, "")
    assert "--size" in err
    assert err.count("\n") == 1


@pytest.mark.usefixtures("at_once")
def test_two_images_and_json(folders: tuple[str, str], capsys: Capture) -> None:
    two = [f"{folder}/1.png" for folder in folders]
    status, out, err = run(capsys, *two, "--json")
    assert (status, err) == (0, "")
    (row,) = json.loads(out)
    assert row["path"] == two[0]
    status, out, _ = run(capsys, *two)
    assert out == f"{two[0]}\n  {row['distance']:.6f}\n"
    assert run(capsys, two[0], f"{folders[1]}/0.png")[0] == 1, "it was named itself"


@pytest.mark.usefixtures("at_once")
def test_two_images_are_one_row_in_either_order(
    folders: tuple[str, str], tmp_path: Path, capsys: Capture
) -> None:
    output = tmp_path / "rows.jsonl"
    two = [f"{folder}/1.png" for folder in folders]
    assert run(capsys, *two, "--output", output)[0] == 0
    assert run(capsys, *two[::-1], "--output", output, "--resume")[0] == 0
    assert len(read(output)) == 1


@pytest.mark.usefixtures("at_once")
def test_parquet_has_a_column_of_distances(
    folders: tuple[str, str], bad: dict[str, str], tmp_path: Path, capsys: Capture
) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    output = tmp_path / "rows.parquet"
    assert run(capsys, *folders, "--output", output)[0] == 0
    table = parquet.read_table(output)
    fields = [("path", pa.string()), ("error", pa.string()), ("distance", pa.float32())]
    assert table.schema.equals(pa.schema(fields))
    assert table["distance"].null_count == len(bad)
