"""The interpreter's products: a sum in order, whatever BLAS does and wherever a row lies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import triton.language as tl
from alexnet_triton.kernels.product import product, reproducible, tf32
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from triton._C.libtriton import ir
from triton.runtime.interpreter import TensorHandle, interpreter_builder

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # infinities are results here

Array = NDArray[Any]


def in_order(a: Array, b: Array, d: Array) -> Array:
    """What `product` promises, one k after the other."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    total = a[:, :1] * b[:1]
    for k in range(1, len(b)):
        total = total + a[:, k : k + 1] * b[k : k + 1]
    result: Array = total.astype(d.dtype) + d
    return result


def normal(random: np.random.Generator, *shape: int) -> Array:
    return random.standard_normal(shape, dtype=np.float32)


def wide(random: np.random.Generator, *shape: int) -> Array:
    """From far below float32's smallest products to beyond its largest."""
    return normal(random, *shape) * np.exp2(random.integers(-100, 100, shape)).astype(np.float32)


def whole(random: np.random.Generator, *shape: int) -> Array:
    """Sums that are often exactly zero."""
    return random.integers(-2, 3, shape).astype(np.float32)


def odd(random: np.random.Generator, *shape: int) -> Array:
    """With rows of zeros, and a few numbers that are none."""
    x = normal(random, *shape)
    x[:: 1 + shape[0] // 3] = 0
    x.flat[random.integers(0, x.size, 3)] = np.nan, np.inf, -np.inf
    return x


sizes = st.sampled_from([1, 2, 16, 17, 32, 64])
kinds = st.sampled_from([normal, wide, whole, odd])
floats = st.sampled_from([np.float32, np.float16])


@pytest.mark.bits
@given(sizes, sizes, sizes, kinds, kinds, floats, floats, st.booleans(), st.integers(0, 2**32 - 1))
def test_a_product_is_a_sum_in_order(
    m: int,
    n: int,
    k: int,
    left: Callable[..., Array],
    right: Callable[..., Array],
    operands: type,
    result: type,
    transposed: bool,
    seed: int,
) -> None:
    random = np.random.default_rng(seed)
    a: Array = left(random, m, k).astype(operands)
    b = right(random, n, k).T.astype(operands) if transposed else right(random, k, n)
    d: Array = random.standard_normal((m, n)).astype(result)
    y = product(a, b, d)
    assert y.dtype == d.dtype
    assert np.array_equal(y, in_order(a, b, d), equal_nan=True)


@pytest.mark.bits
@pytest.mark.parametrize("shape", [(4096, 16, 64), (16, 1024, 512), (256, 256, 256), (8, 9000, 16)])
@pytest.mark.parametrize("kind", [normal, whole])
def test_large_tiles_too(shape: tuple[int, int, int], kind: Callable[..., Array]) -> None:
    m, n, k = shape
    random = np.random.default_rng(0)
    a, b, d = kind(random, m, k), kind(random, n, k).T, normal(random, m, n)
    assert np.array_equal(product(a, b, d), in_order(a, b, d))


def test_a_stack_of_tiles() -> None:
    random = np.random.default_rng(0)
    a, b, d = normal(random, 3, 16, 32), normal(random, 3, 32, 16), normal(random, 3, 16, 16)
    wanted = [in_order(*each) for each in zip(a, b, d, strict=True)]
    assert np.array_equal(product(a, b, d), np.stack(wanted))


def backwards(a: Array, b: Array) -> Array:
    made: Array = np.einsum("mk,kn->mn", a[:, ::-1], b[::-1])
    return made


def in_halves(a: Array, b: Array) -> Array:
    half = len(b) // 2
    return backwards(a[:, :half], b[:half]) + backwards(a[:, half:], b[half:])


def without_zeros(a: Array, b: Array) -> Array:
    """As the reference BLAS has it: zero times NaN is not looked at."""
    made: Array = np.where(a[:, :, None] == 0, 0, a[:, :, None] * b).sum(1)
    return made


@pytest.mark.parametrize("blas", [backwards, in_halves, without_zeros])
@pytest.mark.parametrize("kind", [normal, wide, whole, odd])
def test_whatever_order_a_blas_adds_in(
    blas: Callable[..., Array], kind: Callable[..., Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0)
    a, b, d = kind(random, 64, 128), kind(random, 128, 64), np.zeros((64, 64), np.float32)
    # Numbers whose float32 sum hangs on the order: 1, or what follows it.
    a[::7, :6], b[:6] = [1, 2.0**-24, *[2.0**-54] * 4], 1
    a[::7, 6:] = 0
    wanted = product(a, b, d)
    monkeypatch.setattr(np, "matmul", blas)
    assert np.array_equal(product(a, b, d), wanted, equal_nan=True)
    if kind is not odd:
        assert np.all(wanted[::7] == 1)


# --- TF32 ------------------------------------------------------------------------------------


def test_tf32_keeps_ten_bits_and_what_is_no_number() -> None:
    ulp = 2.0**-10
    given = np.array([1 + 0.99 * ulp, -1 - 1.5 * ulp, 3.0, 0.0, np.inf, -np.inf], np.float32)
    assert tf32(given).tolist() == [1, -1 - ulp, 3, 0, np.inf, -np.inf]
    nans = np.array([0x7FC00000, 0x7F800001, 0xFF801FFF], np.uint32).view(np.float32)
    assert np.isnan(tf32(nans)).all()
    random = wide(np.random.default_rng(0), 1000)
    short = tf32(random)
    assert np.all(np.abs(short) <= np.abs(random))
    assert np.all(np.abs(random - short) < ulp * np.abs(random))


# --- in Triton's interpreter -----------------------------------------------------------------


def dot(a: Array, b: Array, d: Array, precision: str = "IEEE", kind: Any = tl.float32) -> Array:
    """What the interpreter makes of `tl.dot`."""
    handles = (TensorHandle(x, kind) for x in (a, b))
    chosen = getattr(ir.INPUT_PRECISION, precision)
    made = interpreter_builder.create_dot(*handles, TensorHandle(d, tl.float32), chosen, 0)
    assert made.dtype == tl.float32
    result: Array = made.data
    return result


@pytest.mark.interpreter
def test_the_precision_that_is_asked_for() -> None:
    random = np.random.default_rng(0)
    a, b, d = normal(random, 16, 64), normal(random, 32, 64).T, normal(random, 16, 32)
    with reproducible():
        exact, short, three = (dot(a, b, d, name) for name in ("IEEE", "TF32", "TF32x3"))
        left, right = a.astype(np.float16), b.astype(np.float16)
        half = dot(left, right, d, "TF32", tl.float16)
    assert np.array_equal(exact, in_order(a, b, d))
    assert np.array_equal(three, exact)
    assert np.array_equal(short, in_order(tf32(a), tf32(b), d))
    assert not np.array_equal(short, exact)
    assert np.array_equal(half, in_order(left, right, d))


@pytest.mark.interpreter
def test_other_types_are_tritons_matter() -> None:
    a, b = np.ones((16, 16), np.int8), np.full((16, 16), 2, np.int8)
    d = np.zeros((16, 16), np.float32)
    eights = np.full((16, 16), 0x38, np.uint8)  # 1.0
    with reproducible():
        assert np.all(dot(a, b, d, kind=tl.int8) == 32)
        assert np.all(dot(eights, eights, d, kind=tl.float8e4nv) == 16)


@pytest.mark.interpreter
def test_the_interpreter_is_left_as_it_was() -> None:
    before = interpreter_builder.create_dot
    with reproducible():
        outer = interpreter_builder.create_dot
        with reproducible():
            assert len({interpreter_builder.create_dot, outer, before}) == 3
        assert interpreter_builder.create_dot == outer
        with pytest.raises(ZeroDivisionError), reproducible():
            raise ZeroDivisionError
        assert interpreter_builder.create_dot == outer
    assert interpreter_builder.create_dot == before
    assert "create_dot" not in vars(interpreter_builder)
