"""scheduling.prefill "auto" with a request of its own on every rank."""

import pytest

from tests.dist.launcher import run_gloo

pytestmark = pytest.mark.dist


def test_prompts_of_distinct_ranks_are_kept_until_their_own_ends():
    result = run_gloo("prompt_end.py", ranks=2, timeout_s=100)
    result.check("each until its end")
