"""Whether a candidate is right: its answers, and what it does to the memory around its tensors.

All images of an answer are compared with float64. Every tensor lies between two fences in one
buffer. What is written outside of the output shows in them. What is read outside of the inputs has
an effect: with other values in the fences, and another poison in the output, the answer must have
the same bits. NaN is one of these values, so masking by multiplication does not hide a read. Where
kernels are interpreted every access is watched besides (`sanitizer.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch

from ...kernels import layout
from ..measure.problem import Match, Problem, Tensors, expected, match, tensors
from .candidate import Candidate, Config, Conv2dProblem, Layout, LinearProblem, pose
from .sanitizer import sanitized

SEEDS = 3  # answers on as many fresh random inputs are compared with float64

# A fence is as long as its tensor, within these bytes: an index that is wrong by an image, a row of
# pixels or a tile still lands in it.
SHORTEST, LONGEST = 2**20, 2**24


class Disqualified(Exception):
    """Why a candidate is out of the race, in one line."""


@dataclass(frozen=True, slots=True)
class Fenced:
    """A tensor inside a longer buffer; what is not the tensor is fence."""

    buffer: torch.Tensor
    tensor: torch.Tensor

    def surround(self, value: float) -> None:
        """Fill the fences, and gaps between rows, and leave the tensor as it is."""
        inside = self.tensor.clone()
        self.buffer.fill_(value)
        self.tensor.copy_(inside)

    def outside(self) -> torch.Tensor:
        """The bits of the buffer with zeros for the tensor."""
        copy, inside = self.buffer.clone(), self.tensor
        copy.as_strided(inside.shape, inside.stride(), inside.storage_offset()).zero_()
        return _bits(copy)


def fenced(like: torch.Tensor) -> Fenced:
    """A copy of a tensor, shape and strides, between fences."""
    size = 1 + sum((n - 1) * step for n, step in zip(like.shape, like.stride(), strict=True))
    itemsize = like.dtype.itemsize
    fence = min(max(size * itemsize, SHORTEST), LONGEST) // 512 * 512 // itemsize
    buffer = torch.empty(size + 2 * fence, dtype=like.dtype, device=like.device)
    tensor = buffer.as_strided(like.shape, like.stride(), fence)
    tensor.copy_(like)
    return Fenced(buffer, tensor)


@dataclass(frozen=True, slots=True)
class Case:
    """One set of random inputs, as a candidate gets them, and the right answer."""

    problem: Problem
    inputs: Mapping[str, Fenced]  # x, weight and bias
    out: Fenced
    right: torch.Tensor  # in float64

    def answer(
        self, candidate: Candidate, config: Config, around: Mapping[str, float]
    ) -> torch.Tensor:
        """Run it once with these values in the fences of x, weight, bias and out, and in out.

        Raises Disqualified if it wrote what it must not, and whatever it raises.
        """
        everything = {**self.inputs, "out": self.out}
        for name, each in everything.items():
            each.surround(around[name])
        self.out.tensor.fill_(around["out"])
        fences = {name: each.outside() for name, each in everything.items()}
        before = {name: each.tensor.clone() for name, each in self.inputs.items()}

        x, weight, bias = (self.inputs[name].tensor for name in ("x", "weight", "bias"))
        posed, out, cpu = pose(self.problem), self.out.tensor, x.device.type == "cpu"
        with ExitStack() as stack:
            violations = stack.enter_context(sanitized(unwritten=[out])) if cpu else []
            prepared = candidate.prepare(posed, weight, config)
            result = candidate.run(posed, x, prepared, bias, out, config)
        if x.device.type == "cuda":
            torch.cuda.synchronize(x.device)

        if violations:
            raise Disqualified(str(violations[0]))
        for name, each in everything.items():
            if not each.outside().equal(fences[name]):
                whose = "its output" if name == "out" else f"its input {name}"
                raise Disqualified(f"writes outside {whose}")
        for name, tensor in before.items():
            if not same_bits(self.inputs[name].tensor, tensor):
                raise Disqualified(f"changes its input {name}")
        return check_answer(result, out).clone()


def check_answer(result: object, out: torch.Tensor) -> torch.Tensor:
    """What `run` returned, or `out` for None. Raises Disqualified for another kind of answer."""
    if result is None:
        return out
    if type(result) is not torch.Tensor:  # a child of it may compute when it is compared
        raise Disqualified(f"run returns a {type(result).__name__}, wanted None or a tensor")
    if (result.shape, result.dtype) != (out.shape, out.dtype):
        raise Disqualified(
            f"returns {result.dtype} {tuple(result.shape)}, wanted {out.dtype} {tuple(out.shape)}"
        )
    return result


def compare(factor: float, problem: Problem, result: torch.Tensor, right: torch.Tensor) -> Match:
    """An answer beside the right one, within so many times the bound. Raises Disqualified."""
    found = match(problem, result, right)
    found = replace(found, tolerance=found.tolerance * factor)
    if not found.passed:
        raise Disqualified(_fault(result, right, found))
    return found


def _fault(result: torch.Tensor, right: torch.Tensor, found: Match) -> str:
    """What is wrong with an answer, and where."""
    if not (finite := result.isfinite()).all():
        return f"wrong: NaN or infinity in {box(~finite)}"
    bad = (result.double() - right).abs() > found.tolerance * right.abs().max()
    if not bad.any():
        return f"wrong: RMS error {found.rms_error:.1e}, allowed {found.tolerance / 4:.1e}"
    return (
        f"wrong: max error {found.max_error:.1e}, allowed {found.tolerance:.1e}; {int(bad.sum())} "
        f"of {bad.numel()} values are off, in {box(bad)}"
    )


def box(where: torch.Tensor) -> str:
    """The smallest box of an output, [N, OC, OH, OW] or [N, OC], that holds all of these places."""
    axes = ("filters", "rows", "columns") if where.ndim == 4 else ("outputs",)
    told = []
    for axis, name in (*enumerate(axes, 1), (0, "images")):
        others = [other for other in range(where.ndim) if other != axis]
        hit = where.any(others).nonzero().flatten().tolist()
        first, last = hit[0], hit[-1]
        span = f"{name} {first} to {last}" if last > first else f"{name[:-1]} {first}"
        told.append(f"all {name}" if last - first + 1 == where.shape[axis] else span)
    return ", ".join(told).replace("all rows, all columns", "all pixels")


def arrange(
    given: Tensors, posed: Conv2dProblem | LinearProblem, memory: Layout
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A problem's tensors as x, weight and bias in a candidate's layout, and out full of NaN."""
    named = {name.rpartition(".")[2]: tensor for name, tensor in given.state.items()}
    inputs = {"x": given.x, "weight": named["weight"], "bias": named["bias"]}
    if isinstance(posed, LinearProblem):
        out = given.x.new_empty(posed.N, posed.OC)
    else:
        inputs["x"] = laid_out(given.x, memory)
        shape = (posed.N, posed.OC, posed.OH, posed.OW)
        out = laid_out(given.x.new_empty(shape), memory)
    return inputs, out.fill_(torch.nan)


