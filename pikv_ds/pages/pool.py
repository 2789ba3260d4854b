"""A pool of pages: the records of one layer at one level on this rank, the tables that name them, and what is kept per page.

R request rows, S tables of a row (pages/table.py), P pages. A page is one record of ops/format/formats.py: codes, scales and positions of
page_size entries. Formats that encode keys by groups of tokens keep the newest group of every table raw in `tail`; a pool that is given
full pages only has none.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pikv_ds import ops
from pikv_ds.codecs.request_maps import PageMaps
from pikv_ds.ops import PageFormat
from pikv_ds.ops.library import CALLS
from pikv_ds.ops.memory import aligned_bytes

from .addresses import Addresses
from .allocator import PageAllocator
from .events import PageEvents, PageMove
from .table import PageTable
from .view import Before, PageReader, PageView


def tail_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the raw keys of an open group, in a model of `dtype`. fp16 for fp32: finer than the codes that follow; saturates as they do."""
    return torch.float16 if dtype == torch.float32 else dtype


def no_tail(fmt: PageFormat, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[1, Hkv, group, Dk], what ops are given for a pool of full pages in a grouped format. It is not read."""
    return torch.zeros(1, fmt.num_kv_heads, fmt.group, fmt.k_dim, dtype=tail_dtype(dtype), device=device)


class PagePool:
    """Owns records, raw tails and what is kept per page; ids are its allocator's, which row has which page its table's."""

    foresees = False
    """Its reader wants to know what a router scored (tier_reader.py)."""

    def __init__(
        self,
        fmt: PageFormat,
        dtype: torch.dtype,
        counts: Tensor,
        free_top: Tensor,
        reader: Callable[[PagePool], PageReader],
        *,
        heads: int = 1,
        level: int = 0,
        maps: PageMaps | None = None,
        full_pages: bool = False,
        no_tail: Tensor | None = None,
        events: PageEvents | None = None,
        addresses: Addresses | None = None,
        block_size: int | None = None,
    ) -> None:
        """dtype: of the model. counts [R, S] int32 and free_top, 0-d int64: views of tensors that a rank reads once per step.

        reader: how queries meet what pages hold (pages/raw.py, pages/unrotated.py). level: place among the layer's pools, 0 the nearest.
        maps: between the entries that the layer is given and those of this pool; None: they are the same numbers, encoded.
        full_pages: entries come in full pages only, so that there is no open group. no_tail [1, Hkv, group, Dk]: what ops are given all the
        same, when the format has groups. addresses: told when memory of the pool is replaced; None: nobody asks. block_size: tokens that
        are chosen as one; None: those of a page.
        """
        self.fmt, self.dtype, self.device, self.level, self.maps = fmt, dtype, counts.device, level, maps
        self.page_size, self.full_pages = fmt.page_size, full_pages
        self.block_size = block_size or fmt.page_size
        self.events = PageEvents() if events is None else events
        self._addresses = addresses or Addresses()
        self.table = PageTable(counts, heads, self._addresses)
        self.allocator = PageAllocator(self.device, free_top, self._freed, self._addresses)
        self.stays = False
        """It is reserved: free pages are not given back."""
        self.pages = aligned_bytes(0, self.device).view(0, fmt.record_bytes)  # [P, record_bytes] uint8
        # [R * S, Hkv, group, Dk], or None; of full pages one row for all tables, which is not read
        self.tail = no_tail if full_pages else self.new_tail(counts.numel())
        self.summaries: dict[str, Tensor] = {}  # name -> [P, ...]: what selection or retention keeps per page; travels with the page
        self.counters: list[str] = []  # names of what is counted of pages: in summaries, or in the table once rows share pages
        self.reader = reader(self)
        if self.full_pages:
            self.table.widen(0)  # a table that is read while it is empty has its spare column

    def new_tail(self, rows: int) -> Tensor | None:
        """Raw keys of the open group of `rows` tables, or None for a format without groups."""
        if not self.fmt.grouped:
            return None
        shape = (rows, self.fmt.num_kv_heads, self.fmt.group, self.fmt.k_dim)
        return torch.empty(shape, dtype=tail_dtype(self.dtype), device=self.device)

    def add_summary(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Keep `shape` values of `dtype` per page under `name`, in summaries[name] [P, *shape]; 0 in pages that are new.

        A summary follows from the entries of its page, so that rows that share the page share it.
        """
        if name in self.summaries or name in self.counters:
            raise ValueError(f"the pool already keeps a summary {name!r}; use another name")
        self.summaries[name] = torch.zeros((self.num_pages, *shape), dtype=dtype, device=self.device)

    def add_counter(self, name: str, dtype: torch.dtype) -> None:
        """Count a number per page and row under `name`, read and written through `counter`; 0 in pages that are new or used again.

        A counter follows from what a row did, so every row has its own. While no two tables name a page it lies at the page's id; from
        the first fork on at the places of the tables. What is stored of K and V stays shared.
        """
        self.add_summary(name, (), dtype)
        self.counters.append(name)

    @property
    def blocks(self) -> int:
        """Of a page. Block b of page p has the number p * blocks + b, in a table column * blocks + b."""
        return self.page_size // self.block_size

    # ---- sizes: host side ----------------------------------------------------------------------------------------------------

    @property
    def num_pages(self) -> int:
        return self.pages.shape[0]

    @property
    def nbytes(self) -> int:
        """Allocated KV bytes: page records (codes, scales, positions, padding), raw tails, page summaries and counters."""
        tail = 0 if self.tail is None or self.full_pages else self.tail.nbytes
        return self.pages.nbytes + tail + sum(x.nbytes for x in (*self.summaries.values(), *self.table.counted.values()))

    @property
    def metadata_nbytes(self) -> int:
        return self.table.nbytes + self.allocator.nbytes

    @property
    def live_nbytes(self) -> int:
        """Bytes of the slots in use, as a share of their records. Sync: reads the device."""
        return int(self.table.counts.sum()) * self.fmt.record_bytes // self.page_size

    def reserve(self, free_pages: int, needed: int, table_width: int) -> int:
        """Make sure that `needed` pages can be taken from the stack, of which `free_pages` are there, and widen the tables. Returns how
        many pages were added.

        Host side, before the step's collectives; no sync. Growing copies the layer once; the slab is max(needed, P // GROWTH) pages.
        """
        missing = self.allocator.missing(free_pages, needed)
        if missing:
            self._grow(missing)
        self.table.widen(table_width)
        return missing

    def take(self, count: int, uses: Tensor | int = 1) -> Tensor:
        """[count] int32 ids of pages that nobody named, each named by `uses` tables from now on; grows if it must. Host phase."""
        self.reserve(int(self.allocator.free_top), count, 0)
        return self.allocator.take(count, uses)

    def bring_open_pages_near(self) -> None:
        """Rows were cut, and pages that are no longer full will be written to. Of one tier: they lie where they are written to."""

    def retire(self) -> None:
        """Another pool takes its place."""

    def shrink(self, free_pages: int) -> int:
        """Give slabs back when more than 1 / GROWTH of the pages is free: pages move down into the holes. Returns the free pages left."""
        used = self.num_pages - free_pages
        if self.stays or not self.allocator.wasteful(free_pages):
            return free_pages
        new_id, keep = self.allocator.compact(used)
        pages = aligned_bytes(used * self.fmt.record_bytes, self.device).view(used, -1) if used else self.pages[:0].clone()
        self.pages = torch.index_select(self.pages, 0, keep, out=pages)
        self.summaries = {name: x.index_select(0, keep) for name, x in self.summaries.items()}
        self.table.renumber(new_id)
        for tell in self.events.moved:
            tell(PageMove(self.level, keep, torch.arange(used, device=self.device), copied=False))
        return 0

    def _grow(self, count: int) -> None:
        old, num_pages = self.pages, self.num_pages + count
        self.pages = aligned_bytes(num_pages * self.fmt.record_bytes, self.device).view(num_pages, -1)
        self.pages[: old.shape[0]] = old
        for name, x in self.summaries.items():
            self.summaries[name] = torch.cat([x, x.new_zeros(count, *x.shape[1:])])
        self.allocator.add(count)

    def _freed(self, gone: Tensor) -> None:
        """gone [P] bool: pages that nobody names any more."""
        for name in self.counters if self.counts_by_page else ():
            self.summaries[name].masked_fill_(gone, 0)
        for tell in self.events.freed:  # reads the device
            tell(self.level, torch.nonzero(gone).squeeze(-1))

    # ---- counters ------------------------------------------------------------------------------------------------------------

    @property
    def counts_by_page(self) -> bool:
        """Whether counters lie at the ids of pages; otherwise at the places of the tables, each row its own."""
        return not self.table.counted

    def counter(self, name: str) -> Tensor:
        """[X], the memory itself: X = P, or R * S * C once rows share pages. Where a page of a row has its own: `seats`."""
        return self.summaries[name] if self.counts_by_page else self.table.counted[name].view(-1)

    def seats(self) -> tuple[Tensor, int]:
        """[R, S, C] int64, where the tables' pages have their counters, X where there is no page; and X. Sync: none."""
        ids = self.table.ids
        if self.counts_by_page:
            return torch.where(ids >= 0, ids, self.num_pages).to(torch.int64), self.num_pages
        return torch.where(ids >= 0, torch.arange(ids.numel(), device=ids.device).view_as(ids), ids.numel()), ids.numel()

    def counted(self, name: str, table: Tensor) -> Tensor:
        """The counters of all tables' pages, as `table` lists these: the table's ids, or those of every head as a row (by_head)."""
        if self.counts_by_page:
            return self.summaries[name][table.clamp_min(0)]
        x = self.table.counted[name]
        return x if x.shape == table.shape else self.table.by_head(x)

    def part_counters(self) -> None:
        """Rows are about to share pages: from now on each counts for itself. Host phase; no sync."""
        if self.counts_by_page:
            self._addresses.moved()
            seats = self.seats()[0]  # where no page is the spare one behind, 0
            parted = {name: torch.nn.functional.pad(self.summaries[name], (0, 1))[seats] for name in self.counters}
            self.summaries = {name: x for name, x in self.summaries.items() if name not in parted}
            self.table.counted = parted

    # ---- entries -------------------------------------------------------------------------------------------------------------

    @property
    def positions(self) -> Tensor:
        """[P, page_size] int32 view: the stored position of every slot; anything where no entry is."""
        return ops.positions(self.pages, self.fmt)

    def decoded(self, table: Tensor, counts: Tensor, tail: Tensor | None) -> tuple[Tensor, Tensor]:
        """k [N, H, L, Dk] and v [N, H, L, Dv], f32, as pages hold them, L = C * page_size; anything in slots without an entry. Sync: none.

        Args: table [N, C] int32, -1 = no page; counts [N] entries of each; tail [N, H, group, Dk], their raw groups, None: not asked for.
        """
        fmt, page = self.fmt, table.clamp_min(0).flatten()
        k, v = ops.decode_pages(self.pages.index_select(0, page), fmt)
        k, v = (x.unflatten(0, table.shape).transpose(1, 2).flatten(2, 3) for x in (k, v))  # [N, C, H, page_size, D] -> [N, H, L, D]
        if tail is not None:
            slot, open_at = torch.arange(k.shape[2], device=k.device), (counts - counts % fmt.group).unsqueeze(-1)
            raw = ((slot >= open_at) & (slot < counts.unsqueeze(-1)))[:, None, :, None]
            k = torch.where(raw, tail.float()[:, :, slot % fmt.group], k)
        return k, k[..., : fmt.v_dim] if fmt.latent else v

    def snapshot(self, *, tail_is_old: bool) -> Before:
        """The pool as it is now, for readers that must not see what is stored next. tail_is_old: they read before the tail is written."""
        tail = self.tail
        return Before(self.table.counts.clone(), None if tail is None else tail if tail_is_old else tail.clone())

    def view(self, rows: slice, before: Before | None = None, own_visible: Tensor | None = None) -> PageView:
        """The entries of some rows in all tables, as readers take them. Sync: none.

        Args: before: what to see instead of the present entries. own_visible: [R] bool, rows that see the present ones all the same.
        """
        table, num_tables = self.table, self.table.tables_per_row
        tables = slice(rows.start * num_tables, rows.stop * num_tables)
        whole = rows.stop - rows.start == table.num_rows  # spares the views: each costs a microsecond per layer and step
        seqlens, block_table = (table.counts, table.ids) if whole else (table.counts[rows], table.ids[rows])
        tail = self.tail if whole or self.tail is None or self.full_pages else self.tail[tables]
        if before is not None:
            seqlens = torch.where(own_visible.unsqueeze(-1), seqlens, before.counts[rows])
            if before.tail is not None:
                own = own_visible.repeat_interleave(num_tables)[:, None, None, None]
                tail = torch.where(own, tail, before.tail[tables])
        if num_tables > 1:
            seqlens, block_table = seqlens.reshape(-1, table.heads), block_table.view(-1, table.heads, block_table.shape[-1])
        numbered = torch.zeros if self.full_pages else torch.arange
        tail_rows = None if tail is None else numbered(seqlens.numel(), dtype=torch.int32, device=tail.device)
        tail_rows = tail_rows if tail is None or table.heads == 1 else tail_rows.view_as(seqlens)
        return PageView(block_table, seqlens, tail, tail_rows)

    def append(
        self,
        rows: Tensor,
        table: Tensor | None,
        here: Tensor,
        positions: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        one_per_row: bool,
        may_open: bool,
        all_valid: bool,
    ) -> Tensor:
        """Store the entries of this rank's shards, in the step.

        Args:
            rows: [N] int64 request rows, ascending. table: [N] int64 of a row (any value where not here), or None: there is one.
            here: [N] bool, stored on this rank; False = padding or another rank's. positions: [N] int32.
            k: [N, Hkv, Dk]; v: [N, Hkv, Dv], not read in a latent layer.
            one_per_row: no row has two tokens (decode), so an entry's index is its row's count.
            may_open: some entry may need a new page; all_valid: here is True throughout. Both known on the host, both only save work.

        Returns: slot_mapping [N] int32, page * page_size + offset, -1 = not stored here. Sync: none; shapes depend on N only.
        """
        free = self.allocator
        # ops.assign_slots and ops.append, without the words between: these calls are made in every layer of every step.
        slot_mapping, tables = CALLS.assign_slots(
            self.table.counts, self.table.ids, free.free_stack, free.free_top, free.refcount, rows, table, None if all_valid else here,
            self.page_size, one_per_row, may_open,
        )  # fmt: skip
        k, v, tail = k.contiguous(), v.contiguous(), self.tail
        CALLS.append(self.pages, tail, k, v, positions, slot_mapping, None if tail is None else tables, *self.fmt.layout)
        return slot_mapping
