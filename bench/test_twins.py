"""`pytest bench --benchmark-json out.json`: the main rows by pytest-benchmark; twins.py has them.

pytest names this file after the folder that the checkout lies in. Relative imports would then make
a second package of that name, so the modules are asked for by the name that everyone else uses.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    find_spec("pytest_benchmark") is None, reason="needs pytest-benchmark"
)


def room(name: str) -> Any:
    """A module of the package."""
    return import_module(f"alexnet_triton.{name}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a twin, for the GPU if there is one."""
    device = room("engine.load").resolve(None)
    metafunc.parametrize("device", [device], ids=str)
    metafunc.parametrize("twin", list(room("bench.measure.twins").twins(device)), ids=str)


def test_twin(twin: Any, device: Any, benchmark: Any) -> None:
    """Right, then timed."""
    if device.type == "cpu" and (problem := room("kernels.jit").interpreter_problem()):
        pytest.skip(problem)
    assert room("bench.measure.twins").benchmarked(twin, device, benchmark).matched
