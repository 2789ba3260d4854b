"""Decode steps while shards move, beside steps while none moves, in blocks in turns. args: runs, rounds of four blocks, steps of a block,
bytes per step, tokens of a prompt. Rank 0 reports a row per block: milliseconds of every step, and what was moved in it."""

import sys
import time

import torch
import torch.distributed as dist

from pikv_ds.cache import PiKVCache
from pikv_ds.cache.inspect import CacheProbe
from pikv_ds.config import PiKVConfig
from pikv_ds.spec import LayerSpec
from tests.dist.jobs.report import Report
from tests.recorded import host_core

LAYERS, SHARDS, ROWS = 4, 8, 4
MAPS = tuple((shard * 2 // SHARDS,) for shard in range(SHARDS)), ((1,), (0,), (0,), (0,), (1,), (1,), (1,), (0,))
WARM_STEPS = 20


class Timed(host_core.Run):
    def steps(self, count: int) -> tuple[list[float], list[float]]:
        """Milliseconds of wall and of this thread's CPU time, of every step."""
        wall, cpu = [], []
        for _ in range(count):
            began, began_cpu = time.perf_counter(), time.thread_time()
            self.decode(1)
            wall.append(1e3 * (time.perf_counter() - began))
            cpu.append(1e3 * (time.thread_time() - began_cpu))
            self.outputs.clear()
        return wall, cpu


def leaving_bytes(cache: PiKVCache, moves) -> int:
    """Of the pages of shards that this rank sends."""
    own = [cache.map.local.index(move.shard) for move in moves if move.source == cache.map.rank]
    return sum(map(CacheProbe(cache).shard_bytes, own))


def moving(run: Timed, steps: int, bytes_per_step: int) -> dict:
    """A block of steps in all of which shards move, to the other map and back; a last move is not broken off."""
    row: dict = {"wall_ms": [], "cpu_ms": [], "moves": 0, "stall_ms": []}
    while len(row["wall_ms"]) < steps:
        one = move(run, MAPS[run.cache.map.holders == MAPS[0]], bytes_per_step)
        row["moves"] += 1
        for name, value in one.items():
            row[name] = row.get(name, 0 if isinstance(value, int) else []) + value
    return row


def move(run: Timed, wanted, bytes_per_step: int) -> dict:
    """The steps of one move."""
    cache, done = run.cache, run.cache.migration.progress
    sent, again, stall, planned, cycle = done.bytes_sent, done.bytes_again, done.stall_s, [0], cache.migration.advance
    done.stall_s = 0.0

    def advance() -> bool:
        moves = cache.migration.moves
        planned[0] = leaving_bytes(cache, moves) if cache.migration.whole else planned[0]
        return cycle()

    cache.migration.advance = advance
    assert cache.rebalance(wanted, bytes_per_step=bytes_per_step)
    moves, wall, cpu = cache.migration.moves, [], []
    while cache.migration.wanted is not None:
        one = run.steps(1)
        wall, cpu = wall + one[0], cpu + one[1]
    del cache.migration.advance
    assert cache.map.holders == wanted
    come = [cache.map.local.index(each.shard) for each in moves if each.target == cache.map.rank]
    arrived = sum(map(CacheProbe(cache).shard_bytes, come))
    total = torch.tensor([planned[0], arrived, done.bytes_sent - sent, done.bytes_again - again])
    dist.all_reduce(total)
    row = {"wall_ms": wall, "cpu_ms": cpu, "stall_ms": [1e3 * done.stall_s]}
    row |= dict(zip(("bytes_planned", "bytes_arrived", "bytes_sent", "bytes_again"), total.tolist(), strict=True))
    done.stall_s = max(stall, done.stall_s)
    return row


def main() -> None:
    runs, rounds, steps, bytes_per_step, tokens = map(int, sys.argv[1:6])
    dist.init_process_group("gloo")
    report = Report()
    config = PiKVConfig(page_size=16, storage={"requests": "distinct", "num_shards": SHARDS})
    specs = [LayerSpec(layer_idx=i, num_kv_heads=host_core.KV_HEADS, k_dim=host_core.DIM, v_dim=host_core.DIM) for i in range(LAYERS)]
    for number in range(runs):
        cache = PiKVCache(
            specs, config, num_experts=host_core.EXPERTS, dtype=torch.float32, device=torch.device("cpu"), group=dist.group.WORLD
        )  # fmt: skip
        run = Timed(cache, config, dist.group.WORLD)
        run.prefill([tokens] * ROWS)
        run.steps(WARM_STEPS)
        for pair in range(2 * rounds):
            with report.check("block") as row:
                wall, cpu = run.steps(steps)
                row |= {"run": number, "pair": pair, "kind": "idle", "wall_ms": wall, "cpu_ms": cpu}
            with report.check("block") as row:
                if pair % 2 == 0:
                    row |= {"run": number, "pair": pair, "kind": "moving"} | moving(run, steps, bytes_per_step)
                else:  # the control: idle beside idle
                    wall, cpu = run.steps(steps)
                    row |= {"run": number, "pair": pair, "kind": "control", "wall_ms": wall, "cpu_ms": cpu}
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
