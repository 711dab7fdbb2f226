"""The functional face is torch's: same answers for what torch takes, same refusals for the rest.

Legal calls are generated, as data: a `Call` names a function and its operands, and is carried out
by our function and by torch's in float64. Refusals are a table, carried out by both as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from alexnet_triton import kernels
from hypothesis import given, settings
from hypothesis import strategies as st

Close = Callable[..., None]

# torch says so of every 'same' padding that is uneven.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")

ARRANGEMENTS = ("dense", "reversed", "sliced", "expanded", "channels_last")


@dataclass(frozen=True)
class Operand:
    """A random tensor and how it lies in memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    arrangement: str = "dense"
    seed: int = 0

    def on(self, device: torch.device) -> torch.Tensor:
        numbers = torch.randn(self.shape, generator=torch.Generator().manual_seed(self.seed))
        return arrange(numbers.to(device, self.dtype), self.arrangement)


def arrange(x: torch.Tensor, arrangement: str) -> torch.Tensor:
    """The same shape in other strides, and the same numbers unless `expanded`."""
    match arrangement:
        case "reversed":
            order = tuple(reversed(range(x.dim())))
            return x.permute(order).contiguous().permute(order)
        case "sliced":  # every other element in each dimension, NaN between them
            odd = tuple(slice(1, None, 2) for _ in x.shape)
            apart = x.new_full([2 * size + 1 for size in x.shape], torch.nan)
            apart[odd] = x
            return apart[odd]
        case "expanded" if x.dim() and x.shape[0]:
            return x[:1].expand_as(x)
        case "channels_last" if x.dim() == 4:
            return x.to(memory_format=torch.channels_last)
    return x


@dataclass(frozen=True)
class Call:
    """One call that torch accepts too, but for `activation`, `precision` and four paddings."""

    function: str
    operands: tuple[Operand | None, ...]
    reduction: int = 0  # products or terms in a sum
    options: dict[str, Any] = field(default_factory=dict)
    fused: dict[str, Any] = field(default_factory=dict)  # what torch's function does not have


def torch_answer(call: Call, tensors: list[torch.Tensor | None]) -> torch.Tensor:
    """By torch's function of the same name; four paddings go first, the activation last."""
    options = dict(call.options)
    if isinstance(padding := options.get("padding"), tuple) and len(padding) == 4:
        top, bottom, left, right = padding
        tensors = [F.pad(tensors[0], (left, right, top, bottom)), *tensors[1:]]
        options["padding"] = 0
    result = getattr(F, call.function)(*tensors, **options)
    activation = call.fused.get("activation")
    return getattr(torch, activation)(result) if activation else result


def check(call: Call, device: torch.device, assert_close: Close) -> None:
    """Ours is torch's within the bound, contiguous, of the same dtype and device; inputs live on."""
    tensors = [None if o is None else o.on(device) for o in call.operands]
    copies = [None if t is None else t.clone() for t in tensors]
    actual = getattr(kernels, call.function)(*tensors, **call.options, **call.fused)

    x = tensors[0]
    assert actual.dtype == x.dtype
    assert actual.device == x.device
    assert actual.is_contiguous()
    for before, after in zip(copies, tensors, strict=True):
        assert before is after or torch.equal(before, after), "an input was written"

    exact = [None if t is None else t.double().cpu() for t in copies]
    reference = torch_answer(call, exact)
    size = torch_answer(call, [None if t is None else t.abs() for t in exact])
    precision = call.fused.get("precision") or "ieee"
    assert_close(actual, reference, x.dtype, call.reduction, precision, size)


# --- legal calls, generated ------------------------------------------------------------------

batches = st.one_of(
    st.none(),  # one image without a batch dimension
    st.integers(0, 5),
    st.integers(64, 130),  # from 64 images on a tile is a block of images
)
dtypes = st.sampled_from([torch.float32, torch.float16])
activations = st.sampled_from([None, "relu", "sigmoid"])
seeds = st.integers(0, 2**32 - 1)


