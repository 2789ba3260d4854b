"""Rows on two ranks, replicated and distinct, beside the same rows alone: what a row keeps and reads is its own affair there, too."""

import pytest

from pikv_ds.policies import POLICIES
from tests.dist.launcher import JobResult, run_gloo
from tests.long_form import short_or_long
from tests.retention.test_rows_alone import EVICTING, READING, TIERS

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]
SCENES = ("fork", "beams", "drops", "ragged", "crops")
POLICY = [name for name in EVICTING if not POLICIES.get(name).needs_one_shard]
WHO = [f"evicting/{name}" for name in POLICY] + [f"reading/{name}" for name in READING] + [f"tiered/{name}" for name in TIERS]
WHOLE = [f"{who}/{scene}/{requests}" for who in WHO for scene in SCENES for requests in ("replicated", "distinct")]
# Short: one of each kind. What ranks add to a row is where its pages lie, which tests/retention/test_rows_alone.py does not know.
SHORT = ["evicting/h2o/fork/distinct", "reading/cache_aware/drops/replicated"]


@pytest.fixture(scope="module")
def job() -> JobResult:
    return run_gloo("lone_rows.py", short_or_long(SHORT, WHOLE), ranks=2, timeout_s=580)


@pytest.mark.parametrize("what", short_or_long(SHORT, WHOLE))
def test_a_row_is_as_it_is_alone(job, what):
    job.check(what)
