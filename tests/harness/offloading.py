"""The "offload" block by numbers of pages, and what must hold of a cache in tiers."""

from __future__ import annotations

import torch

from pikv_ds.codecs import CODECS
from pikv_ds.pages.tiered import TieredPool
from pikv_ds.spec import LayerSpec
from tests.harness.driver import Driver


def tiers(
    layers: list[LayerSpec],
    near: int,
    staged: int,
    *,
    host: int = 1000,
    page_size: int = 4,
    dtype=torch.float32,
    codec: str = "none",
    **block,
) -> dict:
    """So many pages of every layer with full attention."""
    build = CODECS.build(codec)
    page = sum(build.page_format(spec, page_size, dtype).record_bytes for spec in layers if spec.window is None)
    sizes = {"device_gib": near * page / 2**30, "staging_mib": staged * page / 2**20, "host_gib": host * page / 2**30}
    return {name: size * (1 + 1e-9) for name, size in sizes.items() if size} | block


def tiered_pools(driver: Driver) -> list[TieredPool]:
    return [pool for pool in driver.cache.pages.all_pools if isinstance(pool, TieredPool)]


def poison(driver: Driver) -> None:
    """What no page of the pool holds now, staging included, reads as NaN from here on: whoever gets it instead of a far page shows it."""
    for pool in tiered_pools(driver):
        pool.staged.forget()
        free = torch.ones(len(pool.pages), dtype=torch.bool)
        free[: pool.tier.num_near] = ~pool.allocator.used[: pool.tier.num_near]
        pool.pages[free] = 0xFF


def check_tiers(driver: Driver) -> None:
    """Every far page is in the store once, every near one in the pool's memory, and no table names staging."""
    for pool in tiered_pools(driver):
        ids, near, first = pool.table.ids[pool.table.ids >= 0], pool.tier.num_near, pool.allocator.first_far
        assert not bool(((ids >= near) & (ids < first)).any()), "a table names a slot of staging"
        assert pool.num_far == len(torch.unique(ids[ids >= first])), "the store and the tables count far pages differently"
        assert int(pool.allocator.free_top) == near - len(torch.unique(ids[ids < near]))
        uses = torch.bincount(ids.long(), minlength=pool.num_pages)
        assert torch.equal(uses.to(torch.int32), pool.allocator.refcount[:-1]), "uses are not those of the tables"
        slots = pool.far_slot[torch.unique(ids[ids >= first]).long() - first]
        assert len(torch.unique(slots)) == len(slots), "two far pages in one slot"
        assert len(pool.pages) == near + pool.tier.num_staged, "near memory has grown"
