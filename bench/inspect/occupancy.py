"""How many blocks a multiprocessor holds at once, what keeps it from more, and how a grid fills a
card.

Arithmetic alone: the rules of NVIDIA's CUDA Occupancy Calculator, on the table of `limits.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from .limits import Limits


@dataclass(frozen=True, slots=True)
class Occupancy:
    """Blocks and warps resident on one multiprocessor; no block if it cannot be launched."""

    blocks: int
    warps: int
    share: float  # of the warps that there could be
    limited_by: tuple[str, ...]  # what runs out first; several if they run out together


@dataclass(frozen=True, slots=True)
class Waves:
    """A grid on a card: every multiprocessor takes its blocks, then the next, until none is left.

    `full` is how much of the places in all waves is used, if all blocks take equally long.
    """

    blocks: int
    places: int  # blocks that run at once
    waves: float
    full: float


def occupancy(
    limits: Limits, registers: int, shared: int, warps: int, tensor_memory: int = 0
) -> Occupancy:
    """Of blocks with `warps` warps, `registers` a thread, `shared` bytes and columns of tensor
    memory."""
    fits = {
        "registers": blocks_by_registers(limits, registers, warps),
        "shared memory": _by_shared(limits, shared),
        "tensor memory": limits.tensor_memory // tensor_memory if tensor_memory else None,
        "warps": limits.warps // warps if warps <= limits.warps_per_block else 0,
        "blocks": limits.blocks,
    }
    counts = {name: count for name, count in fits.items() if count is not None}
    blocks = min(counts.values())
    runs_out = tuple(name for name, count in counts.items() if count == blocks)
    return Occupancy(blocks, blocks * warps, blocks * warps / limits.warps, runs_out)


def waves(grid: int, per_multiprocessor: int, multiprocessors: int) -> Waves | None:
    """How `grid` blocks pass through a card; None where none of them can run."""
    places = per_multiprocessor * multiprocessors
    if not places or not grid:
        return None
    return Waves(grid, places, grid / places, grid / (-(-grid // places) * places))


def blocks_by_registers(limits: Limits, registers: int, warps: int) -> int | None:
    """Blocks whose registers a multiprocessor has; None if they take none.

    Registers are rounded up per warp, and each partition has its own: warps do not straddle them.
    """
    if not registers:
        return None
    if registers > limits.registers_per_thread:
        return 0
    each = _rounded(registers * limits.threads_per_warp, limits.register_unit)
    if each * _rounded(warps, limits.partitions) > limits.registers:
        return 0
    return limits.registers // limits.partitions // each * limits.partitions // warps


def _by_shared(limits: Limits, shared: int) -> int | None:
    each = _rounded(shared + limits.shared_reserved, limits.shared_unit)
    if shared > limits.shared_per_block:
        return 0
    return limits.shared // each if each else None


def _rounded(count: int, unit: int) -> int:
    return -(-count // unit) * unit
