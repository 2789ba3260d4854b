"""Pages chosen by the rank of the query, beside the gather of all ranks: the same bits in longer lives, bytes as the formula says.

Arguments: names of checks.
"""

import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist

from pikv_ds.cache.stats import answered_bytes, metadata_bytes, partial_bytes, routed_pages_bytes, stats
from pikv_ds.exchange.exchange import Exchange
from pikv_ds.launch.jobs.exchange import Wire
from pikv_ds.ops.build import load
from pikv_ds.selection.page_news import TOLD
from tests.dist.jobs.report import Report
from tests.dist.jobs.routed import ROOMY, own_rows
from tests.dist.jobs.selection import DIM, HEADS, KV_HEADS, LAYERS, SHARDS, Side, forwards

FULL = LAYERS[:1] * 2
LIVES = {
    "plain": {},
    "windows": {"layers": LAYERS},
    "int8": {"metadata": "int8"},
    "late": {"storage": ROOMY | {"expert_ids": "true"}},
    "spilling": {"storage": {}},
    "ratio": {"budget_pages": None, "budget_ratio": 0.25, "sink_tokens": 0, "recent_tokens": 1},
    "int4 in blocks": {"prompt": 260, "compression": {"method": "int4"}, "page_size": 64, "block_size": 4, "metadata": "int8"},
    "evicting": {"scheduling": {"method": "knorm", "budget_tokens": 40, "recent_tokens": 8, "interval": 6}},
    "evicting blocks": {
        "prompt": 90,
        "page_size": 8,
        "block_size": 4,
        "scheduling": {"method": "knorm", "budget_tokens": 72, "recent_tokens": 8, "interval": 6},
    },
}
"""What of a Side is not as usual."""
Play = Callable[..., list[torch.Tensor]]


def play(side: Side, prompt: int = 30) -> list[torch.Tensor]:
    """A prompt, decoding, a chunk in which some decode, decoding with rows that pause, longer than the recent tokens of every shard."""
    own, outs = own_rows(None), []
    steps = [(prompt, [prompt, prompt - 13, 9, prompt - 8]), *[(1, [1] * 4)] * 14, (5, [2, 5, 5, 1]), *[(1, [1] * 4)] * 9]
    steps += [(1, [1, 0, 1, 1]) if dist.get_world_size() == 4 else (1, [1] * 4)] * 2 + [(1, [1] * 4)] * 12
    for columns, num_new in steps:
        outs += side.forward(columns, [num_new[i] for i in own])
    return outs


def changing(side: Side, prompt: int) -> list[torch.Tensor]:
    """Rows that change places, and a draft that is taken back in part, between decode steps."""
    own = own_rows(None)
    outs = side.forward(prompt, [[prompt, 17, 9, 22][i] for i in own])
    decode = lambda steps: [out for _ in range(steps) for out in side.forward(1, [1] * len(own))]  # noqa: E731
    outs += decode(10)
    side.fork(list(range(len(own)))[::-1])
    outs += decode(9)
    side.fork([0] * len(own))
    outs += decode(9)
    side.cache.hold_margin = 0
    outs += side.forward(5, [5] * len(own))
    side.crop(3)
    side.cache.hold_margin = None
    return outs + decode(12)


def check_life(report: Report, name: str, given: dict, play: Play, group) -> None:
    """The same bits as when all ranks choose together; and how many forwards went only to the ranks that they read."""
    own, options = own_rows(group), {"storage": ROOMY, "layers": FULL} | given
    play = partial(play, prompt=options.pop("prompt", 30))
    with report.check(name) as row:
        every, routed = (Side("bounds", "distinct", own, group, exchange=each, **options) for each in ("all", "routed"))
        for expected, found in zip(play(every), play(routed), strict=True):
            assert torch.equal(expected, found), (expected - found).abs().max()
        counts = torch.tensor([side.probe.read[:2] for side in (every, routed)], dtype=torch.float64)
        dist.all_reduce(counts, group=group)
        assert torch.equal(counts[0], counts[1]), counts
        numbers = stats(routed.cache, len(own), max(routed.lens))
        evicted, outline_bytes = numbers["entries_evicted"], numbers["outline_bytes"]
        row |= {"forwards": forwards(routed), "outline_bytes": outline_bytes, "evicted": evicted}
        assert bool(evicted) == ("scheduling" in given)
        assert metadata_bytes(routed.cache) >= metadata_bytes(every.cache) + outline_bytes > metadata_bytes(every.cache)


def check_changing(report: Report, group) -> None:
    check_life(report, "changing", {}, changing, group)


def check_fixed(report: Report, group) -> None:
    """Where messages have one size, whatever is in them, all ranks get all queries."""
    own, short = own_rows(group), Exchange.short_messages
    with report.check("fixed") as row:
        every = Side("bounds", "distinct", own, group, exchange="all", storage=ROOMY)
        Exchange.short_messages = False
        routed = Side("bounds", "distinct", own, group, exchange="routed", storage=ROOMY)
        found = play(routed)
        Exchange.short_messages = short
        assert forwards(routed) is None
        for expected, got in zip(play(every), found, strict=True):
            assert torch.equal(expected, got), (expected - got).abs().max()
        row |= {"bytes": routed.cache.exchange.bytes_sent}


