"""From a contestant to a row: nothing timed that does not match, and one failure is one row."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from alexnet_triton.bench.measure import contest, contestants, problem
from alexnet_triton.bench.measure.contest import ContextLost, admit, blank_row, race, survived
from alexnet_triton.bench.measure.peers import Peer, Prepared, kept, peers
from alexnet_triton.bench.measure.problem import Match, Problem, Tensors, match, ready
from alexnet_triton.bench.measure.timing import Effort, Run
from alexnet_triton.bench.records import OURS, Row, best_peer
from alexnet_triton.engine.devices.planner import Planner
from alexnet_triton.engine.plan import ARITHMETIC
from alexnet_triton.engine.zoo import DIGITS

pytestmark = pytest.mark.interpreter
CPU = torch.device("cpu")
ROOFS = {"fp32": 1e11, "copy": 1e10}
QUICK = Effort(rounds=2)
# Few layers, few pixels: an interpreter runs it a hundred times.
KEPT = ("conv1", "relu1", "pool1", "conv5", "relu5", "pool5", "flatten", "fc7", "relu7", "fc8")
LAYERS = tuple((name, dict(DIGITS.layers)[name]) for name in KEPT)
SHORT = replace(DIGITS, input_shape=(3, 32, 32), layers=LAYERS)


def one(name: str, batch: int = 2) -> Problem:
    """A layer of a short digits network, or all of it: "digits" or, on pixels, "digits uint8"."""
    planner = Planner(SHORT, ARITHMETIC["fp32"], None)
    if name.startswith("digits"):
        return problem.network_problem(planner, "fp32", batch, name.endswith("uint8"))
    (part,) = problem.problems(planner, "fp32", batch, [name])
    return part


def rows_of(name: str) -> dict[str, Row]:
    batch = 1 if name.startswith("digits") else 2
    rows = race(one(name, batch), CPU, roofs=ROOFS, effort=QUICK)
    return {row.contestant: row for row in rows}


@pytest.mark.parametrize("name", ["conv1+pool1", "fc7", "digits", "digits uint8"])
def test_all_contestants_match_and_are_timed(name: str) -> None:
    rows = rows_of(name)
    whole = name.startswith("digits")
    assert next(iter(rows)) == OURS
    assert len(rows) > 1
    for row in rows.values():
        assert (row.section, row.problem) == ("model" if whole else "layers", name)
        assert row.network == (name if whole else "digits")
        assert (row.batch, row.dtype, row.clock) == (1 if whole else 2, "fp32", "host")
        assert row.straw_man == ("NCHW" in row.contestant)
        assert row.matched
        assert row.p20_us is not None
        assert row.p80_us is not None
        assert row.median_us is not None
        assert 0 < row.p20_us <= row.median_us <= row.p80_us
        assert row.runs == 2
        assert row.roof_us == pytest.approx(1e6 * max(row.flops / 1e11, row.bytes / 1e10))
        assert bool(row.workspace) == (whole and row.contestant == OURS)
    assert rows[OURS].note == "", "images are read in place: there is no pass to tell of"


class Fades:
    """Right while it is proved, and never again."""

    def __init__(self, given: Tensors) -> None:
        self.given = given
        self.runs = 0

    def __call__(self) -> None:
        self.runs += 1
        if self.runs > 3:
            raise ZeroDivisionError("sampling\nis too much")

    def output(self) -> torch.Tensor:
        weight, bias = self.given.state["fc7.weight"], self.given.state["fc7.bias"]
        return (self.given.x @ weight.t() + bias).relu()


def raises(given: Tensors) -> Prepared:
    raise RuntimeError("CUDA out of patience\nand much more")


def zeros(given: Tensors) -> Prepared:
    shape = len(given.x), len(given.state["fc7.bias"])
    return Prepared(lambda: None, lambda: torch.zeros(shape))


def silent(given: Tensors) -> Prepared:
    """What it never writes stays NaN."""
    answer = torch.zeros(len(given.x), len(given.state["fc7.bias"]))
    return Prepared(lambda: None, lambda: answer)


def fades(given: Tensors) -> Prepared:
    contestant = Fades(given)
    return Prepared(contestant, contestant.output)


def test_who_fails_has_a_row_that_says_so_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def odd(problem: Problem, device: torch.device, kinds: object = None) -> Iterator[Peer]:
        for prepare in (raises, zeros, silent, fades):
            yield Peer(prepare.__name__, prepare)
        yield Peer("absent", None, note="not installed")
        yield from peers(problem, device)

    monkeypatch.setattr(contestants, "peers", odd)
    rows = rows_of("fc7")
    assert {name: row.note for name, row in rows.items() if row.median_us is None} == {
        "raises": "RuntimeError: CUDA out of patience",
        "zeros": "NO MATCH, so not timed",
        "silent": "NO MATCH, so not timed",
        "absent": "not installed",
        "fades": "ZeroDivisionError: sampling",
    }
    assert not rows["zeros"].matched
    assert rows["zeros"].error == pytest.approx(1, abs=0.01)
    assert rows["silent"].error == torch.inf
    assert rows["silent"].max_error is None  # JSON has no infinity
    assert rows["absent"].error is None
    assert rows["fades"].matched
    assert rows["fades"].runs == 0
    assert rows[OURS].median_us is not None
    assert rows["torch linear"].median_us is not None


def test_who_fails_while_others_are_timed_is_out_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(runs: object, clock: str, device: torch.device) -> object:
        times = iter([1.0, 2.0])
        return lambda: next(times)

    monkeypatch.setattr(contest, "sampler", late)
    row = replace(blank_row(one("fc7")), contestant="late")
    (found,) = contest.timed([contest.Admitted(row, (print,))], "host", CPU, rounds=3)
    assert found.note == "StopIteration"
    assert found.median_us is None
    (found,) = contest.timed([contest.Admitted(row, (print,))], "host", CPU, rounds=2)
    assert found.median_us == 1.5


@pytest.mark.parametrize("name", ["fc8", "digits"])
def test_the_engine_itself_is_not_timed_if_it_is_wrong(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(given: Tensors) -> Tensors:
        return Tensors(given.x, {name: tensor * 1.01 for name, tensor in given.state.items()})

    engine = contestants._engine
    monkeypatch.setattr(contestants, "_engine", lambda p, given: engine(p, spoiled(given)))
    monkeypatch.setattr(contestants, "ready", lambda p, given: ready(p, spoiled(given)))
    row = rows_of(name)[OURS]
    assert row.median_us is None
    assert row.note == "NO MATCH, so not timed"
    assert row.max_error is not None
    assert row.tolerance is not None
    assert row.max_error > row.tolerance


def test_memory_that_held_the_right_answer_proves_nothing() -> None:
    """Outputs that are allocated anew take turns in two places, which both must hold NaN."""
    (given,), compare = contest.inputs(one("fc7"), CPU)

    def prepare(given: Tensors) -> Prepared:
        answers = [fades(given).output() for _ in range(2)]
        return kept(lambda: answers.reverse() or answers[0])  # type: ignore[func-returns-value]

    row = replace(blank_row(one("fc7")), clock="host")
    found = admit(Peer("remembers", prepare), [given], row, compare, CPU)
    assert found.row.note == contest.NO_MATCH


def test_runs_are_proved_as_each_clock_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right as a graph is not right as a call."""
    captured: list[Run] = []

    class Graph:
        def __init__(self, runs: list[Run], device: torch.device) -> None:
            captured.append(runs[0])

        def replay(self) -> None:
            captured[-1]()

    def only_captured(given: Tensors) -> Prepared:
        answer = torch.zeros(len(given.x), len(given.state["fc7.bias"]))

        def run() -> None:
            answer.copy_(fades(given).output() * bool(captured))

        return Prepared(run, lambda: answer)

    monkeypatch.setattr(contest, "capture", Graph)
    monkeypatch.setattr(contest, "sampler", lambda runs, clock, device: lambda: 1.0)
    monkeypatch.setattr(contestants, "peers", lambda *_: [Peer("graph alone", only_captured)])
    found = {}
    for row in race(one("fc7"), CPU, ["graph", "host"], effort=QUICK):
        captured.clear()
        found[row.contestant, row.clock] = row.right
    assert found["graph alone", "graph"]
    assert not found["graph alone", "host"]


