"""What could be imported at d67f97f can be imported still: public_names.json was made from that commit."""

import json
from importlib import import_module
from pathlib import Path

import pytest

NAMES = json.loads((Path(__file__).parent / "public_names.json").read_text())["modules"]
GONE: dict[tuple[str, str], str] = {}
"""(module, name) -> why it is gone; only names that a module had imported for its own use."""


@pytest.mark.parametrize("module", NAMES)
def test_names_are_there(module):
    there = import_module(module)
    wanted = [name for name in NAMES[module]["defined"] + NAMES[module]["imported"] if (module, name) not in GONE]
    missing = [name for name in wanted if not hasattr(there, name)]
    assert not missing, f"{module} no longer gives {missing}"


def test_what_is_gone_was_nobodys_to_give():
    for module, name in GONE:
        assert name in NAMES[module]["imported"], f"{module} defined {name}: it must stay"
        assert not hasattr(import_module(module), name), f"{module}.{name} is there again"
