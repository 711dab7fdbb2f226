"""The same bits whatever kernels BLAS picks for the CPU: the tests marked `bits`, with each set.

OpenBLAS has other kernels for another CPU, which add in another order. OPENBLAS_CORETYPE tells it,
once a process, which CPU to take this one for.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from threadpoolctl import ThreadpoolController

pytestmark = pytest.mark.interpreter

TESTS = Path(__file__).parent
MARK = "bits"

# By core type: what its kernels take of a CPU, in the words of /proc/cpuinfo.
CORE_TYPES = {
    "Haswell": {"avx2", "fma"},
    "Zen": {"avx2", "fma"},
    "Sandybridge": {"avx"},
    "SkylakeX": {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"},
    "Nehalem": {"sse4_2"},
    "Prescott": {"pni"},
}
NAMES = {"Katmai": "Prescott"}  # the oldest of three that have the same kernels

NOT_IT = 99  # no status of pytest's

# numpy's BLAS is asked before a test imports one of its own.
INNER = f"""
import sys
import numpy
import pytest
from threadpoolctl import ThreadpoolController

wanted, *arguments = sys.argv[1:]
libraries = ThreadpoolController().select(user_api="blas").info()
found = [each.get("architecture") for each in libraries]
print("BLAS:", *found)
right = [{NAMES}.get(one, one) for one in found] == [wanted]
sys.exit(pytest.main(arguments) if right else {NOT_IT})
"""


def missing(core_type: str) -> set[str]:
    """What this CPU has not of what the kernels take."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    have = {word for line in lines if line.startswith("flags") for word in line.split()}
    return CORE_TYPES[core_type] - have


@pytest.mark.parametrize("core_type", CORE_TYPES)
def test_equal_bits_with_the_kernels_of(core_type: str, device: torch.device) -> None:
    if lacks := missing(core_type):
        pytest.skip(f"this CPU has no {', '.join(sorted(lacks))}")
    libraries = ThreadpoolController().select(internal_api="openblas").info()
    own = {NAMES.get(each["architecture"], each["architecture"]) for each in libraries}
    if own == {core_type} and device.type == "cpu":
        pytest.skip("the suite itself multiplies with these, and runs the same tests")
    files = [
        str(path)
        for path in sorted(TESTS.glob("test_*.py"))
        if path != Path(__file__) and f"mark.{MARK}" in path.read_text()
    ]
    options = ["-m", MARK, "-q", "--tb=short", "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    environment |= {
        "OPENBLAS_CORETYPE": core_type,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",  # the interpreter is what multiplies by BLAS
    }
    inner = subprocess.run(
        [sys.executable, "-c", INNER, core_type, *options, *files],
        cwd=TESTS.parent,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if inner.returncode == NOT_IT:
        said = inner.stdout.strip().splitlines()[-1]
        pytest.skip(f"numpy's BLAS has no kernels of its own for it; {said}")
    assert inner.returncode == 0, "\n".join(inner.stdout.splitlines()[-30:])