def test_the_clock_cold_is_itself_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contest, "capture", Replayed)
    monkeypatch.setattr(contest, "sampler", lambda runs, clock, device: lambda: len(runs) + 1.0)
    rows = {row.contestant: row for row in race(one("fc7"), CPU, ["cold", "host"], effort=QUICK)}
    assert rows["empty kernel"].clock == "cold"
    assert rows["empty kernel"].median_us == 2
    assert rows["empty kernel"].shown
    assert not rows["empty kernel"].right
    assert best_peer(rows[OURS], rows.values()) == rows["torch linear"]
    assert len({row.race for row in rows.values()}) == 2


def test_the_first_copies_are_compared_and_the_worst_decides() -> None:
    def prepare(given: Tensors) -> Prepared:
        return Prepared(lambda: None, lambda: given.x.clone())

    def compare(answer: torch.Tensor) -> Match:
        return Match(answer.item(), 0.0, tolerance=7.5)

    row = replace(blank_row(one("fc8")), clock="host")
    copies = [Tensors(torch.tensor(float(i)), {}) for i in range(12)]
    entry = admit(Peer("one", prepare), copies, row, compare, CPU)
    assert entry.row.max_error == contest.COMPARED - 1
    assert len(entry.runs) == 12
    wrong = admit(Peer("one", prepare), copies[:1] + copies[8:], row, compare, CPU)
    assert (wrong.row.note, wrong.row.max_error, wrong.runs) == (contest.NO_MATCH, 11, ())


