"""Reported numbers against formulas written out by hand, and bytes sent against what the steps really hand to the exchange."""

import pytest
import torch

from pikv_ds.cache.cache import PiKVCache
from pikv_ds.cache.stats import decode_bytes_sent, dense_bytes, partial_bytes, share_bytes, stats
from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.exchange.exchange import Exchange
from pikv_ds.exchange.wire import HEADER, Layout
from pikv_ds.step.step import LocalStep
from tests.harness.driver import Driver, layer, ragged

LAYERS = [layer(0, dim=8), layer(1, dim=8, window=8), layer(2, dim=8, latent=True)]
HQ = 4


@pytest.mark.parametrize(
    ("spec", "columns", "per_row"),
    [
        (layer(0, num_kv_heads=2, dim=16), 100, 100 * 2 * (16 + 16)),
        (layer(0, num_kv_heads=2, dim=16, window=8), 100, 7 * 2 * (16 + 16)),
        (layer(0, num_kv_heads=2, dim=16, window=8), 5, 5 * 2 * (16 + 16)),
        (layer(0, dim=16, latent=True), 100, 100 * 24),
    ],
    ids=["full", "window", "short-of-window", "latent"],
)
@pytest.mark.parametrize("itemsize", [2, 4], ids=["bf16", "f32"])
def test_dense_bytes(itemsize, spec, columns, per_row):
    assert dense_bytes(spec, 3, columns, itemsize) == 3 * per_row * itemsize


class Mirror(Exchange):
    """G ranks that all do what this one does: counts as the real exchange, delivers this rank's own blocks."""

    def __init__(self, size: int, told) -> None:
        super().__init__(None, 1.0, told=told)
        self.size = size

    def rows(self, row, what, device=None, says=None):
        self._count(2 * (self.size - 1) * row.nbytes)
        return row.expand(self.size, -1).tolist()

    def all_gather(self, block, what, *, read=False):
        self._say_first(what)
        self._count((self.size - 1) * block.nbytes)
        return block.expand(self.size, *block.shape).contiguous()

    def all_to_all(self, block, send_rows, what):
        self._say_first(what)
        self._count((sum(send_rows) - send_rows[0]) * block[0].nbytes)
        return block[: send_rows[0]].expand(self.size, -1, *block.shape[1:]).contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("num_rows", [1, 3], ids="B{}".format)
@pytest.mark.parametrize("num_ranks", [2, 4], ids="G{}".format)
@pytest.mark.parametrize(("mode", "collectives"), [("replicated", 1), ("distinct", 2)])
def test_a_decode_step_sends_what_the_formula_says(mode, collectives, num_ranks, num_rows, dtype):
    config = PiKVConfig(page_size=4, storage={"num_shards": 4, "requests": mode})
    cache = PiKVCache(LAYERS, config, num_experts=8, dtype=dtype, device=torch.device("cpu"))
    cache.exchange = cache.agreement.exchange = Mirror(num_ranks, cache.exchange.turn.told)
    for step in range(3):
        columns, before = (5, 0) if step == 0 else (1, 4 + step)
        positions = torch.arange(before, before + columns, dtype=torch.int32).repeat(num_rows, 1)
        cache.begin_step(
            LocalStep(
                num_rows=num_rows,
                num_columns=columns,
                num_new=[columns] * num_rows,
                parent=[*range(num_rows)] if step else [-1] * num_rows,
                keep=[before] * num_rows,
                positions=positions,
                digest=step,
                identity=step > 0,
                fresh=step == 0,
            )
        )
        sent = cache.exchange.bytes_sent, cache.exchange.collectives
        for i, spec in enumerate(LAYERS):
            q, k, v = (
                torch.randn(num_rows, columns, h, d).to(dtype)
                for h, d in ((HQ, spec.k_dim), (spec.num_kv_heads, spec.k_dim), (spec.num_kv_heads, spec.stored_v_dim))
            )
            cache.attend(i, q, k, v, scale=1.0, v_dim=spec.v_dim, expert_ids=None)
        cache.end_step()
    assert cache.exchange.collectives - sent[1] == collectives * len(LAYERS)
    assert cache.exchange.bytes_sent - sent[0] == decode_bytes_sent(mode, [num_rows] * num_ranks, 0, HQ, LAYERS, dtype.itemsize)


