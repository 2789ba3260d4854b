"""PiKVCache on one rank, several shards, against dense attention in float64 and the reference cache; invariants after every forward."""

import pytest
import torch

from pikv_ds.cache.cache import PiKVCache
from pikv_ds.cache.inspect import CacheProbe
from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.errors import CapacityError
from pikv_ds.step.step import LocalStep
from tests.harness.driver import Driver, layer, ragged
from tests.harness.invariants import check, check_pages, poison

pytestmark = pytest.mark.usefixtures("nan_filled_empty")

KINDS = [layer(0), layer(1, window=6), layer(2, latent=True)]
PLACEMENTS = {
    "experts": {},
    "xor": {"placement": "xor", "n_tok": 4},
    "position": {"placement": "position"},
    "table": {"placement": "table", "table": [[[e % 4, (e + 1) % 4] if e % 3 else [3 - e % 4, -1] for e in range(8)]]},
}


def run_mix(driver: Driver) -> None:
    """Prefill of ragged rows, decode, chunks with padding on either side, idle rows, decode; checked after every forward."""
    driver.prefill([9, 1, 17])
    check(driver)
    for mask in [*[ragged([1, 1, 1])] * 7, ragged([4, 0, 9]), ragged([1, 0, 1]), ragged([11, 3, 2], left=False), *[ragged([1, 1, 1])] * 4]:
        driver.forward(mask)
        check(driver)
        poison(driver)


@pytest.mark.parametrize("expert_ids", ["previous_layer", "true"])
@pytest.mark.parametrize("page_size", [1, 3, 32, 256], ids="page{}".format)
@pytest.mark.parametrize("num_shards", [1, 4], ids="S{}".format)
def test_mix_is_dense(num_shards, page_size, expert_ids):
    run_mix(Driver(KINDS, page_size=page_size, num_shards=num_shards, expert_ids=expert_ids))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_placement_is_dense(placement):
    run_mix(Driver(KINDS, page_size=3, num_shards=4, **PLACEMENTS[placement]))


def test_bf16_entries_are_read_as_stored():
    run_mix(Driver(KINDS, page_size=3, num_shards=2, dtype=torch.bfloat16))


@pytest.mark.parametrize(("num_q_heads", "num_kv_heads"), [(4, 4), (8, 2), (8, 1)], ids=["G1", "G4", "G8"])
def test_grouped_queries_are_dense(num_q_heads, num_kv_heads):
    kinds = [layer(0, num_kv_heads=num_kv_heads), layer(1, num_kv_heads=num_kv_heads, window=5)]
    run_mix(Driver(kinds, page_size=3, num_shards=2, num_q_heads=num_q_heads))


@pytest.mark.parametrize("window", [2, 3, 7, 8, 9], ids="W{}".format)
@pytest.mark.parametrize("page_size", [1, 4], ids="page{}".format)
def test_windows_expire_pages_and_stay_dense(window, page_size):
    driver = Driver([layer(0, window=window)], page_size=page_size, num_shards=2)
    run_mix(driver)
    for _ in range(40):
        driver.decode()
    check(driver)
    partly_left = 3 * 2 * (page_size - 1)  # rows x shards: the rest of a page of which something is still visible
    assert driver.probe.live <= 3 * (window - 1) + partly_left


@pytest.mark.parametrize("expert_ids", ["previous_layer", "true"])
def test_a_hot_expert_spills_and_stays_dense(expert_ids):
    driver = Driver(KINDS, page_size=2, num_shards=4, expert_ids=expert_ids)
    driver.skewed = True
    run_mix(driver)
    assert driver.reference.spilled > 20
    load = driver.probe.loads[0]
    assert int(load.max()) <= driver.reference.capacity(0)


def test_a_fixed_capacity_spills_until_it_is_full():
    driver = Driver([layer(0)], page_size=2, num_shards=4, capacity_tokens=7)
    driver.prefill([12, 9])
    check(driver)
    for _ in range(3):
        driver.decode()
        check(driver)
    driver.forward(ragged([1, 0]))
    check(driver)
    assert driver.probe.loads[0].tolist() == [7, 7, 7, 7]
    with pytest.raises(
        CapacityError, match=r"layer 0 must hold 30 entries, but pikv.storage.capacity_tokens = 7 x 4 shards is 28; raise .* at least 8"
    ):
        driver.decode()


def test_overflow_error_names_the_setting_and_what_to_do():
    driver = Driver([layer(0)], page_size=2, num_shards=4, capacity_tokens=8, overflow="error")
    driver.skewed = True
    driver.prefill([5, 3])  # exactly full: no overflow
    check(driver)
    with pytest.raises(
        CapacityError, match=r"2 entries did not fit .*capacity_tokens: 8 entries.*overflow = 'error'; raise capacity_tokens"
    ):
        driver.decode()


def test_a_balanced_load_never_overflows():
    driver = Driver([layer(0)], page_size=2, num_shards=4, placement="position", capacity_tokens=5, overflow="error")
    driver.prefill([17])
    for _ in range(3):
        driver.decode()
    check(driver)
    assert driver.probe.loads[0].tolist() == [5, 5, 5, 5] and driver.reference.spilled == 0


