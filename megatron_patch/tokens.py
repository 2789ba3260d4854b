"""How the tokens of a host's forward lie, and the rectangle of rows and columns that the cache works on. B rows, T columns.

Each arrangement has: positions [B, T] int32 (-1 = not stored); num_host_tokens, how many tokens layers and routers see;
rows(x), host layout -> [B, T, ...]; host(x), the way back.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Columns:
    """Static batching: every row brings the same columns; the host's layout is [T, B, ...]."""

    def __init__(self, positions: Tensor) -> None:
        self.positions, self.num_host_tokens = positions, positions.numel()

    def rows(self, x: Tensor) -> Tensor:
        return x.unflatten(0, self.positions.shape[::-1]).transpose(0, 1) if x.dim() == 1 else x.transpose(0, 1)

    def host(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1)


class Packed:
    """Dynamic batching: the tokens of one request after the other, then padding; the host's layout is [N, 1, ...].

    A rectangle has as many columns as the longest piece: a forward that mixes a long prompt with decoding computes on padding.
    """

    def __init__(self, starts: list[int], lengths: list[int], num_rows: int, num_host_tokens: int, device: torch.device) -> None:
        """starts: position of the first token of each piece; lengths: tokens of each piece, 0 = none; rows without a piece come last."""
        self.num_host_tokens = num_host_tokens
        columns = max(1, *lengths) if lengths else 1
        index = [row * columns + i for row, n in enumerate(lengths) for i in range(n)]
        positions = torch.full((num_rows * columns,), -1, dtype=torch.int32)
        positions[index] = torch.tensor([start + i for start, n in zip(starts, lengths, strict=True) for i in range(n)], dtype=torch.int32)
        self.positions = positions.view(num_rows, columns).to(device)
        self.index = torch.tensor(index, dtype=torch.int64).to(device)

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

    def __init__(self, num_rows: int, host_shape: tuple[int, int], device: torch.device) -> None:
        self.host_shape, self.num_host_tokens = host_shape, host_shape[0] * host_shape[1]
        self.positions = torch.full((num_rows, 1), -1, dtype=torch.int32, device=device)

    def rows(self, x: Tensor) -> Tensor:
        return x.new_zeros(*self.positions.shape, *x.shape[1 if x.dim() == 1 else 2 :])

    def host(self, x: Tensor) -> Tensor:
        return x.new_zeros(*self.host_shape, *x.shape[2:])


Tokens = Columns | Packed | Nothing
