"""What holds of layers with two pools of pages between forwards, told from the definition and not from window.py."""

import torch
from torch import Tensor

from pikv_ds.cache.stats import stats
from tests.harness.checks import Check, Dense
from tests.harness.dense import dense_over
from tests.harness.driver import Driver, layer, ragged
from tests.harness.invariants import check_directory, check_pages, check_unshared

KINDS = [layer(0, dim=16), layer(1, dim=16, window=70), layer(2, dim=16, latent=True)]


class TwoPools(Check):
    """What lies near and far after every forward, told from the definition: sinks, recent tokens and open pages are near, in every layer
    without a window. Pages, loads, numbers and bytes of both pools."""

    def __init__(self, sinks: int = 2, recent: int = 6) -> None:
        self.sinks, self.recent = sinks, recent

    def must_be_near(self, page: list[int], length: int) -> bool:
        return len(page) < self.driver.cache.page_size or page[0] < self.sinks or page[-1] >= length - self.recent

    def after(self, mask: Tensor) -> None:
        probe = self.driver.probe
        assert any(probe.far_pool(i) for i in range(probe.num_layers))
        for i, spec in enumerate(self.driver.layers):
            for pool in probe.pools(i):
                check_pages(pool)
                check_unshared(pool)
            assert (probe.far_pool(i) is None) == (spec.window is not None)
            if spec.window is None:
                self._pages(i)
        if self.driver.cache.num_shards > 1 and probe.policy is None:
            check_directory(self.driver)
        self._numbers()

    def _pages(self, i: int) -> None:
        driver, probe = self.driver, self.driver.probe
        near, far = probe.pools(i)
        assert bool((far.counts % far.page_size == 0).all()), "a far page is not full"
        for row, length in enumerate(driver.lens):
            pages = near.pages(row), far.pages(row)
            if driver.cache.exchange.size == 1 and probe.policy is None:
                assert sorted(p for pool in pages for page in pool for p in page) == list(range(length)), f"layer {i}, row {row}"
            if not driver.crops_announced and probe.keeps_light is None:
                assert all(self.must_be_near(page, length) for page in pages[0]), f"layer {i}, row {row}: a page stayed near"
            assert all(page[0] >= self.sinks for page in pages[1])

    def _numbers(self) -> None:
        numbers, probe = stats(self.driver.cache, 1, 1), self.driver.probe
        names = ("live", "expired", "evicted", "cropped", "appended", "forked")
        live, expired, evicted, cropped, appended, forked = (numbers[f"entries_{name}"] for name in names)
        assert live == sum(int(pool.counts.sum()) for pool in probe.all_pools)
        if self.driver.cache.exchange.size == 1:
            assert live + expired + evicted + cropped == appended + forked
        assert numbers["kv_bytes_allocated"] == probe.bytes, "bytes reported are not the bytes held"


class LeastAttended(Check):
    """Of old pages the least attended are far, by a count of attention in float64 that is kept here. ratio: of all tokens that may stay."""

    def __init__(self, pools: TwoPools, ratio: float) -> None:
        self.pools, self.ratio = pools, ratio

    def generation(self) -> None:
        self.weight: list[list[list[float]]] = []  # [layer][row][position]
        self.gone: dict[tuple[int, int], set[int]] = {}  # first positions of the pages that were demoted

    def layer(self, i: int, q: Tensor, positions: Tensor, out: Tensor, lse: Tensor) -> None:
        driver = self.driver
        if not self.weight:
            self.weight = [[[] for _ in positions] for _ in driver.layers]
        for row in range(len(positions)):
            weight, history = self.weight[i][row], driver.history[i][row]
            weight += [0.0] * (len(history) - len(weight))
            for column in (positions[row] >= 0).nonzero().flatten().tolist():
                entries = history[: int(positions[row, column]) + 1]
                for p, share in enumerate(dense_over(q[row, column], entries, driver.scale(q))[2].mean(0).tolist()):
                    weight[p] += share

    def after(self, mask: Tensor) -> None:
        size = self.driver.cache.page_size
        for i in range(len(self.driver.layers)):
            near, far = self.driver.probe.pools(i)
            for row, length in enumerate(self.driver.lens):
                held, known = {page[0]: page for page in far.pages(row)}, self.gone.setdefault((i, row), set())
                assert known <= set(held), "a page came back"
                old = [page for page in near.pages(row) if not self.pools.must_be_near(page, length)]
                gained = [held[first] for first in set(held) - known]
                importance = lambda page: sum(self.weight[i][row][p] for p in page)  # noqa: B023, E731
                if gained:
                    assert len(old) * size <= self.ratio * length < (len(old) + 1) * size
                    assert max(map(importance, gained)) <= min(map(importance, old), default=torch.inf) + 1e-6
                known |= set(held)


def tiered(layers=KINDS, *, codec: str = "none", sinks: int = 2, recent: int = 6, checks: list[Check] | None = None, **options) -> Driver:
    """A driver with this raw window. checks: besides TwoPools; None = dense attention."""
    compression = {"raw_sink_tokens": sinks, "raw_recent_tokens": recent} | options.pop("compression", {})
    checks = [TwoPools(sinks, recent), *([Dense()] if checks is None else checks)]
    return Driver(layers, codec=codec, compression=compression, checks=checks, **options)


def far_counts(driver: Driver) -> list[int]:
    """Entries in the far pool of every layer that has one."""
    pools = [driver.probe.far_pool(i) for i in range(driver.probe.num_layers)]
    return [int(pool.counts.sum()) for pool in pools if pool is not None]


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
    router, probe = driver.probe.router, driver.probe
    counts = probe.keeps_light is not None or (router is not None and router.learns) or (probe.policy is not None and probe.policy.watches)
    if not counts and all(spec.window is None for spec in driver.layers):  # these take back nothing that was not announced
        driver.crop([driver.lens[0] - 2, driver.lens[1]])
    driver.decode()
    driver.prefill([page])
    driver.decode()
