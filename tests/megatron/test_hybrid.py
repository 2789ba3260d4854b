"""Stacks whose layers are attention or experts: HybridModel, up to Megatron-Core 0.17 MambaModel without Mamba layers."""

import pytest

from tests.long_form import LONG, short_or_long
from tests.megatron.launched import launched
from tests.megatron.marks import on_cpu

pytestmark = [pytest.mark.dist, pytest.mark.timeout(240), on_cpu]
PATTERNS = short_or_long(["*E**E*"], ["*E*E", "E*-E*EE", "*E**E*"])
SOURCES = short_or_long(["previous_layer", "true"], ["previous_layer", "true", "lookahead"])


@pytest.mark.parametrize(
    "check",
    [
        *(f"{pattern}, ids {source}" for pattern in PATTERNS for source in SOURCES),
        "a model built from the specification of a stack",
        "attention enabled without the router that homes it",
        *(["dynamic batching"] if LONG else []),
    ],
)
def test_hybrid(check: str):
    launched("hybrid.py", "1,2,1").check(f"1,2,1 {check}")
