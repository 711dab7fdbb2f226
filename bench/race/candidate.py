"""Your own kernel: what a candidate is, and how a file of one is read.

A candidate is a Python file with one function. It may lie anywhere.

    def run(problem, x, weight, bias, out, config): ...

`problem` is a `Conv2dProblem` or a `LinearProblem`. Of a convolution, x is [N, C, H, W] and out
[N, OC, OH, OW], both channels last in memory; weight [OC, C/groups, KH, KW] and bias [OC] are as in
a state dict. Of a linear layer, x is [N, features], weight [OC, features] and out [N, OC]. All have
the dtype `problem.dtype`. `run` computes activation(x * weight + bias) on the current stream, and
either fills `out` and returns None, or returns a tensor of out's shape and dtype. It must not write
anything else, nor read what lies around its tensors, and the same input must give the same bits.
Each call must compute, whatever was computed before. On a GPU it is captured in a CUDA graph, so it
must not wait for the host.

All else in the file is optional:

    SPACE = {"BLOCK_M": [64, 128], "num_warps": [4, 8]}  # every combination is a configuration
    def configs(problem): ...                  # or a list of dictionaries, made for the problem
    def prepare(problem, weight, config): ...  # once, untimed; `run` gets its result as `weight`
    TOLERANCE = 4.0       # factor on the bound of an ordinary sum, for a reason that the file gives
    LAYOUT = "HWNC"       # x and out lie in memory as the engine's activations (kernels/layout.py)
    OPERATION = "conv2d"  # or "linear": other layers are declined for it

`run` gets one configuration as a dictionary, empty where there is no space. The race tries all of
them, leaves out those that fail, and races the fastest. A candidate for which a layer is none of
its business raises `Declined` with the reason; that is no fault.

Kernels may use `@triton.jit`: on a CPU, where `problem.arch` is None, the candidate's process runs
Triton's interpreter, for which few large tiles are fast. `jit` and `Launch` of
`alexnet_triton.kernels.jit` do the same in any process. The file is loaded as if it stood in
`bench/race/candidates/`, so a copy of a file from there works as it is.
"""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch

from ...engine.spec import Conv2d, Linear
from ...errors import Error
from ...kernels.epilogue import Activated
from ..measure.problem import Problem
from .candidates import SHIPPED, shipped

Config = Mapping[str, Any]
Layout = Literal["NHWC", "HWNC"]

MOST_CONFIGS = 512
MOST_TOLERANCE = 16.0
"""Four bits: what Winograd's F(4x4, 3x3) loses. An answer that needs more is another answer."""

ARGUMENTS = ("problem", "x", "weight", "bias", "out", "config")


class CandidateError(Error, ValueError):
    """A file that is no candidate, or a layer that none can be raced on, in one line."""


class Declined(Exception):
    """Raised by a candidate for a problem that its algorithm does not solve; says why."""


@dataclass(frozen=True, slots=True)
class Conv2dProblem:
    """N images [C, H, W], OC filters [C/groups, KH, KW], then bias and activation."""

    N: int
    C: int
    H: int
    W: int
    OC: int
    KH: int
    KW: int
    stride: int
    padding: int  # zeros on all four sides
    dilation: int
    groups: int
    activation: Activated  # "relu", "sigmoid": see kernels/epilogue.py
    dtype: torch.dtype
    precision: str  # of float32 products, "ieee" or "tf32": tl.dot's input_precision
    arch: int | None  # compute capability, 90; None: a CPU, where kernels are interpreted

    @property
    def OH(self) -> int:
        """Output rows."""
        reach = self.dilation * (self.KH - 1) + 1
        return (self.H + 2 * self.padding - reach) // self.stride + 1

    @property
    def OW(self) -> int:
        """Output columns."""
        reach = self.dilation * (self.KW - 1) + 1
        return (self.W + 2 * self.padding - reach) // self.stride + 1


@dataclass(frozen=True, slots=True)
class LinearProblem:
    """N rows of features, OC outputs, then bias and activation."""

    N: int
    features: int
    OC: int
    activation: Activated  # "relu", "sigmoid": see kernels/epilogue.py
    dtype: torch.dtype
    precision: str  # of float32 products, "ieee" or "tf32": tl.dot's input_precision
    arch: int | None  # compute capability, 90; None: a CPU, where kernels are interpreted


@dataclass(frozen=True, slots=True)
class Candidate:
    """What a file declares; see the module."""

    run: Callable[..., torch.Tensor | None]
    prepare: Callable[..., Any]
    configs: Callable[[Conv2dProblem | LinearProblem], Sequence[Config]]
    tolerance: float
    layout: Layout


