"""A routed cache on a rank that does something else, or is gone: the others hear of it. Argument: what happens."""

import os
import sys
import time

import torch.distributed as dist

from pikv_ds.errors import PeerError
from pikv_ds.ops.build import load
from tests.dist.jobs.report import Report
from tests.dist.jobs.routed import ROOMY, own_rows
from tests.dist.jobs.selection import Side

TIMEOUT_S = 3


def main(what: str) -> None:
    report = Report()
    load.ensure("cpu")
    dist.init_process_group("gloo")
    group = dist.new_group()
    rank, own = dist.get_rank(), own_rows(group)
    with report.check(what) as row:
        side = Side("topk", "distinct", own, group, storage=ROOMY, exchange="routed", timeout_s=TIMEOUT_S)
        side.forward(20, [20] * len(own))
        side.forward(1, [1] * len(own))
        started = time.monotonic()
        if rank == 1 and what == "gone":
            os._exit(0)
        if rank == 1 and what == "late":
            time.sleep(3 * TIMEOUT_S)
        try:
            if what == "reset" and rank == 1:
                side.cache.reset()
                side.forwards, side.lens = 0, [0] * len(own)
                side.forward(20, [20] * len(own))
            else:
                side.forward(1, [1] * len(own))
        except PeerError as error:
            row |= {"error_was": str(error), "waited_s": time.monotonic() - started}
        else:
            raise AssertionError("no error")
        limit = TIMEOUT_S + 10 if rank != 1 or what == "reset" else 4 * TIMEOUT_S + 10
        assert row["waited_s"] < limit, row
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
