"""A raw window beside far pages in bases of their requests: projected when they leave it, rebased there when a basis changes."""

import pytest
import torch

from pikv_ds.errors import ConfigError
from tests.harness.checks import Answers, Dense
from tests.harness.dense import dense_over, rel_error
from tests.harness.driver import Driver, layer, ragged
from tests.harness.windowed import run_mix, tiered

pytestmark = pytest.mark.usefixtures("nan_filled_empty")
LAYERS = [layer(0, dim=16), layer(1, dim=16, window=70), layer(2, dim=16)]


def projected(layers=LAYERS, *, rank: int = 16, fit_tokens: int = 10**6, store: str = "none", page_size: int = 4, **options) -> Driver:
    compression = {"rank": rank, "fit_tokens": fit_tokens, "store": store}
    return tiered(layers, codec="svd", compression=compression, page_size=page_size, **options)


@pytest.mark.parametrize("num_shards", [1, 3], ids="S{}".format)
def test_all_directions_are_exact(num_shards):
    """Chunks, forks, crops, new generations, with bases that change in between."""
    driver = projected(num_shards=num_shards)
    driver.tolerance = 1e-5
    run_mix(driver)
    driver.prefill([30, 9])
    for mask in (ragged([30, 5]), *[ragged([1, 1])] * 6, ragged([50, 0]), ragged([1, 1])):
        driver.forward(mask)
    assert driver.probe.fitted_at == [60, 18]


@pytest.mark.parametrize("store", ["none", "int8"])
def test_far_entries_are_projected_by_the_basis_of_their_time_and_rebased_with_it(store):
    """Truncated, beside a loop that keeps each far entry as coefficients: projected once, then rebased at every change."""
    driver = projected(LAYERS[:1], rank=8, store=store, page_size=4 if store == "none" else 64, recent=6)
    unit, mine = driver.cache.page_size // 4, {}
    answers = driver.without(Dense).add(Answers())
    old = None
    driver.prefill([20 * unit, 9 * unit])
    for mask in (None, ragged([7 * unit, 11 * unit]), ragged([30 * unit, 1]), *[ragged([1, 1])] * 3):
        if mask is not None:
            driver.forward(mask)
        far, (k_basis, v_basis) = driver.probe.far_pool(0), driver.probe.bases(0)
        for row in range(2):
            held = {p for page in far.pages(row) for p in page}
            for at in mine:
                if at[0] == row:
                    mine[at] = tuple(
                        torch.einsum("hr,hdr,hde->he", x, before[row], now[row])
                        for x, before, now in zip(mine[at], old, (k_basis, v_basis), strict=True)
                    )
            for p in held - {p for r, p in mine if r == row}:
                entry = driver.history[0][row][p]
                mine[row, p] = tuple(torch.einsum("hd,hdr->hr", x, b[row]) for x, b in zip(entry, (k_basis, v_basis), strict=True))
            positions, k, v = far.entries(row, 0)
            for side, x in enumerate((k, v)):
                want = torch.stack([mine[row, p][side] for p in positions.tolist()]) if len(positions) else x
                assert rel_error(x, want) < (1e-5 if store == "none" else 0.03), (row, side)
        old = k_basis.clone(), v_basis.clone()
        far_now = {p for page in far.pages(0) for p in page}  # what the next forward reads
        read = [
            tuple(torch.einsum("hr,hdr->hd", x, b[0]) for x, b in zip(mine[0, p], old, strict=True)) if p in far_now else entry
            for p, entry in enumerate(driver.history[0][0])
        ]
    driver.decode()
    q, out, lse = answers.last
    want_out, want_lse, _ = dense_over(q[0, 0], [*read, driver.history[0][0][-1]], driver.scale(q))
    most = 1e-5 if store == "none" else 0.03
    assert rel_error(out[0, 0], want_out) < most and rel_error(lse[0, 0], want_lse) < most
    exact, _, _ = dense_over(q[0, 0], driver.history[0][0], driver.scale(q))
    assert rel_error(out[0, 0], exact) > 5e-2 and len(far_now) > 40 * unit


@pytest.mark.parametrize("method", ["h2o", "quest", "keydiff", "hazard_lru"])
def test_policies_keep_what_they_keep_of_raw_pages(method):
    """All directions: keys are the model's in both pools, and so are the queries that a policy keeps."""
    kept = []
    for make in (projected, lambda layers, **options: tiered(layers, page_size=4, **options)):
        scheduling = {"method": method, "budget_tokens": 40, "sink_tokens": 2, "recent_tokens": 3}
        driver, seen = make(LAYERS[:1], scheduling=scheduling), []
        driver.without(Dense)
        driver.prefill([30, 14])
        for mask in (*[ragged([1, 1])] * 3, ragged([40, 20]), *[ragged([1, 1])] * 5):
            driver.forward(mask)
            seen.append(driver.probe.kept(0))
        kept.append((seen, driver.forward(ragged([1, 1]))))
    (ours, found), (plain, want) = kept
    assert ours == plain and rel_error(found[0][0], want[0][0]) < 1e-4


def test_a_router_is_refused():
    with pytest.raises(ConfigError, match="routing.method = 'topk': a router is told of keys when they are stored"):
        projected(LAYERS[:1], routing={"method": "topk", "sink_tokens": 2, "recent_tokens": 7})
