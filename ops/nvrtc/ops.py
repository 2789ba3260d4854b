"""The ops on kernels compiled by NVRTC: what csrc/cuda/*.cu does, in Python, for CUDA tensors. Launches go through CuPy.

Not run on a GPU yet: tests/ops/test_kernel_text.py sends the launches to the host emulation. Shapes and dtypes are checked as everywhere;
page ids, slots and lengths, which are on the device, with PIKV_DEBUG=1.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from pikv_ds.ops import checks
from pikv_ds.ops.format.formats import PageFormat
from pikv_ds.ops.format.kernels import KERNEL_FORMATS, LATENT_ROWS, decode_tier, kernel_width, latent_kernel, tensor_rows

from . import params as kp
from . import route
from .compiler import tensor_part
from .launch import BLOCK, WARPS, has_bulk_copies, launch, num_processors
from .params import BOUND_TYPES, FLOAT_TYPES, address, index, padding, page_record
from .work import count_blocks, share_work

ROW_INTS = BLOCK + 1 + WARPS  # Row::shared of csrc/kernels/work.cuh


def shared_floats(width: int, rows: int, plain: bool) -> int:
    """Tile::shared of csrc/kernels/tile.cuh."""
    return (0 if plain else 2 * rows * BLOCK) + WARPS * rows * (min(width, 512) + 2) + 2 * rows + ROW_INTS + 4


def tensor_shared_floats(fmt: PageFormat, rows: int) -> int:
    """TensorTile::shared of csrc/kernels/tensor_tile.cuh."""
    return WARPS * rows * (fmt.k_dim + 2) + (rows * fmt.k_dim if fmt.traits.bits < 16 else 0) + 2 * rows + ROW_INTS + 4


def latent_shared_words(fmt: PageFormat, q_type: int, bulk: bool) -> int:
    """LatentTile::shared_for of csrc/kernels/latent_tile.cuh."""
    tokens, coded = 32, fmt.traits.bits < 16
    width = 576 + 64 * (fmt.rope_raw and not fmt.grouped)
    tiles, queries = tokens * (width + 8) // 2, width // 16 * 128
    tiles = 2 * tiles + 4 if bulk and not coded else 2 * tiles if fmt.grouped else tiles
    words = tiles + queries + LATENT_ROWS * (tokens + 4) + tokens + 2 * LATENT_ROWS + ROW_INTS + 4
    return -(-words // 4) * 4 + (queries if coded and q_type != FLOAT_TYPES[torch.bfloat16] else 0)


def _tier(fmt: PageFormat, q: Tensor, block_size: int = 0) -> str:
    """decode_tier; tensor cores are not for a view of queries that does not start on a word, nor for blocks that begin at odd tokens."""
    tier = decode_tier(fmt, q.dtype)
    fits = q.data_ptr() % 4 == 0 and block_size % 2 == 0
    return tier if tier != "tensor cores" or fits else "fp32" if kernel_width(fmt) else "torch"


def _values_are_checked() -> bool:
    asked = os.environ.get("PIKV_DEBUG") == "1"
    capturing = asked and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    checks.require(not capturing, "PIKV_DEBUG=1 reads page ids, slots and lengths back, which a stream that is being captured into a graph "
                                  "does not allow; unset it to capture")  # fmt: skip
    return asked


def decode(q, pages, block_table, seqlens, q_positions, page_list, tail, tail_rows, *rest):
    fmt, (scale, window, with_page_lse, num_splits, *given) = PageFormat.from_layout(rest[:7]), rest[7:]
    block = checks.block(fmt, *given)
    if _tier(fmt, q, *given) == "torch":
        return torch.ops.pikv.decode_reference(q, pages, block_table, seqlens, q_positions, page_list, tail, tail_rows, *rest)
    checks.attend(
        q, pages, block_table, seqlens, q_positions, page_list, tail, tail_rows, fmt, window, values=_values_are_checked(), block_size=block
    )
    columns = block_table.shape[2] * (fmt.page_size // block) if page_list is None else page_list.shape[2]
    page_lse = q.new_empty((block_table.shape[0], q.shape[1], columns) if with_page_lse else (0,), dtype=torch.float32)
    out, lse = _attend(q.unsqueeze(1), pages, block_table, seqlens, q_positions, page_list, tail, tail_rows, fmt, scale, window, False,
                       page_lse if with_page_lse else None, num_splits, block)  # fmt: skip
    return out.squeeze(1), lse.squeeze(1), page_lse


def prefill_cached(q, pages, block_table, seqlens, q_positions, tail, tail_rows, *rest):
    fmt, (scale, window, causal, num_splits) = PageFormat.from_layout(rest[:7]), rest[7:]
    if _tier(fmt, q) == "torch":
        return torch.ops.pikv.prefill_cached_reference(q, pages, block_table, seqlens, q_positions, tail, tail_rows, *rest)
    checks.prefill_cached(q, pages, block_table, seqlens, q_positions, tail, tail_rows, fmt, values=_values_are_checked())
    return _attend(
        q, pages, block_table, seqlens, q_positions, None, tail, tail_rows, fmt, scale, window, causal, None, num_splits, fmt.page_size
    )


def _attend(
    q, pages, block_table, seqlens, q_positions, page_list, tail, tail_rows, fmt, scale, window, causal, page_lse, num_splits, block
):
    """q is [R, T, Hq, Dk]. block: tokens that are listed as one."""
    R, T, Hq, _ = q.shape
    width, H = kernel_width(fmt), max(block_table.shape[1], fmt.num_kv_heads)
    out, lse = q.new_empty((R, T, Hq, fmt.v_dim), dtype=torch.float32), q.new_empty((R, T, Hq), dtype=torch.float32)
    if not lse.numel():
        return out, lse
    checks.aligned("pages", pages)
    a = kp.Attend(f=page_record(fmt), pages=pages.data_ptr(), table=index(block_table), seqlens=index(seqlens), asked=index(q_positions),
               list=index(page_list), tail_rows=index(tail_rows), tail=address(tail), q=q.data_ptr(), page_lse=address(page_lse),
               q_type=FLOAT_TYPES[q.dtype], R=R, T=T, S=block_table.shape[0] // R, H=H, G=Hq // H, max_pages=block_table.shape[2],
               num_columns=block_table.shape[2] * (fmt.page_size // block), block=block, blocks=fmt.page_size // block,
               table_heads=block_table.shape[1], seqlen_heads=seqlens.shape[1], list_heads=1,
               window=window, causal=causal, scale=scale)  # fmt: skip
    if page_list is not None:
        a.num_columns, a.list_heads = page_list.shape[2], page_list.shape[1]
    if tail is not None:
        checks.aligned("tail", tail)
        a.tail_type, a.tail_heads = FLOAT_TYPES[tail.dtype], tail_rows.shape[1] if tail_rows.dim() == 2 else 1
    a.out, a.lse = out.data_ptr(), lse.data_ptr()
    tensor = _tier(fmt, q, block) == "tensor cores"
    plain = (width == 128 or (width == 576 and not fmt.grouped)) and not (window or causal or page_lse is not None)
    rows = (
        LATENT_ROWS
        if tensor and fmt.latent
        else tensor_rows(fmt.traits.bits, fmt.k_dim)[0 if T * a.G <= 8 else -1]
        if tensor
        else 2
        if width == 576
        else 1
        if plain and T * a.G == 1
        else 4
    )
    parts, tails = share_work(a, rows, (2 if tensor else 3) * num_processors(q.device), num_splits), tensor and fmt.grouped
    whole = not a.workers and a.S * a.splits == 1 and not tails
    if tails:
        a.tail_parts, parts = parts, parts + R * a.S * H
    if not whole:
        part_out, part_lse = q.new_empty((parts, T * a.G, fmt.v_dim), dtype=torch.float32), lse.new_empty((parts, T * a.G))
        a.part_out, a.part_lse = part_out.data_ptr(), part_lse.data_ptr()
    blocks, code = count_blocks(a, rows) + tails * R * a.S * H, KERNEL_FORMATS[fmt.label]
    if tensor:
        shared = latent_shared_words(fmt, a.q_type, has_bulk_copies(q.device)) if fmt.latent else tensor_shared_floats(fmt, rows)
        kernel = latent_kernel(fmt.label) if fmt.latent else f"attend_tensor_kernel<{code}, {fmt.k_dim}, {rows}>"
        launch(tensor_part(fmt.label, fmt.k_dim), kernel, (blocks, 1), 4 * shared, a, q.device)
    else:
        kernel = f"attend_kernel<{code}, {width}, {rows}, {str(plain).lower()}>"
        launch(fmt.label, kernel, (blocks, 1), 4 * shared_floats(width, rows, plain), a, q.device)
    if not whole:
        launch("pages", "finish_kernel", (R * H, -(-T * a.G // WARPS)), 4 * ROW_INTS, a, q.device)
    return out, lse


def merge(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    checks.merge(out, lse)
    merged, merged_lse = out.new_empty(out.shape[1:]), lse.new_empty(lse.shape[1:])
    rows = merged_lse.numel()
    if rows:
        m = kp.Merge(out.data_ptr(), lse.data_ptr(), merged.data_ptr(), merged_lse.data_ptr(), rows, lse.shape[0], out.shape[-1])
        launch("pages", "merge_kernel", (-(-rows // WARPS), 1), 0, m, out.device)
    return merged, merged_lse


def append(pages, tail, k, v, positions, slot_mapping, tail_rows, *rest):
    fmt = PageFormat.from_layout(rest[:7])
    checks.append(pages, tail, k, v, positions, slot_mapping, tail_rows, fmt, values=_values_are_checked())
    T, H = slot_mapping.shape[0], fmt.num_kv_heads
    if not T:
        return
    a = kp.Append(f=page_record(fmt), pages=pages.data_ptr(), tail=address(tail), k=k.data_ptr(), v=None if fmt.latent else v.data_ptr(),
               positions=index(positions), slots=index(slot_mapping), tail_rows=index(tail_rows), T=T, type=FLOAT_TYPES[k.dtype],
               tail_type=0 if tail is None else FLOAT_TYPES[tail.dtype])  # fmt: skip
    launch("pages", "append_rows_kernel", (-(-T * H // WARPS), 2), 0, a, pages.device)
    if fmt.grouped:
        launch("pages", "append_groups_kernel", (T, H), 4 * fmt.group, a, pages.device)
        launch("pages", "append_tail_kernel", (T, 1), 0, a, pages.device)


def page_bounds(bounds, pages, slot_mapping, tail, tail_rows, *rest):
    fmt = PageFormat.from_layout(rest[:7])
    block = checks.block(fmt, *rest[7:])
    checks.page_bounds(bounds, pages, slot_mapping, tail, tail_rows, fmt, values=_values_are_checked(), block_size=block)
    T = slot_mapping.shape[0]
    if T:
        b = kp.PageBounds(f=page_record(fmt), pages=pages.data_ptr(), bounds=bounds.data_ptr(), tail=address(tail),
                          slots=index(slot_mapping), tail_rows=index(tail_rows), T=T, type=BOUND_TYPES[bounds.dtype],
                          tail_type=0 if tail is None else FLOAT_TYPES[tail.dtype], block=block)  # fmt: skip
        box = 2 * fmt.k_dim if bounds.dtype == torch.int8 else 0
        launch("pages", "page_bounds_kernel", (T, fmt.num_kv_heads), 4 * (4 + fmt.page_size + box), b, pages.device)


def page_score(q, bounds, block_table, seqlens, width, page_size, scale):
    checks.page_score(q, bounds, block_table, seqlens, width, page_size, values=_values_are_checked())
    N, table_heads, columns = block_table.shape
    H = max(table_heads, bounds.shape[1])
    scores = q.new_empty((N, H, columns), dtype=torch.float32)
    if scores.numel():
        s = kp.PageScore(q=q.data_ptr(), width=address(width), bounds=bounds.data_ptr(), table=index(block_table), seqlens=index(seqlens),
                         scores=scores.data_ptr(), q_type=FLOAT_TYPES[q.dtype], bounds_type=BOUND_TYPES[bounds.dtype], S=N // q.shape[0],
                         H=H, G=q.shape[1] // H, D=q.shape[2], max_pages=columns, page_size=page_size, bound_heads=bounds.shape[1],
                         table_heads=table_heads, seqlen_heads=seqlens.shape[1], scale=scale)  # fmt: skip
        launch("pages", "page_score_kernel", (N * H * -(-columns // WARPS), 1), 0, s, q.device)
    return scores


def pack(buffer, fields, rows_of, offsets, strides, rows):
    checks.packed("pack", buffer, fields, rows_of, offsets, strides, rows, values=_values_are_checked())
    _move_rows("pack_kernel", buffer, fields, rows_of, offsets, strides, rows)


def unpack(buffer, fields, rows_of, offsets, strides):
    rows = [field.shape[0] if rows_of is None else rows_of.shape[0] for field in fields]
    checks.packed("unpack", buffer, fields, rows_of, offsets, strides, rows, values=_values_are_checked())
    _move_rows("unpack_kernel", buffer, fields, rows_of, offsets, strides, rows)


def _move_rows(kernel: str, buffer: Tensor, fields: list[Tensor], rows_of: Tensor | None, offsets, strides, rows) -> None:
    described = [
        kp.PackedField(x.data_ptr(), x.shape[0], x.shape[1:].numel() * x.element_size(), offset, stride, count, padding(x.dtype))
        for x, offset, stride, count in zip(fields, offsets, strides, rows, strict=True)
    ]
    most = len(kp.Packed().fields)
    for first in range(0, len(described), most):
        part = described[first : first + most]
        blocks = min(max(field.num_packed for field in part), 8 * num_processors(buffer.device))
        if blocks:
            p = kp.Packed(buffer=buffer.data_ptr(), index=index(rows_of))
            p.fields[: len(part)] = part
            launch("pages", kernel, (blocks, len(part)), 0, p, buffer.device)


def migrate(target: Tensor, source: Tensor, target_ids: Tensor, source_ids: Tensor) -> None:
    checks.migrate(target, source, target_ids, source_ids, values=_values_are_checked())
    record_bytes, count = target.shape[1], target_ids.numel()
    if count:
        m = kp.Migrate(target.data_ptr(), source.data_ptr(), index(target_ids), index(source_ids), record_bytes)
        launch("pages", "migrate_kernel", (count, min(max(-(-(record_bytes // 16) // (4 * BLOCK)), 1), 64)), 0, m, target.device)


def assign_slots(counts, block_table, free_stack, free_top, refcount, rows, shard, here, page_size, one_per_row, may_open):
    checks.assign_slots(counts, block_table, free_stack, free_top, refcount, rows, shard, here)
    if _values_are_checked():  # the same on the host, for what it refuses: a kernel can only stop, which ends the context
        state = (counts, block_table, free_stack, free_top, refcount, rows, shard, here)
        torch.ops.pikv.assign_slots(*(None if x is None else x.to("cpu", copy=True) for x in state), page_size, one_per_row, may_open)
    slots, tables = (counts.new_empty(rows.shape) for _ in range(2))
    if rows.numel():
        given = (counts, block_table, free_stack, free_top, refcount, rows, shard, here, slots, tables)
        a = kp.AssignSlots(*map(address, given), rows.numel(), *block_table.shape, page_size, may_open)
        launch("pages", "assign_slots_kernel", (1, 1), 8 * BLOCK, a, counts.device)
    return slots, tables


def checksum(data: Tensor) -> Tensor:
    checks.words(data)
    result, count = data.new_zeros((), dtype=torch.int64), data.nbytes // 8
    if count:
        blocks = min(-(-count // 1024), 16 * num_processors(data.device))
        launch("pages", "checksum_kernel", (blocks, 1), 0, kp.Checksum(data.data_ptr(), count, result.data_ptr()), data.device)
    return result


OPS = {
    "decode": decode,
    "prefill_cached": prefill_cached,
    "append": append,
    "merge": merge,
    "migrate": migrate,
    "page_bounds": page_bounds,
    "page_score": page_score,
    "pack": pack,
    "unpack": unpack,
    "assign_slots": assign_slots,
    "checksum": checksum,
    "route_pack": route.route_pack,
    "route_unpack": route.route_unpack,
    "route_merge": route.route_merge,
}
