"""The commands as a shell user meets them: output, exit status, one line when refused."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import alexnet_triton
import pytest
import torch
from alexnet_triton import weights
from alexnet_triton.bench.__main__ import HOMES
from alexnet_triton.bench.__main__ import main as bench
from alexnet_triton.bench.__main__ import parser as bench_parser
from alexnet_triton.engine.__main__ import HOMES as ENGINE_HOMES
from alexnet_triton.engine.__main__ import main, parser
from alexnet_triton.engine.zoo import network
from alexnet_triton.weights.digits import heldout

Capture = pytest.CaptureFixture[str]


def run(capsys: Capture, *arguments: str | Path) -> tuple[int, str, str]:
    status = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return status, out, err


def test_summary_counts(capsys: Capture) -> None:
    status, out, _ = run(capsys, "summary", "alexnet", "--json")
    table = json.loads(out)
    assert status == 0
    assert table["parameters"] == 61_100_840
    assert table["macs"] == 714_188_480
    assert table["layers"][0]["output_shape"] == [64, 55, 55]
    status, out, _ = run(capsys, "summary", "alexnet")
    assert "61,100,840" in out


def test_demo_proves_itself(capsys: Capture) -> None:
    status, out, _ = run(capsys, "demo", "--json")
    seen = json.loads(out)
    assert status == 0
    assert seen["images"] >= 300
    assert seen["same_answers"] == seen["images"]
    assert seen["top1"] >= 0.97
    bound = {"fp32": 1e-4, "fp16": 4e-3}[seen["dtype"]]
    assert seen["largest_difference"] < bound * seen["largest_logit"]


def test_verify_digits(capsys: Capture) -> None:
    status, out, _ = run(capsys, "verify", "--images", "3", "--json")
    result = json.loads(out)
    assert status == 0
    assert result["first_failure"] is None
    assert [c["name"] for c in result["checks"]][:2] == ["input", "conv1"]
    assert all(0 <= c["max_error"] <= c["tolerance"] for c in result["checks"])


def spoil(monkeypatch: pytest.MonkeyPatch, layer: str, by: float) -> None:
    """Let `verify` run with something added to a layer's bias."""
    from alexnet_triton.engine import bind

    pack = bind.pack

    def spoiled(*arguments: object) -> bind.Packed:
        packed = pack(*arguments)  # type: ignore[arg-type]
        packed.bias[layer] = packed.bias[layer] + by
        return packed

    monkeypatch.setattr("alexnet_triton.engine.verify.pack", spoiled)


def test_verify_names_the_first_layer_out_of_tolerance(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, "conv3", by=0.01)
    status, out, _ = run(capsys, "verify", "digits")
    assert status == 1
    assert "first failure: conv3" in out


