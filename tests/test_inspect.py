"""Machine code for GPUs that are not here: the right instructions, and faults that show."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from alexnet_triton.bench.inspect import compile_for
from alexnet_triton.kernels import conv, layout
from alexnet_triton.kernels.conv import Conv2dConfig, Conv2dShape
from alexnet_triton.kernels.jit import Launch

SHAPE = Conv2dShape(128, 64, 4, 4, 64, 3, 3, padding=(1, 1, 1, 1))


def launch(config: Conv2dConfig) -> Launch:
    """The convolution of SHAPE in half precision, bound to tensors on the CPU."""
    (made,) = conv.conv2d(
        layout.empty(SHAPE.H, SHAPE.W, SHAPE.N, SHAPE.C, torch.float16, "cpu"),
        conv.pack_weight(torch.zeros(SHAPE.OC, SHAPE.C, SHAPE.KH, SHAPE.KW, dtype=torch.float16)),
        torch.zeros(SHAPE.OC, dtype=torch.float16),
        layout.empty(SHAPE.OH, SHAPE.OW, SHAPE.N, SHAPE.OC, torch.float16, "cpu"),
        SHAPE,
        config,
        "relu",
    )
    return made


@pytest.mark.parametrize(
    ("arch", "product", "load"),
    [(80, "HMMA", "LDGSTS"), (90, "HGMMA", "UTMALDG"), (100, "UTCHMMA", "UTMALDG")],
)
def test_each_architecture_gets_its_own_instructions(arch: int, product: str, load: str) -> None:
    """Matrix products, and loads that go to shared memory without passing registers."""
    binary = compile_for(launch(conv.default_config(SHAPE, torch.float16, "ieee", arch)), arch)
    assert binary.arch == arch
    assert binary.kernel == "_conv2d_images_kernel"
    assert binary.instructions[product] > 0
    assert binary.instructions[load] > 0
    assert 0 < binary.registers <= 255
    assert binary.shared > 0
    assert binary.fits
    assert binary.spills == 0
    assert f"sm_{arch}" in binary.ptx
    assert "tt.func" in binary.ttgir


def test_registers_that_do_not_fit_show() -> None:
    """Four warps cannot hold 128x256 sums: 256 registers a thread for these alone."""
    binary = compile_for(launch(Conv2dConfig("images", 128, 256, 32, 4, 3, descriptors=False)), 80)
    assert binary.spills > 0
    assert binary.stack > 0


def test_shared_memory_that_does_not_exist_shows() -> None:
    config = Conv2dConfig("images", 128, 64, 64, 4, 4, descriptors=False)
    assert compile_for(launch(config), 80).fits
    binary = compile_for(launch(replace(config, num_stages=8)), 80)
    assert binary.shared > 166_912
    assert not binary.fits


@pytest.mark.interpreter
def test_compiling_between_two_runs(generator: torch.Generator) -> None:
    """Interpreting leaves nothing behind that a compiler would meet, nor the other way about."""
    shape = Conv2dShape(16, 16, 1, 1, 16, 1, 1)
    x = torch.randn(16, 16, 1, 1, generator=generator)
    weight = torch.randn(16, 16, 1, 1, generator=generator)
    out = layout.empty(1, 1, 16, 16, torch.float32, "cpu").fill_(torch.nan)
    config = Conv2dConfig("pixels", 16, 16, 16)
    (bound,) = conv.conv2d(layout.pack(x), conv.pack_weight(weight), None, out, shape, config)
    wanted = conv.reference(x, weight, None, shape)
    for _ in range(2):
        bound()
        assert torch.allclose(layout.unpack(out).double(), wanted, rtol=1e-4, atol=1e-5)
        out.fill_(torch.nan)
        assert compile_for(bound, 90).registers > 0
        assert out.isnan().all(), "compiling runs nothing"
