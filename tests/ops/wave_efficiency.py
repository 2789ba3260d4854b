"""How evenly the tokens of a decode are shared out over the blocks of a GPU, simulated.

    python -m tests.ops.wave_efficiency --json docs/results/wave_efficiency.json

The host's part is ops/nvrtc/work.py itself (csrc/cuda/work.h is held to it by tests/ops/test_work.py), the device's part the arithmetic of
csrc/kernels/work.cuh. Time of a warp = tokens that it reads; blocks start in order as slots become free. Efficiency = the tokens of the
call / (slots x warps of a block x the time until the last block is done). What it leaves out: starting a block, memory, the merge.
"""

from __future__ import annotations

import argparse
import heapq
import sys

import torch

from pikv_ds.launch.output import print_table, write_json
from pikv_ds.ops.nvrtc.params import Attend
from pikv_ds.ops.nvrtc.work import WARPS, count_blocks, share_work

PROCESSORS, HEADS = 132, 8  # of an H100 or H200
TIERS = {"fp32": (4, 3), "tensor cores": (8, 2)}  # query rows of a block, blocks of a multiprocessor
BATCHES = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64)
PAGES = (16, 32, 64, 128)


def lengths(kind: str, batch: int) -> list[int]:
    """Tokens of each request; a batch of one is even only."""
    if kind == "even":
        return [32768] * batch
    if kind == "one long":
        return [131072] + [1024] * (batch - 1)
    if kind == "two lengths":
        return [32768 if i % 2 else 3000 for i in range(1, batch + 1)]
    return torch.randint(4096, 32768, (batch,), generator=torch.Generator().manual_seed(batch)).tolist()


def case(lens: list[int], page: int, rows: int) -> Attend:
    a = Attend(R=len(lens), T=1, S=1, H=HEADS, G=rows, num_columns=-(-max(lens) // page))
    a.f.page_size, a.block, a.blocks = page, page, 1
    return a


def block_times(a: Attend, lens: list[int]) -> list[int]:
    """Tokens of the slowest warp of each block, by the arithmetic of Row and Parts."""
    of_page = -(-a.f.page_size // a.unit)
    units = [n // a.f.page_size * of_page + -(-(n % a.f.page_size) // a.unit) for n in lens for _ in range(a.H)]
    rounds = [max(1, -(-n // WARPS)) for n in units]
    if not a.workers:
        return [-(-n // a.splits) * a.unit for n in rounds for _ in range(a.splits)]
    per = max(a.least, -(-sum(rounds) // a.workers))
    return [(min(sum(rounds), first + per) - first) * a.unit for first in range(0, sum(rounds), per)]


def efficiency(lens: list[int], page: int, tier: str) -> float:
    rows, blocks = TIERS[tier]
    slots, a = blocks * PROCESSORS, case(lens, page, rows)
    share_work(a, rows, slots, 0)
    assert count_blocks(a, rows) >= len(block_times(a, lens))
    busy = [0] * slots
    for time in block_times(a, lens):
        heapq.heappush(busy, heapq.heappop(busy) + time)
    return sum(lens) * a.H / (slots * WARPS * max(busy))


def rows() -> list[dict[str, object]]:
    made = []
    for tier in TIERS:
        for kind in ("even", "ragged", "two lengths", "one long"):
            for page in PAGES:
                found = {batch: efficiency(lengths(kind, batch), page, tier) for batch in BATCHES if batch > 1 or kind == "even"}
                made.append({"tier": tier, "lengths": kind, "page": page, "least": round(min(found.values()), 3),
                             "batch_of_least": min(found, key=found.get), "mean": round(sum(found.values()) / len(found), 3)})  # fmt: skip
    return made


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.ops.wave_efficiency")
    parser.add_argument("--json", metavar="FILE", help="write the rows to FILE")
    args = parser.parse_args(argv)
    made = rows()
    print_table(f"Share of {PROCESSORS} multiprocessors that is busy, {HEADS} kv heads", made)
    write_json(args.json, "wave_efficiency", made)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
