"""The functional face gives torch's answers for what torch takes; test_arguments has the rest.

Calls are generated, as data: a `Call` names a function and its operands, and is carried out by our
function and by torch's in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from alexnet_triton import kernels
from alexnet_triton.kernels.epilogue import ACTIVATIONS, activated
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


def torch_answer(call: Call, tensors: list[Any]) -> torch.Tensor:
    """By torch's function of the same name; four paddings go first."""
    options = dict(call.options)
    if isinstance(padding := options.get("padding"), tuple) and len(padding) == 4:
        top, bottom, left, right = padding
        tensors = [F.pad(tensors[0], (left, right, top, bottom)), *tensors[1:]]
        options["padding"] = 0
    answer: torch.Tensor = getattr(F, call.function)(*tensors, **options)
    return answer


def check(call: Call, device: torch.device, assert_close: Close) -> None:
    """Ours is torch's within the bound, contiguous, of the input's dtype; inputs are unchanged."""
    tensors: list[Any] = [None if o is None else o.on(device) for o in call.operands]
    copies = [None if t is None else t.clone() for t in tensors]
    actual = getattr(kernels, call.function)(*tensors, **call.options, **call.fused)

    x = tensors[0]
    assert actual.dtype == x.dtype
    assert actual.device == x.device
    assert actual.is_contiguous()
    for before, after in zip(copies, tensors, strict=True):
        unchanged = before is None or torch.equal(before, after)
        assert unchanged, "an input was written"

    # Dense, since torch's local_response_norm fails for some strides.
    exact = [None if t is None else t.double().cpu().contiguous() for t in copies]
    reference = torch_answer(call, exact)
    reference = activated(reference, call.fused.get("activation"))
    size = torch_answer(call, [None if t is None else t.abs() for t in exact])
    precision = call.fused.get("precision") or "ieee"
    assert_close(actual, reference, x.dtype, call.reduction, precision, size)
    if call.function == "max_pool2d":
        assert torch.equal(actual.double().cpu(), reference)


# --- legal calls, generated ------------------------------------------------------------------

batches = st.one_of(
    st.none(),  # one image without a batch dimension
    st.integers(0, 5),
    st.integers(64, 72),  # from 64 images on a tile is a block of images
)
dtypes = st.sampled_from([torch.float32, torch.float16])
activations = st.sampled_from([None, *(n for n, row in ACTIVATIONS.items() if not row.parameters)])
seeds = st.integers(0, 2**32 - 1)


def operands(shape: tuple[int, ...], dtype: torch.dtype) -> st.SearchStrategy[Operand]:
    return st.builds(Operand, st.just(shape), st.just(dtype), st.sampled_from(ARRANGEMENTS), seeds)


def one_or_two(low: int, high: int) -> st.SearchStrategy[int | tuple[int, ...] | list[int]]:
    """The ways torch takes a pair: 2, (2,), (2, 3), [2, 3]."""
    number = st.integers(low, high)
    return (
        number
        | st.tuples(number)
        | st.tuples(number, number)
        | st.lists(number, min_size=2, max_size=2)
    )


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
    kernel = draw(st.tuples(*[st.integers(1, 2 if large else 3)] * 2))
    dilation = draw(one_or_two(1, 3))
    padding = draw(
        st.sampled_from(["same", "valid"]) | one_or_two(0, 3) | st.tuples(*[st.integers(0, 3)] * 4)
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


# A power by exp2 and log2 is wrong by its exponent times log 2 in half units, here by up to
# 2 * log2(4 + 10 * 5**2) * 0.7 = 11, which is what adding 121 numbers costs.
POWER = 121


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
        reduction=size + POWER,
        options={
            "size": size,
            "alpha": draw(st.floats(0, 10)),
            "beta": draw(st.floats(-1, 2)),
            "k": draw(st.floats(0.5, 4)),
        },
    )


CALLS = {
    "conv2d": conv2d_calls(),
    "max_pool2d": pool2d_calls("max_pool2d"),
    "avg_pool2d": pool2d_calls("avg_pool2d"),
    "adaptive_avg_pool2d": adaptive_calls(),
    "linear": linear_calls(),
    "local_response_norm": lrn_calls(),
}


@settings(max_examples=40 if torch.cuda.is_available() else 200)  # a GPU compiles for each
@given(call=CALLS["conv2d"])
def test_conv2d(call: Call, device: torch.device, assert_close: Close) -> None:
    check(call, device, assert_close)


@pytest.mark.parametrize("function", [name for name in CALLS if name != "conv2d"])
@given(data=st.data())
def test_generated_calls(
    function: str, data: st.DataObject, device: torch.device, assert_close: Close
) -> None:
    check(data.draw(CALLS[function]), device, assert_close)


@pytest.mark.gpu
@given(call=st.one_of(*CALLS.values()))
def test_bfloat16(call: Call, device: torch.device, assert_close: Close) -> None:
    operands = [o and replace(o, dtype=torch.bfloat16) for o in call.operands]
    fused = {**call.fused, "precision": None} if "precision" in call.fused else call.fused
    check(replace(call, operands=tuple(operands), fused=fused), device, assert_close)


