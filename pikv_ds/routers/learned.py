from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds.codecs.part_file import PartFile
from pikv_ds.pages.pool import PagePool
from pikv_ds.pages.rows import Rows
from pikv_ds.routers import ROUTERS
from pikv_ds.routers.base import NewEntries, PageChange, PageQuery, Router
from pikv_ds.routers.kv_gate import GateLayer, KVGate, pack, unpack
from pikv_ds.spec import LayerSpec

PART, SUMMARY = "kv_gate", "codes"
NUMBERS_AT_ONCE = 1 << 26  # of the scores of single keys


@ROUTERS.register("learned")
class LearnedGate(Router):
    """Pages by what a trained gate expects the query to give to their keys, of which it keeps codes of a few bits.

    score = log sum over the query heads g of a kv head and the keys k of the page of  exp(V_g q . code(k) - total_g(q)).  code(k) has r
    numbers of 2 or 4 bits, W (k - center) rounded; total_g(q) is the gate's guess at the head's sum over all keys, so that no rank needs
    to be asked for it. `path`: file of `pikv train kv_gate`, for one model and any number of shards. Chosen per kv head.
    Bytes per page and layer: num_kv_heads * page_size * r * bits / 8; with r = k_dim and 2 bits, in pages of 16, those of `bounds` in bf16.
    Source: ours. A gate distilled from the model's own attention is SeerAttention, arXiv 2410.13276; low-rank heads that score single keys
    are DeepSeek-V3.2's lightning indexer; codes of keys with learned maps are product quantisation's, without its tables.
    """

    reads_model_queries = True
    summarises = by_page = by_block = True

    def __init__(self, *, path: str) -> None:
        self.path = path
        self.trained = PartFile.load(path, PART)
        self.gate = KVGate(self.trained.layers, **{name: self.trained.options[name] for name in ("bits", "rank", "totals")})
        try:
            self.gate.load_state_dict(dict(self.trained.weights))
        except RuntimeError as error:
            raise ValueError(f"path = a whole file of `pikv train {PART}`, got {path!r}: {error}") from None
        self.gate.requires_grad_(False)
        self.own: dict[int, GateLayer] = {}

    @property
    def from_files(self) -> list[object]:
        return [self.trained, self.gate, self.own]

    def check(self, layers: list[LayerSpec], num_shards: int) -> None:
        self.trained.check_layers(layers, "pikv.routing.path")
        for spec in layers:
            self.own[spec.layer_idx] = self.gate.layers[spec.layer_idx].of_heads(spec.first_head, spec.num_kv_heads)

    def open(self, layer: int, pool: PagePool, num_shards: int, rows: Rows) -> None:
        gate = self.own[layer].to(pool.device)
        pool.add_summary(SUMMARY, (pool.page_size, pool.fmt.num_kv_heads, gate.rank * gate.bits // 8), torch.uint8)

    def wrote(self, layer: int, pool: PagePool, new: NewEntries) -> None:
        gate, codes = self.own[layer], pool.summaries[SUMMARY]
        if not pool.num_pages or not new.slot_mapping.numel():
            return
        here, flat = new.slot_mapping >= 0, codes.flatten(0, 1)
        first = here.to(torch.int8).argmax()  # entries that are not here repeat the first that is; if none is, what is in slot 0 stays
        source = torch.where(here, torch.arange(len(here), device=here.device), first)
        slot = new.slot_mapping[source].clamp_min(0).to(torch.int64)
        packed = pack(gate.codes(new.k.float().nan_to_num())[source], gate.bits)
        flat[slot] = torch.where(here[first], packed, flat[slot])

    def rebuilt(self, layer: int, pool: PagePool, change: PageChange) -> None:
        self.wrote(layer, pool, change.entries)

    def score(self, asked: PageQuery) -> Tensor:
        gate, pool = self.own[asked.layer], asked.pool
        num_rows, num_shards = asked.rows.stop - asked.rows.start, asked.visible.shape[1]
        columns, size = asked.visible.shape[2], pool.block_size
        if not pool.num_pages or not columns:
            return torch.zeros_like(asked.block_table, dtype=torch.float32)
        table = asked.block_table.view(num_rows, -1, num_shards, columns)[:, 0].clamp_min(0)  # a row's queries have one table
        codes = unpack(pool.summaries[SUMMARY].view(-1, size, *pool.summaries[SUMMARY].shape[2:])[table], gate.bits)
        q = asked.scale * asked.q.float().unflatten(1, (pool.fmt.num_kv_heads, -1))
        met, added = gate.queries(q)
        met, added = (x.unflatten(0, (num_rows, -1)) for x in (met, added - gate.totals(q)))  # [R, T, H, G, r] and [R, T, H, G]
        held = torch.arange(columns * size, device=met.device) < asked.seqlens.view(num_rows, -1, num_shards, 1)  # [R, T, S, C * P]
        at_once = max(1, NUMBERS_AT_ONCE // (codes[..., 0].numel() * met.shape[3]))
        found = [_scores(m, a, codes, h) for m, a, h in zip(*(x.split(at_once, 1) for x in (met, added, held)), strict=True)]
        return torch.cat(found, 1).flatten(0, 2)


def _scores(met: Tensor, added: Tensor, codes: Tensor, held: Tensor) -> Tensor:
    """met [R, T, H, G, r], added [R, T, H, G], codes [R, S, C, P, H, r], held [R, T, S, C * P] bool -> [R, T, S, H, C]."""
    size = codes.shape[3]
    logits = torch.einsum("rthgd,rskhd->rtshgk", met, codes.flatten(2, 3)) + added[:, :, None, :, :, None]
    logits = logits.masked_fill(~held[:, :, :, None, None], -torch.inf)
    return logits.unflatten(-1, (-1, size)).logsumexp((-3, -1))
