"""The second collective of a layer with pikv.routing.exchange "routed" and a router of pages: partials back, and news of pages with them.

A message is a header of 16 bytes (int32: rows of news, bytes of a row, 0, 1), the partials that its rank has asked for, and the news.
Sections start on multiples of 16 bytes. G ranks, N rows of a rank that were asked about (queries, or kv heads of queries).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds import ops

from .exchange import Exchange

HEADER = 16


def answer_bytes(num_partials: int, partial_bytes: int, num_news: int, news_bytes: int) -> int:
    """Bytes of one message: partial_bytes and news_bytes of a row."""
    return HEADER + _padded(num_partials * partial_bytes) + _padded(num_news * news_bytes)


def answer(
    exchange: Exchange, partials: Tensor, sent: list[int] | None, need: Tensor, news: list[Tensor], most: int, order: list[int], what: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Partials of queries to where they came from, merged there, and news to everybody. One all-to-all.

    Args:
        partials: [M, H, Dv + 1] f32, out and lse, by rank that asked; sent: how many for each; None: N for each, at the places of its rows.
        need: bool [G, N]: the ranks that this rank's own rows were asked of. news: per rank uint8 [m, width], m <= most, without `sent`
        m = most. order: of the sum.

    Returns: out [N, H, Dv] f32, lse [N, H] f32, and the news of all ranks, uint8 [m, width]. Sync: none, but with `sent` sizes of messages.
    """
    num_ranks, num_rows = need.shape
    row_bytes, width = partials.shape[1:].numel() * 4, news[0].shape[1]
    every = [num_rows] * num_ranks
    counts, asked = (every, every) if sent is None else (sent, need.sum(1).tolist())
    room = answer_bytes(num_rows, row_bytes, most, width)
    sizes = [answer_bytes(rows, row_bytes, len(told), width) for rows, told in zip(counts, news, strict=True)]
    sizes = [room if sent is None or rank == exchange.rank else size for rank, size in enumerate(sizes)]
    buffer = torch.empty(num_ranks, room, dtype=torch.uint8, device=need.device)
    flat, begin = buffer.view(-1), 0
    for part, told, whole in zip(partials.split(counts), news, sizes, strict=True):
        at = begin + HEADER
        if sent is not None:
            flat[begin:at] = torch.tensor([len(told), width, 0, 1], dtype=torch.int32).view(torch.uint8)
        flat[at : at + part.nbytes] = part.contiguous().view(-1).view(torch.uint8)
        at += _padded(part.nbytes)
        flat[at : at + told.numel()] = told.view(-1)
        begin += whole
    got = exchange.all_to_all_up_to(buffer, sizes, what)
    heard = [most] * num_ranks if sent is None else got[:, :4].contiguous().view(torch.int32).flatten().tolist()
    parts, news = [], []
    for message, rows, count in zip(got, asked, heard, strict=True):
        at = HEADER + _padded(rows * row_bytes)
        parts.append(message[HEADER : HEADER + rows * row_bytes])
        news.append(message[at : at + count * width])
    back = torch.cat(parts).view(torch.float32).view(sum(asked), *partials.shape[1:])
    out, lse = ops.route_merge(back, need.contiguous(), order=order, dense=sent is not None)
    return out, lse, torch.cat(news).view(sum(heard), width)


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // 16) * 16
