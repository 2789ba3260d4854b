"""What could be imported at d67f97f can be imported still: public_names.json was made from that commit."""

import json
from importlib import import_module
from pathlib import Path

import pytest

NAMES = json.loads((Path(__file__).parent / "public_names.json").read_text())["modules"]
CHECKS = {
    "pikv_ds.cache": ("check_retention", "check_tiers", "fit_transforms"),
    "pikv_ds.config": (
        "check_budget", "check_exchange", "check_experts", "check_host_penalty", "check_method", "check_pools", "check_ready",
        "check_retention",
    ),
}  # fmt: skip
GONE = {
    ("pikv_ds.policies.base", "Entries"): 'single entries no longer leave pages (granularity "token")',
    ("pikv_ds.launch.lm_eval", "open_scorer"): "lm-eval's own class scores and generates (launch/evaluation/harness.py)",
} | {(module, name): "rules in one table (pikv_ds/blueprint/rules.py)" for module, names in CHECKS.items() for name in names}
"""(module, name) -> why it is gone: names of settings that were deleted, and names that a module had imported for its own use."""


@pytest.mark.parametrize("module", NAMES)
def test_names_are_there(module):
    there = import_module(module)
    wanted = [name for name in NAMES[module]["defined"] + NAMES[module]["imported"] if (module, name) not in GONE]
    missing = [name for name in wanted if not hasattr(there, name)]
    assert not missing, f"{module} no longer gives {missing}"


@pytest.mark.parametrize("module, name", GONE)
def test_what_is_gone_was_there_and_is_not_there_again(module, name):
    assert name in NAMES[module]["defined"] + NAMES[module]["imported"]
    assert not hasattr(import_module(module), name), f"{module}.{name} is there again: take it out of GONE"
