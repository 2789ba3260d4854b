"""The short form of the model checker. The long one: `python -m tests.model_checker --hours H --seed S`."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from .machine import CacheModel

pytestmark = pytest.mark.usefixtures("nan_filled_empty")
SHORT = settings(max_examples=8, stateful_step_count=10, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))


def test_lives_of_caches_keep_the_invariants():
    run_state_machine_as_test(CacheModel, settings=SHORT)
