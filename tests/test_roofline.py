"""Measured roofs and what follows from them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from alexnet_triton.bench.__main__ import main
from alexnet_triton.bench.measure.roofline import COPY, binds, measure_roofs, roof_us
from alexnet_triton.bench.records import load
from alexnet_triton.engine import EngineError
from alexnet_triton.kernels.jit import Work

ROOFS = {"fp16": 800e12, "fp32": 50e12, COPY: 4e12}


def test_the_slower_of_the_two_makes_the_roof() -> None:
    product = Work(flops=8 * 10**9, bytes=4 * 10**6)  # 10 us of fp16, 1 us of copying
    assert roof_us(product, "fp16", ROOFS) == pytest.approx(10)
    assert roof_us(product, "fp32", ROOFS) == pytest.approx(160)
    assert binds(product, "fp16", ROOFS) == "compute"
    stream = Work(flops=8 * 10**7, bytes=4 * 10**6)  # 0.1 us of fp16, 1.6 us of fp32
    assert roof_us(stream, "fp16", ROOFS) == pytest.approx(1)
    assert binds(stream, "fp16", ROOFS) == "memory"
    assert binds(stream, "fp32", ROOFS) == "compute"


def test_a_roof_that_was_not_measured_is_no_number() -> None:
    with pytest.raises(KeyError, match="bf16"):
        roof_us(Work(1, 1), "bf16", ROOFS)


def test_roofs_of_this_machine_are_plausible_and_kept(device: torch.device, tmp_path: Path) -> None:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    kept = tmp_path / "roofs.json"
    command = ["roofs", "--device", str(device), "--dtype", "fp32", "--json", str(kept)]
    assert main(command) == 0
    found = load(kept).roofs
    assert set(found) == {"fp32", COPY}
    assert 1e8 < found["fp32"] < 1e15
    assert 1e8 < found[COPY] < 1e14
    assert before == (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)


@pytest.mark.gpu
def test_tensor_cores_are_in_the_roofs_of_a_gpu() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    found = measure_roofs(device, ["fp32", "tf32", "fp16", "bf16"], rounds=3)
    assert found["fp16"] > 2 * found["fp32"]
    assert found["tf32"] > found["fp32"]


def test_an_unknown_dtype_is_one_line() -> None:
    with pytest.raises(EngineError, match="dtype: wanted one of fp32, tf32, fp16, bf16, got 'fp8'"):
        measure_roofs(torch.device("cpu"), ["fp8"])
