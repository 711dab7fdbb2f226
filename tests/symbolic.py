"""A script: triton-viz's sanitizer over the launches that another file makes.

    python tests/symbolic.py FILE > findings.json

FILE has `launches()`, a dictionary of names to lists of `Launch`; what comes out is a dictionary of
the same names to lists of what was found. triton-viz computes no numbers: it asks a solver (z3)
whether any lane of a program could address memory outside the kernel's tensors.

It patches Triton for the rest of the process, hence a process of its own. Of what our kernels use,
version 3.0 lacks four things, which are added here: `tensor.T`, `tl.reduce`, integer division in
the bounds of a loop, and bounds that depend on the program. It does not take descriptors.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch
import triton.language as tl
import triton_viz
from alexnet_triton.kernels.jit import Launch
from triton.runtime import interpreter
from triton_viz.clients.sanitizer.sanitizer import (
    BinarySymbolicExpr,
    SymbolicExpr,
    SymbolicSanitizer,
)


class EachProgram(SymbolicSanitizer):  # type: ignore[misc]
    """One program after the other. By itself triton-viz takes the trip count that a loop has in
    one program for that of all, and so finds faults that are none.
    """

    def grid_idx_callback(self, grid_idx: tuple[int, int, int]) -> None:
        super().grid_idx_callback(grid_idx)
        self.need_full_grid = True
        if grid_idx != (0, 0, 0):
            self.solver.pop()
        self.solver.push()
        names = (SymbolicExpr.PID0, SymbolicExpr.PID1, SymbolicExpr.PID2)
        self.solver.add(*(name == i for name, i in zip(names, grid_idx, strict=True)))


def complete_triton_viz() -> None:
    """Adds what it lacks."""
    patch_tensor, patch_reduce = interpreter._patch_lang_tensor, interpreter._patch_reduce_scan
    concretize = BinarySymbolicExpr.concretize
    divide = interpreter.interpreter_builder.create_idiv

    def transposed(self: Any) -> Any:
        *outer, rows, columns = self.type.shape
        expression = SymbolicExpr.create("trans", self.handle, [1, 0])
        return tl.tensor(expression, tl.block_type(self.dtype, [*outer, columns, rows]))

    def reduced(value: Any, axis: int, combine: Any, keep_dims: bool = False) -> Any:
        shape = [size for i, size in enumerate(value.type.shape) if i != axis]
        expression = SymbolicExpr.create("sum", value.handle, axis, keep_dims)
        return tl.tensor(expression, tl.block_type(value.dtype, shape))

    def tensor(cls: Any, scope: Any) -> None:
        patch_tensor(cls, scope)
        scope.set_attr(cls, "T", property(transposed))

    def reduce(scope: Any) -> None:
        patch_reduce(scope)
        scope.set_attr(tl, "reduce", reduced)

    def concrete(self: Any) -> Any:
        if self.op == "idiv":
            return divide(self.lhs.concretize(), self.rhs.concretize())
        return concretize(self)

    interpreter._patch_lang_tensor, interpreter._patch_reduce_scan = tensor, reduce
    BinarySymbolicExpr.concretize = concrete


def findings(launch: Launch) -> list[str]:
    """What the sanitizer says about one launch; its tensors count with their padding channels."""
    arguments = {
        name: value._base if isinstance(value, torch.Tensor) and value._is_view() else value
        for name, value in launch.arguments.items()
    }
    sanitizer = EachProgram(abort_on_error=False)
    triton_viz.trace(sanitizer)(launch.kernel)[launch.grid](**arguments)
    return [
        f"{launch.kernel.__name__}, {Path(where.filename).name}:{where.lineno}: "
        f"{record.op_type.__name__.lower()} of {record.tensor_name}"
        for record in sanitizer.records
        for where in record.user_code_tracebacks[-1:]
    ]


def main(path: str) -> None:
    """See above."""
    spec = importlib.util.spec_from_file_location("launches", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    complete_triton_viz()
    found = {
        name: [finding for launch in launches for finding in findings(launch)]
        for name, launches in module.launches().items()
    }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
