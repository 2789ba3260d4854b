"""The model with PiKV in it is the host's model: training, checkpoint keys, round trip; and rows that move or wait."""

import pytest

from tests.megatron.launched import launched
from tests.megatron.marks import on_cpu

pytestmark = [pytest.mark.dist, pytest.mark.timeout(240), on_cpu]


@pytest.mark.parametrize("world", [1, 2], ids=["world1", "EP2"])
@pytest.mark.parametrize(
    "check",
    [
        "enable and disable leave the model as it was",
        "a model built from a layer spec",
        "a model built from a block spec",
        "training is undisturbed, also after decoding",
        "optimizer steps under DDP with the distributed optimizer",
        "tokens taken back and rows swapped, ids previous_layer",
        "tokens taken back and rows swapped, ids true",
        "a rank that is done keeps step under idle()",
        "a context made and run in any of torch's modes; a backward is refused",
    ],
)
def test_guest(check: str, world: int):
    launched("guest.py", f"1,{world},1", ranks=world).check(check)
