"""Split sums: whoever arrives last adds the parts, in their order, and leaves its counter at zero.

The interpreter runs one program after the other, so what it can show is that the order in which
they arrive does not matter; that the parts are visible to the last is in the machine code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import torch
from alexnet_triton.bench.inspect.compiled import compile_for
from alexnet_triton.bench.inspect.machine_code import opcodes
from alexnet_triton.engine import foretell
from alexnet_triton.kernels import conv, gemm, layout
from alexnet_triton.kernels.conv import Conv2dConfig, Conv2dShape
from alexnet_triton.kernels.gemm import LinearConfig
from alexnet_triton.kernels.jit import Launch
from alexnet_triton.kernels.split_k import filled
from hypothesis import given
from hypothesis import strategies as st
from triton.runtime.interpreter import interpreter_builder

SHAPE = Conv2dShape(5, 24, 3, 4, 40, 2, 2, padding=(1, 0, 1, 0))
SPLITS: dict[str, Conv2dConfig | LinearConfig] = {
    "pixels": Conv2dConfig("pixels", 32, 32, 16, SPLIT_K=4),
    "rows": Conv2dConfig("rows", 32, 32, 16, SPLIT_K=4),
    "linear": LinearConfig(16, 32, 16, SPLIT_K=4),
    "transposed": LinearConfig(16, 32, 16, SPLIT_K=4, transposed=True),
}


def split(config: Conv2dConfig | LinearConfig, generator: torch.Generator) -> Launch:
    """A convolution of SHAPE, or the linear layer over all of its input."""

    def random(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator)

    x = layout.pack(random(5, 24, 3, 4))
    if isinstance(config, Conv2dConfig):
        weight = conv.pack_weight(random(40, 24, 2, 2))
        out = layout.empty(3, 4, 5, 40, torch.float32, "cpu")
        return conv.conv2d(x, weight, random(40), out, SHAPE, config, "relu")
    weight = gemm.pack_weight(random(40, 288), 12)
    out = layout.empty(1, 1, 5, 40, torch.float32, "cpu")
    return gemm.linear(x, weight, random(40), out, config, "relu")


@pytest.fixture
def shuffled(monkeypatch: pytest.MonkeyPatch) -> Callable[[Launch, int], None]:
    """Run a launch with its programs in a random order."""
    place = interpreter_builder.set_grid_idx

    def run(launch: Launch, seed: int) -> None:
        programs = list(product(*map(range, launch.grid)))
        order = torch.randperm(len(programs), generator=torch.Generator().manual_seed(seed))
        turn = dict(zip(programs, (programs[i] for i in order.tolist()), strict=True))
        with monkeypatch.context() as patch:
            patch.setattr(
                interpreter_builder, "set_grid_idx", lambda x, y, z: place(*turn[x, y], z)
            )
            launch()

    return run


@pytest.mark.interpreter
@pytest.mark.parametrize("name", SPLITS)
def test_the_order_of_arrival_does_not_matter(
    name: str, shuffled: Callable[[Launch, int], None], generator: torch.Generator
) -> None:
    launch = split(SPLITS[name], generator)
    assert launch.grid[1] == 4
    out, parts, counters = (launch.arguments[key] for key in ("y", "parts", "counters"))
    assert len(counters) == launch.grid[0]
    launch()
    first = out.clone()
    assert first.isfinite().all()
    for seed in range(10):
        out.fill_(torch.nan)
        parts.fill_(torch.nan)
        shuffled(launch, seed)
        assert torch.equal(out, first), f"order {seed}"
        assert not counters.any(), "the next launch would count on"


@pytest.mark.interpreter
def test_a_run_that_breaks_off_leaves_no_count(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    launch = split(SPLITS["linear"], generator)
    launch()
    first = launch.arguments["y"].clone()
    place = interpreter_builder.set_grid_idx

    def interrupted(x: int, y: int, z: int) -> None:
        if (x, y) == (0, 2):
            raise KeyboardInterrupt
        place(x, y, z)

    with monkeypatch.context() as patch:
        patch.setattr(interpreter_builder, "set_grid_idx", interrupted)
        with pytest.raises(KeyboardInterrupt):
            launch()
    launch.arguments["y"].fill_(torch.nan)
    launch()
    assert torch.equal(launch.arguments["y"], first)


@pytest.mark.interpreter
def test_what_foretells_a_run_leaves_no_count(generator: torch.Generator) -> None:
    launch = split(SPLITS["rows"], generator)
    foretell.say([launch], "a split sum")
    assert not launch.arguments["counters"].any()


@pytest.mark.interpreter
def test_a_sum_in_one_part_has_no_counters(generator: torch.Generator) -> None:
    x, weight = torch.zeros(1, 1, 5, 16), torch.zeros(1, 24, 16)
    out = torch.zeros(1, 1, 5, 24)
    launch = gemm.linear(x, weight, None, out, LinearConfig(16, 32, 16, SPLIT_K=8))
    assert launch.grid[1] == 1, "there is one step of K to split"
    assert launch.arguments["parts"] is launch.arguments["counters"] is None


@given(st.integers(1, 40), st.integers(1, 400))
def test_every_part_has_something_to_add(wanted: int, steps: int) -> None:
    parts = filled(wanted, steps)
    length = -(-steps // parts)
    assert 1 <= parts <= wanted
    assert (parts - 1) * length < steps <= parts * length


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("name", SPLITS)
def test_parts_are_visible_before_they_are_added(
    name: str, arch: int, generator: torch.Generator
) -> None:
    """In the order of the machine code: barrier, fence, atomic, and loads past the L1 cache."""
    wide = replace(SPLITS[name], BLOCK_M=64, BLOCK_N=64, descriptors=False)
    launch = split(wide, generator)
    binary = compile_for(launch, arch)
    order = opcodes(binary.sass)
    atomic = next(i for i, name in enumerate(order) if name in ("ATOMG", "ATOM"))
    before, after = order[:atomic], order[atomic:]
    assert "STG" in before
    assert "MEMBAR" in before
    assert before.index("STG") < len(before) - before[::-1].index("BAR")
    assert "LDG" in after
    assert "STRONG" in binary.sass
