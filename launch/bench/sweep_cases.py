"""The calls of `pikv bench ops --sweep`, in the order of what is wanted first. Each gives its facts, and what makes it on a device."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pikv_ds import ops
from pikv_ds.ops.reference import formats as ref_formats

Call = Callable[[], Any]
Made = tuple[dict[str, Any], Callable[[str], tuple[Call, int]]]

HEADS, DIM = 8, 128
LATENT, ROTARY = 512, 64
FORMATS = ("bf16", "int8", "int4", "fp8_e4m3", "fp4_e2m1", "int2", "int8/int4")
SHAPES = ((8, 32768), (64, 8192), (1, 32768), (64, 32768))
GROUPS = (4, 8, 1, 16)
PAGES = (64, 16, 32)
SPLITS = (1, 2, 4, 8, 16, 32, 64)
DISTINCT = 64  # pages that are encoded; the others are copies
BLANK = dict.fromkeys(
    ("op", "format", "group", "batch", "context_tokens", "page_size", "latent", "options", "ms", "graph_ms", "bytes", "gbps", "error")
)


class Pages(NamedTuple):
    fmt: ops.PageFormat
    records: Tensor
    table: Tensor  # [B, 1, C], in random order
    lens: Tensor  # [B, 1]
    tail: dict[str, Tensor]


@lru_cache(maxsize=1)  # rows of other groups follow on the same pages
def pages_of(name: str, lens: tuple[int, ...], page_size: int, latent: bool, device: str) -> Pages:
    keys, _, values = name.removesuffix("+rope").partition("/")
    k_dim, v_dim, heads = (LATENT + ROTARY, LATENT, 1) if latent else (DIM, DIM, HEADS)
    fmt = ops.PageFormat(keys, heads, k_dim, v_dim, page_size, latent=latent, v_name=values or None, rope_raw=name.endswith("+rope"))
    draw, columns = torch.Generator().manual_seed(1), -(-max(lens) // page_size)
    few = ops.new_pages(fmt, DISTINCT).to(device)
    k, v = (torch.randn(DISTINCT, heads, page_size, d, generator=draw).to(device) for d in (k_dim, v_dim))
    ref_formats.encode_pages(few, fmt, torch.arange(DISTINCT, device=device), k, k[..., :v_dim] if latent else v)
    used = [-(-n // page_size) for n in lens]
    records = ops.new_pages(fmt, sum(used), device=device)
    torch.index_select(few, 0, torch.arange(sum(used), device=device) % DISTINCT, out=records)
    table, ids = torch.zeros(len(lens), 1, columns, dtype=torch.int32), torch.randperm(sum(used), generator=draw).int()
    for row, part in enumerate(ids.split(used)):
        table[row, 0, : len(part)] = part
    tail = {}
    if fmt.grouped:
        raw = torch.zeros(len(lens), heads, fmt.group, k_dim, dtype=torch.bfloat16, device=device)
        tail = {"tail": raw, "tail_rows": torch.arange(len(lens), dtype=torch.int32, device=device)}
    return Pages(fmt, records, table.to(device), torch.tensor(lens, dtype=torch.int32).view(-1, 1).to(device), tail)


def _facts(
    op: str, name: str, group: int, lens: tuple[int, ...], page_size: int, latent: bool = False, options: str = ""
) -> dict[str, Any]:
    context = lens[0] if len(set(lens)) == 1 else max(lens)
    return {"op": op, "format": name, "group": group, "batch": len(lens), "context_tokens": context, "page_size": page_size,
            "latent": latent, "options": options}  # fmt: skip


def decode(name: str, group: int, lens: tuple[int, ...], page_size: int, latent: bool = False, what: str = "", **given: Any) -> Made:
    """given: options of ops.decode; a tensor is made from the pages by a function of them."""

    def make(device: str) -> tuple[Call, int]:
        p = pages_of(name, lens, page_size, latent, device)
        q = (
            torch.randn(len(lens), p.fmt.num_kv_heads * group, p.fmt.k_dim, generator=torch.Generator().manual_seed(2))
            .bfloat16()
            .to(device)
        )
        options = {key: value(p) if callable(value) else value for key, value in given.items()} | p.tail
        read = p.records.nbytes if "page_list" not in options else options["page_list"].numel() * p.fmt.record_bytes
        seen = min(1.0, options.get("window", max(lens)) / max(lens))
        return lambda: ops.decode(q, p.records, p.fmt, p.table, p.lens, scale=p.fmt.k_dim**-0.5, **options), round(read * seen)

    return _facts("decode", name, group, lens, page_size, latent, what), make


def rates(quick: bool) -> Iterator[Made]:
    """The copy rate, and the rate at which our own `checksum` reads."""
    size = 16 << 20 if quick else 1 << 30

    def copy(device: str) -> tuple[Call, int]:
        source = torch.ones(size, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source), 2 * size

    def read(device: str) -> tuple[Call, int]:
        data = torch.ones(size, dtype=torch.uint8, device=device)
        return lambda: ops.checksum(data), size

    yield {"op": "copy"}, copy
    yield {"op": "checksum"}, read


def decodes(quick: bool) -> Iterator[Made]:
    """Formats of 64-token pages at the first group first, then the other groups on the same pages; then other page sizes."""
    shapes = ((2, 256),) if quick else SHAPES
    for (batch, context), page_size, name in itertools.product(shapes, PAGES[:1] if quick else PAGES, FORMATS[:3] if quick else FORMATS):
        keys = name.partition("/")[0]
        if page_size % 64 and keys.startswith("int"):
            continue  # groups of tokens share a scale
        for group in GROUPS[:1] if quick else GROUPS:
            yield decode(name, group, (context,) * batch, page_size)


def latents(quick: bool) -> Iterator[Made]:
    names, heads = (("bf16",), (16,)) if quick else (("bf16", "int8+rope", "int4+rope", "fp8_e4m3+rope", "int8", "fp4_e2m1"), (16, 128))
    for (batch, context), name, count in itertools.product(((1, 128),) if quick else ((8, 32768), (1, 32768), (64, 8192)), names, heads):
        yield decode(name, count, (context,) * batch, 64, latent=True)


def decode_options(quick: bool) -> Iterator[Made]:
    """Ragged batches, numbers of splits, windows, page lists, the lse of pages."""
    context, batch = (256, 2) if quick else (32768, 8)
    lens, every = (context,) * batch, 16 if not quick else 2
    asked = lambda p: (p.lens.flatten() - 1).int()  # noqa: E731
    some = lambda p: torch.arange(0, p.table.shape[2], every, dtype=torch.int32, device=p.table.device).repeat(batch, 1, 1)  # noqa: E731
    for name in ("bf16",) if quick else ("bf16", "int8", "fp8_e4m3"):
        yield decode(name, 4, (4 * context, *(context // 32,) * (8 * batch - 1)), 64, what="ragged: one request of 4 x, the others 1/32")
        yield decode(name, 4, lens, 64, what=f"page list, 1 of {every}", page_list=some)
        yield decode(name, 4, lens, 64, what="window of a quarter", window=context // 4, q_positions=asked)
        yield decode(name, 4, lens, 64, what="with page_lse", with_page_lse=True)
        for splits, count in itertools.product(SPLITS[:2] if quick else SPLITS, (1,) if quick else (1, batch)):
            yield decode(name, 4, (context,) * count, 64, what=f"num_splits {splits}", num_splits=splits)
