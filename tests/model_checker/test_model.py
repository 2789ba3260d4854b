"""The short form of the model checker. The long one: `python -m tests.model_checker --hours H --seed S`."""

import pytest
from hypothesis import HealthCheck, settings

from .machine import CacheModel

pytestmark = pytest.mark.usefixtures("nan_filled_empty")

TestModel = CacheModel.TestCase
TestModel.settings = settings(
    max_examples=8, stateful_step_count=10, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
)
