"""The matrix that every implementation of the ops is held to: CPU per instruction set, CUDA kernels on the host and on a device.

A point is one check of one op; `points(long)` lists them. Attention is compared with f64 on the same stored codes, everything that copies
or encodes with the bytes of the reference. Lengths include 0, 1, a page and a page + 1; unused slots, tails, table columns and pages that
are not listed hold NaN or ids that do not exist; positions are dealt at random, so that a table holds no run of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch

from pikv_ds.ops import library
from pikv_ds.ops.format.formats import FORMATS
from pikv_ds.ops.format.kernels import LATENT_TENSOR, TENSOR, TENSOR_DIMS, tensor_kernel
from tests.ops.blocks import list_half_of_the_blocks
from tests.ops.byte_checks import (
    check_append,
    check_bounds,
    check_checksum,
    check_choose,
    check_merge,
    check_migrate,
    check_pack,
    check_score,
    check_slots,
)
from tests.ops.cases import answer, compare, compare_lse, format_of, make_case, small_page
from tests.ops.route_checks import check_route, check_route_merge
from tests.ops.stage_checks import check_crc, check_gather, check_read_file, check_stage

ROPE = ("int8+rope", "int4+rope", "fp8_e4m3+rope", "fp4_e2m1+rope")
NAMES = (*FORMATS, "int8/int4", "int4/int2", "fp8_e4m3/int4", "int4/fp8_e4m3", "bf16/fp4_e2m1", *ROPE)
GROUPS = (1, 4, 8, 16)
MODES = ("dense", "list", "window")
OUT, LSE = 1e-4, 1e-3  # the hi + lo split of q costs int8 about 3e-5 on CPU; plain paths are below 1e-6
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
BOUND_DTYPES = (*DTYPES, torch.int8)


class Point(NamedTuple):
    op: str
    id: str
    check: Callable[[Callable, str], float]  # (ops, device) -> the error found; raises AssertionError where it is too large


@dataclass(frozen=True)
class Attention:
    name: str
    group: int = 4
    mode: str = "dense"
    k_dim: int = 64
    v_dim: int = 64
    latent: bool = False
    page_size: int = 0  # 0 = 16, or 64 where tokens are grouped
    shards: int = 1
    queries: int = 0  # of each request, through prefill_cached; 0 = decode
    dtype: torch.dtype = torch.bfloat16
    num_splits: int = 0
    block_size: int = 8  # of the mode "blocks"

    @property
    def id(self) -> str:
        width = f"latent{self.k_dim}" if self.latent else f"D{self.k_dim}" + (f"-{self.v_dim}" if self.v_dim != self.k_dim else "")
        queries = f"-T{self.queries}" if self.queries else ""
        return f"{self.name}-{width}-G{self.group}-P{self.page_size}-S{self.shards}-{self.mode}{queries}-{str(self.dtype)[6:]}" + (
            f"-of{self.block_size}" if self.mode == "blocks" else ""
        )


def points(long: bool = False) -> Iterator[Point]:
    for a in _attention(long):
        yield Point("prefill_cached" if a.queries else "decode", a.id, partial(check_attention, a))
    for name, latent, dtype in itertools.product(NAMES, (False, True), DTYPES if long else DTYPES[:1]):
        label = f"{name}-{'latent' if latent else 'D40'}-{str(dtype)[6:]}"
        yield Point("append", label, partial(check_append, name, latent, dtype))
    for sets, dim in itertools.product((1, 2, 5, 64) if long else (1, 5), (8, 40, 512)):
        yield Point("merge", f"S{sets}-D{dim}", partial(check_merge, sets, dim))
    for name, dtype in itertools.product(FORMATS, BOUND_DTYPES):  # values have no bounds
        yield Point("page_bounds", f"{name}-{str(dtype)[6:]}", partial(check_bounds, name, dtype))
    for (heads, tables, spread), dtype in itertools.product(((3, 1, None), (1, 3, None), (3, 1, 0.5)), BOUND_DTYPES):
        label = f"H{heads}-tables{tables}-{str(dtype)[6:]}" + ("" if spread is None else f"-width{spread}")
        yield Point("page_score", label, partial(check_score, heads, tables, dtype, spread))
    for rows, indexed in itertools.product((0, 1, 7, 300), (False, True)):
        yield Point("pack", f"{rows}{'-indexed' if indexed else ''}", partial(check_pack, rows, indexed))
    for ranks, tokens, share in ((1, 5, 1.0), (2, 1, 0.5), (4, 9, 0.3), (3, 70, 0.6)):
        yield Point("route_pack", f"G{ranks}-N{tokens}-{share}", partial(check_route, ranks, tokens, share, False))
    for ranks, tokens, dim in ((1, 3, 8), (4, 7, 64), (40, 3, 130)):
        yield Point("route_merge", f"G{ranks}-N{tokens}-D{dim}", partial(check_route_merge, ranks, tokens, dim, False))
    for rows, shards, tokens in ((1, 1, 1), (4, 1, 4), (3, 2, 40), (2, 3, 300), (70, 2, 300)):
        yield Point("assign_slots", f"R{rows}-S{shards}-N{tokens}", partial(check_slots, rows, shards, tokens))
    for record in (64, 100, 4096, 70000):
        yield Point("migrate", f"{record}B", partial(check_migrate, record))
    for words in (0, 1, 127, 4096, 100001):
        yield Point("checksum", f"{words}W", partial(check_checksum, words))


def block_points(long: bool = False) -> Iterator[Point]:
    """Blocks inside of pages: attention to those of a list, their bounds."""
    for a in _blocks(long):
        yield Point("decode", a.id, partial(check_attention, a))
    for name, dtype in itertools.product(("bf16", "int4"), BOUND_DTYPES):
        yield Point("page_bounds", f"{name}-{str(dtype)[6:]}-of8", partial(check_bounds, name, dtype, block_size=8))


def cpu_points() -> Iterator[Point]:
    """What the CPU serves alone: how blocks and pages are chosen, and pages in tiers."""
    for queries, heads, columns in ((1, 1, 1), (3, 2, 70), (2, 8, 4096)):
        yield Point("choose_pages", f"Q{queries}-H{heads}-C{columns}", partial(check_choose, queries, heads, columns))
    for sections, slots, tables in ((1, 5, 1), (1, 40, 3), (4, 3, 2), (2, 16, 5)):
        yield Point("stage", f"X{sections}-G{slots}-N{tables}", partial(check_stage, sections, slots, tables))
    for size in (0, 1, 15, 64, 65, 127, 4096, 70001):
        yield Point("crc32", f"{size}B", partial(check_crc, size))
        yield Point("read_file", f"{size}B", partial(check_read_file, size))
    for sections in (1, 2, 3):
        yield Point("gather_sections", f"X{sections}", partial(check_gather, sections))


def _blocks(long: bool) -> Iterator[Attention]:
    """Blocks inside of pages, with windows and shards, tails and pieces."""
    sizes = itertools.cycle((8, 4, 16, 2))
    for name in NAMES:
        small = 2 * small_page(name)
        if name.endswith("+rope"):
            yield Attention(name, 5, "blocks", 576, 512, True, small)
            continue
        for group, width in itertools.product((1, 4, 8) if long else (4,), (64, 128, 40) if long else (64,)):
            yield Attention(name, group, "blocks", width, width, page_size=small, shards=1 + group % 3, block_size=next(sizes))
        yield Attention(name, 8, "blocks", 128, 128, page_size=small, num_splits=3, block_size=next(sizes))
        if "/" not in name:
            yield Attention(name, 5, "blocks", 576, 512, True, small)


def _attention(long: bool) -> Iterator[Attention]:
    for name in NAMES:
        small = small_page(name)
        if name.endswith("+rope"):
            for mode in MODES:
                yield Attention(name, 5, mode, 576, 512, True, small)
            yield Attention(name, 3, "window", 40, 24, True, small, shards=2)
            yield Attention(name, 4, "window", 328, 264, True, 2 * small, queries=3)
            if long:
                yield from _long_rope(name, small)
            continue
        for group, mode in ((1, "dense"), (4, "list"), (8, "window")) if "/" in name else itertools.product(GROUPS, MODES):
            yield Attention(name, group, mode, page_size=small)
        for mode in () if "/" in name else MODES:
            yield Attention(name, 5, mode, 576, 512, True, small)
        for mode, causal_group in (("dense", 2), ("window", 4)):
            yield Attention(name, causal_group, mode, page_size=small, shards=2, queries=3)
        if long and "/" not in name:
            yield from _long(name, small)


def _long(name: str, small: int) -> Iterator[Attention]:
    widths = ((32, 32, False), (96, 96, False), (128, 128, False), (96, 64, False), (40, 128, False), (192, 128, True), (576, 512, True))
    pages = (small, 2 * small, 256) if small == 64 else (1, 5, 16, 256)
    dtypes, modes = itertools.cycle(DTYPES), itertools.cycle(MODES)
    for width, group, page_size in itertools.product(widths, GROUPS, pages):
        base = Attention(name, group, next(modes), *width, page_size, shards=3, dtype=next(dtypes))
        yield base
        yield replace(base, mode=next(modes), shards=1, num_splits=3)
        yield replace(base, mode="window" if group % 8 else "dense", queries=5)


def _long_rope(name: str, small: int) -> Iterator[Attention]:
    pages, dtypes, modes = (small, 256) if small == 64 else (1, 16, 256), itertools.cycle(DTYPES), itertools.cycle(MODES)
    widths = ((576, 512, True), (192, 128, True), (72, 64, True), (264, 248, True))
    for width, group, page_size in itertools.product(widths, GROUPS, pages):
        base = Attention(name, group, next(modes), *width, page_size, shards=3, dtype=next(dtypes))
        yield base
        yield replace(base, mode=next(modes), shards=1, num_splits=3)
        yield replace(base, mode="window", queries=5)


def make_attention(a: Attention):
    """The case, the options of decode, and what prefill_cached asks for."""
    P = a.page_size
    lens = (0, 1, P, P + 1, 2 * P + 3, 6 * P)
    case = make_case(
        a.name, lens=lens, shards=a.shards, heads=1 if a.latent else 2, group=a.group, k_dim=a.k_dim, v_dim=a.v_dim, page_size=P,
        latent=a.latent, dtype=a.dtype, seed=a.group + P, stretch=2,
    )  # fmt: skip
    options = {"window": P + 1} if a.mode == "window" else {}
    if a.mode == "list":
        options["page_list"] = _list_half(case)
    if a.mode == "blocks":
        options |= {"page_list": list_half_of_the_blocks(case, a.block_size), "block_size": a.block_size}
    return case, options


def tensor_points(long: bool = False) -> Iterator[Point]:
    """What tensor cores serve, of the widths that are built: every format that they have, both numbers of rows in a block, lists, windows,
    tails, pieces."""
    shapes = ((64, 1, "list"), (64, 8, "window"), (128, 4, "dense"), (128, 12, "list"), (96, 4, "window"), (96, 9, "list"),
              (192, 9, "list"), (256, 4, "window"), (256, 8, "dense"))  # fmt: skip
    if long:
        shapes = tuple(itertools.product((64, 128), (1, 3, 4, 8, 12, 16, 20), MODES))
        shapes += tuple(itertools.product(sorted({*TENSOR_DIMS} - {64, 128}), (3, 8, 20), MODES))
    yield from _latent_points(long)
    pieces = itertools.cycle((0, 3))
    for name, (dim, group, mode) in itertools.product(TENSOR, shapes):
        dtype = torch.float16 if name == "fp16" else torch.bfloat16
        small = small_page(name)
        for page_size in (small, 2 * small, 256) if long else (small,):
            a = Attention(name, group, mode, dim, dim, page_size, shards=1 + group % 2, dtype=dtype, num_splits=next(pieces))
            chunk = replace(a, group=max(1, group // 3), mode="window" if group % 8 else "dense", queries=3)
            for point in (a, chunk) if long or group == 4 else (a,):
                if tensor_kernel(format_of(name, 1, dim, dim, page_size), dtype):
                    yield Point("prefill_cached" if point.queries else "decode", point.id, partial(check_attention, point))


def _latent_points(long: bool) -> Iterator[Point]:
    pieces = itertools.cycle((0, 3))
    for name, (group, mode) in itertools.product(
        LATENT_TENSOR, itertools.product((1, 8, 16, 20), MODES) if long else ((5, "list"), (20, "window"), (16, "dense"))
    ):
        dtype, small = torch.float16 if name == "fp16" else torch.bfloat16, small_page(name)
        for page_size in (small, 2 * small, 256) if long else (2 * small,):
            a = Attention(name, group, mode, 576, 512, True, page_size, shards=1 + group % 2, dtype=dtype, num_splits=next(pieces))
            chunk = replace(a, group=max(1, group // 3), mode="window", queries=3)
            for point in (a, chunk) if long or group == 5 else (a,):
                if tensor_kernel(format_of(name, 1, 576, 512, page_size, True), dtype):
                    yield Point("prefill_cached" if point.queries else "decode", point.id, partial(check_attention, point))


def _list_half(case) -> torch.Tensor:
    """Every second used column of each table, in any order, among -1; the pages that are not listed become NaN."""
    generator = torch.Generator().manual_seed(7)
    N, _, columns = case.block_table.shape
    listed = torch.full((N, 1, columns), -1, dtype=torch.int32)
    for n in range(N):
        used = -(-int(case.seqlens[n, 0]) // case.fmt.page_size)
        order = torch.randperm(used, generator=generator)
        kept = order[: -(-used // 2)]
        listed[n, 0, torch.randperm(columns, generator=generator)[: len(kept)]] = kept.int()
        case.pages[case.block_table[n, 0, order[len(kept) :]].long()] = 0xFF
    return listed


def check_attention(a: Attention, op: Callable, device: str, tolerance: tuple[float, float] = (OUT, LSE)) -> float:
    case, options = make_attention(a)
    there = lambda x: None if x is None else x.to(device)  # noqa: E731
    cache = [there(x) for x in (case.pages, case.block_table, case.seqlens)]
    tail = [there(case.extra.get(name)) for name in ("tail", "tail_rows")]
    layout, scale, window = library.layout(case.fmt), case.fmt.k_dim**-0.5, options.get("window", 0)
    if a.queries:
        return _check_queries(a, case, op("prefill_cached"), there, cache, tail, (*layout, scale, window, True, a.num_splits), tolerance)
    out, lse, page_lse = op("decode")(
        there(case.q), *cache, there(case.q_positions), there(options.get("page_list")), *tail, *layout, scale, window, True, a.num_splits,
        *([options["block_size"]] if a.mode == "blocks" else []),
    )  # fmt: skip
    expected = answer(case, with_page_lse=True, **options)
    compare_lse(lse.cpu(), expected[1], tolerance[1], "lse")
    compare_lse(page_lse.cpu(), expected[2], tolerance[1], "page lse")
    return compare(out.cpu(), expected[0], tolerance[0], "out")


def _check_queries(a, case, op, there, cache, tail, rest, tolerance) -> float:
    """Causal, from positions inside what is stored."""
    generator = torch.Generator().manual_seed(1)
    R, T = case.q.shape[0], a.queries
    q = torch.randn(R, T, *case.q.shape[1:], generator=generator).to(a.dtype)
    asked = ((case.q_positions * 3 // 4).unsqueeze(1) + torch.arange(T)).int()
    out, lse = op(there(q), *cache, there(asked), *tail, *rest)
    worst = 0.0
    for t in range(T):
        single = replace(case, q=q[:, t], q_positions=asked[:, t])
        expected = answer(single, window=rest[-3], causal=True)
        compare_lse(lse[:, t].cpu(), expected[1], tolerance[1], f"lse of query {t}")
        worst = max(worst, compare(out[:, t].cpu(), expected[0], tolerance[0], f"out of query {t}"))
    return worst
