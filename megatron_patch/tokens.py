"""How the tokens of a host's forward lie, and the rectangle of rows and columns that the cache works on. B rows, T columns.

Each arrangement has: positions [B, T] int32 (-1 = not stored); padding [B, T] bool, tokens that nobody may attend to, or None;
num_host_tokens, how many tokens layers and routers see; rows(x), host layout -> [B, T, ...]; host(x), the way back.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Columns:
    """Static batching: every row brings the same columns, of which some may be padding; the host's layout is [T, B, ...]."""

    def __init__(self, positions: Tensor, padding: Tensor | None = None) -> None:
        self.positions, self.padding, self.num_host_tokens = positions, padding, positions.numel()

    def rows(self, x: Tensor) -> Tensor:
        return x.unflatten(0, self.positions.shape[::-1]).transpose(0, 1) if x.dim() == 1 else x.transpose(0, 1)

    def host(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1)


class Piece(NamedTuple):
    """Tokens of one request in a forward: the row they belong to, the position of the first, how many."""

    row: int
    start: int
    length: int


class Packed:
    """Dynamic batching: the tokens of one request after the other, then padding; the host's layout is [N, 1, ...].

    A rectangle has as many columns as the longest piece: a forward that mixes a long prompt with decoding computes on padding.
    """

    padding = None  # a row's tokens come first in it

    def __init__(self, pieces: list[Piece], num_rows: int, num_host_tokens: int, device: torch.device) -> None:
        """pieces: in the order in which the host packs them; rows without one store nothing."""
        self.num_host_tokens = num_host_tokens
        columns = max(piece.length for piece in pieces)
        index = torch.cat([piece.row * columns + torch.arange(piece.length) for piece in pieces])
        positions = torch.full((num_rows * columns,), -1, dtype=torch.int32)
        positions[index] = torch.cat([torch.arange(p.start, p.start + p.length, dtype=torch.int32) for p in pieces])
        self.positions, self.index = positions.view(num_rows, columns).to(device), index.to(device)

    def rows(self, x: Tensor) -> Tensor:
        tokens = x if x.dim() == 1 else x.flatten(0, 1)
        out = x.new_zeros(self.positions.numel(), *tokens.shape[1:])
        return out.index_copy_(0, self.index, tokens[: self.index.numel()]).view(*self.positions.shape, *tokens.shape[1:])

    def host(self, x: Tensor) -> Tensor:
        out = x.new_zeros(self.num_host_tokens, 1, *x.shape[2:])
        out[: self.index.numel(), 0] = x.flatten(0, 1).index_select(0, self.index)
        return out


class Nothing:
    """An idle forward: its tokens are of no use, its queries are zeros, one column for each row that is stored."""

    padding = None

    def __init__(self, num_rows: int, host_shape: tuple[int, int], device: torch.device) -> None:
        self.host_shape, self.num_host_tokens = host_shape, host_shape[0] * host_shape[1]
        self.positions = torch.full((num_rows, 1), -1, dtype=torch.int32, device=device)

    def rows(self, x: Tensor) -> Tensor:
        return x.new_zeros(*self.positions.shape, *x.shape[1 if x.dim() == 1 else 2 :])

    def host(self, x: Tensor) -> Tensor:
        return x.new_zeros(*self.host_shape, *x.shape[2:])


Tokens = Columns | Packed | Nothing
