"""Page bounds and scores, torch reference. T tokens, H kv heads, G tokens of a K scale group, D a key's width."""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds.ops.format.bound_codes import decode_box, encode_box, not_above
from pikv_ds.ops.format.formats import PageFormat

from .formats import decode_pages

_MAX = torch.finfo(torch.float32).max


def page_bounds(
    bounds: Tensor,
    pages: Tensor,
    fmt: PageFormat,
    slot_mapping: Tensor,
    *,
    tail: Tensor | None = None,
    tail_rows: Tensor | None = None,
    block_size: int = 0,
) -> None:
    """The arguments are those of ops/page_bounds.py. Sync: yes."""
    here = slot_mapping >= 0
    slot = slot_mapping[here].long()
    page, offset = slot // fmt.page_size, slot % fmt.page_size
    block_size = block_size or fmt.page_size
    if bounds.dtype == torch.int8 or block_size < fmt.page_size:
        _box_anew(bounds, pages, fmt, slot, tail, None if tail_rows is None else tail_rows[here].long(), block_size)
        return
    anew = page[offset == 0]
    bounds[anew, :, 0], bounds[anew, :, 1] = torch.inf, -torch.inf
    touched, index = torch.unique(page, return_inverse=True)
    if not touched.numel():
        return
    k = decode_pages(pages[touched], fmt)[0].transpose(1, 2)  # [pages, P, H, D]
    if not fmt.grouped:
        _widen(bounds, page, k[index, offset])
        return
    rows = tail_rows[here].long()
    last = offset % fmt.group == fmt.group - 1
    for step in range(fmt.group):
        _widen(bounds, page[last], k[index[last], offset[last] - step])
    newest = _newest(slot, rows, tail.shape[0])
    is_open = (slot // fmt.group == newest[rows] // fmt.group) & (newest[rows] % fmt.group != fmt.group - 1)
    _widen(bounds, page[is_open], tail.transpose(1, 2)[rows[is_open], slot[is_open] % fmt.group].float())


def page_score(
    q: Tensor, bounds: Tensor, block_table: Tensor, seqlens: Tensor, *, page_size: int, scale: float, width: Tensor | None = None
) -> Tensor:
    """The arguments are those of ops/page_score.py. Sync: none."""
    N, _, columns = block_table.shape
    heads = max(block_table.shape[1], bounds.shape[1])
    used = torch.arange(columns, device=q.device) < (seqlens.unsqueeze(-1) + page_size - 1) // page_size
    ids, used = (x.expand(N, heads, columns) for x in (block_table, used))
    head = torch.arange(heads, device=q.device).view(1, -1, 1) % bounds.shape[1]
    if not bounds.shape[0]:
        return q.new_full((N, heads, columns), -torch.inf, dtype=torch.float32)
    # An fp16 bound may be infinite, and 0 * inf would be NaN.
    edges = decode_box(bounds[torch.where(used, ids, 0).long(), head]).clamp(-_MAX, _MAX)
    q = (q.float() * scale).view(q.shape[0], heads, -1, q.shape[-1])
    w = q.abs() if width is None else (width.float() * scale).view_as(q)
    split = torch.stack(((q - w) / 2, (q + w) / 2), -2).repeat_interleave(N // q.shape[0], 0)
    scores = torch.einsum("nhged,nhced->nhgc", split, edges).amax(2).clamp_min(-_MAX)
    return scores.masked_fill(~used, -torch.inf)


def _widen(bounds: Tensor, page: Tensor, k: Tensor) -> None:
    """Keys k [n, H, D] f32 into the bounds of their pages [n]; the others keep their bits."""
    touched, index = torch.unique(page, return_inverse=True)
    index = index.view(-1, 1, 1).expand_as(k)
    low, high = bounds[touched].float().unbind(2)
    bounds[touched, :, 0] = not_above(low.scatter_reduce(0, index, k, "amin"), bounds.dtype)
    bounds[touched, :, 1] = -not_above(-high.scatter_reduce(0, index, k, "amax"), bounds.dtype)


def _newest(slot: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """[num_rows] the slot of the last token of each tail row, -1 = it has none."""
    newest = slot.new_full((num_rows,), -1)
    for row, s in zip(rows.tolist(), slot.tolist(), strict=True):  # in order: the last token of a row is its newest
        newest[row] = s
    return newest


def _box_anew(
    bounds: Tensor,
    pages: Tensor,
    fmt: PageFormat,
    slot: Tensor,
    tail: Tensor | None,
    rows: Tensor | None,
    block_size: int,
) -> None:
    """int8 or blocks: boxes of all keys from the first slot of a page, a group of blocks or a block to the last one in `slot`.

    Widening a coded box would add up its rounding. A group of keys that becomes full changes the boxes of all blocks in it.
    """
    touched, index = torch.unique(slot // fmt.page_size, return_inverse=True)
    if not touched.numel():
        return
    k = decode_pages(pages[touched], fmt)[0].transpose(1, 2).contiguous()  # [pages, P, H, D]
    if fmt.grouped:
        newest = _newest(slot, rows, tail.shape[0])[rows]
        for i in ((slot == newest) & (newest % fmt.group != fmt.group - 1)).nonzero().flatten().tolist():
            begin = int(slot[i]) % fmt.page_size // fmt.group * fmt.group
            k[index[i], begin : begin + fmt.group] = tail[rows[i]].transpose(0, 1).float()
    span = fmt.page_size if block_size == fmt.page_size else fmt.group if fmt.grouped else block_size
    number, blocks = torch.arange(fmt.page_size, device=slot.device), fmt.page_size // block_size
    # [pages, spans] the slots of each span that count, 0 = it is left alone
    counts = slot.new_zeros(touched.numel(), fmt.page_size // span)
    counts.view(-1).scatter_reduce_(0, index * counts.shape[1] + slot % fmt.page_size // span, slot % span + 1, "amax")
    absent = (number % span >= counts[:, number // span]).unsqueeze(-1).unsqueeze(-1) | k.isnan()
    low, high = (
        k.masked_fill(absent, fill).unflatten(1, (blocks, -1)).movedim(2, 0) for fill in (torch.inf, -torch.inf)
    )  # [block_size, pages, blocks, H, D]
    low, high = low.amin(0), high.amax(0)
    made = counts[:, number[::block_size] // span] > number[::block_size] % span  # [pages, blocks]
    target = (touched.unsqueeze(1) * blocks + torch.arange(blocks, device=slot.device))[made]
    if bounds.dtype == torch.int8:
        bounds[target] = encode_box(torch.stack((low, high), 3)[made])
    else:
        bounds[target, :, 0], bounds[target, :, 1] = not_above(low[made], bounds.dtype), -not_above(-high[made], bounds.dtype)
