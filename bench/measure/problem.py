"""Layers as one problem: random tensors in, the right answer, and the engine's way to it.

A problem is a run of neighbouring steps cut out of a network's plan, "conv4" or "conv1+pool1", or
the whole network from images to logits. Its tensors are torch's: x [N, C, H, W] in channels-last
memory or [N, features], weights as in a state dict. What the engine needs beyond that (packed
weights, [H, W, N, C] activations) is made outside of what is timed, as each peer's own preparation
is; only the first layer, which reads images, pays for its way in. A whole network may also be given
pixels, uint8 as a decoder makes them: the engine reads them as they are, its peers normalise them.

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
from ...engine.load import aim, load_state
from ...engine.plan import (
    PLAIN,
    Arithmetic,
    KernelConfig,
    Options,
    Plan,
    Step,
    part,
    reconfigured,
)
from ...engine.spec import AdaptiveAvgPool2d, Dropout, Flatten, Layer, Network, NetworkError
from ...engine.verify import reduction, tolerance, within
from ...kernels import first_layer, layout
from ...kernels.jit import Launch, Work
from .timing import copies_to_overflow

PIECE = 64  # images that are compared at a time: float64 takes room
WHOLE = "random:0"


@dataclass(frozen=True, slots=True)
class Problem:
    """Neighbouring layers of a network, or all, for one batch in one dtype (of ARITHMETIC)."""

    name: str
    dtype: str
    plan: Plan  # these steps alone
    layers: tuple[tuple[str, Layer], ...]
    source: tuple[int, int, int, int] | None  # [H, W, N, C] of the first step; None: images
    whole: bool = False  # the network from images to logits
    pixels: bool = False  # whether its images are uint8, which the network normalises

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
        # The convolution behind the pass counts the images, not what the pass makes of them.
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
    images: torch.Tensor | None  # of a problem that starts with the images

    @property
    def launches(self) -> tuple[tuple[str, tuple[Launch, ...]], ...]:
        """Every launch by step, the first included; of a plan that does not slice its images."""
        if self.images is None:
            return self.bound.launches
        reader = self.problem.plan.steps[0].name
        return ((reader, (self.bound.first(self.images),)), *self.bound.launches)

    def __call__(self) -> None:
        self.bound.run(self.images)

    def poison(self) -> None:
        """Fill what will be written with NaN, so that what is left unwritten shows."""
        for out in self.bound.outputs.values():
            out.fill_(torch.nan)

    def output(self) -> torch.Tensor:
        """The answer, float32 [N, C, H, W] or [N, features]."""
        step = self.problem.step
        return to_nchw(step, self.bound.outputs[step.name])


def tuned_planner(
    network: Network,
    meaning: Arithmetic,
    device: torch.device,
    target: str | None = None,
    options: Options | None = PLAIN,
) -> Planner:
    """Plans as the engine makes them on this device or for a target.

    Launches follow one another as `options` say: by default all images at once, for layers that
    stand alone; None is as the device's table says, for a whole network. Raises TuningError for a
    table that cannot be read, EngineError for a GPU that is too old.
    """
    aimed = aim(target, device)
    return Planner(network, meaning, aimed.arch, tuned=aimed.tuned, options=options)


def problems(
    planner: Planner,
    dtype: str,
    batch: int,
    names: Sequence[str] | None = None,
    in_place: bool = True,
) -> list[Problem]:
    """Problems by name, "conv4" or "conv1+pool1"; None: every step of the network, one by one.

    Images are channels last and read in place if that can be; else, or if `in_place` is False, the
    first layer's problem includes the pass over them, which has none of its own. `dtype` is the
    planner's. Raises NetworkError, listing the steps there are, for a name that is none or for
    steps that are not neighbours.
    """
    in_place = in_place and _read_in_place(planner, batch)
    whole = planner(batch, image_dtype=planner.arithmetic.dtype, in_place=in_place)
    steps = whole.steps
    known = [step.name for step in steps if step.block]
    passes = len(steps) - len(known)
    cuts = []
    for name in known if names is None else names:
        parts = name.split("+")
        if unknown := [part for part in parts if part not in known]:
            raise NetworkError(
                f"{planner.network.name} has no step {unknown[0]!r}; it has {', '.join(known)}"
            )
        first, last = known.index(parts[0]) + passes, known.index(parts[-1]) + passes
        if [step.name for step in steps[first : last + 1]] != parts:
            raise NetworkError(
                f"{planner.network.name}: {name} are no neighbours; its steps are "
                f"{', '.join(known)}"
            )
        start = 0 if first == passes else first
        cut = part(whole, start, last + 1)
        fused = [layer for step in cut.steps for layer in step.layers]
        cuts.append(
            Problem(
                name,
                dtype,
                cut,
                _layers(planner.network, fused),
                steps[start - 1].output if start else None,
            )
        )
    return cuts


def network_problem(planner: Planner, dtype: str, batch: int, pixels: bool = False) -> Problem:
    """The network from images to logits; `dtype` is the planner's, `pixels` are uint8 images.

    Pixels are a race of their own, so " uint8" stands behind the network's name. The layers are
    those that torch must compute too: no dropout, no pool that changes nothing.
    """
    network = planner.network
    layers = tuple(
        (name, layer)
        for name, layer, shape, pooled in network.walk()
        if not isinstance(layer, Dropout)
        and not (isinstance(layer, AdaptiveAvgPool2d) and shape == pooled)
    )
    images = torch.uint8 if pixels else planner.arithmetic.dtype
    name = f"{network.name} uint8" if pixels else network.name
    in_place = not pixels and _read_in_place(planner, batch)
    plan = planner(batch, image_dtype=images, in_place=in_place)
    return Problem(name, dtype, plan, layers, None, whole=True, pixels=pixels)


def _read_in_place(planner: Planner, batch: int) -> bool:
    """Whether the engine reads such images as `tensors` makes where they lie."""
    return first_layer.in_place(
        torch.empty(
            (batch, *planner.network.input_shape),
            dtype=planner.arithmetic.dtype,
            device="meta",
            memory_format=torch.channels_last,
        ),
        planner.arithmetic.dtype,
    )


def configured(problem: Problem, config: KernelConfig, step: str | None = None) -> Problem:
    """The same problem with another configuration of one step, by default its last."""
    name = step or problem.step.name
    return replace(problem, plan=reconfigured(problem.plan, name, config))


def tensors(
    problem: Problem, device: torch.device | str, generator: torch.Generator | None = None
) -> Tensors:
    """Fresh random tensors of the problem's dtype: x and biases of unit size, outputs likewise.

    Pixels are uint8. A whole network has the weights `WHOLE`, through which an error in its first
    layer still shows in the last. On "meta" they have shapes and no numbers.
    """
    dtype, plan = problem.plan.arithmetic.dtype, problem.plan
    meta = torch.device(device).type == "meta"

    def random(*shape: int) -> torch.Tensor:
        if meta:
            return torch.empty(shape, dtype=dtype, device="meta")
        return torch.randn(shape, generator=generator, device=drawn_on).to(device, dtype)

    drawn_on = generator.device if generator else device
    if problem.pixels:
        shape = (plan.batch, *plan.image_shape)
        x = torch.randint(0, 256, shape, generator=generator, device=drawn_on, dtype=torch.uint8)
        x = x.to(device)
    elif problem.source is None:
        x = random(plan.batch, *plan.image_shape)
    else:
        height, width, images, channels = problem.source
        x = random(images, channels, height, width)
    if x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    if problem.reads_features:
        x = x.flatten(1)
    if problem.whole and not meta:
        _, whole = load_state(problem.network, WHOLE)
        return Tensors(x, {name: tensor.to(device, dtype) for name, tensor in whole.items()})
    shapes = problem.network.parameter_shapes()
    owned = {name: shapes[name] for name in shapes if name.split(".")[0] in dict(problem.layers)}
    state = {}
    for name, shape in owned.items():
        fan_in = max(1, torch.Size(shape[1:]).numel()) if name.endswith(".weight") else 1
        state[name] = random(*shape)
        if not meta:  # where torch takes milliseconds to do nothing
            state[name] *= fan_in**-0.5
        if name.endswith(".running_var"):
            state[name] = state[name].abs() + 0.5
    return Tensors(x, state)


def rotation(given: Tensors, nbytes: int, device: torch.device) -> list[Tensors]:
    """Tensors to rotate through: `given`, and the same numbers in other memory.

    `copies` of them, so that no input lies in the L2 cache because the run before left it there.
    """
    rotated = [given]
    for _ in range(1, copies(nbytes, device)):
        state = {name: tensor.clone() for name, tensor in given.state.items()}
        rotated.append(Tensors(given.x.clone(), state))
    return rotated


def copies(nbytes: int, device: torch.device) -> int:
    """How many copies of its tensors a run needs that moves `nbytes`; one on a CPU."""
    if device.type != "cuda":
        return 1
    return copies_to_overflow(nbytes, torch.cuda.get_device_properties(device).L2_cache_size)


def ready(problem: Problem, given: Tensors) -> Ready:
    """Pack the tensors and bind the engine's kernels to them, outputs poisoned."""
    plan, x = problem.plan, given.x
    only = [name for name, _ in problem.layers]
    packed = pack(problem.network, given.state, plan.arithmetic, x.device, only=only)
    if problem.source is None:
        bound = Ready(problem, bind(plan, packed), x)
    else:
        height, width, images, channels = problem.source
        source = layout.pack(x.reshape(images, channels, height, width))
        bound = Ready(problem, bind(plan, packed, source), None)
    if x.device.type != "meta":
        bound.poison()
    return bound


