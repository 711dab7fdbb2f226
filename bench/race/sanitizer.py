"""A memory sanitizer for Triton kernels without a GPU: every access, by every program, checked.

The interpreter computes real addresses, so it can look before each load and store. A bare address
does not tell which tensor it was meant for: one row beyond x may well lie inside y. So a kernel is
shown made-up addresses. Each tensor starts in the middle of 16 TB of its own, and whatever the
kernel adds to that, the upper bits still say whose element was wanted. An access that leaves its
own tensor is noted and masked out, never carried out; the others go to the tensor's real memory,
so the results are what they would be without the sanitizer.

Descriptors, block pointers and atomics are covered: in the interpreter all of them end in the same
four operations. What a descriptor cuts off is no access; a descriptor beyond its tensor shows.

Memory that nobody has written has a flag a byte, which a store clears and a load must not meet.

Programs run one after the other here and at once on a GPU, so it is also asked what orders two that
touch one element, one of them writing: FastTrack (Flanagan and Freund, PLDI 2009), with Triton's
means. An epoch is what a program does between two barriers or atomics. An element remembers the
first and the last of the epochs that touched it in no order, a program the set of those that came
before it. An atomic that releases hands that set on, with its program's own epochs up to the last
barrier, to those that acquire at its address: one thread executes it, but all of them the stores
before. Not asked is what orders the threads of one program, nor what a descriptor needs behind an
atomic; any other load sees what came before it, from whatever cache.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
import torch
import triton
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

from ...kernels.jit import ALONE

_SHIFT = 44  # an address's upper bits say whose range it is in
_FIRST = 1 << 4  # above the 48 bits of real addresses, so that these belong to no range
_PAGE = 4096  # a made-up address keeps its place in the page, hence its alignment

Program = tuple[int, int, int]
Access = Literal["load", "store", "atomic"]
_CONFLICTS: dict[Access, tuple[Access, ...]] = {
    "load": ("store", "atomic"),
    "store": ("store", "atomic", "load"),
    "atomic": ("store", "load"),
}


@dataclass(frozen=True, slots=True)
class Violation:
    """What one line of a kernel does wrong to one of its tensors, over all programs.

    Elements are counted from the tensor's first, which is 0; the last is `elements - 1`.
    """

    fault: Literal["outside", "unwritten", "unordered"]
    kernel: str
    line: str  # file:number
    access: Access
    argument: str
    elements: int
    lowest: int = field(compare=False)
    highest: int = field(compare=False)
    count: int = field(compare=False)
    program: Program = field(compare=False)  # the first one that did it
    other: Access | None = None  # with which it is unordered, and whose that was
    by: Program | None = field(default=None, compare=False)

    def __str__(self) -> str:
        why = {
            "outside": f"but it has {self.elements}",
            "unwritten": "which nobody has written",
            "unordered": f"with nothing to order it and the {self.other} by program {self.by}",
        }
        return (
            f"{self.kernel}, {self.line}, program {self.program}: {self.access} of {self.argument} "
            f"at {self.count} elements from {self.lowest} to {self.highest}, {why[self.fault]}"
        )


@contextmanager
def sanitized(unwritten: Iterable[torch.Tensor] = ()) -> Iterator[list[Violation]]:
    """While it lasts, interpreted kernels are watched; the list it gives fills as they run.

    Takes any number of launches, of this package's kernels or of Triton's own interpreted ones, on
    CPU tensors; what is compiled for a GPU is not watched. A tensor reaches from its first element
    to its last and, where it is a view with a pitch, to the end of its last row: the padding
    channels of an activation count as its own. Other threads wait with interpreting.

    An element of `unwritten`, or of what `torch.empty` and its kin make meanwhile, must be stored
    to by a kernel or by torch before a kernel loads it; NumPy's writes are not seen. Padding is
    unwritten where the tensor is given with it.
    """
    watch = _Watch()
    for tensor in unwritten:
        watch.mark(tensor, True)
    builder = interpreter.interpreter_builder
    with ALONE, _Torch(watch), ExitStack() as stack:
        for owner, name, wrapper in (
            (interpreter.GridExecutor, "__call__", watch.launch),
            (interpreter, "_implicit_cvt", watch.argument),
            (builder, "set_grid_idx", watch.program),
            (builder, "create_barrier", watch.barrier),
            (builder, "create_masked_load", partial(watch.masked, "load", 0, 1)),
            (builder, "create_masked_store", partial(watch.masked, "store", 0, 2)),
            (builder, "create_atomic_rmw", partial(watch.masked, "atomic", 1, 3)),
            (builder, "create_atomic_cas", watch.exchange),
        ):
            stack.enter_context(mock.patch.object(owner, name, wrapper(getattr(owner, name))))
        yield watch.violations


@dataclass(slots=True)
class _Shadow:
    """What is remembered of a launch's memory, a grain each; see `of`."""

    bytes: int
    grain: int  # bytes; no access is narrower
    rows: dict[Access | Literal["told"], Any] = field(default_factory=dict)

    def of(self, what: Access | Literal["told"]) -> Any:
        """uint32 [2, grains], made where it is wanted: the first and the last epoch of an access, 0
        for none; or what releases told, as a place in `_Watch.told`, and nothing.
        """
        if what not in self.rows:
            self.rows[what] = np.zeros((2, -(-self.bytes // self.grain)), dtype=np.uint32)
        return self.rows[what]

    def refine(self, width: int) -> None:
        """Take accesses of `width` bytes."""
        if (finer := self.grain // width) > 1:
            self.rows = {what: rows.repeat(finer, 1) for what, rows in self.rows.items()}
            self.grain = width


@dataclass(frozen=True, slots=True)
class _Range:
    """A tensor among a launch's arguments, and the address that the kernel is shown."""

    argument: str
    shown: int
    real: int
    bytes: int
    start: int  # bytes from the start of its storage
    shadow: _Shadow  # of the storage
    unwritten: Any  # flags a byte of the storage, or None


# Where an address points that belongs to no argument, one that the kernel read from memory maybe.
_NOWHERE = _Range("no tensor", 0, 0, 0, 0, _Shadow(0, 1), None)


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
    """Wrappers around what the interpreter does, and what they saw; sets of epochs are bits."""

    violations: list[Violation] = field(default_factory=list)
    unwritten: dict[int, tuple[Any, torch.Tensor]] = field(default_factory=dict)  # by storage
    # Of the launch that runs:
    kernel: str = ""
    names: dict[Any, str] = field(default_factory=dict)
    ranges: dict[int, _Range] = field(default_factory=dict)  # by an address's upper bits
    shadows: dict[int, _Shadow] = field(default_factory=dict)  # by storage
    programs: list[Program] = field(default_factory=list)  # by epoch, of which the first is 1
    told: list[int] = field(default_factory=list)  # by releases, what an acquire learns
    # Of the program that runs:
    begun: int = 0  # its first epoch
    fenced: int = 0  # its epochs up to its last barrier
    before: int = 0  # those that came before
    is_before: Any = None  # the same as an array, if there are any

    def mark(self, tensor: torch.Tensor, unwritten: bool) -> None:
        """Its elements are unwritten from now on, or written."""
        storage, size = tensor.untyped_storage(), tensor.itemsize
        if (key := storage.data_ptr()) not in self.unwritten:
            if not unwritten or tensor.numel() == 0 or tensor.device.type != "cpu":
                return
            # The tensor is kept, for its address must not become another's.
            self.unwritten[key] = np.zeros(-(-storage.nbytes() // 8) * 8, dtype=np.uint8), tensor
        flags = self.unwritten[key][0][tensor.data_ptr() - key :]
        shape, steps = (*tensor.shape, size), (*(step * size for step in tensor.stride()), 1)
        np.lib.stride_tricks.as_strided(flags, shape, steps)[...] = unwritten

    def launch(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """A kernel starts: with names for its tensors, and no tensor seen yet."""

        def call(executor: Any, *args: Any, **kwargs: Any) -> Any:
            arguments = dict(zip(executor.arg_names, args, strict=False)) | kwargs
            bases = {name: getattr(value, "base", value) for name, value in arguments.items()}
            self.kernel = executor.fn.__name__
            self.names = {  # of two for one tensor, the first
                _place(base): name
                for name, base in reversed(bases.items())
                if isinstance(base, torch.Tensor)
            }
            self.ranges, self.shadows, self.programs, self.told = {}, {}, [], [0]
            try:
                return original(executor, *args, **kwargs)
            finally:
                self.kernel = ""

        return call

    def argument(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """A tensor becomes a pointer; a descriptor's tensor comes by here too."""

        def convert(value: Any) -> Any:
            pointer = original(value)
            tensor = getattr(value, "base", value)
            if hasattr(value, "data_ptr") and isinstance(tensor, torch.Tensor):
                real, storage = tensor.data_ptr(), tensor.untyped_storage()
                number, key = _FIRST + len(self.ranges), storage.data_ptr()
                shown = (number << _SHIFT) + (1 << (_SHIFT - 1)) + real % _PAGE
                argument = self.names.get(_place(tensor), f"tensor {len(self.ranges)}")
                shadow = _Shadow(storage.nbytes(), tensor.itemsize)
                shadow = self.shadows.setdefault(key, shadow)
                shadow.refine(tensor.itemsize)
                flags, _ = self.unwritten.get(key, (None, None))
                place = argument, shown, real, _reach(tensor), real - key
                self.ranges[number] = _Range(*place, shadow, flags)
                pointer.handle.data = np.array([shown], dtype=np.uint64)
            return pointer

        return convert

    def program(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """A program starts, after none of the others."""

        def call(*place: int) -> None:
            original(*place)
            self._tick()
            self.begun, self.fenced, self.before, self.is_before = len(self.programs), 0, 0, None

        return call

    def barrier(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """What the program's threads did before is done, for each of them."""

        def call() -> None:
            original()
            self.fenced = (2 << len(self.programs)) - (1 << self.begun)
            self._tick()

        return call

    def masked(
        self, access: Access, pointers: int, mask: int, original: Callable[..., Any]
    ) -> Callable[..., Any]:
        """Whose pointers and mask stand at these places; an atomic's order and scope stand last."""

        def call(*args: Any, **options: Any) -> Any:
            given = list(args)
            given[pointers], given[mask] = self._checked(access, args[pointers], args[mask], args)
            return original(*given, **options)

        return call

    def exchange(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """(pointers, compared, values, ...): nothing masks it, so what is wrong goes to a dummy."""

        def exchange(pointers: Any, *rest: Any) -> Any:
            everywhere = TensorHandle(np.ones(pointers.data.shape, dtype=bool), tl.int1)
            pointers, inside = self._checked("atomic", pointers, everywhere, rest)
            dummy = np.zeros(1, dtype=np.uint64)
            data = np.where(inside.data, pointers.data, np.uint64(dummy.ctypes.data))
            return original(TensorHandle(data, pointers.dtype), *rest)

        return exchange

    def _tick(self) -> None:
        """An epoch ends and another begins."""
        self.programs.append(interpreter.interpreter_builder.grid_idx)

    def _checked(self, access: Access, pointers: Any, mask: Any, given: Any) -> tuple[Any, Any]:
        """The real addresses, and the mask without those that lie outside; these are noted."""
        order = ""
        if access == "atomic":
            order = given[-2].name if given[-1].name != "CTA" else ""
            self._tick()
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        # Triton's own masks are 32-bit numbers where a vector met a scalar.
        allowed = np.asarray(mask.data, dtype=bool)
        shown = pointers.data
        # Almost always one tensor's.
        numbers = {int(end) >> _SHIFT for end in (shown.min(), shown.max())}
        whose = shown >> np.uint64(_SHIFT) if len(numbers) > 1 else None
        data, right = np.zeros_like(shown), np.zeros(shown.shape, dtype=bool)
        for number in numbers if whose is None else np.unique(whose).tolist():
            range_ = self.ranges.get(number, _NOWHERE)
            meant = allowed if whose is None else allowed & (whose == number)
            offset = shown - np.uint64(range_.shown)  # what lies before wraps around, far beyond
            inside = meant & (offset < np.uint64(max(range_.bytes - width + 1, 0)))
            if (wrong := meant & ~inside).any():
                self._note("outside", access, range_, offset.view(np.int64)[wrong], width)
            self._touch(access, range_, offset.view(np.int64)[inside], width, order)
            data = np.where(inside, offset + np.uint64(range_.real), data)
            right |= inside
        if access == "atomic":
            self._tick()
        return TensorHandle(data, pointers.dtype), TensorHandle(right, tl.int1)

    def _touch(self, access: Access, range_: _Range, offsets: Any, width: int, order: str) -> None:
        """Whether a program may access what lies there, bytes from the tensor's first element."""
        if range_.unwritten is not None:
            flags, places = range_.unwritten.view(f"u{width}"), (offsets + range_.start) // width
            if access != "store" and (bare := flags[places] != 0).any():
                self._note("unwritten", access, range_, offsets[bare], width)
            if access != "load":
                flags[places] = 0
        shadow = range_.shadow
        shadow.refine(width)
        places, parts = (offsets + range_.start) // shadow.grain, width // shadow.grain
        if parts > 1:
            places, offsets = (places[:, None] + np.arange(parts)).ravel(), offsets.repeat(parts)
        for other in _CONFLICTS[access]:
            for epochs in shadow.rows.get(other, ()):
                met = epochs[places]
                if (bad := self._unordered(met)).any():
                    by = self.programs[met[bad][0] - 1]
                    self._note("unordered", access, range_, offsets[bad], width, other, by)
                    break
        first, last = shadow.of(access)
        met, last[places] = first[places], len(self.programs)
        first[places] = np.where(self._unordered(met), met, last[places])
        if order not in ("", "RELAXED"):
            self._synchronise(order, shadow.of("told")[0], places)

    def _unordered(self, epochs: Any) -> Any:
        """Which of them are other programs', and not before this one's."""
        others = epochs - np.uint32(1) < np.uint32(self.begun - 1)  # 0 becomes the largest
        if self.is_before is not None and others.any():
            others[others] = ~self.is_before[epochs[others]]
        return others

    def _synchronise(self, order: str, heard: Any, places: Any) -> None:
        """An atomic's order: what was told at these places came before, or its program tells."""
        known, of = np.unique(heard[places], return_inverse=True)
        if "ACQUIRE" in order:
            for i in known:
                self.before |= self.told[i]
            bits = np.frombuffer(self.before.to_bytes(len(self.programs) // 8 + 1, "little"), "u1")
            self.is_before = np.unpackbits(bits, bitorder="little").astype(bool)
        if "RELEASE" in order:
            mine = self.before | self.fenced | 1 << len(self.programs)
            heard[places] = len(self.told) + of
            self.told += [self.told[i] | mine for i in known]

    def _note(
        self, fault: Any, access: Access, range_: _Range, offsets: Any, width: int, *other: Any
    ) -> None:
        at, program = np.unique(offsets // width), interpreter.interpreter_builder.grid_idx
        where = fault, self.kernel, _line(), access, range_.argument, range_.bytes // width
        new = Violation(*where, int(at[0]), int(at[-1]), len(at), program, *other)
        if new not in self.violations:
            self.violations.append(new)
            return
        old = self.violations[i := self.violations.index(new)]
        low, high = min(old.lowest, new.lowest), max(old.highest, new.highest)
        self.violations[i] = replace(old, lowest=low, highest=high, count=old.count + new.count)


class _Torch(TorchDispatchMode):
    """What torch makes and writes between launches."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._watch = watch

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to skip it torch would import it, for seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._watch.kernel:  # the interpreter copies arguments to where they are
            return result
        if "empty" in func.name():
            self._watch.mark(result, True)
        schema = func._schema.arguments
        given = dict(zip((each.name for each in schema), args, strict=False)) | (kwargs or {})
        for each in schema:
            if each.is_write and isinstance(value := given.get(each.name), torch.Tensor):
                self._watch.mark(value, False)
        return result


def _line() -> str:
    """The line of the kernel that is being interpreted."""
    frameworks = (__file__, str(Path(triton.__file__).parent))
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(frameworks):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
