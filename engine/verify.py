"""Every kernel of a run against float64, on the inputs and weights it really had.

Each step is judged on its own: its reference reads the activation that the step before it made, so
an error belongs to the step that shows it. A last row compares the network's output with a
float64 run of the whole network on the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..kernels import channels_last, conv, gemm, layout, lrn, pool, softmax
from . import foretell, reference
from .bind import bind, pack
from .devices.planner import Planner
from .load import aim
from .plan import ARITHMETIC, Arithmetic, Step
from .spec import Network
from .table import Columns, columns


def errors(made: torch.Tensor, wanted: torch.Tensor) -> tuple[float, float]:
    """Largest and RMS error of float64 tensors of one shape, relative to those of `wanted`.

    Where zeros are wanted, zeros have no error and anything else has an infinite one.
    """
    error = made - wanted
    largest = error.abs().max(), wanted.abs().max()
    rms = error.square().mean().sqrt(), wanted.square().mean().sqrt()
    return _relative(*largest), _relative(*rms)


def _relative(error: torch.Tensor, size: torch.Tensor) -> float:
    return (error / size).item() if error else 0.0  # 0 / 0 would be NaN


def finite(error: float) -> float | None:
    """The error, None where it is NaN or infinite: JSON has no word for these."""
    return error if math.isfinite(error) else None


def within(max_error: float, rms_error: float, tolerance: float) -> bool:
    """Whether the largest error is in the tolerance and the RMS in a quarter; NaN never is."""
    return max_error <= tolerance and rms_error <= tolerance / 4


@dataclass(frozen=True, slots=True)
class Check:
    """One step's error against float64, relative to the largest number and to the RMS of it."""

    name: str
    kernel: str
    max_error: float
    rms_error: float
    tolerance: float  # of max_error; rms_error may be a quarter of it

    @property
    def passed(self) -> bool:
        """Whether both errors are within the tolerance; NaN never is."""
        return within(self.max_error, self.rms_error, self.tolerance)


@dataclass(frozen=True, slots=True)
class Verification:
    """All checks of one network; the last row is the whole network."""

    network: str
    dtype: str
    images: int
    checks: tuple[Check, ...]
    target: str | None = None  # the card whose plan was interpreted

    @property
    def first_failure(self) -> str | None:
        """The first step out of tolerance, None if all pass."""
        return next((check.name for check in self.checks if not check.passed), None)

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        checks = [
            asdict(check)
            | {"max_error": finite(check.max_error), "rms_error": finite(check.rms_error)}
            | {"passed": check.passed}
            for check in self.checks
        ]
        return asdict(self) | {"checks": checks, "first_failure": self.first_failure}

    def __str__(self) -> str:
        where = f", the plan of {self.target} interpreted" if self.target else ""
        failure = self.first_failure
        lines = [
            f"{self.network}, {self.images} images, {self.dtype}{where}, against float64",
            *columns(self.checks, _COLUMNS),
            "all within tolerance" if failure is None else f"first failure: {failure}",
        ]
        return "\n".join(lines)


_COLUMNS: Columns[Check] = [
    ("step", -8, lambda check: check.name),
    ("kernel", -20, lambda check: check.kernel),
    ("max error", 10, lambda check: f"{check.max_error:.1e}"),
    ("RMS error", 10, lambda check: f"{check.rms_error:.1e}"),
    ("tolerance", 10, lambda check: f"{check.tolerance:.1e}"),
    ("", 0, lambda check: " ok" if check.passed else " OUT OF TOLERANCE"),
]


def tolerance(arithmetic: Arithmetic, reduction: int) -> float:
    """Largest error that a correct kernel may show, relative to its largest output.

    Rounding the result costs half a unit of the dtype; a float32 sum of `reduction` products drifts
    by about sqrt(reduction) half units of float32; TF32 first rounds both factors to 10 bits. Four
    such standard errors are allowed, since the largest of many outputs is judged.
    """
    result = float(torch.finfo(arithmetic.dtype).eps) / 2
    factors = 2.0**-10 if arithmetic.precision == "tf32" else 0.0
    return 4 * (result + factors + math.sqrt(reduction) * 2.0**-24)


def verify(
    network: Network,
    state: Mapping[str, torch.Tensor],
    dtype: str,
    device: torch.device,
    images: torch.Tensor,
    target: str | None = None,
) -> Verification:
    """Check every step on `images` [N, C, H, W] (uint8 or normalised float), with this state.

    The steps have the configurations that the engine would run on this device, or interpreted on
    the card that `target` names. Raises EngineError for a target there is none of.
    """
    arithmetic, aimed = ARITHMETIC[dtype], aim(target, device)
    planner = Planner(network, arithmetic, aimed.arch, tuned=aimed.tuned, options=None)
    how = len(images), tuple(images.shape[1:]), images.dtype
    _, *steps = planner(*how).steps
    planned = planner(*how, tuple(step.name for step in steps))  # unsliced, with slices' tiles
    bound = bind(planned, pack(network, state, arithmetic, device))
    images = images.to(device)
    if target is not None:
        foretell.say(bound.every_launch(images), f"{len(images)} images")
    for out in bound.outputs.values():
        out.fill_(float("nan"))  # what a kernel leaves unwritten must show
    bound.first(images)()
    pixels_read = bound.outputs["input"].permute(2, 0, 1, 3).clone()  # no later step may keep it
    bound.run(images)

    rounded = {name: tensor.to(arithmetic.dtype).double() for name, tensor in state.items()}
    pixels = reference.normalise(images.cpu(), network.preprocess, torch.float64)
    layers = dict(network.layers)
    checks = []
    x = pixels.to(arithmetic.dtype).double()
    for step in planned.steps:
        output = pixels_read if step.block is None else layout.unpack(bound.outputs[step.name])
        made = output.double().cpu()
        if isinstance(step.shape, channels_last.ChannelsLastShape):
            mean, std = bound.packed.mean.cpu(), bound.packed.std.cpu()
            wanted = channels_last.reference(images.cpu(), mean, std, step.shape)
        else:
            wanted = x.flatten(1) if isinstance(step.shape, gemm.LinearShape) else x
            for name in step.layers:
                wanted = reference.apply(name, layers[name], wanted, rounded)
            x = made
        limit = tolerance(arithmetic, reduction(step))
        error = errors(made.reshape(wanted.shape), wanted)
        checks.append(Check(step.name, step.kernel, *error, limit))
    *_, whole = reference.forward(network, rounded, pixels).values()
    total = sum(check.tolerance for check in checks)  # the errors of a chain add up
    error = errors(x.reshape(whole.shape), whole)
    checks.append(Check("output", "all of them", *error, total))
    return Verification(network.name, dtype, len(images), tuple(checks), aimed.name)


def reduction(step: Step) -> int:
    """How many products one output of a step sums."""
    match step.shape:
        case conv.Conv2dShape() as shape:
            return shape.C // shape.groups * shape.KH * shape.KW
        case gemm.LinearShape() as shape:
            return shape.P * shape.C
        case softmax.SoftmaxShape() | lrn.LRNShape() as shape:
            return shape.C if isinstance(shape, softmax.SoftmaxShape) else shape.size
        case pool.PoolShape() as shape if shape.adaptive:
            return -(-shape.H // shape.OH) * -(-shape.W // shape.OW)
    return 1
