"""Copies of shards on further ranks: the same outputs, the same entries on every holder, one reader each, fewer bytes on the wire."""

import pytest

from pikv_ds.config import PiKVConfig
from pikv_ds.errors import ConfigError
from tests.long_form import LONG

from .copies import check_copies, run, worst

KEEP = {"sink_tokens": 2, "recent_tokens": 6}
BLOCKS = {
    "exact": {},
    "int4": {"compression": {"method": "int4", "group": 32}, "page_size": 32},
    "window": {"compression": {"method": "int8", "group": 32, "raw_sink_tokens": 2, "raw_recent_tokens": 16}, "page_size": 32},
    "knorm": {"scheduling": {"method": "knorm", "budget_tokens": 48, **KEEP}},
    "streaming": {"scheduling": {"method": "streaming_llm", "budget_tokens": 48, **KEEP}},
    "late": {"storage": {"expert_ids": "true"}},
    "spill": {"storage": {"capacity_tokens": 120}},
}
HOME = {2: ((0,), (0,), (1,), (1,)), 4: ((0,), (1,), (2,), (3,))}
COPIES = {2: ((0, 1), (0,), (1, 0), (1,)), 4: ((0, 2), (1, 3), (2, 0), (3, 1))}
OTHERS = {2: ((0,), (0, 1), (1,), (1, 0)), 4: ((0, 1), (1, 0), (2, 3), (3, 2))}
SHARDS = {2: 4, 4: 4}


def script(world):
    return [
        ("prefill", [70, 41, 9, 52]), ("hold_at", COPIES[world]), ("decode", 3), ("chunk", [9, 5, 20, 9]), ("hold_at", OTHERS[world]),
        ("decode", 2), ("hold_at", HOME[world]), ("decode", 2), ("ahead", COPIES[world]), ("decode", 25), ("arrived", COPIES[world]),
        ("chunk", [5, 9, 3, 20]), ("decode", 8),
    ]  # fmt: skip


CASES = [(world, name, requests) for world in (2, 4) for name in BLOCKS for requests in ("replicated", "distinct")]
SHORT = [(2, "exact", "distinct"), (4, "exact", "replicated"), (2, "window", "replicated"), (2, "knorm", "distinct")]


@pytest.mark.parametrize(("world", "name", "requests"), CASES if LONG else SHORT)
def test_outputs_and_entries_are_those_without_copies(world, name, requests):
    how = {"world": world, "shards": SHARDS[world], "requests": requests}
    plain = run(BLOCKS[name], script(world), copied=False, **how)
    ran = run(BLOCKS[name], script(world), copied=True, **how)
    check_copies(ran, plain)
    alone = requests == "replicated" and world == SHARDS[world]  # a rank reads one shard, its partial is of nothing else
    assert worst(ran, plain) <= (0 if alone else 1e-5)


TOPK = {"routing": {"method": "topk", "top_k": 2, "sink_tokens": 2, "recent_tokens": 4, "exchange": "routed"}}


@pytest.mark.parametrize("world", [2, 4])
def test_routed_queries_prefer_a_copy_and_fewer_bytes_travel(world):
    """Copies at the ranks that ask: entries go to more ranks, queries and partials to fewer."""
    steps = [("prefill", [70, 41, 90, 52]), ("hold_at", COPIES[world]), ("chunk", [9, 5, 20, 9]), ("counted", 8)]
    how = {"world": world, "shards": SHARDS[world], "requests": "distinct"}
    plain, ran = run(TOPK, steps, copied=False, **how), run(TOPK, steps, copied=True, **how)
    check_copies(ran, plain)
    assert worst(ran, plain) <= 1e-5
    whole = tuple(tuple((home[0] + i) % world for i in range(world)) for home in HOME[world])
    everywhere = run(TOPK, [steps[0], ("hold_at", whole), *steps[2:]], copied=True, **how)
    check_copies(everywhere, plain)
    assert worst(everywhere, plain) <= 1e-5
    sent = [sum(one.bytes_sent) for one in (plain, ran, everywhere)]
    assert sent[2] < sent[0], sent
    if world == 4:  # on two ranks nearly every query still reads something of the other
        assert sent[2] < sent[1] < sent[0], sent


def test_exact_queries_of_a_rank_that_holds_everything_bring_nothing_back():
    whole = ((0, 1), (0, 1), (1, 0), (1, 0))
    steps = [("prefill", [70, 41]), ("hold_at", whole), ("counted", 8)]
    how = {"world": 2, "shards": 4, "requests": "distinct"}
    plain, ran = run({}, steps, copied=False, **how), run({}, steps, copied=True, **how)
    check_copies(ran, plain)
    assert worst(ran, plain) <= 1e-5
    partials = 8 * 2 * 4 * (16 + 1) * 4  # steps, layers, heads, out and lse
    assert [a - b for a, b in zip(plain.bytes_sent, ran.bytes_sent, strict=True)] == [partials, partials]


@pytest.mark.parametrize("requests", ["replicated", "distinct"])
@pytest.mark.parametrize("block", [{}, TOPK], ids=["exact", "routed"])
def test_copies_by_the_block(requests, block):
    if block and requests == "replicated":
        return
    block = block | {"storage": {"rebalance": {"replicas": 1, "every": 4, "bytes_per_step": None}}}
    steps = [("prefill", [70, 41]), ("decode", 12)]
    ran = run(block, steps, world=2, shards=4, requests=requests, copied=True)
    plain = run({k: v for k, v in block.items() if k != "storage"}, steps, world=2, shards=4, requests=requests, copied=True)
    assert ran.caches[0].map.holders == ran.caches[1].map.holders
    assert [len(cache.map.local) for cache in ran.caches] == [3, 3]
    check_copies(ran, plain)
    assert worst(ran, plain) <= 1e-5


@pytest.mark.parametrize(
    "block",
    [
        {"scheduling": {"method": "h2o", "budget_tokens": 48, **KEEP}},
        {"routing": {"method": "bounds", "budget_pages": 5, "sink_tokens": 2, "recent_tokens": 4}},
        {"compression": {"method": "svd", "rank": 8}},
    ],
    ids=lambda block: next(iter(block)),
)
def test_what_cannot_have_copies_says_so(block):
    with pytest.raises(ConfigError) as caught:
        run(block, [("prefill", [20, 20]), ("hold_at", COPIES[2])], world=2, shards=4, requests="distinct", copied=True)
    assert caught.value.rule == "copies-have-one-reader" and "copies" in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        PiKVConfig(**block | {"storage": {"num_shards": 4, "rebalance": {"replicas": 1}}})
    assert caught.value.rule == "copies-have-one-reader"
