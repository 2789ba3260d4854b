"""Checks of the ops that copy, encode or count, against the bytes of the reference; merge and page_score within rounding.

Each takes `op`, which gives the op under test by name, and the device to run it on, and returns the error found.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from pikv_ds.ops import library
from pikv_ds.ops.format.bound_codes import encode_box
from pikv_ds.ops.pack import record_layout
from pikv_ds.ops.reference import formats as ref_formats
from tests.ops.cases import compare, compare_lse, format_of
from tests.ops.grown import Grown


def check_append(name: str, latent: bool, dtype: torch.dtype, op: Callable, device: str) -> float:
    """Two tables whose tokens come interleaved, in steps of 1 to 150, some of them stored elsewhere (-1): the bytes of the reference."""
    generator = torch.Generator().manual_seed(3)
    heads, k_dim, v_dim = (1, 72, 64) if latent else (3, 40, 32)
    fmt = format_of(name, heads, k_dim, v_dim, 64, latent)
    pages, tail = ref_formats.new_pages(fmt, 12), None
    if fmt.grouped:
        tail = torch.zeros(2, heads, fmt.group, k_dim, dtype=torch.bfloat16)
    there = lambda x: None if x is None else x.to(device, copy=True)  # noqa: E731
    found = there(pages), there(tail)
    lens = [0, 0]
    for step in (1, 5, 70, 1, 1, 150, 60, 1):
        owner = torch.randint(3, (step,), generator=generator)  # 2: not here
        slots, positions = torch.full((step,), -1), torch.arange(step, dtype=torch.int32) + sum(lens)
        for i, n in enumerate(owner.tolist()):
            if n < 2:
                slots[i] = (n + 2 * (lens[n] // 64)) * 64 + lens[n] % 64
                lens[n] += 1
        k = (torch.randn(step, heads, k_dim, generator=generator) * 3 + 1).to(dtype)
        v = torch.randn(step, heads, v_dim, generator=generator).to(dtype)
        rest = (k, v, positions, slots.int(), owner.clamp_max(1).int() if fmt.grouped else None)
        library.REFERENCE["append"](pages, tail, *rest, *library.layout(fmt))
        op("append")(*found, *(there(x) for x in rest), *library.layout(fmt))
        assert torch.equal(pages, found[0].cpu()), f"records differ after a step of {step}"
        assert tail is None or torch.equal(tail, found[1].cpu()), f"tails differ after a step of {step}"
    assert max(lens) > 64
    return 0.0


def check_merge(sets: int, dim: int, op: Callable, device: str) -> float:
    generator = torch.Generator().manual_seed(sets)
    out, lse = torch.randn(sets, 7, 3, dim, generator=generator), torch.randn(sets, 7, 3, generator=generator) * 20
    lse = torch.where(torch.rand(lse.shape, generator=generator) < 0.3, -torch.inf, lse)
    lse[:, 0] = -torch.inf
    out = torch.where(lse.isinf().unsqueeze(-1), 0.0, out)
    expected = library.REFERENCE["merge"](out.double().float(), lse)
    found = op("merge")(out.to(device), lse.to(device))
    compare_lse(found[1].cpu(), expected[1].double(), 1e-5, "lse")
    return compare(found[0].cpu(), expected[0].double(), 1e-6, "out")


def check_migrate(record_bytes: int, op: Callable, device: str) -> float:
    generator = torch.Generator().manual_seed(0)
    source = torch.randint(256, (5, record_bytes), dtype=torch.uint8, generator=generator)
    target = torch.zeros(4, record_bytes, dtype=torch.uint8)
    ids = [torch.tensor(x, dtype=torch.int32) for x in ([3, -1, 0, 1], [4, 2, 1, -1])]
    found = target.to(device, copy=True)
    library.REFERENCE["migrate"](target, source, *ids)
    op("migrate")(found, source.to(device), *(x.to(device) for x in ids))
    assert torch.equal(found.cpu(), target)
    return 0.0


def check_checksum(words: int, op: Callable, device: str) -> float:
    data = torch.randint(256, (8 * words,), dtype=torch.uint8, generator=torch.Generator().manual_seed(words))
    assert op("checksum")(data.to(device)).cpu() == library.REFERENCE["checksum"](data)
    return 0.0


def check_bounds(name: str, dtype: torch.dtype, op: Callable, device: str, block_size: int = 0) -> float:
    """Two tables that grow in steps, pages in no order: the bits of the reference after each."""
    expected, found = Grown(name, dtype, block_size=block_size), Grown(name, dtype, device=device, block_size=block_size)
    for step, count in enumerate((1, 3, 70, 1, 300, 5)):
        expected.step(count, library.REFERENCE["page_bounds"], scale=10.0 ** (step - 2))
        found.step(count, op("page_bounds"), scale=10.0 ** (step - 2))
        bits = [grown.bounds.view(torch.uint8) for grown in (expected, found)]
        assert torch.equal(*bits), f"bounds differ after a step of {count}"
    return 0.0


def check_choose(queries: int, heads: int, columns: int, op: Callable, device: str) -> float:
    """Scores that tie, are -inf, of both signs; budgets below what is pinned, above what is visible: the columns of the reference."""
    generator = torch.Generator().manual_seed(columns)
    score = torch.randn(queries, heads, columns, generator=generator)
    score[:, :, ::3] = score[:, :, ::3].round()
    score[:, :, ::7] = -torch.inf
    hidden, pinned = (torch.rand(queries, columns, generator=generator) < share for share in (0.2, 0.05))
    for width in {1, max(1, columns // 3), columns + 2}:
        width = max(width, int((pinned & ~hidden).sum(1).max()))
        for budget in (None, torch.randint(1, width + 1, (queries,), generator=generator)):
            expected = library.REFERENCE["choose_pages"](score, hidden, pinned, budget, width)
            given = (x if x is None else x.to(device) for x in (score, hidden, pinned, budget))
            assert torch.equal(op("choose_pages")(*given, width).cpu(), expected), f"width {width}, budget {budget}"
    return 0.0


def check_score(heads: int, table_heads: int, dtype: torch.dtype, spread: float | None, op: Callable, device: str) -> float:
    """Columns beyond the length must not be read, an infinite bound must not become NaN."""
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, 12, 72, generator=generator).to(torch.bfloat16 if dtype == torch.int8 else dtype)
    bounds = torch.randn(9, heads, 2, 72, generator=generator).sort(2).values
    if dtype == torch.int8:
        bounds = encode_box(bounds)
    else:
        bounds = bounds.to(dtype)
        bounds[4, :, 1, ::7] = torch.inf
    q[:, :, ::7] = 0
    seqlens = torch.tensor([0, 1, 16, 17], dtype=torch.int32).view(4, 1)
    table = torch.randint(9, (4, table_heads, 7), generator=generator).int()
    table[(torch.arange(7) >= (seqlens.unsqueeze(-1) + 15) // 16).expand_as(table)] = 1 << 30
    width = None if spread is None else spread * q.abs()
    expected = library.REFERENCE["page_score"](q, bounds, table, seqlens, width, 16, 0.3)
    on_device = (x if x is None else x.to(device) for x in (q, bounds, table, seqlens, width))
    found = op("page_score")(*on_device, 16, 0.3).cpu()
    seen = expected != -torch.inf
    assert torch.equal(seen, found != -torch.inf), "-inf in different places"
    return compare(found[seen], expected[seen].double(), 1e-5, "scores")


def check_pack(rows: int, indexed: bool, op: Callable, device: str) -> float:
    """More fields than one launch takes, of every alignment, any bits; then back into other rows, some dropped."""
    generator = torch.Generator().manual_seed(rows)
    kinds = [((3, 5), torch.bfloat16), ((2,), torch.float32), ((), torch.int32), ((0,), torch.float16), ((7,), torch.uint8),
             ((), torch.int64), ((64,), torch.bfloat16)]  # fmt: skip
    shapes = [torch.Size((max(rows, 1), *shape)) for shape, _ in kinds] * 3
    dtypes = [dtype for _, dtype in kinds] * 3
    fields = [torch.randint(256, (shape.numel() * dtype.itemsize,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)
              for shape, dtype in zip(shapes, dtypes, strict=True)]  # fmt: skip
    offsets, stride = record_layout(fields)
    index = torch.randint(-1, max(rows, 1), (rows,), generator=generator).int() if indexed else None
    there = lambda x: None if x is None else x.to(device, copy=True)  # noqa: E731
    buffer = torch.zeros(rows, stride, dtype=torch.uint8)
    found = there(buffer)
    strides = [stride] * len(fields)
    library.REFERENCE["pack"](buffer, fields, index, offsets, strides, [rows] * len(fields))
    op("pack")(found, [there(x) for x in fields], there(index), offsets, strides, [rows] * len(fields))
    assert torch.equal(buffer, found.cpu()), "buffers differ"
    to = torch.where(torch.arange(rows) % 3 == 1, -1, torch.randperm(rows, generator=generator)).int() if indexed else None
    empty = [torch.zeros(rows, *x.shape[1:], dtype=x.dtype) for x in fields]
    back = [there(x) for x in empty]
    library.REFERENCE["unpack"](buffer, empty, to, offsets, strides)
    op("unpack")(there(buffer), back, there(to), offsets, strides)
    for expected, x in zip(empty, back, strict=True):
        assert torch.equal(expected.flatten().view(torch.uint8), x.cpu().flatten().view(torch.uint8)), f"{x.dtype} differs"
    return 0.0


def check_slots(rows: int, shards: int, tokens: int, op: Callable, device: str) -> float:
    """Two steps of a store with pages of 5 entries: slots, tables and what is left on the stack are those of the reference."""
    generator = torch.Generator().manual_seed(tokens)
    pages, width = rows * shards + tokens, 3 + 2 * tokens // 5
    stack = torch.cat([torch.randperm(pages, generator=generator), torch.zeros(1, dtype=torch.int64)]).int()
    state = [torch.zeros(rows, shards, dtype=torch.int32), torch.full((rows, shards, width), -1, dtype=torch.int32), stack,
             torch.tensor(pages), torch.zeros(pages + 1, dtype=torch.int32)]  # fmt: skip
    found = [x.to(device, copy=True) for x in state]
    for _ in range(2):
        step = [torch.randint(rows, (tokens,), generator=generator).sort().values,
                torch.randint(shards, (tokens,), generator=generator), torch.rand(tokens, generator=generator) < 0.8]  # fmt: skip
        expected = library.REFERENCE["assign_slots"](*state, *step, 5, False, True)
        got = op("assign_slots")(*found, *(x.to(device) for x in step), 5, False, True)
        state[1][..., -1] = -1  # the reference parks there, others need not
        found[1][..., -1] = -1
        names = ("counts", "block_table", "free_stack", "free_top", "refcount", "slots", "tables")
        for name, x, y in zip(names, (*state, *expected), (*found, *got), strict=True):
            assert torch.equal(x[:pages], y.cpu()[:pages]) if name == "refcount" else torch.equal(x, y.cpu()), f"{name} differ"
    return 0.0
