"""The paged store of one layer on one rank: slabs of pages, the block table of its shards, device-side slot allocation.

R request rows, S local shards, P pages. One flat slot array per field; page p owns slots p * page_size ... The slot after the last page
is the dump slot: writes with slot_mapping -1 land there, so that no write needs a data-dependent shape.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .slots import entry_index
from .spec import LayerSpec

GROWTH = 8  # pages are added in slabs of at least P // GROWTH, and given back once more than that share is free


class LayerStore:
    """Owns the KV memory of one layer on this rank. `counts` and `free_top` are views into tensors that the cache reads once per step."""

    def __init__(
        self, spec: LayerSpec, codec, page_size: int, dtype: torch.dtype, device: torch.device, counts: Tensor, free_top: Tensor
    ) -> None:
        self.spec = spec
        self.page_size = page_size
        self.device = device
        self.counts = counts  # [R, S] int64, entries per row and local shard, expired pages not included
        self.free_top = free_top  # 0-d int64, pages on the free stack
        self.codec = codec
        self.num_pages = 0
        self.fields = {
            name: torch.empty(1, *shape, dtype=field_dtype, device=device)
            for name, (shape, field_dtype) in codec.fields(spec.num_kv_heads, spec.k_dim, spec.stored_v_dim, dtype).items()
        }
        self.positions = torch.full((1,), -1, dtype=torch.int32, device=device)
        # One spare element each, never read as a page: tokens that open no page index it.
        self.refcount = torch.zeros(1, dtype=torch.int64, device=device)  # [P + 1] tables that name a page; > 1 after a beam fork
        self.free_stack = torch.zeros(1, dtype=torch.int64, device=device)  # [P + 1] free page ids, free_top of them valid
        self.block_table = torch.full((*counts.shape, 0), -1, dtype=torch.int64, device=device)  # [R, S, max_pages]

    # ---- host side: sizes ----------------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Allocated bytes of every field and of the stored positions, dump slot included."""
        return self.positions.nbytes + sum(f.nbytes for f in self.fields.values())

    @property
    def metadata_nbytes(self) -> int:
        return self.block_table.nbytes + self.free_stack.nbytes + self.refcount.nbytes

    @property
    def bytes_per_slot(self) -> int:
        return self.nbytes // (self.num_pages * self.page_size + 1)

    def reserve(self, free_pages: int, needed: int, table_width: int) -> None:
        """Make sure that `needed` pages can be taken from the stack, of which `free_pages` are there, and widen the tables.

        Host side, before the step's collectives; no sync. Growing copies the layer once; the slab is max(needed, P // 8) pages.
        """
        if needed > free_pages:
            self._resize(self.num_pages + max(needed - free_pages, self.num_pages // GROWTH))
        if table_width >= self.block_table.shape[-1]:  # the last column stays unused: append parks its idle writes there
            width = table_width + 1 + table_width // GROWTH
            self.block_table = torch.nn.functional.pad(self.block_table, (0, width - self.block_table.shape[-1]), value=-1)

    def shrink(self, free_pages: int) -> int:
        """Give slabs back when more than an eighth of the pages is free: pages move down into the holes. Returns the free pages left."""
        used = self.num_pages - free_pages
        if free_pages <= 1 + used // GROWTH:
            return free_pages
        taken = self.refcount[:-1] > 0
        new_id = torch.cumsum(taken, 0) - 1  # order-preserving: page p moves to new_id[p]
        keep = torch.nonzero(taken).squeeze(-1)
        for name in self.fields:
            self.fields[name] = self._flat(self.pages(name).index_select(0, keep))
        self.positions = self._flat(self.position_pages.index_select(0, keep))
        self.refcount = torch.nn.functional.pad(self.refcount.index_select(0, keep), (0, 1))
        table = self.block_table
        self.block_table = torch.where(table >= 0, new_id[table.clamp_min(0)], -1)
        self.num_pages = used
        self.rebuild_free_stack()
        return 0

    def _flat(self, pages: Tensor) -> Tensor:
        return torch.cat([pages.flatten(0, 1), pages.new_zeros(1, *pages.shape[2:])])

    def _resize(self, num_pages: int) -> None:
        old, new = self.num_pages * self.page_size, num_pages * self.page_size
        for name, flat in [*self.fields.items(), ("", self.positions)]:
            grown = flat.new_empty(new + 1, *flat.shape[1:])
            grown[:old] = flat[:old]
            if name:
                self.fields[name] = grown
            else:
                self.positions = grown
        self.refcount = torch.nn.functional.pad(self.refcount, (0, num_pages - self.num_pages))
        # New ids go on top of the live part of the stack: a host sync is avoided by writing them at free_top on the device.
        added = torch.arange(self.num_pages, num_pages, device=self.device)
        self.free_stack = torch.nn.functional.pad(self.free_stack, (0, added.numel()))
        self.free_stack.index_copy_(0, self.free_top + torch.arange(added.numel(), device=self.device), added.flip(0))
        self.free_top += added.numel()
        self.num_pages = num_pages

    def rebuild_free_stack(self) -> None:
        """Derive the free stack from the reference counts. Sync: none."""
        used = self.refcount[:-1] > 0
        self.free_stack = torch.nn.functional.pad(torch.argsort(used.to(torch.int8), stable=True), (0, 1))
        self.free_top.copy_(self.num_pages - used.sum())

    # ---- device side: from attend down ---------------------------------------------------------------------------------------

    def pages(self, name: str) -> Tensor:
        """A field as [P, page_size, ...], without the dump slot."""
        return self.fields[name][:-1].view(self.num_pages, self.page_size, *self.fields[name].shape[1:])

    @property
    def position_pages(self) -> Tensor:
        return self.positions[:-1].view(self.num_pages, self.page_size)

    def append(
        self, rows: Tensor, shard: Tensor | None, here: Tensor, positions: Tensor, k: Tensor, v: Tensor, *,
        one_per_row: bool, may_open: bool, all_valid: bool,
    ) -> Tensor:
        """Store the entries of this rank's shards.

        Args:
            rows: [N] int64 request rows, ascending. shard: [N] int64 local shard (any value where not here), or None: there is one shard.
            here: [N] bool, stored on this rank; False = padding or another rank's. positions: [N] int32.
            k: [N, Hkv, Dk]; v: [N, Hkv, Dv], Dv = 0 in a latent layer.
            one_per_row: no row has two tokens (decode), so an entry's index is its row's count.
            may_open: some entry may need a new page; all_valid: here is True throughout. Both known on the host, both only save work.

        Returns: slot_mapping [N] int64, page * page_size + offset, -1 = not stored here. Sync: none; shapes depend on N only.
        """
        num_shards, width = self.block_table.shape[1:]
        column = None if shard is None else torch.where(here, shard, 0)
        cell = rows if shard is None else rows * num_shards + column  # [N] index of (row, shard)
        index = self.counts.view(-1)[cell] if one_per_row else entry_index(rows, column, here, self.counts)
        index = index if one_per_row or all_valid else index.clamp_min(0)
        offset = index % self.page_size
        entry = cell * width + torch.div(index, self.page_size, rounding_mode="floor")  # [N] index into the flat block table
        table = self.block_table.view(-1)
        if may_open:
            self._open_pages(table, entry, (offset == 0) & here)
        self.counts.view(-1).index_add_(0, cell, here.to(torch.int64))
        slot_mapping = table[entry] * self.page_size + offset
        if not all_valid:
            slot_mapping = torch.where(here, slot_mapping, -1)
        self._write(slot_mapping if all_valid else torch.where(here, slot_mapping, self.num_pages * self.page_size), positions, k, v)
        return slot_mapping

    def _open_pages(self, table: Tensor, entry: Tensor, opens: Tensor) -> None:
        """Pop one page per token that starts one. Tokens that start none park a -1 in the last column, which reserve() keeps unused."""
        page = self.free_stack[torch.where(opens, self.free_top - opens.cumsum(0), self.num_pages)]
        table.index_put_((torch.where(opens, entry, table.numel() - 1),), torch.where(opens, page, -1))
        self.refcount.index_add_(0, torch.where(opens, page, self.num_pages), opens.to(torch.int64))
        self.free_top -= opens.sum()

    def _write(self, target: Tensor, positions: Tensor, k: Tensor, v: Tensor) -> None:
        for name, value in self.codec.encode(k, v).items():
            self.fields[name].index_copy_(0, target, value)
        self.positions.index_copy_(0, target, positions)
