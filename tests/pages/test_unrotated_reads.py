"""Routers, policies and readers of chosen pages over coefficients of un-rotated keys: what they meet is the key that is reconstructed."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pikv_ds import ops
from pikv_ds.cache.inspect import PoolProbe
from pikv_ds.errors import ConfigError
from pikv_ds.ops.format.bound_codes import decode_box
from pikv_ds.pages.view import PageView
from tests.harness.checks import Dense
from tests.harness.dense import dense_over, rel_error
from tests.harness.driver import Driver, layer, ragged
from tests.harness.evicting import accumulated, bound, evicting, last_query, observed, short_keys
from tests.harness.heads import HeadAttention
from tests.harness.invariants import poison
from tests.harness.windowed import run_mix, tiered
from tests.unrotated import held, unrotated

pytestmark = pytest.mark.usefixtures("nan_filled_empty")
LAYERS = [layer(0, dim=16), layer(1, dim=16, window=70), layer(2, dim=16)]
STORES = [("none", 4), ("fp8_e4m3", 4), ("int8", 64), ("int4", 64)]


def lossy(folder, store: str, page_size: int, *, lens=(150, 70), shards: int = 2, **options) -> Driver:
    """Coefficients of half the width; open groups in the tails."""
    compression = unrotated(LAYERS[:1], folder, rank=8, store=store)
    driver = Driver(LAYERS[:1], page_size=page_size, num_shards=shards, compression=compression, placement="position", checks=[], **options)
    driver.prefill(list(lens))
    driver.decode()
    return driver


def reconstructed(driver: Driver, row: int, shard: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """k_hat [H, D] and the coefficients of v [H, r] of every entry of a table, one at a time in f64, from the records and the tail."""
    pool, maps, found = driver.probe.near_pool(0), driver.probe.maps(0), []
    size, count = pool.page_size, int(pool.counts[row, shard])
    for i, (slot, position) in enumerate(zip(pool.slots(row, shard).tolist(), pool.positions(row, shard), strict=True)):
        page, offset = divmod(slot, size)
        k, v = (x[0, :, offset].double() for x in ops.decode_pages(pool.records[page : page + 1], pool.fmt))
        if pool.fmt.grouped and i >= count - count % pool.fmt.group:
            k = pool.tail[row * pool.num_tables + shard, :, i % pool.fmt.group].double()
        angle = position * maps.inv_freq.double()
        x = torch.einsum("hr,hrd->hd", k, maps.k.decode.double()) + maps.k.mean.double()
        z = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)
        found.append((torch.cat([z.real, z.imag], -1), v))
    return found


def tables(pool: PoolProbe) -> PageView:
    count = pool.counts.numel()
    tail_rows = None if pool.tail is None else torch.arange(count, dtype=torch.int32)
    return PageView(pool.page_table.view(count, 1, -1), pool.counts.view(count, 1), pool.tail, tail_rows)


@pytest.mark.parametrize("per_head", [False, True], ids=["one list", "a list per head"])
@pytest.mark.parametrize(("store", "page_size"), STORES)
def test_listed_pages_are_read_and_no_others(tmp_path, store, page_size, per_head):
    """Against loops, with window and lse of pages; what no list names holds NaN."""
    driver = lossy(tmp_path, store, page_size)
    pool, generator = driver.probe.near_pool(0), torch.Generator().manual_seed(3)
    q = torch.randn(2, 4, 16, generator=generator)
    stored, columns = tables(pool), pool.page_table.shape[-1]
    heads = 2 if per_head else 1
    page_list = torch.stack([torch.randperm(columns, generator=generator)[:2] for _ in range(4 * heads)]).view(4, heads, 2)
    used = -(-stored.seqlens // page_size).unsqueeze(-1)
    page_list = torch.where(page_list < used, page_list, -1).to(torch.int32)
    page_list[0, 0, 0] = used[0, 0, 0] - 1  # the open page
    window, at = 100, torch.tensor(driver.lens, dtype=torch.int32)
    entries = {(row, shard): reconstructed(driver, row, shard) for row in range(2) for shard in range(2)}
    positions = {key: pool.positions(*key) for key in entries}
    named = {int(stored.block_table[n, 0, c]) for n in range(4) for c in page_list[n].flatten().tolist() if c >= 0}
    unread = [page for page in range(pool.num_pages) if page not in named]
    kept = ops.positions(pool.records, pool.fmt)[unread].clone()
    pool.records[unread] = 0xFF
    ops.positions(pool.records, pool.fmt)[unread] = kept
    out, lse, page_lse = pool.pool.reader.attend_listed(q, stored, page_list, scale=0.3, window=window, q_positions=at, page_lse=True)
    assert page_lse.shape == (4, 4, 2)
    for row in range(2):
        for head in range(4):
            chosen, by_page = [], {}
            for shard in range(2):
                n, own = 2 * row + shard, page_list[2 * row + shard, head // 2 if per_head else 0].tolist()
                for place, column in enumerate(own):
                    rows = [
                        i for i in range(column * page_size, (column + 1) * page_size) if column >= 0 and i < len(positions[row, shard])
                    ]
                    rows = [i for i in rows if positions[row, shard][i] > int(at[row]) - window]
                    one = [tuple(x[head // 2].unsqueeze(0) for x in entries[row, shard][i]) for i in rows]
                    by_page[n, place], chosen = one, chosen + one
            for (n, place), one in by_page.items():
                want = dense_over(q[row, head : head + 1], one, 0.3)[1] if one else torch.tensor([-torch.inf])
                assert torch.allclose(page_lse[n, head, place], want.float(), atol=1e-4), (row, head, n, place)
            if not chosen:
                assert out[row, head].eq(0).all() and torch.isneginf(lse[row, head])
                continue
            want_out, want_lse, _ = dense_over(q[row, head : head + 1], chosen, 0.3)
            assert rel_error(out[row, head], want_out[0]) < 1e-5 and rel_error(lse[row, head], want_lse[0]) < 1e-5


def test_queries_in_blocks_are_those_at_once(tmp_path, monkeypatch):
    pool = lossy(tmp_path, "int4", 64).probe.near_pool(0)
    stored, q = tables(pool), torch.randn(2, 7, 4, 16)
    whole = pool.pool.reader.attend_pages(q, stored, scale=0.3)
    per_query = [pool.pool.reader.attend_listed(q[:, t], stored, None, scale=0.3, page_lse=True) for t in range(7)]
    monkeypatch.setattr("pikv_ds.pages.unrotated.NUMBERS_AT_ONCE", 2000)
    for x, y, part in zip(whole, pool.pool.reader.attend_pages(q, stored, scale=0.3), zip(*per_query, strict=True), strict=True):
        assert torch.allclose(x, y, atol=1e-6)
        assert torch.allclose(x, torch.stack([p.unflatten(0, (2, -1)) for p in part], 1).view_as(x), atol=1e-5)


@pytest.mark.parametrize(("store", "page_size", "metadata"), [
    ("none", 4, "fp32"), ("none", 4, "int8"), ("fp8_e4m3", 4, "bf16"), ("int8", 64, "fp32"), ("int4", 64, "int8"),
])  # fmt: skip
def test_bounds_hold_every_reconstructed_key(tmp_path, store, page_size, metadata):
    """In the width of a query, whatever was lost; and no wider than rounding makes them."""
    routing = {"method": "bounds", "budget_pages": 40, "metadata": metadata, "sink_tokens": 2, "recent_tokens": 5}
    driver = lossy(tmp_path, store, page_size, routing=routing)
    pool = driver.probe.near_pool(0)
    for masks in ([ragged([70, 3]), ragged([1, 1])], [ragged([0, 90])]):
        for mask in masks:
            driver.forward(mask)
        boxes, checked = decode_box(pool.column("bounds")), 0
        for row in range(2):
            for shard in range(2):
                keys = torch.stack([k for k, _ in reconstructed(driver, row, shard)]).float()
                for column, own in enumerate(keys.split(page_size)):
                    low, high = boxes[pool.page_ids(row, shard)[column]].unbind(1)  # [H, D]
                    slack, width = 1e-5, own.abs().amax() * {"fp32": 1e-5, "bf16": 1 / 64, "int8": 1 / 50}[metadata]
                    assert (own >= low - slack).all() and (own <= high + slack).all(), (row, shard, column)
                    assert (own.amin(0) - low).max() <= width and (high - own.amax(0)).max() <= width
                    checked += 1
        assert checked >= 4
    width = 2 * 16 * {"fp32": 4, "bf16": 2, "int8": 1}[metadata] + 4 * (metadata == "int8")
    assert pool.column("bounds").nbytes == pool.num_pages * 2 * width, "metadata is as wide as a query, not as a record"


@pytest.mark.parametrize("router", ["bounds", "centroids", "page_oracle"])
def test_pages_that_are_not_chosen_are_not_read(tmp_path, router):
    """Their records hold NaN between the choice and the reading: nothing changes."""
    routing = {"method": router, "budget_pages": 6, "sink_tokens": 2, "recent_tokens": 5}
    outputs = []
    for poisons in (False, True):
        driver = lossy(tmp_path, "none", 4, routing=routing)
        pool, hit = driver.probe.near_pool(0), []

        def hide(asked, page_list, pool=pool, hit=hit):
            table = asked.block_table.expand(-1, page_list.shape[1], -1)
            read = torch.where(page_list >= 0, table.gather(2, page_list.clamp_min(0).long()), pool.num_pages)
            unread = torch.ones(pool.num_pages + 1, dtype=torch.bool)
            unread[read.flatten().long()] = False
            k, v, _ = pool.fields
            hit.append((k.clone(), v.clone(), int(unread[:-1].sum())))
            k[unread[:-1]], v[unread[:-1]] = torch.nan, torch.nan

        if poisons:
            driver.probe.on_choice(hide)
        for _ in range(3):
            outputs.append(driver.forward(ragged([1, 1])))
            if poisons:
                k, v, count = hit[-1]
                pool.fields[0][:], pool.fields[1][:] = k, v
                assert count > 20
    for want, got in zip(outputs[:3], outputs[3:], strict=True):
        assert torch.equal(want[0][0], got[0][0]) and torch.equal(want[0][1], got[0][1])


@pytest.mark.parametrize(("method", "score"), [
    ("h2o", accumulated), ("tova", last_query), ("snapkv", observed), ("quest", bound), ("knorm", short_keys),
], ids=lambda x: x if isinstance(x, str) else "")  # fmt: skip
def test_what_is_kept_is_what_loops_keep(tmp_path, method, score):
    """With all directions, in chunks and decoding, on two shards; attention is that over the kept entries at the positions they had."""
    scheduling = {"method": method, "budget_tokens": 24, "sink_tokens": 2, "recent_tokens": 5} | (
        {"window": 3} if method == "snapkv" else {}
    )
    layers = [layer(0, dim=16), layer(1, dim=16)]
    driver, kept = evicting(layers, score, scheduling, page_size=4, num_shards=2, compression=unrotated(layers, tmp_path))
    driver.tolerance = 1e-5
    driver.prefill([33, 3])
    for mask in (ragged([1, 1]), ragged([9, 12]), *[ragged([1, 1])] * 3):
        poison(driver)
        driver.forward(mask)
    assert kept.evicted > 30


@pytest.mark.parametrize(("head_budget", "method", "page_size"), [
    ("uniform", "h2o", 3), ("adaptive", "quest", 3), ("uniform", "keydiff", 3), ("adaptive", "tova", 1),
])  # fmt: skip
def test_heads_keep_what_they_keep_of_raw_keys(tmp_path, head_budget, method, page_size):
    """A page that holds one kv head is put together with the maps of that head."""
    layers, kept = [layer(0), layer(1)], []
    scheduling = {"method": method, "budget_tokens": 22, "head_budget": head_budget, "sink_tokens": 2, "recent_tokens": 3}
    for compression in ({}, unrotated(layers, tmp_path)):
        options, seen = {"page_size": page_size, "num_shards": 2, "scheduling": scheduling, "compression": compression}, []
        driver = Driver(layers, checks=[HeadAttention()], **options)  # what the tables hold are coefficients: attention alone
        driver.tolerance = 1e-5
        driver.prefill([40, 25])
        for mask in (*[ragged([1, 1])] * 2, ragged([4, 9]), ragged([1, 1])):
            driver.forward(mask)
            seen.append(held(driver))
        kept.append(seen)
    of_row = kept[0][-1][0][0]
    assert kept[0] == kept[1] and of_row[::2] != of_row[1::2], "both heads kept the same entries"


@pytest.mark.parametrize("method", ["keydiff", "h2o"])
def test_open_groups_of_one_head(tmp_path, method):
    """As long as nothing leaves, a page per head gives what a page of all heads gives, from codes and from tails."""
    outputs, compression = [], unrotated(LAYERS[:1], tmp_path, rank=8, store="int8")
    for head_budget in ("uniform", "shared"):
        scheduling = {"method": method, "budget_tokens": 400, "head_budget": head_budget, "sink_tokens": 2, "recent_tokens": 3}
        driver = Driver(LAYERS[:1], page_size=64, num_shards=2, placement="position", scheduling=scheduling, compression=compression)
        driver.without(Dense).prefill([150, 70])
        outputs.append([driver.forward(ragged(new))[0] for new in ([1, 1], [3, 3], [1, 1])])
        pages = driver.probe.judged(0)
        outputs[-1].append([driver.probe.policy.score(pages).sum() / (len(pages.lens) / 2)])  # of a head, or their mean
        assert driver.probe.near_pool(0).heads == (2 if head_budget == "uniform" else 1)
    for one, other in zip(*outputs, strict=True):
        assert all(x.isfinite().all() and torch.allclose(x, y, atol=1e-4) for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("num_shards", [1, 3], ids="S{}".format)
def test_far_pages_beside_raw_ones_are_exact(tmp_path, num_shards):
    driver = tiered(LAYERS, page_size=4, num_shards=num_shards, codec="lora_plus", compression=unrotated(LAYERS, tmp_path))
    driver.tolerance = 1e-5
    run_mix(driver)


def test_demoted_keys_are_turned_back_and_projected(tmp_path):
    """At half the width: far keys are what a cache without a raw window holds of them, near ones as computed."""
    compression = unrotated(LAYERS[:1], tmp_path, rank=8)
    windowed, plain = (kind(LAYERS[:1], page_size=4, codec="lora_plus", compression=compression) for kind in (tiered, Driver))
    for driver in (windowed, plain):
        driver.without(Dense)
        driver.prefill([61])
        driver.decode()
    far, whole = windowed.probe.far_pool(0), plain.probe.near_pool(0)
    found = []
    for pool in (far, whole):
        positions, k, v = pool.entries(0, 0)
        found.append({p: (k[i], v[i]) for i, p in enumerate(positions.tolist())})
    assert 40 < len(found[0]) < 56 and len(found[1]) == 62
    for p, (k, v) in found[0].items():
        assert torch.allclose(k, found[1][p][0], atol=1e-5) and torch.allclose(v, found[1][p][1], atol=1e-5)
        assert rel_error(k, windowed.history[0][0][p][0]) > 1e-2


@pytest.mark.parametrize("blocks", [
    {"scheduling": {"method": "h2o", "budget_tokens": 40, "sink_tokens": 2, "recent_tokens": 3}},
    {"scheduling": {"method": "quest", "budget_tokens": 40, "sink_tokens": 2, "recent_tokens": 3}},
    {"routing": {"method": "bounds", "budget_pages": 9, "sink_tokens": 2, "recent_tokens": 7}},
    {"routing": {"method": "centroids", "budget_pages": 9, "sink_tokens": 2, "recent_tokens": 7}},
], ids=lambda x: next(iter(x.values()))["method"])  # fmt: skip
def test_choices_among_far_pages_are_those_of_raw_ones(tmp_path, blocks):
    found = []
    for codec, compression in (("none", {}), ("lora_plus", unrotated(LAYERS[:1], tmp_path))):
        driver, seen = tiered(LAYERS[:1], page_size=4, codec=codec, compression=compression, **blocks), []
        driver.checks.clear()
        driver.prefill([70, 31])
        for mask in (*[ragged([1, 1])] * 3, ragged([9, 20]), *[ragged([1, 1])] * 3):
            driver.forward(mask)
            seen.append(held(driver))
        found.append((seen, driver.probe.read, driver.forward(ragged([1, 1]))))
    (raw, read, outputs), (kept, also_read, others) = found
    assert kept == raw and read == also_read and rel_error(others[0][0], outputs[0][0]) < 1e-5


def test_bounds_stay_where_nothing_was_stored(tmp_path):
    """Another rank's entries, and padding: slot -1."""
    driver = lossy(tmp_path, "none", 4, routing={"method": "bounds", "budget_pages": 40, "sink_tokens": 2, "recent_tokens": 5})
    pool = driver.probe.near_pool(0)
    bounds = pool.column("bounds")
    before, table = bounds.clone(), torch.zeros(5, dtype=torch.int32)
    pool.pool.reader.bounds(bounds, torch.full((5,), -1, dtype=torch.int32), table)
    assert torch.equal(bounds, before)
    bounds.fill_(7)
    slots = torch.tensor([-1, 8, -1, 10, 9], dtype=torch.int32)  # three entries of page 2, in no order
    pool.pool.reader.bounds(bounds, slots, table)
    codes, at = ops.decode_pages(pool.records[2:3], pool.fmt)[0][0].transpose(0, 1), ops.positions(pool.records, pool.fmt)[2]
    keys = driver.probe.maps(0).keys(codes, at)[:3]
    low, high = bounds[2].float().unbind(1)
    assert (low <= keys.amin(0) + 1e-5).all() and (high >= keys.amax(0) - 1e-5).all() and (high - keys.amax(0)).max() < 0.05
    assert bounds[[i for i in range(pool.num_pages) if i != 2]].eq(7).all()


