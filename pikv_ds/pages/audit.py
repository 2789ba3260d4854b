"""Whether the tables of a pool and its allocator still agree: for debugging, after every forward (storage.audit). Reads everything back."""

from __future__ import annotations

import torch

from pikv_ds.errors import CorruptedError

from .layers import RankPages
from .pool import PagePool


def audit(pages: RankPages) -> None:
    """Raises: CorruptedError with layer, pool and what does not hold: pages in tables + free pages = all pages, each in as many tables as
    its count of uses says, tables as long as their entries. Sync: reads tables and counts of all pools."""
    for layer in pages.layers:
        for level, pool in enumerate(layer.pools):
            found = _wrong(pool)
            if found is not None:
                raise CorruptedError(
                    f"rank {pages.map.rank}: layer {layer.index}, pool {level} ({pool.fmt.name}): {found}. Entries of this cache can't be "
                    f"trusted any more; reset it on all ranks. It was looked at because pikv.storage.audit = true"
                )


def _wrong(pool: PagePool) -> str | None:
    table, allocator = pool.table, pool.allocator
    ids, counts = table.ids, table.counts
    columns = torch.arange(table.width, device=ids.device)
    used = columns < ((counts + pool.page_size - 1) // pool.page_size).unsqueeze(-1)
    if table.width and not torch.equal(ids >= 0, used):
        row, of_row, column = torch.nonzero((ids >= 0) != used)[0].tolist()
        return (
            f"table {of_row} of row {row} has {int(counts[row, of_row])} entries and the page {int(ids[row, of_row, column])} at {column}"
        )
    names = torch.cat([ids.flatten(), table.parked.flatten()])
    names = names[names >= 0]
    if len(names) and int(names.max()) >= pool.num_pages:
        return f"a table names page {int(names.max())} of {pool.num_pages}"
    uses, said = torch.bincount(names, minlength=pool.num_pages), allocator.refcount[:-1]
    if not torch.equal(uses.to(said.dtype), said):
        page = int(torch.nonzero(uses != said)[0])
        return f"page {page} is in {int(uses[page])} tables and its count of uses is {int(said[page])}"
    top = int(allocator.free_top)
    free = allocator.free_stack[:top].sort().values
    if top != pool.num_pages - int((said > 0).sum()) or not torch.equal(free.long(), torch.nonzero(said == 0).flatten()):
        return f"{top} pages are on the free stack, and {int((said == 0).sum())} of {pool.num_pages} are in no table"
    return None
