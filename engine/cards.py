"""What predictions assume of a GPU: rates, with where they come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Card:
    """Rates of one GPU: FLOP/s by the engine's dtype, memory and link byte/s (one direction)."""

    name: str
    arch: int
    flops: Mapping[str, float]
    memory: float
    link: float


# H200: half-precision products (cuBLAS 8192^3) and a device-to-device copy as measured on one; tf32
# at half of that, fp32 and the link from NVIDIA's datasheet. A100: NVIDIA's datasheet.
CARDS = {
    "h200": Card(
        "H200",
        90,
        {"fp16": 780e12, "bf16": 780e12, "tf32": 390e12, "fp32": 67e12},
        memory=4.3e12,
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
