"""A few layers as one problem: random tensors in, the right answer, and the engine's way to it.

A problem is a run of neighbouring steps cut out of a network's plan, "conv4" or "conv1+pool1". Its
tensors are torch's: x [N, C, H, W] in channels-last memory or [N, features], weights as in a state
dict. What the engine needs beyond that (packed weights, [H, W, N, C] activations) is made outside
of what is timed, as each peer's own preparation is; only the first layer, which reads images, pays
for its way in.

An answer is compared with float64 on a sample of the images: they do not depend on one another, so
the first, the last and some between stand for all; the rest must be finite, since outputs are
poisoned with NaN before the run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ...engine import reference
from ...engine.bind import Bound, bind, pack
from ...engine.devices.planner import Planner
from ...engine.devices.runner import to_nchw
from ...engine.load import aim
from ...engine.plan import Arithmetic, KernelConfig, Plan, Step, part, reconfigured
from ...engine.spec import Flatten, Layer, Network, NetworkError
from ...engine.verify import errors, reduction, tolerance, within
from ...kernels import layout
from ...kernels.jit import Launch, Work

CHECKED_IMAGES = 32


@dataclass(frozen=True, slots=True)
class Problem:
    """Some neighbouring layers of a network for one batch, in one dtype (a name of NUMBERS)."""

    name: str
    dtype: str
    plan: Plan  # these steps alone
    layers: tuple[tuple[str, Layer], ...]
    source: (
        tuple[int, int, int, int] | None
    )  # what the first step reads, [H, W, N, C]; None: images

    @property
    def network(self) -> Network:
        """Where the layers come from."""
        return self.plan.network

    @property
    def batch(self) -> int:
        """Images."""
        return self.plan.batch

    @property
    def step(self) -> Step:
        """The last step: of a single layer, the kernel that computes it."""
        return self.plan.steps[-1]

    @property
    def reads_features(self) -> bool:
        """Whether torch's layer reads [N, features] rather than [N, C, H, W]."""
        block = self.plan.steps[0].block
        return block is not None and len(block.came) == 1

    @property
    def work(self) -> Work:
        """FLOPs, and bytes from the first step's input to the last one's output, weights once.

        What passes between the steps could stay on the chip, so it is not counted.
        """
        plan = self.plan
        # The convolution behind the stem counts the images, not what the stem makes of them.
        images = plan.batch * math.prod(plan.image_shape) * plan.arithmetic.dtype.itemsize
        between = sum(
            _bytes(step, plan) + (_bytes(step, plan) if step.block else images)
            for step in plan.steps[:-1]
        )
        return Work(plan.work.flops, plan.work.bytes - between)

    @property
    def tolerance(self) -> float:
        """Largest error, relative to the largest number, that a right answer may show."""
        return sum(tolerance(self.plan.arithmetic, reduction(step)) for step in self.plan.steps)


@dataclass(frozen=True, slots=True)
class Tensors:
    """What comes in: x, and weights and biases by their names in the state dict."""

    x: torch.Tensor
    state: dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Match:
    """Errors relative to the largest number and to the RMS of the float64 answer."""

    max_error: float
    rms_error: float
    tolerance: float  # of max_error; rms_error may be a quarter of it

    @property
    def passed(self) -> bool:
        """Whether both are within the tolerance; NaN never is."""
        return within(self.max_error, self.rms_error, self.tolerance)


@dataclass(frozen=True, slots=True)
class Ready:
    """The engine's kernels bound to one problem's tensors."""

    problem: Problem
    bound: Bound
    images: torch.Tensor | None  # of a problem that starts with the stem

    @property
    def launches(self) -> tuple[tuple[str, tuple[Launch, ...]], ...]:
        """Every launch by step, the stem's included."""
        if self.images is None:
            return self.bound.launches
        stem = self.problem.plan.steps[0].name
        return ((stem, (self.bound.stem(self.images),)), *self.bound.launches)

    def __call__(self) -> None:
        for _, launches in self.launches:
            for launch in launches:
                launch()

    def poison(self) -> None:
        """Fill what will be written with NaN, so that what is left unwritten shows."""
        for out in self.bound.outputs.values():
            out.fill_(torch.nan)

    def output(self) -> torch.Tensor:
        """The answer, float32 [N, C, H, W] or [N, features]."""
        step = self.problem.step
        return to_nchw(step, self.bound.outputs[step.name])


def tuned_planner(
    network: Network, meaning: Arithmetic, device: torch.device, target: str | None = None
) -> Planner:
    """Plans as the engine makes them on this device or for a target, but all images at once.

    Raises TuningError for a table that cannot be read, EngineError for a GPU that is too old.
    """
    aimed = aim(target, device)
    return Planner(network, meaning, aimed.arch, tuned=aimed.tuned)