@pytest.mark.parametrize("spec", LAYERS, ids=["full", "window", "latent"])
@pytest.mark.parametrize("num_tokens", [1, 3, 17], ids="N{}".format)
def test_records_are_as_long_as_their_layout(num_tokens, spec):
    n, dtype = num_tokens, torch.bfloat16
    layout = Layout(
        [
            ("positions", (n,), torch.int32),
            ("q", (n, HQ, spec.k_dim), dtype),
            ("k", (n, spec.num_kv_heads, spec.k_dim), dtype),
            ("v", (n, spec.num_kv_heads, spec.stored_v_dim), dtype),
            ("ids", (n,), torch.int32),
        ]
    )
    assert share_bytes(n, HQ, spec, spec.k_dim, 2) == layout.nbytes
    assert partial_bytes(n, HQ, spec.v_dim) == n * HQ * (spec.v_dim + 1) * 4
    assert layout.nbytes >= HEADER * 4 + n * (8 + 2 * HQ * spec.k_dim + 2 * spec.values_per_token)


@pytest.mark.parametrize("rank", [0, 1, 2], ids="rank{}".format)
def test_unequal_ranks_pad_the_record_and_return_what_is_asked(rank):
    """Distinct rows [1, 4, 0]: every record has the largest rank's size; partials go back for the other ranks' queries only."""
    spec, rows = LAYERS[0], [1, 4, 0]
    want = 2 * share_bytes(4, HQ, spec, spec.k_dim, 4) + partial_bytes(5 - rows[rank], HQ, spec.v_dim)
    assert decode_bytes_sent("distinct", rows, rank, HQ, [spec], 4) == want
    assert decode_bytes_sent("distinct", rows, rank, HQ, [spec, spec], 4) == 2 * want


def test_numbers_of_a_cache():
    driver = Driver([layer(0), layer(1, window=6)], page_size=4, num_shards=4, placement="position")
    driver.prefill([10, 3])
    driver.forward(ragged([1, 1]))
    numbers = stats(driver.cache, 2, 11)
    page = [fmt.record_bytes for fmt in driver.probe.formats]  # 4 tokens, padded to 64 bytes
    live = [int(pool.counts.sum()) for pool in driver.probe.all_pools]
    assert live[0] == 15
    assert numbers["kv_bytes_live"] == sum(n * b // 4 for n, b in zip(live, page, strict=True))
    assert numbers["kv_bytes_allocated"] == sum(pool.num_pages * b for pool, b in zip(driver.probe.all_pools, page, strict=True))
    assert numbers["kv_bytes_dense"] == 2 * (11 + 5) * 4 * driver.layers[0].values_per_token
    assert numbers["entries_appended"] == 30 and sum(numbers["load_per_expert"]) == 30
    assert numbers["entries_live"] + numbers["entries_expired"] == 30
    assert numbers["load_per_rank"] == [15 + 5 + 4], "visible entries: 11 + 4, and in the window 5 + 4"
    assert (numbers["requests"], numbers["spilled"], numbers["exchange_collectives"], numbers["exchange_bytes_sent"]) == ("local", 0, 0, 0)


def test_attention_impl_names_the_code_and_the_format(monkeypatch):
    from pikv_ds.ops.build import load

    said = stats(Driver([layer(0)]).cache, 1, 1)
    assert said["attention_impl"] == f"pikv {load.ensured('cpu')} fp32"
    assert said["attention_kernel"] == load.kernel("cpu")
