"""Machine code for GPUs that are not here: the right instructions, and faults that show."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from alexnet_triton.bench.__main__ import parser
from alexnet_triton.bench.inspect import ahead, compiled, inspect
from alexnet_triton.bench.inspect.compiled import compile_for, refusal
from alexnet_triton.bench.inspect.configuration import parse
from alexnet_triton.bench.inspect.limits import LIMITS
from alexnet_triton.bench.inspect.machine_code import KINDS, kind, main_loop, opcodes
from alexnet_triton.bench.worker import Lost
from alexnet_triton.engine import EngineError
from alexnet_triton.engine.devices.planner import Planner
from alexnet_triton.engine.plan import ARITHMETIC
from alexnet_triton.engine.zoo import network
from alexnet_triton.kernels import conv, layout
from alexnet_triton.kernels.conv import Conv2dConfig, Conv2dShape
from alexnet_triton.kernels.jit import Launch

SHAPE = Conv2dShape(128, 64, 4, 4, 64, 3, 3, padding=(1, 1, 1, 1))


def launch(config: Conv2dConfig, shape: Conv2dShape = SHAPE) -> Launch:
    """The convolution of a shape in half precision, bound to tensors on the CPU."""
    return conv.conv2d(
        layout.empty(shape.H, shape.W, shape.N, shape.C, torch.float16, "cpu"),
        conv.pack_weight(torch.zeros(shape.OC, shape.C, shape.KH, shape.KW, dtype=torch.float16)),
        torch.zeros(shape.OC, dtype=torch.float16),
        layout.empty(shape.OH, shape.OW, shape.N, shape.OC, torch.float16, "cpu"),
        shape,
        config,
        "relu",
    )


@pytest.mark.parametrize(
    ("arch", "product", "load"),
    [(80, "HMMA", "LDGSTS"), (90, "HGMMA", "UTMALDG"), (100, "UTCHMMA", "UTMALDG")],
)
def test_each_architecture_gets_its_own_instructions(arch: int, product: str, load: str) -> None:
    """Matrix products, and loads that go to shared memory without passing registers."""
    binary = compile_for(launch(conv.default_config(SHAPE, torch.float16, "ieee", arch)), arch)
    assert binary.arch == arch
    assert binary.kernel == "_conv2d_rows_kernel"
    assert binary.instructions[product] > 0
    assert binary.instructions[load] > 0
    assert 0 < binary.registers <= 255
    assert binary.shared > 0
    assert binary.spills == binary.excess == 0
    assert f"sm_{arch}" in binary.ptx
    assert "tt.func" in binary.ttgir


def test_machine_code_is_disassembled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of equal binaries; another one has its own."""
    binary = compile_for(launch(Conv2dConfig("rows", 64, 64, 32, 4, 2, descriptors=False)), 80)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    text = binary.sass
    assert "HMMA" in text
    monkeypatch.setattr(compiled, "_run", lambda *_: "another")
    assert replace(binary).sass == text
    assert replace(binary, image=b"another").sass == "another"


def test_registers_that_do_not_fit_show() -> None:
    """Four warps cannot hold 128x256 sums: 256 registers a thread for these alone."""
    binary = compile_for(launch(Conv2dConfig("rows", 128, 256, 32, 4, 3, descriptors=False)), 80)
    assert binary.spills > 0
    assert binary.stack > 0
    assert f"spills: {binary.spills:,} accesses" in str(refusal(binary))


def test_shared_memory_that_does_not_exist_shows() -> None:
    config = Conv2dConfig("rows", 128, 64, 64, 4, 4, descriptors=False)
    fitting = compile_for(launch(config), 80)
    assert fitting.excess == 0
    assert refusal(fitting) is None
    binary = compile_for(launch(replace(config, num_stages=8)), 80)
    assert binary.excess == binary.shared - 166_912 > 0
    assert str(refusal(binary)) == (
        f"NOT LAUNCHABLE: {binary.shared:,} bytes of shared memory, "
        f"{binary.excess:,} over the limit of sm_80"
    )


def test_other_reasons_to_refuse() -> None:
    binary = compile_for(launch(Conv2dConfig("rows", 64, 64, 32, 4, 2, descriptors=False)), 80)
    assert refusal(binary) is None
    assert refusal(replace(binary, stack=16)) == "has a stack of 16 bytes a thread in local memory"
    assert "64 warps a block" in str(refusal(replace(binary, warps=64)))
    assert "16 warps of 200 registers" in str(refusal(replace(binary, warps=16, registers=200)))
    assert "of tensor memory" in str(refusal(replace(binary, tensor_memory=512)))
    missed = replace(binary)
    missed.__dict__["sass"] = binary.sass.replace("HMMA", "FFMA")
    assert refusal(missed) == "misses the tensor cores of sm_80"


