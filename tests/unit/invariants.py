"""What holds after every forward of a Driver: no page lost, no page in two tables by mistake, every live entry stored once and intact."""

import torch

from pikv_ds import ops
from pikv_ds.cache.stats import stats
from pikv_ds.pages.pool import GROWTH, LayerStore
from pikv_ds.placement.directory import Directory
from tests.unit.driver import Driver
from tests.unit.stores import stored


def check_pages(store: LayerStore, *, shrunk: bool = True) -> None:
    """free + used = total; reference counts; table shape. shrunk: free slabs have been given back, as after every forward."""
    table, counts, page_size = store.block_table, store.counts, store.page_size
    num_used = (counts + page_size - 1) // page_size
    column = torch.arange(table.shape[-1])
    assert torch.equal(table >= 0, column < num_used.unsqueeze(-1)), "a table names pages beyond its entries, or misses one"
    named = torch.bincount(table[table >= 0], minlength=store.num_pages + 1).to(torch.int32)
    assert torch.equal(named, store.refcount), "reference counts differ from the tables"
    used = set(table[table >= 0].tolist())
    free = store.free_stack[: int(store.free_top)].tolist()
    assert len(set(free)) == len(free) and not used & set(free), "a page is free twice, or free and in a table"
    assert used | set(free) == set(range(store.num_pages)), "pages were lost"
    assert table.shape[-1] == 0 or bool((table[..., -1] == -1).all()), "the spare column is used"
    if shrunk:
        assert len(free) <= 1 + len(used) // GROWTH, "slabs were not given back"
        assert store.num_pages <= 1.25 * len(used) + max(1, store.num_pages // GROWTH)


def check_unshared(store: LayerStore) -> None:
    """A page that is still written to (not full) belongs to one table."""
    rows, shards = (store.counts % store.page_size != 0).nonzero(as_tuple=True)
    last = store.block_table[rows, shards, store.counts[rows, shards] // store.page_size]
    assert bool((store.refcount[last] == 1).all()), "an open page is shared"


def slots_of(store: LayerStore, row: int, shard: int) -> torch.Tensor:
    """Slots of the entries of one (row, shard), in order."""
    index = torch.arange(int(store.counts[row, shard]))
    return store.block_table[row, shard][index // store.page_size] * store.page_size + index % store.page_size


def check_entries(driver: Driver, i: int) -> None:
    """The store holds the reference's entries, in its order, bit for bit."""
    store, spec = driver.cache.tables.stores[i], driver.layers[i]
    for row in range(len(driver.lens)):
        seen = []
        for shard in range(driver.cache.num_shards):
            slots, entries = slots_of(store, row, shard), driver.reference.shard_entries(i, row, shard)
            k, v, positions = stored(store, slots)
            assert positions.tolist() == [e.position for e in entries], f"layer {i}, row {row}, shard {shard}"
            if entries:
                assert torch.equal(k, torch.stack([e.k for e in entries]))
                assert spec.latent or torch.equal(v, torch.stack([e.v for e in entries]))
            seen += [e.position for e in entries]
        length = driver.lens[row]
        assert len(set(seen)) == len(seen), "a position is stored twice"
        visible = set(range(length - spec.tokens_kept(length), length))
        assert visible <= set(seen), f"layer {i}, row {row}: visible positions are gone: {sorted(visible - set(seen))}"


def check_directory(driver: Driver, directory: Directory) -> None:
    for i in range(len(driver.layers)):
        assert directory.load[i].tolist() == driver.reference.load(i), f"layer {i}: load"
        for row, entries in enumerate(driver.reference.rows[i]):
            homes = directory.shard_at[i][row][[e.position for e in entries]].tolist()
            assert homes == [e.shard for e in entries], f"layer {i}, row {row}: homes"


def check_numbers(driver: Driver) -> None:
    numbers, reference, tables = stats(driver.cache, 1, 1), driver.reference, driver.cache.tables
    live = sum(len(row) for rows in reference.rows for row in rows)
    got = {name: numbers[f"entries_{name}"] for name in ("live", "appended", "expired", "cropped", "forked", "evicted")}
    assert got == {
        "live": live,
        "appended": reference.appended,
        "expired": reference.expired,
        "cropped": reference.cropped,
        "forked": reference.forked,
        "evicted": 0,
    }
    assert got["live"] + got["expired"] + got["evicted"] + got["cropped"] == got["appended"] + got["forked"]
    assert numbers["spilled"] == numbers["spilled_group"] == reference.spilled
    tensors = [t for s in tables.stores for t in (s.pages, s.tail) if t is not None]
    assert numbers["kv_bytes_allocated"] == sum(t.untyped_storage().nbytes() for t in tensors), "bytes reported are not the bytes held"
    assert sum(numbers["load_per_expert"]) == reference.appended


def check(driver: Driver) -> None:
    """Everything, between forwards; row changes that still wait are the caller's to avoid."""
    tables = driver.cache.tables
    for i, store in enumerate(tables.stores):
        check_pages(store)
        check_unshared(store)
        check_entries(driver, i)
    if driver.cache.num_shards > 1:
        check_directory(driver, tables.directory)
    check_numbers(driver)


def poison(driver: Driver) -> None:
    """NaN into every slot that holds no live entry."""
    for store in driver.cache.tables.stores:
        rows, shards = store.counts.shape
        live = [slots_of(store, row, shard) for row in range(rows) for shard in range(shards)]
        dead = torch.ones(store.num_pages * store.page_size, dtype=torch.bool)
        dead[torch.cat([torch.zeros(0, dtype=torch.int64), *(slots.long() for slots in live)])] = False
        page, offset = dead.nonzero().squeeze(-1).div(store.page_size, rounding_mode="floor"), dead.nonzero().squeeze(-1) % store.page_size
        for field in ops.views(store.pages, store.fmt)[:2]:
            field[page, :, offset] = torch.nan
