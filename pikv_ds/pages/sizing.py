"""Host-side sizes: how much a shard may hold, how many pages a forward may open. No tensors of the device."""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

from pikv_ds.errors import CapacityError
from pikv_ds.spec import LayerSpec


def default_capacity(entries: int, num_shards: int, page_size: int) -> int:
    """Of a layer's `entries`, those one shard may hold when storage.capacity_tokens is null: ceil(1.1 x the balanced share) + one page.

    In integers: 1.1 * 50 is 55.00000000000001 in floating point, and its ceil one too many.
    """
    return -(-11 * entries // (10 * num_shards)) + page_size


def shard_capacity(
    layers: list[LayerSpec],
    window: int | None,
    lens_after: list[int],
    num_shards: int,
    page_size: int,
    fixed: int | None,
    evicted: int = 0,
) -> int:
    """Entries one shard of a layer with this window may hold: `fixed`, or `default_capacity`.

    evicted: entries of the rows that a budget has taken out of the layer.

    Raises: CapacityError when even perfectly balanced shards cannot hold the live tokens.
    """
    spec = next(spec for spec in layers if spec.window == window)
    total = sum(spec.tokens_kept(n) for n in lens_after) - evicted
    if fixed is None:
        return default_capacity(total, num_shards, page_size)
    if total > fixed * num_shards:
        raise CapacityError(
            f"layer {spec.layer_idx} must hold {total} entries, but pikv.storage.capacity_tokens = {fixed} x {num_shards} shards "
            f"is {fixed * num_shards}; raise capacity_tokens to at least {ceil(total / num_shards)}, add ranks, or set it to null"
        )
    return fixed


def held_pages(spec: LayerSpec, tokens: int, *, rows: int, shards: int, heads: int, page_size: int, capacity: int) -> tuple[int, int]:
    """Most pages of a layer, and most of one of its tables, while rows grow to `tokens` tokens each, one token at a time.

    Args: shards of this rank, whichever the tokens go to; capacity: tokens that one of them may hold.
    """
    live, ends = (tokens, 1) if spec.window is None else (min(tokens, spec.window), 2)  # a window leaves its first page partly empty, too
    spare = ends * (page_size - 1)  # empty slots of a table
    by_row = rows * ((live + shards * spare) // page_size)
    by_shard = shards * ((capacity + 1 + rows * spare) // page_size)  # of one head a shard may hold one more
    return heads * min(by_row, by_shard), (live + spare) // page_size


def light_pages(ratio: float, tokens: int, page_size: int) -> int:
    """Full pages of a request of `tokens` that may stay in the light codec of two (codecs/adaptive.py)."""
    return int(ratio * tokens) // page_size


def pages_to_open(counts: Tensor, new_tokens: Tensor, room: Tensor | None, page_size: int) -> int:
    """Upper bound of the pages one forward can open in a layer on this rank.

    Args: counts [R, S] int64 host, entries per row and local shard; new_tokens [R] int64 host, entries each row may store;
        room [S] int64 host, entries each local shard may still take, or None when nothing bounds it.
    """
    num_shards = counts.shape[1]
    free_slots = -counts % page_size  # [R, S] unused slots of open pages
    if num_shards == 1:
        by_row = int(((new_tokens - free_slots[:, 0]).clamp_min(0) + page_size - 1).div(page_size, rounding_mode="floor").sum())
    else:
        startable = torch.minimum(torch.full_like(new_tokens, num_shards), new_tokens)
        by_row = int((startable + new_tokens // page_size).sum())
    if room is None:
        return by_row
    writers = int((new_tokens > 0).sum())
    by_room = sum(int(r) // page_size + min(writers, int(r)) for r in room.clamp_min(0).tolist())
    return min(by_row, by_room)
