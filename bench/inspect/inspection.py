"""What can be said of a layer's kernels without running them: a report per configuration.

Everything is read off the binary (`compiled.py`, `machine_code.py`), worked out from the table of
limits (`limits.py`), or counted from the layer's shape. Rates of a card are those of
`engine/devices/cards.py`; a roof is what they allow if nothing else holds the kernel back
(Williams, Waterman, Patterson: "Roofline", 2009). What does hold it back is told by the clocks of
one step of its loop (`kernels/cost.py`): a matrix instruction may take a thousand of them, where
another takes one.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any

import triton

from ...engine.devices.cards import CARDS
from ...kernels import cost
from ...kernels.jit import Launch, Work
from ..measure.predict import estimate
from ..measure.problem import Problem, ready, tensors
from ..measure.roofline import COPY, binds, roof_us
from .compiled import Binary, compile_for, refusal
from .limits import GPUS, Arch, Waves, arch_name, waves
from .machine_code import Loop, is_matrix, main_loop

COUNTED = ("registers", "spills", "stack", "shared", "tensor_memory", "warps")
"""What a Binary tells of itself in numbers."""


@dataclass(frozen=True, slots=True)
class Roof:
    """The best that a card's rates allow for some work."""

    flops: float  # per second
    us: float
    bound: str  # "compute" or "memory"


@dataclass(frozen=True)
class KernelReport:
    """One launch of a layer, compiled for one architecture.

    `waves` is None without a card, `step` also where there are no products or no rates.
    """

    binary: Binary
    grid: int  # blocks
    waves: Waves | None
    loop: Loop
    refusal: str | None
    step: cost.Clocks | None = None

    @property
    def multiplies_by(self) -> str | None:
        """The opcode that does the main loop's products: a matrix instruction, or else FMAs."""
        matrix = Counter(filter(is_matrix, self.loop.opcodes))
        if matrix:
            return matrix.most_common(1)[0][0]
        fused = Counter(opcode for opcode in self.loop.opcodes if "FMA" in opcode.upper())
        if 8 * fused.total() < len(self.loop.opcodes):
            return None  # some arithmetic, but not what the loop is for
        return fused.most_common(1)[0][0] if fused else None

    @property
    def operands(self) -> str:
        """How the main loop gets its operands."""
        mix = self.loop.mix
        if "UTMALDG" in self.loop.opcodes:
            return "TMA"
        if "asynchronous copy" in mix:
            return "asynchronous copies"
        return "loads through registers" if "shared" in mix else "plain loads"

    @property
    def verdict(self) -> str:
        """One line."""
        if self.refusal:
            return self.refusal
        blocks = self.binary.occupancy.blocks
        parts = [
            " + ".join(filter(None, (self.operands, self.multiplies_by))),
            f"{self.binary.registers} registers",
            f"{'one block' if blocks == 1 else f'{blocks} blocks'} per SM limited by "
            f"{' and '.join(self.binary.occupancy.limited_by)}",
        ]
        line = f"clean: {', '.join(parts)}"
        if self.waves:
            line += f"; {self.waves.waves:.1f} waves, {self.waves.full:.0%} full".replace("%", " %")
        if self.step:
            line += f"; limited by {_clocks(self.step)}"
        return line

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        binary = self.binary
        return {
            "kernel": binary.kernel,
            "grid": self.grid,
            **{name: getattr(binary, name) for name in COUNTED},
            "shared_limit": binary.limits.shared_per_block,
            "shared_over": binary.excess,
            "launchable": binary.occupancy.blocks > 0,
            "occupancy": asdict(binary.occupancy),
            "waves": asdict(self.waves) if self.waves else None,
            "step": {**self.step._asdict(), "limit": self.step.limit} if self.step else None,
            "multiplies_by": self.multiplies_by,
            "operands": self.operands,
            "main_loop": {
                "found": self.loop.found,
                "instructions": len(self.loop.opcodes),
                "mix": {
                    name: {"count": count, "share": count / len(self.loop.opcodes)}
                    for name, count in self.loop.mix.items()
                },
            },
            "instructions": dict(binary.instructions.most_common()),
            "refusal": self.refusal,
            "verdict": self.verdict,
        }


def _clocks(step: cost.Clocks) -> str:
    """What limits a step and the rest: "matrix, 1,024 clocks a step beside 416 issue, ..."."""
    parts = sorted(zip(cost.LIMITS, step, strict=True), key=lambda part: -part[1])
    (limit, longest), *others = parts
    rest = ", ".join(f"{clocks:,.0f} {name}" for name, clocks in others)
    return f"{limit}, {longest:,.0f} clocks a step beside {rest}"


