"""Budgets per KV head: every head keeps its own entries, attention is that of each head over what it kept, memory follows."""

import pytest
import torch
from torch import Tensor

from pikv_ds.errors import ConfigError
from pikv_ds.stats import stats
from tests.unit.driver import Driver, dense_over, layer, ragged, rel_error
from tests.unit.invariants import check_pages, check_unshared, poison, slots_of
from tests.unit.stores import stored

pytestmark = pytest.mark.usefixtures("nan_filled_empty")
SMALL = {"sink_tokens": 2, "recent_tokens": 3}
HEADS = 2


class HeadDriver(Driver):
    """Compares with attention of each head over the entries that its tables held before the forward, and the forward's own."""

    def held(self, i: int, row: int, head: int) -> list[int]:
        store = self.cache.tables.stores[i]
        return stored(store, slots_of(store, row, head))[2].tolist()

    def forward(self, mask: Tensor) -> list:
        if self.fresh:
            self.before = {}
        else:
            rows = self.parent if self.touched else range(len(self.lens))
            self.before = {
                (i, r, h): self.held(i, old, h) for i in range(len(self.layers)) for r, old in enumerate(rows) for h in range(HEADS)
            }
        outputs = super().forward(mask)
        self.check()
        return outputs

    def _compare(self, i: int, q: Tensor, positions: Tensor, out: Tensor, lse: Tensor) -> None:
        for row, column in (positions >= 0).nonzero().tolist():
            at, first = int(positions[row, column]), int(positions[row][positions[row] >= 0][0])
            for head in range(HEADS):
                kept = [*self.before.get((i, row, head), []), *range(first, at + 1)]
                entries = [(k[head : head + 1], v[head : head + 1]) for k, v in (self.history[i][row][p] for p in kept)]
                query = slice(head * q.shape[2] // HEADS, (head + 1) * q.shape[2] // HEADS)
                want_out, want_lse, _ = dense_over(q[row, column, query], entries, self._scale(q))
                assert rel_error(out[row, column, query], want_out) <= self.tolerance, (i, row, at, head)
                assert rel_error(lse[row, column, query], want_lse) <= self.tolerance, (i, row, at, head)

    def check(self) -> None:
        for i, store in enumerate(self.cache.tables.stores):
            check_pages(store)
            check_unshared(store)
            for row in range(len(self.lens)):
                for head in range(HEADS):
                    k, v, positions = stored(store, slots_of(store, row, head))
                    entries = [self.history[i][row][p] for p in positions.tolist()]
                    assert torch.equal(k[:, 0], torch.stack([e[0][head] for e in entries]))
                    assert torch.equal(v[:, 0], torch.stack([e[1][head] for e in entries]))
        numbers = stats(self.cache, 1, 1)
        live, evicted, cropped, appended, forked = (
            numbers[f"entries_{name}"] for name in ("live", "evicted", "cropped", "appended", "forked")
        )
        assert live + evicted + cropped == appended + forked
        assert numbers["kv_bytes_allocated"] == sum(
            t.untyped_storage().nbytes() for s in self.cache.tables.stores for t in (s.pages, *s.summaries.values())
        )


def driver(head_budget: str, method: str = "h2o", page_size: int = 2, **scheduling) -> HeadDriver:
    scheduling = {"method": method, "budget_tokens": 20, "head_budget": head_budget, **SMALL, **scheduling}
    return HeadDriver([layer(0), layer(1)], page_size=page_size, scheduling=scheduling)


@pytest.mark.parametrize("method", ["h2o", "knorm", "quest"])
@pytest.mark.parametrize("page_size", [1, 3], ids="page{}".format)
@pytest.mark.parametrize("head_budget", ["uniform", "adaptive"])
def test_each_head_attends_to_what_it_kept(head_budget, page_size, method):
    d = driver(head_budget, method, page_size)
    d.prefill([40, 1, 25])
    for mask in [*[ragged([1, 1, 1])] * 5, ragged([4, 0, 9]), ragged([1, 0, 1]), ragged([11, 30, 2], left=False), *[ragged([1, 1, 1])] * 5]:
        poison(d)
        d.forward(mask)
        for i in range(2):
            counts = d.cache.tables.stores[i].counts
            assert (counts.sum(1) <= 2 * 20).all() and (head_budget == "adaptive" or counts.max() <= 20)
            floor = torch.tensor([min(n, 4) for n in d.lens]).unsqueeze(1)
            assert (counts >= floor - page_size).all()
    sets = {tuple(d.held(0, 0, head)) for head in range(HEADS)}
    assert len(sets) == HEADS, "both heads kept the same entries"


def test_adaptive_budgets_differ_between_heads():
    d = driver("adaptive", "knorm", 1, head_floor=0.3)
    d.prefill([60])
    counts = torch.stack([store.counts for store in d.cache.tables.stores])
    assert (counts[..., 0] != counts[..., 1]).any() and (counts.sum(-1) == 40).all() and counts.min() >= 6


def test_forks_of_heads():
    d = driver("adaptive", page_size=3)
    d.prefill([40, 17])
    for parents in ([0, 1], [1, 0, 0], [2, 1]):
        d.select(parents)
        d.decode()
        poison(d)
        d.decode()


def test_memory_of_heads_follows_the_budget():
    d = driver("uniform", "knorm", 4, prefill="keep")
    d._compare = lambda *_: None  # what is evicted before a forward is not what it held after the last one
    d.prefill([200])
    record = d.cache.tables.stores[0].fmt.record_bytes
    assert d.cache.tables.stores[0].nbytes == 2 * 50 * record
    d.decode()
    assert d.cache.tables.stores[0].nbytes <= 1.25 * 2 * 5 * record + record


REFUSED = {
    "MLA": (layer(1, latent=True), {}, "latent"),
    "window": (layer(1, window=5), {}, "sliding window of 5"),
    "heads": (layer(1, num_kv_heads=4), {}, "4 KV heads"),
    "shards": (layer(1), {"num_shards": 2}, "2 shards"),
}


@pytest.mark.parametrize(("second", "options", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_refusals(second, options, said):
    scheduling = {"method": "streaming_llm", "budget_tokens": 50, "head_budget": "uniform", **SMALL}
    with pytest.raises(ConfigError, match=f"head_budget = 'uniform'.*{said}"):
        Driver([layer(0), second], page_size=2, scheduling=scheduling, **options)
