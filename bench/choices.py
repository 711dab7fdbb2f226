"""What a user chooses among by name, apart from what it stands for.

Nothing here imports torch or Triton, so `--help` can list the choices without waiting for them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ..engine.devices import cards
from ..engine.devices.cards import Gpu

Clock = Literal["cold", "graph", "host"]

CLOCKS: dict[str, tuple[Clock, ...]] = {"cuda": ("cold", "graph", "host"), "cpu": ("host",)}
"""The clocks of each type of device."""

KINDS = {
    "torch": "torch's own calls, channels last",
    "fused": "cuDNN's and cuBLAS's fused calls",
    "nchw": "channels first, a straw man",
    "compile": "torch.compile, max-autotune",
    "frontend": "cuDNN's graph API, its plans timed",
}
"""Kinds of peers, as `--peers` names them."""

INPUTS = ("float", "uint8")
"""What a network is given: normalised images, or pixels."""

SCENARIOS = ("single-stream", "offline")
"""MLPerf's, of a whole network."""

STRATEGIES = ("exhaustive", "random", "local")
"""In which order a search tries configurations."""

CACHE = Path("searches.jsonl")
"""Where a search keeps its trials unless it is told."""

PHASES = {
    "tests": 2.0,
    "roofs": 0.3,
    "tune": 5.0,
    "order": 1.5,
    "model": 2.0,
    "layers": 4.0,
    "compile": 2.5,
}
"""What a round does, in this order, and each one's part of the time beside the others' parts."""

ARCHS = "sm_80,sm_90,sm_100"

FORMS = {"sass": "the machine code", "ptx": "the PTX", "ttgir": "Triton's GPU IR"}
"""Forms of a kernel's code that can be written out, as attributes of Binary."""

# The engine's cards, and two that kernels are only inspected for. Multiprocessors from the
# whitepapers of NVIDIA Turing and AMD CDNA3. Of one architecture, the first is assumed.
GPUS = {
    "t4": Gpu("T4", 75, 40),
    **cards.GPUS,
    "mi300x": Gpu("Instinct MI300X", "gfx942", 304),
}