@pytest.mark.parametrize("page_size", [1, 3, 32], ids="page{}".format)
def test_forks_share_pages_and_copy_only_what_is_written(page_size):
    driver = Driver([layer(0)], page_size=page_size, num_shards=2)
    driver.prefill([19, 8])
    before = driver.probe.near_pool(0).num_pages
    driver.select([0, 0, 0, 1])
    driver.decode()
    check(driver)
    pool = driver.probe.near_pool(0)
    if page_size == 3:
        assert int(pool.uses.max()) == 3, "full pages of the prefix are shared by three forks"
    assert pool.used_pages <= before + 3 * 2 + 2, "a fork copied full pages"
    for index in ([3, 0, 2, 2], [1, 1, 0, 0], [2, 3, 2, 0]):
        driver.select(index)
        driver.decode()
        check(driver)
        poison(driver)
    driver.select([2])
    driver.decode()
    check(driver)


@pytest.mark.parametrize("page_size", [1, 3, 32], ids="page{}".format)
def test_crops_and_forks_in_one_move(page_size):
    driver = Driver([layer(0), layer(1, latent=True)], page_size=page_size, num_shards=4)
    driver.prefill([19, 8])
    driver.select([1, 0, 0])
    driver.crop([8, 3, 17])
    driver.decode()
    check(driver)
    driver.crop([0, 4, 9])  # a row cropped to nothing starts over
    driver.forward(ragged([5, 1, 2]))
    check(driver)


@pytest.mark.parametrize("page_size", [1, 3, 32], ids="page{}".format)
def test_announced_crops_find_what_left_the_window(page_size):
    """Assisted decoding: several tokens, then some of them are taken back; the window's older keys must still be there."""
    driver = Driver([layer(0), layer(1, window=5)], page_size=page_size, num_shards=2)
    driver.prefill([23, 6])
    driver.announce_crops()
    for accepted in (0, 3, 1, 5, 2):
        driver.forward(ragged([6, 6]))
        check(driver)
        driver.crop([n - 6 + accepted for n in driver.lens])
    driver.decode()
    check(driver)


def test_reset_returns_all_memory():
    driver = Driver(KINDS, page_size=4, num_shards=4)
    empty, directory = [pool.nbytes for pool in driver.probe.all_pools], driver.probe.directory_bytes
    driver.prefill([40, 7])
    assert all(pool.nbytes > bare for pool, bare in zip(driver.probe.all_pools, empty, strict=True))
    driver.reset()
    assert [pool.nbytes for pool in driver.probe.all_pools] == empty
    assert driver.probe.directory_bytes == directory and int(driver.probe.loads.sum()) == 0
    check(driver)
    run_mix(driver)


def test_a_new_generation_forgets_the_old_one():
    driver = Driver(KINDS, page_size=4, num_shards=2)
    driver.prefill([40, 7])
    driver.prefill([3])
    check(driver)
    assert driver.probe.near_pool(0).num_pages <= 2
    driver.decode()
    check(driver)


def test_pages_add_up_inside_a_forward():
    """Between two layers of one forward the first has grown and the second has only reserved."""
    cache = PiKVCache(
        [layer(0), layer(1)],
        PiKVConfig(page_size=3, storage={"num_shards": 2}),
        num_experts=4,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    positions = torch.arange(8, dtype=torch.int32).view(1, 8)
    cache.begin_step(
        LocalStep(
            num_rows=1,
            num_columns=8,
            num_new=[8],
            parent=[-1],
            keep=[0],
            positions=positions,
            digest=0,
            identity=False,
            fresh=True,
        )
    )
    q = torch.randn(1, 8, 2, 8)
    for i in range(2):
        cache.attend(i, q, q, q, scale=1.0, v_dim=8, expert_ids=torch.arange(8) % 4)
        for pool, live in zip(CacheProbe(cache).all_pools, [8, 8 * i], strict=True):
            assert int(pool.counts.sum()) == live
            check_pages(pool, shrunk=False)
    cache.end_step()
    for pool in CacheProbe(cache).all_pools:
        check_pages(pool)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_hidden_slots_do_not_change_a_bit(dtype):
    """Two equal caches, one with NaN in every slot that holds no live entry: the outputs are the same bits."""
    drivers = [Driver(KINDS, page_size=4, num_shards=2, seed=3, dtype=dtype) for _ in range(2)]
    for driver in drivers:
        driver.prefill([13, 5])
    for mask in (ragged([1, 1]), ragged([3, 0]), ragged([1, 1])):
        poison(drivers[1])
        (outputs, others) = (driver.forward(mask) for driver in drivers)
        for (out, lse), (other, other_lse) in zip(outputs, others, strict=True):
            assert torch.equal(out[mask], other[mask]) and torch.equal(lse[mask], other_lse[mask])


@pytest.mark.parametrize("page_size", [1, 3, 32], ids="page{}".format)
def test_a_crop_behind_the_window_is_refused(page_size):
    """After 20 tokens of a window of 8, positions up to 12 may be gone; a query at 18 needs 11 and 12."""
    driver = Driver([layer(0), layer(1, window=8)], page_size=page_size, num_shards=2)
    driver.prefill([20, 7])
    driver.crop([20, 5])  # the short row has lost nothing
    driver.decode()
    check(driver)
    driver.select([1, 0])
    driver.crop([6, 19])
    with pytest.raises(RuntimeError, match=r"crop to 19 of 21 tokens.*layer 1.*window of 8"):
        driver.decode()


@pytest.mark.parametrize("window", [8, 9], ids="W{}".format)
def test_what_leaves_the_window_makes_room(window):
    """Alternating homes in a window layer that fills its capacity: nothing overflows, in chunks, crops or decoding."""
    driver = Driver([layer(0, window=window)], page_size=2, num_shards=2, placement="position", capacity_tokens=4, overflow="error")
    driver.prefill([13])
    for mask in (*[ragged([1])] * 5, ragged([6]), ragged([11]), ragged([3])):
        driver.forward(mask)
        check(driver)
    assert driver.reference.spilled == 0
