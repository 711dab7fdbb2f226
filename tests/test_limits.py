"""Occupancy and waves by arithmetic, against what NVIDIA's occupancy calculator answers."""

from __future__ import annotations

import pytest
from alexnet_triton.bench.inspect.limits import (
    GPUS,
    LIMITS,
    OF_A_WARP,
    RESERVED,
    find_arch,
    waves,
)
from alexnet_triton.engine import EngineError
from alexnet_triton.engine.devices.cards import CARDS
from alexnet_triton.kernels.cost import CHIPS
from alexnet_triton.kernels.driver import KIB, REGISTERS, SHARED_MEMORY
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "blocks", "limited_by"),
    [
        (90, 32, 0, 4, 16, ("registers", "warps")),  # full: 64 warps of 32 registers a thread
        (90, 33, 0, 4, 12, ("registers",)),  # 40 after rounding: 12 warps a scheduler
        (90, 16, 0, 1, 32, ("blocks",)),  # 32 blocks, whatever they are
        (90, 154, 147_480, 8, 1, ("registers", "shared memory")),
        (90, 64, 73_752, 4, 3, ("shared memory",)),  # with 1 KiB of the driver's each
        (90, 64, 232_448, 4, 1, ("shared memory",)),
        (90, 64, 232_449, 4, 0, ("shared memory",)),
        (80, 64, 166_912, 4, 1, ("shared memory",)),
        (86, 64, 101_376, 4, 1, ("shared memory",)),
        (86, 32, 0, 8, 6, ("warps",)),  # 1,536 threads
        (90, 255, 0, 16, 0, ("registers",)),
        (90, 256, 0, 4, 0, ("registers",)),
        (90, 0, 0, 4, 16, ("warps",)),  # no registers are no limit
        (90, 168, 0, 12, 1, ("registers",)),
        (90, 176, 0, 12, 0, ("registers",)),  # 65,536 registers in all, and 67,584 wanted
    ],
)
def test_what_runs_out_first(
    arch: int, registers: int, shared: int, warps: int, blocks: int, limited_by: object
) -> None:
    held = LIMITS[arch].occupancy(registers, shared, warps)
    assert (held.blocks, held.limited_by) == (blocks, limited_by)
    assert held.warps == blocks * warps
    assert held.share == held.warps / LIMITS[arch].warps


def test_accumulators_in_tensor_memory_count() -> None:
    held = LIMITS[100].occupancy(60, 16_384, 4, tensor_memory=256)
    assert (held.blocks, held.limited_by) == (2, ("tensor memory",))


@given(
    st.sampled_from(sorted(LIMITS)),
    st.integers(1, 255),
    st.integers(0, 240_000),
    st.integers(1, 16),
)
def test_what_is_held_fits(arch: int, registers: int, shared: int, warps: int) -> None:
    """No resource is handed out twice, and one more block would not fit."""
    limits = LIMITS[arch]
    held = limits.occupancy(registers, shared, warps).blocks
    per_block = shared + RESERVED
    room, threads = limits.shared_per_block + RESERVED, warps * OF_A_WARP
    assert held * threads * registers <= REGISTERS
    assert held * per_block <= room or held == 0
    assert held * warps <= limits.warps
    assert held <= limits.blocks
    if shared <= limits.shared_per_block:
        rounding = 128, 256 + 3 * threads * registers
        assert (
            (held + 1) * (per_block + rounding[0]) > room
            or (held + 1) * (threads * registers + warps * rounding[1]) > REGISTERS
            or (held + 1) * warps > limits.warps
            or held + 1 > limits.blocks
        )


def test_waves_and_their_tail() -> None:
    passed = waves(132 * 2 + 1, 1, 132)
    assert passed is not None
    assert passed.places == 132
    assert passed.waves == pytest.approx(265 / 132)
    assert passed.full == pytest.approx(265 / 396)  # the third wave is one block
    whole = waves(132 * 4, 2, 132)
    assert whole is not None
    assert (whole.waves, whole.full) == (2, 1)
    assert waves(100, 0, 132) is None


def test_names_of_architectures() -> None:
    assert find_arch("sm_90") == find_arch("90") == 90
    for name in ("sm_70", "sm_big"):
        with pytest.raises(EngineError, match=rf"wanted one of .*sm_90.*, got '{name}'"):
            find_arch(name)


def test_cards_agree_with_the_engines() -> None:
    """Rates and multiprocessors stand in two tables; they speak of the same cards."""
    for key, card in CARDS.items():
        assert GPUS[key].arch == card.arch
        assert GPUS[key].multiprocessors == CHIPS[card.name].multiprocessors
        assert SHARED_MEMORY[card.arch] + KIB == CHIPS[card.name].shared_memory
        assert card.memory == CHIPS[card.name].memory
