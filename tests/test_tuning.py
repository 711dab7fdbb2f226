"""Tables of tuned configurations: what is found for which batch, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from alexnet_triton.kernels import tuning
from alexnet_triton.kernels.conv import Conv2dShape
from alexnet_triton.kernels.tuning import Table, TunedRow, TuningError

SHAPE = Conv2dShape(7, 64, 13, 13, 128, 3, 3, padding=(1, 1, 1, 1))


def row(batch: int, block: int = 64, dtype: str = "fp16") -> TunedRow:
    shape = tuning.without_batch(SHAPE)
    return TunedRow("conv2d", shape, dtype, batch, {"BLOCK_M": block}, 1.0, "3.6.0", "now", "abc")


@pytest.mark.parametrize(
    ("batch", "found"),
    [(1, 1), (2, 1), (3, 8), (8, 8), (22, 8), (23, 64), (64, 64), (128, 64), (129, None)],
)
def test_a_row_serves_batches_around_its_own(batch: int, found: int | None) -> None:
    """Up to the geometric mean with the next row, and twice the last one."""
    nearest = tuning.nearest([row(64), row(1), row(8)], batch)
    assert (nearest and nearest.batch) == found


def test_a_lowest_row_serves_down_to_half() -> None:
    assert tuning.nearest([row(64)], 32) == row(64)
    assert tuning.nearest([row(64)], 31) is None
    assert tuning.nearest([], 1) is None


def test_a_table_is_found_again(tmp_path: Path) -> None:
    path = tuning.path_of("NVIDIA H200", tmp_path)
    assert path.name == "nvidia-h200.json"
    tuning.save(path, "NVIDIA H200", [row(64), row(8, dtype="bf16")])
    tuning.save(path, "NVIDIA H200", [row(64, block=128), row(256)])
    table = tuning.load(path)
    assert len(table.rows) == 3
    assert table.find("conv2d", SHAPE, "fp16", 64) == {"BLOCK_M": 128}, "the later row replaces"
    assert table.find("conv2d", SHAPE, "bf16", 8) == {"BLOCK_M": 64}
    assert table.find("conv2d", SHAPE, "tf32", 64) is None
    assert table.find("conv2d", SHAPE, "bf16", 256) == {"BLOCK_M": 64}, "fp16's row serves bf16"
    assert table.find("conv2d", SHAPE, "fp16", 8) is None, "but not the other way about"
    assert table.find("linear", SHAPE, "fp16", 64) is None
    assert len(path.read_text().splitlines()) == 5, "one row a line"


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text('{"device": "NVIDIA H200"}')
    with pytest.raises(TuningError, match=r"broken\.json: no table"):
        tuning.load(path)
    tuning.save(path.with_name("strange.json"), "NVIDIA H200", [row(1), row(8)])
    text = path.with_name("strange.json").read_text()
    for old, new in (('"op"', '"speed": 1, "op"'), (', "source": "abc"', "")):
        path.write_text(new.join(text.rsplit(old, 1)))
        with pytest.raises(TuningError, match=r"broken\.json: .* row 2: wanted .* source, got"):
            tuning.load(path)
    other = tmp_path / "other.json"
    tuning.save(other, "NVIDIA A100", [])
    with pytest.raises(TuningError, match="wanted a table of NVIDIA H200, got one of NVIDIA A100"):
        tuning.save(other, "NVIDIA H200", [row(1)])


def test_every_shipped_table_can_be_read() -> None:
    for path in tuning.TUNED.glob("*.json"):
        found = tuning.load(path)
        assert path == tuning.path_of(found.device)
        assert isinstance(found, Table)


def test_names_of_dtypes() -> None:
    assert tuning.dtype_name(torch.float32, "ieee") == "fp32"
    assert tuning.dtype_name(torch.float32, "tf32") == "tf32"
    assert tuning.dtype_name(torch.bfloat16, "ieee") == "bf16"
