"""A collective that the host waits for by asking whether it has ended, as on NCCL: one that is late, one that nobody answers."""

import time
from datetime import timedelta

import torch
import torch.distributed as dist

from pikv_ds.errors import PeerError
from pikv_ds.exchange.deadline import Deadline
from pikv_ds.exchange.exchange import Exchange
from tests.dist.jobs.report import Report

LATE_S, TIMEOUT_S = 0.4, 1.0
report = Report()
dist.init_process_group("gloo", timeout=timedelta(seconds=4))
rank, cpu = dist.get_rank(), torch.device("cpu")
with report.check("a rank that is late is waited for") as row:
    begun, total = time.monotonic(), torch.ones(1)
    if rank:
        time.sleep(LATE_S)
    Deadline(dist.group.WORLD, TIMEOUT_S).wait_asking(dist.all_reduce(total, async_op=True), cpu)
    row["waited_s"] = time.monotonic() - begun
    assert total.item() == 2 and row["waited_s"] > LATE_S / 2
with report.check("a rank that does not come is missed"):
    exchange = Exchange(dist.group.WORLD, TIMEOUT_S)
    exchange._deadline.timed = exchange._deadline.timed_on_host = False  # as a group whose backend has no deadlines
    if rank:
        time.sleep(2.5 * TIMEOUT_S)
    else:
        begun = time.monotonic()
        try:
            exchange.all_gather(torch.ones(2), "sharing layer 0", read=True)
            raise AssertionError("nobody missed the other rank")
        except PeerError as error:
            assert "sharing layer 0 failed within pikv.timeout_s = 1 s" in str(error), error
        assert TIMEOUT_S <= time.monotonic() - begun < 2 * TIMEOUT_S
        try:
            exchange.all_gather(torch.ones(2), "sharing layer 1", read=True)
            raise AssertionError("the group was used again")
        except PeerError as error:
            assert "got no answer" in str(error), error
