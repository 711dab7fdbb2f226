"""What a measurement or a bug report must say about where it was made."""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from .records import DeviceState

PACKAGES = ("torch", "triton", "numpy", "pillow", "safetensors")
GPU = (
    "name",
    "driver_version",
    "memory.total",
    "clocks.max.sm",
    "clocks.sm",
    "power.limit",
    "power.draw",
)
"""What nvidia-smi is asked."""

LIMITS = {
    0x02: "applications' clocks",
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x10: "sync boost",
    0x20: "heat",
    0x40: "heat, by hardware",
    0x80: "power brake",
    0x100: "display clock",
}
"""What may hold a GPU's clocks down, by NVML's bits (nvml.h, nvmlClocksEventReason); not idling."""


def environment(device: torch.device | None) -> dict[str, str | None]:
    """Date, commit, machine, versions, and `device` if it is a GPU; None for what is not here."""
    facts: dict[str, str | None] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "system": _system(),
        "python": platform.python_version(),
        "cpu": _cpu(),
        "cores": str(os.cpu_count()),
    }
    facts["alexnet-triton"] = __version__
    facts |= {name: _version(name) for name in PACKAGES}
    facts["cuda"] = torch.version.cuda
    facts["cudnn"] = str(torch.backends.cudnn.version() or "") or None
    gpu = dict.fromkeys(GPU) if device is None or device.type != "cuda" else _gpu(device)
    return facts | {f"gpu {field}": value for field, value in gpu.items()}


def _gpu(device: torch.device) -> dict[str, str | None]:
    """What the driver says of this GPU, by its UUID: its own numbers are not CUDA's."""
    here = torch.cuda.get_device_properties(device)
    query = f"--query-gpu={','.join(GPU)}", "--format=csv,noheader"
    answer = _ask("nvidia-smi", f"--id=GPU-{here.uuid}", *query)
    fields = (answer or "").split(", ")
    if len(fields) != len(GPU):
        return dict.fromkeys(GPU) | {"name": here.name}
    return dict(zip(GPU, fields, strict=True))


@functools.cache
def gauge(device: torch.device | None) -> Callable[[], DeviceState]:
    """What reads the state of this very device, in about a millisecond, by the driver's NVML."""
    try:
        if device is None or device.type != "cuda":
            raise RuntimeError(f"a {device.type}" if device else "nobody read it")
        nvml, handle = ctypes.CDLL("libnvidia-ml.so.1"), ctypes.c_void_p()
        name = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
        if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle)):
            raise RuntimeError("NVML does not know the device")
    except Exception as error:  # no driver: measured all the same
        unknown = DeviceState(throttled=f"not known: {error}")
        return lambda: unknown
    return functools.partial(_read, nvml, handle)


def _read(nvml: Any, handle: ctypes.c_void_p) -> DeviceState:
    def ask(what: str, *which: int) -> int:
        found = ctypes.c_ulonglong()
        if status := getattr(nvml, f"nvmlDeviceGet{what}")(handle, *which, ctypes.byref(found)):
            raise RuntimeError(f"NVML gives no {what}, status {status}")
        return found.value

    try:
        limits = ask("CurrentClocksThrottleReasons")
        return DeviceState(
            ask("ClockInfo", 1),  # of the multiprocessors
            ask("PowerUsage") / 1e3,
            ask("Temperature", 0),  # of the chip
            "; ".join(words for bit, words in LIMITS.items() if limits & bit),
        )
    except (AttributeError, RuntimeError) as error:  # a driver of another day, or a bad moment
        return DeviceState(throttled=f"not known: {error}")


def together(states: Sequence[DeviceState]) -> DeviceState:
    """Medians of what was read, and everything that ever held the clocks down."""

    def median(name: str) -> float | None:
        known = [value for state in states if (value := getattr(state, name)) is not None]
        return statistics.median(known) if known else None

    limits = dict.fromkeys(each for state in states for each in state.throttled.split("; "))
    words = "; ".join(filter(None, limits))
    return DeviceState(median("sm_mhz"), median("watts"), median("celsius"), words)


def _commit() -> str | None:
    """The checkout's commit, with a `+` if files differ from it; None outside a checkout."""
    root = str(Path(__file__).resolve().parent.parent)
    if _ask("git", "-C", root, "rev-parse", "--show-toplevel") != root:
        return None
    commit = _ask("git", "-C", root, "rev-parse", "--short=12", "HEAD")
    changed = _ask("git", "-C", root, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}+" if commit and changed else commit


def _system() -> str:
    """System, version of its kernel, architecture and C library; no name that somebody gave."""
    kernel = platform.release().split("-")[0]
    library = "-".join(platform.libc_ver())
    return " ".join([platform.system(), kernel, platform.machine(), library]).strip("- ")


def _cpu() -> str | None:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor() or None
    names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
    return names[0].split(":", 1)[1].strip() if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _ask(*command: str) -> str | None:
    """What a command prints, None if it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


# --- the verb --------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    """Print the environment, with the GPU that torch would use."""
    facts = environment(torch.device("cuda") if torch.cuda.is_available() else None)
    if options.json:
        print(json.dumps(facts, indent=2))
    else:
        for name, value in facts.items():
            print(f"{name:<20} {'-' if value is None else value}")
    return 0
