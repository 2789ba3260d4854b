"""What every registered placement rule keeps."""

import inspect

import pytest
import torch

from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.placement.placement import Placement
from pikv_ds.placement.rules import PLACEMENTS
from pikv_ds.placement.rules.base import PlacementRule
from tests.harness.driver import Driver, layer, ragged

pytestmark = pytest.mark.parametrize("name", PLACEMENTS.names())
TABLE = [[[e % 4] for e in range(8)]]


def options(name: str) -> dict:
    return {"table": TABLE} if name == "table" else {"n_tok": 4} if name == "xor" else {}


def test_is_described(name):
    cls = PLACEMENTS.get(name)
    assert issubclass(cls, PlacementRule) and cls.name == name and "shard = " in inspect.getdoc(cls)
    assert PiKVConfig(storage={"placement": name, "num_shards": 4} | options(name)).storage.placement == name


@pytest.mark.parametrize("num_shards", [4, 8], ids="S{}".format)
def test_shards_exist_and_follow_from_expert_and_position_alone(name, num_shards):
    placement = Placement(name, 8, num_shards, **options(name))
    experts, positions = torch.arange(8).repeat_interleave(500), torch.arange(500).repeat(8)
    shards = placement.shard_of(0, experts, positions)
    assert shards.dtype == torch.int64 and 0 <= int(shards.min()) and int(shards.max()) < num_shards
    order = torch.randperm(4000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(placement.shard_of(0, experts[order], positions[order]), shards[order])
    rule = PLACEMENTS.get(name)
    if not rule.reads_experts:
        assert torch.equal(placement.shard_of(0, experts.flip(0), positions), shards)
    if rule.alike_in_layers:
        assert torch.equal(placement.shard_of(1, experts, positions), shards)
    assert len(shards.unique()) == min(num_shards, 4 if name == "table" else num_shards), "some shard gets nothing"


def test_attention_is_the_dense_one(name):
    driver = Driver([layer(0), layer(1, window=20)], num_shards=4, placement=name, **options(name))
    driver.prefill([30, 17])
    driver.forward(ragged([3, 5]))
    for _ in range(5):
        driver.decode()
