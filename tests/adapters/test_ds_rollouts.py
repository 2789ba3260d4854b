"""Text between training steps is that of the weights as they are, and nothing grows."""

import pytest

from tests.dist.launcher import run_deepspeed_ranks
from tests.long_form import LONG

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(600)]
STAGES = [1, 2, 3] if LONG else [1]


@pytest.fixture(scope="module")
def job():
    return run_deepspeed_ranks("ds_rollouts.py", STAGES, timeout_s=580)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("block", ["exact", "prefix", "prefix, trained in eval mode"])
def test_texts_are_those_of_a_fresh_model(job, stage, block):
    job.check(f"zero {stage} {block}")
