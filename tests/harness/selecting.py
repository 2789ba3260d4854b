"""The check of which pages queries read: a slow oracle that lists the pages of every query and sorts them, and attention over these."""

from collections.abc import Callable

import torch
from torch import Tensor

from pikv_ds.ops.format.bound_codes import decode_box, encode_box, not_above
from tests.harness.checks import Check
from tests.harness.choices import by_row, recorded_choices
from tests.harness.dense import rel_error
from tests.harness.driver import Driver, layer

LAYERS = [layer(0), layer(1, window=24)]
PAGE, SINKS, RECENT = 4, 2, 5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}


class Selected(Check):
    """Compares the pages that the cache chose with the oracle's, and attention with float64 attention to exactly these entries.

    routing: the block. scored(driver, i, row, q) -> q and {position: key [H, D]} that scores are made of; None: the model's own.
    """

    def __init__(self, routing: dict, *, metadata: str = "fp32", spread: float = 0.25, heads: str = "mean", scored: Callable | None = None):
        self.routing, self.spread, self.heads, self.scored = routing, spread, heads, scored
        self.bounds_dtype = DTYPES[metadata]

    def opened(self, driver: Driver) -> None:
        super().opened(driver)
        self.page_size, self.num_shards = self.routing["block_size"] or driver.cache.page_size, driver.cache.num_shards
        self.chosen, self.left_out = recorded_choices(driver.probe), 0

    def generation(self) -> None:
        self.born = []

    def select(self, index: list[int]) -> None:
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
        spec, page, num_heads = self.driver.layers[i], self.page_size, self.driver.layers[i].num_kv_heads
        pages = []  # shard, positions
        for shard in range(self.num_shards):
            held = [p for p in self.born[i][row] if p < seen and p % self.num_shards == shard]
            pages += [(shard, held[c : c + page]) for c in range(0, len(held), page)]
        pages = [(shard, held) for shard, held in pages if spec.window is None or held[-1] > at - spec.window]
        pinned = [held[0] < SINKS or held[-1] > at - self.routing["recent_tokens"] for _, held in pages]
        tokens = seen if spec.window is None else min(seen, spec.window - 1)
        budget = self.routing["budget_pages"] or -int(-(self.routing["budget_ratio"] * tokens) // page)
        history = self.driver.history[i][row]
        q, key_of = (q, [k for k, _ in history]) if self.scored is None else self.scored(self.driver, i, row, q)
        heads = []
        for head in range(num_heads):
            own = q.view(num_heads, -1, q.shape[-1])[head]
            keys = [torch.stack([key_of[p][head] for p in held]) for _, held in pages]
            order = sorted(range(len(pages)), key=lambda c: (not pinned[c], -self.score(own, keys[c], scale), pages[c]))  # noqa: B023
            heads.append({pages[c][1][0]: pages[c][1] for c in order[: max(budget, sum(pinned))]})
            self.left_out += len(pages) - len(heads[-1])
        return heads

    def layer(self, i: int, q: Tensor, positions: Tensor, out: Tensor, lse: Tensor) -> None:
        num_rows, num_columns = positions.shape
        chosen = by_row(self.chosen, num_rows)
        self.chosen.clear()
        self.born = self.born or [[[] for _ in range(num_rows)] for _ in self.driver.layers]
        new = [[p for p in row.tolist() if p >= 0] for row in positions]
        if self._sees_own(num_columns):
            self._bear(i, new)
        self._check(i, chosen, q, positions, out, lse)
        if not self._sees_own(num_columns):
            self._bear(i, new)

    def _sees_own(self, num_columns: int) -> bool:
        return num_columns == 1 and not self.driver.cache.late_experts

    def _bear(self, i: int, new: list[list[int]]) -> None:
        for held, positions in zip(self.born[i], new, strict=True):
            window = self.driver.layers[i].window
            oldest = 0 if len(positions) <= 1 or window is None else positions[-1] + 2 - window
            held += [p for p in positions if p >= oldest]

    def _check(self, i: int, chosen: list, q: Tensor, positions: Tensor, out: Tensor, lse: Tensor) -> None:
        spec, scale, num_columns = self.driver.layers[i], self.driver.scale(q), positions.shape[1]
        if not chosen[0]:
            assert max(self.driver.lens) == 0 and num_columns > 1, "a query with a past chose nothing"
            return
        for row, column in (positions >= 0).nonzero().tolist():
            at, seen = int(positions[row, column]), self.driver.lens[row] + self._sees_own(num_columns)
            wanted = self.pages_of(i, row, at, seen, q[row, column], scale)
            assert chosen[row][column] == [set(pages) for pages in wanted], f"layer {i}, row {row}, position {at}"
            for head, pages in enumerate(wanted):
                read = sorted({p for held in pages.values() for p in held} | set(range(seen, at + 1)))
                read = [p for p in read if spec.window is None or p > at - spec.window]
                k, v = (torch.stack([self.driver.history[i][row][p][side][head] for p in read]).double() for side in (0, 1))
                heads = slice(head * q.shape[2] // spec.num_kv_heads, (head + 1) * q.shape[2] // spec.num_kv_heads)
                logits = scale * q[row, column, heads].double() @ k.T
                for got, want in ((out, logits.softmax(-1) @ v), (lse, logits.logsumexp(-1))):
                    assert rel_error(got[row, column, heads], want) <= self.driver.tolerance, f"layer {i}, row {row}, {at}"


def selecting(
    layers=LAYERS, *, pages=None, ratio=None, method="bounds", recent=RECENT, metadata="fp32", spread=0.25, heads="mean", scored=None,
    page_size=PAGE, block_size=None, **options,
) -> tuple[Driver, Selected]:  # fmt: skip
    """A driver with this routing block, and the one check of it."""
    block = {"method": method, "budget_pages": pages, "budget_ratio": ratio, "sink_tokens": SINKS, "recent_tokens": recent}
    block["block_size"] = block_size
    selected = Selected(block, metadata=metadata, spread=spread, heads=heads, scored=scored)
    own = {"metadata": metadata, "spread": spread, "heads": heads} if method == "bounds" else {}
    return Driver(layers, routing=block | own, page_size=page_size, placement="position", checks=[selected], **options), selected
