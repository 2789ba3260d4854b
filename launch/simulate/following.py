"""KV that follows experts against KV that stays on the rank that made it: bytes that cross ranks and the fullest rank. Distinct requests.

The entries of a trace are one decode step each; G ranks run equal parts of the tokens.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from pikv_ds.placement.balance import balance
from pikv_ds.placement.slots import blocks, moved

from .strategies import Job, kv_bytes
from .traces import Trace


def following(job: Job, trace: Trace) -> list[dict[str, Any]]:
    """Rows of "experts", "position" and "stays". Bytes are means per token and layer; `reached`: other ranks that read for a query.

    "top k" reads only the shards of the token's experts, which is no longer exact; with "position" no rank can be left out.
    """
    ranks, spec, uneven = job.ranks, job.layers[0], replace(job, lengths=uneven_lengths(job))
    entry = spec.values_per_token * job.itemsize
    query, partial = job.num_q_heads * spec.k_dim * job.itemsize, job.num_q_heads * (spec.v_dim + 1) * 4
    tokens = trace.ids.shape[1]
    source = torch.arange(tokens) * ranks // tokens
    homes = trace.ids * ranks // trace.num_experts  # [L, N, K]
    shares = {
        "experts": (float((homes[..., 0] != source).double().mean()), reached(homes, source, ranks)),
        "position": (1 - 1 / ranks, ranks - 1.0),
        "stays": (0.0, 0.0),
    }
    rows = []
    for name, (away, others) in shares.items():
        strategy = "replicated" if name == "stays" else name
        held, of_uneven = (kv_bytes(strategy, each, trace)[0].sum(0).double() for each in (job, uneven))
        exact = 0.0 if name == "stays" else (ranks - 1) * (query + partial)
        rows.append(
            {
                "kind": "following", "kv": name, "trace": trace.name, "ranks": ranks,
                "entries_sent_share": away, "ranks_reached_top_k": others,
                "bytes_exact": away * entry + exact, "bytes_top_k": away * entry + others * (query + partial),
                "fullest_over_mean": float(held.max() / held.mean()), "fullest_over_mean_uneven": float(of_uneven.max() / of_uneven.mean()),
                "fullest_without_spill": without_spill(name, trace, ranks, held),
                "bytes_moved_by_a_plan": plan_bytes(trace, ranks, entry) if name == "experts" else 0,
            }
        )  # fmt: skip
    return rows


def reached(homes: Tensor, source: Tensor, ranks: int) -> float:
    """Mean number of other ranks among the homes [L, N, K] of what a query reads; source [N]: its own."""
    total = 0
    for layer in homes:
        seen = torch.zeros(len(source), ranks, dtype=torch.bool).scatter_(1, layer, True)
        seen[torch.arange(len(source)), source] = False
        total += int(seen.sum())
    return total / homes[..., 0].numel()


def without_spill(name: str, trace: Trace, ranks: int, held: Tensor) -> float:
    """Entries of the fullest rank over the mean, over all layers, if shards had no capacity."""
    if name != "experts":
        return float(held.max() / held.mean())
    counts = (trace.ids[..., 0] * ranks // trace.num_experts).flatten().bincount(minlength=ranks).double()
    return float(counts.max() / counts.mean())


def plan_bytes(trace: Trace, ranks: int, entry: int) -> int | None:
    """KV bytes of the trace's tokens that change ranks with their experts, by a plan for its loads. None: uneven experts."""
    if trace.num_experts % ranks:
        return None
    loads = torch.stack([layer[:, 0].bincount(minlength=trace.num_experts) for layer in trace.ids]).double()
    present = blocks(len(loads), trace.num_experts, ranks)
    new = moved(present, balance(loads, ranks, num_slots=trace.num_experts, present=present), trace.num_experts)
    return int((new * loads.unsqueeze(2)).sum()) * entry


def uneven_lengths(job: Job) -> list[list[int]]:
    """As many tokens in all, but lengths as of a lognormal of sigma 1: the quantiles (i + 1/2) / n, shortest first."""
    count, total = sum(job.rows), sum(sum(own) for own in job.lengths)
    weights = [2.718281828 ** NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)]
    lengths = iter([max(1, round(total * weight / sum(weights))) for weight in weights])
    return [[next(lengths) for _ in own] for own in job.lengths]
