"""Routers beside codec svd: pages, queries and all that a router keeps are in the basis that a request has now, whatever it was before.

What holds for every registered router: tests/contracts/test_request_bases.py.
"""

import pytest
import torch
from torch import Tensor

from pikv_ds.errors import ConfigError
from pikv_ds.routers import ROUTERS
from pikv_ds.routers.bounds import PageBounds
from tests.harness.driver import Driver, layer, ragged
from tests.harness.rebasing import rebased_rows, svd
from tests.harness.selecting import PAGE, selecting
from tests.routing_blocks import placement, routing

LAYERS = [layer(0, dim=16), layer(1, dim=16, window=24)]
BOXES = [name for name, router in ROUTERS.items() if issubclass(router, PageBounds)]  # other boxes in another basis


def coefficients(driver: Driver, i: int, row: int) -> dict[int, Tensor]:
    """Position -> stored key [H, r] of one row."""
    pool, found = driver.probe.near_pool(i), {}
    for shard in range(pool.num_tables):
        positions, k, _ = pool.entries(row, shard)
        found |= dict(zip(positions.tolist(), k, strict=True))
    return found


def folded(driver: Driver, i: int, row: int, q: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
    """What the oracle scores: the query, folded here, and what lies in the pages."""
    basis = driver.probe.bases(i)[0][row]
    q = torch.einsum("hgd,hdr->hgr", q.unflatten(0, (basis.shape[0], -1)), basis).flatten(0, 1)
    return q, coefficients(driver, i, row)


def grow(driver: Driver) -> int:
    """Requests of 20 and 9 tokens double at different times: in a chunk, while decoded, once more. In how many forwards some did."""
    driver.prefill([20, 9])
    rebased = 0
    for mask in (ragged([7, 7]), ragged([14, 1]), *[ragged([1, 1])] * 6, ragged([40, 37]), *[ragged([1, 1])] * 3):
        before = driver.probe.fitted_at
        driver.forward(mask)
        rebased += rebased_rows(driver, before) > 0
    return rebased


@pytest.mark.parametrize(("num_shards", "options"), [(4, {"pages": 6}), (1, {"ratio": 0.3, "spread": 1.0, "heads": "max"})], ids=str)
def test_pages_are_those_of_an_oracle_over_the_stored_coefficients(num_shards, options):
    driver, selected = selecting(LAYERS, num_shards=num_shards, scored=folded, **options, **svd())
    driver.tolerance = 1e-5
    assert grow(driver) >= 3 and selected.left_out > 0


@pytest.mark.parametrize("store", ["none", "int8"])
@pytest.mark.parametrize("name", BOXES)
def test_metadata_after_a_rebase_are_those_made_from_scratch(name, store, tmp_path):
    """Truncated bases; page bounds of the pages as they are."""
    page = PAGE if store == "none" else 64
    block = routing(name, tmp_path, layers=2, shards=2, query_width=64, metadata="fp32")
    options = placement(name) | svd(rank=8, fit_tokens=10**6, store=store)
    driver = Driver(LAYERS, routing=block, num_shards=2, page_size=page, checks=[], **options)
    rebased = []
    for mask in (ragged([20, 9]), ragged([7, 7]), ragged([14, 20]), *[ragged([1, 1])] * 2, ragged([100, 90]), ragged([1, 1])):
        before = driver.probe.fitted_at
        driver.forward(mask)
        rebased.append(rebased_rows(driver, before) if before else 0)
        for i in range(2):
            pool = driver.probe.near_pool(i)
            made = torch.zeros_like(pool.column("bounds"))
            for row in range(2):
                for shard in range(2):
                    k, pages = pool.entries(row, shard).keys, pool.page_ids(row, shard)
                    for at, own in zip(pages, k.split(page), strict=True):
                        made[at] = torch.stack((own.amin(0), own.amax(0)), 1)
                    found = pool.column("bounds")[pages]
                    assert torch.allclose(found, made[pages], atol=1e-6), (i, row, shard)
    assert sorted(rebased) == [0] * 5 + [2, 2], "both rows, twice"


def test_a_router_that_cannot_follow_a_rebase_is_refused(monkeypatch):
    monkeypatch.setattr(PageBounds, "rebuilt", ROUTERS.get("bounds").__mro__[1].rebuilt)
    with pytest.raises(ConfigError, match="pikv.routing.method = 'bounds' .* can't make them anew when a basis changes"):
        Driver(LAYERS, routing=routing("bounds", None, layers=2, shards=1, query_width=64), **svd())
