"""Jobs of this folder, each launched once however many tests ask for its checks."""

from functools import cache

from tests.dist.launcher import JobResult, run_gloo
from tests.megatron import JOBS


@cache
def launched(job: str, *arguments: object, ranks: int = 2, timeout_s: float = 240, env: tuple[tuple[str, str], ...] = ()) -> JobResult:
    """env: variables of the job's own."""
    return run_gloo(JOBS / job, arguments, ranks=ranks, timeout_s=timeout_s, env=dict(env))