@dataclass(frozen=True)
class Report:
    """One layer in one configuration on one architecture.

    `config` is as it was asked for, "default" or "BLOCK_M=256"; `settings` are all its fields.
    `failure` says why there are no kernels. `estimate_us` is None without rates, or where a
    multiprocessor has no room for a block.
    """

    layer: str
    arch: Arch
    card: str | None  # a key of GPUS
    config: str
    settings: dict[str, Any]
    work: Work
    roof: Roof | None
    kernels: tuple[KernelReport, ...]
    failure: str | None = None
    estimate_us: float | None = None

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.work.flops / self.work.bytes

    @property
    def clean(self) -> bool:
        """Whether it compiles and nothing speaks against running it."""
        return self.failure is None and not any(kernel.refusal for kernel in self.kernels)

    @property
    def main(self) -> KernelReport | None:
        """The kernel that does the layer's products, or the last one."""
        products = [kernel for kernel in self.kernels if kernel.multiplies_by]
        every = products or self.kernels
        return every[-1] if every else None

    @property
    def verdict(self) -> str:
        """One line: why not, or what the main kernel is."""
        if self.failure:
            return self.failure
        for kernel in self.kernels:
            if kernel.refusal:
                alone = len(self.kernels) == 1
                return kernel.refusal if alone else f"{kernel.binary.kernel}: {kernel.refusal}"
        return self.main.verdict if self.main else "no kernel does this step"

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "layer": self.layer,
            "arch": arch_name(self.arch),
            "card": GPUS[self.card].name if self.card else None,
            "triton": triton.__version__,
            "config": self.config,
            "settings": self.settings,
            "flops": self.work.flops,
            "bytes": self.work.bytes,
            "intensity": self.intensity,
            "roof": asdict(self.roof) if self.roof else None,
            "estimate_us": self.estimate_us,
            "clean": self.clean,
            "verdict": self.verdict,
            "kernels": [kernel.to_dict() for kernel in self.kernels],
        }


def inspect(problem: Problem, arch: Arch, card: str | None, config: str = "default") -> Report:
    """Compile every kernel of `problem`, as it is configured, for `arch` and judge it.

    `card` is a key of GPUS; without one there are no waves, and without its rates no roof. A
    configuration that a launcher or the compiler refuses is a report with a `failure`.
    """
    settings = asdict(problem.step.config) if problem.step.config else {}
    kernels: list[KernelReport] = []
    failure = None
    costs = {}
    if card in CARDS:
        chip, plan = cost.CHIPS[CARDS[card].name], problem.plan
        costs = {step.name: estimate(step, plan.arithmetic, chip) for step in plan.steps}
    try:
        for name, launches in ready(problem, tensors(problem, "meta")).launches:
            tiles = costs[name].tiles if name in costs else [None] * len(launches)
            for launch, cut in zip(launches, tiles, strict=True):
                kernels.append(kernel_report(launch, arch, card, cut))
    except Exception as error:  # Triton's compiler raises whatever it likes
        # Above the compiler's message stand the source and a pointer into it.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        failure = f"DOES NOT COMPILE: {[type(error).__name__, *lines][-1]}"
    us = sum(one.us for one in costs.values())
    return Report(
        *(problem.name, arch, card, config, settings, problem.work),
        *(roof(problem.work, problem.dtype, card), tuple(kernels), failure),
        estimate_us=us if costs and us < math.inf else None,
    )


def kernel_report(
    launch: Launch, arch: Arch, card: str | None, tiles: cost.Tiles | None = None
) -> KernelReport:
    """Compile one launch, which is cut into `tiles`, and judge it.

    Raises what `compile_for` raises.
    """
    binary = compile_for(launch, arch)
    grid, held = math.prod(launch.grid), binary.occupancy.blocks
    passed = waves(grid, held, GPUS[card].multiprocessors) if card else None
    loop, step = main_loop(binary.sass), None
    if card in CARDS and tiles and tiles.columns and held:
        chip = cost.CHIPS[CARDS[card].name]
        if loop.found:  # read off the machine code, where the model has a usual number
            others = sum(not is_matrix(opcode) for opcode in loop.opcodes)
            tiles = replace(tiles, instructions=others)
        step = cost.step(tiles, chip, min(held, -(-grid // chip.multiprocessors)))
    return KernelReport(binary, grid, passed, loop, refusal(binary), step)


def roof(work: Work, dtype: str, card: str | None) -> Roof | None:
    """What the rates of a card allow; None where they are not known."""
    if card is None or card not in CARDS or dtype not in CARDS[card].flops:
        return None
    rates = {dtype: CARDS[card].flops[dtype], COPY: CARDS[card].memory}
    us = roof_us(work, dtype, rates)
    return Roof(work.flops / us * 1e6, us, binds(work, dtype, rates))
