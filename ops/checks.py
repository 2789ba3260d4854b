"""What the torch reference refuses. csrc/cpu/checks.h refuses the same with the same words; tests/ops/test_bad_input.py runs both."""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds.ops.format.bound_codes import SCALE_BYTES, bounds_shape
from pikv_ds.ops.format.formats import PageFormat

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_INT32_MAX = 2**31 - 1
PACKED = (*_FLOATS, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(f"pikv: {message}")


def attend(
    q,
    pages,
    block_table,
    seqlens,
    q_positions,
    page_list,
    tail,
    tail_rows,
    fmt: PageFormat,
    window: int,
    values: bool = True,
    block_size: int = 0,
) -> None:
    """q [R, Hq, Dk]. values: also what the integers say, which waits for the device that holds them."""
    floats("q", q)
    _pages(pages, fmt)
    require(q.dim() == 3, f"q must be [R, num_q_heads, head_dim], got {list(q.shape)}")
    N, R = block_table.shape[0], q.shape[0]
    require(block_table.dim() == 3, f"block_table must be [N, 1 or num_kv_heads, max_pages], got {list(block_table.shape)}")
    heads = max(block_table.shape[1], fmt.num_kv_heads)
    require(block_table.shape[1] in (1, heads) and fmt.num_kv_heads in (1, heads),
            f"block_table has {block_table.shape[1]} heads, the pages have {fmt.num_kv_heads}")  # fmt: skip
    require(q.shape[-1] == fmt.k_dim, f"q has head_dim {q.shape[-1]}, the pages have {fmt.k_dim}")
    require(q.shape[-2] % heads == 0, f"{q.shape[-2]} query heads are not a multiple of {heads} kv heads")
    require(R > 0 and N % R == 0, f"block_table has {N} rows, which is not a multiple of the {R} requests of q")
    require(seqlens.dim() == 2 and seqlens.shape[0] == N and seqlens.shape[1] in (1, heads),
            f"seqlens must be [{N}, 1 or {heads}], got {list(seqlens.shape)}")  # fmt: skip
    given = {"block_table": block_table, "seqlens": seqlens, "page_list": page_list, "q_positions": q_positions, "tail_rows": tail_rows}
    for name, x in given.items():
        if x is not None:
            integers(name, x)
    if page_list is not None:
        require(page_list.dim() == 3 and page_list.shape[0] == N and page_list.shape[1] in (1, heads),
                f"page_list must be [{N}, 1 or {heads}, num_listed], got {list(page_list.shape)}")  # fmt: skip
    require(not window or q_positions is not None, "a window needs q_positions")
    _tail(tail, tail_rows, fmt)
    if tail is not None:
        per_head = tail_rows.dim() == 2 and tail_rows.shape[1] in (1, heads)
        require(tail_rows.shape[0] == N and (tail_rows.dim() == 1 or per_head),
                f"tail_rows must be [{N}] or [{N}, 1 or {heads}], got {list(tail_rows.shape)}")  # fmt: skip
    if values:
        if tail is not None and tail_rows.numel():
            row = int(tail_rows.max())
            require(row < tail.shape[0], f"tail row {row} is beyond the {tail.shape[0]} rows of the tail")
        if page_list is not None and page_list.numel():
            top = int(page_list.max()) // (fmt.page_size // (block_size or fmt.page_size))
            require(top < block_table.shape[2], f"page_list names column {top} of a block table with {block_table.shape[2]}")
        _table(block_table, seqlens, pages.shape[0], fmt.page_size)


def block(fmt: PageFormat, block_size: int = 0) -> int:
    """Tokens that are listed, or have bounds, as one; 0 = the page."""
    if not block_size:
        return fmt.page_size
    fits = block_size > 0 and fmt.page_size % block_size == 0
    fits = fits and (not fmt.grouped or block_size == fmt.page_size or fmt.group % block_size == 0)
    group = f" and the group {fmt.group}" if fmt.grouped else ""
    require(fits, f"block_size must divide the page_size {fmt.page_size}{group}, got {block_size}")
    return block_size


def choose_pages(score, hidden, pinned, budget, width: int) -> None:
    require(score.dim() == 3 and score.dtype == torch.float32 and score.is_contiguous(),
            f"score must be contiguous float32 [Q, heads, columns], got {score.dtype} {list(score.shape)}")  # fmt: skip
    Q, _, C = score.shape
    for name, x in (("hidden", hidden), ("pinned", pinned)):
        require(x.dtype == torch.bool and tuple(x.shape) == (Q, C) and x.is_contiguous(),
                f"{name} must be contiguous bool [{Q}, {C}], got {x.dtype} {list(x.shape)}")  # fmt: skip
    if budget is not None:
        require(budget.dtype == torch.int64 and budget.numel() == Q and budget.is_contiguous(),
                f"budget must be contiguous int64 [{Q}], got {list(budget.shape)}")  # fmt: skip
    require(width >= 1, f"width must be at least 1, got {width}")


def prefill_cached(q, pages, block_table, seqlens, q_positions, tail, tail_rows, fmt: PageFormat, values: bool = True) -> None:
    """q [R, T, Hq, Dk]."""
    floats("q", q)
    require(q.dim() == 4, f"q must be [R, T, num_q_heads, head_dim], got {list(q.shape)}")
    integers("q_positions", q_positions)
    require(q_positions.shape == q.shape[:2], f"q_positions must be {list(q.shape[:2])}, got {list(q_positions.shape)}")
    attend(q[:, 0].contiguous(), pages, block_table, seqlens, None, None, tail, tail_rows, fmt, 0, values)


def append(pages, tail, k, v, positions, slot_mapping, tail_rows, fmt: PageFormat, values: bool = True) -> None:
    _pages(pages, fmt)
    floats("k", k)
    T = slot_mapping.shape[0]
    expected = (T, fmt.num_kv_heads, fmt.k_dim)
    require(tuple(k.shape) == expected, f"k must be {list(expected)}, got {list(k.shape)}")
    if not fmt.latent:
        floats("v", v)
        expected = (T, fmt.num_kv_heads, fmt.v_dim)
        require(tuple(v.shape) == expected, f"v must be {list(expected)}, got {list(v.shape)}")
        require(k.dtype == v.dtype, f"k is {k.dtype}, v is {v.dtype}")
    integers("positions", positions)
    integers("slot_mapping", slot_mapping)
    require(tuple(positions.shape) == (T,), f"positions must be [{T}], got {list(positions.shape)}")
    _slots(pages, slot_mapping, tail, tail_rows, fmt, values)


def page_bounds(bounds, pages, slot_mapping, tail, tail_rows, fmt: PageFormat, values: bool = True, block_size: int = 0) -> None:
    _pages(pages, fmt)
    _bounds(bounds)
    blocks = fmt.page_size // (block_size or fmt.page_size)
    expected = (blocks * pages.shape[0], *bounds_shape(fmt, bounds.dtype))
    require(tuple(bounds.shape) == expected, f"bounds must be {list(expected)}, got {list(bounds.shape)}")
    integers("slot_mapping", slot_mapping)
    _slots(pages, slot_mapping, tail, tail_rows, fmt, values)


def page_score(q, bounds, block_table, seqlens, width, page_size: int, values: bool = True) -> None:
    floats("q", q)
    if width is not None:
        floats("width", width)
        require(width.dtype == q.dtype, "width must have the dtype of q")
        require(width.shape == q.shape, f"width must have the shape of q, {list(q.shape)}, got {list(width.shape)}")
    _bounds(bounds)
    require(q.dim() == 3, f"q must be [R, num_q_heads, head_dim], got {list(q.shape)}")
    require(bounds.dim() == 4 and bounds.shape[2] == 2, f"bounds must be [num_pages, num_kv_heads, 2, head_dim], got {list(bounds.shape)}")
    bound_dim = bounds.shape[3] - (SCALE_BYTES if bounds.dtype == torch.int8 else 0)
    require(q.shape[2] == bound_dim, f"q has head_dim {q.shape[2]}, the bounds have {bound_dim}")
    require(block_table.dim() == 3, f"block_table must be [N, 1 or num_kv_heads, max_pages], got {list(block_table.shape)}")
    N, R, heads = block_table.shape[0], q.shape[0], max(block_table.shape[1], bounds.shape[1])
    require(block_table.shape[1] in (1, heads) and bounds.shape[1] in (1, heads),
            f"block_table has {block_table.shape[1]} heads, the bounds have {bounds.shape[1]}")  # fmt: skip
    require(q.shape[1] % heads == 0, f"{q.shape[1]} query heads are not a multiple of {heads} kv heads")
    require(R > 0 and N % R == 0, f"block_table has {N} rows, which is not a multiple of the {R} requests of q")
    require(seqlens.dim() == 2 and seqlens.shape[0] == N and seqlens.shape[1] in (1, heads),
            f"seqlens must be [{N}, 1 or {heads}], got {list(seqlens.shape)}")  # fmt: skip
    integers("block_table", block_table)
    integers("seqlens", seqlens)
    if values:
        _table(block_table, seqlens, bounds.shape[0], page_size)


def merge(out: Tensor, lse: Tensor) -> None:
    require(out.dtype == torch.float32 and lse.dtype == torch.float32, f"merge needs float32 partials, got {out.dtype} and {lse.dtype}")
    require(out.shape[:-1] == lse.shape, f"out {list(out.shape)} and lse {list(lse.shape)} differ in a leading dimension")
    require(out.is_contiguous() and lse.is_contiguous(), "out and lse must be contiguous")


def migrate(target: Tensor, source: Tensor, target_ids: Tensor, source_ids: Tensor, values: bool = True) -> None:
    for name, x in (("target", target), ("source", source)):
        require(x.dtype == torch.uint8 and x.dim() == 2 and x.is_contiguous(), f"{name} must be contiguous uint8 [num_pages, record_bytes]")
    require(target.shape[1] == source.shape[1], f"target has records of {target.shape[1]} bytes, source of {source.shape[1]}")
    for name, ids, pages in (("target_ids", target_ids, target), ("source_ids", source_ids, source)):
        integers(name, ids)
        top = int(ids.max()) if values and ids.numel() else -1
        require(top < pages.shape[0], f"{name} has page {top}, the store has {pages.shape[0]}")
    require(target_ids.shape == source_ids.shape, f"target_ids {list(target_ids.shape)} and source_ids {list(source_ids.shape)} differ")


def staging(slot: Tensor, held: Tensor, asked: Tensor, ahead: Tensor) -> None:
    require(slot.dtype == torch.int32 and slot.dim() == 2 and slot.is_contiguous(),
            f"slot must be contiguous int32 [sections, far pages], got {slot.dtype} {list(slot.shape)}")  # fmt: skip
    X, G = slot.shape[0], held.shape[1] if held.dim() == 2 else -1
    for name, x in (("held", held), ("asked", asked)):
        require(x.dtype == torch.int64 and tuple(x.shape) == (X, G) and x.is_contiguous(),
                f"{name} must be contiguous int64 [{X}, slots], got {x.dtype} {list(x.shape)}")  # fmt: skip
    require(ahead.dtype == torch.bool and tuple(ahead.shape) == (X, G) and ahead.is_contiguous(),
            f"ahead must be contiguous bool [{X}, {G}], got {list(ahead.shape)}")  # fmt: skip


def listed(block_table: Tensor, page_list: Tensor, slot: Tensor, first_far: int) -> None:
    _near_and_far(block_table)
    N, X = block_table.shape[0], slot.shape[0]
    require(page_list.dtype == torch.int32 and page_list.dim() == 3 and page_list.shape[0] == N and page_list.is_contiguous()
            and (X == 1 or page_list.shape[1] == X),
            f"page_list must be contiguous int32 [{N}, {X}, num_listed], got {page_list.dtype} {list(page_list.shape)}")  # fmt: skip
    if not page_list.numel():
        return
    top = int(page_list.max())
    require(top < block_table.shape[2], f"page_list names column {top} of a block table with {block_table.shape[2]}")
    if not block_table.shape[2]:
        return
    ids = block_table[:, 0].gather(1, page_list.flatten(1).clamp_min(0).long())[page_list.flatten(1) >= 0]
    _far_ids(ids, first_far + slot.shape[1])


def scored(score: Tensor, hidden: Tensor, block_table: Tensor, slot: Tensor, first_far: int) -> None:
    _near_and_far(block_table)
    N, _, C = block_table.shape
    require(score.dtype == torch.float32 and tuple(score.shape) == (N, slot.shape[0], C) and score.is_contiguous(),
            f"score must be contiguous float32 [{N}, {slot.shape[0]}, {C}], got {score.dtype} {list(score.shape)}")  # fmt: skip
    require(hidden.dtype == torch.bool and tuple(hidden.shape) == (N, C) and hidden.is_contiguous(),
            f"hidden must be contiguous bool [{N}, {C}], got {hidden.dtype} {list(hidden.shape)}")  # fmt: skip
    _far_ids(block_table[:, 0][~hidden].clamp_min(0), first_far + slot.shape[1])


def gather_sections(target, source, records, coming, begins, first: int, section_bytes: int) -> None:
    require(target.dtype == torch.uint8 and target.dim() == 2 and target.is_contiguous(),
            "target must be contiguous uint8 [num_pages, record_bytes]")  # fmt: skip
    bytes_, end = target.shape[1], 0
    require(1 <= section_bytes <= bytes_, f"section_bytes must be 1 to {bytes_}, got {section_bytes}")
    require(len(begins) == len(source), f"begins has {len(begins)} numbers for {len(source)} sources")
    for i, x in enumerate(source):
        require(x.dtype == torch.uint8 and x.dim() == 2 and x.shape[1] == bytes_ and x.is_contiguous(),
                f"source {i} must be contiguous uint8 [num_pages, {bytes_}]")  # fmt: skip
        require(begins[i] == end, f"source {i} begins at record {begins[i]}, the one before ends at {end}")
        end += len(x)
    require(records.dtype == torch.int64 and records.dim() == 1 and records.is_contiguous(), "records must be contiguous int64 [far pages]")
    require(coming.dtype == torch.int64 and coming.dim() == 2 and coming.shape[1] == 3 and coming.is_contiguous(),
            f"coming must be contiguous int64 [n, 3], got {coming.dtype} {list(coming.shape)}")  # fmt: skip
    for far, at, section in coming.tolist():
        there = 0 <= far < len(records) and 0 <= int(records[far]) < end
        require(there, f"coming names far page {far} of {len(records)}")
        require(0 <= at < len(target) - first, f"coming names slot {at}, there are {len(target) - first}")
        require(0 <= section < bytes_ // section_bytes, f"coming names section {section} of {bytes_ // section_bytes}")


def pieces(name: str, memory: Tensor | None, at: Tensor, count: int, size: int) -> None:
    """memory None: offsets in a file."""
    require(size >= 0, f"size must be 0 or more, got {size}")
    if memory is not None:
        require(memory.dtype == torch.uint8 and memory.is_contiguous(),
                f"memory must be contiguous uint8, got {memory.dtype} {list(memory.shape)}")  # fmt: skip
    require(at.dtype == torch.int64 and tuple(at.shape) == (count,) and at.is_contiguous(),
            f"{name} must be contiguous int64 [{count}], got {at.dtype} {list(at.shape)}")  # fmt: skip
    end = 2**63 - 1 if memory is None else memory.numel()
    for byte in at[(at < 0) | (at > end - size)].tolist()[:1]:
        require(False, f"{name} has byte {byte}: {size} bytes from there are not in the {end} of memory")


def _near_and_far(block_table: Tensor) -> None:
    require(block_table.dtype == torch.int32 and block_table.dim() == 3 and block_table.shape[1] == 1 and block_table.is_contiguous(),
            f"block_table must be contiguous int32 [N, 1, columns], got {block_table.dtype} {list(block_table.shape)}")  # fmt: skip


def _far_ids(ids: Tensor, num_pages: int) -> None:
    for id_ in ids[(ids < 0) | (ids >= num_pages)].tolist()[:1]:
        require(False, f"block_table names page {id_}, there are {num_pages}")


def aligned(name: str, x: Tensor) -> None:
    require(x.data_ptr() % 16 == 0, f"{name} must start on a 16-byte boundary")


def floats(name: str, x: Tensor) -> None:
    require(x.dtype in _FLOATS, f"{name} must be float32, bfloat16 or float16, got {x.dtype}")
    require(x.is_contiguous(), f"{name} must be contiguous")


def _bounds(bounds: Tensor) -> None:
    require(bounds.dtype in (*_FLOATS, torch.int8), f"bounds must be float32, bfloat16, float16 or int8, got {bounds.dtype}")
    require(bounds.is_contiguous(), "bounds must be contiguous")


def integers(name: str, x: Tensor) -> None:
    require(x.dtype in (torch.int32, torch.int64), f"{name} must be int32 or int64, got {x.dtype}")
    require(x.is_contiguous(), f"{name} must be contiguous")


def _pages(pages: Tensor, fmt: PageFormat) -> None:
    require(pages.dtype == torch.uint8 and pages.dim() == 2 and pages.shape[1] == fmt.record_bytes,
            f"pages must be uint8 [num_pages, {fmt.record_bytes}] for {fmt.label}, got {pages.dtype} {list(pages.shape)}")  # fmt: skip
    require(pages.is_contiguous(), "pages must be contiguous")
    require(pages.shape[0] <= _INT32_MAX // fmt.page_size,
            f"pages has {pages.shape[0]} pages of {fmt.page_size} slots; slots are int32, so a store holds fewer than 2**31")  # fmt: skip


def _slots(
    pages: Tensor, slot_mapping: Tensor, tail: Tensor | None, tail_rows: Tensor | None, fmt: PageFormat, values: bool = True
) -> None:
    T = slot_mapping.shape[0]
    _tail(tail, tail_rows, fmt)
    if fmt.grouped:
        integers("tail_rows", tail_rows)
        require(tuple(tail_rows.shape) == (T,), f"tail_rows must be [{T}], got {list(tail_rows.shape)}")
        row = int(tail_rows.max()) if T and values else -1
        require(row < tail.shape[0], f"tail row {row} is beyond the {tail.shape[0]} rows of the tail")
    top, slots = int(slot_mapping.max()) if T and values else -1, pages.shape[0] * fmt.page_size
    require(top < slots, f"slot {top} is beyond the {slots} slots of the store")


def _tail(tail: Tensor | None, tail_rows: Tensor | None, fmt: PageFormat) -> None:
    if not fmt.grouped:
        require(tail is None, f"{fmt.label} pages have no tail")
        return
    require(tail is not None and tail_rows is not None, f"{fmt.label} pages need tail and tail_rows")
    floats("tail", tail)
    shape = (fmt.num_kv_heads, fmt.group, fmt.k_dim)
    require(tuple(tail.shape[1:]) == shape, f"tail must be [rows, {', '.join(map(str, shape))}], got {list(tail.shape)}")


def _table(block_table: Tensor, seqlens: Tensor, num_pages: int, page_size: int) -> None:
    """Every id that will be read lies in the store; every length fits its table."""
    columns = block_table.shape[2]
    longest = int(seqlens.max()) if seqlens.numel() else 0
    require(longest <= columns * page_size, f"seqlens has {longest}, the block table has room for {columns * page_size} entries")
    num_used = (seqlens + page_size - 1) // page_size
    used = torch.arange(columns, device=block_table.device) < num_used.unsqueeze(-1)
    ids, used = torch.broadcast_tensors(block_table, used)
    ids = ids.masked_select(used)
    for bad in ids[(ids < 0) | (ids >= num_pages)].tolist()[:1]:
        require(False, f"block_table names page {bad}, the store has {num_pages}")


def assign_slots(counts, block_table, free_stack, free_top, refcount, rows, shard, here) -> None:
    require(counts.dim() == 2, f"counts must be [R, S], got {list(counts.shape)}")
    (R, S), N = counts.shape, rows.numel()
    require(block_table.dim() == 3 and block_table.shape[:2] == counts.shape,
            f"block_table must be [{R}, {S}, max_pages], got {list(block_table.shape)}")  # fmt: skip
    require(free_stack.dim() == 1 and refcount.shape == free_stack.shape,
            f"free_stack {list(free_stack.shape)} and refcount {list(refcount.shape)} must both be [num_pages + 1]")  # fmt: skip
    require(free_top.dtype == torch.int64 and free_top.numel() == 1,
            f"free_top must be one torch.int64, got {free_top.dtype} {list(free_top.shape)}")  # fmt: skip
    require(shard is not None or S == 1, f"shard is needed with {S} shards")
    for name, x in (("counts", counts), ("block_table", block_table), ("free_stack", free_stack), ("refcount", refcount)):
        require(x.dtype == torch.int32, f"{name} must be torch.int32, got {x.dtype}")
        require(x.is_contiguous(), f"{name} must be contiguous")
    for name, x in (("rows", rows), ("shard", shard)):
        if x is not None:
            require(x.dtype == torch.int64, f"{name} must be torch.int64, got {x.dtype}")
            require(x.dim() == 1 and x.numel() == N and x.is_contiguous(), f"{name} must be contiguous [{N}], got {list(x.shape)}")
    if here is not None:
        require(
            here.dtype == torch.bool and here.numel() == N and here.is_contiguous(),
            f"here must be torch.bool [{N}], got {list(here.shape)}",
        )


def words(data: Tensor) -> None:
    whole = data.is_contiguous() and data.nbytes % 8 == 0
    require(whole, f"checksum needs a contiguous tensor of whole 8-byte words, got {data.nbytes} bytes")


def packed(op: str, buffer: Tensor, fields: list[Tensor], index: Tensor | None, offsets, strides, rows, values: bool = True) -> None:
    """`rows`: rows of each field in the buffer."""
    require(buffer.dtype == torch.uint8 and buffer.is_contiguous(), f"{op}: buffer must be contiguous uint8, got {buffer.dtype}")
    n, counts = len(fields), (len(offsets), len(strides), len(rows))
    require(counts == (n, n, n), f"{op}: {n} fields need as many offsets, strides and rows, got {counts[0]}, {counts[1]} and {counts[2]}")
    if index is not None:
        integers("index", index)
    top = int(index.max()) if values and index is not None and index.numel() else -1
    for i, (x, offset, stride, count) in enumerate(zip(fields, offsets, strides, rows, strict=True)):
        require(x.dim() >= 1 and x.is_contiguous(), f"{op}: field {i} must be contiguous [rows, ...], got {list(x.shape)}")
        require(x.dtype in PACKED, f"pack: a field must be float64, float32, bfloat16, float16 or an integer, got {x.dtype}")
        width = x.shape[1:].numel() * x.element_size()
        end = offset + (count - 1) * stride + width if count else 0
        require(offset >= 0 and count >= 0 and stride >= width and end <= buffer.numel(),
                f"{op}: field {i}, {count} rows of {width} bytes from {offset}, {stride} apart, "
                f"does not fit a buffer of {buffer.numel()} bytes")  # fmt: skip
        if index is not None:
            require(index.numel() == count, f"{op}: field {i} has {count} rows in the buffer, index has {index.numel()}")
            require(top < x.shape[0], f"{op}: index names row {top} of field {i}, which has {x.shape[0]}")
