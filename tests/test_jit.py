"""One source, two ways to run it: what a `Kernel` and a `Launch` promise."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
import triton.language as tl
from alexnet_triton.bench.inspect.compiled import compile_for
from alexnet_triton.kernels import conv, gemm, layout
from alexnet_triton.kernels.jit import Kernel, Launch, jit, power_of_two
from alexnet_triton.kernels.pdl import overlapping
from alexnet_triton.kernels.product import product, tf32
from hypothesis import given
from hypothesis import strategies as st
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import interpreter_builder
from triton.tools.tensor_descriptor import TensorDescriptor

BLOCK = 64

each_device = pytest.mark.parametrize(
    "place",
    [
        pytest.param("cpu", marks=pytest.mark.interpreter),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)


@jit
def _square(value):  # type: ignore[no-untyped-def]
    return value * value


@jit
def _cubic(value, offset):  # type: ignore[no-untyped-def]
    """A device function that calls another, with an argument that may be None."""
    cube = _square(value) * value
    if offset is not None:
        cube += offset
    return cube


@jit(do_not_specialize=("N",))  # type: ignore[untyped-decorator]
def _cubic_kernel(x, offset, y, N, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + index, mask=index < N, other=0.0)
    tl.store(y + index, _cubic(value, offset), mask=index < N)


@jit
def _copy_kernel(source, y, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(y + tl.arange(0, BLOCK), source.load([0]))


def cubic(x: torch.Tensor, y: torch.Tensor, offset: float | None = None) -> Launch:
    """y = x³ + offset"""
    arguments = {"x": x, "offset": offset, "y": y, "N": len(x), "BLOCK": BLOCK}
    return Launch(_cubic_kernel, (-(-len(x) // BLOCK),), arguments, num_warps=4, num_stages=1)


# Launch


@each_device
@pytest.mark.parametrize("offset", [None, 0.5])
@pytest.mark.parametrize("size", [1, BLOCK, 5 * BLOCK - 3])
def test_a_launch_runs_where_its_tensors_are(place: str, size: int, offset: float | None) -> None:
    """Through a device function in a device function."""
    x = torch.linspace(-1, 1, size, device=place)
    y = torch.full_like(x, torch.nan)
    launch = cubic(x, y, offset)
    assert launch.device == x.device
    launch()
    assert torch.allclose(y, x**3 + (offset or 0.0), atol=1e-6)


@each_device
def test_a_launch_knows_its_device_from_a_descriptor(place: str) -> None:
    x = torch.arange(BLOCK, dtype=torch.float32, device=place)
    y = torch.full_like(x, torch.nan)
    source = TensorDescriptor(x, [BLOCK], [1], [BLOCK])
    arguments = {"source": source, "y": y, "BLOCK": BLOCK}
    launch = Launch(_copy_kernel, (1,), arguments, num_warps=4, num_stages=1)
    assert replace(launch, arguments={"source": source}).device == x.device
    launch()
    assert torch.equal(y, x)


def test_a_launch_without_tensors_is_refused() -> None:
    launch = Launch(_cubic_kernel, (1,), {"x": 1}, num_warps=4, num_stages=1)
    with pytest.raises(ValueError, match="_cubic_kernel: no tensor among its arguments"):
        launch()


@pytest.mark.interpreter
def test_nothing_runs_on_an_empty_grid() -> None:
    cubic(torch.empty(0), torch.empty(0))()


@pytest.mark.interpreter
def test_launches_from_four_threads() -> None:
    """The interpreter patches `triton.language` while it runs, so only one may at a time."""

    def task(seed: int) -> bool:
        x = torch.randn(3 * BLOCK + seed, generator=torch.Generator().manual_seed(seed))
        y = torch.full_like(x, torch.nan)
        cubic(x, y, float(seed))()
        return torch.allclose(y, x**3 + seed, atol=1e-5)

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(task, range(32)))


@pytest.mark.interpreter
def test_a_failed_launch_leaves_no_trace() -> None:
    x, y = torch.ones(3), torch.zeros(3)
    good = cubic(x, y)
    before = interpreter_builder.create_dot
    with pytest.raises(InterpreterError):
        replace(good, arguments=good.arguments | {"y": 7})()
    assert interpreter_builder.create_dot == before
    good()
    assert interpreter_builder.create_dot == before
    assert y.tolist() == [1.0] * 3


# Launches of the kernels that multiply


def multiplied(generator: torch.Generator, precision: str, tiling: str | None = None) -> Launch:
    """A convolution, or without a `tiling` a linear layer, whose sum is one step of K."""
    x = torch.randn(5, 40, 3, 3, generator=generator)
    weight = torch.randn(24, 40, 1, 1, generator=generator)
    out = layout.empty(3, 3, 5, 24, torch.float32, "cpu").fill_(torch.nan)
    if tiling:
        shape = conv.Conv2dShape(5, 40, 3, 3, 24, 1, 1)
        wide = conv.Conv2dConfig(tiling, 16, 32, 64)  # type: ignore[arg-type]
        arguments = (layout.pack(x), conv.pack_weight(weight), None, out, shape, wide)
        launch = conv.conv2d(*arguments, precision=precision)
    else:
        rows, packed = layout.pack(x)[:1, :1], gemm.pack_weight(weight.flatten(1), 1)
        cut = gemm.LinearConfig(16, 32, 64, descriptors=False)
        launch = gemm.linear(rows, packed, None, out[:1, :1], cut, precision=precision)
    return launch


@pytest.mark.interpreter
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_factors_have_the_precision_that_is_asked_for(
    precision: str, generator: torch.Generator
) -> None:
    launch = multiplied(generator, precision)
    launch()
    made = launch.arguments["y"][0, 0]
    factors = [launch.arguments[name].reshape(-1, 40).numpy() for name in ("x", "w")]
    x, w = (tf32(each) if precision == "tf32" else each for each in factors)
    assert np.array_equal(made.numpy(), product(x, w.T, np.zeros((5, 24), np.float32)))
    exact = torch.from_numpy(x).double() @ torch.from_numpy(w).double().T
    assert torch.allclose(made.double(), exact, rtol=2.0**-23, atol=0.0)


@pytest.mark.parametrize("tiling", [None, "rows", "pixels"])
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_a_gpu_gets_the_factors_of_tf32_as_they_are(
    tiling: str | None, arch: int, generator: torch.Generator
) -> None:
    """Which is why the interpreter cuts off their lower bits: nothing in the code rounds them."""
    launch = multiplied(generator, "tf32", tiling)
    ptx = compile_for(launch, arch).ptx
    assert "tf32" in ptx
    assert not re.findall(r"cvt[.\w]*tf32", ptx)


@pytest.mark.interpreter
@pytest.mark.parametrize("tiling", [None, "rows", "pixels"])
def test_a_launch_that_overlaps_is_interpreted_as_one_that_does_not(
    tiling: str | None, generator: torch.Generator
) -> None:
    launch = multiplied(generator, "ieee", tiling)
    launch()
    alone = launch.arguments["y"].clone()
    ahead = overlapping(launch)
    launch.arguments["y"].fill_(torch.nan)
    ahead()
    assert torch.equal(launch.arguments["y"], alone)
    assert ahead.pdl
    assert ahead.arguments["PDL"]


# Kernel


def test_a_kernel_keeps_its_name_and_what_it_must_not_specialize() -> None:
    assert isinstance(_cubic_kernel, Kernel)
    assert _cubic_kernel.__name__ == "_cubic_kernel"
    assert [p.name for p in _cubic_kernel.params if p.do_not_specialize] == ["N"]
    assert not any(p.do_not_specialize for p in _copy_kernel.params)


IN_AN_INTERPRETING_PROCESS = """
import torch
from alexnet_triton.bench.inspect.compiled import compile_for
from alexnet_triton.kernels import conv, layout

