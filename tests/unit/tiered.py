"""A Driver whose layers have two pools of pages, and what holds between its forwards, by the definition and not by tiers/window.py."""

import torch
from torch import Tensor

from pikv_ds import ops
from pikv_ds.cache.stats import stats
from pikv_ds.pages.pool import LayerStore
from tests.unit.driver import Driver, dense_over, layer, ragged
from tests.unit.invariants import check_directory, check_pages, check_unshared, slots_of

KINDS = [layer(0, dim=16), layer(1, dim=16, window=70), layer(2, dim=16, latent=True)]


def positions_of(store: LayerStore, row: int, shard: int) -> list[int]:
    return store.positions.flatten()[slots_of(store, row, shard).long()].tolist()


def pages_of(store: LayerStore, row: int) -> list[list[int]]:
    """Positions of every page of a row, shard after shard."""
    size, found = store.page_size, []
    for shard in range(store.counts.shape[1]):
        held = positions_of(store, row, shard)
        found += [held[begin : begin + size] for begin in range(0, len(held), size)]
    return found


class TieredDriver(Driver):
    def __init__(self, layers=KINDS, *, codec="none", sinks=2, recent=6, **options) -> None:
        self.sinks, self.recent = sinks, recent
        window = {"raw_sink_tokens": sinks, "raw_recent_tokens": recent}
        super().__init__(layers, codec=codec, compression=window | options.pop("compression", {}), **options)

    def forward(self, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
        outputs = super().forward(mask)
        check_tiers(self)
        return outputs

    def must_be_near(self, page: list[int], length: int) -> bool:
        return len(page) < self.cache.page_size or page[0] < self.sinks or page[-1] >= length - self.recent


def check_tiers(driver: TieredDriver) -> None:
    tables = driver.cache.tables
    assert tables.two_pools
    for i, spec in enumerate(driver.layers):
        near, far = tables.stores[i], tables.far[i]
        for store in tables.pools(i):
            check_pages(store)
            check_unshared(store)
        assert (far is None) == (spec.window is not None)
        if far is None:
            continue
        assert bool((far.counts % far.page_size == 0).all()), "a far page is not full"
        for row, length in enumerate(driver.lens):
            pages = pages_of(near, row), pages_of(far, row)
            if driver.cache.exchange.size == 1 and driver.cache.retention is None:
                assert sorted(p for pool in pages for page in pool for p in page) == list(range(length)), f"layer {i}, row {row}"
            if driver.cache.hold_margin is None and driver.cache.tiers.light_ratio is None:
                assert all(driver.must_be_near(page, length) for page in pages[0]), f"layer {i}, row {row}: a page stayed near"
            assert all(page[0] >= driver.sinks for page in pages[1])
    if driver.cache.num_shards > 1 and driver.cache.retention is None:
        check_directory(driver, tables.directory)
    numbers = stats(driver.cache, 1, 1)
    names = ("live", "expired", "evicted", "cropped", "appended", "forked")
    live, expired, evicted, cropped, appended, forked = (numbers[f"entries_{name}"] for name in names)
    held = [s for s in (*tables.stores, *tables.far) if s is not None]
    assert live == sum(int(s.counts.sum()) for s in held)
    if driver.cache.exchange.size == 1:
        assert live + expired + evicted + cropped == appended + forked
    tensors = [t for s in held for t in (s.pages, None if s.full_pages else s.tail, *s.summaries.values()) if t is not None]
    of_requests = 0 if driver.cache.bases is None else driver.cache.bases.nbytes
    held_bytes = sum(t.untyped_storage().nbytes() for t in tensors) + of_requests
    assert numbers["kv_bytes_allocated"] == held_bytes, "bytes reported are not the bytes held"


def poison(driver: Driver) -> int:
    """NaN into the slots of both pools that no table names, raw formats. Returns how many pages were hit."""
    hit = 0
    for store in driver.cache.tables.all_stores:
        free = (store.refcount[:-1] == 0).nonzero().squeeze(-1)
        k, v, _ = ops.views(store.pages, store.fmt)
        for field in (k, v):
            field[free] = torch.nan
        hit += free.numel()
        rows, shards = store.counts.shape
        for row in range(rows):
            for shard in range(shards):
                used = int(store.counts[row, shard])
                if used % store.page_size:
                    page = int(store.block_table[row, shard, used // store.page_size])
                    k[page, :, used % store.page_size :] = torch.nan
                    v[page, :, used % store.page_size :] = torch.nan
    return hit


def run_mix(driver: Driver) -> None:
    """Chunks, decoding, forks, crops that were announced and short ones that were not; two generations."""
    page = driver.cache.page_size
    driver.prefill([3 * page, 1, 2 * page + 3])
    for mask in (ragged([3, 3, 3]), ragged([0, 2 * page, page]), *[ragged([1, 1, 1])] * (page // 4 + 3), ragged([1, 0, 1])):
        driver.forward(mask)
    driver.select([2, 0, 0])
    for mask in (ragged([1, 1, 1]), ragged([2, 2, 1]), ragged([1, 1, 1])):
        driver.forward(mask)
    driver.announce_crops()
    driver.forward(ragged([page + 2, page, 5], left=False))
    driver.crop([n - 4 for n in driver.lens])
    driver.forward(ragged([5, 5, 5]))
    driver.crop([n - 3 for n in driver.lens])
    driver.cache.hold_margin = None
    driver.decode()
    driver.select([1, 1])
    if all(spec.window is None for spec in driver.layers):  # windows take back nothing that was not announced
        driver.crop([driver.lens[0] - 2, driver.lens[1]])
    driver.decode()
    driver.prefill([page])
    driver.decode()


def attention_shares(q: Tensor, entries: list, scale: float) -> list[float]:
    """The share of each entry in the attention of one query [Hq, D], mean over heads."""
    return dense_over(q, entries, scale)[2].mean(0).tolist()
