"""`tl.dot` in Triton's interpreter: the same bits wherever a row or a column lies in a tile.

The interpreter hands both tiles to numpy, and BLAS rounds an element by the element's place in the
tile, the tile's size and layout, and the CPU. Here an element depends on its row of a and its
column of b alone:

    y[i, j] = d[i, j] + round(f[i, j]),  f[i, j] = ((a[i, 0] b[0, j] + a[i, 1] b[1, j]) + ...)

with f in float64, where a product of two float32 is exact, rounded once to the type of d.

BLAS still does the work. Whatever the order it adds in, its sum s obeys

    |s - f| <= 2 K u ||a[i]|| ||b[:, j]||,  u = 2^-53

(Higham, "Accuracy and Stability of Numerical Algorithms", section 3.1, and Cauchy-Schwarz). Where
all numbers that near to s round to the same one, that is round(f); elsewhere, one element in some
thousands, f itself is summed. So nothing is assumed of a BLAS but that it multiplies and adds.

Cost: that of a product in float64, and a few passes over y.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from triton._C.libtriton import ir
from triton.runtime.interpreter import TensorHandle, interpreter_builder

_CHECKED = 8192  # elements of y looked at together: what that takes stays in a core's cache
_MANY = 16  # of as many of these more than one in doubt: summing all is cheaper than picking some


@contextmanager
def reproducible() -> Iterator[None]:
    """While it lasts, the interpreter multiplies as above; whoever enters holds `ALONE`.

    With `input_precision="tf32"` float32 operands lose the lower 13 of their 23 bits of mantissa
    first. They are cut off, not rounded: compiled for sm_80, sm_90 and sm_100, the kernels convert
    nothing, so the matrix instruction gets all 32 bits and reads those of a TF32. "tf32x3" is as
    good as "ieee". Types that numpy does not have, and integers, are left to Triton.
    """
    own = "create_dot" in vars(interpreter_builder)
    original = interpreter_builder.create_dot

    def create_dot(a: Any, b: Any, d: Any, precision: Any, imprecise: int) -> Any:
        if not all(each.data.dtype in (np.float16, np.float32) for each in (a, b, d)):
            return original(a, b, d, precision, imprecise)
        left, right = a.data, b.data
        if precision == ir.INPUT_PRECISION.TF32 and left.dtype == right.dtype == np.float32:
            left, right = tf32(left), tf32(right)
        return TensorHandle(product(left, right, d.data), d.dtype.scalar)

    interpreter_builder.create_dot = create_dot
    try:
        yield
    finally:
        if own:
            interpreter_builder.create_dot = original
        else:
            del interpreter_builder.create_dot


def tf32(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """What a tensor core sees of float32; a NaN remains one whatever its bits."""
    short = (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    np.copyto(short, x, where=np.isnan(x))
    return short


def product(a: NDArray[Any], b: NDArray[Any], d: NDArray[Any]) -> NDArray[Any]:
    """[..., M, K] times [..., K, N] plus d [..., M, N], as above; float32 or float16."""
    if a.ndim > 2:
        return np.stack([product(*each) for each in zip(a, b, d, strict=True)])
    a, b = a.astype(np.float64), b.astype(np.float64)
    rows, columns = (np.sqrt(np.einsum(of, x, x)) for of, x in (("mk,mk->m", a), ("kn,kn->n", b)))
    some = rows != 0
    if some.all() or not np.isfinite(columns).all():
        return _added(a, b, rows, columns, d)
    y: NDArray[Any] = d + d.dtype.type(0)  # the rows of images that are not there
    y[some] = _added(a[some], b, rows[some], columns, d[some])
    return y


def _added(
    a: NDArray[Any], b: NDArray[Any], rows: NDArray[Any], columns: NDArray[Any], d: NDArray[Any]
) -> NDArray[Any]:
    """`product` of float64, given the norms of a's rows and b's columns."""
    near = np.matmul(a, b)
    rows = rows * (len(b) * 2.0**-51)  # twice the bound, for what these lines round themselves
    y = np.empty(d.shape, d.dtype)
    step = max(1, _CHECKED // len(columns))
    for first in range(0, len(y), step):
        part = slice(first, first + step)
        bound = np.einsum("m,n->mn", rows[part], columns)
        np.add(_rounded(near[part], bound, a[part], b, d.dtype), d[part], out=y[part])
    return y


def _rounded(
    near: NDArray[Any], bound: NDArray[Any], a: NDArray[Any], b: NDArray[Any], dtype: Any
) -> NDArray[Any]:
    """The sums of a times b in order, rounded to dtype; `near` is no farther from them than bound.

    Infinity and NaN come from the operands, in any order the same, and have no neighbours.
    """
    result: NDArray[Any] = (near + bound).astype(dtype)
    doubtful = np.flatnonzero(result != (near - bound).astype(dtype))
    if doubtful.size > near.size // _MANY:  # where much cancels exactly, say
        result = np.zeros_like(near)
        for k in range(len(b)):
            result += np.einsum("m,n->mn", a[:, k], b[k])  # a BLAS may leave out zeros times NaN
        return result.astype(dtype)
    if doubtful.size:
        i, j = np.divmod(doubtful, len(b.T))
        result[i, j] = np.add.accumulate(a[i] * b.T[j], axis=1)[:, -1]
    return result
