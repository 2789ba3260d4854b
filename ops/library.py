"""The ops of namespace `pikv`: schemas, fake versions, and the torch reference under them.

The reference is registered below every compiled version. Its first call on a device tries to load the compiled one (`on_first_use`), so
nothing is built or read from the environment at import; after that calls go to the compiled kernel without passing here.

Every op takes its record layout as seven arguments, `layout(fmt)`: format, num_kv_heads, k_dim, v_dim, page_size, group, latent.
`format` is the code of K; that of V plus one in bits 4 to 7 where it is another; bit 8: the columns of a latent key beyond v_dim are fp16.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from pikv_ds.ops.format.formats import PageFormat
from pikv_ds.ops.format.kernels import MIXED, ROPE
from pikv_ds.ops.reference.merge_partials import merge_partials

from . import checks
from .devices import one_device
from .reference import append as ref_append
from .reference import attend as ref_attend
from .reference import bounds as ref_bounds
from .reference import choose as ref_choose
from .reference import crc as ref_crc
from .reference import pack as ref_pack
from .reference import pages as ref_pages
from .reference import route as ref_route
from .reference import slots as ref_slots
from .reference import stage as ref_stage

_LAYOUT = "int format, int num_kv_heads, int k_dim, int v_dim, int page_size, int group, bool latent"
_CACHE = "Tensor q, Tensor pages, Tensor block_table, Tensor seqlens"
_TAIL = "Tensor? tail, Tensor? tail_rows"
SCHEMAS = {
    "decode": f"({_CACHE}, Tensor? q_positions, Tensor? page_list, {_TAIL}, {_LAYOUT}, "
    "float scale, int window, bool with_page_lse, int num_splits, int block_size=0) -> (Tensor out, Tensor lse, Tensor page_lse)",
    "prefill_cached": f"({_CACHE}, Tensor q_positions, {_TAIL}, {_LAYOUT}, "
    "float scale, int window, bool causal, int num_splits) -> (Tensor out, Tensor lse)",
    "append": "(Tensor(a!) pages, Tensor(b!)? tail, Tensor k, Tensor v, Tensor positions, Tensor slot_mapping, Tensor? tail_rows, "
    f"{_LAYOUT}) -> ()",
    "merge": "(Tensor out, Tensor lse) -> (Tensor out, Tensor lse)",
    "migrate": "(Tensor(a!) target, Tensor source, Tensor target_ids, Tensor source_ids) -> ()",
    "page_bounds": f"(Tensor(a!) bounds, Tensor pages, Tensor slot_mapping, {_TAIL}, {_LAYOUT}, int block_size=0) -> ()",
    "page_score": "(Tensor q, Tensor bounds, Tensor block_table, Tensor seqlens, Tensor? width, int page_size, float scale) -> Tensor",
    "pack": "(Tensor(a!) buffer, Tensor[] fields, Tensor? index, int[] offsets, int[] strides, int[] rows) -> ()",
    "unpack": "(Tensor buffer, Tensor(a!)[] fields, Tensor? index, int[] offsets, int[] strides) -> ()",
    "assign_slots": "(Tensor(a!) counts, Tensor(b!) block_table, Tensor free_stack, Tensor(c!) free_top, Tensor(d!) refcount, Tensor rows, "
    "Tensor? shard, Tensor? here, int page_size, bool one_per_row, bool may_open) -> (Tensor slot_mapping, Tensor tables)",
    "checksum": "(Tensor data) -> Tensor",
    "route_pack": "(Tensor(a!) buffer, Tensor need, Tensor[] fields, int[] groups, int own, bool dense) -> Tensor",
    "route_unpack": "(Tensor buffer, Tensor(a!)[] fields, Tensor(b!) tokens, Tensor(c!) counts, int[] groups, bool dense) -> ()",
    "route_merge": "(Tensor partials, Tensor need, int[] order, bool dense) -> (Tensor out, Tensor lse)",
}

_STAGING = "Tensor(a!) slot, Tensor(b!) held, Tensor(c!) asked, Tensor(d!) ahead, int first_far"
CPU_SCHEMAS = {
    "choose_pages": "(Tensor score, Tensor hidden, Tensor pinned, Tensor? budget, int width) -> Tensor",
    "stage": f"(Tensor block_table, Tensor page_list, {_STAGING}, int num_near, int clock) -> "
    "(Tensor table, Tensor listed, Tensor left, Tensor coming, Tensor counts)",
    "stage_ahead": f"(Tensor score, Tensor hidden, Tensor block_table, {_STAGING}, int clock, int most) -> (Tensor coming, Tensor count)",
    "gather_sections": "(Tensor(a!) target, Tensor[] source, Tensor records, Tensor coming, int[] begins, int first, "
    "int section_bytes) -> ()",
    "crc32": "(Tensor memory, Tensor at, Tensor? seeds, int size) -> Tensor",
    "read_file": "(Tensor(a!) memory, Tensor to, Tensor at, int file, int size) -> Tensor",
}
"""Compiled for the CPU only; elsewhere the reference runs, which does not wait for a device either."""


def layout(fmt: PageFormat) -> tuple[int, int, int, int, int, int, bool]:
    return fmt.layout


def _format(args: tuple) -> PageFormat:
    return PageFormat.from_layout(args[:7])


def _decode(q, pages, block_table, seqlens, q_positions, page_list, tail, tail_rows, *rest):
    fmt, (scale, window, with_page_lse, _, *block) = _format(rest[:7]), rest[7:]
    block_size = checks.block(fmt, *block)
    checks.attend(q, pages, block_table, seqlens, q_positions, page_list, tail, tail_rows, fmt, window, block_size=block_size)
    out, lse, page_lse = ref_attend.attend(
        q.unsqueeze(1), pages, fmt, block_table, seqlens, scale=scale, window=window, page_list=page_list, tail=tail, tail_rows=tail_rows,
        q_positions=None if q_positions is None else q_positions.unsqueeze(1), with_page_lse=with_page_lse, block_size=block_size,
    )  # fmt: skip
    return out.squeeze(1), lse.squeeze(1), q.new_empty(0, dtype=torch.float32) if page_lse is None else page_lse.squeeze(1)


def _prefill_cached(q, pages, block_table, seqlens, q_positions, tail, tail_rows, *rest):
    fmt, (scale, window, causal, _) = _format(rest[:7]), rest[7:]
    checks.prefill_cached(q, pages, block_table, seqlens, q_positions, tail, tail_rows, fmt)
    out, lse, _ = ref_attend.attend(
        q, pages, fmt, block_table, seqlens,
        scale=scale, window=window, causal=causal, tail=tail, tail_rows=tail_rows, q_positions=q_positions,
    )  # fmt: skip
    return out, lse


def _append(pages, tail, k, v, positions, slot_mapping, tail_rows, *rest):
    fmt = _format(rest)
    checks.append(pages, tail, k, v, positions, slot_mapping, tail_rows, fmt)
    ref_append.append(pages, fmt, k, v, positions, slot_mapping, tail=tail, tail_rows=tail_rows)


def _page_bounds(bounds, pages, slot_mapping, tail, tail_rows, *rest):
    fmt = _format(rest)
    block_size = checks.block(fmt, *rest[7:])
    checks.page_bounds(bounds, pages, slot_mapping, tail, tail_rows, fmt, block_size=block_size)
    ref_bounds.page_bounds(bounds, pages, fmt, slot_mapping, tail=tail, tail_rows=tail_rows, block_size=block_size)


def _page_score(q, bounds, block_table, seqlens, width, page_size, scale):
    checks.page_score(q, bounds, block_table, seqlens, width, page_size)
    return ref_bounds.page_score(q, bounds, block_table, seqlens, page_size=page_size, scale=scale, width=width)


def _choose_pages(score, hidden, pinned, budget, width):
    checks.choose_pages(score, hidden, pinned, budget, width)
    return ref_choose.choose_pages(score, hidden, pinned, budget, width)


def _merge(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    checks.merge(out, lse)
    return merge_partials(out, lse)


def _fake_decode(q, pages, block_table, seqlens, q_positions, page_list, tail, tail_rows, *rest):
    blocks = rest[4] // (rest[11] or rest[4]) if len(rest) > 11 else 1
    columns = block_table.shape[-1] * blocks if page_list is None else page_list.shape[-1]
    page_lse = (block_table.shape[0], q.shape[1], columns) if rest[9] else (0,)
    new = lambda *shape: q.new_empty(shape, dtype=torch.float32)  # noqa: E731
    return new(*q.shape[:2], rest[3]), new(*q.shape[:2]), new(*page_lse)


def _fake_prefill_cached(q, *rest):
    # rest: pages, block_table, seqlens, q_positions, tail, tail_rows, then the layout
    return q.new_empty((*q.shape[:3], rest[9]), dtype=torch.float32), q.new_empty(q.shape[:3], dtype=torch.float32)


def _fake_page_score(q, bounds, block_table, seqlens, width, page_size, scale):
    heads = max(block_table.shape[1], bounds.shape[1])
    return q.new_empty((block_table.shape[0], heads, block_table.shape[2]), dtype=torch.float32)


def _fake_merge(out, lse):
    return out.new_empty(out.shape[1:]), lse.new_empty(lse.shape[1:])


def _fake_route_merge(partials, need, *rest):
    rows = (need.shape[1], partials.shape[1])
    return partials.new_empty((*rows, partials.shape[2] - 1)), partials.new_empty(rows)


def _fake_assign_slots(counts, block_table, free_stack, free_top, refcount, rows, *rest):
    return rows.new_empty(rows.shape, dtype=torch.int32), rows.new_empty(rows.shape, dtype=torch.int32)


def _fake_stage(block_table, page_list, slot, held, *rest):
    table = block_table.new_empty(block_table.shape[0], held.shape[0], block_table.shape[2])
    return table, torch.empty_like(page_list), torch.empty_like(page_list), held.new_empty(held.numel(), 3), held.new_empty(4)


_REFERENCE = {
    "decode": _decode,
    "prefill_cached": _prefill_cached,
    "append": _append,
    "merge": _merge,
    "migrate": ref_pages.migrate,
    "page_bounds": _page_bounds,
    "page_score": _page_score,
    "choose_pages": _choose_pages,
    "stage": ref_stage.stage,
    "stage_ahead": ref_stage.stage_ahead,
    "gather_sections": ref_stage.gather_sections,
    "crc32": ref_crc.crc32,
    "read_file": ref_crc.read_file,
    "pack": ref_pack.pack,
    "unpack": ref_pack.unpack,
    "assign_slots": ref_slots.assign_slots,
    "checksum": ref_pages.checksum,
    "route_pack": ref_route.route_pack,
    "route_unpack": ref_route.route_unpack,
    "route_merge": ref_route.route_merge,
}
REFERENCE = {name: one_device(name, (SCHEMAS | CPU_SCHEMAS)[name], call) for name, call in _REFERENCE.items()}
_FAKE = {
    "decode": _fake_decode,
    "prefill_cached": _fake_prefill_cached,
    "append": lambda *args: None,
    "merge": _fake_merge,
    "migrate": lambda *args: None,
    "page_bounds": lambda *args: None,
    "page_score": _fake_page_score,
    "choose_pages": lambda score, hidden, pinned, budget, width: score.new_empty(
        (*score.shape[:2], min(width, score.shape[2])), dtype=torch.int32
    ),
    "stage": _fake_stage,
    "stage_ahead": lambda score, hidden, table, slot, held, *rest: (held.new_empty(held.numel(), 3), held.new_empty(1)),
    "gather_sections": lambda *args: None,
    "crc32": lambda memory, at, *rest: at.new_empty(at.shape),
    "read_file": lambda memory, to, *rest: to.new_empty(to.shape),
    "pack": lambda *args: None,
    "unpack": lambda *args: None,
    "assign_slots": _fake_assign_slots,
    "checksum": lambda data: data.new_empty((), dtype=torch.int64),
    "route_pack": lambda buffer, need, *rest: need.new_empty(need.shape[1:2], dtype=torch.int64),
    "route_unpack": lambda *args: None,
    "route_merge": _fake_route_merge,
}


def _reference_on_device(name: str):
    """What the CUDA launchers call for a layout they have no kernel for; says so once per layout."""

    def call(*args):
        at = next(i for i, arg in enumerate(args) if type(arg) is int)  # the layout starts here: format, num_kv_heads, k_dim, v_dim, ...
        fmt = _format(args[at : at + 7])
        otherwise = _by_flashinfer(fmt, args) if name == "decode" else None
        if fmt not in _without_kernel:
            _without_kernel.add(fmt)
            runs = "in plain torch, slower" if otherwise is None else "by flashinfer, whose plan stops the host"
            warnings.warn(
                f"pikv: there is no CUDA kernel for {fmt.label} pages with k_dim {fmt.k_dim}, v_dim {fmt.v_dim} (widths up to 128, with "
                f"16-bit queries 192 and 256 too, latent up to 576 and 512, with raw rope columns {', '.join(ROPE)}; mixed: "
                f"{', '.join(MIXED)}): {name} runs {runs}",
                stacklevel=2,
            )
        return REFERENCE[name](*args) if otherwise is None else otherwise()

    return call


_without_kernel: set[PageFormat] = set()


def _by_flashinfer(fmt: PageFormat, args: tuple) -> Callable[[], tuple[Tensor, Tensor, Tensor]] | None:
    """A decode of FlashInfer's, where PIKV_FALLBACK=flashinfer asks for it and the case is its own; else None."""
    wanted = os.environ.get("PIKV_FALLBACK")
    if wanted is None:
        return None
    if wanted != "flashinfer":
        raise ValueError(f"PIKV_FALLBACK={wanted!r} is not known; flashinfer, or unset it")
    from .backends import flashinfer

    q, pages, block_table, seqlens, _, page_list = args[:6]
    scale, window, with_page_lse, _, *block = args[15:]
    refused = flashinfer.refusal(fmt, q.dtype, window=window, with_page_lse=with_page_lse)
    if refused is not None or checks.block(fmt, *block) != fmt.page_size:
        return None
    options = {"scale": scale, "page_list": page_list}
    return lambda: (*flashinfer.decode(q, pages, fmt, block_table, seqlens, **options), q.new_empty(0, dtype=torch.float32))


