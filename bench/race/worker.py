"""Where a candidate is proved and timed: the child process behind an `Entrant`.

It runs as `python -m` of this module with two file descriptors, a pipe and a file for traces of
what hung or crashed, and does nothing that it is not asked to.
"""

from __future__ import annotations

import faulthandler
import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from triton.compiler.errors import CompilationError

from ..measure import timing
from ..measure.problem import Match, Tensors, expected, match, tensors
from .candidate import Candidate, CandidateError, Config, Refused, load, pose
from .contestant import Entry, after_a_change, copies, find_problem
from .proof import Disqualified, Trial, arrange, check_answer, confirm, examine, trial


class Room:
    """Where a candidate is proved and timed."""

    def __init__(self, entry: Entry) -> None:
        self._entry = entry
        self._device = torch.device(entry.device)
        self._problem = find_problem(entry)
        self._posed = pose(self._problem)
        self._chosen: tuple[Candidate, Config] | None = None
        self._take: Callable[[], float] | None = None
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        tf32 = self._problem.plan.arithmetic.precision == "tf32"
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.backends.cudnn.benchmark = True

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """What the parent's question is answered with; raises what the candidate raises."""
        match question["do"]:
            case "prove":
                return self._prove(time.monotonic() + question["limit"] / 2)
            case "bind":
                return self._bind()
            case "take":
                assert self._take is not None
                return {"us": self._take()}
        raise AssertionError(question)

    def _prove(self, search_until: float) -> dict[str, Any]:
        entry, posed = self._entry, self._posed
        candidate = load(Path(entry.file))
        configs = candidate.configs(posed)
        first = trial(self._problem, posed, self._device, entry.seed, candidate.layout)
        config, seen, search = self._choose(candidate, configs, first, search_until)
        found = confirm(candidate, config, seen, first, entry.seed)
        self._chosen = candidate, config
        notes = [candidate.note(posed), search]
        shown = {key: value if _plain(value) else str(value) for key, value in config.items()}
        return {
            **asdict(found),
            "factor": candidate.tolerance,
            "config": shown,
            "note": "; ".join(filter(None, notes)),
        }

    def _choose(
        self, candidate: Candidate, configs: Sequence[Config], first: Trial, until: float
    ) -> tuple[Config, Match, str]:
        """The fastest configuration that is right, its match, and a word about the others."""
        if len(configs) == 1:
            return configs[0], examine(candidate, configs[0], first), ""
        given = tensors(self._problem, self._device)
        times: list[tuple[float, Config, Match]] = []
        failures: list[str] = []
        for config in configs:
            if (times or failures) and time.monotonic() > until:
                break
            try:
                seen = examine(candidate, config, first)
                run = self._copy(candidate, config, given)
                taken = timing.measure({"": [run]}, self._entry.clock, self._device, rounds=5)
            except Refused:
                raise
            except Exception as error:
                failures.append(reason(error, candidate.path))
            else:
                times.append((taken[""].median, config, seen))
        if not times:
            raise Disqualified(failures[0])
        _, config, seen = min(times, key=lambda found: found[0])
        chosen = ", ".join(f"{name}={value}" for name, value in config.items())
        said = f"{chosen}, best of {len(times)} configurations"
        if failures:
            said += f", {len(failures)} fell out, the first: {failures[0]}"
        if (left := len(configs) - len(times) - len(failures)) > 0:
            said += f", {left} left untried for want of time"
        return config, seen, said

    def _bind(self) -> dict[str, Any]:
        assert self._chosen is not None
        candidate, config = self._chosen
        entry = self._entry
        torch.cuda.empty_cache()  # other processes want the memory of the proof
        given = copies(self._problem, self._device, entry.clock, entry.seed)
        runs = [self._copy(candidate, config, each) for each in given]
        sample = timing.sampler(runs, entry.clock, self._device)
        # What was captured must compute: a kernel on another stream would be missing from it.
        for run in runs:
            run.answer.fill_(torch.nan)
        for _ in runs:
            sample()
        wanted = expected(self._problem, given[0])
        found = [match(self._problem, run.answer, wanted) for run in runs]
        if any(each.max_error > each.tolerance * candidate.tolerance for each in found):
            raise Disqualified(
                "wrong when it is timed: is all its work on the current stream, and none left out "
                "because it was done before?"
            )
        self._take = after_a_change(sample, self._device)
        return {"bound": True}

    def _copy(self, candidate: Candidate, config: Config, given: Tensors) -> _Copy:
        inputs, out = arrange(given, self._posed, candidate.layout)
        weight = candidate.prepare(self._posed, inputs["weight"], config)

        def run() -> torch.Tensor:
            made = candidate.run(self._posed, inputs["x"], weight, inputs["bias"], out, config)
            return check_answer(made, out)

        return _Copy(run, out)


class _Copy:
    """A candidate bound to one set of tensors; `answer` is where its last run leaves the result."""

    def __init__(self, run: Callable[[], torch.Tensor], out: torch.Tensor) -> None:
        self._run = run
        self.answer = out

    def __call__(self) -> None:
        self.answer = self._run()


def reason(error: BaseException, path: Path) -> str:
    """An error in one line, with the place in the candidate's file that it came from."""
    if isinstance(error, Disqualified | CandidateError):
        return str(error)
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    lines = [
        frame.lineno
        for link in chain
        for frame in traceback.extract_tb(link.__traceback__)
        if frame.filename == str(path)
    ]
    said = [line.strip() for line in str(chain[-1]).splitlines() if line.strip()]
    # Triton's compiler quotes the source before it says what is wrong with it; others start so.
    quoted = isinstance(chain[-1], CompilationError)
    message = f": {said[-1 if quoted else 0]}" if said else ""
    place = f" at {path.name}:{lines[-1]}" if lines else ""
    return f"raised {type(chain[-1]).__name__}{message}{place}"


def _plain(value: object) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def serve(connection: Connection, faults: int) -> None:
    """Answer the parent's questions until it hangs up."""
    room: Room | None = None
    answer: dict[str, Any]
    while True:
        try:
            question = json.loads(connection.recv_bytes())
        except EOFError:
            return
        faulthandler.dump_traceback_later(question["limit"], exit=True, file=faults)
        try:
            if room is None:
                entry = Entry(**question["entry"])
                room, answer = Room(entry), {"ready": True}
            else:
                answer = room.answer(question)
        except Refused as refusal:
            answer = {"refused": str(refusal)}
        except (Exception, SystemExit) as error:
            answer = {"disqualified": reason(error, Path(entry.file))}
        faulthandler.cancel_dump_traceback_later()
        connection.send_bytes(json.dumps(answer).encode())


if __name__ == "__main__":
    pipe, log = map(int, sys.argv[1:])
    faulthandler.enable(log)
    np.seterr(all="ignore")  # infinities and NaNs are results, in the interpreter as on a GPU
    with torch.no_grad():
        serve(Connection(pipe), log)
