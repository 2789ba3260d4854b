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
    row_bytes, width = partials[0].nbytes if len(partials) else partials.shape[1:].numel() * 4, news[0].shape[1]
    size = lambda rows, told: answer_bytes(rows, row_bytes, told, width)  # noqa: E731
    dense = sent is not None
    counts = sent if dense else [num_rows] * num_ranks
    asked = need.sum(1).tolist() if dense else counts
    room = -(-size(num_rows, most) // 16) * 16
    sizes = [size(rows, len(told)) for rows, told in zip(counts, news, strict=True)] if dense else [room] * num_ranks
    sizes[exchange.rank] = room
    buffer = torch.empty(num_ranks, room, dtype=torch.uint8, device=need.device)
    flat, begin = buffer.view(-1), 0
    for part, told, whole in zip(partials.split(counts), news, sizes, strict=True):
        at = begin + HEADER
        if dense:
            flat[begin:at] = torch.tensor([len(told), width, 0, 1], dtype=torch.int32).view(torch.uint8)
        flat[at : at + part.nbytes] = part.contiguous().view(-1).view(torch.uint8)
        at += _padded(part.nbytes)
        flat[at : at + told.numel()] = told.view(-1)
        begin += whole
    got = exchange.all_to_all_up_to(buffer, sizes, what)
    told = got[:, :4].contiguous().view(torch.int32).flatten().tolist() if dense else [most] * num_ranks
    back, heard = [], []
    for message, rows, count in zip(got, asked, told, strict=True):
        at = HEADER + _padded(rows * row_bytes)
        back.append(message[HEADER : HEADER + rows * row_bytes])
        heard.append(message[at : at + count * width])
    back = torch.cat(back).view(torch.float32).view(sum(asked), *partials.shape[1:])
    out, lse = ops.route_merge(back, need.contiguous(), order=order, dense=dense)
    return out, lse, torch.cat(heard).view(sum(told), width)


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // 16) * 16
