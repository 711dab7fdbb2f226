"""A memory sanitizer for Triton kernels without a GPU: every access, by every program, checked.

The interpreter computes real addresses, so it can look before each load and store. A bare address
does not tell which tensor it was meant for: one row beyond x may well lie inside y. So a kernel is
shown made-up addresses. Each tensor starts in the middle of 16 TB of its own, and whatever the
kernel adds to that, the upper bits still say whose element was wanted. An access that leaves its
own tensor is noted and masked out, never carried out; the others go to the tensor's real memory,
so the results are what they would be without the sanitizer.

Descriptors, block pointers and atomics are covered: in the interpreter all of them end in the same
four operations. What a descriptor cuts off is no access; a descriptor beyond its tensor shows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

from ...kernels.jit import ALONE

_SHIFT = 44  # an address's upper bits say whose range it is in
_FIRST = 1 << 4  # above the 48 bits of real addresses, so that these belong to no range
_PAGE = 4096  # a made-up address keeps its place in the page, hence its alignment


@dataclass(frozen=True, slots=True)
class Violation:
    """Accesses of one line of a kernel outside one of its tensors, over all programs.

    Elements are counted from the tensor's first, which is 0; the last is `elements - 1`.
    """

    kernel: str
    line: str  # file:number
    access: str  # load, store or atomic
    argument: str
    elements: int
    lowest: int
    highest: int
    count: int
    program: tuple[int, int, int]  # the first one that did it

    def __str__(self) -> str:
        return (
            f"{self.kernel}, {self.line}, program {self.program}: {self.access} of {self.argument} "
            f"at {self.count} elements from {self.lowest} to {self.highest}, "
            f"but it has {self.elements}"
        )


@contextmanager
def sanitized() -> Iterator[list[Violation]]:
    """While it lasts, interpreted kernels are watched; the list it gives fills as they run.

    Takes any number of launches, of this package's kernels or of Triton's own interpreted ones, on
    CPU tensors; what is compiled for a GPU is not watched. A tensor reaches from its first element
    to its last and, where it is a view with a pitch, to the end of its last row: the padding
    channels of an activation count as its own. Other threads wait with interpreting.
    """
    watch = _Watch()
    builder = interpreter.interpreter_builder
    with ALONE, ExitStack() as stack:
        for owner, name, wrapper in (
            (interpreter.GridExecutor, "__call__", watch.launch),
            (interpreter, "_implicit_cvt", watch.argument),
            (builder, "create_masked_load", partial(watch.masked, "load", 0, 1)),
            (builder, "create_masked_store", partial(watch.masked, "store", 0, 2)),
            (builder, "create_atomic_rmw", partial(watch.masked, "atomic", 1, 3)),
            (builder, "create_atomic_cas", watch.exchange),
        ):
            stack.enter_context(mock.patch.object(owner, name, wrapper(getattr(owner, name))))
        yield watch.violations


@dataclass(frozen=True, slots=True)
class _Range:
    """A tensor among a launch's arguments, and the address that the kernel is shown."""

    argument: str
    shown: int
    real: int
    bytes: int


# Where an address points that belongs to no argument, one that the kernel read from memory maybe.
_NOWHERE = _Range("no tensor", 0, 0, 0)


def _place(tensor: torch.Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """What a tensor and the interpreter's own view of it have in common."""
    return tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride())


