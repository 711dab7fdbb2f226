"""What a user chooses among by name, apart from what it stands for.

Nothing here imports torch or Triton, so `--help` can list the choices without waiting for them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ..engine.devices.cards import GPUS as GPUS

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
    "fill": 12,
    "first": 38,
    "roofs": 10,
    "tests": 40,
    "short": 160,
    "model": 40,
    "order": 30,
    "layers": 80,
    "more-layers": 120,
    "more-short": 80,
    "more-order": 30,
    "more-model": 90,
    "compile": 230,
    "dtypes": 80,
    "last-layers": 100,
    "climb": 300,
    "last-model": 80,
}
"""What rounds do, in this order, and about how many seconds each may take. A call does as many as
fit, and each gets its part of the time there is."""

ARCHS = "sm_80,sm_90,sm_100"

FORMS = ("sass", "ptx", "ttgir")
"""Forms of a kernel's code that can be printed, as attributes of Binary."""