def operands(shape: tuple[int, ...], dtype: torch.dtype) -> st.SearchStrategy[Operand]:
    return st.builds(
        Operand, st.just(shape), st.just(dtype), st.sampled_from(ARRANGEMENTS), seeds
    )


def one_or_two(low: int, high: int) -> st.SearchStrategy[int | tuple[int, ...] | list[int]]:
    """The ways torch takes a pair: 2, (2,), (2, 3), [2, 3]."""
    number = st.integers(low, high)
    return number | st.tuples(number) | st.tuples(number, number) | st.lists(number, min_size=2, max_size=2)


def as_pair(value: Any) -> tuple[int, int]:
    numbers = value if isinstance(value, tuple | list) else (value,)
    return numbers[0], numbers[-1]


@st.composite
def conv2d_calls(draw: st.DrawFn) -> Call:
    n = draw(batches)
    large = n is not None and n > 5
    groups = draw(st.integers(1, 2 if large else 3))
    c = draw(st.integers(1, 5) | st.integers(15, 18))
    oc = draw(st.integers(1, 5) | st.integers(15, 18))
    kernel = draw(st.tuples(*[st.integers(1, 2 if large else 4)] * 2))
    dilation = draw(one_or_two(1, 3))
    padding = draw(
        st.sampled_from(["same", "valid"])
        | one_or_two(0, 3)
        | st.tuples(*[st.integers(0, 3)] * 4)
    )
    stride = 1 if padding == "same" else draw(one_or_two(1, 4))
    match padding:
        case str():
            sides = [0, 0]
        case (top, bottom, left, right):
            sides = [top + bottom, left + right]
        case _:
            sides = [2 * p for p in as_pair(padding)]
    height, width = (
        max(1, d * (k - 1) + 1 - side) + draw(st.integers(0, 2 if large else 6))
        for d, k, side in zip(as_pair(dilation), kernel, sides, strict=True)
    )
    dtype = draw(dtypes)
    image = (groups * c, height, width)
    bias = draw(st.booleans())
    return Call(
        "conv2d",
        (
            draw(operands(image if n is None else (n, *image), dtype)),
            draw(operands((groups * oc, c, *kernel), dtype)),
            draw(operands((groups * oc,), dtype)) if bias else None,
        ),
        reduction=c * kernel[0] * kernel[1],
        options={"stride": stride, "padding": padding, "dilation": dilation, "groups": groups},
        fused={
            "activation": draw(activations),
            "precision": draw(st.sampled_from([None, "ieee"])) if dtype == torch.float32 else None,
        },
    )


@settings(max_examples=80)
@given(call=conv2d_calls())
def test_conv2d(call: Call, device: torch.device, assert_close: Close) -> None:
    check(call, device, assert_close)


