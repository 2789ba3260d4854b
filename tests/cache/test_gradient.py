"""What is kept of a layer for its backward is what its queries read: computed again from that, attention is as it was.

The cases are those of the covering array, so that every way to store and to choose is among them. That the derivative of the same
attention is right is autograd's affair; that the entry of the query itself takes part is checked against a central difference.
"""

import pytest
import torch

from pikv_ds.cache import gradient
from pikv_ds.cache.cache import PiKVCache
from pikv_ds.cache.recorded import Record
from tests.covering import driver as covering
from tests.covering.book import read
from tests.covering.test_covering import changes
from tests.long_form import short_or_long

RUNS = read()[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("methods")


def first(**wanted) -> int:
    return next(i for i, case in enumerate(RUNS) if all(case[name] in values for name, values in wanted.items()))


SHORT = sorted(
    {
        first(router=("bounds",), shards=(2, 4), page_size=(8,)),
        first(router=("topk", "cache_aware"), policy=("snapkv", "h2o", "lru")),
        first(codec=("unrotated",), layers=("window", "latent")),
        first(codec=("lora",), layers=("latent",)),
        first(codec=("svd",), raw=("recent", "both")),
        first(codec=("int2",), raw=("none",)),
        first(head_budget=("adaptive",)),
        first(expert_ids=("true",), layers=("windows",)),
    }
)


@pytest.mark.parametrize("index", short_or_long(SHORT, list(range(len(RUNS)))), ids=lambda i: changes(RUNS[i]))
def test_what_was_read_gives_the_same_attention(index, folder, monkeypatch):
    attend, compared = PiKVCache.attend, []

    def twice(cache, layer, q, k, v, *, scale, v_dim, expert_ids):
        record = Record(entries=False)
        found = attend(cache, layer, q, k, v, scale=scale, v_dim=v_dim, expert_ids=expert_ids, record=record)
        if not found.empty:
            compared.append(record.refusal)
        if record.refusal is None and not found.empty:
            out, lse = gradient.stored(record, q, k, v, scale, v_dim)
            sees = (cache.local.positions >= 0).unsqueeze(-1) & (found.lse > -torch.inf)
            assert torch.equal(lse > gradient.NOTHING, found.lse > -torch.inf) or not sees.all()
            torch.testing.assert_close(lse[sees], found.lse[sees], rtol=2e-3, atol=2e-3)
            torch.testing.assert_close(out[sees], found.out[sees], rtol=2e-3, atol=2e-3)
        return found

    monkeypatch.setattr(PiKVCache, "attend", twice)
    covering.run(RUNS[index], folder)
    assert None in compared, "nothing was compared"
