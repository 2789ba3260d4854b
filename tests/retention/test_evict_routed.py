"""Eviction by attention where a router leaves pages out: unread pages got nothing, read ones their part of what was read."""

import pytest
import torch
from torch import Tensor

from tests.harness.choices import by_row, recorded_choices
from tests.harness.dense import dense_over
from tests.harness.driver import Driver, ragged
from tests.harness.evicting import AllPages, Kept, accumulated, bound, evicting, last_query, last_use, observed
from tests.harness.invariants import poison
from tests.retention.test_evict import KINDS, SMALL

pytestmark = pytest.mark.usefixtures("nan_filled_empty")

ORACLES = {
    "h2o": (accumulated, {}),
    "tova": (last_query, {}),
    "lru": (last_use, {}),
    "snapkv": (observed, {"window": 3}),
    "quest": (bound, {}),
}


class ChosenPages(AllPages):
    """What was read is taken from the cache's choice, page by page; which pages it should be is test_selection.py's question."""

    def opened(self, driver: Driver) -> None:
        super().opened(driver)
        self.read, self.left_out = recorded_choices(driver.probe), 0

    def layer(self, i: int, positions: Tensor) -> None:
        self.alone = positions.shape[1] == 1
        self.own = [{int(p) for p in row if p >= 0} for row in positions]
        self.chosen = by_row(self.read, len(positions))
        self.read.clear()

    def attention(self, i: int, row: int, t: int, query: Tensor, visible: list[int], scale: float) -> tuple[Tensor, Tensor, Tensor]:
        driver, spec = self.driver, self.driver.layers[i]
        heads = self.chosen[row][t] if self.chosen[row] else [set()]  # nothing was stored for anybody
        heads = heads if len(heads) > 1 else heads * spec.num_kv_heads
        group, parts = query.shape[0] // spec.num_kv_heads, []
        first = {p: page[0] for page in driver.probe.near_pool(i).pages(row) for p in page}  # position -> first position of its page
        for head, pages in enumerate(heads):
            read = [p for p in visible if (p in self.own[row] and not self.alone) or first.get(p) in pages]
            self.left_out += len(visible) - len(read)
            entries = [tuple(side[head : head + 1] for side in driver.history[i][row][p]) for p in read]
            out, lse, weights = dense_over(query[head * group : (head + 1) * group], entries, scale)
            share = torch.zeros(group, len(visible), dtype=weights.dtype)
            share[:, [visible.index(p) for p in read]] = weights
            parts.append((out, lse, share))
        return tuple(torch.cat(x) for x in zip(*parts, strict=True))


def check_masses(driver: Driver, kept: Kept) -> None:
    """What h2o has summed up per page is what the loops have."""
    for i, pool in enumerate(driver.probe.all_pools):
        if driver.layers[i].window is None:
            for row in range(len(driver.lens)):
                for shard, pages in enumerate(kept.held[i][row]):
                    ids = pool.page_ids(row, shard)[: len(pages)]
                    wanted = torch.tensor([accumulated(page) for page in pages])
                    assert torch.allclose(pool.column("mass")[ids], wanted, rtol=1e-4, atol=1e-5), f"layer {i}, row {row}, shard {shard}"


BOUNDS, HASH = {"method": "bounds", "budget_pages": 4}, {"method": "hash", "top_k": 1}
CASES = [("h2o", 1, BOUNDS), ("h2o", 4, BOUNDS), ("tova", 4, BOUNDS), ("quest", 4, BOUNDS), ("lru", 4, HASH), ("snapkv", 4, HASH)]


@pytest.mark.parametrize(("method", "num_shards", "router"), CASES, ids=lambda x: x["method"] if isinstance(x, dict) else str(x))
def test_kept_sets_and_attention_with_a_router(method, num_shards, router):
    score, options = ORACLES[method]
    scheduling = {"method": method, "budget_tokens": 18, **SMALL, **options}
    routing = {**router, "sink_tokens": 1, "recent_tokens": 2}
    reads = ChosenPages()
    driver, kept = evicting(KINDS, score, scheduling, reads=reads, routing=routing, page_size=3, num_shards=num_shards)
    driver.prefill([25, 1, 14])
    for mask in [*[ragged([1, 1, 1])] * 5, ragged([4, 0, 9]), ragged([1, 0, 1]), ragged([6, 14, 2], left=False), *[ragged([1, 1, 1])] * 5]:
        poison(driver)
        driver.forward(mask)
    if method == "h2o":
        check_masses(driver, kept)
    assert kept.evicted > 60 and reads.left_out > 400
