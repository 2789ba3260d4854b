"""Pages: allocator, tables, forks, what leaves, rows, parked rows."""

# ruff: noqa: E501 - a table: one mutant, one row

from tests.mutants.mutant import Place, planted
from tests.mutants.operators import edits

ALLOCATOR = Place(file="pikv_ds/pages/allocator.py", tests=("tests/pages/test_allocator.py", "tests/pages/test_pool.py"))
TABLE = Place(
    file="pikv_ds/pages/table.py",
    tests=("tests/pages/test_table.py", "tests/pages/test_pool.py", "tests/pages/test_recycle.py", "tests/pages/test_counters.py"),
)
RECYCLE = Place(
    file="pikv_ds/pages/recycle.py",
    tests=("tests/pages/test_recycle.py", "tests/pages/test_tails.py", "tests/pages/test_events.py", "tests/cache/test_single_rank.py"),
)
CROPS = Place(file="pikv_ds/pages/crops.py", tests=("tests/cache/test_single_rank.py", "tests/retention/test_evict.py"))
ROWS = Place(file="pikv_ds/pages/rows.py", tests=("tests/pages/test_rows.py",))
PARKED = Place(file="pikv_ds/pages/parked.py", tests=("tests/pages/test_parked.py",))
POOL = Place(
    file="pikv_ds/pages/pool.py", tests=("tests/pages/test_pool.py", "tests/pages/test_counters.py", "tests/cache/test_single_rank.py")
)
SIZING = Place(file="pikv_ds/pages/sizing.py", tests=("tests/pages/test_sizing.py",))

