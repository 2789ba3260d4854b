"""csrc/kernels/params.cuh and include/page_format.h for Python: the arguments of a kernel as bytes. tests/ops compares the layouts."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int, c_longlong, c_ulonglong, c_void_p
from functools import cache

import torch
from torch import Tensor

from pikv_ds.ops.format.formats import PageFormat

FLOAT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
BOUND_TYPES = FLOAT_TYPES | {torch.int8: 3}


class PageRecord(ctypes.Structure):
    _fields_ = [
        *((name, c_int) for name in ("format", "v_format", "num_kv_heads", "k_dim", "v_dim", "page_size", "group", "latent")),
        *((name, c_int) for name in ("k_coded", "k_row_bytes", "v_row_bytes")),
        *((name, c_longlong) for name in ("k", "v", "k_scale", "k_zero", "v_scale", "v_zero", "rope")),
        *((name, c_longlong) for name in ("head_bytes", "positions", "record_bytes")),
    ]


class Index(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("wide", c_int)]


class Attend(ctypes.Structure):
    _fields_ = [
        ("f", PageRecord),
        ("pages", c_void_p),
        *((name, Index) for name in ("table", "seqlens", "asked", "list", "tail_rows")),
        *((name, c_void_p) for name in ("tail", "q", "out", "lse", "part_out", "part_lse", "page_lse")),
        *((name, c_int) for name in ("tail_type", "q_type", "R", "T", "S", "H", "G", "max_pages", "num_columns", "block", "blocks")),
        *((name, c_int) for name in ("unit", "workers", "splits", "least", "tail_parts")),
        *((name, c_int) for name in ("table_heads", "seqlen_heads", "list_heads", "tail_heads", "window", "causal")),
        ("scale", c_float),
    ]


class Merge(ctypes.Structure):
    _fields_ = [*((name, c_void_p) for name in ("out", "lse", "merged", "merged_lse")), ("rows", c_longlong), ("S", c_int), ("D", c_int)]


class Append(ctypes.Structure):
    _fields_ = [
        ("f", PageRecord),
        *((name, c_void_p) for name in ("pages", "tail", "k", "v")),
        *((name, Index) for name in ("positions", "slots", "tail_rows")),
        *((name, c_int) for name in ("T", "type", "tail_type")),
    ]


class Migrate(ctypes.Structure):
    _fields_ = [("target", c_void_p), ("source", c_void_p), ("target_ids", Index), ("source_ids", Index), ("record_bytes", c_longlong)]


class PageBounds(ctypes.Structure):
    _fields_ = [
        ("f", PageRecord),
        *((name, c_void_p) for name in ("pages", "bounds", "tail")),
        *((name, Index) for name in ("slots", "tail_rows")),
        *((name, c_int) for name in ("T", "type", "tail_type", "block")),
    ]


class PageScore(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("q", "width", "bounds")),
        *((name, Index) for name in ("table", "seqlens")),
        ("scores", c_void_p),
        *((name, c_int) for name in ("q_type", "bounds_type", "S", "H", "G", "D", "max_pages", "page_size")),
        *((name, c_int) for name in ("bound_heads", "table_heads", "seqlen_heads")),
        ("scale", c_float),
    ]


class PackedField(ctypes.Structure):
    _fields_ = [
        ("data", c_void_p),
        *((name, c_longlong) for name in ("rows", "row_bytes", "offset", "stride", "num_packed")),
        ("padding", c_ulonglong),
    ]


class Packed(ctypes.Structure):
    _fields_ = [("buffer", c_void_p), ("index", Index), ("fields", PackedField * 16)]


class AssignSlots(ctypes.Structure):
    _fields_ = [
        *(
            (name, c_void_p)
            for name in ("counts", "table", "free_stack", "free_top", "refcount", "rows", "shard", "here", "slots", "tables")
        ),
        *((name, c_int) for name in ("N", "R", "S", "max_pages", "page_size", "may_open")),
    ]


class RouteField(ctypes.Structure):
    _fields_ = [
        ("data", c_void_p),
        *((name, c_longlong) for name in ("rows", "row_bytes", "start")),
        ("padding", c_ulonglong),
        ("group", c_int),
    ]


class Route(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("buffer", "need", "tokens", "counts")),
        ("most", c_longlong),
        ("token_start", c_longlong * 4),
        ("fields", RouteField * 8),
        *((name, c_int) for name in ("G", "N", "K", "num_fields")),
    ]


class RouteMerge(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("partials", "need", "out", "lse")),
        *((name, c_int) for name in ("G", "N", "H", "D")),
        ("order", c_int * 256),
    ]


class Checksum(ctypes.Structure):
    _fields_ = [("words", c_void_p), ("count", c_longlong), ("result", c_void_p)]


def page_record(fmt: PageFormat) -> PageRecord:
    head = fmt.head
    return PageRecord(
        fmt.code, fmt.v_traits.code, fmt.num_kv_heads, fmt.k_dim, fmt.v_dim, fmt.page_size, fmt.group, fmt.latent,
        fmt.k_coded, fmt.k_row_bytes, fmt.v_row_bytes,
        head.k, head.v, head.k_scale, head.k_zero, head.v_scale, head.v_zero, head.rope, head.end, fmt.positions_offset, fmt.record_bytes,
    )  # fmt: skip


def index(x: Tensor | None) -> Index:
    """int32 or int64 integers; None = not given."""
    return Index(None, 0) if x is None else Index(x.data_ptr(), x.dtype == torch.int64)


def address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


@cache
def padding(dtype: torch.dtype) -> int:
    """-1 in this dtype, repeated to 8 bytes."""
    return int.from_bytes(torch.full((8 // dtype.itemsize,), -1, dtype=torch.int64).to(dtype).view(torch.uint8).numpy().tobytes(), "little")