def test_float32_needs_no_tensor_core() -> None:
    """What multiplies matrices is read off the IR, so that IEEE float32 is not refused."""
    x = layout.empty(4, 4, 128, 64, torch.float32, "cpu")
    weight = conv.pack_weight(torch.zeros(64, 64, 3, 3))
    out = layout.empty(4, 4, 128, 64, torch.float32, "cpu")
    config = conv.default_config(SHAPE, torch.float32, "ieee", 80)
    product = conv.conv2d(x, weight, None, out, SHAPE, config)
    binary = compile_for(product, 80)
    assert not binary.wants_matrix
    assert not binary.uses_matrix
    assert refusal(binary) is None


# --- reading machine code --------------------------------------------------------------------

SASS = """
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;
.L_x_2:
        /*0010*/              @!P0 LDGSTS.E.128 [R1], [R2.64] ;
.L_x_3:
        /*0020*/                   LDSM.16.M88.4 R4, [R1] ;
.L_x_9:
        /*0030*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R3], R4 ;
        /*0040*/              @!P1 BRA `(.L_x_9) ;
        /*0050*/                   HMMA.16816.F32 R8, R4, R6, R8 ;
        /*0060*/               @P0 BRA `(.L_x_2) ;
        /*0070*/                   FADD R8, R8, R9 ;
        /*0080*/                   STG.E [R2.64], R8 ;
        /*0090*/                   EXIT ;
        /*00a0*/                   NOP ;
        /*00b0*/                   BRA `(.L_x_3) ;
.L_x_4:
        /*00c0*/                   BRA `(.L_x_4);
"""


def test_the_main_loop_is_the_innermost_one_around_the_products() -> None:
    """Not the spinning on a barrier inside, nor the branch back from code moved out of line."""
    loop = main_loop(SASS)
    assert loop.found
    assert loop.opcodes == ("LDGSTS", "LDSM", "SYNCS", "BRA", "HMMA", "BRA")
    assert loop.mix == {"matrix": 1, "asynchronous copy": 1, "shared": 1, "control": 3}


def test_of_two_loops_the_one_with_more_products_counts() -> None:
    """A compiler's loop for what unrolling leaves over may be longer."""
    product, other, back = (" HMMA.16816.F32 R8 ;", " IADD3 R1, R1 ;", " @P0 BRA `(.L_x_{}) ;")
    unrolled = [".L_x_1:", *[product] * 3, back.format(1)]
    rest = [".L_x_2:", product, *[other] * 9, back.format(2)]
    assert main_loop("\n".join([*unrolled, *rest])).opcodes == ("HMMA", "HMMA", "HMMA", "BRA")


def test_without_products_the_longest_loop_or_all_of_it() -> None:
    loop = main_loop(SASS.replace("HMMA", "FFMA"))
    assert loop.found
    assert loop.mix["float"] == 1
    straight = "\n".join(line for line in SASS.splitlines() if "BRA" not in line)
    whole = main_loop(straight)
    assert not whole.found
    assert list(whole.opcodes) == opcodes(straight)
    assert whole.mix["global"] == 1


@pytest.mark.parametrize(
    ("opcode", "wanted"),
    [
        *(("HGMMA", "matrix"), ("UTCHMMA", "matrix")),
        *(("UTMALDG", "TMA"), ("UTMASTG", "TMA"), ("LDGSTS", "asynchronous copy")),
        *(("LDS", "shared"), ("LDTM", "shared")),
        *(("LDG", "global"), ("RED", "global")),
        *(("LDL", "local"), ("STL", "local")),
        *(("FFMA", "float"), ("HADD2", "float"), ("F2FP", "float")),
        *(("IMAD", "integer"), ("LOP3", "integer"), ("UIADD3", "integer"), ("R2UR", "integer")),
        *(("LEA", "integer"), ("ISETP", "integer")),
        *(("BRA", "control"), ("SYNCS", "control"), ("DEPBAR", "control"), ("BAR", "control")),
        *(("WARPGROUP", "control"), ("FENCE", "control")),
        *(("NOP", "other"), ("LDC", "other")),
    ],
)
def test_kinds_of_instructions(opcode: str, wanted: str) -> None:
    assert wanted in KINDS
    assert kind(opcode) == wanted


# --- the verb --------------------------------------------------------------------------------


