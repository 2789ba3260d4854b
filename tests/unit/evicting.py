"""A Driver whose cache evicts, beside an oracle in plain loops and float64: who is kept, what attention over the kept entries gives."""

import itertools
import math
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from pikv_ds.cache.stats import stats
from pikv_ds.pages.entries import decoded, read_back
from pikv_ds.pages.pool import LayerStore
from tests.unit.driver import Driver, dense_over, rel_error
from tests.unit.invariants import check_pages, check_unshared, slots_of
from tests.unit.stores import stored


@dataclass
class Page:
    positions: list[int] = field(default_factory=list)
    shares: list[tuple[int, float, float, int]] = field(default_factory=list)  # (query column, share, fair share, forward)


class EvictingDriver(Driver):
    """score(page, driver, layer, row) -> number is the oracle's policy; budgets and pins come from the scheduling block.

    score None: the oracle takes over what the store kept, as long as budget and pins are honoured and only whole pages went.
    """

    def __init__(self, layers, score, scheduling: dict, **options) -> None:
        self.score, self.scheduling = score, {"sink_tokens": 4, "recent_tokens": 64, "interval": 1, "prefill": "evict"} | scheduling
        super().__init__(layers, scheduling=scheduling, **options)

    def new_generation(self) -> None:
        super().new_generation()
        self.tables: list[list[list[list[Page]]]] = []  # [layer][row][shard] -> pages
        self.evicted, self.columns, self.forwards, self.since, self.waits = 0, 0, 0, 0, False
        self.queries: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # (layer, row) -> last query [Hq, D], its lse [Hq]

    def select(self, index: list[int]) -> None:
        super().select(index)
        self.tables = [[[[Page(list(p.positions), p.shares) for p in shard] for shard in rows[i]] for i in index] for rows in self.tables]

    def crop(self, keep: list[int]) -> None:
        super().crop(keep)
        for rows in self.tables:
            for row, n in zip(rows, keep, strict=True):
                for shard in row:
                    for page in shard:
                        page.positions = [p for p in page.positions if p < n]
                    shard[:] = [page for page in shard if page.positions]

    def forward(self, mask: Tensor) -> list:
        if self.fresh:
            self.tables = [[[[] for _ in range(self.cache.num_shards)] for _ in mask] for _ in self.layers]
        self.staged: list[tuple[int, int, list[int]]] = []
        self.evict_late(mask)
        outputs = super().forward(mask)
        for entries in self.staged:
            self._append(*entries)
        self.columns, self.forwards = self.columns + mask.shape[1], self.forwards + 1
        decode = mask.shape[1] == 1
        self.since = self.since + 1 if decode else 0
        if not (decode and self.since % self.scheduling["interval"]):
            self.waits = self.cache.hold_margin is not None or (self.scheduling["prefill"] == "keep" and not decode)
            if not self.waits:
                self.evict()
        check_evicting(self)
        return outputs

    def evict_late(self, mask: Tensor) -> None:
        """What waited for a crop, or for the end of the prompt, goes before this forward."""
        if self.waits and (mask.shape[1] == 1 or self.scheduling["prefill"] == "evict"):
            self.evict()
            self.waits = False

    def kept(self, i: int, row: int) -> list[int]:
        return sorted(p for shard in self.tables[i][row] for page in shard for p in page.positions)

    def budget(self, i: int, row: int) -> int:
        return self.scheduling["budget_tokens"]

    def evict(self) -> None:
        if self.score is None:
            self._take_over()
            return
        size = self.cache.page_size
        for i, spec in enumerate(self.layers):
            for row, length in enumerate(self.lens) if spec.window is None else ():
                num_pages = -(-(len(self.kept(i, row)) - self.budget(i, row)) // size)
                free = [
                    (self.score(page, self, i, row), page.positions[-1], shard, page)
                    for shard in self.tables[i][row]
                    for page in shard
                    if num_pages > 0
                    and len(page.positions) == size
                    and page.positions[0] >= self.scheduling["sink_tokens"]
                    and page.positions[-1] < length - self.scheduling["recent_tokens"]
                ]
                for *_, shard, page in sorted(free, key=lambda entry: entry[:2])[: max(num_pages, 0)]:
                    shard.remove(page)
                    self.evicted += size

    def _take_over(self) -> None:
        for i, spec in enumerate(self.layers):
            store = self.cache.tables.stores[i]
            for row, length in enumerate(self.lens) if spec.window is None else ():
                before = self.kept(i, row)
                for shard, pages in enumerate(self.tables[i][row]):
                    held = set(stored(store, slots_of(store, row, shard))[2].tolist())
                    self.evicted += sum(len(page.positions) for page in pages if not held & set(page.positions))
                    pages[:] = [page for page in pages if held & set(page.positions)]
                kept = self.kept(i, row)
                assert len(kept) <= max(self.budget(i, row), 0), f"layer {i}, row {row}: over the budget"
                pinned = [p for p in before if p < self.scheduling["sink_tokens"] or p >= length - self.scheduling["recent_tokens"]]
                assert set(pinned) <= set(kept), f"layer {i}, row {row}: pinned entries are gone"

    def _compare(self, i: int, q: Tensor, positions: Tensor, out: Tensor, lse: Tensor) -> None:
        spec, scale = self.layers[i], self._scale(q)
        for row in range(len(positions)):
            real = (positions[row] >= 0).nonzero().squeeze(-1).tolist()
            old, new = self.kept(i, row), [int(positions[row, t]) for t in real]
            if self.cache.stages:
                self.staged.append((i, row, new))
            else:
                self._append(i, row, new)
            if spec.window is not None:
                old = list(range(new[0])) if new else []
            page_of = {p: page for shard in self.tables[i][row] for page in shard for p in page.positions}
            entries = old + new
            for t in real:
                query, at = q[row, t], int(positions[row, t])
                visible = [p for p in entries if p <= at and (spec.window is None or p > at - spec.window)]
                want_out, want_lse, share = self._attention(i, row, t, query, visible, scale)
                assert rel_error(out[row, t], want_out) <= self.tolerance, f"layer {i}, row {row}, position {at}: out"
                assert rel_error(lse[row, t], want_lse) <= self.tolerance, f"layer {i}, row {row}, position {at}: lse"
                if spec.window is None and not self.cache.stages:
                    # Queries of a row count from the right edge of their forward.
                    column, fair = self.columns + positions.shape[1] - len(real) + real.index(t), self.cache.page_size / len(entries)
                    got: dict[int, float] = {}
                    for p, x in zip(visible, share.mean(0).tolist(), strict=True):
                        got[id(page_of[p])] = got.get(id(page_of[p]), 0.0) + x
                    for page in {id(page): page for page in page_of.values()}.values():
                        page.shares.append((column, got.get(id(page), 0.0), fair, self.forwards))
                self.queries[i, row] = query, want_lse

    def _attention(self, i: int, row: int, t: int, query: Tensor, visible: list[int], scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """Of the query in column t to what it may see: out [Hq, Dv], lse [Hq], share [Hq, len(visible)]."""
        return dense_over(query, [self.history[i][row][p] for p in visible], scale)

    def _append(self, i: int, row: int, new: list[int]) -> None:
        for p in new:
            directory = self.cache.tables.directory
            shard = self.tables[i][row][int(directory.shard_at[i][row, p]) if directory.num_shards > 1 else 0]
            if not shard or len(shard[-1].positions) == self.cache.page_size:
                shard.append(Page())
            shard[-1].positions.append(p)


def entries_of(store: LayerStore, row: int, shard: int) -> tuple[Tensor, Tensor, Tensor]:
    """k [n, Hkv, Dk], v [n, Hkv, Dv] and positions [n] of a table, as attention reads them."""
    slots = slots_of(store, row, shard)
    if store.fmt.raw and store.turned is None:
        return stored(store, slots)
    if store.turned is not None:  # what the coefficients stand for
        tail_rows = torch.arange(store.counts.numel()).view_as(store.counts)[row : row + 1, shard : shard + 1]
        at = (slice(row, row + 1), slice(shard, shard + 1))
        k, v = read_back(store, store.block_table[at], store.counts[at], tail_rows)
        return *(x[0, :, : len(slots)].transpose(0, 1) for x in (k, v)), store.positions.flatten()[slots.long()]
    tail = store.tail
    if tail is not None:
        tail = None if store.full_pages else tail.view(*store.counts.shape, *tail.shape[1:])[row, shard].unsqueeze(0)
    k, v = decoded(store, store.block_table[row, shard].unsqueeze(0), store.counts[row, shard].view(1), tail)
    return *(x[0, :, : len(slots)].transpose(0, 1) for x in (k, v)), store.positions.flatten()[slots.long()]


def check_evicting(driver: EvictingDriver) -> None:
    """What the store holds is what the oracle keeps; every entry appended is live, expired, evicted or cropped; loads, bytes, pages."""
    tables = driver.cache.tables
    for i, (spec, store) in enumerate(zip(driver.layers, tables.stores, strict=True)):
        check_pages(store)
        check_unshared(store)
        for row in range(len(driver.lens)) if spec.window is None else ():
            for shard, pages in enumerate(driver.tables[i][row]):
                k, v, positions = entries_of(store, row, shard)
                want = [p for page in pages for p in page.positions]
                assert positions.tolist() == want, f"layer {i}, row {row}, shard {shard}"
                if want:
                    entries = [driver.history[i][row][p] for p in want]
                    same = torch.equal if store.turned is None else partial(torch.allclose, atol=2e-5)
                    assert same(k, torch.stack([e[0] for e in entries])) and (spec.latent or same(v, torch.stack([e[1] for e in entries])))
        if spec.window is None and driver.cache.num_shards > 1:
            loads = [sum(len(page.positions) for row in driver.tables[i] for page in row[s]) for s in range(driver.cache.num_shards)]
            assert tables.directory.load[i].tolist() == loads, f"layer {i}: load"
    numbers = stats(driver.cache, 1, 1)
    names = ("live", "expired", "evicted", "cropped", "appended", "forked")
    live, expired, evicted, cropped, appended, forked = (numbers[f"entries_{name}"] for name in names)
    assert live + expired + evicted + cropped == appended + forked
    assert forked or evicted == driver.evicted
    held = [t for s in tables.stores for t in (s.pages, s.tail, *s.summaries.values()) if t is not None]
    assert numbers["kv_bytes_allocated"] == sum(t.untyped_storage().nbytes() for t in held)


# ---- the policies, in loops: (page, driver, layer, row) -> score ------------------------------------------------------------


def last_position(page: Page, *_) -> float:
    return page.positions[-1]


def accumulated(page: Page, *_) -> float:
    return math.fsum(share for _, share, _, _ in page.shares)


def last_query(page: Page, *_) -> float:
    return page.shares[-1][1]


def uses(page: Page) -> list[int]:
    return [column + 1 for column, share, fair, _ in page.shares if share >= fair]


def last_use(page: Page, *_) -> float:
    return max(uses(page), default=0)


def last_and_frequent_use(page: Page, *_) -> float:
    return last_use(page) + len(uses(page))


def features(page: Page, driver: EvictingDriver, *_) -> float:
    asked = sum(share > 0 for _, share, _, _ in page.shares)
    attention = math.fsum(share / fair for _, share, fair, _ in page.shares) / asked
    return attention + 2 ** ((last_use(page) - driver.columns) / 64) + len(uses(page)) / asked


def fading(page: Page, window: int) -> float:
    total = 0.0
    for _, group in itertools.groupby(page.shares, lambda seen: seen[3]):
        shares = [share for _, share, _, _ in group]
        total = total * max(0, 1 - len(shares) / window) + math.fsum(shares[-window:])
    return total


def observed(page: Page, driver: EvictingDriver, i: int, row: int, window: int = 3, kernel: int = 5) -> float:
    """SnapKV with a window of 3: pooled over 5 pages of one entry, not pooled over larger ones."""
    if driver.cache.page_size > 1:
        kernel = 1
    pages = next(shard for shard in driver.tables[i][row] if page in shard)
    at = pages.index(page)
    beside = pages[max(0, at - kernel // 2) : at + kernel // 2 + 1]
    return math.fsum(fading(p, window) for p in beside if p.positions[-1] < driver.lens[row] - window) / kernel


def bound(page: Page, driver: EvictingDriver, i: int, row: int) -> float:
    (query, lse), spec = driver.queries[i, row], driver.layers[i]
    group, total = query.shape[0] // spec.num_kv_heads, 0.0
    for head in range(query.shape[0]):
        keys = torch.stack([driver.history[i][row][p][0][head // group] for p in page.positions]).double()
        lo, hi = keys.amin(0), keys.amax(0)
        q = query[head].double() * driver._scale(query)
        total += math.exp(float(torch.maximum(q * lo, q * hi).sum() - lse[head]))
    return total


def short_keys(page: Page, driver: EvictingDriver, i: int, row: int) -> float:
    return -math.fsum(float(driver.history[i][row][p][0].double().norm(dim=-1).mean()) for p in page.positions)
