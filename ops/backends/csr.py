"""Block tables as lists of page ids, one behind the other (CSR), as FlashInfer takes them. Pure tensor functions, no sync.

N tables, X heads with pages of their own (1: none), C columns, M = N * X rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PageRows(NamedTuple):
    """Row m reads pages indices[indptr[m]] ... indices[indptr[m + 1] - 1]; all of them are full but the last."""

    indptr: Tensor
    """[M + 1] int32."""
    indices: Tensor
    """[M * C] int32, of which the first indptr[M] count; the others are 0."""
    last_page_len: Tensor
    """[M] int32, entries of a row's last page: 1 to page_size, 0 in a row without pages."""


def page_rows(block_table: Tensor, seqlens: Tensor, page_size: int, page_list: Tensor | None = None) -> PageRows:
    """Args: block_table [N, X, C] int32; seqlens [N, X] int32; page_list [N, X, K] int32 columns to read, -1 = none, in any order; None =
    all. Columns without an entry are left out."""
    columns = torch.arange(block_table.shape[-1], device=block_table.device).expand_as(block_table)
    if page_list is not None:
        columns = page_list.to(torch.int64)
        block_table = block_table.gather(-1, columns.clamp_min(0))
    entries = (seqlens.unsqueeze(-1) - columns * page_size).clamp(0, page_size).masked_fill(columns < 0, 0)  # of each column
    # Full pages first, then the one that is not, then what is not read; the order of full pages is that of the table.
    entries, order = entries.flatten(0, 1).sort(dim=-1, descending=True, stable=True)
    pages, read = block_table.flatten(0, 1).gather(-1, order), entries > 0
    counts = read.sum(-1)
    indptr = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    width = pages.shape[-1]
    place = torch.where(read, indptr[:-1].unsqueeze(-1) + torch.arange(width, device=pages.device), pages.numel())
    indices = pages.new_zeros(pages.numel() + 1).scatter_(0, place.flatten(), pages.flatten())[:-1]
    last = entries.gather(-1, (counts - 1).clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return PageRows(indptr.to(torch.int32), indices.to(torch.int32), last.to(torch.int32))
