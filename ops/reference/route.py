"""route_pack, route_unpack and route_merge, torch reference. G ranks, K groups of rows, N tokens of a rank. Sync: yes, rows are counted."""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds.ops import checks, route_checks

from .merge_partials import merge_partials

HEADER = ALIGN = 16  # bytes: a count per group, int32; every section and message starts on a multiple


def sections(rows: list[int], widths: list[list[int]]) -> tuple[list[list[int]], int]:
    """Where sections of `rows[i]` rows start, one for each of the widths[i] bytes of a row; and the bytes of the message."""
    starts, end = [], HEADER
    for count, of_group in zip(rows, widths, strict=True):
        starts.append([])
        for width in of_group:
            starts[-1].append(end)
            end = -(-(end + count * width) // ALIGN) * ALIGN
    return starts, end


def row_bytes(fields: list[Tensor], groups: list[int], num_groups: int) -> list[list[int]]:
    """Bytes of a row of each section: those that all ranks get, then of every group its tokens and its fields."""
    widths: list[list[int]] = [[], *([4] for _ in range(num_groups))]
    for field, group in zip(fields, groups, strict=True):
        widths[group + 1].append(field.shape[1:].numel() * field.element_size())
    return widths


def route_pack(buffer: Tensor, need: Tensor, fields: list[Tensor], groups: list[int], own: int, dense: bool) -> Tensor:
    """The arguments are those of ops/route.py."""
    route_checks.route_pack(buffer, need, fields, groups, own)
    num_groups, num_ranks, num_tokens = need.shape
    widths, sizes, begin = row_bytes(fields, groups, num_groups), [], 0
    for rank in range(num_ranks):
        chosen = [
            torch.arange(num_tokens, dtype=torch.int32, device=need.device).masked_fill(~need[k, rank], -1) for k in range(num_groups)
        ]
        if dense:
            chosen = [tokens[tokens >= 0] for tokens in chosen]
        counts = [tokens.numel() for tokens in chosen]
        starts, size = sections([num_tokens, *counts], widths)
        message = buffer.view(-1)[begin : begin + size]
        header = torch.tensor(counts + [0] * (HEADER // 4 - num_groups), dtype=torch.int32, device=need.device)
        message[:HEADER] = header.view(torch.uint8)
        for k, tokens in enumerate(chosen):
            _rows(message, starts[k + 1][0], counts[k], 4).copy_(tokens.view(-1, 1).view(torch.uint8))
        places = [iter(starts[0]), *(iter(of_group[1:]) for of_group in starts[1:])]
        for field, group in zip(fields, groups, strict=True):
            width, start = field.shape[1:].numel() * field.element_size(), next(places[group + 1])
            if group < 0:
                padded = field.new_full((num_tokens, *field.shape[1:]), -1)
                padded[: field.shape[0]] = field
                _rows(message, start, num_tokens, width).copy_(_bytes(padded))
            else:
                there = chosen[group] >= 0
                _rows(message, start, counts[group], width)[there] = _bytes(field)[chosen[group][there].long()]
        sizes.append(buffer.shape[1] if rank == own or not dense else size)
        begin += sizes[-1]
    return torch.tensor(sizes, dtype=torch.int64, device=need.device)


def route_unpack(buffer: Tensor, fields: list[Tensor], tokens: Tensor, counts: Tensor, groups: list[int], dense: bool) -> None:
    """The arguments are those of ops/route.py."""
    route_checks.route_unpack(buffer, fields, tokens, counts, groups)
    (num_groups, num_ranks), num_tokens = counts.shape, tokens.shape[1] // buffer.shape[0]
    widths, done = row_bytes(fields, groups, num_groups), [0] * num_groups
    tokens.fill_(-1)
    for rank in range(num_ranks):
        message = buffer[rank]
        counts[:, rank] = message[:HEADER].view(torch.int32)[:num_groups]
        count = counts[:, rank].tolist()
        for n in count:
            checks.require(0 <= n <= num_tokens, f"route_unpack: rank {rank} has sent {n} rows of {num_tokens} tokens")
        starts, _ = sections([num_tokens, *count], widths)
        to = done if dense else [rank * num_tokens] * num_groups
        here = []
        for k, n in enumerate(count):
            token = _rows(message, starts[k + 1][0], n, 4).clone().view(torch.int32).view(-1)
            here.append(token >= 0)
            tokens[k, to[k] : to[k] + n] = torch.where(here[k], token + rank * num_tokens, -1)
        places = [iter(starts[0]), *(iter(of_group[1:]) for of_group in starts[1:])]
        for field, group in zip(fields, groups, strict=True):
            width, start = field.shape[1:].numel() * field.element_size(), next(places[group + 1])
            if group < 0:
                _bytes(field)[rank * num_tokens : (rank + 1) * num_tokens] = _rows(message, start, num_tokens, width)
            else:
                own = _bytes(field)[to[group] : to[group] + count[group]]
                own[here[group]] = _rows(message, start, count[group], width)[here[group]]
        done = [a + b for a, b in zip(done, count, strict=True)]


def route_merge(partials: Tensor, need: Tensor, order: list[int], dense: bool) -> tuple[Tensor, Tensor]:
    """The arguments are those of ops/route.py."""
    route_checks.route_merge(partials, need, order)
    (num_ranks, num_tokens), (heads, width) = need.shape, partials.shape[1:]
    rows = int(need.sum()) if dense else need.numel()
    checks.require(rows <= partials.shape[0], f"route_merge: need asks for {rows} rows, partials have {partials.shape[0]}")
    whole = partials.new_zeros(num_ranks * num_tokens, heads, width)
    whole[..., -1] = -torch.inf
    sent = need.flatten()
    whole[sent] = partials[:rows] if dense else partials[:rows][sent]
    whole = whole.view(num_ranks, num_tokens, heads, width)[torch.tensor(order, device=need.device)]
    return merge_partials(whole[..., :-1], whole[..., -1])


def _bytes(x: Tensor) -> Tensor:
    """[rows, bytes of a row], a view."""
    return x.view(x.shape[0], x.shape[1:].numel()).view(torch.uint8)


def _rows(message: Tensor, start: int, count: int, width: int) -> Tensor:
    """[count, width] of it, a view."""
    return message[start : start + count * width].view(count, width)
