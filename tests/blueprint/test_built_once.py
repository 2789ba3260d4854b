"""Every method is built once when a configuration is read, and once for each cache: what it reads from files is read as often."""

import functools
from collections import Counter

import pytest
import safetensors
import torch

from pikv_ds.cache.cache import PiKVCache
from pikv_ds.cache.inspect import CacheProbe
from pikv_ds.codecs import CODECS
from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.policies import POLICIES
from pikv_ds.routers import ROUTERS
from tests.harness.driver import layer
from tests.routing_blocks import routing

LAYERS = [layer(0, dim=16), layer(1, dim=16, window=24)]
BLOCKS = {
    "light codec": ({"method": "adaptive", "raw_recent_tokens": 8}, "adaptive", "lru"),
    "keys and values": ({"method": "none", "k": {"method": "fp8_e4m3", "rotate": "hadamard"}}, "fp8_e4m3", "knorm"),
    "one layer": ({"method": "none", "layers": {"1": {"method": "int8"}}, "raw_sink_tokens": 4}, "int8", "snapkv"),
    "requests": ({"method": "svd", "rank": 8}, "svd", "tova"),
}


def make(config: PiKVConfig) -> PiKVCache:
    return PiKVCache(LAYERS, config, num_experts=8, dtype=torch.float32, device=torch.device("cpu"))


@pytest.fixture
def built(monkeypatch):
    """How often each of the named classes is constructed."""
    counts = Counter()

    def count(cls: type) -> None:
        construct = cls.__init__

        @functools.wraps(construct)
        def counting(self, *args, **kwargs) -> None:
            counts[cls.name] += type(self) is cls
            construct(self, *args, **kwargs)

        monkeypatch.setattr(cls, "__init__", counting)

    counts.watch = count
    return counts


@pytest.mark.parametrize("case", BLOCKS)
def test_methods(case, built):
    compression, codec, policy = BLOCKS[case]
    for cls in (CODECS.get(codec), POLICIES.get(policy), ROUTERS.get("all")):
        built.watch(cls)
    config = PiKVConfig(compression=compression, scheduling={"method": policy, "budget_ratio": 0.5})
    names = [codec, policy, "all"]
    assert built == dict.fromkeys(names, 1), "reading a configuration"
    make(config)
    assert built == dict.fromkeys(names, 2), "one cache"
    make(config)
    assert built == dict.fromkeys(names, 3), "each cache has methods of its own"


def test_the_file_of_a_gate_is_read_as_often(monkeypatch, tmp_path):
    block = routing("learned", tmp_path, layers=len(LAYERS), shards=1, query_width=4 * 16)
    reads, open_file = Counter(), safetensors.safe_open

    def counting(path, *args, **kwargs):
        reads[str(path)] += 1
        return open_file(path, *args, **kwargs)

    monkeypatch.setattr(safetensors, "safe_open", counting)
    config = PiKVConfig(routing=block)
    assert reads == {block["path"]: 1}
    make(config)
    assert reads == {block["path"]: 2}


def test_what_is_kept_per_page_is_known_before_there_are_pages():
    """Of the policy and of the light codec's window, in layers with full attention."""
    config = PiKVConfig(compression={"method": "adaptive"}, scheduling={"method": "lru", "budget_ratio": 0.5})
    cache = make(config)
    assert [sorted(plan.columns) for plan in cache.blueprint.pages.layers] == [["mass", "used"], []]
    assert [sorted(pool.columns) for pool in CacheProbe(cache).all_pools] == [["mass", "used"], ["mass", "used"], []]
