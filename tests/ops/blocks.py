"""Lists of blocks inside of pages, for the matrix: what is not listed is poisoned."""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds.ops.format.formats import PageFormat, fp4_blocks
from tests.ops.cases import Case


def list_half_of_the_blocks(case: Case, block_size: int) -> Tensor:
    """[N, H, K] int32: half of the used blocks of each table and head, in any order, among -1; the others become NaN, or other codes."""
    generator = torch.Generator().manual_seed(7)
    fmt, (N, _, columns) = case.fmt, case.block_table.shape
    blocks, heads = fmt.page_size // block_size, fmt.num_kv_heads
    listed = torch.full((N, heads, columns * blocks), -1, dtype=torch.int32)
    for n in range(N):
        used = -(-int(case.seqlens[n, 0]) // block_size)
        for h in range(heads):
            order = torch.randperm(used, generator=generator)
            kept = order[: -(-used // 2)]
            listed[n, h, torch.randperm(columns * blocks, generator=generator)[: len(kept)]] = kept.int()
            for number in order[len(kept) :].tolist():
                record = case.pages[int(case.block_table[n, 0, number // blocks])]
                poison(record, fmt, h, number % blocks * block_size, block_size)
    return listed


def poison(record: Tensor, fmt: PageFormat, head: int, first: int, count: int) -> None:
    """Whatever tokens [first, first + count) of a head have for themselves, in one record, becomes 0xFF."""
    at, rows = fmt.head, {fmt.head.k: fmt.k_row_bytes, fmt.head.v: fmt.v_row_bytes, fmt.head.rope: 2 * (fmt.k_dim - fmt.v_dim)}
    fp4_keys, fp4_values = fmt.name == "fp4_e2m1", fmt.v_name == "fp4_e2m1"
    if not fmt.grouped:
        rows |= {at.k_scale: fp4_blocks(fmt.k_coded) if fp4_keys else 2, at.k_zero: 1}
    rows |= {at.v_scale: fp4_blocks(fmt.v_dim) if fp4_values else 2, at.v_zero: 1 if fp4_values else 2}
    for offset, width in rows.items():
        if offset >= 0:
            begin = head * at.end + offset
            record[begin + first * width : begin + (first + count) * width] = 0xFF
