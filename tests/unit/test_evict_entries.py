"""Single entries leave and the others close up: the oracle in loops, entry by entry; bytes, forks, crops, pages, what is refused."""

import itertools

import pytest
import torch

from pikv_ds.ops.format.bound_codes import encode_box
from pikv_ds.pages.compact import compact
from pikv_ds.pages.entries import decoded
from pikv_ds.pages.recycle import remap
from tests.unit.driver import Driver, layer, ragged, rel_error
from tests.unit.evicting import EvictingDriver, entries_of, last_position
from tests.unit.invariants import check_pages, poison
from tests.unit.stores import SPEC, make_store
from tests.unit.test_evict import KINDS, ORACLES, SMALL, run_mix

pytestmark = pytest.mark.usefixtures("nan_filled_empty")
TOKEN = {"granularity": "token", **SMALL}


@pytest.mark.parametrize("method", ORACLES)
@pytest.mark.parametrize(("num_shards", "page_size"), [(1, 4), (4, 4), (2, 1)])
def test_kept_sets_and_attention(num_shards, page_size, method):
    """The budget is kept to the entry, whatever the page size; freed slots and those behind what stays hold NaN."""
    score, options = ORACLES[method]
    scheduling = {"method": method, "budget_tokens": 15, **TOKEN, **options}
    driver = EvictingDriver(KINDS, score, scheduling, page_size=page_size, num_shards=num_shards)
    run_mix(driver)
    assert [len(driver.kept(0, row)) for row in range(3)] == [15, 15, 15] and driver.evicted > 100


@pytest.mark.parametrize("num_shards", [1, 4], ids="S{}".format)
def test_forks_copy_what_they_compact(num_shards):
    driver = EvictingDriver(
        KINDS, last_position, {"method": "streaming_llm", "budget_tokens": 18, **TOKEN}, page_size=4, num_shards=num_shards
    )
    driver.prefill([40, 17])
    for parents in ([0, 1], [1, 0, 0], [2, 1], [0, 0, 1, 1]):
        driver.select(parents)
        driver.decode()
        poison(driver)
        driver.decode()


@pytest.mark.parametrize("method", ["streaming_llm", "h2o"])
def test_crops_that_were_announced_wait_with_eviction(method):
    score, _ = ORACLES[method]
    driver = EvictingDriver(KINDS, score, {"method": method, "budget_tokens": 18, **TOKEN}, page_size=4, num_shards=2)
    driver.prefill([40, 17])
    driver.announce_crops()
    for taken_back in (3, 0, 4):
        driver.forward(ragged([5, 5]))
        poison(driver)
        driver.crop([n - taken_back for n in driver.lens])
    driver.cache.hold_margin = None
    driver.decode()
    assert driver.evicted > 20


def test_entries_that_take_the_place_of_cropped_ones_start_anew():
    driver = EvictingDriver([layer(0)], ORACLES["h2o"][0], {"method": "h2o", "budget_tokens": 18, **TOKEN}, page_size=8)
    driver.prefill([9, 11])
    driver.announce_crops()
    for taken_back in (5, 4):
        driver.forward(ragged([6, 6]))
        driver.crop([n - taken_back for n in driver.lens])
    driver.cache.hold_margin = None
    for _ in range(14):
        driver.decode()
    assert driver.evicted > 10


@pytest.mark.parametrize("interval", [1, 5])
def test_quiet_steps_end_when_tables_shrink(interval):
    """One layer and shard, pages of 8: most steps open none, and an eviction moves where the next one begins."""
    scheduling = {"method": "streaming_llm", "budget_tokens": 23, "interval": interval, **TOKEN}
    driver = EvictingDriver([layer(0), layer(1)], last_position, scheduling, page_size=8)
    driver.prefill([30, 9])
    for _ in range(40):
        driver.decode()
        poison(driver)


