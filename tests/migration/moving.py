"""A cache on simulated ranks whose shards move while ranks die or messages are lost, and what must hold of the ranks that are left."""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass, field
from unittest.mock import patch

import torch

from pikv_ds.cache import PiKVCache
from pikv_ds.cache import cache as cache_module
from pikv_ds.cache.inspect import CacheProbe, PoolProbe
from pikv_ds.config import PiKVConfig
from pikv_ds.errors import MigrationError, PeerError
from pikv_ds.exchange.digest import digest
from tests.harness.invariants import check_pages
from tests.recorded import host_core

from .simulated import Fault, Killed, Network, Seat, SimulatedExchange, run_ranks

SHARDS = 8
BLOCKS = (
    {},
    {"compression": {"method": "int8", "group": 32}, "page_size": 32},
    {"compression": {"method": "int4", "group": 32, "raw_sink_tokens": 2, "raw_recent_tokens": 16}, "page_size": 32},
    {"scheduling": {"method": "h2o", "budget_tokens": 40, "sink_tokens": 2, "recent_tokens": 6}},
    {"routing": {"method": "bounds", "budget_pages": 12, "sink_tokens": 2, "recent_tokens": 4}},
)


@dataclass(kw_only=True)
class Trial:
    """One move of a cache of `world` ranks. ahead: bytes_per_step, None = at once."""

    world: int
    block: int
    requests: str
    ahead: int | None
    holders: tuple[tuple[int, ...], ...]
    seed: int
    caches: dict[int, PiKVCache] = field(default_factory=dict, repr=False)
    hosts: dict[int, host_core.Run] = field(default_factory=dict, repr=False)
    seen: dict[int, dict] = field(default_factory=dict, repr=False)
    """What every rank held when the move last went on."""

    @classmethod
    def drawn(cls, seed: int) -> Trial:
        draw = random.Random(seed)
        world = draw.choice((2, 2, 4))
        homes = [rank for rank in range(world) for _ in range(SHARDS // world)]
        while homes == sorted(homes):
            draw.shuffle(homes)
        return cls(
            world=world, block=draw.randrange(len(BLOCKS)), requests=draw.choice(("replicated", "distinct")),
            ahead=draw.choice((None, 1500, 6000)), holders=tuple((rank,) for rank in homes), seed=seed,
        )  # fmt: skip

    def prepared(self) -> tuple[Network, dict]:
        """Ranks that hold requests, and what every shard holds."""
        network = Network(self.world)
        with patch.object(cache_module, "Exchange", SimulatedExchange):
            run_ranks_or_raise(network, lambda rank: self._begin(network, rank))
        before: dict = {}
        for cache in self.caches.values():
            before |= contents(cache)
        return network, before

    def _begin(self, network: Network, rank: int) -> None:
        block = {"page_size": 4} | BLOCKS[self.block] | {"storage": {"requests": self.requests, "num_shards": SHARDS}}
        config = PiKVConfig(**block)
        layers = [host_core.spec(0, "full"), host_core.spec(1, "window")]
        seat = Seat(network, rank)
        cache = PiKVCache(
            layers, config, num_experts=host_core.EXPERTS, dtype=torch.float32, device=torch.device("cpu"), group=seat
        )  # fmt: skip
        self.caches[rank] = cache
        advance = cache.migration.advance

        def noted() -> bool:
            self.seen[rank] = contents(cache)
            return advance()

        cache.migration.advance = noted
        draw = random.Random(self.seed + 1)
        host = host_core.Run(cache, config, seat)
        host.prefill([draw.randrange(20, 90) for _ in range(self.world)])
        host.decode(2)
        self.hosts[rank] = host

    def move(self, network: Network, fault: Fault | None) -> list:
        """What every rank ended with: None when it has moved."""
        network.arm(fault)
        return run_ranks(network, self._move)

    def _move(self, rank: int) -> str | None:
        """Beside forwards when pages go ahead: these go on until the move has ended."""
        cache = self.caches[rank]
        cache.rebalance(self.holders, bytes_per_step=self.ahead)
        for _ in range(200):
            if cache.migration.wanted is None:
                return None
            self.hosts[rank].decode(1)
        raise AssertionError("the move does not end")


def run_ranks_or_raise(network: Network, work) -> None:
    for ended in run_ranks(network, work):
        if isinstance(ended, BaseException):
            raise ended


def contents(cache: PiKVCache, *, numbers: bool = True) -> dict:
    """By (layer, level, shard, head, row) of this rank's shards: positions, and a digest of keys, values and, with `numbers`, of what is
    kept per page. A table without entries has no digest."""
    probe, found = CacheProbe(cache), {}
    for layer in range(probe.num_layers):
        for level, pool in enumerate(probe.pools(layer)):
            for row, counts in enumerate(pool.counts.tolist()):
                for table, count in enumerate(counts):
                    key = layer, level, probe.local_shards[table // pool.heads], table % pool.heads, row
                    found[key] = _stored(pool, row, table, numbers) if count else ([], 0)
    return found


def _stored(pool: PoolProbe, row: int, table: int, numbers: bool) -> tuple[list[int], int]:
    stored = pool.stored(row, table)
    kept = [pool.kept(name, row, table) for name in pool.columns] if numbers else []
    return stored.positions.tolist(), digest([stored.keys.contiguous(), stored.values.contiguous(), *kept])


def outcome(trial: Trial, ended: list, before: dict, in_a_forward: Collection[int] = ()) -> str:
    """ "committed" or "rolled back", the same on all ranks that are left. before: of every shard. in_a_forward: ranks that a forward has
    broken off on since.

    Ranks in doubt ask the others, as the survivors of a group do. Raises: AssertionError for a mixed state, a lost or changed entry.
    """
    for of_rank in trial.seen.values():
        before = before | of_rank
    left = [rank for rank, how in enumerate(ended) if not isinstance(how, Killed)]
    for rank in left:
        how = ended[rank]
        if how is not None and not isinstance(how, (PeerError, MigrationError)):
            raise AssertionError(f"rank {rank} ended with {how!r}") from how
    committed = [trial.caches[rank].map.holders == trial.holders for rank in left]
    for rank in left:
        migration = trial.caches[rank].migration
        if migration.in_doubt is not None:
            migration.resolve(committed=any(committed))
        migration.cancel()  # one that waits for a forward that never ends
    maps = {trial.caches[rank].map.holders for rank in left}
    assert len(maps) == 1, f"a mixed state: {maps}"
    for rank in left:
        cache = trial.caches[rank]
        assert all(one is cache.map for one in CacheProbe(cache).shard_maps)
        assert cache.migration.wanted is None and cache.migration.in_doubt is None
        for pool in CacheProbe(cache).all_pools:
            check_pages(pool, shrunk=rank not in in_a_forward)
        own = contents(cache)
        assert {key[2] for key in own} == set(cache.map.local)
        if rank not in in_a_forward:
            assert all(before[key] == value for key, value in own.items()), f"rank {rank}: entries have changed"
    return "committed" if maps == {trial.holders} else "rolled back"
