"""Cards by name: what a plan wants to know of one, and the rates that predictions assume."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Gpu:
    """One card: `arch` is its compute capability, 90 for 9.0."""

    name: str
    arch: int
    multiprocessors: int
    device: str = ""  # its driver's name for it, which its tuned table has


# Multiprocessors from the whitepapers of the architectures: NVIDIA Ampere GA100 and GA102, Hopper,
# Ada, Blackwell (B200: as its driver reports). Of one architecture, the first is assumed.
GPUS = {
    "a100": Gpu("A100", 80, 108, "NVIDIA A100-SXM4-80GB"),
    "h200": Gpu("H200", 90, 132, "NVIDIA H200"),
    "h100": Gpu("H100 SXM", 90, 132, "NVIDIA H100 80GB HBM3"),
    "b200": Gpu("B200", 100, 148, "NVIDIA B200"),
    "rtx3090": Gpu("GeForce RTX 3090", 86, 82, "NVIDIA GeForce RTX 3090"),
    "rtx4090": Gpu("GeForce RTX 4090", 89, 128, "NVIDIA GeForce RTX 4090"),
    "rtx5090": Gpu("GeForce RTX 5090", 120, 170, "NVIDIA GeForce RTX 5090"),
}

TARGETS = f"sm_NN, {', '.join(GPUS)}, or a card by its driver's name"
"""What a user may ask a plan for, in words."""


def find_card(name: str) -> str | None:
    """The key in GPUS of a card by our name or its driver's; None if it is none of them."""
    asked = name.strip().lower()
    names = ((key, (key, gpu.name.lower(), gpu.device.lower())) for key, gpu in GPUS.items())
    return next((key for key, known in names if asked in known), None)


@dataclass(frozen=True, slots=True)
class Card:
    """Rates of one GPU: FLOP/s by the engine's dtype, memory and link byte/s (one direction).

    They are what it reaches at best; kernels/cost.py has what launches are assumed to cost on it.
    """

    name: str
    arch: int
    flops: Mapping[str, float]
    memory: float
    link: float


# H200: half-precision products (cuBLAS 8192^3) and a device-to-device copy as measured on one; tf32
# at half of that, fp32 and the link from NVIDIA's datasheet. H100: the most that was measured on
# one, of memory by pools; the link from the datasheet. A100: NVIDIA's datasheet.
CARDS = {
    "h200": Card(
        "H200",
        90,
        {"fp16": 780e12, "bf16": 780e12, "tf32": 390e12, "fp32": 67e12},
        memory=4.3e12,
        link=450e9,
    ),
    "h100": Card(
        "H100 SXM",
        90,
        {"fp16": 780e12, "bf16": 780e12, "tf32": 370e12, "fp32": 52e12},
        memory=3.0e12,
        link=450e9,
    ),
    "a100": Card(
        "A100 80GB",
        80,
        {"fp16": 312e12, "bf16": 312e12, "tf32": 156e12, "fp32": 19.5e12},
        memory=2.04e12,
        link=300e9,
    ),
}