@pytest.mark.parametrize("images", [3, 70])
def test_tf32_is_float32_with_shorter_factors(
    images: int, device: torch.device, assert_close: Close
) -> None:
    fused = {"precision": "tf32", "activation": "relu"}
    x, w, b = Operand((images, 9, 6, 6)), Operand((8, 9, 3, 3), seed=1), Operand((8,), seed=2)
    check(Call("conv2d", (x, w, b), 81, {"padding": 1}, fused), device, assert_close)
    x, w = Operand((images, 50)), Operand((8, 50), seed=1)
    check(Call("linear", (x, w, b), 50, {}, fused), device, assert_close)


def test_large_windows(device: torch.device, assert_close: Close) -> None:
    """So large that unrolling them would take a compiler minutes."""
    x = Operand((2, 3, 20, 23))
    for function in ("max_pool2d", "avg_pool2d"):
        check(Call(function, (x,), 19 * 23, {"kernel_size": (19, 23)}), device, assert_close)


# --- legal calls at the edges ----------------------------------------------------------------


def numbers(*shape: int) -> torch.Tensor:
    """Random, but the same every time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def example(function: str, *args: Any, **options: Any) -> tuple[str, tuple[Any, ...], Any]:
    return function, args, options


def converted(args: tuple[Any, ...], to: Any) -> tuple[Any, ...]:
    return tuple(a.to(to) if isinstance(a, torch.Tensor) else a for a in args)


X, W, B = numbers(2, 3, 8, 8), numbers(4, 3, 3, 3), numbers(4)
V, M = numbers(2, 5), numbers(4, 5)  # for linear

EDGES = [
    # Without channels torch gives no channels, whatever the weight says.
    example("conv2d", X[:, :0], W[:, :0]),
    example("conv2d", X[0, :0], W[:, :0], B, padding="same", groups=2),
    example("conv2d", X[:0, :, :0], W, padding=2),
    example("conv2d", numbers(2, 6, 8, 8), W, B, (1, 2), [1, 0], 2, 2),
    example("conv2d", numbers(2, 6, 8, 8), W, stride=np.int64(2), groups=np.int32(2)),
    example("conv2d", X, W, stride=(torch.tensor(2), 1)),
    example("max_pool2d", X, 3, 2, 1, 2, True),
    example("max_pool2d", numbers(1, 1, 2, 2), 2, 3, 1, 3),  # a window of padding alone
    example("avg_pool2d", X, 3, 2, 1, True, False),
    example("avg_pool2d", X, 10, 3, ceil_mode=True),  # a window larger than the image
    example("adaptive_avg_pool2d", X[:, :0], 3),
    example("adaptive_avg_pool2d", X, (0, 2)),
    example("adaptive_avg_pool2d", X[:, :, :0], 1),
    example("adaptive_avg_pool2d", X, (np.int64(2), None)),
    example("linear", V[:, :0], M[:, :0], B),
    example("linear", V[0, :0], M[:, :0]),
    example("linear", V, M[:0], B[:1]),
    example("linear", V[0], M[0], B[0]),
    example("linear", V, M, B[None, :1]),
    example("local_response_norm", X, 3, 1, 2, 3),
    example("local_response_norm", X[:, :0], 3),
    # A base below zero: pow knows whole exponents, and a base of zero.
    *[
        example("local_response_norm", X, 3, alpha=0.1, beta=beta, k=-4.0)
        for beta in (3, 2, 0, -1, -2, 0.75)
    ],
    example("local_response_norm", X, 3, alpha=0.0, beta=0.0, k=0.0),
    example("local_response_norm", X, 3, alpha=0.0, k=0.0),
]


@pytest.mark.parametrize(("function", "args", "options"), EDGES)
def test_edges(
    function: str, args: tuple[Any, ...], options: dict[str, Any], device: torch.device
) -> None:
    actual = getattr(kernels, function)(*converted(args, device), **options).cpu()
    expected = getattr(F, function)(*args, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_a_parameter_is_a_tensor_where_gradients_are_off() -> None:
    x, layer = numbers(2, 3, 8, 8), torch.nn.Conv2d(3, 4, 3)
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            y = kernels.conv2d(x, layer.weight, layer.bias)
            torch.testing.assert_close(y, layer(x))


# --- numbers that are not finite, and those that nearly are not ---------------------------------

ODD = [  # what follows an input [N, 3, 8, 7]
    example("conv2d", W, padding=1),
    example("conv2d", W[..., :2], B, stride=2, dilation=2),
    example("max_pool2d", 3, 2, 1),
    example("avg_pool2d", 3, 2, 1),
    example("adaptive_avg_pool2d", (3, 4)),
    example("linear", numbers(5, 7), numbers(5)),
    example("local_response_norm", 3, alpha=1.0),
]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("images", [2, 66])
@pytest.mark.parametrize(("function", "others", "options"), ODD)
def test_what_is_not_finite_spreads_as_in_torch(
    function: str,
    others: tuple[Any, ...],
    options: dict[str, Any],
    images: int,
    value: float,
    device: torch.device,
    assert_close: Close,
) -> None:
    x = numbers(images, 3, 8, 7)
    x[0, 2, 3, 3] = value
    x[-1, 0, 2:] = value
    reference = getattr(F, function)(*converted((x, *others), torch.float64), **options)
    assert not reference.isfinite().all(), "the case has lost its point"
    actual = getattr(kernels, function)(*converted((x, *others), device), **options)
    assert_close(actual, reference, torch.float32, 49)
