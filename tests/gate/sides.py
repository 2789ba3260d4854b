"""A side: the processes that run one tree, a process per rank. They wait between blocks, so only one side runs at a time."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from pikv_ds.launch.ranks import end_group, free_port
from tests.gate.decodes import DECODES

WORKER = Path(__file__).with_name("worker.py")
START_S, BLOCK_S, END_S = 600, 120, 10  # the first start of a tree may compile its ops
_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class WorkerFailed(RuntimeError):
    """A process of a side ended or hung; the message holds the end of its log."""


class Block(NamedTuple):
    """Steps of one side. wall_ms: of the median step; cpu_ms: of the mean step, summed over ranks; digest: per rank, of outputs so far."""

    wall_ms: float
    cpu_ms: float
    digest: tuple[str, ...]

    def joined(self, later: Block) -> Block:
        """Both turns of a round as one."""
        return Block((self.wall_ms + later.wall_ms) / 2, (self.cpu_ms + later.cpu_ms) / 2, later.digest)


class Side:
    """Started at once; `ready` waits for the cache to be filled. A context manager that ends its processes."""

    def __init__(self, name: str, tree: Path, decode: str, logs: Path) -> None:
        self.name = name
        ranks, port = DECODES[decode].ranks, str(free_port())
        self._logs = [logs / f"{name}_{rank}.log" for rank in range(ranks)]
        self._processes = []
        for rank, log in enumerate(self._logs):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            with log.open("w") as stderr:
                self._processes.append(
                    subprocess.Popen(
                        [sys.executable, str(WORKER), str(tree), decode],
                        env=_environment(tree) | own, cwd=tree, text=True, start_new_session=True,
                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr,
                    )
                )  # fmt: skip

    def ready(self) -> Path:
        """The folder of the pikv_ds that it runs."""
        return [Path(answer["package"]) for answer in self._answers(START_S)][0]

    def block(self, steps: int) -> Block:
        for process in self._processes:
            with suppress(BrokenPipeError):  # it has ended: its log is read below
                print(steps, file=process.stdin, flush=True)
        answers = self._answers(BLOCK_S)
        wall_ms = sum(answer["wall_ms"] for answer in answers) / len(answers)
        return Block(wall_ms, sum(answer["cpu_ms"] for answer in answers), tuple(answer["digest"] for answer in answers))

    def _answers(self, timeout_s: float) -> list[dict[str, Any]]:
        lines = []
        for rank, process in enumerate(self._processes):
            answered = select.select([process.stdout], [], [], timeout_s)[0]
            line = process.stdout.readline() if answered else ""
            if not line:
                what = "ended" if answered else f"did not answer within {timeout_s:g} s"
                if answered:  # its pipe is closed before it says why
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(END_S)
                tail = "\n".join(self._logs[rank].read_text(errors="replace").splitlines()[-30:])
                raise WorkerFailed(f"rank {rank} of side {self.name!r} {what}; the end of its log:\n{tail}")
            lines.append(json.loads(line))
        return lines

    def __enter__(self) -> Side:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for process in self._processes:
            with suppress(BrokenPipeError):
                process.stdin.close()
        for process in self._processes:
            end_group(process)
            process.stdout.close()


def _environment(tree: Path) -> dict[str, str]:
    """The same for all trees but for the tree itself: compiled ops are shared, since their cache goes by the sources."""
    env = {name: value for name, value in os.environ.items() if name not in _RANKS}
    path = os.pathsep.join(filter(None, (str(tree), env.get("PYTHONPATH"))))
    fixed = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}
    return env | fixed | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
