"""The check of what a cache evicts: an oracle in plain loops and float64, and the policies as loops."""

import itertools
import math
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from pikv_ds.cache.stats import stats
from tests.harness.checks import Check
from tests.harness.dense import dense_over, rel_error
from tests.harness.driver import Driver
from tests.harness.invariants import check_pages, check_unshared


@dataclass
class Page:
    positions: list[int] = field(default_factory=list)
    shares: list[tuple[int, float, float, int]] = field(default_factory=list)  # (query of the row, share, fair share, forward)


class AllPages:
    """What queries see of the kept entries: everything. Reads that leave pages out answer otherwise (test_evict_routed.py)."""

    def opened(self, driver: Driver) -> None:
        self.driver = driver

    def layer(self, i: int, positions: Tensor) -> None:
        """The answers of a layer come."""

    def attention(self, i: int, row: int, t: int, query: Tensor, visible: list[int], scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """Of the query in column t to what it may see: out [Hq, Dv], lse [Hq], share [Hq, len(visible)]."""
        return dense_over(query, [self.driver.history[i][row][p] for p in visible], scale)


class Kept(Check):
    """An oracle in plain loops and float64: who is kept, what attention over the kept entries gives; and that pages and numbers agree.

    score(page, kept, layer, row) -> number is the oracle's policy; budgets and pins come from the scheduling block. None: the oracle takes
    over what the cache kept, as long as budget and pins are honoured and only whole pages went.
    """

    def __init__(self, score, scheduling: dict, reads: AllPages | None = None) -> None:
        self.score, self.scheduling, self.reads = score, scheduling, reads or AllPages()

    def opened(self, driver: Driver) -> None:
        super().opened(driver)
        self.reads.opened(driver)

    def generation(self) -> None:
        self.held: list[list[list[list[Page]]]] = []  # [layer][row][shard] -> pages
        self.evicted, self.forwards, self.since, self.waits = 0, 0, 0, False
        self.queries: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # (layer, row) -> last query [Hq, D], its lse [Hq]

    def select(self, index: list[int]) -> None:
        self.held = [[[[Page(list(p.positions), list(p.shares)) for p in shard] for shard in rows[i]] for i in index] for rows in self.held]

    def crop(self, keep: list[int]) -> None:
        for rows in self.held:
            for row, n in zip(rows, keep, strict=True):
                for shard in row:
                    for page in shard:
                        page.positions = [p for p in page.positions if p < n]
                    shard[:] = [page for page in shard if page.positions]

    def before(self, mask: Tensor) -> None:
        """What waited for a crop, or for the end of the prompt, goes before this forward."""
        if self.driver.fresh:
            self.held = [[[[] for _ in range(self.driver.cache.num_shards)] for _ in mask] for _ in self.driver.layers]
        self.staged: list[tuple[int, int, list[int]]] = []
        if self.waits and not self.driver.cache.hold_margin and (mask.shape[1] == 1 or self.scheduling["prefill"] == "evict"):
            self.evict()
            self.waits = False

    def after(self, mask: Tensor) -> None:
        for entries in self.staged:
            self._append(*entries)
        self.forwards += 1
        decode = mask.shape[1] == 1
        self.since = self.since + 1 if decode else 0
        if not (decode and self.since % self.scheduling["interval"]):
            self.waits = self.driver.crops_announced or (self.scheduling["prefill"] == "keep" and not decode)
            if not self.waits:
                self.evict()
        self.compare_pages()
        self.compare_numbers()

    def kept(self, i: int, row: int) -> list[int]:
        return sorted(p for shard in self.held[i][row] for page in shard for p in page.positions)

    def evict(self) -> None:
        size, budget = self.driver.cache.page_size, self.scheduling["budget_tokens"]
        for i, spec in enumerate(self.driver.layers):
            for row, length in enumerate(self.driver.lens) if spec.window is None else ():
                if self.score is None:
                    self._take_over(i, row, length)
                    continue
                num_pages = -(-(len(self.kept(i, row)) - budget) // size)
                free = [
                    (self.score(page, self, i, row), page.positions[-1], shard, page)
                    for shard in self.held[i][row]
                    for page in shard
                    if num_pages > 0
                    and len(page.positions) == size
                    and page.positions[0] >= self.scheduling["sink_tokens"]
                    and page.positions[-1] < length - self.scheduling["recent_tokens"]
                ]
                for *_, shard, page in sorted(free, key=lambda entry: entry[:2])[: max(num_pages, 0)]:
                    shard.remove(page)
                    self.evicted += size

    def _take_over(self, i: int, row: int, length: int) -> None:
        before, pool = self.kept(i, row), self.driver.probe.near_pool(i)
        for shard, pages in enumerate(self.held[i][row]):
            held = set(pool.positions(row, shard))
            self.evicted += sum(len(page.positions) for page in pages if not held & set(page.positions))
            pages[:] = [page for page in pages if held & set(page.positions)]
        kept = self.kept(i, row)
        assert len(kept) <= self.scheduling["budget_tokens"], f"layer {i}, row {row}: over the budget"
        pinned = [p for p in before if p < self.scheduling["sink_tokens"] or p >= length - self.scheduling["recent_tokens"]]
        assert set(pinned) <= set(kept), f"layer {i}, row {row}: pinned entries are gone"

    def layer(self, i: int, q: Tensor, positions: Tensor, out: Tensor, lse: Tensor) -> None:
        driver, spec = self.driver, self.driver.layers[i]
        self.reads.layer(i, positions)
        for row in range(len(positions)):
            real = (positions[row] >= 0).nonzero().squeeze(-1).tolist()
            old, new = self.kept(i, row), [int(positions[row, t]) for t in real]
            if driver.cache.late_experts:
                self.staged.append((i, row, new))
            else:
                self._append(i, row, new)
            if spec.window is not None:
                old = list(range(new[0])) if new else []
            page_of = {p: page for shard in self.held[i][row] for page in shard for p in page.positions}
            entries = old + new
            for t in real:
                query, at = q[row, t], int(positions[row, t])
                visible = [p for p in entries if p <= at and (spec.window is None or p > at - spec.window)]
                want_out, want_lse, share = self.reads.attention(i, row, t, query, visible, driver.scale(q))
                assert rel_error(out[row, t], want_out) <= driver.tolerance, f"layer {i}, row {row}, position {at}: out"
                assert rel_error(lse[row, t], want_lse) <= driver.tolerance, f"layer {i}, row {row}, position {at}: lse"
                if spec.window is None and not driver.cache.late_experts:
                    self._share(page_of, dict(zip(visible, share.mean(0).tolist(), strict=True)), at, len(entries))
                self.queries[i, row] = query, want_lse

    def _share(self, page_of: dict[int, Page], shares: dict[int, float], at: int, num_entries: int) -> None:
        """Give every page its part of the attention of the row's query at a position."""
        got: dict[int, float] = {}
        for p, x in shares.items():
            got[id(page_of[p])] = got.get(id(page_of[p]), 0.0) + x
        for page in {id(page): page for page in page_of.values()}.values():
            page.shares.append((at, got.get(id(page), 0.0), self.driver.cache.page_size / num_entries, self.forwards))

    def _append(self, i: int, row: int, new: list[int]) -> None:
        homes = self.driver.probe.homes(i)
        for p in new:
            shard = self.held[i][row][int(homes[row, p])]
            if not shard or len(shard[-1].positions) == self.driver.cache.page_size:
                shard.append(Page())
            shard[-1].positions.append(p)

    def compare_pages(self) -> None:
        """What the pages hold is what the oracle keeps; loads."""
        driver, probe = self.driver, self.driver.probe
        for i, spec in enumerate(driver.layers):
            pool = probe.near_pool(i)
            check_pages(pool)
            check_unshared(pool)
            for row in range(len(driver.lens)) if spec.window is None else ():
                for shard, pages in enumerate(self.held[i][row]):
                    positions, k, v = pool.entries(row, shard)
                    want = [p for page in pages for p in page.positions]
                    assert positions.tolist() == want, f"layer {i}, row {row}, shard {shard}"
                    if want:
                        entries = [driver.history[i][row][p] for p in want]
                        same = torch.equal if not pool.holds_unrotated else partial(torch.allclose, atol=2e-5)
                        assert same(k, torch.stack([e[0] for e in entries]))
                        assert spec.latent or same(v, torch.stack([e[1] for e in entries]))
            if spec.window is None and driver.cache.num_shards > 1:
                loads = [sum(len(page.positions) for row in self.held[i] for page in row[s]) for s in range(driver.cache.num_shards)]
                assert probe.loads[i].tolist() == loads, f"layer {i}: load"

    def compare_numbers(self) -> None:
        """Every entry appended is live, expired, evicted or cropped; bytes."""
        numbers = stats(self.driver.cache, 1, 1)
        names = ("live", "expired", "evicted", "cropped", "appended", "forked")
        live, expired, evicted, cropped, appended, forked = (numbers[f"entries_{name}"] for name in names)
        assert live + expired + evicted + cropped == appended + forked
        assert forked or evicted == self.evicted
        assert numbers["kv_bytes_allocated"] == self.driver.probe.bytes


def evicting(layers, score, scheduling: dict, *, reads: AllPages | None = None, **options) -> tuple[Driver, Kept]:
    """A driver with this scheduling block, and the one check of it."""
    block = {"sink_tokens": 4, "recent_tokens": 64, "interval": 1, "prefill": "evict"} | scheduling
    kept = Kept(score, block, reads)
    return Driver(layers, scheduling=scheduling, checks=[kept], **options), kept


# ---- the policies, in loops: (page, kept, layer, row) -> score ------------------------------------------------------------


def last_position(page: Page, *_) -> float:
    return page.positions[-1]


def accumulated(page: Page, *_) -> float:
    return math.fsum(share for _, share, _, _ in page.shares)


def last_query(page: Page, *_) -> float:
    return page.shares[-1][1]


def uses(page: Page) -> list[int]:
    return [at + 1 for at, share, fair, _ in page.shares if share >= fair]


def last_use(page: Page, *_) -> float:
    return max(uses(page), default=0)


def last_and_frequent_use(page: Page, *_) -> float:
    return last_use(page) + len(uses(page))


def features(page: Page, kept: Kept, i: int, row: int) -> float:
    asked = sum(share > 0 for _, share, _, _ in page.shares)
    attention = math.fsum(share / fair for _, share, fair, _ in page.shares) / asked
    return attention + 2 ** ((last_use(page) - kept.driver.lens[row]) / 64) + len(uses(page)) / asked


def fading(page: Page, window: int) -> float:
    total = 0.0
    for _, group in itertools.groupby(page.shares, lambda seen: seen[3]):
        shares = [share for _, share, _, _ in group]
        total = total * max(0, 1 - len(shares) / window) + math.fsum(shares[-window:])
    return total


def observed(page: Page, kept: Kept, i: int, row: int, window: int = 3, kernel: int = 5) -> float:
    """SnapKV with a window of 3: pooled over 5 pages of one entry, not pooled over larger ones."""
    if kept.driver.cache.page_size > 1:
        kernel = 1
    pages = next(shard for shard in kept.held[i][row] if page in shard)
    at = pages.index(page)
    beside = pages[max(0, at - kernel // 2) : at + kernel // 2 + 1]
    return math.fsum(fading(p, window) for p in beside if p.positions[-1] < kept.driver.lens[row] - window) / kernel


def bound(page: Page, kept: Kept, i: int, row: int) -> float:
    (query, lse), spec = kept.queries[i, row], kept.driver.layers[i]
    group, total = query.shape[0] // spec.num_kv_heads, 0.0
    for head in range(query.shape[0]):
        keys = torch.stack([kept.driver.history[i][row][p][0][head // group] for p in page.positions]).double()
        lo, hi = keys.amin(0), keys.amax(0)
        q = query[head].double() * kept.driver.scale(query)
        total += math.exp(float(torch.maximum(q * lo, q * hi).sum() - lse[head]))
    return total


def short_keys(page: Page, kept: Kept, i: int, row: int) -> float:
    return -math.fsum(float(kept.driver.history[i][row][p][0].double().norm(dim=-1).mean()) for p in page.positions)
