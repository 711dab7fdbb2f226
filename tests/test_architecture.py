"""The house stands: imports go down only, and importing it leaves the process as it was."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

PACKAGE = "alexnet_triton"
ROOT = Path(__file__).parents[1]

# Two ground floors that do not know each other, then one floor on the other; all on `errors.py`,
# and all may ask the package for its version.
FLOORS = {"__version__": -1, "errors": -1, "kernels": 0, "weights": 0, "engine": 1, "bench": 2}

MODULES = [*sorted(ROOT.glob("*.py")), *sorted(p for r in FLOORS for p in (ROOT / r).rglob("*.py"))]
TESTS = sorted(p for room in ("examples", "tests", "tools") for p in (ROOT / room).rglob("*.py"))

each_module = pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
each_test = pytest.mark.parametrize("path", TESTS, ids=lambda p: p.name)
each_file = pytest.mark.parametrize(
    "path", [*MODULES, *TESTS], ids=lambda p: str(p.relative_to(ROOT))
)


def dotted(path: Path) -> str:
    """The module's full name: `engine/run.py` is `alexnet_triton.engine.run`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join((PACKAGE, *(part for part in parts if part != "__init__")))


def imports(source: str, package: str) -> Iterator[tuple[int, bool, str]]:
    """Every import as `(line, relative, full name)`; `package` is what relative names start from.

    `from .. import kernels` counts as kernels, so a name that is no module gives a part too many.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, False, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = resolve_name("." * node.level + base, package)
            for alias in node.names:
                yield node.lineno, node.level > 0, f"{base}.{alias.name}"


def may_import(importer: str, imported: str) -> bool:
    """A room may use itself and the floors below; only the root may use every room."""
    if importer == PACKAGE:
        return True
    here, there = importer.split(".")[1], imported.split(".")[1]
    return here == there or (there in FLOORS and FLOORS[there] < FLOORS[here])


def breaches(path: Path) -> list[str]:
    """What this module of the package imports and should not, one line each."""
    name = dotted(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = []
    for line, relative, imported in imports(path.read_text(), package):
        top = imported.split(".")[0]
        named = relative or path.name.startswith("test_")  # pytest names what it collects itself
        if not named and top in (PACKAGE, *FLOORS):
            found.append(f"{path.name}:{line}: {imported} must be imported relatively")
        if top == PACKAGE and not may_import(name, imported):
            found.append(f"{path.name}:{line}: {name} stands below {imported}")
    return found


@each_module
def test_imports_are_relative_and_go_down_only(path: Path) -> None:
    assert not breaches(path)


def node(module: str) -> str:
    """A room of a floor (`bench.tune`), or a file that lies flat in it, whatever is inside."""
    return ".".join(module.split(".")[1:3])


def arrows() -> dict[str, set[str]]:
    """Who imports whom within a floor, wherever the import stands."""
    modules = set(map(dotted, MODULES))
    found: dict[str, set[str]] = {}
    for path in MODULES:
        name = dotted(path)
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for _, _, imported in imports(path.read_text(), package):
            target = imported if imported in modules else imported.rpartition(".")[0]
            if target in modules and "." in node(name) and "." in node(target):
                found.setdefault(node(name), set()).add(node(target))
    return {name: targets - {name} for name, targets in found.items()}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Names that import one another in a ring, none if there is no ring."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_rooms_of_a_floor_do_not_import_in_a_circle() -> None:
    assert not circle(arrows())


def test_a_circle_is_seen() -> None:
    assert circle({"bench.tune": {"bench.measure"}, "bench.measure": set()}) == []
    ring = circle({"bench.tune": {"bench.measure"}, "bench.measure": {"bench.tune"}})
    assert set(ring) == {"bench.tune", "bench.measure"}


def test_no_two_classes_have_one_name() -> None:
    """A reader who looks a name up finds one thing."""
    homes: dict[str, list[str]] = {}
    for path in MODULES:
        for statement in ast.parse(path.read_text()).body:
            if isinstance(statement, ast.ClassDef):
                homes.setdefault(statement.name, []).append(dotted(path))
    assert not {name: where for name, where in homes.items() if len(where) > 1}


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("engine.run", "kernels.conv", True),
        ("engine.run", "engine.plan", True),
        ("bench.tune", "engine", True),
        ("bench.tune", "weights", True),
        ("kernels.tuning", "errors.Error", True),
        ("errors", "kernels.tuning", False),
        ("kernels.conv", "weights", False),
        ("weights", "kernels.layout", False),
        ("weights.digits", "engine.zoo", False),
        ("kernels", "engine.spec", False),
        ("engine", "bench.timing", False),
        ("engine.run", "Engine", False),
    ],
)
def test_the_rule_itself(importer: str, imported: str, allowed: bool) -> None:
    assert may_import(f"{PACKAGE}.{importer}", f"{PACKAGE}.{imported}") is allowed


@each_test
def test_tests_import_by_absolute_name(path: Path) -> None:
    found = [
        f"{path.name}:{line}: {imported}"
        for line, relative, imported in imports(path.read_text(), "tests")
        if relative or imported.split(".")[0] in FLOORS
    ]
    assert not found


@each_file
def test_a_module_says_what_it_is_for(path: Path) -> None:
    assert path.stem not in ("util", "utils"), "name the file after its idea"
    assert ast.get_docstring(ast.parse(path.read_text())), "no docstring"


@each_module
def test_every_refusal_is_an_error_of_the_package(path: Path) -> None:
    """Whoever catches `alexnet_triton.Error`, as the shell does, catches all of them."""
    found = [
        f"{path.name}:{node.lineno}: {node.name}"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
        and node.name.endswith("Error")
        and "Error" not in map(ast.unparse, node.bases)
        and path != ROOT / "errors.py"
    ]
    assert not found


def decorators(function: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    """Names of its decorators, called or not: `{"jit"}` for `@jit(...)` and `@triton.jit`."""
    bare = (d.func if isinstance(d, ast.Call) else d for d in function.decorator_list)
    return {ast.unparse(d).rpartition(".")[2] for d in bare}


def is_annotated(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Every parameter but `self` and `cls`, and the result."""
    a = function.args
    named = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
    untyped = [
        arg.arg for arg in named if arg.annotation is None and arg.arg not in ("self", "cls")
    ]
    return function.returns is not None and not untyped