def problems(
    planner: Planner, dtype: str, batch: int, names: Sequence[str] | None = None
) -> list[Problem]:
    """Problems by name, "conv4" or "conv1+pool1"; None: every step of the network, one by one.

    The first layer's problem starts with the stem, which has none of its own. `dtype` is the
    planner's. Raises NetworkError, listing the steps there are, for a name that is none or for
    steps that are not neighbours.
    """
    whole = planner(batch, image_dtype=planner.arithmetic.dtype)
    steps = whole.steps
    known = [step.name for step in steps[1:]]
    found = []
    for name in known if names is None else names:
        parts = name.split("+")
        if unknown := [part for part in parts if part not in known]:
            raise NetworkError(
                f"{planner.network.name} has no step {unknown[0]!r}; it has {', '.join(known)}"
            )
        first, last = known.index(parts[0]) + 1, known.index(parts[-1]) + 1
        if [step.name for step in steps[first : last + 1]] != parts:
            raise NetworkError(
                f"{planner.network.name}: {name} are no neighbours; its steps are "
                f"{', '.join(known)}"
            )
        start = 0 if first == 1 else first
        cut = part(whole, start, last + 1)
        fused = [layer for step in cut.steps for layer in step.layers]
        found.append(
            Problem(
                name,
                dtype,
                cut,
                _layers(planner.network, fused),
                steps[start - 1].output if start else None,
            )
        )
    return found


def configured(problem: Problem, config: KernelConfig, step: str | None = None) -> Problem:
    """The same problem with another configuration of one step, by default its last."""
    name = step or problem.step.name
    return replace(problem, plan=reconfigured(problem.plan, name, config))


def tensors(
    problem: Problem, device: torch.device | str, generator: torch.Generator | None = None
) -> Tensors:
    """Fresh random tensors of the problem's dtype: x and biases of unit size, outputs likewise.

    On "meta" they have shapes and no numbers.
    """
    dtype, plan = problem.plan.arithmetic.dtype, problem.plan

    def random(*shape: int) -> torch.Tensor:
        if torch.device(device).type == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        made = torch.randn(
            shape, generator=generator, device=generator.device if generator else device
        )
        return made.to(device, dtype)

    if problem.source is None:
        x = random(plan.batch, *plan.image_shape)
    else:
        height, width, images, channels = problem.source
        x = random(images, channels, height, width)
    if x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    if problem.reads_features:
        x = x.flatten(1)
    shapes = problem.network.parameter_shapes()
    owned = {name: shapes[name] for name in shapes if name.split(".")[0] in dict(problem.layers)}
    state = {}
    for name, shape in owned.items():
        fan_in = max(1, torch.Size(shape[1:]).numel()) if name.endswith(".weight") else 1
        state[name] = random(*shape) * fan_in**-0.5
        if name.endswith(".running_var"):
            state[name] = state[name].abs() + 0.5
    return Tensors(x, state)


def ready(problem: Problem, given: Tensors) -> Ready:
    """Pack the tensors and bind the engine's kernels to them, outputs poisoned."""
    plan, x = problem.plan, given.x
    only = [name for name, _ in problem.layers]
    packed = pack(problem.network, given.state, plan.arithmetic, x.device, only=only)
    if problem.source is None:
        made = Ready(problem, bind(plan, packed), x)
    else:
        height, width, images, channels = problem.source
        source = layout.pack(x.reshape(images, channels, height, width))
        made = Ready(problem, bind(plan, packed, source), None)
    if x.device.type != "meta":
        made.poison()
    return made


def expected(problem: Problem, given: Tensors) -> torch.Tensor:
    """The float64 answer for the images of `checked`, [n, C, H, W] or [n, features]."""
    x = given.x[checked(problem).to(given.x.device)].double()
    state = {name: tensor.double() for name, tensor in given.state.items()}
    for name, layer in problem.layers:
        x = reference.apply(name, layer, x, state)
    return x


def checked(problem: Problem) -> torch.Tensor:
    """Indices of the images that are compared: the first, the last, and evenly between."""
    count = min(problem.batch, CHECKED_IMAGES)
    return torch.linspace(0, problem.batch - 1, count).round().long()


def match(problem: Problem, made: torch.Tensor, wanted: torch.Tensor) -> Match:
    """Compare an answer [N, ...] with what `expected` gave; NaN anywhere is an infinite error.

    The answer may have the shape [N, C, H, W] where [N, features] is wanted, and the reverse.
    """
    if len(made) != problem.batch or not made.isfinite().all():
        return Match(float("inf"), float("inf"), problem.tolerance)
    sample = made[checked(problem).to(made.device)].double()
    if sample.numel() != wanted.numel():
        return Match(float("inf"), float("inf"), problem.tolerance)
    return Match(*errors(sample.reshape(wanted.shape), wanted), problem.tolerance)


def _layers(network: Network, fused: Sequence[str]) -> tuple[tuple[str, Layer], ...]:
    """The layers of these names, and where torch needs it the Flatten between them."""
    names = [name for name, _ in network.layers]
    between = network.layers[names.index(fused[0]) : names.index(fused[-1]) + 1]
    return tuple(
        (name, layer) for name, layer in between if name in fused or isinstance(layer, Flatten)
    )


def _bytes(step: Step, plan: Plan) -> int:
    """Bytes of a step's output, without alignment."""
    height, width, images, channels = step.output
    return height * width * images * channels * plan.arithmetic.dtype.itemsize
