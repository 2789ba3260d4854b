"""What holds after every forward of a Driver: no page lost, no page in two tables by mistake, every live entry stored once and intact."""

import torch
from torch import Tensor

from pikv_ds.cache.inspect import PoolProbe
from pikv_ds.cache.stats import stats
from pikv_ds.pages.allocator import GROWTH
from tests.harness.driver import Driver


def check_pages(pool: PoolProbe, *, shrunk: bool = True) -> None:
    """free + used = total; reference counts; table shape. shrunk: free slabs have been given back, as after every forward."""
    table, counts, page_size = pool.page_table, pool.counts, pool.page_size
    num_used = (counts + page_size - 1) // page_size
    column = torch.arange(table.shape[-1])
    assert torch.equal(table >= 0, column < num_used.unsqueeze(-1)), "a table names pages beyond its entries, or misses one"
    names = torch.cat([table.flatten(), pool.parked_table.flatten()])
    named = torch.bincount(names[names >= 0], minlength=pool.num_pages)
    assert torch.equal(named, pool.uses), "reference counts differ from the tables"
    used = set(names[names >= 0].tolist())
    free = pool.free
    assert len(set(free)) == len(free) and not used & set(free), "a page is free twice, or free and in a table"
    assert used | set(free) == set(range(pool.num_pages)), "pages were lost"
    assert table.shape[-1] == 0 or bool((table[..., -1] == -1).all()), "the spare column is used"
    if shrunk:
        assert len(free) <= 1 + len(used) // GROWTH, "slabs were not given back"
        assert pool.num_pages <= 1.25 * len(used) + max(1, pool.num_pages // GROWTH)


def check_unshared(pool: PoolProbe) -> None:
    """A page that is still written to (not full) belongs to one table."""
    rows, tables = (pool.counts % pool.page_size != 0).nonzero(as_tuple=True)
    last = pool.page_table[rows, tables, pool.counts[rows, tables] // pool.page_size]
    assert bool((pool.uses[last.long()] == 1).all()), "an open page is shared"


def check_entries(driver: Driver, i: int) -> None:
    """The store holds the reference's entries, in its order, bit for bit."""
    pool, spec = driver.probe.near_pool(i), driver.layers[i]
    for row in range(len(driver.lens)):
        seen = []
        for shard in range(driver.cache.num_shards):
            entries = driver.reference.shard_entries(i, row, shard)
            positions, k, v = pool.entries(row, shard)
            assert positions.tolist() == [e.position for e in entries], f"layer {i}, row {row}, shard {shard}"
            if entries:
                assert torch.equal(k, torch.stack([e.k for e in entries]))
                assert spec.latent or torch.equal(v, torch.stack([e.v for e in entries]))
            seen += [e.position for e in entries]
        length = driver.lens[row]
        assert len(set(seen)) == len(seen), "a position is stored twice"
        visible = set(range(length - spec.tokens_kept(length), length))
        assert visible <= set(seen), f"layer {i}, row {row}: visible positions are gone: {sorted(visible - set(seen))}"


def check_directory(driver: Driver) -> None:
    loads = driver.probe.loads
    for i in range(len(driver.layers)):
        assert loads[i].tolist() == driver.reference.load(i), f"layer {i}: load"
        for row, entries in enumerate(driver.reference.rows[i]):
            homes = driver.probe.homes(i)[row][[e.position for e in entries]].tolist()
            assert homes == [e.shard for e in entries], f"layer {i}, row {row}: homes"


def check_numbers(driver: Driver) -> None:
    numbers, reference = stats(driver.cache, 1, 1), driver.reference
    live = sum(len(row) for rows in reference.held for row in rows)
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
    assert numbers["kv_bytes_allocated"] == driver.probe.bytes, "bytes reported are not the bytes held"
    assert sum(numbers["load_per_expert"]) == reference.appended


def check(driver: Driver) -> None:
    """Everything, between forwards; row changes that still wait are the caller's to avoid."""
    for i, pool in enumerate(driver.probe.all_pools):
        check_pages(pool)
        check_unshared(pool)
        check_entries(driver, i)
    if driver.cache.num_shards > 1:
        check_directory(driver)
    check_numbers(driver)


def parked_slots(driver: Driver, i: int) -> list[Tensor]:
    """[n] int64 of the entries of every table of every parked row of a layer, page * page_size + offset."""
    pool, counts = driver.probe.near_pool(i), driver.probe.parked.counts
    index = [torch.arange(n) for n in (counts[0][i].flatten().tolist() if counts else ())]
    ids = pool.parked_table.flatten(0, 1)
    return [(own[at // pool.page_size] * pool.page_size + at % pool.page_size).long() for own, at in zip(ids, index, strict=True)]


def poison(driver: Driver) -> None:
    """NaN into every slot that holds no live entry."""
    for i in range(driver.probe.num_layers):
        pool = driver.probe.near_pool(i)
        live = [pool.slots(row, table) for row in range(len(pool.counts)) for table in range(pool.num_tables)]
        live += parked_slots(driver, i)
        dead = torch.ones(pool.num_pages * pool.page_size, dtype=torch.bool)
        dead[torch.cat([torch.zeros(0, dtype=torch.int64), *live])] = False
        dead = dead.nonzero().squeeze(-1)
        for field in pool.fields[:2]:
            field[dead // pool.page_size, :, dead % pool.page_size] = torch.nan
