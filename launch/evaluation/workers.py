"""Processes that measure units side by side, one thread each. The parent writes a unit as a line of JSON, the worker answers with a line.

A worker keeps its backend while units ask for the same model, so a model is loaded once per worker and not once per unit.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pikv_ds.launch.evaluation.spec import EvalSpec, Unit, from_json
from pikv_ds.launch.ranks import end_group, own_stdout, rank_environment

Answer = dict[str, Any]  # {"row": ..., "seconds": on the clock, "cpu_s": of the worker's processor time} or {"refused": text}


def measure_all(work: Sequence[tuple[EvalSpec, Unit]], workers: int, folder: Path, done: Callable[[int, Answer], None]) -> None:
    """Measure `work` on `workers` processes whose current folder is `folder`; done(index, answer) is called in this thread, as they come.

    Raises: RuntimeError when a worker ended; the end of its log is in the message.
    """
    todo: queue.SimpleQueue = queue.SimpleQueue()
    answers: queue.SimpleQueue = queue.SimpleQueue()
    for idx in range(len(work)):
        todo.put(idx)
    started = [_Worker(folder, folder / f"worker_{number}.log") for number in range(min(workers, len(work)))]
    try:
        for worker in started:
            threading.Thread(target=worker.serve, args=(work, todo, answers), daemon=True).start()
        for _ in work:
            idx, answer = answers.get()
            if isinstance(answer, Exception):
                raise answer
            done(idx, answer)
    finally:
        for worker in started:
            end_group(worker.process)


class _Worker:
    def __init__(self, folder: Path, log: Path) -> None:
        self.log = log
        command = [sys.executable, "-m", "pikv_ds.launch.evaluation.workers"]
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command, cwd=folder, env=rank_environment(1) | {"OMP_NUM_THREADS": "1"}, text=True, start_new_session=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            )  # fmt: skip

    def serve(self, work: Sequence[tuple[EvalSpec, Unit]], todo: queue.SimpleQueue, answers: queue.SimpleQueue) -> None:
        while True:
            try:
                idx = todo.get_nowait()
            except queue.Empty:
                return
            spec, unit = work[idx]
            answers.put((idx, self._ask(spec, unit)))

    def _ask(self, spec: EvalSpec, unit: Unit) -> Answer | RuntimeError:
        try:
            self.process.stdin.write(spec.to_json([unit]) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except OSError:
            line = ""
        if line:
            return json.loads(line)
        tail = "".join(self.log.read_text(errors="replace").splitlines(keepends=True)[-40:])
        return RuntimeError(f"a worker ended with status {self.process.wait()} in {unit}; the end of its log:\n{tail}")


def main() -> None:
    stdout = own_stdout()
    import torch

    from pikv_ds.launch.cli import TOLD
    from pikv_ds.launch.evaluation.job import backend_class, measure_unit, prose_of

    torch.set_num_threads(1)
    loaded = backend = prose = None
    for line in sys.stdin:
        spec, units = from_json(line)
        started, cpu = time.perf_counter(), time.process_time()
        try:
            if (spec.model, spec.text, spec.dtype) != loaded:
                backend = backend_class("hf")(spec, timeout_s=300)
                prose, loaded = prose_of(backend, spec), (spec.model, spec.text, spec.dtype)
            with torch.no_grad():
                row = measure_unit(backend, spec, prose, units[0], lambda samples: None)
            answer: Answer = {"row": row, "seconds": round(time.perf_counter() - started, 2), "cpu_s": round(time.process_time() - cpu, 2)}
        except TOLD as error:
            answer = {"refused": str(error)}
        print(json.dumps(answer), file=stdout, flush=True)


if __name__ == "__main__":
    main()