@each_module
def test_all_but_kernels_are_annotated(path: Path) -> None:
    """mypy is told to let kernels be untyped; it cannot tell them from their neighbours, we can."""
    found = [
        f"{path.name}:{node.lineno}: {node.name}"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and "jit" not in decorators(node)
        and not is_annotated(node)
    ]
    assert not found


def test_nothing_runs_a_room_outside_the_package() -> None:
    """Run without the package's name, a room works in a checkout alone, and only from its root."""
    room = "|".join(FLOORS)
    outside = re.compile(rf"""-m["',\s]+({room})\b""")
    texts = [
        path
        for pattern in ("Makefile", "*.toml", "*.md", "tools/*", ".ci/*", ".github/workflows/*")
        for path in ROOT.glob(pattern)
    ]
    found = [
        f"{path.relative_to(ROOT)}: {match[0]!r}"
        for path in [*texts, *MODULES, *TESTS]
        for match in outside.finditer(path.read_text())
    ]
    assert not found


IMPORT_EVERYTHING = """
import importlib, json, os, sys
import torch, triton, triton.language  # what these do to the environment is not ours

class Asked(Exception): ...

def refuse(*_): raise Asked("a module asks for the GPU while it is imported")

for name in ("init", "is_available", "device_count", "current_device", "get_device_properties"):
    setattr(torch.cuda, name, refuse)

def state():
    return dict(os.environ) | {
        "grad": torch.is_grad_enabled(),
        "dtype": str(torch.get_default_dtype()),
        "threads": torch.get_num_threads(),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "benchmark": torch.backends.cudnn.benchmark,
        "random": hash(torch.random.get_rng_state().numpy().tobytes()),
    }

before = state()
for module in sys.argv[1:]:
    importlib.import_module(module)
after = state()
changed = sorted(k for k in before | after if before.get(k) != after.get(k))
print(json.dumps({"changed": changed, "cuda": torch.cuda.is_initialized()}))
"""


def test_importing_changes_nothing() -> None:
    """No environment variable, no switch of torch, no random number, no look at the GPU."""
    # A bare environment: this process has imported the package, and what that set is in its own.
    kept = ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH")
    run = subprocess.run(
        [sys.executable, "-c", IMPORT_EVERYTHING, *map(dotted, MODULES)],
        env={name: os.environ[name] for name in kept if name in os.environ},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == {"changed": [], "cuda": False}
