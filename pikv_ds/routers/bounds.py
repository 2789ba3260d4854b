from typing import Literal

import torch
from torch import Tensor

from pikv_ds import ops
from pikv_ds.pages.pool import PagePool
from pikv_ds.pages.rows import Rows
from pikv_ds.routers import ROUTERS
from pikv_ds.routers.base import NewEntries, PageChange, PageQuery, Router

SUMMARY = "bounds"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}


@ROUTERS.register("bounds")
class PageBounds(Router):
    """Pages whose keys lie where the query looks, by the smallest and largest key of each page and channel (a box around the keys).

    score = mean or max (`heads`) over the query heads of a kv head of  scale sum_d q_d center_d + spread |q_d| half_range_d
    spread 1 with "max" is Quest: no logit of the page exceeds its score. It prefers pages with spread keys; a smaller spread trusts that
    keys lie near the middle of their box, and holds more of the attention. Chosen per kv head. Bytes per page and layer:
    num_kv_heads * 2 * k_dim * 2 (4 with metadata fp32), and num_kv_heads * (2 * k_dim + 4) with int8, a scale for the minima of a page and
    head and one for its maxima (ops/format/bound_codes.py). Smaller bounds than f32 are rounded outwards.
    Source: Quest, arXiv 2406.10774, section 3.3; spread and mean are ours.
    """

    summarises = by_page = by_summary = by_head = by_block = True

    def __init__(
        self, *, spread: float = 0.4, heads: Literal["mean", "max"] = "mean", metadata: Literal["fp32", "bf16", "fp16", "int8"] = "bf16"
    ) -> None:
        if not 0 <= spread <= 1:
            raise ValueError(f"spread from 0 to 1, got {spread}")
        self.spread, self.heads, self.dtype = spread, heads, _DTYPES[metadata]

    def open(self, layer: int, pool: PagePool, num_shards: int, rows: Rows) -> None:
        shape = pool.reader.bounds_shape(self.dtype)
        pool.add_summary(SUMMARY, shape if pool.blocks == 1 else (pool.blocks, *shape), self.dtype)

    def wrote(self, layer: int, pool: PagePool, new: NewEntries) -> None:
        pool.reader.bounds(_of_blocks(pool), new.slot_mapping, new.table)

    def rebuilt(self, layer: int, pool: PagePool, change: PageChange) -> None:
        self.wrote(layer, pool, change.entries)

    def score(self, asked: PageQuery) -> Tensor:
        return self.score_with(asked.q, asked)

    def score_with(self, q: Tensor, asked: PageQuery) -> Tensor:
        pool, width = asked.pool, None  # None: |q|
        if self.heads == "mean":  # linear in center and half range, so the heads are one
            q = q.float().unflatten(1, (pool.fmt.num_kv_heads, -1))
            q, width = q.mean(2), self.spread * q.abs().mean(2)
        elif self.spread < 1:
            q = q.float()
            width = self.spread * q.abs()
        table, lens = asked.block_table, asked.seqlens
        return ops.page_score(q, _of_blocks(pool), pool.fmt, table, lens, scale=asked.scale, width=width, block_size=pool.block_size)


def _of_blocks(pool: PagePool) -> Tensor:
    """Bounds of all blocks, [P * blocks, H, 2, D]."""
    bounds = pool.summaries[SUMMARY]
    return bounds if pool.blocks == 1 else bounds.flatten(0, 1)
