"""Dynamic batching: DynamicInferenceContext driven step by step, Megatron's own with a reference flash_decode beside it."""

import pytest

from tests.megatron.launched import launched
from tests.megatron.marks import on_cpu

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300), on_cpu]
LAYOUTS = {"EP2": "1,2,1", "TP2xEP2-peers": "2,2,1"}  # tp,ep,etp on two ranks
REQUESTS, SHARED, EVICTIONS = "20 requests of 1 to 300 tokens", "a KV head that peers share", "evicted requests that start again"
LATENT = "MLA, chunked prefill"


def rows_of(layout: str, check: str) -> list[dict]:
    return launched("dynamic.py", *LAYOUTS.values(), timeout_s=280).check(f"{LAYOUTS[layout]} {check}")


@pytest.mark.parametrize(
    "check",
    [
        REQUESTS,
        "every request as if it were alone",
        "ids true",
        "ids lookahead",
        "sliding window, ids true, chunked prefill",
        "MLA with YaRN, ids true",
        "a forward without a context is the host's own unless serving",
        "the documented lines",
        "refusals",
        "tokens that were never run",
    ],
)
def test_expert_parallel(check: str):
    rows_of("EP2", check)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("check", ["chunked prefill", SHARED, EVICTIONS, LATENT])
def test_also_with_tensor_parallel_peers(check: str, layout: str):
    rows_of(layout, check)


def test_requests_wait_pause_and_are_evicted_and_ranks_idle():
    """The checks above mean something only if this happened in them."""
    logs = [row["log"] for row in rows_of("EP2", REQUESTS)]
    assert all(log["paused"] > 0 for log in logs) and max(log["idle"] for log in logs) > 10, logs
    assert any(row["log"]["evicted"] > 0 for row in rows_of("EP2", EVICTIONS))


def test_a_head_that_peers_share_is_stored_once():
    assert {row["stats"]["requests"] for row in rows_of("TP2xEP2-peers", SHARED)} == {"replicated"}
