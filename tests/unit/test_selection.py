"""Which pages queries read, against a slow oracle that lists the pages of every query and sorts them. One rank."""

import pytest
import torch
from torch import Tensor

from pikv_ds import ops
from pikv_ds.ops.format.bound_codes import decode_box, encode_box, not_above
from tests.unit.driver import Driver, layer, ragged, rel_error

LAYERS = [layer(0), layer(1, window=24)]
PAGE, SINKS, RECENT = 4, 2, 5


class SelectingDriver(Driver):
    """Compares the pages that the cache chose with the oracle's, and attention with float64 attention to exactly these entries."""

    def __init__(
        self,
        layers=LAYERS,
        *,
        pages=None,
        ratio=None,
        method="bounds",
        num_shards=1,
        page_size=PAGE,
        recent=RECENT,
        metadata="fp32",
        spread=0.25,
        heads="mean",
        **options,
    ):
        self.spread, self.heads = spread, heads
        self.bounds_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}[metadata]
        choice = {"metadata": metadata, "spread": spread, "heads": heads} if method == "bounds" else {}
        self.routing = {"method": method, "budget_pages": pages, "budget_ratio": ratio, "sink_tokens": SINKS, "recent_tokens": recent}
        super().__init__(layers, routing=self.routing | choice, page_size=page_size, num_shards=num_shards, placement="position", **options)
        self.page_size, self.num_shards, self.chosen, self.left_out = page_size, num_shards, [], 0
        self.born: list[list[list[int]]] = []  # [layer][row] positions ever stored: window layers drop those of a chunk nobody will see
        choose = self.cache.selection.choose

        def recording(asked, plan):
            page_list = choose(asked, plan)
            columns = page_list.view(asked.first.shape[0], -1, *page_list.shape[1:])  # [Q, S, H, K]
            block = [[set() for _ in range(columns.shape[2])] for _ in columns]
            for query, shard, head, k in (columns >= 0).nonzero().tolist():
                block[query][head].add(int(asked.first[query, shard, columns[query, shard, head, k]]))
            self.chosen.append(block)
            return page_list

        self.cache.selection.choose = recording

    def new_generation(self) -> None:
        super().new_generation()
        self.born = []

    def select(self, index: list[int]) -> None:
        super().select(index)
        self.born = [[list(rows[i]) for i in index] for rows in self.born]

    def box(self, k: Tensor) -> Tensor:
        """The stored bounds of keys k [n, D], as numbers: f64 [2, D]."""
        low, high = k.min(0).values, k.max(0).values
        if self.bounds_dtype == torch.int8:
            return decode_box(encode_box(torch.stack((low, high)))).double()
        return torch.stack((not_above(low, self.bounds_dtype).double(), -not_above(-high, self.bounds_dtype).double()))

    def score(self, q: Tensor, k: Tensor, scale: float) -> float:
        """Of one kv head: queries q [G, D], keys k [n, D] of the page."""
        (low, high), q = self.box(k), scale * q.double()
        if self.spread == 1:  # Quest, as its paper writes it
            each = torch.maximum(q * low, q * high).sum(-1)
        else:
            each = (q * (low + high) / 2 + self.spread * q.abs() * (high - low) / 2).sum(-1)
        return float(each.max() if self.heads == "max" else each.mean())

    def pages_of(self, i: int, row: int, at: int, seen: int, q: Tensor, scale: float) -> list[dict[int, list[int]]]:
        """The pages (first position -> all) that each kv head of a query at position `at` must read; `seen` entries are stored."""
        spec, page, num_heads = self.layers[i], self.page_size, self.layers[i].num_kv_heads
        pages = []  # shard, positions
        for shard in range(self.num_shards):
            held = [p for p in self.born[i][row] if p < seen and p % self.num_shards == shard]
            pages += [(shard, held[c : c + page]) for c in range(0, len(held), page)]
        pages = [(shard, held) for shard, held in pages if spec.window is None or held[-1] > at - spec.window]
        pinned = [held[0] < SINKS or held[-1] > at - self.routing["recent_tokens"] for _, held in pages]
        tokens = seen if spec.window is None else min(seen, spec.window - 1)
        budget = self.routing["budget_pages"] or -int(-(self.routing["budget_ratio"] * tokens) // page)
        heads = []
        for head in range(num_heads):
            own = q.view(num_heads, -1, q.shape[-1])[head]
            keys = [torch.stack([self.history[i][row][p][0][head] for p in held]) for _, held in pages]
            order = sorted(range(len(pages)), key=lambda c: (not pinned[c], -self.score(own, keys[c], scale), pages[c]))  # noqa: B023
            heads.append({pages[c][1][0]: pages[c][1] for c in order[: max(budget, sum(pinned))]})
            self.left_out += len(pages) - len(heads[-1])
        return heads

    def _compare(self, i: int, q: Tensor, positions: Tensor, out: Tensor, lse: Tensor) -> None:
        num_rows, num_columns = positions.shape
        chosen, self.chosen = self.chosen, []
        self.born = self.born or [[[] for _ in range(num_rows)] for _ in self.layers]
        new = [[p for p in row.tolist() if p >= 0] for row in positions]
        if self._sees_own(num_columns):
            self._bear(i, new)
        self._check(i, chosen, q, positions, out, lse)
        if not self._sees_own(num_columns):
            self._bear(i, new)

    def _sees_own(self, num_columns: int) -> bool:
        return num_columns == 1 and not self.cache.stages

    def _bear(self, i: int, new: list[list[int]]) -> None:
        for held, positions in zip(self.born[i], new, strict=True):
            oldest = 0 if len(positions) <= 1 or self.layers[i].window is None else positions[-1] + 2 - self.layers[i].window
            held += [p for p in positions if p >= oldest]

    def _check(self, i: int, chosen: list, q: Tensor, positions: Tensor, out: Tensor, lse: Tensor) -> None:
        spec, scale, (num_rows, num_columns) = self.layers[i], self._scale(q), positions.shape
        if not chosen:
            assert max(self.lens) == 0 and num_columns > 1, "a query with a past chose nothing"
            return
        widths = [len(block) // num_rows for block in chosen]
        chosen = [
            [heads for block, n in zip(chosen, widths, strict=True) for heads in block[row * n : row * n + n]] for row in range(num_rows)
        ]
        for row, column in (positions >= 0).nonzero().tolist():
            at, seen = int(positions[row, column]), self.lens[row] + self._sees_own(num_columns)
            wanted = self.pages_of(i, row, at, seen, q[row, column], scale)
            assert chosen[row][column] == [set(pages) for pages in wanted], f"layer {i}, row {row}, position {at}"
            for head, pages in enumerate(wanted):
                read = sorted({p for held in pages.values() for p in held} | set(range(seen, at + 1)))
                read = [p for p in read if spec.window is None or p > at - spec.window]
                k, v = (torch.stack([self.history[i][row][p][side][head] for p in read]).double() for side in (0, 1))
                heads = slice(head * q.shape[2] // spec.num_kv_heads, (head + 1) * q.shape[2] // spec.num_kv_heads)
                logits = scale * q[row, column, heads].double() @ k.T
                assert rel_error(out[row, column, heads], logits.softmax(-1) @ v) <= self.tolerance, f"layer {i}, row {row}, {at}: out"
                assert rel_error(lse[row, column, heads], logits.logsumexp(-1)) <= self.tolerance, f"layer {i}, row {row}, {at}: lse"


QUEST = {"spread": 1.0, "heads": "max"}
CASES = [({"pages": 3} | QUEST, 1), ({"pages": 6} | QUEST, 4), ({"ratio": 0.3} | QUEST, 4), ({"ratio": 1.0} | QUEST, 1),
         ({"pages": 3}, 4), ({"ratio": 0.3}, 1), ({"pages": 6, "heads": "max"}, 4), ({"pages": 6, "spread": 0.0}, 1)]  # fmt: skip


@pytest.mark.parametrize(("options", "num_shards"), CASES, ids=str)
def test_pages_are_those_of_the_oracle(options, num_shards):
    driver = SelectingDriver(num_shards=num_shards, **options)
    driver.prefill([30, 17])
    driver.forward(ragged([7, 7]))
    driver.forward(ragged([5, 2]))
    for _ in range(10):
        driver.decode()
    driver.forward(ragged([40, 33]))  # more queries than are answered at once, twice the window
    driver.decode()
    assert driver.left_out > 0 or options.get("ratio") == 1.0


@pytest.mark.parametrize("metadata", ["fp32", "int8"])
def test_rows_that_fork_take_their_bounds_along(metadata):
    driver = SelectingDriver(pages=4, num_shards=2, metadata=metadata)
    driver.prefill([30, 22])
    for index in ([1, 0], [0, 0, 1], [2, 1]):
        driver.select(index)
        for _ in range(3):
            driver.decode()


@pytest.mark.parametrize("metadata", ["fp32", "int8"])
def test_entries_that_wait_for_their_expert(metadata):
    """Staged: a query does not see its own entry in the store, and neither may the bounds."""
    driver = SelectingDriver([layer(0), layer(1)], pages=4, expert_ids="true", num_shards=2, metadata=metadata)
    driver.prefill([20, 11])
    driver.forward(ragged([7, 7]))
    for _ in range(6):
        driver.decode()


def test_latent_layers():
    driver = SelectingDriver([layer(0, dim=16, latent=True)], pages=4, num_shards=2)
    driver.prefill([40, 22])
    driver.forward(ragged([5, 5]))
    for _ in range(4):
        driver.decode()
    assert driver.left_out > 0


@pytest.mark.parametrize("codec", ["int8", "fp8_e4m3"])
def test_compressed_pages(codec):
    """Keys are 0 or the largest: decoded without loss, and pages that tie are taken in their order."""
    driver = SelectingDriver([layer(0, dim=32)], pages=2, page_size=64, codec=codec, num_shards=2, recent=3)
    driver.prefill([420, 390])
    driver.forward(ragged([3, 3]))
    for _ in range(3):
        driver.decode()
    assert driver.left_out > 0


@pytest.mark.parametrize("metadata", ["fp32", "bf16", "fp16", "int8"])
def test_pages_that_are_not_read_may_hold_anything(metadata):
    """NaN in their keys and values changes no bit of any output."""
    runs = []
    for poisoned in (False, True):
        driver = SelectingDriver([layer(0)], pages=5, num_shards=2, metadata=metadata)
        driver.prefill([60, 41])
        selection, store = driver.cache.selection, driver.cache.tables.stores[0]
        choose = selection.choose

        def poisoning(asked, plan, choose=choose, store=store):
            page_list = choose(asked, plan)  # [N, H, K]
            read = torch.zeros(store.num_pages, store.fmt.num_kv_heads, dtype=torch.bool)
            for table, head, k in (page_list >= 0).nonzero().tolist():
                read[asked.block_table[table, 0, page_list[table, head, k]], head] = True
            k, v, _ = ops.views(store.pages, store.fmt)
            k[~read], v[~read] = torch.nan, torch.nan
            return page_list

        if poisoned:
            selection.choose = poisoning
        runs.append(driver.forward(torch.ones(2, 1, dtype=torch.bool)))
        if poisoned:
            k = ops.views(store.pages, store.fmt)[0]
            assert int(k.isnan().any(-1).any(-1).sum()) > 20
    for (out, lse), (other_out, other_lse) in zip(*runs, strict=True):
        assert torch.equal(out, other_out) and torch.equal(lse, other_lse)


def test_entries_read_are_counted():
    driver = SelectingDriver([layer(0)], pages=6, num_shards=2)
    driver.prefill([100])
    driver.decode()
    read, visible = driver.cache.selection.entries.tolist()
    assert visible == 101
    assert 5 * PAGE < read <= 6 * PAGE


@pytest.mark.parametrize("method", ["bounds", "shuffle"])
def test_bytes_of_int8_bounds(method):
    """2 * k_dim codes and two bf16 scales per page, layer and kv head; and rows grow, fork, crop and start anew with them."""
    routing = {"method": method, "metadata": "int8", "budget_pages": 4, "sink_tokens": 2, "recent_tokens": 5}
    driver = Driver(LAYERS, routing=routing, page_size=PAGE, num_shards=4)
    driver._compare = lambda i, q, positions, out, lse: None
    driver.prefill([40, 23])
    driver.select([1, 1, 0])
    driver.decode()
    driver.announce_crops()
    driver.forward(ragged([4, 4, 4]))
    driver.crop([n - 3 for n in driver.lens])
    for _ in range(3):
        for out, lse in driver.forward(torch.ones(3, 1, dtype=torch.bool)):
            assert bool(out.isfinite().all()) and bool(lse.isfinite().all())
    for store in driver.cache.tables.stores:
        assert store.summaries["bounds"].nbytes == store.num_pages * store.fmt.num_kv_heads * (2 * store.fmt.k_dim + 4)