@pytest.mark.parametrize("by", [0.0, 0.01, float("nan")])
def test_verify_of_zeros(
    by: float, capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Zero weights make zeros: no error if they come, an infinite one if anything else does."""
    shapes = network("digits").parameter_shapes()
    zeros = {name: torch.zeros(shape) for name, shape in shapes.items()}
    weights.save(zeros, tmp_path / "zeros.safetensors")
    spoil(monkeypatch, "fc8", by)
    options = ("--weights", str(tmp_path / "zeros.safetensors"), "--images", "1", "--json")
    status, out, _ = run(capsys, "verify", "digits", *options)
    result = json.loads(out, parse_constant=pytest.fail)  # NaN and Infinity are no JSON
    checks = {check["name"]: check for check in result["checks"]}
    assert checks["conv1"]["passed"]
    assert checks["conv1"]["max_error"] == checks["conv1"]["rms_error"] == 0
    assert (status, result["first_failure"]) == ((1, "fc8") if by else (0, None))
    assert checks["fc8"]["passed"] is not bool(by)
    assert checks["fc8"]["max_error"] == (None if by else 0)
    assert checks["fc8"]["rms_error"] == (None if by else 0)


def test_classify_rows_and_files(capsys: Capture, tmp_path: Path) -> None:
    files = heldout()[::90]
    output = tmp_path / "rows.jsonl"
    arguments = ["classify", *(str(path) for path, _ in files), "--model", "digits", "--top", "2"]
    status, out, err = run(capsys, *arguments, "--json", "--output", str(output))
    assert status == 0, err
    rows = json.loads(out)
    assert [row["predictions"][0]["label"] for row in rows] == [str(label) for _, label in files]
    assert [json.loads(line) for line in output.read_text().splitlines()] == rows
    status, out, _ = run(capsys, *arguments)
    assert status == 0
    assert str(files[0][0]) in out


def test_a_source_that_is_not_there_is_refused_before_weights_are_fetched(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetched(*arguments: object) -> None:
        raise AssertionError("weights were fetched")

    monkeypatch.setattr("alexnet_triton.weights.download.fetch", fetched)
    good = heldout()[0][0]
    for word in ("clasify", str(tmp_path / "missing.png"), str(tmp_path / "*.png")):
        status, out, err = run(capsys, "classify", str(good), word)
        assert (status, out) == (1, "")
        assert err.startswith(f"alexnet-triton: error: {word}: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["classify", ".", "--weights", "nowhere.pth"], "nowhere.pth"),
        (["classify", ".", "--weights", "digits"], "digits"),
        (["classify", ".", "--device", "cuda:99"], "cuda:99"),
        (["classify", ".", "--model", "digits", "--output", "/no/such/folder/f.jsonl"], "/no/such"),
        (["verify", "alexnet", "--weights", "random:x"], "random:x"),
        (["summary", "nowhere.onnx"], "nowhere.onnx"),
    ],
)
def test_refusals_are_one_line(capsys: Capture, arguments: list[str], message: str) -> None:
    status, out, err = run(capsys, *arguments)
    assert status == 1
    assert out == ""
    lines = [line for line in err.splitlines() if not line.startswith("no GPU in use")]
    assert len(lines) == 1, err
    assert lines[0].startswith("alexnet-triton: error: ")
    assert message in lines[0]


@pytest.mark.parametrize("program", [main, bench])
def test_version(capsys: Capture, program: Callable[[list[str]], int]) -> None:
    with pytest.raises(SystemExit) as stop:
        program(["--version"])
    assert stop.value.code == 0
    name, told = capsys.readouterr().out.split()
    assert name.startswith("alexnet-triton")
    assert told == alexnet_triton.__version__


def test_explain_and_features_by_torch(capsys: Capture, tmp_path: Path) -> None:
    """The notice on a CPU recommends it; without the interpreter there is no such notice."""
    by_torch = ["--backend", "torch", "--device", "cpu"]
    status, out, err = run(capsys, "explain", "digits", "--layer", "fc8", *by_torch)
    assert (status, err) == (0, "")
    assert "equal: yes" in out
    pytest.importorskip("matplotlib")
    image, maps = heldout()[0][0], tmp_path / "maps.png"
    status, out, err = run(
        capsys, "features", image, "--model", "digits", "--output", maps, *by_torch
    )
    assert (status, err) == (0, "")
    assert str(maps) in out


def test_a_verb_that_writes_a_file_says_so(capsys: Capture, tmp_path: Path) -> None:
    predictions, weights = tmp_path / "predictions.json", tmp_path / "digits.safetensors"
    assert bench(["model", "--predict", "h200", "--batch", "1", "--json", str(predictions)]) == 0
    assert str(predictions) in capsys.readouterr().err
    status, out, _ = run(capsys, "convert", "digits", str(weights), "--model", "digits")
    assert str(weights) in out
    pytest.importorskip("matplotlib")
    diagram = tmp_path / "net.svg"
    status, out, err = run(capsys, "summary", "digits", "--diagram", str(diagram), "--json")
    assert status == 0
    assert json.loads(out)["layers"]
    assert str(diagram) in err


def test_unknown_verb_and_model_list_the_legal_ones(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["dance"])
    assert stop.value.code == 2
    assert "classify" in capsys.readouterr().err
    status, _, err = run(capsys, "summary", "lenet")
    assert status == 1
    assert "unknown network 'lenet'; known: alexnet, " in err


HELP = """
import sys

began = set(sys.modules)  # a site may have imported what it likes
from importlib import import_module

main = import_module(sys.argv[1]).main
for verb in ["", *sys.argv[2:]]:
    try:
        main([*filter(None, [verb]), "--help"])
    except SystemExit as stop:
        assert not stop.code
strangers = {name.partition(".")[0] for name in set(sys.modules) - began} - sys.stdlib_module_names
assert strangers == {"alexnet_triton"}, strangers
"""


def names(made: argparse.ArgumentParser) -> list[str]:
    (found,) = (a for a in made._actions if isinstance(a, argparse._SubParsersAction))
    return list(found.choices)


@pytest.mark.parametrize(("room", "made"), [("engine", parser()), ("bench", bench_parser())])
def test_help_has_an_example_and_waits_for_nothing(
    room: str, made: argparse.ArgumentParser
) -> None:
    """It imports the standard library and this package alone: torch alone takes seconds."""
    command = [sys.executable, "-c", HELP, f"alexnet_triton.{room}.__main__", *names(made)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("usage: ") == 1 + len(names(made))
    assert len(re.findall("^examples?:", run.stdout, re.MULTILINE)) == len(names(made))


def test_every_verb_can_run() -> None:
    """What runs a verb is found by its name, and only then."""
    for name in names(parser()):
        home = import_module(ENGINE_HOMES.get(name, ".verbs"), "alexnet_triton.engine")
        assert callable(getattr(home, f"run_{name}"))
    for name in names(bench_parser()):
        assert callable(import_module(HOMES[name], "alexnet_triton.bench").run)


def test_the_public_face_is_imported_when_it_is_asked_for() -> None:
    for name in alexnet_triton.__all__:
        assert getattr(alexnet_triton, name).__name__ == name
    assert issubclass(alexnet_triton.NetworkError, alexnet_triton.Error)
    assert issubclass(alexnet_triton.NetworkError, ValueError)
    assert alexnet_triton.kernels.__name__ == "alexnet_triton.kernels"
    with pytest.raises(AttributeError, match="no attribute 'engines'"):
        alexnet_triton.engines  # type: ignore[attr-defined]  # noqa: B018


def test_a_reader_that_leaves_early_is_no_error_message() -> None:
    command = [sys.executable, "-m", "alexnet_triton.engine", "summary", "alexnet"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_bench_env(capsys: Capture) -> None:
    assert bench(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["torch"] == torch.__version__
    assert found["commit"] is None or len(found["commit"]) >= 12
    assert bench(["env"]) == 0
    assert "triton" in capsys.readouterr().out
