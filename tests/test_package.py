"""The wheel holds the package, the whole package and nothing else, and works far from a checkout.

A package or file that pyproject.toml forgets works in a checkout and vanishes from the wheel.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

PACKAGE = "alexnet_triton"
ROOT = Path(__file__).parents[1]
ROOMS = ("bench", "engine", "kernels", "weights")


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without network from a copy, since setuptools litters where it builds."""
    pytest.importorskip("build")
    source = tmp_path_factory.mktemp("source") / "checkout"
    generated = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split()]
    shutil.copytree(
        ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(".git", "tests", *generated)
    )
    dist = source.parent / "dist"
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(dist)]
    run = subprocess.run([*command, str(source)], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    (built,) = dist.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def contents(wheel: Path) -> set[str]:
    """Names in the wheel, below the package, as in the checkout: `engine/zoo.py`."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
    return {name.removeprefix(f"{PACKAGE}/") for name in names if name.startswith(f"{PACKAGE}/")}


def test_packages_are_those_on_disk(pyproject: dict[str, Any]) -> None:
    folders = {path.parent for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    on_disk = {".".join((PACKAGE, *folder.relative_to(ROOT).parts)) for folder in {ROOT, *folders}}
    listed = pyproject["tool"]["setuptools"]["packages"]
    assert listed == sorted(on_disk)


def test_wheel_installs_one_top_level_name(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {PACKAGE}


def test_wheel_holds_every_file_of_every_room(contents: set[str]) -> None:
    on_disk = {
        str(path.relative_to(ROOT))
        for room in ROOMS
        for path in (ROOT / room).rglob("*")
        if path.is_file()
        and "__pycache__" not in path.parts
        and "results" not in path.parts  # records of measurements stay with the checkout
    }
    assert contents == on_disk | {path.name for path in ROOT.glob("*.py")} | {"py.typed"}


def test_wheel_carries_the_licence_and_its_commands(wheel: Path, pyproject: dict[str, Any]) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (licence,) = (n for n in archive.namelist() if n.endswith("licenses/LICENSE"))
        (entries,) = (n for n in archive.namelist() if n.endswith("entry_points.txt"))
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()
        commands = archive.read(entries).decode()
    project = pyproject["project"]
    for group, named in {"console_scripts": project["scripts"], **project["entry-points"]}.items():
        assert f"[{group}]" in commands
        for name, target in named.items():
            assert f"{name} = {target}" in commands


def test_type_checkers_find_the_package(tmp_path: Path) -> None:
    """From elsewhere, in this environment; in a wheel it is py.typed that tells them."""
    pytest.importorskip("mypy")
    (tmp_path / "use.py").write_text("from alexnet_triton import Engine\n")
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=skip", "use.py"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout


# Run with the unpacked wheel as its one argument. An editable install would lend the wheel any
# module that it lacks, so its finders go first; every module must then come from the wheel.
IMPORT_THE_WHEEL = """
import importlib, pkgutil, sys
from pathlib import Path

wheel = Path(sys.argv[1]).resolve()
sys.meta_path[:] = [f for f in sys.meta_path if "__editable__" not in getattr(f, "__module__", "")]
sys.path_hooks[:] = [h for h in sys.path_hooks if "__editable__" not in h.__module__]
sys.path.insert(0, str(wheel))

root = importlib.import_module("alexnet_triton")
found = [root] + [
    importlib.import_module(module.name)
    for module in pkgutil.walk_packages(root.__path__, root.__name__ + ".")
]
strangers = [m.__name__ for m in found if not Path(m.__file__).is_relative_to(wheel)]
assert not strangers, strangers
for command in sys.argv[2:]:
    module, function = command.split(":")
    assert callable(getattr(importlib.import_module(module), function)), command
print(len(found))
"""


def test_every_module_imports_from_the_wheel(
    wheel: Path, contents: set[str], pyproject: dict[str, Any], tmp_path: Path
) -> None:
    unpacked = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    targets = pyproject["project"]["scripts"].values()
    run = subprocess.run(
        [sys.executable, "-c", IMPORT_THE_WHEEL, str(unpacked), *targets],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) == sum(name.endswith(".py") for name in contents)


def test_the_suite_runs_in_a_folder_of_any_name(tmp_path: Path) -> None:
    """Even `alexnet-triton`, which is no name of a module: the root's __init__.py is no test's."""
    folder = tmp_path / "alexnet-triton 2"
    (folder / "tests").mkdir(parents=True)
    names = ("__init__.py", "errors.py", "pyproject.toml", "tests/conftest.py")
    for name in (*names, "tests/test_memory.py"):
        shutil.copy(ROOT / name, folder / name)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout
