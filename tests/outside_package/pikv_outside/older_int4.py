from dataclasses import replace

import torch
from torch import Tensor

from pikv_ds.pools import POOLS
from pikv_ds.pools.base import Pages, PoolKind, PoolPlan
from pikv_ds.spec import LayerSpec


@POOLS.register("older_int4")
class OlderInt4(PoolKind):
    """Pages whose last token is older than `after_tokens`, but for the first page of every table, as 4-bit integers.

    value = code * scale + zero, code 0..15, K per channel over the groups of the record before (KIVI, arXiv 2402.02750). Bytes per token
    and layer: num_kv_heads * ((k_dim + v_dim) / 2 + 4 k_dim / group + 4). Needs a page of whole groups, so a codec of integers before it.
    """

    def __init__(self, *, after_tokens: int = 256) -> None:
        if after_tokens < 0:
            raise ValueError(f"after_tokens of at least 0, got {after_tokens}")
        self.after_tokens = after_tokens

    @property
    def recent_tokens(self) -> int:
        return self.after_tokens

    def pool(self, before: PoolPlan, spec: LayerSpec, dtype: torch.dtype) -> PoolPlan:
        if not before.fmt.grouped:
            raise ValueError(f"the pool before it holds {before.fmt.name}, whose pages are not groups of tokens; use codec 'int8' there")
        return replace(before, fmt=replace(before.fmt, name="int4", v_name="int4"))

    def leaves(self, pages: Pages) -> Tensor:
        """The first page of a table holds sinks."""
        leaves = torch.ones_like(pages.table, dtype=torch.bool)
        leaves[..., 0] = False
        return leaves
