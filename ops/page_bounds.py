"""Smallest and largest key of each page, kept beside the pages."""

from __future__ import annotations

from torch import Tensor

from pikv_ds.ops.format.formats import PageFormat

from .library import OPS


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
    """Take the entries that `append` has just written into the bounds of their pages, in place. Other pages are not touched.

    bounds[page, h, 0] <= every key of the page as `decode` reads it <= bounds[page, h, 1], per channel

    Args:
        bounds: [num_pages, fmt.num_kv_heads, 2, Dk] f32, bf16 or fp16, changed; minima, then maxima, rounded away from the keys. What it
            holds at first does not matter: an entry in the first slot of a page starts that page anew. Or int8 [..., Dk + 2], see
            format/bound_codes.py: the box of a page is then made from all its keys, from the first slot to the last new one.
        pages, slot_mapping, tail, tail_rows: those of the `append` call, after it. -1 = not stored here.
        block_size: tokens with bounds of their own, 0 = a page, as in `decode`. Bounds then are [num_pages * blocks, ...], those of block b
            of page p at p * blocks + b: the slot // block_size. They are made from all keys of the block, whatever the dtype, so
            `page_score` reads them with a table of these numbers and block_size for a page size.

    int8 and int4: an entry of the open group is read raw from the tail; when its group is full, the bounds also take in the group's codes.
    Bounds other than int8 only widen until a page starts anew, so after a crop they may be wider than need be. Pages that are copied bring
    theirs along: `migrate` works on bounds.view(torch.uint8).flatten(1).

    Sync: none in compiled versions. Cost: reads each new key once, a group once more when it is full; with int8 the whole page.
    Source: Quest, arXiv 2406.10774.
    """
    OPS.page_bounds(bounds, pages, slot_mapping, tail, tail_rows, *fmt.layout, block_size)
