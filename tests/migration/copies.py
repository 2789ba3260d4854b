"""Runs on simulated ranks in which some shards have copies on further ranks, beside the same runs without copies."""

from __future__ import annotations

from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from pikv_ds.cache import PiKVCache
from pikv_ds.cache import cache as cache_module
from pikv_ds.cache.inspect import CacheProbe
from pikv_ds.cache.stats import stats
from pikv_ds.config import PiKVConfig
from tests.harness.invariants import check_pages
from tests.recorded import host_core

from .moving import contents
from .simulated import Network, Seat, SimulatedExchange, run_ranks

Holders = tuple[tuple[int, ...], ...]


class Ran(NamedTuple):
    """By rank."""

    outputs: list[list[Tensor]]
    caches: list[PiKVCache]
    bytes_sent: list[int]
    """By decode steps at the end of the script."""


class Copying(host_core.Run):
    """copied=False: shards stay where they are."""

    copied = True

    def hold_at(self, holders: Holders) -> None:
        if self.copied:
            self.cache.rebalance(holders)
            assert self.cache.map.holders == holders

    def ahead(self, holders: Holders) -> None:
        if self.copied:
            self.cache.rebalance(holders, bytes_per_step=2000)

    def arrived(self, holders: Holders) -> None:
        if self.copied:
            assert self.cache.map.holders == holders and self.cache.migration.wanted is None

    def counted(self, times: int) -> None:
        """The bytes that leave this rank in so many decode steps."""
        before = self.cache.exchange.bytes_sent
        self.decode(times)
        self.bytes_sent = self.cache.exchange.bytes_sent - before


def run(block: dict, script: list, *, world: int, shards: int, requests: str, copied: bool, layers=("full", "window")) -> Ran:
    """Raises: what a rank raises."""
    network, made = Network(world), {}
    config = PiKVConfig(**{"page_size": 4} | block | {"storage": {"requests": requests, "num_shards": shards, **block.get("storage", {})}})

    def play(rank: int) -> None:
        seat = Seat(network, rank)
        specs = [host_core.spec(i, kind) for i, kind in enumerate(layers)]
        cache = PiKVCache(
            specs, config, num_experts=host_core.EXPERTS, dtype=torch.float32, device=torch.device("cpu"), group=seat
        )  # fmt: skip
        made[rank] = Copying(cache, config, seat)
        made[rank].copied = copied
        made[rank].bytes_sent = 0
        for what, argument in script:
            getattr(made[rank], what)(argument)

    with patch.object(cache_module, "Exchange", SimulatedExchange):
        for ended in run_ranks(network, play):
            if isinstance(ended, BaseException):
                raise ended
    played = [made[rank] for rank in range(world)]
    return Ran([one.outputs for one in played], [one.cache for one in played], [one.bytes_sent for one in played])


def check_copies(ran: Ran, plain: Ran) -> None:
    """Every holder of a shard has of it, byte for byte, what its rank has without copies; numbers of entries add up."""
    wanted: dict = {}
    for cache in plain.caches:
        wanted |= contents(cache)
    for cache in ran.caches:
        own = contents(cache)
        assert {key[2] for key in own} == set(cache.map.local)
        assert {key: value for key, value in own.items() if wanted[key] != value} == {}
        for pool in CacheProbe(cache).all_pools:
            check_pages(pool)
    said = [stats(cache, 1, 1) for cache in ran.caches]
    names = ("appended", "forked", "copied", "live", "expired", "evicted", "cropped")
    appended, forked, copied, *rest = (sum(one.get(f"entries_{name}", 0) for one in said) for name in names)
    assert appended + forked + copied == sum(rest), (appended, forked, copied, rest)
    assert all(one["load_per_rank"] == said[0]["load_per_rank"] for one in said)


def worst(ran: Ran, plain: Ran) -> float:
    """The largest difference of outputs."""
    pairs = [(a, b) for own, other in zip(ran.outputs, plain.outputs, strict=True) for a, b in zip(own, other, strict=True)]
    assert pairs
    return max(float((a.nan_to_num() - b.nan_to_num()).abs().max()) for a, b in pairs)