def test_switches_are_as_before_between_rows() -> None:
    before = torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32
    rows = race(one("pool5"), CPU, effort=QUICK)
    assert next(rows).roof_us is None
    assert before == (torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32)
    assert not torch.is_inference_mode_enabled()


def test_what_takes_long_is_said_before(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wait(given: Tensors) -> Prepared:
        assert "tortoise: about a minute" in capsys.readouterr().err
        return zeros(given)

    found = [Peer("tortoise", wait, slow="about a minute")]
    monkeypatch.setattr(contestants, "peers", lambda *_: found)
    assert rows_of("fc7")["tortoise"].note == contest.NO_MATCH


def test_a_problem_that_does_not_fit_is_rows_that_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.cuda.OutOfMemoryError("tried to allocate 9 GiB")

    monkeypatch.setattr(contest, "inputs", full)
    rows = rows_of("fc7")
    assert {name: row.note for name, row in rows.items()} == dict.fromkeys(
        [OURS, "torch linear"], "OutOfMemoryError: tried to allocate 9 GiB"
    )


# --- a broken context ------------------------------------------------------------------------


def broken(*_: object) -> None:
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


def test_only_a_broken_context_ends_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, error = torch.device("cuda"), RuntimeError("no plan")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert survived("a peer", error, cuda) == "RuntimeError: no plan"
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    assert survived("a peer", error, CPU) == "RuntimeError: no plan"
    with pytest.raises(ContextLost, match="a peer: RuntimeError: no plan: the GPU's context"):
        survived("a peer", error, cuda)


def test_a_contestant_that_breaks_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    dangerous = Peer("dangerous", broken)  # type: ignore[arg-type]
    monkeypatch.setattr(contestants, "peers", lambda *given: [*peers(*given), dangerous])
    monkeypatch.setattr(contest, "survived", lambda one, error, _: survived(one, error, cuda))
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    rows: list[Row] = []
    with pytest.raises(ContextLost, match="dangerous: AcceleratorError"):
        rows.extend(race(one("fc7"), CPU, effort=QUICK))
    assert {row.contestant for row in rows} == {OURS, "torch linear", "dangerous"}
    assert all("dangerous: AcceleratorError" in row.note for row in rows)
    assert not any(row.median_us for row in rows)


# --- who takes part in a whole network -------------------------------------------------------


@pytest.mark.parametrize("name", ["digits", "digits uint8"])
def test_what_a_gpu_captures_is_right(name: str, generator: torch.Generator) -> None:
    """The runs that its clocks capture, run as they are."""
    whole = one(name)
    given = problem.tensors(whole, CPU, generator)
    right = problem.expected(whole, given)
    everyone = contestants.contestants(whole, CPU, ["torch", "nchw"])
    assert [each.name for each in everyone] == [OURS, "torch channels_last", "torch NCHW"]
    for each in everyone:
        answer = contest._output(each.prepare(given), "host", CPU)  # type: ignore[misc]
        assert match(whole, answer, right).passed, each.name


class Replayed:
    """A stand-in for a CUDA graph: it runs again what was captured."""

    def __init__(self, runs: list[Run], device: torch.device) -> None:
        self.runs = runs
        self.replay()

    def replay(self) -> None:
        for run in self.runs:
            run()


@pytest.mark.parametrize("name", ["digits", "digits uint8"])
@pytest.mark.parametrize("kind", ["torch", "nchw"])
def test_a_graph_reads_the_images_of_the_call(
    kind: str, name: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contestants, "capture", Replayed)
    whole, cuda = one(name), torch.device("cuda")
    given = problem.tensors(whole, CPU, generator)
    _, peer = contestants.contestants(whole, cuda, [kind])
    prepared = contestants.called(peer, whole, cuda).prepare(given)  # type: ignore[misc]
    given.x.copy_(given.x.flip(0))  # the caller's next batch
    prepared.run()
    assert match(whole, prepared.output(), problem.expected(whole, given)).passed


def test_what_a_graph_reads_stays_while_it_may_run(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CUDA graph keeps no tensor alive: weights in a peer's own order must not be given back."""

    class Forgetful(Replayed):
        def __init__(self, runs: list[Run], device: torch.device) -> None:
            super().__init__(runs, device)
            self.runs = []

    monkeypatch.setattr(contestants, "capture", Forgetful)
    own: list[weakref.ref[torch.Tensor]] = []

    def prepare(given: Tensors) -> Prepared:
        weight = given.state["fc8.weight"].clone()
        own.append(weakref.ref(weight))
        return kept(lambda: weight[:1].clone())

    whole = one("digits")
    peer = contestants.called(Peer("orders its weights", prepare), whole, torch.device("cuda"))
    given = problem.tensors(whole, CPU, generator)
    assert peer.prepare is not None
    prepared = peer.prepare(given)
    gc.collect()
    assert own[0]() is not None
    prepared.run()
