"""The first collective of a layer with pikv.routing.exchange "routed": queries to the ranks that they read, entries to their homes.

G ranks, N tokens of a rank (padded to the largest rank), S shards.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pikv_ds import ops

from .exchange import Exchange

QUERIES, ENTRIES = 0, 1  # groups of rows


class Arrived(NamedTuple):
    """Rows that all ranks have sent to this one, in the order of ranks and tokens: M queries, E entries."""

    common: list[Tensor]
    """[G * N, ...], of all ranks' tokens."""
    tokens: Tensor
    """[M] int32 rank * N + token, of queries; -1 = no query."""
    queries: list[Tensor]
    """[M, ...]; anything where there is none."""
    num_queries: list[int] | None
    """Of each rank; None: N, those without a token among them."""
    entry_tokens: Tensor
    """[E] int32, as tokens."""
    entries: list[Tensor]
    """[E, ...]."""


def route(exchange: Exchange, need: Tensor, common: list[Tensor], queries: list[Tensor], entries: list[Tensor], what: str) -> Arrived:
    """One all-to-all.

    Args: need bool [2, G, N], queries and entries that each rank gets; common, queries, entries: [n, ...] each, n <= N tokens.

    Sync: none, but on CPU, where it is free, the sizes of messages. Elsewhere every message has room for N rows of both, so that its size
    is that of the bucket.
    """
    dense, num_tokens, num_ranks = exchange.short_messages, need.shape[2], exchange.size
    fields = [x.contiguous() for x in (*common, *queries, *entries)]
    groups = [-1] * len(common) + [QUERIES] * len(queries) + [ENTRIES] * len(entries)
    widths = [x.shape[1:].numel() * x.element_size() for x in fields]
    of = lambda group: [width for width, own in zip(widths, groups, strict=True) if own == group]  # noqa: E731
    most = ops.route_bytes(of(-1), [(num_tokens, of(QUERIES)), (num_tokens, of(ENTRIES))], num_tokens)
    buffer = torch.empty(num_ranks, most, dtype=torch.uint8, device=need.device)
    sizes = ops.route_pack(buffer, need, fields, groups=groups, own=exchange.rank, dense=dense)
    received = exchange.all_to_all_up_to(buffer, sizes.tolist() if dense else [most] * num_ranks, what)
    found = [x.new_empty(num_ranks * num_tokens, *x.shape[1:]) for x in fields]
    tokens = torch.empty(2, num_ranks * num_tokens, dtype=torch.int32, device=need.device)
    counts = torch.empty(2, num_ranks, dtype=torch.int32, device=need.device)
    ops.route_unpack(received, found, tokens, counts, groups=groups, dense=dense)
    sent = counts.tolist() if dense else None
    ends = [None, None] if sent is None else [sum(of_group) for of_group in sent]
    first, last = len(common), len(common) + len(queries)
    return Arrived(
        common=found[:first], tokens=tokens[QUERIES, : ends[QUERIES]], queries=[x[: ends[QUERIES]] for x in found[first:last]],
        num_queries=None if sent is None else sent[QUERIES], entry_tokens=tokens[ENTRIES, : ends[ENTRIES]],
        entries=[x[: ends[ENTRIES]] for x in found[last:]],
    )  # fmt: skip


def bring_back(exchange: Exchange, partials: Tensor, need: Tensor, arrived: Arrived, order: list[int], what: str) -> tuple[Tensor, Tensor]:
    """The second collective: partials of the queries that have arrived to where they came from, merged there. One all-to-all.

    Args: partials [M, Hq, Dv + 1] f32, out and lse. need bool [G, N]: the ranks that own queries went to. order: of the sum.

    Returns: out [N, Hq, Dv] f32, lse [N, Hq] f32. Sync: as route.
    """
    num_ranks, num_tokens = need.shape
    if arrived.num_queries is None:
        sent, asked = [num_tokens] * num_ranks, [num_tokens] * num_ranks
    else:
        sent, asked = arrived.num_queries, need.sum(1).tolist()
    back = exchange.all_to_all_rows(partials, sent, asked, what)
    return ops.route_merge(back, need.contiguous(), order=order, dense=arrived.num_queries is not None)
