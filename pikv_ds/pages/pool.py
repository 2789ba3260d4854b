"""The paged store of one layer on one rank: slabs of page records, the block table of its shards, device-side slot allocation.

R request rows, S local shards, P pages. A page is one record of ops/format/formats.py: codes, scales and positions of page_size entries.
Formats that encode keys by groups of tokens keep the newest group of every (row, shard) raw in `tail`; a store of full pages has none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds import ops
from pikv_ds.codecs.maps import Transform
from pikv_ds.ops import PageFormat
from pikv_ds.ops.memory import aligned_bytes

GROWTH = 32
"""Pages are added in slabs of at least P // GROWTH, and given back once more than that share is free. Growing copies the layer: with n
entries per table once in n / GROWTH steps or more, each of which reads every entry, so 2 * GROWTH / n of what attention moves at most."""


def tail_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the raw keys of an open group, in a model of `dtype`. fp16 for fp32: finer than the codes that follow; saturates as they do."""
    return torch.float16 if dtype == torch.float32 else dtype


class LayerStore:
    """Owns the KV memory of one layer on this rank. `counts` and `free_top` are views into tensors that the cache reads once per step."""

    def __init__(
        self,
        fmt: PageFormat,
        dtype: torch.dtype,
        device: torch.device,
        counts: Tensor,
        free_top: Tensor,
        heads: int = 1,
        *,
        no_tail: Tensor | None = None,
        turned: Transform | None = None,
    ) -> None:
        """no_tail: entries come in full pages only, so there is no open group; [1, Hkv, group, Dk], what the ops are given all the same.

        turned: pages hold coefficients of keys before their rotation, and who reads them meets what these stand for (pages/unrotated.py).
        """
        self.fmt = fmt
        self.full_pages, self.turned = no_tail is not None, turned
        self.heads = heads  # S counts (shard, kv head) pairs when a page holds one head: its tables are shard * heads + head
        self.page_size = fmt.page_size
        self.dtype, self.device = dtype, device  # dtype of the model
        self.counts = counts  # [R, S] int32, entries per row and local shard, expired pages not included
        self.free_top = free_top  # 0-d int64, pages on the free stack
        self.pages = aligned_bytes(0, device).view(0, fmt.record_bytes)  # [P, record_bytes] uint8
        # [R * S, Hkv, group, Dk], or None; of full pages one row for all tables, which is not read
        self.tail = (no_tail if fmt.grouped else None) if self.full_pages else self.new_tail(counts.numel())
        self.summaries: dict[str, Tensor] = {}  # name -> [P, ...]: what selection or retention keeps per page; travels with the page
        self.cleared: list[str] = []  # names of summaries that a freed page loses
        # One spare element each, never read as a page: tokens that open no page index it.
        self.refcount = torch.zeros(1, dtype=torch.int32, device=device)  # [P + 1] tables that name a page; > 1 after a beam fork
        self.free_stack = torch.zeros(1, dtype=torch.int32, device=device)  # [P + 1] free page ids, free_top of them valid
        self.block_table = torch.full((*counts.shape, 0), -1, dtype=torch.int32, device=device)  # [R, S, max_pages]

    def new_tail(self, rows: int) -> Tensor | None:
        """Raw keys of the open group of `rows` tables, or None for a format without groups."""
        if not self.fmt.grouped:
            return None
        shape = (rows, self.fmt.num_kv_heads, self.fmt.group, self.fmt.k_dim)
        return torch.empty(shape, dtype=tail_dtype(self.dtype), device=self.device)

    def add_summary(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, *, cleared: bool = False) -> None:
        """Keep `shape` values of `dtype` per page under `name`, in summaries[name] [P, *shape]; 0 in pages that are new.

        cleared: also 0 in pages that are used again.
        """
        if name in self.summaries:
            raise ValueError(f"the store already keeps a summary {name!r}; use another name")
        self.cleared += [name] * cleared
        self.summaries[name] = torch.zeros((self.num_pages, *shape), dtype=dtype, device=self.device)

    # ---- host side: sizes ----------------------------------------------------------------------------------------------------

    @property
    def k_dim(self) -> int:
        """Width of a key as queries meet it."""
        return self.fmt.k_dim if self.turned is None else self.turned.k.decode.shape[2]

    @property
    def num_pages(self) -> int:
        return self.pages.shape[0]

    @property
    def nbytes(self) -> int:
        """Allocated KV bytes: page records (codes, scales, positions, padding), raw tails, page summaries."""
        tail = 0 if self.tail is None or self.full_pages else self.tail.nbytes
        return self.pages.nbytes + tail + sum(x.nbytes for x in self.summaries.values())

    @property
    def metadata_nbytes(self) -> int:
        return self.block_table.nbytes + self.free_stack.nbytes + self.refcount.nbytes

    @property
    def live_nbytes(self) -> int:
        """Bytes of the slots in use, as a share of their records. Sync: reads the device."""
        return int(self.counts.sum()) * self.fmt.record_bytes // self.page_size

    def reserve(self, free_pages: int, needed: int, table_width: int) -> None:
        """Make sure that `needed` pages can be taken from the stack, of which `free_pages` are there, and widen the tables.

        Host side, before the step's collectives; no sync. Growing copies the layer once; the slab is max(needed, P // GROWTH) pages.
        """
        if needed > free_pages:
            self._resize(self.num_pages + max(needed - free_pages, self.num_pages // GROWTH))
        if table_width >= self.block_table.shape[-1]:  # the last column stays unused: append parks its idle writes there
            width = table_width + 1 + table_width // GROWTH
            self.block_table = torch.nn.functional.pad(self.block_table, (0, width - self.block_table.shape[-1]), value=-1)

    def shrink(self, free_pages: int) -> int:
        """Give slabs back when more than 1 / GROWTH of the pages is free: pages move down into the holes. Returns the free pages left."""
        used = self.num_pages - free_pages
        if free_pages <= 1 + used // GROWTH:
            return free_pages
        taken = self.refcount[:-1] > 0
        new_id = torch.cumsum(taken, 0, dtype=torch.int32) - 1  # order-preserving: page p moves to new_id[p]
        keep = torch.nonzero(taken).squeeze(-1)
        pages = aligned_bytes(used * self.fmt.record_bytes, self.device).view(used, -1) if used else self.pages[:0].clone()
        self.pages = torch.index_select(self.pages, 0, keep, out=pages)
        self.summaries = {name: x.index_select(0, keep) for name, x in self.summaries.items()}
        self.refcount = torch.nn.functional.pad(self.refcount.index_select(0, keep), (0, 1))
        table = self.block_table
        self.block_table = torch.where(table >= 0, new_id[table.clamp_min(0)], -1)
        self.rebuild_free_stack()
        return 0

    def _resize(self, num_pages: int) -> None:
        old, self.pages = self.pages, aligned_bytes(num_pages * self.fmt.record_bytes, self.device).view(num_pages, -1)
        self.pages[: old.shape[0]] = old
        for name, x in self.summaries.items():
            self.summaries[name] = torch.cat([x, x.new_zeros(num_pages - old.shape[0], *x.shape[1:])])
        added = torch.arange(old.shape[0], num_pages, dtype=torch.int32, device=self.device)
        self.refcount = torch.nn.functional.pad(self.refcount, (0, added.numel()))
        # New ids go on top of the live part of the stack: a host sync is avoided by writing them at free_top on the device.
        self.free_stack = torch.nn.functional.pad(self.free_stack, (0, added.numel()))
        self.free_stack.index_copy_(0, self.free_top + torch.arange(added.numel(), device=self.device), added.flip(0))
        self.free_top += added.numel()

    def rebuild_free_stack(self) -> None:
        """Derive the free stack from the reference counts. Sync: none."""
        used = self.refcount[:-1] > 0
        for name in self.cleared:
            self.summaries[name].masked_fill_(~used.view(-1, *[1] * (self.summaries[name].dim() - 1)), 0)
        self.free_stack = torch.nn.functional.pad(torch.argsort(used.to(torch.int8), stable=True).to(torch.int32), (0, 1))
        self.free_top.copy_(self.num_pages - used.sum())

    # ---- device side: from attend down ---------------------------------------------------------------------------------------

    @property
    def positions(self) -> Tensor:
        """[P, page_size] int32 view: the stored position of every slot; anything where no entry is."""
        return ops.positions(self.pages, self.fmt)

    def append(
        self,
        rows: Tensor,
        shard: Tensor | None,
        here: Tensor,
        positions: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        one_per_row: bool,
        may_open: bool,
        all_valid: bool,
    ) -> Tensor:
        """Store the entries of this rank's shards.

        Args:
            rows: [N] int64 request rows, ascending. shard: [N] int64 local shard (any value where not here), or None: there is one shard.
            here: [N] bool, stored on this rank; False = padding or another rank's. positions: [N] int32.
            k: [N, Hkv, Dk]; v: [N, Hkv, Dv], not read in a latent layer.
            one_per_row: no row has two tokens (decode), so an entry's index is its row's count.
            may_open: some entry may need a new page; all_valid: here is True throughout. Both known on the host, both only save work.

        Returns: slot_mapping [N] int32, page * page_size + offset, -1 = not stored here. Sync: none; shapes depend on N only.
        """
        slot_mapping, tables = ops.assign_slots(
            self.counts, self.block_table, self.free_stack, self.free_top, self.refcount, rows, shard, None if all_valid else here,
            page_size=self.page_size, one_per_row=one_per_row, may_open=may_open,
        )  # fmt: skip
        ops.append(
            self.pages, self.fmt, k.contiguous(), v.contiguous(), positions, slot_mapping,
            tail=self.tail, tail_rows=None if self.tail is None else tables,
        )  # fmt: skip
        return slot_mapping
