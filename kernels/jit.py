"""One kernel source, two ways to run it: compiled on a GPU, interpreted on a CPU.

`@triton.jit` decides at decoration, for the whole process, whether a kernel is compiled or
interpreted. `@jit` here keeps both forms, so that one process can run a kernel on CUDA tensors,
prove it on CPU tensors and compile it for a GPU that is not there. A `Launch` picks by the device
of its tensors; it is what every launcher in this package returns.

Kernels must not call Triton's own jit library (`tl.zeros`, `tl.sum`, `tl.cdiv`, ...): those are
fixed as compiled functions when Triton is imported. Builtins (`tl.full`, `tl.dot`) do the work.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import triton
from triton.runtime.interpreter import InterpretedFunction, interpreter_builder
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from ..errors import Error
from .product import reproducible

MAX_TILE = 2**20  # Triton's limit on the elements of one tensor in a kernel

ALONE = threading.RLock()
"""Triton's interpreter patches `triton.language` for the whole process while a kernel runs: whoever
interprets or compiles holds this lock, and so does whoever records a CUDA graph, which fails if
another thread waits for the whole device meanwhile."""


@functools.cache
def _blas() -> Any:
    # Imported here because importing it sets an environment variable.
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


@contextlib.contextmanager
def _without_idle_checks() -> Iterator[None]:
    """While it lasts, integer sums are not looked over: half of the interpreter's time.

    It works out for every one whether it overflows, and does nothing with the answer unless Triton
    is being debugged.
    """
    options = interpreter_builder.options
    interpreter_builder.options = replace(options, sanitize_overflow=options.debug)
    try:
        yield
    finally:
        interpreter_builder.options = options


class Kernel(JITFunction):  # type: ignore[misc]
    """A Triton kernel or device function that exists both compiled and interpreted."""

    def __init__(self, fn: Callable[..., Any], do_not_specialize: Sequence[str] = ()) -> None:
        super().__init__(fn, do_not_specialize=list(do_not_specialize))
        self._interpreted = InterpretedFunction(fn)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As a device function in an interpreted kernel: `triton.language` is patched already."""
        return self._interpreted.rewrite()(*args, **kwargs)

    def interpret(self, grid: tuple[int, ...], **arguments: Any) -> None:
        """Run every program of `grid` in Triton's interpreter; tensors must be on the CPU.

        Raises RuntimeError where the interpreter cannot run.
        """
        if problem := interpreter_problem():
            raise RuntimeError(problem)
        # Thousands of small products: BLAS threads cost more than they bring, up to a hundredfold
        # when another process wants the cores. Infinities and NaNs are results, as on a GPU.
        with ALONE, contextlib.ExitStack() as patched:
            # Made behind the lock: the limit remembers the threads there are when it is made.
            patched.enter_context(_blas().limit(limits=1, user_api="blas"))
            patched.enter_context(np.errstate(all="ignore"))
            patched.enter_context(_without_idle_checks())
            patched.enter_context(reproducible())
            self._interpreted[grid](**arguments)


def jit(
    fn: Callable[..., Any] | None = None, *, do_not_specialize: Sequence[str] = ()
) -> Any:  # Kernel, or a decorator that makes one
    """`@triton.jit`, but the kernel can also be interpreted in the same process.

    `do_not_specialize` names integer arguments that must not make a new binary when their value
    happens to be 1 or a multiple of 16.
    """
    if fn is None:
        return lambda f: Kernel(f, do_not_specialize)
    return Kernel(fn)


OLDEST = 80
"""The first compute capability that the kernels are made for: older tensor cores spill them."""


class LaunchRefused(Error):
    """A launch that the driver does not take."""


class TooOld(RuntimeError):
    """A GPU of a compute capability before OLDEST."""


def architecture(device: torch.device) -> int | None:
    """Compute capability as a number, 90 for 9.0; None for a CPU, which interprets kernels.

    Raises TooOld.
    """
    if device.type == "cpu":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if 10 * major + minor < OLDEST:
        raise TooOld(
            f"{torch.cuda.get_device_name(device)}: the kernels want compute capability "
            f"{OLDEST // 10}.{OLDEST % 10} or newer, got {major}.{minor}"
        )
    return 10 * major + minor


@functools.cache
def interpreter_problem() -> str | None:
    """Why Triton's interpreter cannot run here, with the cure; None if it can."""
    numpy_new = tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4)
    triton_old = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
    if numpy_new and triton_old:  # triton-lang/triton issue 9171
        return (
            f"Triton {triton.__version__}'s interpreter breaks with NumPy {np.__version__}; "
            "install triton>=3.7 or numpy<2.4"
        )
    return None


@dataclass(frozen=True, slots=True)
class Work:
    """What an operation must at least do: floating point operations and bytes to and from memory.

    Each input is read once, each output written once; a multiply-accumulate is two operations.
    """

    flops: int
    bytes: int

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel bound to its grid, arguments and options: calling it runs it.

    Calling is asynchronous on a GPU (on the current stream) and immediate on a CPU, where nothing
    overlaps: a launch with `pdl` is then interpreted as one without. The same object can be
    compiled for a GPU that is not there, since it knows everything a binary needs.

    Raises LaunchRefused where the driver takes no such descriptor.
    """

    kernel: Kernel
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int
    pdl: bool = False  # starts before its predecessor ends: see pdl.py

    @property
    def options(self) -> dict[str, int | bool]:
        """What the compiler and the driver are told beside the arguments."""
        told: dict[str, int | bool] = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return told | {"launch_pdl": True} if self.pdl else told

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        for value in self.arguments.values():
            base = value.base if isinstance(value, TensorDescriptor) else value
            if isinstance(base, torch.Tensor):
                return base.device
        raise ValueError(f"{self.kernel.__name__}: no tensor among its arguments")

    def __call__(self) -> None:
        device = self.device
        if device.type == "cpu":
            alone = {"PDL": False} if self.pdl else {}  # the interpreter knows no such instructions
            try:
                self.kernel.interpret(self.grid, **self.arguments | alone)
            except BaseException:
                if (counters := self.arguments.get("counters")) is not None:
                    counters.zero_()  # else the next run would go on counting from here
                raise
            return
        # Triton launches on the current device, whatever device the tensors are on, and a first
        # launch compiles.
        with ALONE, torch.cuda.device(device):
            try:
                self.kernel[self.grid](**self.arguments, **self.options)
            except RuntimeError as error:
                if "tensor map" not in str(error):
                    raise
                raise LaunchRefused(
                    f"{self.kernel.__name__}: this GPU's driver refuses a descriptor of its "
                    f"operands: load with options=Options(pointers=True), or update it ({error})"
                ) from error


def fields_of(declared: Any, *names: str) -> dict[str, Any]:
    """Some fields of a shape or a configuration, as arguments of the same names."""
    return {name: getattr(declared, name) for name in names}


def power_of_two(size: int, low: int, high: int) -> int:
    """The smallest power of two that covers `size`, within [low, high]."""
    return min(max(1 << max(size - 1, 0).bit_length(), low), high)
