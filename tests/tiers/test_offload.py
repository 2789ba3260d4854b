"""Pages in two tiers answer as one pool does: near memory and staging have fixed sizes, and records that are far are given to no op."""

import pytest
import torch

from pikv_ds.errors import CapacityError
from pikv_ds.pages.tiered import TieredPool
from tests.harness.dense import rel_error
from tests.harness.driver import Driver, layer, ragged
from tests.harness.offloading import check_tiers, poison, tiered_pools, tiers
from tests.harness.windowed import run_mix

LAYERS = [layer(0, dim=16), layer(1, dim=16, window=70), layer(2, dim=16, latent=True)]

pytestmark = pytest.mark.usefixtures("nan_filled_empty")


def grown(driver: Driver, lens: list[int], chunk: int = 12) -> Driver:
    """A prompt in chunks, so that near memory holds each."""
    driver.new_generation()
    done = [0] * len(lens)
    while done != lens:
        new = [min(chunk, n - at) for n, at in zip(lens, done, strict=True)]
        driver.forward(ragged(new))
        done = [at + n for at, n in zip(done, new, strict=True)]
        poison(driver)
    return driver


@pytest.mark.parametrize("num_shards", [1, 4], ids="shards{}".format)
def test_everything_is_read(num_shards):
    """Chunks and decode steps against dense attention, with a quarter of the pages near and two slots of staging."""
    driver = grown(
        Driver(LAYERS, num_shards=num_shards, placement="position", offload=tiers(LAYERS, 12 if num_shards == 1 else 24, 2)), [90, 41]
    )
    for _ in range(9):
        driver.decode()
        poison(driver)
    check_tiers(driver)
    assert all(pool.num_far > 8 for pool in tiered_pools(driver)), "nothing went far"
    assert all(int(pool.staged.fetched) for pool in tiered_pools(driver))


@pytest.mark.parametrize("codec", ["int8", "int4", "fp8"])
def test_compressed_records(codec):
    size = 64 if codec != "fp8" else 8
    layers = [layer(0, dim=32)]
    names = {"fp8": "fp8_e4m3"}
    offload = tiers(layers, 8, 2, page_size=size, codec=names.get(codec, codec))
    driver = grown(Driver(layers, page_size=size, codec=names.get(codec, codec), offload=offload), [8 * size + 30, 5 * size], chunk=size)
    for _ in range(4):
        driver.decode()
        poison(driver)
    assert tiered_pools(driver)[0].num_far > 2


def test_forks_crops_and_generations():
    """run_mix: forks, crops of announced and other forwards, new generations; a page that is cut comes back."""
    driver = Driver(LAYERS, offload=tiers(LAYERS, 150, 4))
    run_mix(driver)
    check_tiers(driver)
    grown(driver, [200, 120])
    driver = Driver(LAYERS[:1], offload=tiers(LAYERS[:1], 12, 3))
    grown(driver, [60, 33])
    driver.select([0, 0, 1])
    for _ in range(6):
        driver.decode()
        poison(driver)
    check_tiers(driver)
    driver.crop([17, 40, 33])
    driver.decode()
    check_tiers(driver)
    driver.select([2])
    driver.decode()
    check_tiers(driver)
    driver.reset()
    assert not any(pool.num_far for pool in tiered_pools(driver))


def test_near_memory_that_is_too_small_is_named():
    driver = Driver(LAYERS[:1], offload=tiers(LAYERS[:1], 4, 2))
    with pytest.raises(CapacityError, match="pikv.offload.device_gib"):
        driver.prefill([30])


def test_a_full_host_tier_is_named_and_changes_nothing():
    driver = Driver(LAYERS[:1], offload=tiers(LAYERS[:1], 6, 2, host=3))
    grown(driver, [24], chunk=8)
    with pytest.raises(CapacityError, match="pikv.offload.host_gib"):
        grown(driver, [80], chunk=8)
    check_tiers(driver)


def test_the_oldest_go_and_first_and_latest_tokens_stay():
    driver = Driver(LAYERS[:1], offload=tiers(LAYERS[:1], 8, 2), scheduling={"sink_tokens": 4, "recent_tokens": 8})
    grown(driver, [80], chunk=4)
    pool = tiered_pools(driver)[0]
    far = pool.table.ids[0, 0, :20] >= pool.allocator.first_far
    assert not bool(far[0]) and not bool(far[17:].any())
    assert bool(far[1:13].all()), "a younger page went before an older one"