def expected(problem: Problem, given: Tensors, images: torch.Tensor | None = None) -> torch.Tensor:
    """The float64 answer, for all images or these: [n, C, H, W] or [n, features]."""
    state = {name: tensor.double() for name, tensor in given.state.items()}
    made = []
    for x in (given.x if images is None else given.x[images.to(given.x.device)]).split(PIECE):
        x = reference.normalise(x, problem.network.preprocess, torch.float64)
        for name, layer in problem.layers:
            x = reference.apply(name, layer, x, state)
        made.append(x)
    return torch.cat(made)


def match(problem: Problem, answer: torch.Tensor, wanted: torch.Tensor) -> Match:
    """Compare an answer [N, ...] with what `expected` gave; NaN anywhere is an infinite error.

    The answer may have the shape [N, C, H, W] where [N, features] is wanted, and the reverse.
    """
    count, fits = len(answer), answer.numel() == wanted.numel()
    if not fits or count != problem.batch or not answer.isfinite().all():
        return Match(float("inf"), float("inf"), problem.tolerance)
    pieces = zip(answer.reshape(wanted.shape).split(PIECE), wanted.split(PIECE), strict=True)
    worst, rest = zip(*(_norms(made.double() - right) for made, right in pieces), strict=True)
    size, length = _norms(wanted)
    largest, rms = _relative(max(worst), size), _relative(math.hypot(*rest), length)
    return Match(largest, rms, problem.tolerance)


def _norms(x: torch.Tensor) -> tuple[float, float]:
    """The largest magnitude, and the root of the sum of squares."""
    return torch.linalg.vector_norm(x, math.inf).item(), torch.linalg.vector_norm(x).item()


def _relative(error: float, size: float) -> float:
    """Where zeros are wanted, zeros have no error and anything else has an infinite one."""
    return error / size if size else math.inf if error else 0.0


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
