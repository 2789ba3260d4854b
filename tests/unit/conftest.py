"""Fixtures of the unit tests."""

import pytest
import torch

pytest.register_assert_rewrite(*(f"tests.unit.{name}" for name in ("checks", "evicting", "invariants", "tiered")))


@pytest.fixture(scope="module")
def nan_filled_empty():
    """torch.empty and its kin give NaN (floats) or the largest integer: reading what nobody wrote shows at once."""
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(was)