@st.composite
def pool2d_calls(draw: st.DrawFn, function: str) -> Call:
    kernel_size = draw(one_or_two(1, 4))
    kernel = as_pair(kernel_size)
    dilation = draw(one_or_two(1, 3)) if function == "max_pool2d" else 1
    padding = draw(st.tuples(*[st.integers(0, k // 2) for k in kernel]))
    height, width = (
        max(1, d * (k - 1) + 1 - 2 * p) + draw(st.integers(0, 6))
        for k, d, p in zip(kernel, as_pair(dilation), padding, strict=True)
    )
    options = {
        "kernel_size": kernel_size,
        "stride": draw(st.none() | st.just(()) | one_or_two(1, 4)),
        "padding": padding,
        "ceil_mode": draw(st.booleans()),
    }
    if function == "max_pool2d":
        options["dilation"] = dilation
    else:
        options["count_include_pad"] = draw(st.booleans())
    n, c = draw(batches), draw(st.integers(1, 20))
    shape = (c, height, width) if n is None else (n, c, height, width)
    return Call(
        function,
        (draw(operands(shape, draw(dtypes))),),
        reduction=kernel[0] * kernel[1] if function == "avg_pool2d" else 0,
        options=options,
    )


@given(call=pool2d_calls("max_pool2d"))
def test_max_pool2d(call: Call, device: torch.device, assert_close: Close) -> None:
    check(call, device, assert_close)
    (x,) = (o.on(device) for o in call.operands)
    assert torch.equal(kernels.max_pool2d(x, **call.options), torch_answer(call, [x]))


@given(call=pool2d_calls("avg_pool2d"))
def test_avg_pool2d(call: Call, device: torch.device, assert_close: Close) -> None:
    check(call, device, assert_close)


@st.composite
def adaptive_calls(draw: st.DrawFn) -> Call:
    sizes = st.integers(1, 8)
    n, c, height, width = draw(batches), draw(st.integers(0, 20)), draw(sizes), draw(sizes)
    wanted = st.none() | st.integers(0, 12)
    shape = (c, height, width) if n is None else (n, c, height, width)
    output_size = draw(st.integers(0, 12) | st.tuples(wanted, wanted))
    return Call(
        "adaptive_avg_pool2d",
        (draw(operands(shape, draw(dtypes))),),
        reduction=height * width,
        options={"output_size": output_size},
    )


@given(call=adaptive_calls())
def test_adaptive_avg_pool2d(call: Call, device: torch.device, assert_close: Close) -> None:
    check(call, device, assert_close)


@st.composite
def linear_calls(draw: st.DrawFn) -> Call:
    rows = draw(
        st.lists(st.integers(0, 5), max_size=3).map(tuple) | st.tuples(st.integers(60, 130))
    )
    k = draw(st.integers(0, 40) | st.integers(1000, 1100))
    filters = draw(st.just(()) | st.tuples(st.integers(0, 40)))
    biases = [None, ()] + ([filters, (1,), (1, *filters)] if filters else [])
    if not filters and len(rows) == 1:
        biases = [None]  # torch 2.13 refuses what its documentation allows
    bias = draw(st.sampled_from(biases))
    dtype = draw(dtypes)
    return Call(
        "linear",
        (
            draw(operands((*rows, k), dtype)),
            draw(operands((*filters, k), dtype)),
            None if bias is None else draw(operands(bias, dtype)),
        ),
        reduction=k,
        fused={"activation": draw(activations)},
    )


@given(call=linear_calls())
def test_linear(call: Call, device: torch.device, assert_close: Close) -> None:
    check(call, device, assert_close)


@st.composite
def lrn_calls(draw: st.DrawFn) -> Call:
    shape = draw(
        st.tuples(st.integers(0, 5), st.integers(0, 20), st.integers(1, 30))
        | st.lists(st.integers(1, 5), min_size=4, max_size=6).map(tuple)
        | st.tuples(st.integers(64, 130), st.integers(1, 20), st.just(2), st.just(1))
    )
    size = draw(st.integers(1, 8) | st.just(40))
    return Call(
        "local_response_norm",
        (draw(operands(shape, draw(dtypes))),),
        reduction=size,
        options={
            "size": size,
            "alpha": draw(st.floats(0, 10)),
            "beta": draw(st.floats(-1, 2)),
            "k": draw(st.floats(0.5, 4)),
        },
    )


@given(call=lrn_calls())
def test_local_response_norm(call: Call, device: torch.device, assert_close: Close) -> None:
    check(call, device, assert_close)


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", [conv2d_calls(), linear_calls(), pool2d_calls("avg_pool2d"), pool2d_calls("max_pool2d"), adaptive_calls(), lrn_calls()], ids=["conv2d", "linear", "avg_pool2d", "max_pool2d", "adaptive_avg_pool2d", "local_response_norm"])
@settings(max_examples=20)
@given(data=st.data())
def test_bfloat16(strategy, data, device, assert_close) -> None:
    pass