def check_bytes(report: Report, group) -> None:
    """Decode steps that bring news and steps that bring none: two collectives per layer and one per forward, the bytes of the formula."""
    rank, size, own = dist.get_rank(), dist.get_world_size(), own_rows(group)
    with report.check("bytes of pages") as row:
        more = {"layers": FULL, "storage": ROOMY, "sink_tokens": 0, "recent_tokens": 3, "budget_pages": 2}
        every, routed = (Side("bounds", "distinct", own, group, exchange=each, **more) for each in ("all", "routed"))
        row |= {"news": 0, "bytes": []}
        for side in (every, routed):  # one after the other: a forward that follows one of another cache sends a frame
            side.forward(60, [60] * len(own))
            side.forward(1, [1] * len(own))
            for _ in range(7):
                exchange, before = side.cache.exchange, [marks(side, layer) for layer in range(2)] if side is routed else []
                sent, made = exchange.bytes_sent, exchange.collectives
                side.forward(1, [1] * len(own))
                if side is every:
                    continue
                row["bytes"].append(exchange.bytes_sent - sent)
                assert exchange.collectives - made == 1 + 2 * len(FULL)
                heads = heads_read(every, side.forwards - 1, group)
                expected = (size - 1) * (32 + 16 * -(-4 * len(own) // 16) + 16)
                for layer, spec in enumerate(FULL):
                    stored = [int(side.probe.homes(layer)[request, side.lens[0] - 1]) * size // SHARDS for request in own]
                    news = told(side, layer, before[layer])
                    row["news"] += sum(news)
                    for other in set(range(size)) - {rank}:
                        units = heads[layer][other][rank]
                        expected += routed_pages_bytes(len(own), units, stored.count(other), HEADS, KV_HEADS, spec, DIM, 4)
                        expected += answered_bytes(heads[layer][rank][other], news[other], HEADS // KV_HEADS, DIM, KV_HEADS * 4 * DIM)
                assert row["bytes"][-1] == expected, (row, expected)
        total = torch.tensor(row["news"])
        dist.all_reduce(total, group=group)
        assert total > 0


def marks(side: Side, layer: int) -> torch.Tensor:
    """[R, L, C] what pages have been told of, by the tables of this rank."""
    pool = side.probe.near_pool(layer)
    return pool.column(TOLD)[pool.page_table.clamp_min(0).long(), 0].bool() & (pool.page_table >= 0)


def told(side: Side, layer: int, before: torch.Tensor) -> list[int]:
    """Pages that this rank has told every rank of in the last step."""
    now = marks(side, layer)
    before = torch.nn.functional.pad(before, (0, now.shape[2] - before.shape[2]))
    return [int(rows.sum()) for rows in (now & ~before).chunk(dist.get_world_size())]


def heads_read(side: Side, forward: int, group) -> list[list[list[int]]]:
    """[layer][reader][source]: pairs of a query and a kv head of which a rank has read something in a forward."""
    size, pairs = dist.get_world_size(), {(key[1], key[2], key[4]) for key in side.chosen if key[0] == forward}
    own = [[sum(at == layer and request * size // 4 == source for at, request, _ in pairs) for source in range(size)] for layer in range(2)]
    of_all: list = [None] * size
    dist.all_gather_object(of_all, own, group=group)
    return [[of_rank[layer] for of_rank in of_all] for layer in range(2)]


def check_share(report: Report, group) -> None:
    """A quarter of the shards read: one page for each head, that of the newest token; queries, partials and news beside 'all'."""
    own, more = own_rows(group), {"layers": FULL, "storage": ROOMY, "sink_tokens": 0, "recent_tokens": 1, "budget_pages": 1}
    with report.check("share of pages") as row:
        side = Side("bounds", "distinct", own, group, exchange="routed", **more)
        side.forward(60, [60] * len(own))
        side.forward(1, [1] * len(own))
        wire, steps = Wire(), 12
        for _ in range(steps):
            side.forward(1, [1] * len(own))
        unit = HEADS // KV_HEADS * DIM * 4 + 8 + 4  # with the key of the last page, and its place
        sent = torch.tensor([wire.queries * unit + wire.partial_bytes, wire.news_bytes])
        dist.all_reduce(sent, group=group)
        everywhere = steps * 2 * 4 * (dist.get_world_size() - 1) * (HEADS * DIM * 4 + partial_bytes(1, HEADS, DIM))
        row |= {"share": int(sent[0]) / everywhere, "news": int(sent[1]) / everywhere}
        assert forwards(side) == [2, steps], forwards(side)
        assert row["share"] <= 0.35, row


def main() -> None:
    report = Report()
    load.ensure("cpu")
    dist.init_process_group("gloo")
    group = dist.new_group()
    for name in sys.argv[1:]:
        if name in LIVES:
            check_life(report, name, LIVES[name], play, group)
        else:
            {"bytes": check_bytes, "share": check_share, "changing": check_changing, "fixed": check_fixed}[name](report, group)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