def _reach(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last row."""
    if tensor.numel() == 0:
        return 0
    dimensions = list(zip(tensor.shape, tensor.stride(), strict=True))
    end = 1 + sum((size - 1) * step for size, step in dimensions)
    row = max((size for size, step in dimensions if step == 1), default=1)
    pitch = min((step for _, step in dimensions if step > 1), default=row)
    stored = tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.itemsize
    return int(min((end + max(pitch - row, 0)) * tensor.itemsize, stored))


@dataclass(slots=True)
class _Watch:
    """Wrappers around what the interpreter does, and what they saw."""

    violations: list[Violation] = field(default_factory=list)
    kernel: str = ""
    names: dict[Any, str] = field(default_factory=dict)
    ranges: list[_Range] = field(default_factory=list)

    def launch(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """A kernel starts: with names for its tensors, and no tensor seen yet."""

        def call(executor: Any, *args: Any, **kwargs: Any) -> Any:
            arguments = dict(zip(executor.arg_names, args, strict=False)) | kwargs
            bases = {name: getattr(value, "base", value) for name, value in arguments.items()}
            # Of two names for one tensor, the first.
            bases = dict(reversed(bases.items()))
            self.kernel = executor.fn.__name__
            self.names = {
                _place(base): name for name, base in bases.items() if isinstance(base, torch.Tensor)
            }
            self.ranges = []
            return original(executor, *args, **kwargs)

        return call

    def argument(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """A tensor becomes a pointer; a descriptor's tensor comes by here too."""

        def convert(value: Any) -> Any:
            pointer = original(value)
            tensor = getattr(value, "base", value)
            if hasattr(value, "data_ptr") and isinstance(tensor, torch.Tensor):
                real = tensor.data_ptr()
                shown = ((_FIRST + len(self.ranges)) << _SHIFT) + (1 << (_SHIFT - 1)) + real % _PAGE
                argument = self.names.get(_place(tensor), f"tensor {len(self.ranges)}")
                self.ranges.append(_Range(argument, shown, real, _reach(tensor)))
                pointer.handle.data = np.array([shown], dtype=np.uint64)
            return pointer

        return convert

    def masked(
        self, access: str, pointers: int, mask: int, original: Callable[..., Any]
    ) -> Callable[..., Any]:
        """Whose pointers and mask stand at these places among its arguments."""

        def call(*args: Any, **options: Any) -> Any:
            given = list(args)
            given[pointers], given[mask] = self._checked(access, args[pointers], args[mask])
            return original(*given, **options)

        return call

    def exchange(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """(pointers, compared, values, ...): nothing masks it, so what is wrong goes to a dummy."""

        def exchange(pointers: Any, *rest: Any) -> Any:
            everywhere = TensorHandle(np.ones(pointers.data.shape, dtype=bool), tl.int1)
            pointers, inside = self._checked("atomic", pointers, everywhere)
            dummy = np.zeros(1, dtype=np.uint64)
            data = np.where(inside.data, pointers.data, np.uint64(dummy.ctypes.data))
            return original(TensorHandle(data, pointers.dtype), *rest)

        return exchange

    def _checked(self, access: str, pointers: Any, mask: Any) -> tuple[Any, Any]:
        """The real addresses, and the mask without those that lie outside; these are noted."""
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        ranges = [*self.ranges, _NOWHERE]
        shown, real = (
            np.array([getattr(r, of) for r in ranges], dtype=np.uint64) for of in ("shown", "real")
        )
        size = np.array([r.bytes for r in ranges], dtype=np.int64)
        # The upper bits below _FIRST wrap around to large numbers: nowhere, as are those above.
        number = (pointers.data >> np.uint64(_SHIFT)) - np.uint64(_FIRST)
        owner = np.minimum(number, np.uint64(len(self.ranges))).astype(np.int64)
        offset = (pointers.data - shown[owner]).view(np.int64)
        inside = (offset >= 0) & (offset + width <= size[owner])
        # Triton's own masks are 32-bit numbers where a vector met a scalar.
        allowed = np.asarray(mask.data).astype(bool)
        wrong = allowed & ~inside
        for i in np.unique(owner[wrong]):
            self._note(access, ranges[i], offset[wrong & (owner == i)] // width, width)
        data = np.where(inside, pointers.data - shown[owner] + real[owner], np.uint64(0))
        return TensorHandle(data, pointers.dtype), TensorHandle(allowed & inside, tl.int1)

    def _note(self, access: str, range_: _Range, elements: Any, width: int) -> None:
        new = Violation(
            self.kernel,
            _line(),
            access,
            range_.argument,
            range_.bytes // width,
            int(elements.min()),
            int(elements.max()),
            len(elements),
            interpreter.interpreter_builder.grid_idx,
        )
        for i, old in enumerate(self.violations):
            if _what(old) == _what(new):
                self.violations[i] = replace(
                    old,
                    lowest=min(old.lowest, new.lowest),
                    highest=max(old.highest, new.highest),
                    count=old.count + new.count,
                )
                return
        self.violations.append(new)


def _what(violation: Violation) -> tuple[str, str, str, str]:
    return violation.kernel, violation.line, violation.access, violation.argument


def _line() -> str:
    """The line of the kernel that is being interpreted."""
    frameworks = (__file__, str(Path(triton.__file__).parent))
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(frameworks):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
