"""Two pools of pages: raw window and sinks beside encoded pages. With a raw format in both pools everything must equal dense attention."""

import pytest
import torch

from pikv_ds import ops
from pikv_ds.cache.cache import PiKVCache
from pikv_ds.cache.stats import stats
from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.errors import ConfigError
from pikv_ds.pages.estimate import pikv_bytes
from pikv_ds.routers import ROUTERS
from pikv_ds.routers.random import RandomPages
from tests.harness.checks import Answers, Dense
from tests.harness.dense import dense_over, rel_error
from tests.harness.driver import Driver, layer, ragged
from tests.harness.windowed import KINDS, LeastAttended, TwoPools, far_counts, poison, run_mix, tiered

pytestmark = pytest.mark.usefixtures("nan_filled_empty")


@pytest.mark.parametrize(("sinks", "recent"), [(0, 1), (2, 6), (5, 0), (0, 40)], ids=str)
def test_raw_in_both_pools_is_exact(sinks, recent):
    driver = tiered([layer(0)], page_size=4, num_shards=3, sinks=sinks, recent=recent)
    driver.prefill([30, 9])
    for _ in range(9):
        driver.decode()


@pytest.mark.parametrize(("num_shards", "expert_ids"), [(1, "previous_layer"), (3, "previous_layer"), (3, "true")], ids=str)
def test_forks_crops_and_chunks_are_exact(num_shards, expert_ids):
    run_mix(tiered(page_size=4, num_shards=num_shards, expert_ids=expert_ids))


@pytest.mark.parametrize(("codec", "num_shards"), [("int4", 1), ("fp8_e4m3", 2), ("int2", 2)], ids=str)
def test_encoded_far_pages(codec, num_shards):
    """Entries that the formats hold without loss: what differs from dense attention is an entry missing, doubled or from elsewhere."""
    driver = tiered(codec=codec, page_size=64, num_shards=num_shards, sinks=4, recent=20)
    run_mix(driver)
    assert all(driver.probe.near_pool(i).tail is None for i in (0, 2)), "raw pages need no tail"


@pytest.mark.parametrize("latent", [False, True], ids=["kv", "latent"])
def test_attention_is_that_over_what_both_pools_hold(latent):
    driver = tiered([layer(0, dim=32, latent=latent)], codec="int4", page_size=64, sinks=4, recent=30)
    driver.steps = None
    answers = driver.without(Dense).add(Answers())
    driver.prefill([200])
    driver.decode()
    near, far = driver.probe.pools(0)
    assert int(near.counts) == 201 - 64 and int(far.counts) == 64
    entries = []
    for pool in (far, near):
        k, v = ops.decode_pages(pool.records[pool.page_ids(0, 0)], pool.fmt)
        k, v = (x.transpose(1, 2).flatten(0, 1)[: int(pool.counts)] for x in (k, v))
        entries += list(zip(k, v, strict=True))
    q, out, lse = answers.last
    want_out, want_lse, _ = dense_over(q[0, 0], entries, driver.scale(q))
    assert rel_error(out[0, 0], want_out) < 2e-4 and rel_error(lse[0, 0], want_lse) < 2e-4
    exact, _, _ = dense_over(q[0, 0], driver.history[0][0], driver.scale(q))
    assert rel_error(out[0, 0], exact) > 1e-3, "the codes were not read"
    assert driver.layers[0].latent == latent