MUTANTS = [
    planted(ALLOCATOR, "freed page is taken twice", "the stack is not popped", "        self.free_top -= count\n", "        pass\n"),
    planted(ALLOCATOR, "count of uses lost", "a page for several tables counts for one", "uses.to(torch.int32) if isinstance(uses, Tensor) else uses", "1"),
    planted(ALLOCATOR, "shared once", "a fork adds no use", "torch.ones_like(ids, dtype=torch.int32))", "torch.zeros_like(ids, dtype=torch.int32))"),
    planted(ALLOCATOR, "freed pages stay used", "release does not derive the stack", "        self._freed(before & ~self.used)\n        self._restack()\n\n    def recount", "        self._freed(before & ~self.used)\n\n    def recount"),
    planted(ALLOCATOR, "used pages are free", "the stack lists used pages first", "torch.argsort(used.to(torch.int8), stable=True)", "torch.argsort((~used).to(torch.int8), stable=True)"),
    planted(ALLOCATOR, "compact reorders", "holes are kept, pages dropped", "descending=True, stable=True)[:count]", "descending=False, stable=True)[:count]"),
    planted(ALLOCATOR, "new ids off by one", "a slab's first id is in use", "torch.arange(self.num_pages, self.num_pages + count,", "torch.arange(self.num_pages - 1, self.num_pages + count - 1,"),
    planted(ALLOCATOR, "not told of freed", "who counts per page is not told", "        before = self.used\n        self.refcount.copy_", "        before = torch.zeros_like(self.used)\n        self.refcount.copy_"),
    planted(RECYCLE, "window off by one", "a page leaves one token early", "gone = last <= (at - window)", "gone = last <= (at - window + 1)"),
    planted(RECYCLE, "window late by one", "a page leaves one token late", "gone = last <= (at - window)", "gone = last < (at - window)"),
    planted(RECYCLE, "first position decides", "not the last position of a page", "pool.positions[:, -1][table.ids", "pool.positions[:, 0][table.ids"),
    planted(RECYCLE, "stale counts", "dropped entries are still counted", "    table.counts -= gone.sum(-1) * pool.page_size\n", ""),
    planted(RECYCLE, "dropped pages leak", "nobody gives them back", "    pool.allocator.release(before, gone)\n", ""),
    planted(RECYCLE, "released by new ids", "pages that stay are released", "pool.allocator.release(before, gone)", "pool.allocator.release(table.ids, gone)"),
    planted(RECYCLE, "open pages shared", "two rows write to one page", "    _unshare_open_pages(pool)\n\n\ndef", "\n\ndef"),
    planted(RECYCLE, "summary not copied", "a copied page has a stale summary", "        summary[target.long()] = summary[source]\n", "        pass\n"),
    planted(RECYCLE, "copy not named", "the table still names the shared page", "    table.ids[row[copies], at[copies], last[copies]] = target\n", ""),
    planted(RECYCLE, "source not unshared", "a copied page keeps a use too many", "    pool.allocator.unshare(source)\n", ""),
    planted(RECYCLE, "events not told", "watchers miss a copy", "copied=True))", "copied=False))"),
    planted(RECYCLE, "first writer copies", "all writers copy", "copies = (index != first) | (writers < refcount[page])", "copies = index == first"),
    planted(RECYCLE, "readers forgotten", "a full-page reader is overwritten", "(index != first) | (writers < refcount[page])", "(index != first)"),
    planted(RECYCLE, "tail of another row", "tails do not follow rows", "[source].flatten(0, 1))", "[source.flip(0)].flatten(0, 1))"),
    planted(TABLE, "fork keeps too few", "a partly filled page is dropped", "(counts + page_size - 1) // page_size", "counts // page_size"),
    planted(TABLE, "fork of the wrong parent", "row 0 for all", "self.ids[source], -1)", "self.ids[source * 0], -1)"),
    planted(TABLE, "spare column used", "no spare column", "width = pages + 1 + pages // GROWTH", "width = max(pages, 1)"),
    planted(TABLE, "close up to the right", "gaps stay", "stays_first = gone.to(torch.int8).argsort(dim=-1, stable=True)", "stays_first = gone.to(torch.int8).argsort(dim=-1, descending=True, stable=True)"),
    planted(TABLE, "parked ids stale", "parked rows keep old page ids", "for ids in (self.ids, self.parked))", "for ids in (self.ids, self.ids))"),
    planted(TABLE, "parked not joined", "parked rows are lost in a change", "torch.cat(ids) if len(self.parked) else ids[0]", "ids[0]"),
    planted(TABLE, "counted moves not", "counters keep their places", "            torch.gather(torch.where(gone, 0, x), -1, stays_first, out=x)\n", "            pass\n"),
    planted(CROPS, "behind a window", "a crop too far is allowed", "if self.windows and keep < expired_at and", "if self.windows and keep < expired_at - 3 and"),
    planted(CROPS, "behind an eviction", "a crop too far is allowed", "        if keep < evicted_at:\n", "        if keep < evicted_at - 2:\n"),
    planted(CROPS, "margin forgotten", "an announced crop is refused", "max(expired_at, n - margin)", "max(expired_at, n)"),
    planted(ROWS, "new rows inherit", "state of a new row is row 0's", ".view(-1, *[1] * (x.dim() - 1 - dim)), 0)", ".view(-1, *[1] * (x.dim() - 1 - dim)) & False, 0)"),
    planted(ROWS, "checks after", "a refusal is not asked for", "        for limit in self._limits:\n            limit(change)\n", "        pass\n"),
    planted(ROWS, "least is most", "a crop leaves more than there is", "    return min(value, keep)\n", "    return max(value, keep)\n"),
    planted(ROWS, "forgets nothing", "", "def forgets(value: int, keep: int, shared: bool) -> int:\n    return 0", "def forgets(value: int, keep: int, shared: bool) -> int:\n    return value"),
    planted(ROWS, "empty rows keep", "a row cut to nothing keeps its state", "if self.empties and not all(change.keep):", "if False:"),
    planted(PARKED, "counts shared", "parked counts are the active ones'", "self.counts = [x[:, active:].clone() for x in pages.counts]", "self.counts = [x[:, : x.shape[1] - active].clone() for x in pages.counts]"),
    planted(PARKED, "homes stay", "the directory does not split", "        pages.directory.split(active, keep)\n", ""),
    planted(PARKED, "tails lost", "tails of parked rows are not kept", "                    self._tails[i, level], pool.tail = pool.tail[at:].clone(), pool.tail[:at].clone()\n", "                    pool.tail = pool.tail[:at].clone()\n"),
    planted(PARKED, "too few pages", "a parked table is cut short", "return -(-int(counts.max()) // pool.page_size)", "return int(counts.max()) // pool.page_size"),
    planted(POOL, "grow loses pages", "old records are not copied", "        self.pages[: old.shape[0]] = old\n", ""),
    planted(POOL, "shrink keeps order of ids", "records do not move with their ids", "torch.index_select(self.pages, 0, keep, out=pages)", "torch.index_select(self.pages, 0, torch.arange(used), out=pages)"),
    planted(POOL, "summaries stay", "summaries do not move with their pages", "self.summaries = {name: x.index_select(0, keep) for", "self.summaries = {name: x[:used] for"),
    planted(POOL, "tables stay", "tables name old ids", "        self.table.renumber(new_id)\n", ""),
    planted(POOL, "watchers not told", "of pages that moved down", "        for tell in self.events.moved:\n", "        for tell in ():\n"),
    planted(POOL, "before is now", "queries see what is stored by their own forward", "torch.where(own_visible.unsqueeze(-1), seqlens, before.counts[rows])", "seqlens"),
    planted(POOL, "tail counted not", "bytes without raw tails", "self.pages.nbytes + tail + sum", "self.pages.nbytes + sum"),
    planted(POOL, "counters of freed pages", "a reused page has an old count", "            self.summaries[name].masked_fill_(gone, 0)\n", "            pass\n"),
    *edits(ALLOCATOR, ("PageAllocator.missing", "PageAllocator.wasteful", "PageAllocator.add", "PageAllocator.compact", "PageAllocator._restack")),
    *edits(TABLE, ("PageTable.numbers", "PageTable.widen", "PageTable.fork", "PageTable.join")),
    *edits(RECYCLE, ("expire", "drop", "_unshare_open_pages", "_fork_tail")),
    *edits(SIZING, ("default_capacity", "shard_capacity", "pages_to_open", "held_pages")),
    *edits(ROWS, ("RowChange.of", "IntColumn.change")),
]  # fmt: skip
