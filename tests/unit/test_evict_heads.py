"""Budgets per KV head: every head keeps its own entries, attention is that of each head over what it kept, memory follows."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pikv_ds.cache.cache import PiKVCache
from pikv_ds.cache.inspect import CacheProbe
from pikv_ds.cache.stats import stats
from pikv_ds.errors import ConfigError
from tests.unit.driver import Driver, dense_over, layer, ragged, rel_error
from tests.unit.invariants import check_pages, check_unshared, poison

pytestmark = pytest.mark.usefixtures("nan_filled_empty")
SMALL = {"sink_tokens": 2, "recent_tokens": 3}
HEADS, BUDGET = 2, 22


class HeadDriver(Driver):
    """Compares with attention of each head over the entries that its tables held before the forward, and the forward's own."""

    def held(self, i: int, row: int, head: int) -> list[int]:
        """Positions that this head has in any shard."""
        pool = self.probe.near_pool(i)
        return [p for table in range(head, pool.num_tables, HEADS) for p in pool.positions(row, table)]

    def forward(self, mask: Tensor) -> list:
        if self.fresh:
            self.before = {}
        else:
            rows = self.parent if self.touched else range(len(self.lens))
            self.before = {
                (i, r, h): self.held(i, old, h) for i in range(len(self.layers)) for r, old in enumerate(rows) for h in range(HEADS)
            }
        outputs = super().forward(mask)
        self.check()
        return outputs

    def _compare(self, i: int, q: Tensor, positions: Tensor, out: Tensor, lse: Tensor) -> None:
        for row, column in (positions >= 0).nonzero().tolist():
            at, first = int(positions[row, column]), int(positions[row][positions[row] >= 0][0])
            for head in range(HEADS):
                kept = [*self.before.get((i, row, head), []), *range(first, at + 1)]
                entries = [(k[head : head + 1], v[head : head + 1]) for k, v in (self.history[i][row][p] for p in kept)]
                query = slice(head * q.shape[2] // HEADS, (head + 1) * q.shape[2] // HEADS)
                want_out, want_lse, _ = dense_over(q[row, column, query], entries, self._scale(q))
                assert rel_error(out[row, column, query], want_out) <= self.tolerance, (i, row, at, head)
                assert rel_error(lse[row, column, query], want_lse) <= self.tolerance, (i, row, at, head)

    def check(self) -> None:
        evicted_by_head, loads = self.probe.evicted, self.probe.loads
        for i, pool in enumerate(self.probe.all_pools):
            check_pages(pool)
            check_unshared(pool)
            for row, length in enumerate(self.lens):
                for table in range(pool.num_tables):
                    positions, k, v = pool.entries(row, table)
                    assert positions.tolist() == sorted(set(positions.tolist()))
                    entries, head = [self.history[i][row][p] for p in positions.tolist()], table % HEADS
                    if entries:
                        assert torch.equal(k[:, 0], torch.stack([e[0][head] for e in entries]))
                        assert torch.equal(v[:, 0], torch.stack([e[1][head] for e in entries]))
                for head, evicted in enumerate(evicted_by_head[i][row]):
                    assert len(self.held(i, row, head)) + evicted == length, f"layer {i}, row {row}, head {head}: not live + evicted"
            if self.cache.num_shards > 1:
                assert loads[i].tolist() == pool.counts.sum(0).view(-1, HEADS).sum(1).tolist()
        numbers = stats(self.cache, 1, 1)
        live, evicted, cropped, appended, forked = (
            numbers[f"entries_{name}"] for name in ("live", "evicted", "cropped", "appended", "forked")
        )
        assert live + evicted + cropped == appended + forked
        assert numbers["kv_bytes_allocated"] == self.probe.bytes


def driver(head_budget: str, method: str = "h2o", page_size: int = 2, num_shards: int = 1, **scheduling) -> HeadDriver:
    scheduling = {"method": method, "budget_tokens": BUDGET, "head_budget": head_budget, **SMALL, **scheduling}
    return HeadDriver([layer(0), layer(1)], page_size=page_size, num_shards=num_shards, scheduling=scheduling)


@pytest.mark.parametrize("method", ["h2o", "knorm", "quest"])
@pytest.mark.parametrize("page_size", [1, 3], ids="page{}".format)
@pytest.mark.parametrize("head_budget", ["uniform", "adaptive"])
@pytest.mark.parametrize("num_shards", [1, 4], ids="S{}".format)
def test_each_head_attends_to_what_it_kept(num_shards, head_budget, page_size, method):
    d = driver(head_budget, method, page_size, num_shards)
    d.prefill([40, 1, 25])
    for mask in [*[ragged([1, 1, 1])] * 5, ragged([4, 0, 9]), ragged([1, 0, 1]), ragged([11, 30, 2], left=False), *[ragged([1, 1, 1])] * 5]:
        poison(d)
        d.forward(mask)
        for i in range(2):
            counts = d.probe.near_pool(i).counts.unflatten(1, (-1, HEADS)).sum(1)
            assert (counts.sum(1) <= HEADS * BUDGET).all() and (head_budget == "adaptive" or counts.max() <= BUDGET)
            floor = torch.tensor([min(n, 4) for n in d.lens]).unsqueeze(1)
            assert (counts >= floor - page_size).all()
    sets = {tuple(d.held(0, 0, head)) for head in range(HEADS)}
    assert len(sets) == HEADS, "both heads kept the same entries"


@pytest.mark.parametrize("num_shards", [1, 2], ids="S{}".format)
def test_adaptive_budgets_differ_between_heads_down_to_a_floor(num_shards):
    for floor in (0.1, 1.0):
        d = driver("adaptive", "knorm", 1, num_shards, head_floor=floor)
        d.prefill([60, 50])
        counts = torch.stack([pool.counts.unflatten(1, (-1, HEADS)).sum(1) for pool in d.probe.all_pools])
        assert (counts.sum(-1) == HEADS * BUDGET).all() and bool((counts != BUDGET).any()) == (floor < 1)


class TwinDriver(HeadDriver):
    """Beside it one cache per head, with that head's queries, keys and values alone: with uniform budgets each must keep the same."""

    def __init__(self, layers, **options) -> None:
        super().__init__(layers, **options)
        singles = [replace(spec, num_kv_heads=1) for spec in layers]
        config = self.cache.config.model_copy(
            update={"scheduling": self.cache.config.scheduling.model_copy(update={"head_budget": "shared"})}
        )
        kind = {"num_experts": self.num_experts, "dtype": self.dtype, "device": torch.device("cpu")}
        self.twins = [PiKVCache(singles, config, **kind) for _ in range(HEADS)]
        for name in ("begin_step", "end_step"):
            calls = [getattr(cache, name) for cache in (self.cache, *self.twins)]
            setattr(self.cache, name, lambda *args, calls=calls: [call(*args) for call in calls])

    def _attend(self, i: int, q: Tensor, k: Tensor, v: Tensor, ids: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        for head, (twin, queries) in enumerate(zip(self.twins, q.chunk(HEADS, 2), strict=True)):
            own = slice(head, head + 1)
            twin.attend(i, queries, k[:, :, own], v[:, :, own], scale=self._scale(q), v_dim=v.shape[-1], expert_ids=ids)
        return super()._attend(i, q, k, v, ids, positions)

    def check(self) -> None:
        super().check()
        for i, pool in enumerate(self.probe.all_pools):
            for row in range(len(self.lens)):
                for table in range(pool.num_tables):
                    twin = CacheProbe(self.twins[table % HEADS]).near_pool(i)
                    assert pool.positions(row, table) == twin.positions(row, table // HEADS), f"layer {i}, row {row}, table {table}"


@pytest.mark.parametrize("method", ["h2o", "tova", "quest", "snapkv"])
@pytest.mark.parametrize("num_shards", [1, 4], ids="S{}".format)
def test_a_head_keeps_what_a_cache_of_its_own_would(num_shards, method):
    scheduling = {"method": method, "budget_tokens": 30, "head_budget": "uniform", **SMALL}
    d = TwinDriver([layer(0), layer(1)], page_size=3, num_shards=num_shards, capacity_tokens=400, scheduling=scheduling)
    d.prefill([60, 17])
    for mask in [*[ragged([1, 1])] * 4, ragged([5, 11]), ragged([9, 0]), *[ragged([1, 1])] * 6]:
        d.forward(mask)


@pytest.mark.parametrize("num_shards", [1, 4], ids="S{}".format)
def test_forks_of_heads(num_shards):
    d = driver("adaptive", page_size=3, num_shards=num_shards)
    d.prefill([40, 17])
    for parents in ([0, 1], [1, 0, 0], [2, 1]):
        d.select(parents)
        d.decode()
        poison(d)
        d.decode()


@pytest.mark.parametrize("num_shards", [1, 2], ids="S{}".format)
def test_announced_crops_of_heads(num_shards):
    d = driver("uniform", "knorm", 3, num_shards)
    d.prefill([40, 17])
    d.announce_crops()
    d._compare = lambda *_: None  # what waits with its eviction goes at the beginning of the next forward
    for taken_back in (3, 0, 4):
        d.forward(ragged([5, 5]))
        poison(d)
        d.crop([n - taken_back for n in d.lens])
    d.end_crops()
    d.decode()
    assert stats(d.cache, 1, 1)["entries_cropped"] == 2 * 2 * HEADS * 7


@pytest.mark.parametrize("num_shards", [1, 2], ids="S{}".format)
def test_memory_of_heads_follows_the_budget(num_shards):
    d = driver("uniform", "knorm", 4, num_shards, prefill="keep")
    d._compare = lambda *_: None  # what is evicted before a forward is not what it held after the last one
    d.prefill([200])
    record = d.probe.formats[0].record_bytes
    assert d.probe.near_pool(0).nbytes >= HEADS * 50 * record
    d.decode()
    assert d.probe.near_pool(0).nbytes <= 1.25 * HEADS * (BUDGET // 4 + num_shards) * record + record


def test_a_budget_in_bytes_is_that_of_all_heads():
    d = driver("uniform", "knorm", 1)
    record = d.probe.formats[0].record_bytes
    d = driver("uniform", "knorm", 1, budget_tokens=None, budget_bytes=2 * HEADS * 30 * record)  # two layers
    d.prefill([60])
    assert [pool.counts.tolist() for pool in d.probe.all_pools] == [[[30, 30]]] * 2


REFUSED = {
    "MLA": (layer(1, latent=True), {}, "latent"),
    "window": (layer(1, window=5), {}, "sliding window of 5"),
    "heads": (layer(1, num_kv_heads=4), {}, "4 KV heads"),
    "router": (layer(1), {"routing": {"method": "bounds", "budget_ratio": 0.5}}, "routing.method = 'bounds'"),
}


@pytest.mark.parametrize(("second", "options", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_refusals(second, options, said):
    scheduling = {"method": "streaming_llm", "budget_tokens": 50, "head_budget": "uniform", **SMALL}
    with pytest.raises(ConfigError, match=f"head_budget = 'uniform'.*{said}"):
        Driver([layer(0), second], page_size=2, scheduling=scheduling, **options)