@pytest.mark.parametrize("codec", ["fp8_e4m3", "int8", "int4"])
@pytest.mark.parametrize(("method", "num_shards"), [("streaming_llm", 1), ("h2o", 2)])
def test_compressed_pages(method, num_shards, codec):
    """Entries of 0 and full scale lose nothing to a format, encoded anew or not: attention finds each where it should be."""
    scheduling = {"method": method, "budget_tokens": 100, **TOKEN}
    driver = EvictingDriver([layer(0)], ORACLES[method][0], scheduling, page_size=64, num_shards=num_shards, codec=codec)
    driver.prefill([150, 70])
    for mask in [*[ragged([1, 1])] * 3, ragged([90, 5]), *[ragged([1, 1])] * 3]:
        driver.forward(mask)
    assert driver.evicted > 140


class Store:
    """A store of two rows and two heads on which compact() is called alone."""

    def __init__(self, codec: str, counts: list[int], page_size: int = 64) -> None:
        self.store = make_store(len(counts), 1, page_size, codec=codec)
        self.positions = [list(range(n)) for n in counts]
        generator = torch.Generator().manual_seed(0)
        rows, positions = (torch.tensor(x) for x in zip(*[(r, p) for r, n in enumerate(counts) for p in range(n)], strict=True))
        self.k = torch.randn(len(rows), 2, SPEC.k_dim, generator=generator)
        v = torch.randn(len(rows), 2, SPEC.v_dim, generator=generator)
        here = torch.ones(len(rows), dtype=torch.bool)
        self.store.reserve(0, sum(-(-n // page_size) for n in counts), max(counts) // page_size + 1)
        self.store.append(rows, None, here, positions.int(), self.k, v, one_per_row=False, may_open=True, all_valid=True)

    def read(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """k [n, 2, Dk], v, positions of all entries, row by row."""
        store = self.store
        k, v = decoded(store, store.block_table.flatten(0, 1), store.counts.flatten(), store.tail)
        held = torch.arange(k.shape[2]) < store.counts
        positions = store.positions[store.block_table.clamp_min(0)].flatten(1)
        return k.transpose(1, 2)[held], v.transpose(1, 2)[held], positions[held]

    def take(self, gone: dict[int, list[int]]) -> torch.Tensor:
        """Take out these indices of rows; returns which entries of read() stay."""
        store = self.store
        mask = torch.zeros(store.counts.shape[0], 1, store.block_table.shape[-1] * store.page_size, dtype=torch.bool)
        for row, indices in gone.items():
            mask[row, 0, indices] = True
        held = torch.arange(mask.shape[-1]) < store.counts.unsqueeze(-1)
        stays = ~mask[held]
        assert compact(store, mask).dropped == sum(map(len, gone.values()))
        return stays


@pytest.mark.parametrize("codec", ["none", "fp8_e4m3"])
def test_entries_move_bit_by_bit(codec):
    case = Store(codec, [150, 200])
    before = case.read()
    stays = case.take({0: [0, 70, 71], 1: list(range(3, 140))})
    for got, want in zip(case.read(), before, strict=True):
        assert torch.equal(got, want[stays])
    check_pages(case.store, shrunk=False)
    assert case.store.counts.flatten().tolist() == [147, 63]


@pytest.mark.parametrize(("codec", "limit"), [("int8", 0.0064), ("int4", 0.11)])
def test_keys_by_groups_are_encoded_anew(codec, limit):
    """Values, positions and the keys before the first hole keep their bits; what the others lose is said here, per eviction."""
    case = Store(codec, [150, 200])
    first, kept = case.read(), torch.arange(350)
    errors = []
    for step in range(9):
        before = case.read()
        stays = case.take({0: [70], 1: [100 - step]})
        kept = kept[stays]
        k, v, positions = case.read()
        assert torch.equal(v, first[1][kept]) and torch.equal(positions, first[2][kept])
        assert torch.equal(k[:64], before[0][:64]) and torch.equal(k[149 - step :][:64], before[0][150 - step :][:64])
        errors.append(rel_error(k, case.k[kept]))
    print(f"{codec}: keys off by {rel_error(first[0], case.k):.4f} once stored, then {[round(e, 4) for e in errors]} per eviction")
    assert max(errors) <= limit


def test_shared_pages_are_copied_and_freed():
    case = Store("none", [150])
    store = case.store
    counts = torch.tensor([[150], [150], [128]], dtype=torch.int32)
    remap(store, torch.tensor([0, 0, 0]), counts)
    assert store.refcount[:-1].max() == 3
    stays = case.take({1: [64, 149]})
    check_pages(store, shrunk=False)
    k, _, positions = case.read()
    assert positions.tolist() == [*range(150), *(p for p in range(150) if p not in (64, 149)), *range(128)]
    assert torch.equal(k, case.k[positions.long()]) and int(stays.sum()) == 426
    table = store.block_table[:, 0]
    assert table[0, 0] == table[1, 0] == table[2, 0] and table[0, 1] == table[2, 1] != table[1, 1]


@pytest.mark.parametrize("metadata", ["fp32", "int8"])
@pytest.mark.parametrize("codec", ["none", "int8"])
def test_bounds_of_compacted_pages(codec, metadata):
    """Bounds are those of the keys that a page has now, neither wider nor too narrow; all pages are read, so attention is exact."""
    routing = {"method": "bounds", "metadata": metadata, "budget_ratio": 1.0, "sink_tokens": 2, "recent_tokens": 3}
    scheduling = {"method": "knorm" if codec == "none" else "streaming_llm", "budget_tokens": 75, **TOKEN}
    page_size = 4 if codec == "none" else 64
    driver = Driver([layer(0)], page_size=page_size, num_shards=2, codec=codec, routing=routing, scheduling=scheduling)
    driver._compare = lambda *_: None
    driver.prefill([150, 70])
    for mask in [*[ragged([1, 1])] * 3, ragged([20, 5]), *[ragged([1, 1])] * 9]:
        driver.forward(mask)
        store = driver.cache.tables.stores[0]
        for row, shard in itertools.product(range(2), range(2)):
            keys = entries_of(store, row, shard)[0]
            for column, own in enumerate(keys.split(page_size)):
                found, box = store.summaries["bounds"][store.block_table[row, shard, column]], torch.stack((own.amin(0), own.amax(0)), 1)
                assert torch.equal(found, box if metadata == "fp32" else encode_box(box)), (row, shard, column)
    assert driver.cache.tables.counters.evicted > 90


def test_clusters_of_compacted_pages():
    routing = {"method": "centroids", "budget_ratio": 1.0, "sink_tokens": 2, "recent_tokens": 3}
    scheduling = {"method": "knorm", "budget_tokens": 20, **TOKEN}
    driver = Driver([layer(0)], page_size=4, routing=routing, scheduling=scheduling)
    driver._compare = lambda *_: None
    driver.prefill([60, 25])
    for _ in range(6):
        driver.decode()
        store = driver.cache.tables.stores[0]
        counted = store.summaries["clusters"][store.block_table.clamp_min(0)].sum(-1)  # [R, S, C, H]
        entries = (store.counts.unsqueeze(-1) - 4 * torch.arange(store.block_table.shape[-1])).clamp(0, 4)
        assert torch.equal(torch.where(entries > 0, counted[..., 0], 0), entries.to(counted.dtype))


@pytest.mark.parametrize("head_budget", ["shared", "adaptive"])
@pytest.mark.parametrize("granularity", ["page", "token"])
def test_poisoned_slots_change_no_bit(granularity, head_budget):
    """Freed pages, evicted slots and those behind what closed up hold NaN in one of two runs."""
    outputs = []
    for poisoned in (False, True):
        scheduling = {"method": "h2o", "budget_tokens": 24, "granularity": granularity, "head_budget": head_budget, **SMALL}
        driver = Driver([layer(0), layer(1)], page_size=4, num_shards=2, scheduling=scheduling)
        driver._compare = lambda *_: None
        driver.prefill([40, 25])
        outputs.append([])
        for mask in [*[ragged([1, 1])] * 3, ragged([9, 4]), *[ragged([1, 1])] * 3]:
            if poisoned:
                poison(driver)
            outputs[-1] += [x for pair in driver.forward(mask) for x in pair]
        assert driver.cache.tables.counters.evicted > 60
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True)) and outputs[0][-1].isfinite().all()
