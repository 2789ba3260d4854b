"""A kind of page pool for tests: what is older than so many tokens is stored again in another record."""

from dataclasses import replace

import torch
from torch import Tensor

from pikv_ds.pools.base import Pages, PoolKind, PoolPlan
from pikv_ds.spec import LayerSpec


class Aged(PoolKind):
    name = "aged"

    def __init__(self, *, after_tokens: int = 16, record: str | None = None) -> None:
        self.after_tokens, self.record = after_tokens, record

    @property
    def recent_tokens(self) -> int:
        return self.after_tokens

    def pool(self, before: PoolPlan, spec: LayerSpec, dtype: torch.dtype) -> PoolPlan:
        return before if self.record is None else replace(before, fmt=replace(before.fmt, name=self.record, v_name=self.record))

    def leaves(self, pages: Pages) -> Tensor:
        return torch.ones_like(pages.table, dtype=torch.bool)