def test_a_policy_says_who_goes():
    """knorm: pages with small keys stay; scores are those of near pages alone."""
    driver = Driver(LAYERS[:1], offload=tiers(LAYERS[:1], 8, 2), scheduling={"method": "knorm", "sink_tokens": 0, "recent_tokens": 4})
    grown(driver, [80], chunk=4)
    driver.decode()
    k = torch.stack([k for k, _ in driver.history[0][0]])[:80].norm(dim=-1).mean(1).view(20, 4).mean(1)
    pool = tiered_pools(driver)[0]
    near = pool.table.ids[0, 0, :20] < pool.allocator.first_far
    assert k[:18][near[:18]].max() < k[:18][~near[:18]].mean()


def test_without_the_block_nothing_is_tiered():
    assert not tiered_pools(Driver(LAYERS[:1]))


# ---- page selection ----------------------------------------------------------------------------------------------------------


def chosen_far(driver: Driver) -> dict[int, list[set[tuple[int, int]]]]:
    """Filled while the cache runs: per layer and read, (section, far page) that were chosen and not staged when they were asked for."""
    found: dict[int, list[set[tuple[int, int]]]] = {}

    def look(asked, columns):
        pool = asked.pool
        if not isinstance(pool, TieredPool):
            return
        pool.staged.wait()
        ids = asked.block_table.expand(-1, columns.shape[1], -1).gather(2, columns.clamp_min(0).long())
        pool.staged.divide(columns.shape[1])
        far = torch.where(columns >= 0, ids - pool.allocator.first_far, -1)
        wanted = {(x, page) for x in range(far.shape[1]) for page in far[:, x].flatten().tolist() if page >= 0}
        found.setdefault(asked.layer, []).append({(x, page) for x, page in wanted if pool.staged.slot[x, page] < 0})

    driver.probe.on_choice(look)
    return found


@pytest.mark.parametrize("method", ["bounds", "random", "page_oracle", "centroids", "hash"])
@pytest.mark.parametrize("prefetch", ["none", "scores"])
def test_a_choice_reads_what_it_reads_in_one_pool(method, prefetch):
    """The same choices and answers as without tiers, and what is staged is what was chosen and was not there."""
    layers = [layer(0, dim=16), layer(1, dim=16)]
    routing = {"method": method, "sink_tokens": 4, "recent_tokens": 8} | ({} if method == "hash" else {"budget_pages": 8})

    def run(offload: dict):
        driver, found = Driver(layers, routing=routing, placement="position", num_shards=2, offload=offload, checks=[]), []
        missing = chosen_far(driver)
        driver.new_generation()
        for mask in [ragged([12, 9])] * 8 + [ragged([1, 1])] * 12:
            found.append(driver.forward(mask))
            if offload and prefetch == "none" and method != "page_oracle":  # which reads all to choose
                for i, pool in enumerate(tiered_pools(driver)):
                    chosen = sum(map(len, missing.get(i, [])))
                    assert pool.staged.fetched == chosen, "staged is not what was chosen and not there"
                    assert pool.bytes_fetched == chosen * pool.section_bytes(pool.staged.sections)
        return driver, found

    (_, plain), (driver, tiered) = run({}), run(tiers(layers, 20, 24, prefetch=prefetch))
    for one, other in zip(plain, tiered, strict=True):
        for (out, lse), (also_out, also_lse) in zip(one, other, strict=True):
            assert rel_error(torch.nan_to_num(also_out), torch.nan_to_num(out)) < 1e-6
            assert rel_error(also_lse.exp(), lse.exp()) < 1e-6
    check_tiers(driver)
    assert all(pool.num_far > 8 and pool.staged.fetched for pool in tiered_pools(driver))


def test_more_chosen_than_staging_holds():
    """The read happens in pieces, and staging stays what it is."""
    layers = [layer(0, dim=16)]
    routing = {"method": "page_oracle", "budget_pages": 64, "sink_tokens": 4, "recent_tokens": 8}
    driver = Driver(layers, routing=routing, offload=tiers(layers, 14, 3))  # the budget covers everything: dense attention is the oracle
    grown(driver, [90, 41])
    for _ in range(5):
        driver.decode()
        poison(driver)
    assert len(tiered_pools(driver)[0].pages) == 17


def test_what_scored_next_best_is_fetched_ahead():
    layers = [layer(0, dim=16)]
    routing = {"method": "bounds", "budget_pages": 10, "sink_tokens": 4, "recent_tokens": 8}
    driver = grown(Driver(layers, routing=routing, offload=tiers(layers, 14, 40, prefetch="scores"), checks=[]), [150, 120])
    for _ in range(12):
        driver.decode()
    staged = tiered_pools(driver)[0].staged
    assert staged.ahead and staged.used_ahead, (staged.ahead, staged.used_ahead)
    for held in staged.held:
        assert len(set(held[held >= 0])) == int((held >= 0).sum())
