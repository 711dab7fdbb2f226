"""How fast operands arrive: worked out from two depths, and what a driver refuses is left out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from alexnet_triton.bench.__main__ import main
from alexnet_triton.bench.measure import fill
from alexnet_triton.bench.measure.fill import STEPS, TILES, assumed, fill_of, probe
from alexnet_triton.kernels import cost
from alexnet_triton.kernels.gemm import LinearConfig, LinearShape
from alexnet_triton.kernels.jit import Launch, LaunchRefused


@pytest.mark.parametrize("tile", TILES["cuda"])
def test_the_models_own_times_give_the_models_own_fill(tile: fill.Tile) -> None:
    """Where operands limit it; launch, prologue and the number of programs leave no trace."""
    chip = replace(cost.H200, fill=20)
    product = probe(tile, STEPS[1], "cuda", 90)
    rows, columns = product.arguments["y"].shape[-2:]
    config = LinearConfig(tile[0], tile[1], 64, 1, False, *tile[2:])

    def us(steps: int) -> float:
        shape = LinearShape(rows, steps, 64, columns)
        made = cost.linear_cost(shape, config, torch.float16, "ieee", chip)
        assert made.limit == "operand fill"
        return made.us

    assert fill_of(tile, (us(STEPS[0]), us(STEPS[1])), product, chip) == pytest.approx(20)


def test_a_card_is_known_by_its_drivers_name_and_by_what_was_measured() -> None:
    assert assumed(90, "NVIDIA H100 80GB HBM3") == cost.H100
    assert assumed(90, "another") == cost.H200
    measured = assumed(90, "NVIDIA H200", 80.0)
    assert cost.filled(measured, 10_000) == 80.0
    assert replace(measured, fill=cost.H200.fill, port=cost.H200.port) == cost.H200


@pytest.mark.interpreter
def test_one_tile_that_is_refused_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And one with a wrong answer; all on a CPU, whose rate says nothing."""
    tiles = ((16, 16, 4, 1), (16, 32, 4, 1), (32, 16, 4, 1))
    monkeypatch.setitem(TILES, "cpu", tiles)
    made = fill.probe

    def refusing(tile: fill.Tile, *rest: object) -> Launch:
        if tile == tiles[0]:
            raise LaunchRefused("the driver refuses a descriptor")
        launch = made(tile, *rest)  # type: ignore[arg-type]
        wrong = launch.arguments | {"P": launch.arguments["P"] - 1}
        return replace(launch, arguments=wrong) if tile == tiles[1] else launch

    monkeypatch.setattr(fill, "probe", refusing)
    monkeypatch.setattr(fill, "fill_of", lambda tile, us, launch, chip: 51.0)
    assert main(["fill", "--device", "cpu", "--json", str(tmp_path / "fill.json")]) == 0
    assert json.loads((tmp_path / "fill.json").read_text()) == {
        "fill": 51.0,
        "tiles": {"32x16": 51.0},
    }
    said = capsys.readouterr().err
    assert "16x16 left out" in said
    assert "refuses a descriptor" in said
    assert "NO MATCH" in said
