"""A move of shards during which this job kills one of its own ranks. args: victim, message, how ("before", "after" or milliseconds), ahead.

The others say what became of the move: all moved or none, and every entry of the shards that they hold as it was.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

from pikv_ds.cache import PiKVCache
from pikv_ds.cache.inspect import CacheProbe
from pikv_ds.config import PiKVConfig
from pikv_ds.errors import PeerError
from pikv_ds.exchange.digest import digest
from tests.dist.jobs.report import Report
from tests.migration.faults import phase
from tests.migration.moving import contents
from tests.recorded import host_core

TIMEOUT_S = 5
MAPS = {2: ((1,), (0,), (1,), (0,)), 4: ((3,), (2,), (0,), (1,))}


class Kill:
    """Ends this process at its `message`-th message from now on, before or after it was sent, or after so many milliseconds."""

    def __init__(self, cache: PiKVCache, message: int, how: str, told: Path) -> None:
        self.left, self.how, self.told, self.run = message, how, told, cache.exchange._run
        cache.exchange._run = self.watched
        if how not in ("before", "after"):
            threading.Timer(float(how) / 1e3, self.now, ["a timer"]).start()

    def now(self, what: str) -> None:
        self.told.write_text(what)
        os.kill(os.getpid(), signal.SIGKILL)

    def watched(self, what, *args, **how) -> None:
        due = self.left == 0
        self.left -= 1
        self.told.write_text(what)  # where a timer finds it
        if due and self.how == "before":
            self.now(what)
        self.run(what, *args, **how)
        if due and self.how == "after":
            self.now(what)


def main() -> None:
    victim, message, how, ahead = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]) or None
    dist.init_process_group("gloo")
    rank, world, report = dist.get_rank(), dist.get_world_size(), Report()
    folder = Path(os.environ["PIKV_TEST_RESULTS"])
    config = PiKVConfig(page_size=4, timeout_s=TIMEOUT_S, storage={"requests": "distinct", "num_shards": 4})
    specs = [host_core.spec(i, kind) for i, kind in enumerate(["full", "window"])]
    cache = PiKVCache(specs, config, num_experts=8, dtype=torch.float32, device=torch.device("cpu"), group=dist.group.WORLD)
    host = host_core.Run(cache, config, dist.group.WORLD)
    host.prefill([60, 33, 47, 52][:world])
    host.decode(2)
    before = [None] * world
    dist.all_gather_object(before, contents(cache))
    told = folder / f"victim{victim}.txt"
    if rank == victim:
        Kill(cache, message, how, told)
    began, error = time.monotonic(), None
    try:
        cache.rebalance(MAPS[world], bytes_per_step=ahead)
        for _ in range(40):
            host.decode(1)
        if rank == victim:
            Kill(cache, 0, "before", told)
            host.decode(1)
    except PeerError as caught:
        error = caught
    with report.check("killed") as row:
        assert error is not None, "nothing has failed"
        row["seconds_to_error"] = round(time.monotonic() - began, 2)
        row["phase"] = phase(told.read_text()) if told.read_text() != "a timer" else "forward"
        row["in_doubt"] = cache.migration.in_doubt is not None
        row["moved"] = agreed(folder, cache, rank, victim, world)
        check_complete(cache)
        if ahead is None:
            check_unchanged(cache, {key: value for of_rank in before for key, value in of_rank.items()})
    os._exit(0)  # the group is closed: its threads wait for a rank that is dead


def agreed(folder: Path, cache: PiKVCache, rank: int, victim: int, world: int) -> bool:
    """What the survivors find out from each other's files: whether any has moved, and then all have."""
    own, wanted = folder / f"survivor{rank}.json", MAPS[world]
    own.with_suffix(".part").write_text(json.dumps(cache.map.holders == wanted))
    own.with_suffix(".part").rename(own)
    paths = [folder / f"survivor{each}.json" for each in range(world) if each != victim]
    until = time.monotonic() + 4 * TIMEOUT_S
    while not all(path.exists() for path in paths):
        assert time.monotonic() < until, "a survivor hangs"
        time.sleep(0.02)
    moved = any(json.loads(path.read_text()) for path in paths)
    if cache.migration.in_doubt is not None:
        cache.migration.resolve(committed=moved)
    cache.migration.cancel()
    assert (cache.map.holders == wanted) == moved, "a mixed state"
    return moved


def check_complete(cache: PiKVCache) -> None:
    """Every token of the full layer whose home lies here is stored here, but for those of the forward that broke off."""
    probe = CacheProbe(cache)
    homes, pool = probe.homes(0), probe.near_pool(0)
    for row, length in enumerate(probe.lens):
        for table, shard in enumerate(probe.local_shards):
            wanted = {at for at in range(length - 1) if int(homes[row, at]) == shard}
            assert wanted <= set(pool.positions(row, table)), (
                f"shard {shard}, row {row}: {wanted - set(pool.positions(row, table))} are lost"
            )


def check_unchanged(cache: PiKVCache, before: dict) -> None:
    """What was stored before a move at once is there, bit for bit; a forward that broke off may have added to it."""
    probe = CacheProbe(cache)
    for (layer, level, shard, _, row), (positions, stored) in before.items():
        if shard in probe.local_shards and positions:
            now, count = probe.pools(layer)[level].stored(row, probe.local_shards.index(shard)), len(positions)
            assert now.positions.tolist()[:count] == positions
            assert digest([now.keys[:count].contiguous(), now.values[:count].contiguous()]) == stored


if __name__ == "__main__":
    main()
