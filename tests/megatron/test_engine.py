"""Megatron's own StaticInferenceEngine and a user's script around PiKV, with the lines that docs/guide/megatron.md shows."""

import pytest

from tests.long_form import short_or_long
from tests.megatron import hosts
from tests.megatron.launched import launched
from tests.megatron.marks import on_cpu

pytestmark = [pytest.mark.dist, pytest.mark.timeout(240), on_cpu]
LAYOUTS = {"EP2": "1,2,1", "TP2": "2,1,1", "TP2xEP2-peers": "2,2,1", "PP2": "1,1,1,2"}  # tp,ep,etp,pp on two ranks
LARGER = {"PP2xEP2": (4, "1,2,1,2"), "PP2xTP2xEP2": (8, "2,2,2,2")}  # world, layout
IN_PLACE, FROM_CONFIG, BY_SPEC = (f"StaticInferenceEngine, {name}" for name in ("in place", "from_config", "--spec"))
REPLACED = "an engine that replaces the context is refused"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a job writes the module of a specification, a folder for each rank."""
    return tmp_path_factory.mktemp("spec")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("check", [IN_PLACE, FROM_CONFIG, BY_SPEC, REPLACED])
def test_engine(check: str, layout: str, folder):
    if check == FROM_CONFIG and hosts.takes_configs():
        pytest.skip("from megatron-core 0.17 on the host has no from_config")
    if check == REPLACED and layout == "PP2":
        pytest.skip("the first stage refuses, the next one waits for its hidden states")
    launched("engine.py", folder, *LAYOUTS.values()).check(f"{LAYOUTS[layout]} {check}")


@pytest.mark.parametrize("layout", short_or_long([], list(LARGER)))
def test_engine_on_more_ranks(layout: str, folder):
    world, parallel = LARGER[layout]
    result = launched("engine.py", folder, parallel, ranks=world)
    for check in (IN_PLACE, FROM_CONFIG, BY_SPEC, "equal requests"):
        result.check(f"{parallel} {check}")