@pytest.mark.parametrize(("blocks", "said"), [
    ({"routing": {"method": "bounds", "budget_pages": 40}, "scheduling": {"method": "h2o", "budget_tokens": 80, "head_budget": "uniform"}},
     "legal is 'all'"),
    ({"raw_recent_tokens": 4, "scheduling": {"method": "h2o", "budget_tokens": 80, "head_budget": "uniform"}}, "legal is 'shared'"),
], ids=["router and heads", "raw window and heads"])  # fmt: skip
def test_what_is_refused_is_what_is_refused_of_other_codecs(tmp_path, blocks, said):
    window = {name: blocks[name] for name in blocks if name.startswith("raw")}
    rest = {name: blocks[name] for name in blocks if name not in window}
    for compression in ({}, unrotated([layer(0)], tmp_path)):
        with pytest.raises(ConfigError, match=said):
            Driver([layer(0)], compression=compression | window, **rest)


class NoWaiting(TorchDispatchMode):
    """Refuses what waits for a device: numbers read back, shapes that depend on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [x for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, torch.Tensor)]
        waits = func._schema.name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2")
        by_mask = func._schema.name == "aten::index" and any(x.dtype == torch.bool for x in given[1:])
        assert not waits and not by_mask, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("store", "page_size"), [("none", 4), ("int4", 64)])
def test_nothing_waits_for_the_device(tmp_path, store, page_size):
    routing = {"method": "bounds", "budget_pages": 40, "sink_tokens": 2, "recent_tokens": 5}
    driver = lossy(tmp_path, store, page_size, routing=routing)
    pool = driver.probe.near_pool(0)
    stored, q = tables(pool), torch.randn(2, 4, 16)
    page_list, bounds = torch.zeros(4, 2, 1, dtype=torch.int32), pool.column("bounds")
    with pytest.raises(AssertionError, match="waits for the device"), NoWaiting():
        pool.counts.sum().item()
    with NoWaiting():
        pool.pool.reader.attend_listed(q, stored, page_list, scale=0.3, page_lse=True)
        pool.pool.reader.attend_pages(q.unsqueeze(1), stored, scale=0.3)
        pool.pool.reader.bounds(bounds, torch.arange(3, dtype=torch.int32), torch.zeros(3, dtype=torch.int32))


def test_attention_counted_in_blocks_is_that_counted_at_once(tmp_path, monkeypatch):
    """The chunk's own keys are put together once, however many blocks of queries look at them."""
    found = []
    for elements in (1 << 22, 200):
        monkeypatch.setattr("pikv_ds.retention.attention.BLOCK_ELEMENTS", elements)
        compression = unrotated(LAYERS[:1], tmp_path)
        scheduling = {"method": "h2o", "budget_tokens": 200, "sink_tokens": 0, "recent_tokens": 8}
        driver = Driver(LAYERS[:1], page_size=4, compression=compression, scheduling=scheduling, checks=[])
        driver.prefill([60, 41])
        pool = driver.probe.near_pool(0)
        found.append([{name: pool.column(name)[pool.page_ids(row, 0)] for name in pool.columns} for row in range(2)])
    assert found[0][0], "the policy keeps nothing per page"
    for row, other in zip(*found, strict=True):
        assert all(torch.allclose(row[name], other[name], atol=1e-5) for name in row)
