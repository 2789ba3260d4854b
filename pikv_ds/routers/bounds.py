from typing import Literal

import torch
from torch import Tensor

from pikv_ds import ops
from pikv_ds.routers import ROUTERS
from pikv_ds.routers.base import NewEntries, PageQuery, Router
from pikv_ds.store import LayerStore

SUMMARY = "bounds"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@ROUTERS.register("bounds")
class PageBounds(Router):
    """Pages whose keys could score highest, by the smallest and largest key of each page and channel (Quest).

    score = max over the query heads of a kv head of  sum_d max(scale q_d lo_d, scale q_d hi_d), an upper bound of every logit of the page.
    Chosen per kv head. Bytes per page and layer: num_kv_heads * 2 * k_dim * 2 (4 with metadata fp32); a 16-bit bound is rounded outwards.
    Source: arXiv 2406.10774.
    """

    def __init__(self, *, metadata: Literal["fp32", "bf16", "fp16"] = "bf16") -> None:
        self.dtype = _DTYPES[metadata]

    def open(self, layer: int, store: LayerStore, num_shards: int) -> None:
        store.add_summary(SUMMARY, (store.fmt.num_kv_heads, 2, store.fmt.k_dim), self.dtype)

    def wrote(self, layer: int, store: LayerStore, new: NewEntries) -> None:
        self.moved(layer, store, new)

    def moved(self, layer: int, store: LayerStore, new: NewEntries) -> None:
        options = {} if store.tail is None else {"tail": store.tail, "tail_rows": new.table}
        ops.page_bounds(store.summaries[SUMMARY], store.pages, store.fmt, new.slot_mapping, **options)

    def score(self, asked: PageQuery) -> Tensor:
        return self.score_with(asked.q, asked)

    def score_with(self, q: Tensor, asked: PageQuery) -> Tensor:
        store = asked.store
        return ops.page_score(q, store.summaries[SUMMARY], store.fmt, asked.block_table, asked.seqlens, scale=asked.scale)
