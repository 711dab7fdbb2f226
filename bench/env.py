"""What a measurement or a bug report must say about where it was made."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("alexnet-triton", "torch", "triton", "numpy", "pillow", "safetensors")


def environment() -> dict[str, str | None]:
    """Date, commit, machine, versions and GPU; None where there is no such thing here."""
    found: dict[str, str | None] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "system": _system(),
        "python": platform.python_version(),
        "cpu": _cpu(),
        "cores": str(os.cpu_count()),
    }
    found |= {name: _version(name) for name in PACKAGES}
    found["cuda"] = torch.version.cuda
    found["cudnn"] = str(torch.backends.cudnn.version() or "") or None
    fields = "name,driver_version,memory.total,clocks.max.sm,clocks.sm,power.limit,power.draw"
    answer = _ask("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")
    for field, value in zip(
        fields.split(","),
        (answer or "").splitlines()[0].split(", ") if answer else [None] * 7,
        strict=True,
    ):
        found[f"gpu {field}"] = value
    return found


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
    """Print the environment."""
    found = environment()
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        for name, value in found.items():
            print(f"{name:<20} {'-' if value is None else value}")
    return 0
