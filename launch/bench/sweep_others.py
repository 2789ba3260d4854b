"""The ops besides decode, for `pikv bench ops --sweep`: what they cost beside it, in a decode step and in a prefill."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from pikv_ds import ops

from .sweep_cases import DIM, HEADS, Call, Made, pages_of

_CALLS = 64  # of assign_slots on the same tables, more than are timed


def cases(quick: bool) -> Iterator[Made]:
    for name, tokens in itertools.product(
        ("bf16", "int8") if quick else ("bf16", "int8", "int4", "fp8_e4m3"), (2,) if quick else (64, 8192)
    ):
        yield {"op": "append", "format": name, "batch": tokens, "page_size": 64}, _append(name, tokens)
    for tokens in (2,) if quick else (64, 8192):
        yield {"op": "page_bounds", "format": "bf16", "batch": tokens, "page_size": 64}, _bounds(tokens)
        yield {"op": "assign_slots", "batch": tokens, "page_size": 64}, _slots(tokens)
    for batch, context in ((2, 256),) if quick else ((8, 32768), (1, 131072)):
        yield {"op": "page_score", "group": 4, "batch": batch, "context_tokens": context, "page_size": 64}, _score(batch, context)
    for sets, rows in ((2, 8),) if quick else ((8, 32 * 64), (50, 32), (16, 32 * 8192)):
        yield {"op": "merge", "batch": rows, "options": f"{sets} sets"}, _merge(sets, rows)
    for rows in (2,) if quick else (64, 8192):
        yield {"op": "pack", "batch": rows}, _pack(rows)
    for pages in (2,) if quick else (64, 4096):
        yield {"op": "migrate", "batch": pages, "page_size": 64}, _migrate(pages)
    for queries in (2,) if quick else (4, 16):
        yield {"op": "prefill_cached", "batch": 1, "context_tokens": 256 if quick else 32768, "group": 4, "page_size": 64,
               "options": f"{queries} queries"}, _prefill(queries, 256 if quick else 32768)  # fmt: skip


def _format(name: str) -> ops.PageFormat:
    return ops.PageFormat(name, HEADS, DIM, DIM, 64)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _append(name: str, tokens: int) -> Callable[[str], tuple[Call, int]]:
    def make(device: str) -> tuple[Call, int]:
        fmt = _format(name)
        pages, at = ops.new_pages(fmt, tokens // 64 + 1, device=device), torch.arange(tokens, dtype=torch.int32, device=device)
        k, v = (_random(tokens, HEADS, DIM).bfloat16().to(device) for _ in "kv")
        given: dict[str, Any] = {}
        if fmt.grouped:
            given = {"tail": torch.zeros(1, HEADS, fmt.group, DIM, dtype=torch.bfloat16, device=device), "tail_rows": torch.zeros_like(at)}
        return lambda: ops.append(pages, fmt, k, v, at, at, **given), 2 * k.nbytes + round(tokens * fmt.bytes_per_token)

    return make


def _bounds(tokens: int) -> Callable[[str], tuple[Call, int]]:
    def make(device: str) -> tuple[Call, int]:
        fmt, at = _format("bf16"), torch.arange(tokens, dtype=torch.int32, device=device)
        pages = ops.new_pages(fmt, tokens // 64 + 1, device=device)
        pages.zero_()
        bounds = torch.zeros(pages.shape[0], *ops.bounds_shape(fmt, torch.bfloat16), dtype=torch.bfloat16, device=device)
        return lambda: ops.page_bounds(bounds, pages, fmt, at), pages.nbytes // 2 + bounds.nbytes

    return make


def _slots(tokens: int) -> Callable[[str], tuple[Call, int]]:
    """One row takes all tokens of a prefill; in a decode step every row takes one."""

    def make(device: str) -> tuple[Call, int]:
        rows = 1 if tokens > 64 else tokens
        each = tokens // rows * _CALLS // 64 + 2  # pages of a row, over all calls
        there = lambda *shape: torch.zeros(shape, dtype=torch.int32, device=device)  # noqa: E731
        counts, table, refcount = there(rows, 1), there(rows, 1, each + 1), there(rows * each + 1)
        stack, top = torch.arange(rows * each + 1, dtype=torch.int32, device=device), torch.tensor(rows * each, device=device)
        of = torch.arange(tokens, device=device) * rows // tokens
        return lambda: ops.assign_slots(counts, table, stack, top, refcount, of, None, None, page_size=64), 16 * tokens

    return make


def _score(batch: int, context: int) -> Callable[[str], tuple[Call, int]]:
    def make(device: str) -> tuple[Call, int]:
        fmt, columns = _format("bf16"), context // 64
        bounds = _random(batch * columns, *ops.bounds_shape(fmt, torch.bfloat16)).bfloat16().to(device)
        table = torch.arange(batch * columns, dtype=torch.int32, device=device).view(batch, 1, columns)
        lens = torch.full((batch, 1), context, dtype=torch.int32, device=device)
        q = _random(batch, 4 * HEADS, DIM).bfloat16().to(device)
        return lambda: ops.page_score(q, bounds, fmt, table, lens, scale=DIM**-0.5), bounds.nbytes

    return make


def _merge(sets: int, rows: int) -> Callable[[str], tuple[Call, int]]:
    def make(device: str) -> tuple[Call, int]:
        out, lse = torch.randn(sets, rows, DIM, device=device), torch.randn(sets, rows, device=device)
        return lambda: ops.merge(out, lse), out.nbytes + lse.nbytes + 4 * rows * (DIM + 1)

    return make


def _pack(rows: int) -> Callable[[str], tuple[Call, int]]:
    def make(device: str) -> tuple[Call, int]:
        fields = [_random(rows, n * HEADS * DIM).bfloat16().to(device) for n in (4, 1, 1)]
        fields.append(torch.arange(rows, dtype=torch.int32, device=device).view(rows, 1))
        offsets, record = ops.record_layout(fields)
        buffer = torch.zeros(rows, record, dtype=torch.uint8, device=device)
        return lambda: ops.pack(buffer, fields, offsets=offsets, strides=[record] * 4, rows=[rows] * 4), 2 * buffer.nbytes

    return make


def _migrate(count: int) -> Callable[[str], tuple[Call, int]]:
    def make(device: str) -> tuple[Call, int]:
        source = ops.new_pages(_format("bf16"), count, device=device)
        target, ids = torch.empty_like(source), torch.arange(count, dtype=torch.int32, device=device)
        return lambda: ops.migrate(target, source, ids, ids.flip(0)), 2 * source.nbytes

    return make


def _prefill(queries: int, context: int) -> Callable[[str], tuple[Call, int]]:
    def make(device: str) -> tuple[Call, int]:
        p = pages_of("bf16", (context,), 64, False, device)
        q = _random(1, queries, 4 * HEADS, DIM).bfloat16().to(device)
        asked = torch.arange(context - queries, context, dtype=torch.int32, device=device).view(1, -1)
        return lambda: ops.prefill_cached(q, p.records, p.fmt, p.table, p.lens, asked, scale=DIM**-0.5), p.records.nbytes

    return make
