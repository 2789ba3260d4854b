"""Which shard stores how many entries of which request after a prefill, as the cache decides it. N tokens, S shards, R requests."""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds.pages.sizing import default_capacity
from pikv_ds.placement.placement import Placement, hash_expert
from pikv_ds.placement.spill import water_fill
from pikv_ds.spec import LayerSpec

from .traces import Trace


def entries(
    layer: int, spec: LayerSpec, trace: Trace, lengths: list[int], *, placement: str, num_shards: int, page_size: int, spills: bool = True
) -> Tensor:
    """[R, S] int64 entries of a layer after one prefill forward of requests of these lengths, expert_ids "previous_layer".

    spills: False: shards without a capacity. Requests take the trace's tokens one after another. A window layer stores what stays visible.
    """
    rule = Placement(placement, trace.num_experts, num_shards)
    wanted, rows, first = [], [], 0
    for row, length in enumerate(lengths):
        positions = torch.arange(length - spec.tokens_kept(length), length)
        ids = hash_expert(positions, trace.num_experts)
        if layer:
            ids = trace.of_layer(layer - 1, first + int(positions[0]), len(positions))[:, 0] if length else ids
        wanted.append(rule.shard_of(layer, ids, positions))
        rows.append(torch.full_like(positions, row))
        first += length
    shard, row = torch.cat(wanted), torch.cat(rows)
    if spills:
        shard = spilled(shard, num_shards, default_capacity(len(shard), num_shards, page_size))
    return (row * num_shards + shard).bincount(minlength=len(lengths) * num_shards).view(len(lengths), num_shards)


def spilled(wanted: Tensor, num_shards: int, capacity: int) -> Tensor:
    """placement/spill.py on empty shards, in O(N log N) where that needs a table [N, S]. wanted [N] int64 -> homes [N] int64."""
    load = wanted.bincount(minlength=num_shards)
    if int(load.max()) <= capacity:
        return wanted
    order = wanted.argsort(stable=True)
    turn = torch.empty_like(wanted)  # how many before a token wanted the same shard
    turn[order] = torch.arange(len(wanted)) - (load.cumsum(0) - load)[wanted[order]]
    over = turn >= capacity
    extra = water_fill(load.clamp_max(capacity), over.sum())
    homes = wanted.clone()
    homes[over] = torch.arange(num_shards).repeat_interleave(extra)
    return homes


def expected(layer: int, spec: LayerSpec, trace: Trace, lengths: list[int], *, placement: str, num_shards: int, page_size: int) -> Tensor:
    """The same from how often experts are chosen, for more tokens than can be placed one by one: means, rounded up."""
    rule = Placement(placement, trace.num_experts, num_shards)
    share = torch.full((num_shards,), 1 / num_shards, dtype=torch.float64)
    if rule.rule.reads_experts:
        experts = torch.arange(trace.num_experts)
        chosen = trace.shares[(layer - 1) % len(trace.ids)] if layer else torch.full((len(experts),), 1 / len(experts), dtype=torch.float64)
        share = torch.zeros(num_shards, dtype=torch.float64).index_add_(0, rule.shard_of(layer, experts, experts), chosen)
    kept = torch.tensor([spec.tokens_kept(n) for n in lengths], dtype=torch.float64).unsqueeze(1)
    load = kept.sum() * share
    capacity = default_capacity(int(kept.sum()), num_shards, page_size)
    stays = kept * share * (capacity / load.clamp_min(1e-9)).clamp_max(1)
    over = kept - stays.sum(1, keepdim=True)
    extra = water_fill(load.clamp_max(capacity).round().long(), over.sum().round().long()).double()
    return (stays + over * extra / extra.sum().clamp_min(1) - 1e-6).ceil().long()


def pages(counts: Tensor, page_size: int) -> Tensor:
    """[S] int64 pages of shards from entries [R, S]: a page holds entries of one request."""
    return ((counts + page_size - 1) // page_size).sum(0)
