"""Moves by themselves, moves that are refused, moves that can't be: on simulated ranks, and by the block."""

import warnings
from unittest.mock import patch

import pytest
import torch

from pikv_ds.blueprint.blueprint import Blueprint
from pikv_ds.cache import cache as cache_module
from pikv_ds.cache.inspect import CacheProbe
from pikv_ds.cache.stats import stats
from pikv_ds.config import PiKVConfig
from pikv_ds.errors import ConfigError, MigrationError, UnsupportedError
from pikv_ds.migration import transaction
from pikv_ds.pages import shard_copy
from tests.recorded import host_core

from .moving import SHARDS, Trial, contents, outcome, run_ranks_or_raise
from .simulated import Network, Seat, SimulatedExchange, run_ranks

SWAPPED = ((1,), (0,), (1,), (0,), (0,), (1,), (0,), (1,))
HOME = tuple((shard * 2 // SHARDS,) for shard in range(SHARDS))


def trial(**options) -> tuple[Trial, Network, dict]:
    one = Trial(**{"world": 2, "block": 0, "requests": "distinct", "ahead": None, "holders": SWAPPED, "seed": 3} | options)
    return one, *one.prepared()


def everything(one: Trial) -> dict:
    return {key: value for cache in one.caches.values() for key, value in contents(cache).items()}


def failing(what: str, times_on: dict[int, BaseException]):
    """`what` of the transaction raises on the ranks named, as if they had no memory."""
    real = getattr(transaction, what)

    def raising(pages, *args):
        if pages.map.rank in times_on:
            raise times_on[pages.map.rank]
        return real(pages, *args)

    return patch(f"pikv_ds.migration.migration.{what}", raising)


@pytest.mark.parametrize("what", ["leaving", "arrived", "prepare"])
def test_a_rank_without_memory_leaves_every_shard_where_it_is(what):
    one, network, before = trial()
    with failing(what, {1: MemoryError("none left")}):
        ended = one.move(network, None)
    assert all(isinstance(how, MigrationError) for how in ended), ended
    assert "every shard stays where it was" in str(ended[0])
    assert everything(one) == before and all(cache.map.holders == HOME for cache in one.caches.values())
    assert all(cache.migration.progress.rolled_back == 1 for cache in one.caches.values())
    assert one.move(network, None) == [None, None] and everything(one) == before  # and the next one goes


def test_what_comes_damaged_is_found_and_given_back():
    one, network, before = trial()
    real = transaction.copy_in

    def damaged(pool, copy):
        ids = real(pool, copy)
        if len(ids):
            pool.pages[int(ids[0]), 5] ^= 1
        return ids

    with patch("pikv_ds.migration.transaction.copy_in", damaged):
        ended = one.move(network, None)
    assert all(isinstance(how, MigrationError) and "checksums differ" in str(how) for how in ended), ended
    assert everything(one) == before
    run_ranks_or_raise(network, lambda rank: one.hosts[rank].decode(3))


@pytest.mark.parametrize("where", ["commit", "_vote"])
def test_a_rank_that_is_interrupted_after_the_vote_is_in_doubt_and_says_so(where):
    one, network, before = trial()
    migration = one.caches[0].migration
    real = migration._vote

    def interrupted(*args):
        if where == "_vote":
            real(*args)
        raise KeyboardInterrupt

    broken = patch.object(migration, "_vote", interrupted)
    if where == "commit":
        broken = patch("pikv_ds.pages.layers.install", _interrupt_on(one.caches[0], 2))
    with broken:
        ended = one.move(network, None)
    assert isinstance(ended[0], KeyboardInterrupt) and ended[1] is None and migration.in_doubt is not None
    with pytest.raises(MigrationError, match="broke off in its vote"):
        one.hosts[0].decode(1)
    migration.resolve(committed=one.caches[1].map.holders == SWAPPED)
    assert everything(one) == before and outcome(one, [None, None], before) == "committed"


def _interrupt_on(cache, nth: int):
    """Ctrl-C when a rank takes over its nth table."""
    real, seen = shard_copy.install, []

    def install(pool, *args):
        if any(pool is one.pool for one in CacheProbe(cache).all_pools):
            seen.append(pool)
            if len(seen) == nth:
                raise KeyboardInterrupt
        real(pool, *args)

    return install


def test_a_move_that_is_cancelled_changes_nothing():
    one, network, _ = trial()
    plain, other, _ = trial()

    def moving(rank: int) -> None:
        one.caches[rank].rebalance(SWAPPED, bytes_per_step=1500)
        one.hosts[rank].decode(2)
        assert one.caches[rank].migration.nbytes > 0
        one.caches[rank].cancel_rebalance()
        one.hosts[rank].decode(2)

    run_ranks_or_raise(network, moving)
    run_ranks_or_raise(other, lambda rank: plain.hosts[rank].decode(4))
    assert everything(one) == everything(plain)
    said = stats(one.caches[0], 1, 1)
    assert said["rebalance_cancelled"] == 1 and said["rebalance_committed"] == said["rebalance_bytes_held"] == 0


def test_all_ranks_refuse_alike():
    one, network, before = trial()
    other = (*SWAPPED[:4], *reversed(SWAPPED[4:]))
    said = run_ranks(network, lambda rank: one.caches[rank].rebalance(SWAPPED if rank else other))
    assert all(isinstance(how, ConfigError) and "give all ranks the same" in str(how) for how in said), said
    uneven = ((0,),) * 5 + ((1,),) * 3
    said = run_ranks(network, lambda rank: one.caches[rank].rebalance(uneven))
    assert all(isinstance(how, ConfigError) and "every rank of 2 holds as many shards" in str(how) for how in said), said

    def announced(rank: int) -> None:
        if rank:
            one.caches[rank].hold_margin = 0
        one.caches[rank].rebalance(SWAPPED)

    said = run_ranks(network, announced)
    assert all(isinstance(how, UnsupportedError) and "may still be taken back" in str(how) for how in said), said
    assert everything(one) == before and not network.gone


def block_of(ranks: int, **rebalance) -> PiKVConfig:
    storage = {"requests": "distinct", "num_shards": SHARDS, "capacity_tokens": 4096, "rebalance": rebalance}
    return PiKVConfig(page_size=4, storage=storage)


def skewed(rank: int, seat: Seat, config: PiKVConfig) -> tuple:
    """A cache whose entries name two experts in three alone."""
    cache = cache_module.PiKVCache(
        [host_core.spec(0, "full")], config, num_experts=8, dtype=torch.float32, device=torch.device("cpu"), group=seat
    )
    host = host_core.Run(cache, config, seat)
    draw = host._draw

    def skew(layer, columns):
        q, k, v, ids = draw(layer, columns)
        return q, k, v, torch.where(ids < 6, ids % 2, ids)

    host._draw = skew
    return cache, host


@pytest.mark.parametrize("bytes_per_step", [2000, None])
def test_the_block_moves_shards_when_a_rank_is_too_full(bytes_per_step):
    config, plain = block_of(2, every=3, threshold=1.1, bytes_per_step=bytes_per_step), block_of(2, every=1000)
    outputs = {}
    for name, each in (("moving", config), ("plain", plain)):
        network, made = Network(2), {}
        with patch.object(cache_module, "Exchange", SimulatedExchange):

            def run(rank: int, network=network, each=each, made=made) -> None:
                made[rank] = cache, host = skewed(rank, Seat(network, rank), each)
                host.prefill([60, 50])
                host.decode(24)

            run_ranks_or_raise(network, run)
        outputs[name] = [made[rank][1].outputs for rank in range(2)]
        loads = [stats(cache, 1, 1)["load_per_rank"] for cache, _ in made.values()]
        assert loads[0] == loads[1]
        outputs[name + " peak"] = max(loads[0]) / (sum(loads[0]) / 2)
    cache = made[0][0]
    assert "rebalance_committed" in stats(cache, 1, 1)
    assert outputs["plain peak"] > 1.3 > 1.1 > outputs["moving peak"] - 0.05, outputs
    for own, other in zip(outputs["moving"], outputs["plain"], strict=True):
        assert max(float((a - b).abs().nan_to_num().max()) for a, b in zip(own, other, strict=True)) <= 1e-5


def test_a_move_by_the_block_that_fails_warns_once_and_goes_on():
    config = block_of(2, every=2, threshold=1.1, bytes_per_step=None)
    network, made = Network(2), {}
    with patch.object(cache_module, "Exchange", SimulatedExchange), failing("leaving", {0: MemoryError()}):

        def run(rank: int) -> None:
            made[rank] = cache, host = skewed(rank, Seat(network, rank), config)
            host.prefill([60, 50])
            host.decode(9)

        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            run_ranks_or_raise(network, run)
    assert len([one for one in said if "pikv.storage.rebalance" in str(one.message)]) == 2  # once per rank
    assert all(cache.migration.progress.rolled_back >= 3 and cache.map.holders == HOME for cache, _ in made.values())


def test_rebalance_with_one_shard_per_rank_is_refused_by_name():
    config = PiKVConfig(storage={"rebalance": {}})
    with pytest.raises(ConfigError) as refused:
        Blueprint.of(config, [host_core.spec(0, "full")], torch.float32, ranks=2, num_experts=8)
    assert refused.value.rule == "rebalance-has-shards-to-move"