def on_first_use(device: str) -> bool:
    """Load compiled ops for a device type; True when they have just been loaded. build/load.py puts its `ensure` here."""
    return False


def _fallback(name: str):
    """The kernel below the compiled ones: load those on first use, else run the reference."""

    def call(*args):
        device = next(arg.device.type for arg in args if isinstance(arg, Tensor))
        if on_first_use(device):
            return getattr(torch.ops.pikv, name)(*args)
        return REFERENCE[name](*args)

    return call


_library = torch.library.Library("pikv", "DEF")
for _name, _schema in (SCHEMAS | CPU_SCHEMAS).items():
    _library.define(_name + _schema, tags=(torch.Tag.needs_fixed_stride_order,))
    _library.impl(_name, _fallback(_name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"pikv::{_name}", one_device(_name, _schema, _FAKE[_name]), lib=_library)
for _name in ("decode", "prefill_cached"):
    _library.define(f"{_name}_reference{SCHEMAS[_name]}", tags=(torch.Tag.needs_fixed_stride_order,))
    _library.impl(f"{_name}_reference", _reference_on_device(_name), "CompositeExplicitAutograd")

# The overloads themselves: called per layer and step, and torch.ops.pikv.<name> looks them up anew each time.
OPS = SimpleNamespace(**{name: getattr(torch.ops.pikv, name).default for name in SCHEMAS | CPU_SCHEMAS})

# The same without the overloads' Python: for calls that no compiler traces. They are what an overload hands its arguments on to.
CALLS = SimpleNamespace(**{name: getattr(overload, "_op", overload) for name, overload in vars(OPS).items()})
