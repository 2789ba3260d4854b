"""New entries into their slots."""

from __future__ import annotations

from torch import Tensor

from pikv_ds.ops.format.formats import PageFormat

from .library import OPS


def append(
    pages: Tensor,
    fmt: PageFormat,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    *,
    tail: Tensor | None = None,
    tail_rows: Tensor | None = None,
) -> None:
    """Encode T entries and write them at their slots, in place.

    Args:
        pages: [num_pages, fmt.record_bytes] uint8, changed.
        k: [T, fmt.num_kv_heads, Dk] f32, bf16 or fp16. v: the same with Dv and of k's dtype (latent: not read).
        positions: [T] int32, stored beside the entry. slot_mapping: [T] int32, page * page_size + offset, -1 = not stored here.
        tail, tail_rows [T]: for int8 and int4, the raw group of each token's table; changed. Within a table tokens come in slot order, so a
            group is encoded, from the tail and from this call, when its last token arrives.

    Sync: none in compiled versions. Cost: writes each entry once, a K group once more when it is full.
    """
    OPS.append(pages, tail, k, v, positions, slot_mapping, tail_rows, *fmt.layout)
