"""The bench verbs: two devices compared, and nothing timed that does not match."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from alexnet_triton.bench import env
from alexnet_triton.bench.__main__ import main
from alexnet_triton.engine.pipeline import Pipeline


def test_pipeline_rows_match_and_are_timed(
    device: torch.device, capsys: pytest.CaptureFixture[str]
) -> None:
    places = [str(device)] * 2
    common = ["--devices", *places, "--batch", "6", "--micro-batch", "4", "--repeats", "2"]
    status = main(["pipeline", "digits", "--weights", "digits", *common, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert status == 0
    rows = {row["way"]: row for row in found["rows"]}
    assert set(rows) == {"one device", "half the batch", "pipeline", "towers"}
    for row in rows.values():
        assert row["difference"] < 1e-2
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["images_per_second"] == pytest.approx(6e3 / row["median_ms"])
    assert found["environment"]["torch"] == torch.__version__


def test_a_way_that_does_not_match_is_not_timed(
    device: torch.device, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Pipeline.run

    def wrong(self: Pipeline, *arguments: object) -> dict[str, torch.Tensor]:
        found = run(self, *arguments)  # type: ignore[arg-type]
        return {name: output + 1 for name, output in found.items()}

    monkeypatch.setattr(Pipeline, "run", wrong)
    places = [str(device)] * 2
    common = ["--devices", *places, "--batch", "2", "--micro-batch", "2", "--repeats", "1"]
    assert main(["pipeline", "digits", "--weights", "digits", *common]) == 1
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if line.startswith("pipeline"))
    assert "NO MATCH, so not timed" in line


@pytest.mark.parametrize(
    ("ends", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "alexnet-triton-bench: interrupted\n"),
        (
            OSError(28, "No space left"),
            1,
            "alexnet-triton-bench: error: [Errno 28] No space left\n",
        ),
    ],
    ids=["interrupt", "full"],
)
def test_what_ends_a_verb_is_one_line(
    ends: BaseException,
    status: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(options: object) -> int:
        raise ends

    monkeypatch.setattr(env, "run", run)
    assert main(["env"]) == status
    assert capsys.readouterr().err == said


def test_refusals_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pipeline", "lenet"]) == 1
    assert "error: unknown network 'lenet'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["model", "--predict", "h200", "--batch", "1", "--json"],
        ["report"],
        ["tune", "--simulate"],
        ["compare", "b.json"],
    ],
)
def test_a_file_that_is_not_there_is_one_line(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = str(tmp_path / "no folder" / "a.json")
    assert main([*arguments, missing]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "no such file" in line.lower()
