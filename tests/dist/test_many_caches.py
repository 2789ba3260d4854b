"""Many caches on the ranks of a group, and generations that differ between ranks."""

import pytest

from tests.dist.launcher import JobResult, run_gloo
from tests.long_form import short_or_long

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]
PROMPTS = short_or_long(["3,1"], ["1,0", "0,1", "3,1", "2,0"])
CHECKS = [
    "four caches, replicated",
    "four caches, distinct",
    "prefill in chunks, other numbers of them",
    "other batches, lengths and ends",
    *(f"{pair[0]} and {pair[2]} prompts, then lockstep" for pair in PROMPTS),
    "a rank that detaches ends the loop of the other",
    "a forward inside the generation of one rank",
    "and then what the other rank has not used yet",
    "one rank goes on with a conversation, the other begins",
    "attached draft on the same group",
    "a draft that evicts",
    "drafts with the first layer",
    "a cache that another rank goes on with was dropped",
    "one rank raises inside generate()",
]


@pytest.fixture(scope="module")
def job() -> JobResult:
    return run_gloo("many_caches.py", PROMPTS, ranks=2, timeout_s=300)


@pytest.mark.parametrize("check", CHECKS)
def test_two_ranks(check: str, job: JobResult):
    job.check(check)