def run(*arguments: str) -> int:
    return inspect.run(parser().parse_args(["inspect", *arguments]))


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    assert run(*arguments, "--json") == 0
    reports: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["reports"]
    return reports


def test_every_layer_on_hopper_is_clean(capsys: pytest.CaptureFixture[str]) -> None:
    """No spill anywhere; the convolutions multiply by HGMMA what TMA brings."""
    reports = told(capsys, "--arch", "sm_90")
    assert [one["layer"] for one in reports][:3] == ["conv1", "pool1", "conv2"]
    assert len(reports) == 11
    for one in reports:
        assert one["clean"], one["verdict"]
        assert one["card"] == "H200"
        assert one["roof"]["bound"] == ("memory" if "pool" in one["layer"] else "compute")
        for kernel in one["kernels"]:
            assert kernel["spills"] == kernel["stack"] == kernel["shared_over"] == 0
            assert kernel["launchable"]
            assert kernel["waves"]["blocks"] == kernel["grid"]
            mix = kernel["main_loop"]["mix"].values()
            assert sum(part["count"] for part in mix) == kernel["main_loop"]["instructions"]
            assert sum(part["share"] for part in mix) == pytest.approx(1)
        assert one["estimate_us"] > one["roof"]["us"]
        if "pool" in one["layer"]:
            assert one["kernels"][0]["step"] is None
        if "conv" in one["layer"]:
            product = one["kernels"][-1]
            limit = product["step"].pop("limit")
            assert (
                f"limited by {limit}, {max(product['step'].values()):,.0f} clocks a step"
                in (one["verdict"])
            )
            assert (product["operands"], product["multiplies_by"]) == ("TMA", "HGMMA")
            assert product["main_loop"]["mix"]["TMA"]["count"] >= 2
            assert one["verdict"].startswith("clean: TMA + HGMMA, ")


def test_a_matrix_instruction_weighs_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    """A twentieth of the loop's instructions, and most of its clocks."""
    cut = "BLOCK_M=128,BLOCK_M2=0,BLOCK_N=256,BLOCK_N2=0,BLOCK_K=64,num_warps=8,num_stages=3"
    (one,) = told(capsys, "conv4", "--batch", "1024", "--config", cut, "--card", "h200")
    (kernel,) = one["kernels"]
    loop = kernel["main_loop"]
    matrix = loop["mix"]["matrix"]
    assert matrix["share"] < 0.1
    step = kernel["step"]
    assert step["matrix"] == 128 * 256 * 64 / 2_048
    assert step["issue"] == pytest.approx((loop["instructions"] - matrix["count"] + 60) * 8 / 3)
    assert step["latency"] == 1_450 / 2  # one block, three stages
    assert step["limit"] == "operand fill"


def test_a_configuration_made_too_large(capsys: pytest.CaptureFixture[str]) -> None:
    (one,) = told(capsys, "conv4", "--arch", "sm_90", "--config", "num_stages=6")
    (kernel,) = one["kernels"]
    over = kernel["shared"] - LIMITS[90].shared_per_block
    assert over > 0
    assert kernel["shared_limit"] == LIMITS[90].shared_per_block
    assert kernel["shared_over"] == over
    assert not kernel["launchable"]
    assert kernel["occupancy"]["blocks"] == 0
    assert kernel["waves"] is kernel["step"] is one["estimate_us"] is None
    assert not one["clean"]
    assert one["settings"]["num_stages"] == 6
    assert one["verdict"] == (
        f"NOT LAUNCHABLE: {kernel['shared']:,} bytes of shared memory, {over:,} over the limit "
        "of sm_90"
    )
    assert run("conv4", "--arch", "sm_90", "--config", "num_stages=6", "--check") == 1
    assert run("conv4", "--arch", "sm_90", "--check") == 0


