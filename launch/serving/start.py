"""The processes of a service: rank 0 is the one that was started, and starts the others on this machine. None outlives it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import IO, Protocol

import torch
import torch.distributed as dist

from pikv_ds.launch.ranks import end_group, rank_environment

_HOST = "127.0.0.1"
_LOG_LINES = 30


class RankEnded(RuntimeError):
    """A rank of the service has ended; the message holds the end of what it logged."""


class Job(Protocol):
    """What is needed of a spec here: of a service's, or of a chat's."""

    backend: str
    ranks: int
    threads: int
    timeout_s: float

    def to_json(self) -> str: ...


class Ranks:
    """Ranks 1 ... of a service, children of this process."""

    def __init__(self, spec: Job, port: int, module: str) -> None:
        self._logs: list[IO[str]] = []
        self._processes: list[subprocess.Popen] = []
        for rank in range(1, spec.ranks):
            log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 it lives as long as the rank
            variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(spec.ranks), "OMP_NUM_THREADS": str(spec.threads)}
            # In a session of its own: Ctrl-C is for rank 0, which tells the others when it is done.
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", module, str(port), spec.to_json()],
                    env=rank_environment(spec.ranks) | variables, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                )
            )  # fmt: skip
            self._logs.append(log)

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def check(self) -> None:
        """Raises: RankEnded."""
        for rank, (process, log) in enumerate(zip(self._processes, self._logs, strict=True), 1):
            if process.poll() is not None:
                log.seek(0)
                tail = "".join(log.readlines()[-_LOG_LINES:])
                raise RankEnded(f"rank {rank} has ended with status {process.returncode}; the end of its log:\n{tail}")

    def end(self, patience_s: float = 10.0) -> None:
        """Wait for them for a while, then end them."""
        for process in self._processes:
            try:
                process.wait(patience_s)
            except subprocess.TimeoutExpired:
                end_group(process)
        for log in self._logs:
            log.close()


@contextmanager
def ranks_of(spec: Job, module: str = "pikv_ds.launch.serving.follow") -> Iterator[Ranks | None]:
    """Start the others, which run `module`, and join them; they load the model meanwhile. None: there are none. Raises: RankEnded."""
    if spec.ranks == 1 and spec.backend == "hf":  # Megatron asks for a group, also of one
        yield None
        return
    # A store of our own: while we wait for the others in it, we can see whether they live.
    store = dist.TCPStore(_HOST, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=spec.timeout_s))
    ranks = Ranks(spec, store.port, module)
    try:
        while not store.check([_ready(rank) for rank in range(1, spec.ranks)]):
            ranks.check()
            time.sleep(0.05)
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(spec.ranks), MASTER_ADDR=_HOST, MASTER_PORT=str(store.port))
        _join(store, 0, spec)
        yield ranks
    except BaseException:
        ranks.end(patience_s=1.0)
        raise
    else:
        ranks.end()
        dist.destroy_process_group()


def join(port: int, spec: Job) -> None:
    """Of a rank that was started by Ranks, once it has imported what it needs."""
    rank = int(os.environ["RANK"])
    os.environ.update(MASTER_ADDR=_HOST, MASTER_PORT=str(port))
    store = dist.TCPStore(_HOST, port, is_master=False, timeout=timedelta(seconds=spec.timeout_s))
    store.set(_ready(rank), "1")
    _join(store, rank, spec)


def _join(store: dist.Store, rank: int, spec: Job) -> None:
    cuda = torch.cuda.device_count() >= spec.ranks
    if cuda:
        torch.cuda.set_device(rank)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=spec.ranks, timeout=timedelta(seconds=spec.timeout_s))


def _ready(rank: int) -> str:
    return f"pikv_serve_ready_{rank}"
