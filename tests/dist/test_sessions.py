"""Sessions saved on two ranks and loaded on one and on four, by transformers and by Megatron-Core: the same next 64 tokens."""

import pytest

from tests.dist.jobs.sessions import BLOCKS
from tests.dist.launcher import JobResult, run_gloo
from tests.long_form import LONG
from tests.megatron import JOBS
from tests.megatron.marks import on_cpu

pytestmark = [pytest.mark.dist, pytest.mark.timeout(1200)]
OTHERS = ["forks and turns", "requests of their own", "a file that is cut short on one rank", "a folder that is not there"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[JobResult, str]:
    folder = tmp_path_factory.mktemp("sessions")
    return run_gloo("sessions.py", ["save", folder], ranks=2, timeout_s=560), str(folder)


@pytest.fixture(scope="module", params=[1, 4] if LONG else [1])
def loaded(request, saved) -> JobResult:
    """Long form: on four ranks too; short: Megatron has them."""
    return run_gloo("sessions.py", ["load", saved[1]], ranks=request.param, timeout_s=560)


@pytest.mark.parametrize("check", [*(f"save {name}" for name in BLOCKS), *OTHERS])
def test_two_ranks(check: str, saved):
    saved[0].check(check)


@pytest.mark.parametrize("name", BLOCKS)
def test_another_number_of_ranks(name: str, loaded):
    loaded.check(f"load {name}")


@on_cpu
@pytest.mark.parametrize("ranks", [1, 4])
def test_megatron(ranks: int, saved):
    job = run_gloo(JOBS / "sessions.py", [saved[1], f"1,{ranks},1"], ranks=ranks, timeout_s=560)
    for check in ("load exact", "load h2o", "and back", "another model"):
        job.check(check)
