"""`bench model`: the verb's table, files and JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from alexnet_triton.bench.__main__ import main
from alexnet_triton.bench.records import OURS, load

Capture = pytest.CaptureFixture[str]


@pytest.mark.interpreter
def test_the_verb_prints_a_table_and_keeps_results(capsys: Capture, tmp_path: Path) -> None:
    kept = tmp_path / "model.json"
    common = ["model", "--device", "cpu", "--batch", "1", "--rounds", "1", "--peers", "torch"]
    assert main([*common, "--json", str(kept)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("on ")
    assert "Triton's interpreter" in out
    assert "torch channels_last" in out
    assert "workspace 0.0 MB" in out
    assert "warning: the device's state is not known: a cpu, in 2 rows" in out
    assert "digits, batch 1, fp32, float" in err
    assert [row.contestant for row in load(kept).rows] == [OURS, "torch channels_last"]


@pytest.mark.interpreter
def test_json_is_all_that_is_printed(capsys: Capture) -> None:
    common = ["model", "digits", "--device", "cpu", "--batch", "1", "--rounds", "1"]
    assert main([*common, "--input", "uint8", "--peers", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["network"] for row in found["rows"]] == ["digits uint8"]
    assert set(found["roofs"]) == {"fp32", "copy"}


@pytest.mark.gpu
def test_all_clocks_of_a_gpu(capsys: Capture) -> None:
    common = ["model", "digits", "--batch", "1", "5", "--dtype", "fp16", "--rounds", "3"]
    kinds = ["--peers", "torch", "fused", "nchw"]
    assert main([*common, *kinds, "--input", "float", "uint8", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["clock"] for row in rows} == {"cold", "graph", "host"}
    shown = ("problem", "batch", "contestant", "clock", "max_error", "note")
    for row in rows:
        assert row["median_us"] is not None, [row[key] for key in shown]
        assert (row["enqueue_us"] is not None) == (row["clock"] == "host")
