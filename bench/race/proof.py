"""Whether a candidate is right: its answers, and what it does to the memory around its tensors.

Every tensor that a candidate gets lies between two fences in one buffer. What it writes outside of
its output shows in the fences. What it reads outside of its inputs cannot be seen by itself, but
its effect can: with other values in the fences, and another poison in the output, the answer must
have the same bits. NaN is one of these values, so masking by multiplication does not hide a read;
a read whose value is thrown away is not found.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from ...kernels import layout
from ..measure.problem import Match, Problem, Tensors, checked, expected, match, tensors
from .candidate import Candidate, Config, Conv2dProblem, Layout, LinearProblem, pose

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
    posed: Conv2dProblem | LinearProblem
    inputs: Mapping[str, Fenced]  # x, weight and bias
    out: Fenced
    right: torch.Tensor  # in float64

    def answer(self, candidate: Candidate, config: Config, around: Mapping[str, float]) -> _Answer:
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
        prepared = candidate.prepare(self.posed, weight, config)
        result = candidate.run(self.posed, x, prepared, bias, self.out.tensor, config)
        if x.device.type == "cuda":
            torch.cuda.synchronize(x.device)

        for name, each in everything.items():
            if not each.outside().equal(fences[name]):
                whose = "its output" if name == "out" else f"its input {name}"
                raise Disqualified(f"writes outside {whose}")
        for name, tensor in before.items():
            if not same_bits(self.inputs[name].tensor, tensor):
                raise Disqualified(f"changes its input {name}")
        result = check_answer(result, self.out.tensor)
        return _Answer(result.clone(), result is self.out.tensor)

    def check(self, candidate: Candidate, result: torch.Tensor) -> Match:
        """Compare an answer with float64, within the candidate's own bound. Raises Disqualified."""
        errors = match(self.problem, result, self.right)
        errors = replace(errors, tolerance=errors.tolerance * candidate.tolerance)
        if not errors.passed:
            raise Disqualified("wrong: " + _fault(self, result, errors))
        return errors


@dataclass(frozen=True, slots=True)
class _Answer:
    values: torch.Tensor
    in_place: bool  # it stands in `out`


def check_answer(result: object, out: torch.Tensor) -> torch.Tensor:
    """What `run` returned, or `out` for None. Raises Disqualified for another kind of answer."""
    if result is None:
        return out
    if not isinstance(result, torch.Tensor):
        raise Disqualified(f"run returns a {type(result).__name__}, wanted None or a tensor")
    if (result.shape, result.dtype) != (out.shape, out.dtype):
        raise Disqualified(
            f"returns {result.dtype} {tuple(result.shape)}, wanted {out.dtype} {tuple(out.shape)}"
        )
    return result


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
    given, posed = tensors(problem, device, torch.Generator().manual_seed(seed)), pose(problem)
    inputs, out = arrange(given, posed, memory)
    fences = {name: fenced(tensor) for name, tensor in inputs.items()}
    return Case(problem, posed, fences, fenced(out), expected(problem, given))


# What stands around x, weight, bias and out, and in out, before two runs of the same input.
NAN = dict.fromkeys(("x", "weight", "bias", "out"), math.nan)
FINITE = {"x": 3.0, "weight": 3.0, "bias": 3.0, "out": -7.0}


def examine(candidate: Candidate, config: Config, given: Case) -> Match:
    """Whether it is right on these inputs, the same each time, and keeps to its tensors.

    Raises Disqualified for the first thing found wrong, and whatever the candidate raises.
    """
    result = given.answer(candidate, config, NAN)
    if not same_bits(result.values, given.answer(candidate, config, NAN).values):
        raise Disqualified("the same input gives other bits the second time")
    _check_reads(candidate, config, given, result)
    return given.check(candidate, result.values)


def confirm(candidate: Candidate, config: Config, seen: Match, given: Case, seed: int) -> Match:
    """The worst errors: `seen` by `examine` on the inputs of `seed`, and on those of later seeds.

    Raises as `examine` does.
    """
    matches = [seen]
    for later in range(seed + 1, seed + SEEDS):
        device = given.out.tensor.device
        other = case(given.problem, device, later, candidate.layout)
        matches.append(other.check(candidate, other.answer(candidate, config, NAN).values))
    return Match(
        max(errors.max_error for errors in matches),
        max(errors.rms_error for errors in matches),
        seen.tolerance,
    )


def _check_reads(candidate: Candidate, config: Config, given: Case, first: _Answer) -> None:
    """The answer must not depend on what lies around the tensors, nor on what `out` held."""
    second = given.answer(candidate, config, FINITE)
    if same_bits(first.values, second.values):
        return
    unwritten = first.values.isnan() & (second.values == FINITE["out"])
    if first.in_place and unwritten.any():
        count, total = int(unwritten.sum()), unwritten.numel()
        raise Disqualified(
            f"leaves {count} of {total} outputs unwritten, the first at {_first(unwritten)}"
        )
    guilty = [
        name
        for name in NAN
        if not same_bits(
            given.answer(candidate, config, FINITE | {name: math.nan}).values, second.values
        )
    ]
    if guilty == ["out"]:
        raise Disqualified("reads its output, or what lies around it, before writing it")
    whose = " and ".join(name for name in guilty if name != "out")
    where = _first(_bits(first.values) != _bits(second.values))
    raise Disqualified(f"reads outside its input {whose}: it shows first at {where}")


def _fault(given: Case, result: torch.Tensor, errors: Match) -> str:
    """What is wrong with an answer, and where."""
    if not result.isfinite().all():
        return f"NaN or infinity at {_first(~result.isfinite())}"
    images = checked(given.problem)
    sample = result[images.to(result.device)].double()
    error = (sample - given.right).abs() / given.right.abs().max()
    bad = error > errors.tolerance
    if not bad.any():
        return f"RMS error {errors.rms_error:.1e}, allowed {errors.tolerance / 4:.1e}"
    image, *place = (int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    where = ""
    border = _border(given.posed).to(bad.device)
    if border.any() and not border.all() and not (bad & ~border).any():
        where = ", all at the border"
    return (
        f"max error {errors.max_error:.1e} at {[int(images[image]), *place]}, allowed "
        f"{errors.tolerance:.1e}; {int(bad.sum())} of {bad.numel()} values are off{where}"
    )


def _border(posed: Conv2dProblem | LinearProblem) -> torch.Tensor:
    """Which pixels [OH, OW] of the output see padding; one False for a linear layer."""
    if isinstance(posed, LinearProblem):
        return torch.tensor(False)

    def sees(out: int, size: int, kernel: int) -> torch.Tensor:
        start = torch.arange(out) * posed.stride - posed.padding
        return (start < 0) | (start + posed.dilation * (kernel - 1) >= size)

    rows, columns = sees(posed.OH, posed.H, posed.KH), sees(posed.OW, posed.W, posed.KW)
    return rows[:, None] | columns[None, :]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one shape and dtype are equal, NaN to NaN."""
    return _bits(a).equal(_bits(b))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize])


def _first(mask: torch.Tensor) -> list[int]:
    place: list[int] = mask.nonzero()[0].tolist()
    return place
