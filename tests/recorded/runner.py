"""Run cases, all of one world size in one launch, and collect the outcome of every rank."""

import sys
from collections.abc import Callable

from pikv_ds.launch.ranks import free_port
from tests.dist.launcher import JobResult, run_commands
from tests.recorded.cases import Case

TIMEOUT_S = 400
ENV = {"MKL_NUM_THREADS": "1"}


def record(cases: list[Case], done: Callable[[str], None] = lambda name: None) -> tuple[dict[str, list[dict]], dict[str, float]]:
    """Outcomes by rank of every case, and seconds it took. A case that raised has {"error": ...} on some rank.

    A rank that raises ends its launch; the cases behind it are run in another one.
    """
    outcomes: dict[str, list[dict]] = {}
    seconds: dict[str, float] = {}
    for world in sorted({case.world for case in cases}):
        pending = [case.name for case in cases if case.world == world]
        while pending:
            job = _launch(pending, world)
            for name in pending:
                rows = sorted((row for row in job.rows if row["check"] == name), key=lambda row: row["rank"])
                failed = [row for row in rows if not row["ok"]]
                if failed or len(rows) < world:
                    reason = failed[0]["error"] if failed else job.describe()
                    outcomes[name] = [{"error": reason}] * world
                    break
                outcomes[name] = [row["outcome"] for row in rows]
                seconds[name] = max(row["seconds"] for row in rows)
            pending = [name for name in pending if name not in outcomes]
        done(f"{world} ranks")
    return outcomes, seconds


def _launch(names: list[str], world: int) -> JobResult:
    port = str(free_port())
    command = [sys.executable, "-m", "tests.recorded.job", *names]
    per_process = [
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for rank in range(world)
    ]
    return run_commands([command] * world, ranks=world, timeout_s=TIMEOUT_S, env=ENV, per_process_env=per_process)
