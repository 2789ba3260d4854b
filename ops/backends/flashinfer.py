"""Decode over raw pages by FlashInfer's kernels, where that package is installed: a yardstick, and for widths without a kernel here.

It reads our pages where they lie: keys and values are strided views of the records. Not run on a device yet.

| what | FlashInfer |
|---|---|
| bf16 and fp16 pages, queries of the same type, K and V of one width (64, 128, 256) | yes |
| latents of 512 + 64, bf16 and fp16 | yes |
| page lists, tables per head, several shards | yes, as more rows; merged by their lse |
| coded pages (int8, int4, int2, fp8, fp4, pairs) | no: it has no such grids |
| windows | no: it counts columns, and a shard or a table that has lost pages holds other positions |
| the lse of each page | no: nothing of it is returned |
| a step that is captured, or that may not stop the host | no: its plan reads lengths back |
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pikv_ds.ops.format.formats import PageFormat
from pikv_ds.ops.reference.formats import views
from pikv_ds.ops.reference.merge_partials import merge_partials

from .csr import PageRows, page_rows

DIMS = (64, 128, 256)
LATENT = (576, 512)  # k_dim and v_dim
WORKSPACE = 128 << 20
_ELEMENTS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def installed() -> bool:
    return importlib.util.find_spec("flashinfer") is not None


def refusal(fmt: PageFormat, dtype: torch.dtype, *, window: int | None = None, with_page_lse: bool = False) -> str | None:
    """Why FlashInfer can't serve a decode of queries of `dtype`; None: it can, where it is installed."""
    if fmt.mixed or fmt.rope_raw or fmt.name not in _ELEMENTS:
        return f"it has no kernel for {fmt.label} pages"
    if dtype != _ELEMENTS[fmt.name]:
        return f"queries of {dtype} over {fmt.label} pages: it wants one type"
    if fmt.latent and (fmt.k_dim, fmt.v_dim) != LATENT:
        return f"latents of {fmt.k_dim} with values of {fmt.v_dim}: its own are 576 and 512"
    if not fmt.latent and (fmt.k_dim != fmt.v_dim or fmt.k_dim not in DIMS):
        return f"keys of {fmt.k_dim} and values of {fmt.v_dim}: it has equal widths of {', '.join(map(str, DIMS))}"
    if window:
        return "a window by stored positions: it counts columns"
    if with_page_lse:
        return "the lse of each page is asked for: it returns none"
    return None


