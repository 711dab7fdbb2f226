"""From words to images: what `expand` gives, and the paths in Parquet files."""

from __future__ import annotations

from pathlib import Path

import pytest
from alexnet_triton.engine import EngineError, ImageError
from alexnet_triton.engine.images import Source
from alexnet_triton.engine.jobs.listing import listing

pa = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install -e '.[parquet]'")
parquet = pytest.importorskip("pyarrow.parquet")


def write(file: Path, **columns: object) -> str:
    parquet.write_table(pa.table(columns), file)
    return str(file)


def test_paths_in_parquet_come_in_order_among_other_words(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    c = tmp_path / "c.png"
    c.touch()
    file = write(tmp_path / "b.Parquet", id=[1, 2, 3], path=["z.png", None, "http://x/y"])
    found = list(listing([str(tmp_path / "a*.png"), file, str(c)]))
    assert found[:2] == [
        Source(str(tmp_path / "a.png"), named=False),
        Source("z.png", named=False),
    ]
    assert isinstance(found[2], ImageError)
    assert str(found[2]) == f"{file}: row 1 has no path"
    assert found[3:] == [Source("http://x/y", named=False), Source(str(c), named=True)]


def test_a_folder_of_parts_is_one_parquet(tmp_path: Path) -> None:
    folder = tmp_path / "paths.parquet"
    folder.mkdir()
    (folder / "_SUCCESS").touch()
    for part in range(3):
        write(folder / f"part-{part}.parquet", path=[f"{part}.{row}" for row in range(2)])
    found = list(listing([str(folder)]))
    assert [s.location for s in found if isinstance(s, Source)] == [
        f"{part}.{row}" for part in range(3) for row in range(2)
    ]


def test_slashes_at_the_end_change_nothing_but_urls(tmp_path: Path) -> None:
    for folder in ("photos", "set.parquet"):
        (tmp_path / folder).mkdir()
    (tmp_path / "photos" / "a.png").touch()
    write(tmp_path / "set.parquet" / "part", path=["b.png"])
    words = [f"{tmp_path}/photos", f"{tmp_path}/set.parquet", "http://x/c"]
    wanted = [
        Source(f"{tmp_path}/photos/a.png", named=False),
        Source("b.png", named=False),
        Source("http://x/c", named=True),
    ]
    assert list(listing(words)) == wanted
    assert list(listing(f"{word}//" for word in words[:2])) == wanted[:2]
    assert list(listing(["http://x/c/"])) == [Source("http://x/c/", named=True)]


def test_parquet_that_is_gone_is_an_image_that_is_gone(tmp_path: Path) -> None:
    word = str(tmp_path / "gone.parquet")
    assert list(listing([word], gone=True)) == [Source(word, named=True)]


def test_what_is_no_parquet_of_paths_is_refused_at_once(tmp_path: Path) -> None:
    junk = tmp_path / "junk.parquet"
    junk.write_text("PAR0")
    (tmp_path / "x.png").touch()
    (tmp_path / "empty.parquet").mkdir()
    numbers = write(tmp_path / "numbers.parquet", path=[1])
    for word, message in (
        (str(tmp_path / "none.parquet"), "none.parquet: .* there is no such thing here"),
        (str(junk), "junk.parquet: cannot be read as Parquet"),
        (str(tmp_path / "empty.parquet"), "wanted a column 'path', got none"),
        (write(tmp_path / "u.parquet", url=["x"], id=[1]), "wanted a column 'path', got url, id"),
        (numbers, "wanted strings in its column 'path', got int64"),
    ):
        with pytest.raises(EngineError, match=message) as refused:
            listing([str(tmp_path / "x.png"), word])
        assert "\n" not in str(refused.value)


def test_a_word_that_is_nothing_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    (tmp_path / "broken.png").symlink_to("nowhere")
    (tmp_path / "odd[1].png").touch()
    there = ["a.png", "broken.png", "odd[1].png", "*.png", "[a-c].png", "."]
    assert len(list(listing(str(tmp_path / word) for word in there))) == 3 + 3 + 1 + 3
    for word in ("b.png", "a.pn", "*.gif", "odd[2].png", "none/", ""):
        words = [str(tmp_path / "a.png"), str(tmp_path / word) if word else ""]
        with pytest.raises(EngineError, match="check its spelling") as refused:
            listing(words)
        assert str(refused.value).startswith(words[1])
        assert len(list(listing(words, gone=True))) == 2
