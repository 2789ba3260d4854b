"""Routers beside codec svd: pages, queries and all that a router keeps are in the basis that a request has now, whatever it was before.

What holds for every registered router: tests/contracts/test_request_bases.py.
"""

import pytest
import torch
from torch import Tensor

from pikv_ds.errors import ConfigError
from pikv_ds.routers import ROUTERS
from pikv_ds.routers.bounds import PageBounds
from tests.routing_blocks import placement, routing
from tests.unit.driver import Driver, layer, ragged
from tests.unit.evicting import entries_of
from tests.unit.test_selection import PAGE, SelectingDriver
from tests.unit.turning import svd, turns

LAYERS = [layer(0, dim=16), layer(1, dim=16, window=24)]
BOXES = [name for name, router in ROUTERS.items() if issubclass(router, PageBounds)]  # other boxes in another basis


def coefficients(driver: Driver, i: int, row: int) -> dict[int, Tensor]:
    """Position -> stored key [H, r] of one row."""
    store, found = driver.cache.tables.stores[i], {}
    for shard in range(store.counts.shape[1]):
        k, _, positions = entries_of(store, row, shard)
        found |= dict(zip(positions.tolist(), k, strict=True))
    return found


class TurnedDriver(SelectingDriver):
    """The oracle scores what lies in the pages with queries that it folds itself."""

    def pages_of(self, i, row, at, seen, q, scale):
        stored, basis, kept = coefficients(self, i, row), self.cache.bases.bases[i][0][row], self.history[i][row]
        folded = torch.einsum("hgd,hdr->hgr", q.unflatten(0, (basis.shape[0], -1)), basis).flatten(0, 1)
        self.history[i][row] = [(stored.get(p), None) for p in range(len(kept))]
        found = super().pages_of(i, row, at, seen, folded, scale)
        self.history[i][row] = kept
        return found


def grow(driver: Driver) -> None:
    """Requests of 20 and 9 tokens that double at different times: in a chunk, while it is decoded, and once more."""
    driver.prefill([20, 9])
    for mask in (ragged([7, 7]), ragged([14, 1]), *[ragged([1, 1])] * 6, ragged([40, 37]), *[ragged([1, 1])] * 3):
        driver.forward(mask)


@pytest.mark.parametrize(("num_shards", "options"), [(4, {"pages": 6}), (1, {"ratio": 0.3, "spread": 1.0, "heads": "max"})], ids=str)
def test_pages_are_those_of_an_oracle_over_the_stored_coefficients(num_shards, options):
    driver = TurnedDriver(LAYERS, num_shards=num_shards, **options, **svd())
    driver.tolerance = 1e-5
    seen = turns(driver)
    grow(driver)
    assert driver.left_out > 0 and len(seen) >= 6


@pytest.mark.parametrize("store", ["none", "int8"])
@pytest.mark.parametrize("name", BOXES)
def test_metadata_after_a_turn_are_those_made_from_scratch(name, store, tmp_path):
    """Truncated bases; page bounds of the pages as they are."""
    page = PAGE if store == "none" else 64
    block = routing(name, tmp_path, layers=2, shards=2, query_width=64, metadata="fp32")
    driver = Driver(LAYERS, routing=block, num_shards=2, page_size=page, **placement(name), **svd(rank=8, fit_tokens=10**6, store=store))
    driver._compare = lambda i, q, positions, out, lse: None
    seen, checked = turns(driver), 0
    for mask in (ragged([20, 9]), ragged([7, 7]), ragged([14, 20]), *[ragged([1, 1])] * 2, ragged([100, 90]), ragged([1, 1])):
        before = len(seen)
        driver.forward(mask)
        checked += len(seen) > before
        for i, store_of in enumerate(driver.cache.tables.stores):
            made = torch.zeros_like(store_of.summaries["bounds"])
            for row in range(2):
                for shard in range(2):
                    k, _, _ = entries_of(store_of, row, shard)
                    pages = store_of.block_table[row, shard, : -(-len(k) // page)].long()
                    for at, own in zip(pages.tolist(), k.split(page), strict=True):
                        made[at] = torch.stack((own.amin(0), own.amax(0)), 1)
                    found = store_of.summaries["bounds"][pages]
                    assert torch.allclose(found, made[pages], atol=1e-6), (i, row, shard)
    assert checked == 2 and set(seen) == {2}, "both rows, twice"


def test_a_router_that_cannot_follow_a_turn_is_refused(monkeypatch):
    monkeypatch.setattr(PageBounds, "moved", ROUTERS.get("bounds").__mro__[1].moved)
    with pytest.raises(ConfigError, match="pikv.routing.method = 'bounds' .* can't make them anew when a basis changes"):
        Driver(LAYERS, routing=routing("bounds", None, layers=2, shards=1, query_width=64), **svd())
