"""Four ways to hold the cache of a decode step on G ranks: bytes that each rank stores, bytes that it sends, and the least time that takes.

A step brings one token of every request. Attention is exact: every query reads everything that is visible to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pikv_ds.cache.stats import decode_bytes_sent, merge_bytes, partial_bytes, share_bytes
from pikv_ds.spec import LayerSpec

from . import stored
from .interconnects import Interconnect
from .traces import Trace

STRATEGIES = {
    "experts": "PiKV: an entry lies with its expert, full shards spill",
    "position": "token-interleaved context parallelism: entry t on rank t mod G",
    "heads": "kv heads dealt out; no more than num_kv_heads ways",
    "replicated": "every rank keeps all that it runs; nothing is sent",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is simulated. lengths: of the requests, per rank; with replicated requests rank 0's are everybody's."""

    layers: Sequence[LayerSpec]
    num_q_heads: int
    itemsize: int
    record_bytes: Sequence[int]
    """Per layer, of a page."""
    tail_bytes: Sequence[int]
    """Per layer, of the raw keys that a grouped format keeps of a request and shard."""
    page_size: int
    requests: str
    lengths: Sequence[Sequence[int]]
    sample: int | None = None
    """Tokens of a layer that are placed one by one; of more, means are taken. None: all are placed."""

    @property
    def ranks(self) -> int:
        return len(self.lengths)

    @property
    def stored(self) -> list[int]:
        """Lengths of the requests that the group stores, each once."""
        return list(self.lengths[0]) if self.requests == "replicated" else [n for own in self.lengths for n in own]

    @property
    def rows(self) -> list[int]:
        """Requests of every rank."""
        return [len(own) for own in self.lengths]

    @property
    def means(self) -> bool:
        return self.sample is not None and sum(self.stored) > self.sample


def simulate(strategy: str, job: Job, trace: Trace, net: Interconnect) -> dict[str, Any]:
    """A row: KV bytes of the fullest rank and of all, bytes that the busiest rank sends, collectives, imbalance, times in ms."""
    kv, counts = kv_bytes(strategy, job, trace)
    sent, collectives, wire_us = wire(strategy, job, net)
    per_rank = kv.sum(0)
    read_us = float(kv.amax(1).sum()) / net.memory_gb_per_s / 1e3
    total = counts.sum(1)
    return {
        "kind": "step", "strategy": strategy, "ranks": job.ranks, "requests": job.requests,
        "kv_bytes_fullest": int(per_rank.max()), "kv_bytes_mean": float(per_rank.double().mean()),
        "imbalance": float(per_rank.max() / per_rank.double().mean().clamp_min(1)),
        "imbalance_worst_layer": float((counts.amax(1) / (total / job.ranks).clamp_min(1e-9)).max()),
        "wire_bytes": sent, "collectives": collectives,
        "read_ms": read_us / 1e3, "wire_ms": wire_us / 1e3, "step_ms": (read_us + wire_us) / 1e3, "means": job.means,
    }  # fmt: skip


def kv_bytes(strategy: str, job: Job, trace: Trace) -> tuple[Tensor, Tensor]:
    """Bytes [L, G] of pages in use and raw tails, and entries [L, G]."""
    of_layers = [_of_layer(strategy, job, trace, i) for i in range(len(job.layers))]
    return torch.stack([held for held, _ in of_layers]), torch.stack([counts for _, counts in of_layers])


def _of_layer(strategy: str, job: Job, trace: Trace, i: int) -> tuple[Tensor, Tensor]:
    spec = job.layers[i]
    if strategy in ("experts", "position"):
        place = stored.expected if job.means else stored.entries
        counts = place(i, spec, trace, job.stored, placement=strategy, num_shards=job.ranks, page_size=job.page_size)
        return stored.pages(counts, job.page_size) * job.record_bytes[i] + len(job.stored) * job.tail_bytes[i], counts.sum(0)
    kept = torch.tensor([sum(spec.tokens_kept(n) for n in own) for own in _own(strategy, job)])
    pages = torch.tensor([sum(-(-spec.tokens_kept(n) // job.page_size) for n in own) for own in _own(strategy, job)])
    ways = head_ways(spec, job.ranks) if strategy == "heads" else 1
    tails = torch.tensor([len(own) * job.tail_bytes[i] for own in _own(strategy, job)])
    return -(-(pages * job.record_bytes[i] + tails) // ways), -(-kept // ways)


def _own(strategy: str, job: Job) -> list[list[int]]:
    """Lengths of the requests whose entries, of all heads or some, a rank stores."""
    if strategy == "replicated" or job.requests == "replicated":
        return [list(own) for own in job.lengths]
    ways = max(head_ways(spec, job.ranks) for spec in job.layers)
    return [[n for own in job.lengths[rank // ways * ways : rank // ways * ways + ways] for n in own] for rank in range(job.ranks)]


def head_ways(spec: LayerSpec, ranks: int) -> int:
    """Into how many parts kv heads can be dealt out: the largest divisor of their number that also divides the ranks. A latent has one."""
    return max(n for n in range(1, spec.num_kv_heads + 1) if spec.num_kv_heads % n == 0 and ranks % n == 0)


def wire(strategy: str, job: Job, net: Interconnect) -> tuple[int, int, float]:
    """Bytes that the busiest rank sends, collectives, and the least time of all of them in microseconds."""
    if strategy == "replicated" or job.ranks == 1:
        return 0, 0, 0.0
    if strategy == "heads":
        return _heads_wire(job, net)
    return _shards_wire(job, net)


def _shards_wire(job: Job, net: Interconnect) -> tuple[int, int, float]:
    """Of entries that lie on some other rank, whichever: `routing.exchange` "all" of this cache."""
    rows, heads, layers = job.rows, job.num_q_heads, list(job.layers)
    sent = max(decode_bytes_sent(job.requests, rows, rank, heads, layers, job.itemsize) for rank in _different(rows))
    if job.requests == "replicated":
        time = sum(net.all_gather_us(job.ranks, merge_bytes(rows[0], heads, spec.v_dim)) for spec in layers)
        return sent, len(layers), time
    time = 0.0
    for spec in layers:
        time += net.all_gather_us(job.ranks, share_bytes(max(rows), heads, spec, spec.k_dim, job.itemsize))
        time += net.all_to_all_us(job.ranks, partial_bytes(max(rows), heads, spec.v_dim))
    return sent, 2 * len(layers), time


def _heads_wire(job: Job, net: Interconnect) -> tuple[int, int, float]:
    """Replicated: an all-gather of the heads' outputs. Distinct: q, k, v to their heads' ranks, outputs back. In the model's dtype."""
    sent, made, time = 0, 0, 0.0
    for spec in job.layers:
        ways = head_ways(spec, job.ranks)
        if ways == 1:
            continue
        out = max(job.rows) * job.num_q_heads // ways * spec.v_dim * job.itemsize
        if job.requests == "replicated":
            sent, made, time = sent + (ways - 1) * out, made + 1, time + net.all_gather_us(ways, out)
            continue
        there = max(job.rows) * (job.num_q_heads * spec.k_dim + spec.values_per_token) // ways * job.itemsize
        sent, made = sent + (ways - 1) * (there + out), made + 2
        time += net.all_to_all_us(ways, there) + net.all_to_all_us(ways, out)
    return sent, made, time


def _different(rows: list[int]) -> list[int]:
    """A rank of every number of requests."""
    return [rows.index(n) for n in sorted(set(rows))]
