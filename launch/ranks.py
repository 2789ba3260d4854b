"""Start the ranks of a command through DeepSpeed's launcher, and never leave one behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import pikv_ds

from .device import let_memory_grow
from .shm_buffers import remove_buffers

_LOG_LINES = 40


class RanksFailed(RuntimeError):
    """The job ended with an error; the message holds the end of what its ranks logged."""


def run_ranks(module: str, arguments: Sequence[str], ranks: int) -> None:
    """Run `module` on `ranks` ranks of this machine and wait. Rank 0 may write to this process's stdout.

    What the ranks log goes to stderr; it is kept in a file and shown only when the job fails. Raises: RanksFailed, also for a lock that an
    earlier job left in the folder of DeepSpeed's op.
    """
    from pikv_ds.ops.build.torch_builds import announce_build

    port, env = free_port(), rank_environment(ranks)
    # --no_local_rank: the ranks read LOCAL_RANK, which is also what torchrun sets.
    command = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--quiet",
        "--num_accelerators",
        str(ranks),
        "--master_port",
        str(port),
        "--no_local_rank",
        "--module",
        module,
        *arguments,
    ]
    announce_build(env)
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stderr=log, start_new_session=True)
        try:
            status = _wait(process, env)
        finally:
            end_group(process)
            remove_buffers(port)
        if status != 0:
            log.seek(0)
            tail = "".join(log.readlines()[-_LOG_LINES:])
            raise RanksFailed(f"{module} on {ranks} ranks ended with status {status}; the end of its log:\n{tail}")


def _wait(process: subprocess.Popen, env: Mapping[str, str]) -> int:
    from pikv_ds.ops.build.torch_builds import DEEPSPEED_OP, AbandonedLock, Watch, build_root

    watch = Watch(build_root(env), f"{DEEPSPEED_OP}/lock")
    while True:
        try:
            return process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            pass
        try:
            watch.check()
        except AbandonedLock as left:
            raise RanksFailed(str(left)) from left


def rank_environment(ranks: int) -> dict[str, str]:
    """This process's, with what ranks of ours need: one thread each, DeepSpeed's accelerator, a folder for the ops that torch builds."""
    import torch

    from pikv_ds.ops.build.torch_builds import own_folder

    env = dict(os.environ)
    env.setdefault("TORCH_EXTENSIONS_DIR", str(own_folder()))
    # One thread per rank: ranks that share cores slow each other down by far more than they gain.
    env.setdefault("OMP_NUM_THREADS", "1")
    let_memory_grow(env)
    if torch.cuda.device_count() < ranks:
        env.setdefault("DS_ACCELERATOR", "cpu")
    root = Path(pikv_ds.__file__).resolve().parents[1]
    if "site-packages" not in root.parts:
        # A checkout: the ranks must find it whatever the current folder is.
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), env.get("PYTHONPATH"))))
    return env


def started_ranks() -> int | None:
    """Ranks of the job this process belongs to, None if no launcher started it."""
    return int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ else None


def gather(value: Any) -> list[Any]:
    """`value` of every rank, on every rank; of this process alone when torch.distributed is not initialised. Collective."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return [value]
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def own_stdout() -> TextIO:
    """This process's stdout as a stream of its own; everything else that prints goes to stderr from now on.

    Called by a rank before it imports DeepSpeed, whose logger writes to stdout.
    """
    stream = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1, encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return stream


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def end_group(process: subprocess.Popen, patience_s: float = 5.0) -> None:
    """Terminate what is left of a process group, then kill it. The process must lead a session of its own."""
    for first_signal in (signal.SIGTERM, signal.SIGKILL):
        pending, deadline = first_signal, time.monotonic() + patience_s
        while _group_alive(process.pid, pending) and time.monotonic() < deadline:
            pending = 0
            process.poll()
            time.sleep(0.05)
    process.wait(timeout=patience_s)


def _group_alive(group: int, sent: int) -> bool:
    try:
        os.killpg(group, sent)
    except ProcessLookupError:
        return False
    return True
