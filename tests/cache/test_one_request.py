"""One request in one shard, several tokens at a time: what is repeated per query must not stay a view of one table."""

import pytest

from tests.harness.driver import Driver, layer, ragged
from tests.harness.evicting import accumulated, bound, evicting, last_query
from tests.harness.heads import HeadAttention, HeadPages

pytestmark = pytest.mark.usefixtures("nan_filled_empty")
SMALL = {"sink_tokens": 2, "recent_tokens": 3}


def chunks(driver: Driver) -> None:
    driver.prefill([40])
    for mask in [ragged([8]), *[ragged([1])] * 3, ragged([20]), ragged([1])]:
        driver.forward(mask)


@pytest.mark.parametrize(("method", "score"), [("h2o", accumulated), ("tova", last_query), ("quest", bound)], ids=["h2o", "tova", "quest"])
def test_policies_that_watch_attention(method, score):
    driver, kept = evicting([layer(0)], score, {"method": method, "budget_tokens": 24, **SMALL}, page_size=4)
    chunks(driver)
    assert kept.evicted >= 40


@pytest.mark.parametrize("method", ["h2o", "knorm"])
def test_budgets_per_head(method):
    scheduling = {"method": method, "budget_tokens": 20, "head_budget": "uniform", **SMALL}
    chunks(Driver([layer(0)], page_size=2, scheduling=scheduling, checks=[HeadAttention(), HeadPages()]))


@pytest.mark.parametrize("method", ["bounds", "centroids", "page_oracle"])
def test_routers_that_read_all_of_it(method):
    chunks(Driver([layer(0)], page_size=4, routing={"method": method, "budget_pages": 30, **SMALL}))
