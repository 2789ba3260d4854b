"""KV bytes from a model's geometry, without running it: what `pikv plan` prints.

A rank's bytes are counted in whole pages and raw tails. The slabs by which a pool grows are not counted: they may add up to
1 / 32, and one page per layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pikv_ds.spec import LayerSpec

from .pool import tail_dtype
from .sizing import default_capacity, light_pages

if TYPE_CHECKING:
    import torch

    from pikv_ds.codecs.base import Codec
    from pikv_ds.codecs.table import CodecTable


@dataclass(frozen=True, slots=True, kw_only=True)
class RankBytes:
    """KV bytes of the fullest rank."""

    balanced: int
    """Each shard holds an equal share of each request."""
    worst: int
    """Each shard of the rank is filled to the default capacity, in the least favourable pages."""


def dense_bytes(layers: Sequence[LayerSpec], contexts: Sequence[int], itemsize: int) -> int:
    """Bytes of an ordinary cache that holds requests of these lengths on one rank. Sliding-window layers keep W - 1 tokens."""
    return sum(layer.dense_bytes(n, itemsize) for layer in layers for n in contexts)


def max_pages(entries: int, page_size: int, *, requests: int = 1, sliding: bool = False) -> int:
    """Most pages that `entries` entries of `requests` requests can occupy in one layer's shard.

    Entries of a request fill its pages in order, so only its last page is partly empty; in a sliding-window layer,
    where old entries leave from the front, the first page too.
    floor((entries + ends * requests * (page_size - 1)) / page_size), ends = 2 if sliding else 1.
    """
    if entries == 0:
        return 0
    ends = 2 if sliding else 1
    return (entries + ends * min(requests, entries) * (page_size - 1)) // page_size


def pikv_bytes(
    layers: Sequence[LayerSpec],
    contexts: Sequence[int],
    *,
    ranks: int,
    codec: Codec | CodecTable,
    page_size: int,
    dtype: torch.dtype,
    num_shards: int | None = None,
) -> RankBytes:
    """Bytes of the fullest of `ranks` ranks that store these requests together.

    Args:
        contexts: lengths of all requests stored in the group, each once: the batch of one rank when requests are
            replicated, the batches of all ranks when they are distinct.
        dtype: of the model's keys. num_shards: None = `ranks`. The fullest rank holds ceil(num_shards / ranks) shards.

    What a codec keeps per request besides pages counts for all of them, as if one rank ran them.
    A codec with a light one beside it: light_ratio of a request's pages and the page being filled are light; in the worst case all are.
    """
    num_shards = num_shards or ranks
    shards_here = math.ceil(num_shards / ranks)
    balanced = worst = 0
    for layer in layers:
        pool = codec.pool(layer, page_size, dtype)
        far, near = pool.fmt, pool.light if layer.window is None else None
        fmt = far if near is None else near.fmt
        tails = shards_here * len(contexts) * fmt.tail_elements * tail_dtype(dtype).itemsize + len(contexts) * pool.request_bytes
        slides = [layer.tokens_kept(n) < n for n in contexts]
        kept = [layer.tokens_kept(n) for n in contexts]
        pages = sum(max_pages(math.ceil(tokens / num_shards), page_size, sliding=moved) for tokens, moved in zip(kept, slides, strict=True))
        slots = default_capacity(sum(kept), num_shards, page_size)
        full = max_pages(slots, page_size, requests=len(contexts), sliding=any(slides))
        # Rounding up per request can exceed the capacity when requests are shorter than the number of shards.
        light = pages
        if near is not None:
            light = min(pages, sum(math.ceil(light_pages(pool.codec.light_ratio, n, page_size) / num_shards) + 1 for n in kept if n))
        balanced += shards_here * min(pages, full) * far.record_bytes + tails
        balanced += shards_here * min(light, full) * (fmt.record_bytes - far.record_bytes)
        worst += shards_here * full * fmt.record_bytes + tails
    return RankBytes(balanced=balanced, worst=worst)


def paper_shard_capacity(tokens: int, kept_pages: int, ranks: int) -> float:
    """S* = sqrt(L / (K G)): the shard capacity, in tokens, that minimises the PiKV paper's memory model (section 3.1).

    M_kv(S) = (2 d / rho) (L / (G S) + K S), with L tokens, K pages kept by the scheduler, G ranks, d the KV width and
    rho the compression factor. It is the paper's model; this store is not a set of fixed circular buffers.
    """
    return math.sqrt(tokens / (kept_pages * ranks))


def paper_min_bytes(layer: LayerSpec, tokens: int, kept_pages: int, ranks: int, *, itemsize: int, rho: float = 1.0) -> float:
    """M* = M_kv(S*) = (4 d / rho) sqrt(K L / G) numbers of one layer and rank, here in bytes.

    2 d is values_per_token: keys and values together, or the latent once.
    """
    return 2 * layer.values_per_token * itemsize / rho * math.sqrt(kept_pages * tokens / ranks)
