"""A Driver whose layers have two pools of pages, and what holds between its forwards, told from the definition and not from window.py."""

import torch
from torch import Tensor

from pikv_ds.cache.stats import stats
from tests.unit.driver import Driver, dense_over, layer, ragged
from tests.unit.invariants import check_directory, check_pages, check_unshared

KINDS = [layer(0, dim=16), layer(1, dim=16, window=70), layer(2, dim=16, latent=True)]


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


def far_counts(driver: Driver) -> list[int]:
    """Entries in the far pool of every layer that has one."""
    pools = [driver.probe.far_pool(i) for i in range(driver.probe.num_layers)]
    return [int(pool.counts.sum()) for pool in pools if pool is not None]


def check_tiers(driver: TieredDriver) -> None:
    probe = driver.probe
    assert any(probe.far_pool(i) for i in range(probe.num_layers))
    for i, spec in enumerate(driver.layers):
        near, far = probe.near_pool(i), probe.far_pool(i)
        for pool in probe.pools(i):
            check_pages(pool)
            check_unshared(pool)
        assert (far is None) == (spec.window is not None)
        if far is None:
            continue
        assert bool((far.counts % far.page_size == 0).all()), "a far page is not full"
        for row, length in enumerate(driver.lens):
            pages = near.pages(row), far.pages(row)
            if driver.cache.exchange.size == 1 and probe.policy is None:
                assert sorted(p for pool in pages for page in pool for p in page) == list(range(length)), f"layer {i}, row {row}"
            if not driver.crops_announced and probe.keeps_light is None:
                assert all(driver.must_be_near(page, length) for page in pages[0]), f"layer {i}, row {row}: a page stayed near"
            assert all(page[0] >= driver.sinks for page in pages[1])
    if driver.cache.num_shards > 1 and probe.policy is None:
        check_directory(driver)
    numbers = stats(driver.cache, 1, 1)
    names = ("live", "expired", "evicted", "cropped", "appended", "forked")
    live, expired, evicted, cropped, appended, forked = (numbers[f"entries_{name}"] for name in names)
    assert live == sum(int(pool.counts.sum()) for pool in probe.all_pools)
    if driver.cache.exchange.size == 1:
        assert live + expired + evicted + cropped == appended + forked
    assert numbers["kv_bytes_allocated"] == probe.bytes, "bytes reported are not the bytes held"


def poison(driver: Driver) -> int:
    """NaN into the slots of both pools that no table names, raw formats. Returns how many pages were hit."""
    hit = 0
    for pool in driver.probe.all_pools:
        free, (k, v, _) = pool.free, pool.fields
        k[free] = v[free] = torch.nan
        hit += len(free)
        for row, table in (pool.counts % pool.page_size).nonzero().tolist():
            page, used = pool.page_ids(row, table)[-1], int(pool.counts[row, table]) % pool.page_size
            k[page, :, used:] = v[page, :, used:] = torch.nan
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
    driver.end_crops()
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