def test_far_pages_hold_the_codes_of_a_plain_store():
    """Encoding a page late gives the bits of encoding its entries as they come."""
    plain = Driver([layer(0, dim=32)], codec="int4", page_size=64)
    windowed = tiered([layer(0, dim=32)], codec="int4", page_size=64, recent=1)
    for driver in (plain, windowed):
        driver.without(Dense).steps = None
        driver.prefill([200])
    one, far = plain.probe.near_pool(0), windowed.probe.far_pool(0)
    held = far.pages(0)
    assert [page[0] for page in held] == [64, 128]
    for column, page in enumerate(held):
        record = one.records[one.page_ids(0, 0)[page[0] // 64]]
        assert torch.equal(far.records[far.page_ids(0, 0)[column]], record)


def test_without_the_keys_nothing_changes():
    def outputs(compression):
        driver = Driver([layer(0, dim=16)], codec="int4", page_size=64, compression=compression)
        driver.without(Dense).steps = None
        driver.prefill([100])
        found = [driver.forward(ragged([1])) for _ in range(30)]
        assert driver.probe.far_pool(0) is None
        return found, stats(driver.cache, 1, 130)

    (plain, numbers), (zero, also) = outputs({}), outputs({"raw_recent_tokens": 0, "raw_sink_tokens": 0})
    assert numbers == also
    assert all(torch.equal(a, b) for one, two in zip(plain, zero, strict=True) for a, b in zip(one[0], two[0], strict=True))


@pytest.mark.parametrize("num_shards", [1, 3], ids="S{}".format)
def test_freed_slots_of_both_pools_may_hold_anything(num_shards):
    def run(poisoned):
        driver, hit, found = tiered([KINDS[0], KINDS[2]], page_size=4, num_shards=num_shards), 0, []
        driver.prefill([40, 21])
        for mask in (*[ragged([1, 1])] * 6, ragged([9, 5]), *[ragged([1, 1])] * 6):
            hit += poison(driver) if poisoned else 0
            found += driver.forward(mask)
        return hit, found

    (hit, poisoned), (_, clean) = run(True), run(False)
    assert hit and all(torch.equal(a, b) for one, two in zip(poisoned, clean, strict=True) for a, b in zip(one, two, strict=True))


def test_memory_follows_within_the_step():
    """A prompt of 800 tokens leaves the near pool with its forward: 13 pages of 64 raw, then one of sinks and those of the window."""
    driver = tiered([layer(0, dim=32)], codec="int4", page_size=64, sinks=4, recent=64)
    driver.prefill([800])
    near, far = driver.probe.pools(0)
    window_pages, record = {11, 12}, near.fmt.record_bytes
    assert near.num_pages <= 1 + len(window_pages) + 1 and near.nbytes == near.num_pages * record == near.records.untyped_storage().nbytes()
    assert int(far.counts) == 64 * 10 and far.num_pages in (10, 11) and far.tail.shape[0] == 1
    assert stats(driver.cache, 1, 800)["kv_bytes_allocated"] == near.nbytes + far.nbytes


def test_what_a_quiet_step_costs():
    """Decode steps in which nothing can be old enough look at no page."""
    driver = tiered([layer(0)], page_size=16, sinks=0, recent=8)
    driver.prefill([40])
    looked, old = [], driver.cache.window._old
    driver.cache.window._old = lambda pool, lens: looked.append(lens[0]) or old(pool, lens)
    for _ in range(60):
        driver.decode()
    assert looked == [56, 72, 88], looked  # 48, 64, 80 tokens are whole pages, old after 8 more


def test_crops_behind_what_was_demoted_are_refused():
    driver = tiered([layer(0)], page_size=4, recent=6)
    driver.prefill([40])
    driver.crop([34])
    driver.decode()
    driver.crop([33])
    with pytest.raises(RuntimeError, match=r"crop to 33 of 35 tokens: entries up to token 34 may have been encoded"):
        driver.decode()


@pytest.mark.parametrize("num_shards", [1, 3], ids="S{}".format)
def test_nothing_goes_while_a_crop_is_announced(num_shards):
    driver = tiered([KINDS[0], KINDS[2]], page_size=4, num_shards=num_shards)
    driver.prefill([30, 30])
    driver.announce_crops()
    held = far_counts(driver)
    for _ in range(3):
        driver.forward(ragged([9, 9]))
        assert far_counts(driver) == held
        driver.crop([n - 5 for n in driver.lens])
    driver.end_crops()
    driver.decode()
    assert all(now > before for now, before in zip(far_counts(driver), held, strict=True))


@pytest.mark.parametrize("num_shards", [1, 3], ids="S{}".format)
def test_forks_share_pages_of_both_pools(num_shards):
    driver = tiered([KINDS[0], KINDS[2]], page_size=4, num_shards=num_shards)
    driver.prefill([40])
    driver.select([0, 0, 0])
    driver.decode()
    far = driver.probe.far_pool(0)
    assert int(far.uses.max()) == 3 and far.used_pages * 3 == int((far.page_table >= 0).sum())
    for _ in range(12):  # pages that the beams share move once, for all of them
        driver.decode()
    driver.select([2, 0])
    for _ in range(9):
        driver.decode()
    far = driver.probe.far_pool(0)
    assert int(far.uses.max()) == 2 and far.num_pages < int((far.page_table >= 0).sum())


METHODS = {"streaming_llm": {}, "knorm": {}, "h2o": {}, "snapkv": {"window": 9}, "quest": {}, "lru": {}, "expected_attention": {}}


@pytest.mark.parametrize("method", METHODS)
def test_eviction_keeps_what_it_keeps_with_one_pool(method):
    num_shards = 1 if method == "expected_attention" else 2
    scheduling = {"method": method, "budget_tokens": 40, "sink_tokens": 2, "recent_tokens": 3} | METHODS[method]

    def run(driver):
        driver.without(Dense)
        found = []
        driver.prefill([70, 12])
        for mask in (*[ragged([1, 1])] * 5, ragged([9, 20]), *[ragged([1, 1])] * 5):
            outputs = driver.forward(mask)
            probe = driver.probe
            kept = [[sorted(p for page in probe.pages(i, row) for p in page) for row in range(2)] for i in range(probe.num_layers)]
            found.append((kept, outputs, stats(driver.cache, 2, 70)["entries_evicted"]))
        return found

    layers = [layer(0), layer(1, latent=True)]
    one = run(Driver(layers, page_size=2, num_shards=num_shards, scheduling=scheduling))
    two = run(tiered(layers, page_size=2, num_shards=num_shards, scheduling=scheduling, sinks=2, recent=8))
    for (kept, outputs, evicted), (also_kept, also_outputs, also_evicted) in zip(one, two, strict=True):
        assert kept == also_kept and evicted == also_evicted
        for (out, _), (also_out, _) in zip(outputs, also_outputs, strict=True):
            assert rel_error(torch.nan_to_num(also_out), torch.nan_to_num(out)) < 1e-5


@pytest.mark.parametrize("method", ["bounds", "bounds int8", "centroids", "page_oracle"])
def test_routers_choose_among_far_pages_what_they_choose_with_one_pool(method):
    """Near pages are the ones that are pinned anyway; raw formats, so scores are the same and so is what is read."""
    routing = {"method": method.removesuffix(" int8"), "budget_pages": 7, "sink_tokens": 2, "recent_tokens": 9}
    if routing["method"] == "bounds":
        routing["metadata"] = "int8" if method == "bounds int8" else "fp32"

    def run(driver):
        driver.without(Dense)
        found = []
        driver.prefill([70, 31])
        for _ in range(9):
            before = driver.probe.read
            outputs = driver.forward(ragged([1, 1]))
            after = driver.probe.read
            found.append((outputs, (after.entries - before.entries, after.visible - before.visible)))
        return found

    one = run(Driver([layer(0), layer(1, latent=True)], page_size=4, routing=routing))
    two = run(tiered([layer(0), layer(1, latent=True)], page_size=4, routing=routing, recent=8))
    for (outputs, counted), (also_outputs, also_counted) in zip(one, two, strict=True):
        assert also_counted[1] == counted[1]
        if method != "centroids":  # its clusters move between the time a page is written and the time it is demoted
            assert also_counted[0] == counted[0]
            for (out, _), (also_out, _) in zip(outputs, also_outputs, strict=True):
                assert rel_error(also_out, out) < 1e-5
        assert also_counted[0] < counted[1]


@pytest.mark.parametrize("method", ["bounds", "topk", "centroids", "sinks_recent"])
def test_a_budget_of_everything_reads_everything(method):
    """Chunks, forks and crops with a router that has nothing to leave out: dense attention, on the pages of both pools."""
    routing = {"method": method, "sink_tokens": 0, "recent_tokens": 1000} | ({} if method == "topk" else {"budget_ratio": 1.0})
    run_mix(tiered(page_size=4, num_shards=3, placement="position", routing=routing))


@pytest.mark.parametrize("num_shards", [1, 2], ids="S{}".format)
@pytest.mark.parametrize("ratio", [0.0, 0.3])
def test_the_least_attended_pages_go(ratio, num_shards):
    options = {"compression": {"light": "none", "heavy": "none", "light_ratio": ratio}, "page_size": 4, "num_shards": num_shards}
    driver = tiered([layer(0), layer(1, latent=True)], codec="adaptive", **options)
    driver.tolerance = 1e-6
    driver.add(LeastAttended(next(check for check in driver.checks if isinstance(check, TwoPools)), ratio))
    driver.prefill([60, 33])
    for mask in (*[ragged([1, 1])] * 9, ragged([12, 3]), *[ragged([1, 1])] * 5):
        driver.forward(mask)
    assert sum(far_counts(driver)) > 0


@pytest.mark.parametrize("codec", ["none", "adaptive"])
def test_rotated_entries(codec):
    """Both pools hold what is turned, so queries are turned once for both."""
    light = {"light": "none", "heavy": "none"} if codec == "adaptive" else {}
    driver = tiered([layer(0, dim=16), layer(1, dim=16, latent=True)], codec=codec, compression={"rotate": "hadamard"} | light, page_size=4)
    driver.tolerance = 1e-5
    run_mix(driver)
    assert (driver.probe.keeps_light is not None) == (codec == "adaptive")


def test_adaptive_formats_and_bytes():
    driver = tiered([layer(0, dim=32)], codec="adaptive", compression={"light": "int8", "heavy": "int4"}, page_size=64, recent=64)
    driver.without(Dense)
    driver.prefill([1024])
    near, far = driver.probe.pools(0)
    assert (near.fmt.name, far.fmt.name) == ("int8", "int4")
    assert int(near.counts) == 64 + 256 + 64 and int(far.counts) == 1024 - 384  # sinks, a quarter, the window
    plain = tiered([layer(0, dim=32)], codec="adaptive", compression={"light": "int8", "heavy": "int4"}, page_size=64, sinks=0, recent=0)
    plain.without(Dense)
    plain.prefill([1024 + 9])
    codec, pools = plain.cache.codec, plain.probe.pools(0)
    planned = pikv_bytes(plain.layers, [1033], ranks=1, codec=codec, page_size=64, dtype=torch.float32)
    used = [pool.used_pages for pool in pools]
    assert used == [4 + 1, 12]
    tail = pools[0].tail.nbytes
    assert planned.balanced == sum(n * pool.fmt.record_bytes for n, pool in zip(used, pools, strict=True)) + tail < planned.worst
    run_mix(tiered([layer(0), layer(1, latent=True)], codec="adaptive", compression={"light": "none", "heavy": "none"}, page_size=4))


def test_adaptive_pages_can_be_evicted_and_selected():
    light = {"light": "none", "heavy": "none"}
    scheduling = {"method": "streaming_llm", "budget_tokens": 40, "sink_tokens": 2, "recent_tokens": 3}
    driver = tiered([layer(0)], codec="adaptive", compression=light, page_size=4, scheduling=scheduling)
    driver.without(Dense)
    driver.prefill([100])
    for _ in range(6):
        driver.decode()
        kept = [p for store in driver.probe.pools(0) for p in store.positions(0, 0)]
        assert len(kept) <= 40 and {0, 1, driver.lens[0] - 1} <= set(kept)
    routing = {"method": "bounds", "budget_pages": 12, "sink_tokens": 2, "recent_tokens": 6}
    driver = tiered([layer(0)], codec="adaptive", compression=light, page_size=4, routing=routing)
    driver.without(Dense)
    driver.prefill([100])
    driver.decode()
    assert 0 < driver.probe.read_share < 1


@pytest.mark.parametrize("method", ["h2o", "snapkv", "quest"])
def test_adaptive_beside_a_policy_that_looks_at_attention(method):
    """Both are shown the same attention: what is kept does not change, and what both count is counted once."""

    def run(codec, compression):
        scheduling = {"method": method, "budget_tokens": 64, "sink_tokens": 2, "recent_tokens": 3}
        driver, kept, mass = Driver([layer(0)], codec=codec, compression=compression, page_size=4, scheduling=scheduling), [], []
        driver.without(Dense)
        driver.prefill([100, 30])
        for mask in (*[ragged([1, 1])] * 3, ragged([9, 20]), *[ragged([1, 1])] * 3):
            driver.forward(mask)
            pools = driver.probe.pools(0)
            kept.append(driver.probe.kept(0))
            for pool in pools if method == "h2o" else ():
                used = pool.uses > 0
                mass += zip(pool.fields[2][used, 0].tolist(), pool.column("mass")[used].tolist(), strict=True)
        return kept, mass

    adaptive = {"light": "none", "heavy": "none", "light_ratio": 0.2, "raw_recent_tokens": 6}
    (kept, mass), (also_kept, also_mass) = run("adaptive", adaptive), run("none", {})
    assert kept == also_kept and bool(mass) == (method == "h2o")
    assert [at for at, _ in sorted(mass)] == [at for at, _ in sorted(also_mass)]
    assert [count for _, count in sorted(mass)] == pytest.approx([count for _, count in sorted(also_mass)], rel=1e-4)


REFUSED = [
    (
        {"raw_recent_tokens": 8},
        {"scheduling": {"method": "knorm", "budget_tokens": 99, "head_budget": "uniform"}},
        "head_budget = 'uniform'",
    ),
    ({"raw_sink_tokens": 8}, {"scheduling": {"method": "knorm", "budget_bytes": 10**6}}, "budget_bytes = 1000000"),
    (
        {"raw_recent_tokens": 99},
        {"routing": {"method": "bounds", "budget_pages": 3, "sink_tokens": 0, "recent_tokens": 0}},
        "budget_pages = 3",
    ),
    ({"method": "adaptive"}, {"storage": {"expert_ids": "true"}}, "expert_ids = 'true'"),
    ({"raw_recent_tokens": 8}, {"routing": {"method": "hash", "exchange": "needed"}}, "exchange = 'needed'"),
    ({"method": "adaptive", "light": "zip"}, {}, "light = one of "),
    ({"method": "adaptive", "light_ratio": 1.5}, {}, "light_ratio from 0 to 1"),
    ({"raw_recent_tokens": -1}, {}, "raw_recent_tokens"),
]


@pytest.mark.parametrize(("compression", "blocks", "said"), REFUSED, ids=[said for _, _, said in REFUSED])
def test_refusals(compression, blocks, said):
    with pytest.raises(ConfigError) as refused:
        config = PiKVConfig(compression=compression, **blocks)
        PiKVCache([layer(0, dim=16)], config, num_experts=4, dtype=torch.float32, device=torch.device("cpu"))
    assert said in str(refused.value)


def test_a_model_of_windows_only_is_refused():
    with pytest.raises(ConfigError, match="all have a sliding window"):
        tiered([layer(0, window=9)])


def test_a_router_that_cannot_follow_its_pages_is_refused(monkeypatch):
    class Summarising(RandomPages):
        summarises = True

    block = {"compression": {"raw_recent_tokens": 8}, "routing": {"method": "summarising", "budget_ratio": 0.5}}
    monkeypatch.setitem(ROUTERS._classes, "summarising", Summarising)
    with pytest.raises(ConfigError, match=r"'random' keeps summaries of pages and can't make them") as caught:
        PiKVConfig(**block)
    assert caught.value.rule == "router-follows-demotion"
    monkeypatch.setattr(Summarising, "rebuilt", lambda *_: None)
    PiKVConfig(**block)
