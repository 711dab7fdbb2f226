"""The bench verbs: two devices compared, and nothing timed that does not match."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from alexnet_triton.bench import env
from alexnet_triton.bench.__main__ import main
from alexnet_triton.bench.measure import verb
from alexnet_triton.bench.records import DeviceState, Row
from alexnet_triton.engine.devices.pipeline import Pipeline
from alexnet_triton.engine.spec import (
    Conv2d,
    Flatten,
    Linear,
    LocalResponseNorm,
    Network,
    Preprocess,
)
from alexnet_triton.engine.zoo import NETWORKS

# Two towers: an interpreter runs them forty times.
LAYERS = (
    *(("conv1", Conv2d(16, 3)), ("norm1", LocalResponseNorm(5, groups=2))),
    *(("conv2", Conv2d(16, 1, groups=2)), ("flatten", Flatten()), ("fc3", Linear(10))),
)
PRESET = Preprocess(5, 5, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
TOWERS = Network("two towers", (3, 5, 5), LAYERS, PRESET, "")


def test_ways_of_two_devices_match_and_are_timed(
    device: torch.device, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the one that does not match is not timed."""
    run = Pipeline.run

    def wrong(self: Pipeline, *arguments: object) -> dict[str, torch.Tensor]:
        found = run(self, *arguments)  # type: ignore[arg-type]
        return {name: output * 1.5 for name, output in found.items()}

    monkeypatch.setattr(Pipeline, "run", wrong)
    monkeypatch.setitem(NETWORKS, TOWERS.name, TOWERS)
    monkeypatch.setattr(verb, "measure_roofs", lambda *_: {"fp32": 1e11, "copy": 1e10})
    common = ["--devices", *[str(device)] * 2, "--batch", "3", "--micro-batch", "2"]
    assert main(["pipeline", TOWERS.name, *common, "--rounds", "2", "--json"]) == 1
    printed = capsys.readouterr()
    assert "pipeline: cut at " in printed.err
    found = json.loads(printed.out)
    rows = {row["contestant"]: Row(**row) for row in found["rows"]}
    assert list(rows) == ["one device", "half the batch", "pipeline", "towers"]
    for name, row in rows.items():
        assert row.ours
        assert row.right is (name != "pipeline"), row
        assert len(row.samples) == (0 if name == "pipeline" else 2)
    assert rows["pipeline"].note == "NO MATCH, so not timed"
    assert found["environment"]["torch"] == torch.__version__


# Where it was made

SMI = """#!/bin/sh
case "$*" in
  *--id=GPU-1111-1111*) echo "Second, 580.1, 80 GiB, 1980 MHz, 345 MHz, 700 W, 70 W" ;;
  *--id=GPU-3333-3333*) echo "Third, 580.1, 80 GiB, and more" ;;
  *--id=*) exit 6 ;;
  *) echo "First, 1, 2, 3, 4, 5, 6"; echo "Second, 1, 2, 3, 4, 5, 6" ;;
esac
"""


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A driver that lists two GPUs, and a torch that may see the second alone, as its first."""
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    here = {
        "cuda": SimpleNamespace(uuid="1111-1111", name="Second"),
        "cuda:0": SimpleNamespace(uuid="1111-1111", name="Second"),
        "cuda:2": SimpleNamespace(uuid="3333-3333", name="One that answers oddly"),
        "cuda:1": SimpleNamespace(uuid="2222-2222", name="A slice that the driver has no name for"),
    }
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: here[str(device)])


@pytest.mark.usefixtures("two_gpus")
def test_the_environment_is_that_of_the_device_measured() -> None:
    def gpu(device: str | None) -> list[str | None]:
        found = env.environment(None if device is None else torch.device(device))
        return [value for name, value in found.items() if name.startswith("gpu ")]

    assert gpu("cuda:0") == ["Second", "580.1", "80 GiB", "1980 MHz", "345 MHz", "700 W", "70 W"]
    assert gpu("cuda:1") == ["A slice that the driver has no name for", *[None] * 6]
    assert gpu("cuda:2") == ["One that answers oddly", *[None] * 6]
    assert gpu("cpu") == gpu(None) == [None] * 7


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(("there", "name"), [(True, "Second"), (False, None)])
def test_a_bug_report_has_the_gpu_that_torch_would_use(
    there: bool,
    name: str | None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gpu name"] == name


class Nvml:
    """A driver's library that knows one GPU, and tells what is `now`."""

    now: tuple[int, ...] = (345, 70_000, 30, 1)

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle: Any) -> int:
        handle._obj.value = 7
        return int(uuid != b"GPU-1")

    def __getattr__(self, name: str) -> Callable[..., int]:
        names = ("ClockInfo", "PowerUsage", "Temperature", "CurrentClocksThrottleReasons")

        def tell(handle: ctypes.c_void_p, *given: Any) -> int:
            assert handle.value == 7
            if not self.now:
                return 999
            given[-1]._obj.value = self.now[names.index(name.removeprefix("nvmlDeviceGet"))]
            return 0

        return tell


def test_the_state_of_a_device_is_that_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = Nvml()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: nvml)
    places = {"cuda:0": SimpleNamespace(uuid="2"), "cuda:7": SimpleNamespace(uuid="1")}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: places[str(device)])
    look = env.gauge.__wrapped__(torch.device("cuda:7"))
    states = []
    for nvml.now in ((1980, 612_000, 54, 0x4), (1755, 640_000, 57, 0x1 | 0x4 | 0x20)):
        states.append(look())
    assert states[0] == DeviceState(1980, 612, 54, "power cap")
    assert env.together(states) == DeviceState(1867.5, 626, 55.5, "power cap; heat")
    nvml.now = ()  # a driver that has had enough, while somebody is measured
    assert look().throttled.startswith("not known")
    unknown = env.gauge.__wrapped__(torch.device("cuda:0"))()
    assert unknown == DeviceState(throttled="not known: NVML does not know the device")


def test_a_state_that_is_not_known_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert env.gauge(None)() == DeviceState(throttled="not known: nobody read it")
    found = [env.gauge.__wrapped__(torch.device(kind))() for kind in ("cpu", "cuda")]
    assert found[0] == DeviceState(throttled="not known: a cpu")
    assert found[1].throttled.startswith("not known: libnvidia-ml.so.1: cannot open")
    assert env.together([found[0]] * 3) == found[0]


@pytest.mark.parametrize(
    ("ends", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "alexnet-triton-bench: interrupted\n"),
        (
            OSError(28, "No space left"),
            1,
            "alexnet-triton-bench: error: [Errno 28] No space left\n",
        ),
    ],
    ids=["interrupt", "full"],
)
def test_what_ends_a_verb_is_one_line(
    ends: BaseException,
    status: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(options: object) -> int:
        raise ends

    monkeypatch.setattr(env, "run", run)
    assert main(["env"]) == status
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    "arguments",
    [
        ["model", "--predict", "h200", "--batch", "1", "--json"],
        ["report"],
        ["tune", "--simulate"],
        ["compare", "b.json"],
    ],
)
def test_a_file_that_is_not_there_is_one_line(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = str(tmp_path / "no folder" / "a.json")
    assert main([*arguments, missing]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "no such file" in line.lower()