def pose(problem: Problem) -> Conv2dProblem | LinearProblem:
    """A problem in the words of a candidate.

    Raises CandidateError for anything but one convolution or linear layer with its activation.
    """
    plan, block = problem.plan, problem.step.block
    arithmetic = plan.arithmetic
    if block is None or sum(step.block is not None for step in plan.steps) > 1:
        raise CandidateError(f"race: wanted one layer, got {problem.name}")
    if block.batch_norm or block.affine:
        raise CandidateError(
            f"race: {problem.name} of {problem.network.name} has a BatchNorm fused into it, which "
            "candidates are not asked for; race a layer without"
        )
    common = (block.activation, arithmetic.dtype, arithmetic.precision, plan.arch)
    match block.layer:
        case Conv2d() as conv:
            c, h, w = block.came
            k, s, p, d = conv.kernel_size, conv.stride, conv.padding, conv.dilation
            size = (problem.batch, c, h, w, conv.out_channels, k, k, s, p, d, conv.groups)
            return Conv2dProblem(*size, *common)
        case Linear() as linear:
            (features,) = block.came
            return LinearProblem(problem.batch, features, linear.out_features, *common)
    raise CandidateError(
        f"race: wanted a convolution or a linear layer, got {problem.name}, which is a "
        f"{type(block.layer).__name__}"
    )


def locate(name: str) -> Path:
    """The file of a candidate: a path, or the name of one that ships.

    Raises CandidateError, listing those that ship, if it is neither.
    """
    if (path := Path(name)).is_file():
        return path.resolve()
    if name in shipped():
        return SHIPPED / f"{name}.py"
    raise CandidateError(
        f"{name}: no such file, and no candidate that ships; these are {', '.join(shipped())}"
    )


def load(path: Path) -> Candidate:
    """Run a candidate's file and read what it declares.

    Modules beside the file can be imported from it. Raises CandidateError for a file that does not
    keep to the contract, and whatever the file raises.
    """
    module = _execute(path)
    run = getattr(module, "run", None)
    if not callable(run):
        raise CandidateError(f"{path.name} has no function run({', '.join(ARGUMENTS)})")
    _check_arguments(path, run, ARGUMENTS)
    prepare = getattr(module, "prepare", lambda problem, weight, config: weight)
    _check_arguments(path, prepare, ("problem", "weight", "config"))
    layout: Any = getattr(module, "LAYOUT", "NHWC")
    if layout not in ("NHWC", "HWNC"):
        raise CandidateError(f"{path.name}: LAYOUT: wanted 'NHWC' or 'HWNC', got {layout!r}")
    tolerance = getattr(module, "TOLERANCE", 1.0)
    if not isinstance(tolerance, int | float) or not 0 < tolerance <= MOST_TOLERANCE:
        raise CandidateError(
            f"{path.name}: TOLERANCE: wanted a number above 0 and up to {MOST_TOLERANCE:g}, got "
            f"{tolerance!r}"
        )
    return Candidate(run, prepare, _configs(path, module), float(tolerance), layout)


def _execute(path: Path) -> ModuleType:
    stem = path.stem.replace(".", "_")
    spec = importlib.util.spec_from_file_location(f"{__package__}.candidates.{stem}", path)
    if spec is None or spec.loader is None:
        raise CandidateError(f"{path.name}: wanted a Python file, NAME.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.append(str(path.parent))
    spec.loader.exec_module(module)
    return module


def _configs(
    path: Path, module: ModuleType
) -> Callable[[Conv2dProblem | LinearProblem], Sequence[Config]]:
    """The space of a candidate as a function of the problem, behind its OPERATION."""
    kinds = {"conv2d": Conv2dProblem, "linear": LinearProblem}
    operation = getattr(module, "OPERATION", None)
    if operation is not None and operation not in kinds:
        wanted = " or ".join(map(repr, kinds))
        raise CandidateError(f"{path.name}: OPERATION: wanted {wanted}, got {operation!r}")
    space = getattr(module, "SPACE", {})
    if not isinstance(space, Mapping) or not all(
        isinstance(values, list | tuple) and values for values in space.values()
    ):
        raise CandidateError(
            f"{path.name}: SPACE: wanted a dictionary of lists of values, got {space!r}"
        )

    def product(problem: Conv2dProblem | LinearProblem) -> Iterator[Config]:
        for values in itertools.product(*space.values()):
            yield dict(zip(space, values, strict=True))

    chosen = getattr(module, "configs", product)

    def configs(problem: Conv2dProblem | LinearProblem) -> Sequence[Config]:
        if operation is not None and not isinstance(problem, kinds[operation]):
            raise Declined(f"solves a {operation} alone")
        found = list(itertools.islice(chosen(problem), MOST_CONFIGS + 1))
        right = all(isinstance(config, Mapping) for config in found)
        if not right or not 0 < len(found) <= MOST_CONFIGS:
            wanted = f"1 to {MOST_CONFIGS} configurations, each a dictionary"
            got = len(found) if right else repr(found)
            raise CandidateError(f"{path.name}: wanted {wanted}, got {got}")
        return found

    return configs


def _check_arguments(path: Path, function: Callable[..., Any], names: Sequence[str]) -> None:
    signature = inspect.signature(function)
    try:
        signature.bind(*names)
    except TypeError:
        raise CandidateError(
            f"{path.name}: wanted {function.__name__}({', '.join(names)}), got "
            f"{function.__name__}{signature}"
        ) from None
