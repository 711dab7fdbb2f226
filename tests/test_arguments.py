"""What torch refuses is refused alike, and what only we refuse is refused by name.

The table of bad calls is carried out by torch's functions and by ours: the same type of exception,
in one line that names the argument.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from alexnet_triton import kernels

X, W, B = torch.rand(2, 3, 8, 8), torch.rand(4, 3, 3, 3), torch.rand(4)
V, M = torch.rand(2, 5), torch.rand(4, 5)  # for linear


def converted(args: tuple[Any, ...], to: Any) -> tuple[Any, ...]:
    return tuple(a.to(to) if isinstance(a, torch.Tensor) else a for a in args)


def refuses(error: type[Exception], function: str, argument: str, args: Any, options: Any) -> None:
    """In one line that says where, and which argument."""
    with pytest.raises(error) as caught:
        getattr(kernels, function)(*args, **options)
    message = str(caught.value)
    assert message.startswith(f"{function}: ")
    assert argument in message
    assert "\n" not in message


def bad(function: str, argument: str, *args: Any, **options: Any) -> tuple[str, str, Any, Any]:
    return function, argument, args, options


def bad_values(
    function: str, argument: str, values: tuple[Any, ...], *args: Any, **options: Any
) -> list[tuple[str, str, Any, Any]]:
    return [bad(function, argument, *args, **{argument: value}, **options) for value in values]


NO_PAIR = (-1, (1, -1), (), (1, 2, 3), 1.0, (1.0, 1), True, "2")

REFUSED_BY_TORCH = [
    bad("conv2d", "input", [[1.0]], W),
    bad("conv2d", "input", X.numpy(), W),
    bad("conv2d", "input", X[0, 0], W),
    bad("conv2d", "input", X[None], W),
    bad("conv2d", "input", X[:, :, :2], W),
    bad("conv2d", "input", X[:0, :, :2], W),
    bad("conv2d", "input", X[:, :0, :2], W[:, :0]),
    bad("conv2d", "input", X[:, :, :0], W, padding=2),
    bad("conv2d", "input", X, W, dilation=4),
    bad("conv2d", "input", X.bool(), W.bool()),
    bad("conv2d", "weight", X, None),
    bad("conv2d", "weight", X, W[0]),
    bad("conv2d", "weight", X, W[None]),
    bad("conv2d", "weight", X, W[:, :2]),
    bad("conv2d", "weight", X[:, :2], W),
    bad("conv2d", "weight", X[:0, :2], W),
    bad("conv2d", "weight", X, W[:0]),
    bad("conv2d", "weight", X, W[:, :, :0]),
    bad("conv2d", "weight", X, W[:, :1], groups=2),
    bad("conv2d", "weight", X[:, :2], W[:3, :1], groups=2),
    bad("conv2d", "weight", X, W.half()),
    bad("conv2d", "weight", X.half(), W),
    bad("conv2d", "weight", X, W.double()),
    bad("conv2d", "weight", X, W.to_sparse()),
    bad("conv2d", "bias", X, W, 1.0),
    bad("conv2d", "bias", X, W, B[:3]),
    bad("conv2d", "bias", X[:0], W, B[:3]),
    bad("conv2d", "bias", X, W, B[:1]),
    bad("conv2d", "bias", X, W, B[0]),
    bad("conv2d", "bias", X, W, B[:, None]),
    bad("conv2d", "bias", X, W, B.half()),
    *bad_values("conv2d", "stride", (0, None, range(1, 3), np.array([2, 2]), *NO_PAIR), X, W),
    *bad_values("conv2d", "stride", (0, -1), X[:0], W),
    *bad_values("conv2d", "padding", (None, "full", "SAME", (1, 2, 3, 4, 5), *NO_PAIR), X, W),
    *bad_values("conv2d", "padding", ("same",), X, W, stride=(1, 2)),
    *bad_values("conv2d", "dilation", (0, None, *NO_PAIR), X, W),
    *bad_values("conv2d", "groups", (0, -1, "1", 1.0, True, None, (1,)), X, W),
    *[
        case
        for pool in ("max_pool2d", "avg_pool2d")
        for case in (
            bad(pool, "input", X.numpy(), 3),
            bad(pool, "input", [1.0], 3),
            bad(pool, "input", X[None], 3),
            bad(pool, "input", X[:, :0], 3),
            bad(pool, "input", X[0, :0], 3),
            bad(pool, "input", X[:, :, :0], 2, padding=1),
            bad(pool, "input", X[:0, :, :0], 2, padding=1),
            bad(pool, "input", X, 9),
            bad(pool, "input", X, 12, 2, ceil_mode=True),
            bad(pool, "input", X, 9, 1, ceil_mode=True),
            bad(pool, "input", X.bool(), 3),
            bad(pool, "input", X.to(torch.cfloat), 3),
            bad(pool, "input", X.to_sparse(), 3),
            *bad_values(pool, "kernel_size", (0, None, *NO_PAIR), X),
            *bad_values(pool, "stride", (0, (2, 0), -1, (2, 2, 2), 1.5, True, "2"), X, 3),
            *bad_values(pool, "padding", (2, (1, 2), None, (1, 1, 1, 1), *NO_PAIR), X, 3),
            *bad_values(pool, "padding", (1,), X, 1),
            *bad_values(pool, "ceil_mode", (1, None, "yes"), X, 3),
        )
    ],
    bad("max_pool2d", "input", X[0, 0], 3),
    bad("max_pool2d", "input", X, 3, dilation=4),
    *bad_values("max_pool2d", "dilation", (0, None, *NO_PAIR), X, 3),
    *bad_values("max_pool2d", "padding", (2,), X, 3, dilation=2),
    *bad_values("avg_pool2d", "count_include_pad", (1, None), X, 3),
    bad("adaptive_avg_pool2d", "input", X[None], 3),
    bad("adaptive_avg_pool2d", "input", X[0, 0], 3),
    bad("adaptive_avg_pool2d", "input", X[0, 0], (3, None)),
    bad("adaptive_avg_pool2d", "input", X[:, :, :0], 3),
    bad("adaptive_avg_pool2d", "input", X[:, :, :0], (None, 3)),
    bad("adaptive_avg_pool2d", "input", X.int(), 3),
    *bad_values("adaptive_avg_pool2d", "output_size", ((3,), None, *NO_PAIR), X),
    bad("linear", "input", [1.0], M),
    bad("linear", "input", V[0, 0], M),
    bad("linear", "input", V.bool(), M.bool()),
    bad("linear", "weight", V, None),
    bad("linear", "weight", V[:, :4], M),
    bad("linear", "weight", V[:0, :4], M),
    bad("linear", "weight", V[0, :4], M),
    bad("linear", "weight", V, M[0, :1]),
    bad("linear", "weight", V, M[:, :1]),
    bad("linear", "weight", V, M[None]),
    bad("linear", "weight", V, M[0, 0]),
    bad("linear", "weight", V, M.half()),
    bad("linear", "weight", V.half(), M),
    bad("linear", "bias", V, M, 1.0),
    bad("linear", "bias", V, M, B[:3]),
    bad("linear", "bias", V[:0], M, B[:3]),
    bad("linear", "bias", V, M, B[None, None]),
    bad("linear", "bias", V, M, B.half()),
    bad("linear", "bias", V, M, B.to("meta")),
    bad("linear", "bias", V[0], M[0], B[:1]),
    bad("local_response_norm", "input", V, 2),
    bad("local_response_norm", "input", V[0], 2),
    bad("local_response_norm", "input", X.int(), 2),
    *bad_values("local_response_norm", "size", (0, -1, 2.0, 2.5, True, "2", None, (5,)), X),
    *bad_values("local_response_norm", "alpha", (None, "x"), X, 2),
    *bad_values("local_response_norm", "beta", (None, "x"), X, 2),
    *bad_values("local_response_norm", "k", (None, "x"), X, 2),
]


@pytest.mark.parametrize(("function", "argument", "args", "options"), REFUSED_BY_TORCH)
def test_what_torch_refuses_is_refused_alike(
    function: str, argument: str, args: Any, options: Any
) -> None:
    with pytest.raises((RuntimeError, ValueError, TypeError)) as theirs:
        getattr(F, function)(*args, **options)
    refuses(theirs.type, function, argument, args, options)


FUNCTIONS: dict[str, tuple[Any, ...]] = {  # a legal call of each
    "conv2d": (X, W, B),
    "max_pool2d": (X, 3),
    "avg_pool2d": (X, 3),
    "adaptive_avg_pool2d": (X, 3),
    "linear": (V, M, B),
    "local_response_norm": (X, 3),
}
each_function = pytest.mark.parametrize(("function", "args"), FUNCTIONS.items(), ids=FUNCTIONS)
FUSING = [pytest.param(name, FUNCTIONS[name], id=name) for name in ("conv2d", "linear")]


OTHER: list[tuple[Any, str]] = [
    *((to, str(to)) for to in (torch.float64, torch.int32, torch.uint8, torch.complex64)),
    (torch.bfloat16, "use float32"),  # on a CPU
    ("meta", "input is torch.float32 on meta"),
]


@each_function
@pytest.mark.parametrize(("to", "part"), OTHER)
def test_other_dtypes_and_devices_are_refused(
    function: str, args: tuple[Any, ...], to: Any, part: str
) -> None:
    refuses(NotImplementedError, function, part, converted(args, to), {})


@pytest.mark.parametrize(("function", "args"), FUSING)
@pytest.mark.parametrize(("position", "name"), [(1, "weight"), (2, "bias")])
def test_two_devices_are_refused(
    function: str, args: tuple[Any, ...], position: int, name: str
) -> None:
    moved = [a.to("meta") if i == position else a for i, a in enumerate(args)]
    refuses(RuntimeError, function, f"{name} is torch.float32 on meta", moved, {})


@each_function
def test_a_gradient_is_refused_not_lost(function: str, args: tuple[Any, ...]) -> None:
    for i, name in enumerate(("input", "weight", "bias")[: sum(map(torch.is_tensor, args))]):
        wanting = [a.clone().requires_grad_() if i == j else a for j, a in enumerate(args)]
        refuses(RuntimeError, function, f"{name} requires a gradient", wanting, {})
        with torch.no_grad():
            assert torch.equal(
                getattr(kernels, function)(*wanting), getattr(kernels, function)(*args)
            )


@pytest.mark.parametrize(("function", "args"), FUSING)
def test_words_that_torch_does_not_have(function: str, args: tuple[Any, ...]) -> None:
    for options in (
        *({"activation": value} for value in ("tanh", "")),
        *({"precision": value} for value in ("fp16", "TF32")),
    ):
        (argument,) = options
        refuses(ValueError, function, argument, args, options)
    for precision in ("ieee", "tf32"):
        half = converted(args, torch.float16)
        refuses(ValueError, function, "precision", half, {"precision": precision})


def test_a_bias_for_each_row_is_refused() -> None:
    """torch takes it, undocumented; no fused layer has one."""
    refuses(RuntimeError, "linear", "bias", (V, M, torch.rand(2, 4)), {})
