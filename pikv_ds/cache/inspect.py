"""What a cache holds, as numbers: for tests, evaluation and examples. Outside the folders that own pages nothing else looks at them.

R request rows, T tables of a row on this rank: a local shard, or shard * heads + head when a page holds one kv head. For use between
forwards; every property reads the device. Nothing here changes what a cache holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pikv_ds.ops import PageFormat
from pikv_ds.pages.parked import ParkedRows
from pikv_ds.pages.rows import Rows
from pikv_ds.pages.shard_copy import pages_of
from pikv_ds.pages.tiered import TieredPool
from pikv_ds.placement.shard_map import ShardMap
from pikv_ds.policies.base import Pages, RetentionPolicy
from pikv_ds.routers.base import PageQuery, Router

from .cache import PiKVCache
from .inspect_pool import Entries, PoolProbe

__all__ = ["CacheProbe", "Entries", "PoolProbe", "Read"]


class Read(NamedTuple):
    """Since the last reset, sums over queries. entries: read (mean over kv heads); visible: that could have been read."""

    entries: float
    visible: float
    mass: float
    """Share of the attention that lies on what was read, summed over queries while it was measured."""
    queries: float
    """How many those were."""

    @property
    def share(self) -> float:
        return self.entries / self.visible if self.visible else 1.0


class CacheProbe:
    """Looks at one PiKVCache of this rank."""

    def __init__(self, cache: PiKVCache) -> None:
        self.cache = cache

    # ---- pages ---------------------------------------------------------------------------------------------------------------

    @property
    def num_layers(self) -> int:
        return len(self.cache.layers)

    @property
    def heads(self) -> int:
        """Tables of a row and shard: the kv heads with budgets per head, else 1."""
        return self.cache.pages.heads

    @property
    def local_shards(self) -> tuple[int, ...]:
        """This rank's shards among all, ascending."""
        return self.cache.map.local

    @property
    def shard_maps(self) -> list[ShardMap]:
        """Which rank holds which shard, as every part that asks has it."""
        pages = self.cache.pages
        return [self.cache.map, pages.map, *(layer.map for layer in pages.layers)]

    @property
    def parked(self) -> ParkedRows:
        return self.cache.pages.parked

    @property
    def row_numbers(self) -> set[int]:
        """How many rows everything that a step reads has: one number."""
        pages = self.cache.pages
        found = {pages.rows.num_rows, *(counts.shape[1] for counts in pages.counts)}
        found |= {pool.table.ids.shape[0] for pool in pages.all_pools}
        return found | {homes.shape[0] for homes in pages.directory.shard_at}

    def pools(self, layer: int) -> list[PoolProbe]:
        """Nearest first: entries are appended to the first; the second holds what a raw window has let go."""
        return [PoolProbe(pool) for pool in self.cache.pages.layers[layer].pools]

    def near_pool(self, layer: int) -> PoolProbe:
        return self.pools(layer)[0]

    def far_pool(self, layer: int) -> PoolProbe | None:
        """None: the layer has one pool."""
        return (*self.pools(layer), None)[1]

    @property
    def all_pools(self) -> list[PoolProbe]:
        """Of all layers in order, nearest first."""
        return [pool for layer in range(self.num_layers) for pool in self.pools(layer)]

    @property
    def tiered(self) -> list[TieredPool]:
        """Those with slower tiers, themselves."""
        return [pool for pool in self.cache.pages.all_pools if isinstance(pool, TieredPool)]

    def shard_bytes(self, at: int) -> int:
        """Of the pages of local shard `at`, in all layers and pools."""
        return sum(len(pages_of(pool, at)[0]) * pool.fmt.record_bytes for pool in self.cache.pages.all_pools)

    @property
    def formats(self) -> list[PageFormat]:
        """Of every layer's nearest pool; there from the start."""
        return [layer.nearest.fmt for layer in self.cache.pages.layers]

    def pages(self, layer: int, row: int) -> list[list[int]]:
        """Positions in every page of a row, pool after pool and table after table."""
        return [page for pool in self.pools(layer) for page in pool.pages(row)]

    def entries(self, layer: int, row: int) -> list[Entries]:
        """Of every table of a row, pool after pool."""
        return [pool.entries(row, table) for pool in self.pools(layer) for table in range(pool.num_tables)]

    def kept(self, layer: int) -> list[list[list[int]]]:
        """[row][table] positions held, ascending, in all pools."""
        pools = [pool.held for pool in self.pools(layer)]
        return [[sorted(sum(tables, [])) for tables in zip(*rows, strict=True)] for rows in zip(*pools, strict=True)]

    @property
    def live(self) -> int:
        """Entries in all tables of this rank."""
        return int(self.cache.pages.entries_live)

    # ---- requests and shards -------------------------------------------------------------------------------------------------

    @property
    def mode(self) -> str | None:
        """ "local", "replicated", "distinct"; None before the first forward of a group."""
        return self.cache.agreement.mode

    @property
    def lens(self) -> list[int]:
        """Tokens of every row that this rank stores entries of."""
        return list(self.cache.agreement.lens)

    @property
    def first_row(self) -> int:
        """Where the rows of this rank begin among those of all ranks."""
        agreement = self.cache.agreement
        return sum(agreement.num_rows[: agreement.own])

    @property
    def loads(self) -> Tensor:
        """[L, all shards] int64 entries that queries still see, of all ranks; 0 with one shard."""
        return self.cache.pages.directory.load.clone()

    def homes(self, layer: int) -> Tensor:
        """[R, most tokens] int64: the shard that each position was last stored in."""
        lens = self.lens
        if self.cache.num_shards == 1:  # the directory keeps none
            return torch.zeros(len(lens), max(lens, default=0), dtype=torch.int64)
        return self.cache.pages.directory.shard_at[layer][:, : max(lens, default=0)].long()

    @property
    def known_sizes(self) -> list[tuple[Tensor, Tensor]]:
        """Entries of tables and free pages: as the host knows them, and as they are. Empty while they are on their way to it, or
        nobody asks for them."""
        pages = self.cache.pages
        if pages.room.held is not None:  # nobody follows them
            return []
        return [(pages.sizes.counts, pages.counts[0]), (pages.sizes.free(0), pages.free_tops[0])] if pages.sizes.arrived else []

    @property
    def evicted(self) -> list[list[list[int]]]:
        """[layer][row][head] entries that a budget has taken, in all shards."""
        return self.cache.pages.directory.evicted_by_head()

    def uncroppable(self, row: int) -> int:
        """A crop of the row behind this many tokens may be refused, as entries have left a window."""
        return self.cache.pages.crops.expired_at.values[row]

    # ---- memory --------------------------------------------------------------------------------------------------------------

    @property
    def addresses(self) -> list[int]:
        """Of the tensors that a decode step reads and writes."""
        directory = self.cache.pages.directory
        return [x.data_ptr() for x in (directory.load, *directory.shard_at)] + [at for pool in self.all_pools for at in pool.addresses]

    @property
    def reserved_tokens(self) -> int | None:
        """That rows may grow to before one of them is replaced; None: nothing is reserved."""
        return self.cache.pages.room.held

    # ---- bytes ---------------------------------------------------------------------------------------------------------------

    @property
    def bytes(self) -> int:
        """Allocated KV bytes of this rank, from the storages themselves: what kv_bytes_allocated must say."""
        return sum(x.untyped_storage().nbytes() for pool in self.all_pools for x in pool.storages) + self.bases_bytes

    @property
    def bases_bytes(self) -> int:
        """Bytes of the requests' own bases."""
        return 0 if self.cache.bases is None else self.cache.bases.nbytes

    @property
    def directory_bytes(self) -> int:
        return self.cache.pages.directory.nbytes

    @property
    def watched_bytes(self) -> int:
        """Bytes that the policy keeps per row; 0 without one."""
        retention = self.cache.retention
        columns = {} if retention is None else retention.shares.columns
        return sum(column.nbytes for by_name in columns.values() for column in by_name.values())

    @property
    def rows(self) -> Rows:
        """What is kept per row, by whomever; bases of requests aside."""
        return self.cache.pages.rows

    @property
    def router_bytes(self) -> int:
        """Bytes that the router keeps per row or beside rows, and those of the counters of entries read."""
        return 0 if self.cache.selection is None else self.cache.selection.metadata_nbytes + self.rows.nbytes

    @property
    def weights(self) -> list[object]:
        """What the cache has from its configuration and from files: the same whatever is stored."""
        cache, found = self.cache, []
        if cache.retention is not None:
            found.append(cache.retention.policy)
        if cache.selection is not None:
            found += cache.selection.router.from_files
        if cache.bases is not None:
            found.append(cache.bases.rotations)
        return [cache.codec, cache.blueprint.pages, cache.writer.placement, cache.map, *found]

    # ---- what queries read ---------------------------------------------------------------------------------------------------

    @property
    def router(self) -> Router | None:
        """None: every query reads everything."""
        return None if self.cache.selection is None else self.cache.selection.router

    @property
    def read(self) -> Read | None:
        """None: every query reads everything."""
        selection = self.cache.selection
        return None if selection is None else Read(*selection.entries.tolist(), *selection.mass.tolist())

    @property
    def read_share(self) -> float:
        return 1.0 if self.read is None else self.read.share

    @property
    def misses(self) -> list[Tensor | None]:
        """Per layer [S] f32, what the router counts of misses per shard; None of a router that counts none."""
        return [None if self.router is None else self.router.missed(layer) for layer in range(self.num_layers)]

    def measure_mass(self, on: bool) -> None:
        """From now on (not) also measure read.mass: costs another read of everything. Without a router there is nothing to measure."""
        if self.cache.selection is not None:
            self.cache.selection.measures_mass = on

    def on_choice(self, look: Callable[[PageQuery, Tensor], None]) -> None:
        """Call look(asked, columns [N, 1 or H, K] int32, -1 = none) whenever pages have been chosen, before they are read."""
        if self.cache.selection is not None:
            self.cache.selection.onlookers += (look,)

    # ---- what is kept --------------------------------------------------------------------------------------------------------

    @property
    def policy(self) -> RetentionPolicy | None:
        """None: nothing is evicted."""
        return None if self.cache.retention is None else self.cache.retention.policy

    def judged(self, layer: int) -> Pages:
        """The pages of a layer as the policy sees them now."""
        return self.cache.retention.judged(layer, self.lens)

    def scores(self, layer: int) -> Tensor:
        """[R * heads, shards, C] f32 of these pages."""
        return self.policy.score(self.judged(layer))

    @property
    def keeps_light(self) -> float | None:
        """The share of old entries that stay near by their importance; None: pages go by their age alone."""
        return None if self.cache.window is None else self.cache.window.light_ratio

    # ---- maps ----------------------------------------------------------------------------------------------------------------

    def maps(self, layer: int):
        """From keys and values to what pages hold, those of far pages where there are two pools; None: the same, or of each request."""
        pages = self.cache.pages.layers[layer]
        return pages.plan.entry_maps or next((pool.maps for pool in pages.pools if pool.maps is not None), None)

    @property
    def fitted_at(self) -> list[int]:
        """[R] tokens of a request when its basis was fitted; very large: never again. Empty without bases of requests."""
        return [] if self.cache.bases is None else list(self.cache.bases.fitted_at.values)

    def bases(self, layer: int) -> tuple[Tensor, Tensor]:
        """Of keys and values, [B, H, D, r] f32 each; of a layer with two pools those of all ranks' rows."""
        bases = self.cache.bases
        k, v = bases.bases[layer] if layer in bases.bases else (column.value for column in bases.shared[layer])
        return k.clone(), v.clone()

    def rotations(self, layer: int) -> list[Tensor] | None:
        """What the codec rotates coefficients by besides: of keys and values, [H, r, r]."""
        return self.cache.bases.rotations[layer]