shape = conv.Conv2dShape(16, 16, 2, 2, 16, 2, 2, padding=(1, 1, 1, 1))
x, weight = torch.randn(16, 16, 2, 2), torch.randn(16, 16, 2, 2)
out = layout.empty(shape.OH, shape.OW, 16, 16, torch.float32, "cpu")
config = conv.Conv2dConfig("rows", 16, 16, 16)
launch = conv.conv2d(layout.pack(x), conv.pack_weight(weight), None, out, shape, config)
launch()
wanted = conv.reference(x, weight, None, shape)
assert torch.allclose(layout.unpack(out).double(), wanted, rtol=1e-4, atol=1e-4)
assert compile_for(launch, 90).registers > 0
"""


@pytest.mark.interpreter
def test_the_switch_of_triton_for_the_whole_process_changes_nothing() -> None:
    """Kernels still run, and still compile, where the environment says to interpret all."""
    run = subprocess.run(
        [sys.executable, "-c", IN_AN_INTERPRETING_PROCESS],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr


# The small things


@given(
    st.integers(0, 10**6) | st.integers(0, 16).map(lambda n: 2**n),
    st.integers(0, 12),
    st.integers(0, 12),
)
def test_power_of_two(size: int, low: int, span: int) -> None:
    least, most = 2**low, 2 ** (low + span)
    result = power_of_two(size, least, most)
    assert result.bit_count() == 1
    assert least <= result <= most
    assert result >= min(size, most)
    assert result == least or result // 2 < size