def decode(
    q: Tensor, pages: Tensor, fmt: PageFormat, block_table: Tensor, seqlens: Tensor, *, scale: float, page_list: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As ops.decode without a window: out [R, Hq, Dv] f32, lse [R, Hq] f32, natural log.

    Sync: plan() reads lengths. Raises: ValueError for what `refusal` names; ImportError without the package.
    """
    return prepared(q, pages, fmt, block_table, seqlens, scale=scale, page_list=page_list).attend()


class Prepared(NamedTuple):
    """A decode that is planned."""

    run: Callable[[], tuple[Tensor, Tensor]]
    """The kernels of FlashInfer alone, for benchmarks: out and base-2 lse of every table."""
    attend: Callable[[], tuple[Tensor, Tensor]]
    """What `decode` returns."""


def prepared(
    q: Tensor, pages: Tensor, fmt: PageFormat, block_table: Tensor, seqlens: Tensor, *, scale: float, page_list: Tensor | None = None
) -> Prepared:
    """The same, planned. Sync and errors: as decode."""
    why = refusal(fmt, q.dtype)
    if why is not None:
        raise ValueError(f"flashinfer: {why}")
    rows = page_rows(block_table, seqlens, fmt.page_size, page_list)
    tables_per_request, heads = block_table.shape[0] // q.shape[0], block_table.shape[1]
    asked = as_rows(q, tables_per_request, heads)
    run = (_latent if fmt.latent else _heads)(asked, pages, fmt, rows, scale)

    def attend() -> tuple[Tensor, Tensor]:
        out, lse = run()
        return merged(out.float(), lse.float() * math.log(2), q.shape, tables_per_request, heads, rows)  # its lse is base 2

    return Prepared(run, attend)


def as_rows(q: Tensor, tables: int, heads: int) -> Tensor:
    """[R, Hq, D] -> [R * S * X, Hq / X, D]: the queries of every table, and of every head with tables of its own."""
    per_head = q.unflatten(1, (heads, -1))
    return per_head.unsqueeze(1).expand(-1, tables, -1, -1, -1).flatten(0, 2).contiguous()


def merged(out: Tensor, lse: Tensor, shape: torch.Size, tables: int, heads: int, rows: PageRows) -> tuple[Tensor, Tensor]:
    """[R * S * X, Hq / X, Dv] and lse -> [R, Hq, Dv] and [R, Hq]: a request's tables together, rows without pages as nothing."""
    empty = (rows.indptr.diff() == 0).view(-1, 1)
    out, lse = torch.where(empty.unsqueeze(-1), 0, out), torch.where(empty, -torch.inf, lse)
    out, lse = (x.unflatten(0, (shape[0], tables, heads)).flatten(2, 3).transpose(0, 1) for x in (out, lse))
    return (out[0], lse[0]) if tables == 1 else merge_partials(out, lse)


def _heads(q: Tensor, pages: Tensor, fmt: PageFormat, rows: PageRows, scale: float) -> Callable[[], tuple[Tensor, Tensor]]:
    import flashinfer

    k, v, _ = views(pages, fmt)
    groups = q.shape[1] // fmt.num_kv_heads
    workspace = torch.zeros(WORKSPACE, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=groups >= 4)
    indptr, indices, last = _planned(rows)
    wrapper.plan(
        indptr, indices, last, q.shape[1], fmt.num_kv_heads, fmt.k_dim, fmt.page_size, q_data_type=q.dtype, kv_data_type=k.dtype,
        sm_scale=scale,
    )  # fmt: skip
    return lambda: wrapper.run(q, (k, v), return_lse=True)


def _latent(q: Tensor, pages: Tensor, fmt: PageFormat, rows: PageRows, scale: float) -> Callable[[], tuple[Tensor, Tensor]]:
    from flashinfer.mla import BatchMLAPagedAttentionWrapper

    latents = views(pages, fmt)[0].squeeze(1)  # [P, page_size, 576]
    workspace = torch.zeros(WORKSPACE, dtype=torch.uint8, device=q.device)
    wrapper = BatchMLAPagedAttentionWrapper(workspace)
    indptr, indices, last = _planned(rows)
    lens = ((indptr.diff() - 1).clamp_min(0) * fmt.page_size + last).to(torch.int32)
    of_queries = torch.arange(q.shape[0] + 1, dtype=torch.int32)
    wrapper.plan(
        of_queries, indptr, indices, lens, q.shape[1], fmt.v_dim, fmt.k_dim - fmt.v_dim, fmt.page_size, False, scale, q.dtype, q.dtype
    )
    q_nope, q_rope = q[..., : fmt.v_dim].contiguous(), q[..., fmt.v_dim :].contiguous()
    return lambda: wrapper.run(q_nope, q_rope, latents[..., : fmt.v_dim], latents[..., fmt.v_dim :], return_lse=True)


def _planned(rows: PageRows) -> tuple[Tensor, Tensor, Tensor]:
    """On the host, where plans are made; but indices, which kernels read. A row without pages is planned as one of a single entry of page
    0, whose result nobody uses. Sync: reads the device."""
    counts, last = rows.indptr.diff().cpu(), rows.last_page_len.cpu()
    if bool((counts > 0).all()):
        return rows.indptr.cpu(), rows.indices[: int(counts.sum())], last
    parts = rows.indices[: int(counts.sum())].split(counts.tolist())
    indices = torch.cat([part if part.numel() else rows.indices.new_zeros(1) for part in parts])
    indptr = torch.nn.functional.pad(counts.clamp_min(1).cumsum(0), (1, 0)).to(torch.int32)
    return indptr, indices, last.clamp_min(1)
