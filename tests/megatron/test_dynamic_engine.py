"""Megatron's own DynamicInferenceEngine over PiKV: the tokens and the steps it takes over its own cache, and those of a full forward.

Long form: also on one rank, on TP2xEP2 and on pipeline stages of both. Behind its coordinator: test_coordinator.py.
"""

import pytest

from tests.long_form import short_or_long
from tests.megatron.launched import launched
from tests.megatron.marks import on_cpu

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300), on_cpu]
LAYOUTS = {  # name: world, "tp,ep,etp,pp"
    "world1": (1, "1,1,1"),
    "EP2": (2, "1,2,1"),
    "PP2": (2, "1,1,1,2"),
    "TP2xEP2": (4, "2,2,2"),
    "TP2xEP2-peers": (4, "2,2,1"),
    "PP2xEP2": (4, "1,2,1,2"),
    "PP2xTP2xEP2": (8, "2,2,2,2"),
}
DENSE, PIKV, LATENT = "Megatron's own cache", "chunked prefill, idle ranks", "multi-latent attention"
RUN = short_or_long(["EP2", "PP2"], list(LAYOUTS))


def rows_of(layout: str, check: str) -> list[dict]:
    """One launch per world size runs all its layouts."""
    world, parallel = LAYOUTS[layout]
    layouts = [own for name, (size, own) in LAYOUTS.items() if size == world and name in RUN]
    return launched("dynamic_engine.py", *layouts, ranks=world, timeout_s=280).check(f"{parallel} {check}")


@pytest.mark.parametrize("layout", RUN)
@pytest.mark.parametrize("check", [DENSE, PIKV, LATENT])
def test_engine(check: str, layout: str):
    rows_of(layout, check)


@pytest.mark.parametrize("layout", RUN)
def test_prompts_are_chunked_and_ranks_idle(layout: str):
    """The checks above mean something only if this happened in them."""
    ways = [row["how"] for row in rows_of(layout, PIKV)]
    assert max(chunked for _, _, chunked in ways) >= 3, ways
    assert max(idle for _, idle, _ in ways) >= (3 if layout.endswith("EP2") else 0), ways
