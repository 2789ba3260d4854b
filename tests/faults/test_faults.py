"""One fault of every kind on simulated ranks; `python -m tests.faults` runs many."""

import pytest

from tests.long_form import LONG

from .simulated import KINDS, one


@pytest.mark.parametrize("seed", range(len(KINDS) * (8 if LONG else 1)))
def test_a_fault_is_named_and_changes_nothing_silently(seed):
    assert one(seed)["kind"] == list(KINDS)[seed % len(KINDS)]