def test_several_configurations_and_what_does_not_compile(
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = ("default", "num_warps=3", "BLOCK_M=64,descriptors=false")
    reports = told(
        capsys, "conv3", "--arch", "80", *(word for a in asked for word in ("--config", a))
    )
    assert [one["config"] for one in reports] == list(asked)
    assert [one["clean"] for one in reports] == [True, False, True]
    assert reports[1]["verdict"].startswith("DOES NOT COMPILE: num_warps must be a power of 2")
    assert reports[1]["kernels"] == []
    assert reports[2]["settings"]["BLOCK_M"] == 64
    assert "asynchronous copies + HMMA" in reports[2]["verdict"]


def test_the_table_and_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("conv5", "--card", "h100") == 0
    out = capsys.readouterr().out
    assert "sm_90, waves on H100 SXM" in out
    assert "main loop of" in out
    assert "FLOP/byte" in out
    assert "clean: TMA + HGMMA" in out
    for form, word in (("ptx", ".target sm_90"), ("sass", "HGMMA"), ("ttgir", "ttng.")):
        assert run("conv5", "--arch", "sm_90", "--code", form) == 0
        assert word in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("conv4", "--arch", "sm_70"), "wanted one of .*sm_90.*got 'sm_70'"),
        (("conv4", "--arch", "sm_80", "--card", "h200"), "h200 is sm_90, which is not among"),
        (("conv4", "--config", "BLOCK_Q=3"), "conv4: .*with the keys .*BLOCK_M.*got 'BLOCK_Q=3'"),
        (("conv4", "--config", "BLOCK_M=big"), "conv4: BLOCK_M: wanted a whole number, got 'big'"),
        (("conv9",), "no step 'conv9'; it has conv1"),
        (("--batch", "0"), "wanted at least 1 image"),
        (("conv4", "--json", "--code", "sass"), "JSON and nothing else"),
    ],
)
def test_what_the_verb_refuses(arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        run(*arguments)


def test_configurations_in_words() -> None:
    planned = Planner(network("alexnet"), ARITHMETIC["fp16"], 90)(1024)
    step = next(step for step in planned.steps if step.name == "conv4")
    made = parse(" BLOCK_N=128, descriptors=false ,tiling=pixels", step)
    assert isinstance(made, Conv2dConfig)
    assert isinstance(step.config, Conv2dConfig)
    assert made == replace(step.config, BLOCK_N=128, descriptors=False, tiling="pixels")
    assert parse("default", step) == step.config
    with pytest.raises(EngineError, match="tiling: wanted rows or pixels, got 'images'"):
        parse("tiling=images", step)
    with pytest.raises(EngineError, match="descriptors: wanted true or false"):
        parse("descriptors=1", step)


@pytest.mark.interpreter
def test_compiling_between_two_runs(generator: torch.Generator) -> None:
    """Interpreting leaves nothing behind that a compiler would meet, nor the other way about."""
    shape = Conv2dShape(16, 16, 1, 1, 16, 1, 1)
    x = torch.randn(16, 16, 1, 1, generator=generator)
    weight = torch.randn(16, 16, 1, 1, generator=generator)
    out = layout.empty(1, 1, 16, 16, torch.float32, "cpu").fill_(torch.nan)
    config = Conv2dConfig("pixels", 16, 16, 16)
    bound = conv.conv2d(layout.pack(x), conv.pack_weight(weight), None, out, shape, config)
    wanted = conv.reference(x, weight, None, shape)
    for _ in range(2):
        bound()
        assert torch.allclose(layout.unpack(out).double(), wanted, rtol=1e-4, atol=1e-5)
        out.fill_(torch.nan)
        assert compile_for(bound, 90).registers > 0
        assert out.isnan().all(), "compiling runs nothing"


# --- ahead of whoever wants them -------------------------------------------------------------


def test_what_is_compiled_ahead_is_compiled_once_and_may_fail(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the order in which it is wanted; the number of images makes no other binary."""
    many = replace(SHAPE, N=256)
    config = Conv2dConfig("pixels", 64, 64, 32)
    larger = replace(config, BLOCK_M=128)
    made: dict[str, Any] = {
        "one": [launch(config)],
        "unplanned": None,
        "same": [launch(config, many)],
        "both": [launch(config), launch(larger)],
        "broken": [launch(replace(config, num_stages=2))],
        "last": [launch(replace(config, num_stages=4))],
    }
    done: list[str] = []
    told: list[str] = []

    class Here:
        """A worker that takes a note and is done; processes of their own take seconds."""

        def __init__(self, work: object, quiet: bool) -> None:
            assert work is ahead.compile_all

        start = close = lambda self: None

        def ask(self, seconds: float, make: ahead.Make, arch: int) -> None:
            name = next(name for name, launches in made.items() if launches is make())
            if name in ("unplanned", "broken"):
                raise Lost("failed", f"the compiler of {name} died")
            done.append(name)

    monkeypatch.setattr(ahead, "Worker", Here)
    work = [(name, lambda launches=launches: launches) for name, launches in made.items()]
    over = threading.Event()

    def wanted() -> Iterator[tuple[str, ahead.Make]]:
        yield from work
        over.set()

    with ahead.compiling(wanted(), 90, told.append, jobs=1):
        over.wait(60)  # at once, unless the one that fails ends the others
    assert done == ["one", "both", "last"]
    assert told == [
        "compiling ahead: the compiler of unplanned died",
        "compiling ahead: the compiler of broken died",
    ]
