"""Ranks that are forked from a process with the imports done, which cost a rank five seconds and its checks often less.

Every pytest worker keeps two such processes for a folder of jobs and takes them in turn: string hashes, and with them the order of a
set, differ between a rank and the next, as they do between processes.
"""

import atexit
import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

# By the folder that a folder of jobs lies in. Nothing here may start a thread, or make what goes with its process (a temporary folder).
PRELOADED = {
    "dist": ("tests.dist.jobs.exact", "tests.tiny_models", "tests.calibrations", "tests.recorded.host_core"),
    "megatron": (
        "tests.megatron.models",
        "tests.megatron.runs",
        "tests.tiny_models",
        "tests.calibrations",
        "pikv_ds.cache.inspect",
        "pikv_ds.megatron_patch.base_context",
    ),
}
SEEDS = 2
_OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE")
OF_ONE_LAUNCH = (*_OF_RANKS, "PIKV_TEST_RESULTS", "PYTEST_CURRENT_TEST")


class Parent:
    """A process that forks ranks, see warm_rank.py."""

    def __init__(self, modules: Sequence[str], env: Mapping[str, str]) -> None:
        self._said = tempfile.TemporaryFile("w+", errors="replace")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.dist.warm_rank", *modules],
            env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True, start_new_session=True,
        )  # fmt: skip

    def ask(self, request: dict) -> dict:
        """Its reply. Whatever interrupts this ends it, for the next reply would be to another question."""
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())
        except BaseException as error:
            self.end()
            self._said.seek(0)
            raise RuntimeError(f"the process that forks ranks was ended:\n{self._said.read()[-6000:]}") from error

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def end(self) -> None:
        """And with it its ranks."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()


class Rank:
    """A forked rank, with what the launcher asks of a subprocess.Popen."""

    def __init__(self, parent: Parent, command: Sequence[str], env: Mapping[str, str], log: IO[bytes]) -> None:
        self._parent, self.returncode = parent, None
        self.pid: int = parent.ask({"argv": list(command[1:]), "env": dict(env), "log": log.name})["pid"]

    def poll(self) -> int | None:
        if self.returncode is None and not self._parent.alive:
            self.returncode = -signal.SIGKILL
        elif self.returncode is None:
            self.returncode = self._parent.ask({"poll": self.pid})["status"]
        return self.returncode

    def wait(self, timeout: float) -> int:
        """After its group was killed: it is gone, or it cannot be killed."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.05)
        return self.returncode


_parents: dict[tuple, Parent] = {}


def can_start(job: str) -> bool:
    return _folder(job) in PRELOADED


def start(commands: Sequence[list[str]], envs: Sequence[Mapping[str, str]], log: IO[bytes]) -> Iterator[Rank]:
    """commands: [interpreter, job, arguments...] of every rank."""
    parents = [_parent(_folder(command[1]), index % SEEDS, env) for index, (command, env) in enumerate(zip(commands, envs, strict=True))]
    for parent, command, env in zip(parents, commands, envs, strict=True):
        yield Rank(parent, command, env, log)


def _folder(job: str) -> str:
    path = Path(job)
    return path.parent.parent.name if path.parent.name == "jobs" else ""


def _parent(folder: str, seed: int, env: Mapping[str, str]) -> Parent:
    """One for the environment that is asked for: modules read it when they are imported."""
    kept = {name: value for name, value in env.items() if name not in OF_ONE_LAUNCH}
    key = (folder, seed, *sorted(kept.items()))
    if key not in _parents or not _parents[key].alive:
        _parents[key] = Parent(PRELOADED[folder], kept)
        atexit.register(_parents[key].end)
    return _parents[key]
