"""Exactness under Megatron-Core's layouts: world sizes 1, 2 and 4 on gloo, every check of a launch its own test."""

import pytest

from tests.long_form import LONG
from tests.megatron.launched import launched
from tests.megatron.marks import on_cpu

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300), on_cpu]

LAYOUTS = {  # name: world, "tp,ep,etp"
    "world1": (1, "1,1,1"),
    "EP2": (2, "1,2,1"),
    "TP2": (2, "2,1,1"),
    "TP2xEP2-peers": (2, "2,2,1"),  # the expert group is the tensor-parallel peers
    "EP4": (4, "1,4,1"),
    "EP2xDP2": (4, "1,2,1"),
    "TP2xEP2xDP2-peers": (4, "2,2,1"),
    "TP4xEP4-peers": (4, "4,4,1"),
    "TP2xEP2-across": (4, "2,2,2"),  # the expert group joins equal tensor-parallel ranks
}
if not LONG:
    del LAYOUTS["EP2xDP2"]  # ranks of other expert groups are also in TP2xEP2xDP2-peers
CHECKS = ["static decoding equals the full forward", "each rank its own requests", "the same requests on all ranks"]
LATENT = ["MLA, each rank its own requests", "MLA, the same requests on all ranks"]
SOURCES = [
    "int8 pages",
    "linear codec, full rank",
    "linear codec, other weights",
    "MLA, ids true",
    "MLA, compressed pages",
    "ids true",
    "ids hash",
    "ids lookahead",
    "ids true, the same requests",
    "ids lookahead, the same requests",
]
SHARED = [f"KV heads that peers share, ids {source}" for source in ("previous_layer", "true")]


def rows_of(layout: str, check: str) -> list[dict]:
    """One launch per world size runs all its layouts."""
    world, parallel = LAYOUTS[layout]
    layouts = [own for size, own in LAYOUTS.values() if size == world]
    return launched("decode.py", *layouts, ranks=world, timeout_s=280).check(f"{parallel} {check}")


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "TP4xEP4-peers"])
@pytest.mark.parametrize("check", CHECKS)
def test_decode(layout: str, check: str):
    rows_of(layout, check)


@pytest.mark.parametrize("layout", [name for name, (world, _) in LAYOUTS.items() if world < 4])
@pytest.mark.parametrize("check", SOURCES + LATENT)
def test_sources_of_expert_ids_and_latents(layout: str, check: str):
    rows_of(layout, check)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "TP2" == name or "peers" in name])
@pytest.mark.parametrize("check", [*SHARED, LATENT[1]])
def test_heads_that_tensor_parallel_peers_share(layout: str, check: str):
    rows_of(layout, check)


def mode(layout: str, check: str) -> set[str]:
    return {row["stats"]["requests"] for row in rows_of(layout, check)}


def test_requests_are_recognised():
    assert mode("EP2", "each rank its own requests") == {"distinct"}
    assert mode("EP2", "the same requests on all ranks") == {"replicated"}
    assert mode("TP2xEP2-across", "the same requests on all ranks") == {"replicated"}
    # Tensor-parallel peers hold different heads of the same tokens.
    assert mode("TP2xEP2-peers", "the same requests on all ranks") == {"distinct"}
    assert mode("TP2", "the same requests on all ranks") == {"local"}
    # Where peers hold the same latent or KV heads and nobody else is in the group, entries are stored once for all of them.
    for check in ("MLA, the same requests on all ranks", *SHARED):
        assert mode("TP2xEP2-peers", check) == mode("TP4xEP4-peers", check) == {"replicated"}
        assert mode("TP2xEP2xDP2-peers", check) == {"replicated"}
    assert [row["heads"] for row in rows_of("TP4xEP4-peers", SHARED[0])] == [2] * 4


@pytest.mark.parametrize("layout", ["EP2", "EP4"])
def test_replicated_requests_are_stored_once(layout: str):
    rows = rows_of(layout, "the same requests on all ranks")
    dense = rows[0]["stats"]["kv_bytes_dense"]
    fullest = max(row["stats"]["kv_bytes_allocated"] for row in rows)
    assert fullest < dense * {2: 0.85, 4: 0.55}[len(rows)], (fullest, dense)
