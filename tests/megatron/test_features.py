"""Windows, softmax offsets, masks, routing variants, and what is refused by name; on two expert-parallel ranks."""

import pytest
import torch

from pikv_ds.megatron_patch.refusals import HEADS_WAIT
from pikv_ds.megatron_patch.router import routed_experts
from tests.megatron.launched import launched
from tests.megatron.marks import on_cpu

SETTINGS = [
    "sliding window",
    "sliding window in every other layer",
    "learnable softmax offset",
    "softmax off by one",
    "dropped tokens",
    "dropped tokens, padded to capacity",
    "router in chunks",
    "allgather dispatcher",
    "dense first layer",
    "attention scale",
    "sigmoid router with expert bias",
]


@pytest.mark.dist
@pytest.mark.timeout(240)
@on_cpu
@pytest.mark.parametrize(
    "check",
    [
        *(f"{name}, ids previous_layer" for name in SETTINGS),
        *(f"{name}, ids true" for name in ("sliding window", "dropped tokens", "router in chunks", "dense first layer")),
        *(f"entries are at their experts, ids {source}, {chunks} chunks" for source in ("true", "previous_layer") for chunks in (1, 3)),
        *(f"padding, {which}" for which in ("ids previous_layer", "ids true", "the same requests")),
        "masks refused",
        "penalty of strength 0 changes nothing",
        "load penalty evens out the shards",
        "miss penalty keeps tokens from an expert",
        *(f"weights of a chosen set are the model's own, {name}" for name in ("softmax", "softmax before the choice", "scaled", "sigmoid")),
        "the documented penalty",
        "the penalty of the block",
        "dense models refused",
        "penalty without a context, in a specification, refused",
        pytest.param(
            "heads of multi-token prediction",
            marks=pytest.mark.skipif(not HEADS_WAIT, reason="megatron-core 0.16 can't decode with them: the host can't decode with it"),
        ),
        "settings refused by name",
        "versions refused",
        "specifications refused",
        "process groups and shards refused",
        "calls refused",
        "the host can't build it",
        "the host can't decode with it",
        "a window that looks ahead is no longer the model when tokens come one by one",
    ],
)
def test_features(check: str):
    launched("features.py", "1,2,1").check(check)


def test_primary_expert_of_a_routing():
    probs = torch.tensor([[0.0, 0.3, 0.7, 0.0], [0.5, 0.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    routing_map = probs > 0
    routing_map[3, 1] = True  # padded to capacity: named by the map, but the token was not routed there
    assert routed_experts(probs, routing_map).tolist() == [2, 0, -1, -1]
