"""Retention beside codec svd: what a policy keeps of queries, and pages of one head, follow a request into its new basis.

What holds for every registered policy: tests/contracts/test_request_bases.py.
"""

import pytest
import torch

from pikv_ds.errors import ConfigError
from pikv_ds.policies import POLICIES
from tests.harness.checks import Answers
from tests.harness.driver import Driver, layer, ragged
from tests.harness.rebasing import svd

LAYERS = [layer(0, dim=16), layer(1, dim=16)]


def latest_of(answers: Answers, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The latest query of a row [Hq, D], and its lse [Hq]."""
    q, positions, _, lse = next(one for one in reversed(answers.found) if bool((one[1][row] >= 0).any()))
    column = int((positions[row] >= 0).nonzero()[-1])
    return q[row, column], lse[row, column]


@pytest.mark.parametrize("head_budget", ["shared", "uniform"])
@pytest.mark.parametrize("page_size", [2, 1])
def test_quest_scores_boxes_of_coefficients_with_the_query_in_their_basis(page_size, head_budget):
    """Beside loops over what is stored and the model's own latest query, folded here with the basis that the request has now."""
    block = {"method": "quest", "budget_tokens": 24, "sink_tokens": 2, "recent_tokens": 5, "head_budget": head_budget}
    answers, checked = Answers(), 0
    driver = Driver(LAYERS[:1], scheduling=block, page_size=page_size, num_shards=2, checks=[answers], **svd(fit_tokens=200))
    driver.prefill([20, 9])
    for mask in (ragged([7, 7]), ragged([14, 1]), *[ragged([1, 1])] * 3, ragged([40, 0]), ragged([1, 1])):
        driver.forward(mask)
        pool, basis = driver.probe.near_pool(0), driver.probe.bases(0)[0]
        scores = driver.probe.scores(0).view(2, pool.heads, 2, -1).transpose(1, 2).flatten(1, 2)  # [rows, tables, columns]
        for row in range(2):
            q, lse = latest_of(answers, row)
            folded = torch.einsum("hgd,hdr->hgr", q.unflatten(0, (2, 2)), basis[row]) * 16**-0.5
            for table in range(pool.num_tables):
                heads = [table % 2] if pool.heads == 2 else [0, 1]
                k = pool.entries(row, table).keys
                for column, page in enumerate(k[: len(k) // page_size * page_size].split(page_size)):  # open pages are pinned
                    want = []
                    for of, head in enumerate(heads):
                        low, high = page[:, of].amin(0), page[:, of].amax(0)
                        bound = torch.maximum(folded[head] * low, folded[head] * high).sum(-1) - lse.view(2, 2)[head]
                        want += bound.clamp_max(30).exp().tolist()
                    assert scores[row, table, column].item() == pytest.approx(sum(want) / len(want), rel=1e-4)
                    checked += 1
    assert checked > 100 and driver.probe.fitted_at[0] == 84


def test_queries_that_are_kept_under_no_name_are_refused(monkeypatch):
    monkeypatch.setattr(POLICIES.get("quest"), "row_queries", ())
    with pytest.raises(ConfigError, match="pikv.scheduling.method = 'quest' .* which of that to rebase"):
        Driver(LAYERS, scheduling={"method": "quest", "budget_tokens": 100}, **svd(fit_tokens=200))
