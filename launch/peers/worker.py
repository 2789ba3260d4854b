"""The process of one peer: reads the data, says what it can run, then runs it when asked, one JSON line for another."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import data


class Case(NamedTuple):
    """One kernel over one format."""

    name: str
    call: Callable[[], object]
    out: Callable[[], object]  # of the last call, [batch, HEADS * GROUP, DIM] or as many numbers
    nbytes: int  # of keys and values as it keeps them
    note: str


def serve(cases: Callable[[data.Data, int], Iterable[Case]]) -> None:
    """Arguments: the folder of the data, threads. The first line has the error of each case, relative RMS against fp64."""
    answers = os.dup(1)
    os.dup2(2, 1)  # libraries print
    given = data.read(Path(sys.argv[1]))
    found = {case.name: case for case in cases(given, int(sys.argv[2]))}
    ready = {}
    for case in found.values():
        case.call()
        out = np.asarray(case.out(), np.float64).reshape(given.answer.shape)
        error = float(np.sqrt(((out - given.answer) ** 2).mean() / (given.answer**2).mean()))
        ready[case.name] = {"error": error, "bytes": case.nbytes, "note": case.note, "ms": _run(case, 1)["ms"]}
    _say(answers, ready)
    for line in sys.stdin:
        asked = json.loads(line)
        found[asked["case"]].call()  # what the last process left in the caches goes
        _say(answers, _run(found[asked["case"]], asked["calls"]))


def _run(case: Case, calls: int) -> dict[str, float]:
    started, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        case.call()
    return {"ms": 1e3 * (time.perf_counter() - started) / calls, "cpu_ms": 1e3 * (time.process_time() - cpu) / calls}


def _say(to: int, answer: dict) -> None:
    os.write(to, (json.dumps(answer) + "\n").encode())
