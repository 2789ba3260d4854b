"""Start a distributed job from a test: bounded in time, on a free port, leaving no process behind.

run_deepspeed starts `deepspeed` itself; run_gloo starts plain processes with torch's env:// variables, forked where warm.py can.
Jobs write one JSON line per check (see jobs/report.py); the test asserts them one by one.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pikv_ds.launch.ranks import end_group, free_port
from pikv_ds.launch.shm_buffers import remove_buffers
from pikv_ds.ops.build.torch_builds import DEEPSPEED_OP, Watch, build_root
from tests.dist import warm
from tests.long_form import LONG

JOBS = Path(__file__).resolve().parent / "jobs"
RESULTS_VAR = "PIKV_TEST_RESULTS"
RANK_VARS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobResult:
    command: list[str]
    returncode: int
    output: str
    rows: list[dict]
    ranks: int
    wall_s: float

    def check(self, name: str) -> list[dict]:
        """Rows of one check, by rank; fails with the job's output when a rank failed or never got there."""
        rows = sorted((row for row in self.rows if row["check"] == name), key=lambda row: row["rank"])
        failed = [row for row in rows if not row["ok"]]
        assert not failed, f"check {name!r} on rank {failed[0]['rank']}: {failed[0]['error']}\n{self.describe()}"
        assert len(rows) == self.ranks, f"check {name!r} ran on {len(rows)} of {self.ranks} ranks\n{self.describe()}"
        return rows

    def describe(self) -> str:
        return (
            f"{' '.join(self.command)}\nexit {self.returncode} after {self.wall_s:.1f} s; checks seen: "
            f"{sorted({row['check'] for row in self.rows})}\n{self.output[-6000:]}"
        )


class JobTimeout(AssertionError):
    """The job outlived its limit and was killed with all its processes."""


def run_deepspeed(
    job: str | Path,
    args: Sequence[object] = (),
    *,
    ranks: int = 2,
    timeout_s: float = 240,
    env: Mapping[str, str] | None = None,
    launcher_args: Sequence[str] = (),
) -> JobResult:
    """Run a job under the DeepSpeed launcher; with "--module" in `launcher_args` the job is a module's name."""
    target = str(job) if "--module" in launcher_args else _job_path(job)
    command = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--num_accelerators",
        str(ranks),
        "--master_port",
        str(free_port()),
        *launcher_args,
        target,
        *map(str, args),
    ]
    return run_commands([command], ranks=ranks, timeout_s=timeout_s, env=env)


def run_deepspeed_ranks(job: str, args: Sequence[object] = (), *, ranks: int = 2, timeout_s: float = 240) -> JobResult:
    """Run a job of DeepSpeed that is not about how it was started. Long form: under its launcher; short: with the variables it sets."""
    if LONG:
        return run_deepspeed(job, args, ranks=ranks, timeout_s=timeout_s)
    return _run_ranks(job, args, ranks=ranks, timeout_s=timeout_s, more={"LOCAL_SIZE": str(ranks), "CROSS_RANK": "0", "CROSS_SIZE": "1"})


def run_gloo(
    job: str | Path, args: Sequence[object] = (), *, ranks: int = 2, timeout_s: float = 180, env: Mapping[str, str] | None = None
) -> JobResult:
    """Run a job on plain processes: RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT are set, nothing else.

    Short form: ranks of this repository's jobs are forked, see warm.py. With `env`, in the long form, and for other scripts
    every rank is an interpreter of its own.
    """
    return _run_ranks(job, args, ranks=ranks, timeout_s=timeout_s, env=env)


def _run_ranks(
    job: str | Path,
    args: Sequence[object],
    *,
    ranks: int,
    timeout_s: float,
    env: Mapping[str, str] | None = None,
    more: Mapping[str, str] | None = None,
) -> JobResult:
    """more: variables that modules do not read when they are imported."""
    port = str(free_port())
    command = [sys.executable, _job_path(job), *map(str, args)]
    per_process = [
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        | (more or {})
        for rank in range(ranks)
    ]
    start = warm.start if not LONG and not env and warm.can_start(command[1]) else start_processes
    return run_commands([command] * ranks, ranks=ranks, timeout_s=timeout_s, env=env, per_process_env=per_process, start=start)


def start_processes(commands: Sequence[list[str]], envs: Sequence[Mapping[str, str]], log: IO[bytes]) -> Iterator[subprocess.Popen]:
    for command, env in zip(commands, envs, strict=True):
        yield subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def run_commands(
    commands: Sequence[list[str]],
    *,
    ranks: int,
    timeout_s: float,
    env: Mapping[str, str] | None = None,
    per_process_env: Sequence[Mapping[str, str]] | None = None,
    start: Callable[..., Iterator] = start_processes,
) -> JobResult:
    """Run commands side by side (ranks, or one launcher per emulated node) and wait for all of them.

    The first that fails ends the others after a short grace, so a dead rank is seen as itself and not
    as a timeout. Every process group is killed at the end, whatever happened.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="pikv_job_") as folder:
        log_path = Path(folder) / "output.log"
        own = per_process_env or [{}] * len(commands)
        envs = [{**_job_env(folder), **(env or {}), **variables} for variables in own]
        processes: list[subprocess.Popen | warm.Rank] = []
        with log_path.open("ab") as log:
            try:
                for process in start(commands, envs, log):
                    processes.append(process)
                timed_out = not _wait_all(processes, started + timeout_s)
            finally:
                for process in processes:
                    end_group(process)
                for port in _ports(commands, envs):
                    remove_buffers(port)
        result = JobResult(
            command=list(commands[0]),
            rows=_read_rows(Path(folder)),
            ranks=ranks,
            returncode=next((p.returncode for p in processes if p.returncode), 0),
            output=log_path.read_text(errors="replace"),
            wall_s=time.monotonic() - started,
        )
    if timed_out:
        raise JobTimeout(f"killed after {timeout_s} s\n{result.describe()}")
    return result


def _ports(commands: Sequence[list[str]], envs: Sequence[Mapping[str, str]]) -> set[str]:
    """At which the jobs meet: an argument of DeepSpeed's launcher, or a variable of the ranks."""
    given = {env["MASTER_PORT"] for env in envs if "MASTER_PORT" in env}
    return given | {command[command.index("--master_port") + 1] for command in commands if "--master_port" in command}


def _wait_all(processes: Sequence[subprocess.Popen | warm.Rank], deadline: float, grace_s: float = 20) -> bool:
    """True when all ended by themselves, or one failed; False when the deadline passed first. Raises: AbandonedLock."""
    failed_at, watch = None, Watch(build_root(), f"{DEEPSPEED_OP}/lock")
    while any(process.poll() is None for process in processes):
        now = time.monotonic()
        if failed_at is None and any(process.poll() not in (None, 0) for process in processes):
            failed_at = now
        if failed_at is not None and now > failed_at + grace_s:
            return True
        if now > deadline:
            return False
        watch.check()
        time.sleep(0.1)
    return True


def _job_env(folder: str) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if name not in RANK_VARS}
    # The repository root, where pytest runs too: jobs import pikv_ds and tests.* as the tests do.
    path = os.pathsep.join(filter(None, (str(JOBS.parents[2]), os.environ.get("PYTHONPATH"))))
    return env | {
        RESULTS_VAR: folder,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }


def _job_path(job: str | Path) -> str:
    path = JOBS / job
    assert path.is_file(), f"no such job: {path}"
    return str(path)


def _read_rows(folder: Path) -> list[dict]:
    lines = (line for path in sorted(folder.glob("rank*.jsonl")) for line in path.read_text().splitlines())
    return [json.loads(line) for line in lines]