def laid_out(x: torch.Tensor, memory: Layout) -> torch.Tensor:
    """A copy of x [N, C, H, W] whose memory is channels last, or the engine's [H, W, N, C]."""
    if memory == "HWNC":
        return layout.pack(x).permute(2, 3, 0, 1)
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def case(problem: Problem, device: torch.device, seed: int, memory: Layout) -> Case:
    """Fresh inputs between fences; the same seed draws the same numbers on every device."""
    given = tensors(problem, device, torch.Generator().manual_seed(seed))
    inputs, out = arrange(given, pose(problem), memory)
    fences = {name: fenced(tensor) for name, tensor in inputs.items()}
    return Case(problem, fences, fenced(out), expected(problem, given))


# What stands around x, weight, bias and out, and in out, before two runs of the same input.
NAN = dict.fromkeys(("x", "weight", "bias", "out"), math.nan)
FINITE = {"x": 3.0, "weight": 3.0, "bias": 3.0, "out": -7.0}


def examine(candidate: Candidate, config: Config, given: Case) -> Match:
    """Whether it is right on these inputs, the same each time, and keeps to its tensors.

    Raises Disqualified for the first thing found wrong, and whatever the candidate raises.
    """
    result = given.answer(candidate, config, NAN)
    if not same_bits(result, given.answer(candidate, config, NAN)):
        raise Disqualified("the same input gives other bits the second time")
    _check_reads(candidate, config, given, result)
    return compare(candidate.tolerance, given.problem, result, given.right)


def confirm(candidate: Candidate, config: Config, seen: Match, given: Case, seed: int) -> Match:
    """The worst match: `seen` by `examine` on the inputs of `seed`, and on those of later seeds.

    Raises as `examine` does.
    """
    matches = [seen]
    for later in range(seed + 1, seed + SEEDS):
        device = given.out.tensor.device
        other = case(given.problem, device, later, candidate.layout)
        result = other.answer(candidate, config, NAN)
        matches.append(compare(candidate.tolerance, given.problem, result, other.right))
    return max(matches, key=lambda errors: errors.max_error)


def _check_reads(candidate: Candidate, config: Config, given: Case, first: torch.Tensor) -> None:
    """The answer must not depend on what lies around the tensors, nor on what `out` held."""
    second = given.answer(candidate, config, FINITE)
    if same_bits(first, second):
        return
    unwritten = first.isnan() & (second == FINITE["out"])
    if unwritten.any():
        count, total = int(unwritten.sum()), unwritten.numel()
        raise Disqualified(f"leaves {count} of {total} outputs unwritten: {box(unwritten)}")
    guilty = [
        name
        for name in NAN
        if not same_bits(given.answer(candidate, config, FINITE | {name: math.nan}), second)
    ]
    if guilty == ["out"]:
        raise Disqualified("reads its output, or what lies around it, before writing it")
    whose = " and ".join(name for name in guilty if name != "out")
    where = box(_bits(first) != _bits(second))
    raise Disqualified(f"reads outside its input {whose}: it shows in {where}")


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one shape and dtype are equal, NaN to NaN."""
    return _bits(a).equal(_bits(b))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize])
