"""Retention beside codec svd: what a policy keeps of queries, and pages of one head, follow a request into its new basis.

What holds for every registered policy: tests/contracts/test_request_bases.py.
"""

import pytest
import torch

from pikv_ds.errors import ConfigError
from pikv_ds.policies import POLICIES
from tests.unit.driver import Driver, layer, ragged
from tests.unit.evicting import entries_of
from tests.unit.turning import svd

LAYERS = [layer(0, dim=16), layer(1, dim=16)]


@pytest.mark.parametrize("head_budget", ["shared", "uniform"])
@pytest.mark.parametrize("page_size", [2, 1])
def test_quest_scores_boxes_of_coefficients_with_the_query_in_their_basis(page_size, head_budget):
    """Beside loops over what is stored and the model's own latest query, folded here with the basis that the request has now."""
    block = {"method": "quest", "budget_tokens": 24, "sink_tokens": 2, "recent_tokens": 5, "head_budget": head_budget}
    driver = Driver(LAYERS[:1], scheduling=block, page_size=page_size, num_shards=2, **svd(fit_tokens=200))
    latest, checked = {}, 0

    def keep(i, q, positions, out, lse):
        for row, own in enumerate(positions):
            if bool((own >= 0).any()):
                column = int((own >= 0).nonzero()[-1])
                latest[row] = q[row, column], lse[row, column]

    driver._compare = keep
    driver.prefill([20, 9])
    for mask in (ragged([7, 7]), ragged([14, 1]), *[ragged([1, 1])] * 3, ragged([40, 0]), ragged([1, 1])):
        driver.forward(mask)
        retention, store = driver.cache.retention, driver.cache.tables.stores[0]
        pages, basis = retention.pages(0, driver.lens), driver.cache.bases.bases[0][0]
        scores = retention.policy.score(pages).view(2, store.heads, 2, -1).transpose(1, 2).flatten(1, 2)  # [rows, tables, columns]
        for row in range(2):
            q, lse = latest[row]
            folded = torch.einsum("hgd,hdr->hgr", q.unflatten(0, (2, 2)), basis[row]) * 16**-0.5
            for table in range(store.counts.shape[1]):
                heads = [table % 2] if store.heads == 2 else [0, 1]
                k = entries_of(store, row, table)[0]
                for column, page in enumerate(k[: len(k) // page_size * page_size].split(page_size)):  # open pages are pinned
                    want = []
                    for of, head in enumerate(heads):
                        low, high = page[:, of].amin(0), page[:, of].amax(0)
                        bound = torch.maximum(folded[head] * low, folded[head] * high).sum(-1) - lse.view(2, 2)[head]
                        want += bound.clamp_max(30).exp().tolist()
                    assert scores[row, table, column].item() == pytest.approx(sum(want) / len(want), rel=1e-4)
                    checked += 1
    assert checked > 100 and driver.cache.bases.fitted_at[0] == 84


def test_queries_that_are_kept_under_no_name_are_refused(monkeypatch):
    monkeypatch.setattr(POLICIES.get("quest"), "row_queries", ())
    with pytest.raises(ConfigError, match="pikv.scheduling.method = 'quest' .* which of that to turn"):
        Driver(LAYERS, scheduling={"method": "quest", "budget_tokens": 100}, **svd(fit_tokens=200))
