"""What holds of budgets per kv head: every head keeps its own entries, and attends to these. HEADS kv heads."""

from dataclasses import replace

import torch
from torch import Tensor

from pikv_ds.cache.cache import PiKVCache
from pikv_ds.cache.inspect import CacheProbe
from pikv_ds.cache.stats import stats
from tests.harness.checks import Check
from tests.harness.dense import dense_over, rel_error
from tests.harness.driver import Driver
from tests.harness.invariants import check_pages, check_unshared

HEADS = 2


def held_by(driver: Driver, i: int, row: int, head: int) -> list[int]:
    """Positions that this head has in any shard."""
    pool = driver.probe.near_pool(i)
    return [p for table in range(head, pool.num_tables, HEADS) for p in pool.positions(row, table)]


class HeadAttention(Check):
    """Attention of each head is that over the entries that its tables held before the forward, and the forward's own."""

    def before(self, mask: Tensor) -> None:
        driver = self.driver
        rows = () if driver.fresh else driver.parent if driver.touched else range(len(driver.lens))
        self.held = {
            (i, r, h): held_by(driver, i, old, h) for i in range(len(driver.layers)) for r, old in enumerate(rows) for h in range(HEADS)
        }

    def layer(self, i: int, q: Tensor, positions: Tensor, out: Tensor, lse: Tensor) -> None:
        history, scale, tolerance = self.driver.history[i], self.driver.scale(q), self.driver.tolerance
        for row, column in (positions >= 0).nonzero().tolist():
            at, first = int(positions[row, column]), int(positions[row][positions[row] >= 0][0])
            for head in range(HEADS):
                kept = [*self.held.get((i, row, head), []), *range(first, at + 1)]
                entries = [(k[head : head + 1], v[head : head + 1]) for k, v in (history[row][p] for p in kept)]
                query = slice(head * q.shape[2] // HEADS, (head + 1) * q.shape[2] // HEADS)
                want_out, want_lse, _ = dense_over(q[row, column, query], entries, scale)
                assert rel_error(out[row, column, query], want_out) <= tolerance, (i, row, at, head)
                assert rel_error(lse[row, column, query], want_lse) <= tolerance, (i, row, at, head)


class HeadPages(Check):
    """Pages hold the entries of one head bit for bit, and what a head has and what it lost are its tokens; loads, numbers, bytes."""

    def after(self, mask: Tensor) -> None:
        driver, probe = self.driver, self.driver.probe
        evicted, loads = probe.evicted, probe.loads
        for i, pool in enumerate(probe.all_pools):
            check_pages(pool)
            check_unshared(pool)
            for row, length in enumerate(driver.lens):
                for table in range(pool.num_tables):
                    positions, k, v = pool.entries(row, table)
                    assert positions.tolist() == sorted(set(positions.tolist()))
                    entries, head = [driver.history[i][row][p] for p in positions.tolist()], table % HEADS
                    if entries:
                        assert torch.equal(k[:, 0], torch.stack([e[0][head] for e in entries]))
                        assert torch.equal(v[:, 0], torch.stack([e[1][head] for e in entries]))
                for head, gone in enumerate(evicted[i][row]):
                    assert len(held_by(driver, i, row, head)) + gone == length, f"layer {i}, row {row}, head {head}: not live + evicted"
            if driver.cache.num_shards > 1:
                assert loads[i].tolist() == pool.counts.sum(0).view(-1, HEADS).sum(1).tolist()
        numbers = stats(driver.cache, 1, 1)
        names = ("live", "evicted", "cropped", "appended", "forked")
        live, gone, cropped, appended, forked = (numbers[f"entries_{name}"] for name in names)
        assert live + gone + cropped == appended + forked
        assert numbers["kv_bytes_allocated"] == probe.bytes


class Twins(Check):
    """Beside the cache one per head, with that head's queries, keys and values alone: with uniform budgets each must keep the same."""

    def opened(self, driver: Driver) -> None:
        super().opened(driver)
        singles, config = [replace(spec, num_kv_heads=1) for spec in driver.layers], driver.cache.config
        config = config.model_copy(update={"scheduling": config.scheduling.model_copy(update={"head_budget": "shared"})})
        kind = {"num_experts": driver.num_experts, "dtype": driver.dtype, "device": torch.device("cpu")}
        self.caches = [PiKVCache(singles, config, **kind) for _ in range(HEADS)]

    def brought(self, i: int, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> None:
        for head, (cache, queries) in enumerate(zip(self.caches, q.chunk(HEADS, 2), strict=True)):
            if i == 0:
                cache.begin_step(self.driver.local)
            own = slice(head, head + 1)
            cache.attend(i, queries, k[:, :, own], v[:, :, own], scale=self.driver.scale(q), v_dim=v.shape[-1], expert_ids=ids)

    def after(self, mask: Tensor) -> None:
        for cache in self.caches:
            cache.end_step()
        for i, pool in enumerate(self.driver.probe.all_pools):
            twins = [CacheProbe(cache).near_pool(i) for cache in self.caches]
            for row in range(len(self.driver.lens)):
                for table in range(pool.num_tables):
                    want = twins[table % HEADS].positions(row, table // HEADS)
                    assert pool.positions(row, table) == want, f"layer {i}, row {row}, table {table}"
