"""How the tokens of a call are shared out, as far as shapes tell: csrc/cuda/work.h in Python. tests/ops compares the two."""

from __future__ import annotations

from .launch import WARPS
from .params import Attend

UNIT, FINE_UNIT, LEAST_TOKENS = 64, 16, 256  # tokens of a unit, of one where there are few, and of a worker that has any


def best_workers(passes: int, slots: int) -> int:
    """How many workers fill `slots` blocks best, when each of them is `passes` blocks: no more than four waves."""
    best, most = 1, 0.0
    for waves in range(1, 5):
        workers = max(1, waves * slots // passes)
        used = workers * passes / (-(-workers * passes // slots) * slots)
        if used > most + 0.02:  # fewer parts, unless it pays
            best, most = workers, used
    return best


def share_work(a: Attend, rows: int, slots: int, num_splits: int) -> int:
    """Fills unit, workers, splits and least; the number of parts. rows: of a block; slots: blocks that run at once.
    num_splits 0 = chosen."""
    tables, passes = a.R * a.S * a.H, -(-a.T * a.G // rows)
    a.unit = a.block if a.page_lse else min(a.block, UNIT)
    rounds = lambda: -(-a.num_columns * -(-a.block // a.unit) // WARPS)  # noqa: E731
    workers = best_workers(passes, slots)
    if not a.page_lse and tables * rounds() < 24 * workers:
        a.unit = min(a.block, FINE_UNIT)  # finer, so that all have as much
    a.workers, a.splits = 0, 1
    a.least = max(1, LEAST_TOKENS // (WARPS * a.unit))
    if num_splits > 0:
        a.splits = min(num_splits, max(1, a.num_columns))
    elif rounds() > a.least and passes < slots:
        a.workers = min(workers, -(-tables * rounds() // a.least))
    return a.workers + tables if a.workers else tables * a.splits


def count_blocks(a: Attend, rows: int) -> int:
    return (a.workers or a.R * a.S * a.H * a.splits) * -(-a.T * a.G // rows)
