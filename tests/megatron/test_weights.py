"""Hugging Face weights in Megatron-Core and back; the bundled model gives the same logits in both."""

import pytest

from tests.megatron.launched import launched
from tests.megatron.marks import on_cpu

pytestmark = [pytest.mark.dist, pytest.mark.timeout(240), on_cpu]
LAYOUTS = {"EP2": "1,2,1", "TP2xEP2-peers": "2,2,1", "TP2xETP2": "2,1,2"}  # tp,ep,etp on two ranks
MODELS = ["qwen3_moe, dense first layer", "qwen3_moe, unnormalised", "mixtral, window 8", "mixtral, one KV head", "bundled"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "check",
    [
        *(f"{model} {what}" for model in MODELS for what in ("same logits", "the way back")),
        "the documented lines",
        "bundled finds a pass key over PiKV",
        "refusals",
    ],
)
def test_weights(check: str, layout: str):
    launched("weights.py", *LAYOUTS.values()).check(f"{LAYOUTS[layout]} {check}")
