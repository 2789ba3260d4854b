"""Decode steps of replicated ranks that are recorded and played; ranks that diverge, and distinct ranks, say so."""

import torch
import torch.distributed as dist

from pikv_ds.errors import DivergedError, UnsupportedError
from tests.device.captured import Steps
from tests.device.tape import Tape
from tests.device.test_captured import PLAYED, PROMPT, RESERVED, check, layers
from tests.dist.jobs.failures import expect
from tests.dist.jobs.report import Report

report = Report()
dist.init_process_group("gloo")
group, rank = dist.group.WORLD, dist.get_rank()
BLOCK = {"page_size": 4, "timeout_s": 20, "storage": {"requests": "replicated", "num_shards": 4}}


def prepared(windows: list[int | None], block: dict) -> tuple[Steps, Steps]:
    played, plain = (Steps(layers(windows), block, 3, group=group) for _ in range(2))
    for steps in (played, plain):
        steps.forward(1, PROMPT)
    played.cache.reserve(RESERVED)
    return played, plain


with report.check("played steps are steps") as row:
    played, plain = prepared([None, 6], BLOCK)
    before = played.cache.exchange.collectives
    check(played, plain, "replicated")
    row["collectives"] = (played.cache.exchange.collectives - before) / PLAYED
with report.check("between played steps any other"):
    played, plain = prepared([None], BLOCK)
    graph = played.record(Tape())
    for step in range(8):
        found = played.play(graph, step) if step != 5 else played.forward(step)
        for x, y in zip(found, plain.forward(step), strict=True):
            assert torch.equal(x, y), step
with report.check("ranks that play different steps stop, all of them"):
    local = played.local(1)
    local.digest += rank
    with expect(DivergedError, "rank 0", "rank 1"):
        graph(local)
with report.check("distinct ranks are refused"):
    steps = Steps(layers([None]), BLOCK | {"storage": {"requests": "distinct"}}, 2 + rank, group=group)
    steps.forward(1 + rank, PROMPT)
    steps.cache.reserve(RESERVED)
    with expect(UnsupportedError, "distinct"):
        steps.record(Tape())
