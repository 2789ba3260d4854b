"""What a rank reports about its cache, as plain numbers; and the formulas that the byte counters are checked against."""

from __future__ import annotations

from dataclasses import asdict

from pikv_ds import ops
from pikv_ds.exchange.answers import answer_bytes
from pikv_ds.exchange.wire import ALIGN, HEADER
from pikv_ds.ops.build import load
from pikv_ds.ops.format.kernels import decode_tier
from pikv_ds.selection.page_news import PLACES
from pikv_ds.spec import LayerSpec

from .cache import PiKVCache
from .units import unit_bytes


def stats(cache: PiKVCache, dense_rows: int, dense_columns: int) -> dict:
    """Plain numbers of this rank, bytes from storage sizes. With budgets per head an entry is the K and V of one kv head.

    Args: dense_rows, dense_columns: the batch and the token columns (padding included) that the ordinary cache would hold on this rank.
    entries_read and entries_visible are None where every query reads everything. ops_passed_over: why a faster implementation of the ops
    does not serve, empty when the preferred one does. attention_kernel: the implementation, on a CPU with its kernel. rebalance_*: only
    where shards move, see pikv_ds/migration/moves.py; forwards_routed, forwards_everywhere, outline_bytes: only with a router of pages and
    routing.exchange "routed"; offload_*: only with tiers, see pikv_ds/tiers/offload.py. Sync: reads the device.
    """
    pages, exchange = cache.pages, cache.exchange
    counters = pages.counters
    expired, spilled_here, spilled = counters.device_counts.tolist()
    by_shard = pages.directory.load.sum(0).tolist() if cache.num_shards > 1 else [int(pages.entries_live)]
    load_per_rank = [0] * exchange.size
    for shard, entries in enumerate(by_shard):
        for rank in pages.map.holders[shard]:
            load_per_rank[rank] += entries
    return {
        "kv_bytes_allocated": sum(s.nbytes for s in (*pages.all_pools, *([] if cache.bases is None else [cache.bases])))
        + pages.parked.tail_nbytes,
        "kv_bytes_live": sum(s.live_nbytes for s in pages.all_pools) + pages.parked.live_nbytes,
        "kv_bytes_parked": pages.parked.nbytes,
        "kv_bytes_dense": sum(dense_bytes(spec, dense_rows, dense_columns, cache.dtype.itemsize) for spec in cache.layers),
        "metadata_bytes": metadata_bytes(cache),
        "entries_live": int(pages.entries_live),
        "entries_appended": int(counters.by_expert.sum()) * pages.heads,
        "entries_expired": expired,
        "entries_evicted": int(counters.evicted),
        "entries_cropped": counters.cropped,
        "entries_forked": counters.forked,
        "entries_loaded": counters.loaded,
        "entries_read": None if cache.selection is None else float(cache.selection.entries[0]),
        "entries_visible": None if cache.selection is None else float(cache.selection.entries[1]),
        "exchange_bytes_sent": exchange.bytes_sent,
        "exchange_collectives": exchange.collectives,
        "load_per_rank": load_per_rank,
        "load_per_expert": counters.by_expert.tolist(),
        "spilled": spilled_here,
        "spilled_group": spilled,
        "rows_parked": pages.parked.num_rows,
        "requests": cache.agreement.mode,
        "attention_impl": attention_impl(cache),
        "attention_kernel": load.kernel(cache.device.type),
        "ops_passed_over": load.passed_over(cache.device.type),
        **_of_routes(cache),
        **_of_moves(cache),
        **({} if cache.offload is None else cache.offload.numbers(cache.pages.all_pools)),
    }


def _of_routes(cache: PiKVCache) -> dict[str, int]:
    """Of queries that could go only to the ranks whose pages they read (routing.exchange "routed"); nothing where none can."""
    routes = None if cache.selection is None else cache.selection.routes
    if routes is None:
        return {}
    everywhere, routed = routes.forwards
    return {"forwards_routed": routed, "forwards_everywhere": everywhere, "outline_bytes": routes.nbytes}


def _of_moves(cache: PiKVCache) -> dict[str, int | float]:
    """Of shards that move between ranks; nothing where none has moved and none would."""
    migration = cache.migration
    if cache.config.storage.rebalance is None and not migration.progress.started:
        return {}
    numbers = {f"rebalance_{name}": value for name, value in asdict(migration.progress).items()}
    if migration.pages.map.copied:
        numbers["entries_copied"] = migration.pages.counters.copied
    return numbers | {"rebalance_under_way": int(migration.wanted is not None), "rebalance_bytes_held": migration.nbytes}


def metadata_bytes(cache: PiKVCache) -> int:
    """Bytes on the device that a cache keeps between forwards besides KV bytes. Weights of codecs, routers and policies are not among them:
    they do not grow with what is stored."""
    owners = (cache.pages, cache.selection, *cache.reader.watching)
    return sum(owner.metadata_nbytes for owner in owners if owner is not None)


def dense_bytes(spec: LayerSpec, rows: int, columns: int, itemsize: int) -> int:
    """Bytes the ordinary (Hugging Face DynamicCache) layer holds: every column, padding included; W - 1 columns in a window layer."""
    return rows * spec.dense_bytes(columns, itemsize)


def attention_impl(cache: PiKVCache) -> str:
    """Which code reads the pages, and their format: "pikv cpu int8", "pikv torch fp32"; "pikv cpu fp32+int4" with several pools. On a GPU
    also the tier of its kernels for queries of the model's dtype: "pikv cuda (tensor cores) int8".

    torch also where some layer holds un-rotated keys (pages/unrotated.py).
    """
    code = "torch" if any(pool.reader.rebuilds for pool in cache.pages.all_pools) else load.ensured(cache.device.type)
    pools = cache.blueprint.pages.layers[0].pools
    if code in ("cuda", "nvrtc"):
        code += f" ({', '.join(dict.fromkeys(decode_tier(pool.fmt, cache.dtype) for pool in pools))})"
    formats = [pool.fmt.name for pool in pools]
    return f"pikv {code} {'+'.join(formats)}"


def share_bytes(num_tokens: int, num_q_heads: int, spec: LayerSpec, q_dim: int, itemsize: int, lse: int = 0) -> int:
    """Bytes of one rank's record [q | k | v | expert ids | positions]: the first collective of a layer, distinct requests.

    lse: bytes of the last layer's lse, which come along when a policy watches it.
    """
    values = [num_tokens * 4, num_tokens * num_q_heads * q_dim * itemsize, *[lse] * (lse > 0)]
    values += [num_tokens * spec.num_kv_heads * d * itemsize for d in (spec.k_dim, spec.stored_v_dim)]
    return _sections([*values, num_tokens * 4])


def merge_bytes(num_tokens: int, num_q_heads: int, v_dim: int) -> int:
    """Bytes of one rank's record of partials [out | lse] in f32: the one collective of a layer, replicated requests."""
    lse = num_tokens * num_q_heads * 4
    return _sections([lse * v_dim, lse])


def partial_bytes(num_tokens: int, num_q_heads: int, v_dim: int) -> int:
    """Bytes of (out, lse) of `num_tokens` queries in f32: one block of the second collective."""
    return num_tokens * num_q_heads * (v_dim + 1) * 4


def needed_bytes(num_blocks: int, num_q_heads: int, num_kv_heads: int, v_dim: int) -> int:
    """Bytes of the second collective with routing.exchange "needed": num_blocks = pairs of another rank's query and a kv head of which this
    rank has read something (with a router of shards, of whose shards it has one)."""
    return num_blocks * partial_bytes(1, num_q_heads // num_kv_heads, v_dim)


def routed_bytes(
    num_tokens: int, num_queries: int, num_entries: int, num_q_heads: int, spec: LayerSpec, q_dim: int, itemsize: int, num_shards: int, *,
    ids: bool = True,
) -> int:  # fmt: skip
    """Bytes of one message of the first collective with routing.exchange "routed": what one rank sends to another. Their sizes differ.

    num_tokens: of the largest rank, whose expert ids go to all; ids False: entries may spill, so these were gathered before. num_queries
    read something on the other rank, num_entries are stored there.
    """
    queries = [num_q_heads * q_dim * itemsize, num_shards]
    entries = [width for width in (spec.num_kv_heads * d * itemsize for d in (spec.k_dim, spec.stored_v_dim)) if width]
    return ops.route_bytes([4] * ids, [(num_queries, queries), (num_entries, entries)], num_tokens)


def routed_pages_bytes(
    num_tokens: int, num_units: int, num_entries: int, num_q_heads: int, num_kv_heads: int, spec: LayerSpec, q_dim: int, itemsize: int
) -> int:
    """The same with a router of pages that kv heads choose for themselves, in a decode step whose queries go only to the ranks that they
    read. num_units: pairs of a query and a kv head that read something on the other rank; each brings the key of its last page."""
    units = [num_q_heads // num_kv_heads * q_dim * itemsize, 8]
    entries = [width for width in (spec.num_kv_heads * d * itemsize for d in (spec.k_dim, spec.stored_v_dim)) if width]
    return ops.route_bytes([unit_bytes(num_kv_heads)], [(num_units, units), (num_entries, entries)], num_tokens * num_kv_heads)


def answered_bytes(num_units: int, num_news: int, q_heads_per_unit: int, v_dim: int, summary_bytes: int) -> int:
    """Bytes of one message of the second collective with routing.exchange "routed" and a router of pages: partials of num_units, and
    num_news pages (or blocks) that the other rank is told of, summary_bytes each and where they lie."""
    return answer_bytes(num_units, partial_bytes(1, q_heads_per_unit, v_dim), num_news, 4 * PLACES + summary_bytes)


def choice_bytes(num_queries: int, num_kv_heads: int, width: int) -> int:
    """Bytes of one rank's best page keys: the collective that chooses pages over all ranks; width: most pages that a query can get."""
    return num_queries * num_kv_heads * width * 8


def decode_bytes_sent(
    mode: str,
    rows: list[int],
    rank: int,
    num_q_heads: int,
    layers: list[LayerSpec],
    itemsize: int,
    watched: list[bool] | None = None,
) -> int:
    """Bytes one rank sends in a decode step of one token per row; `rows` per rank (replicated: the same batch everywhere).

    watched: per layer, a policy looks at its attention; with distinct requests its lse rides in the next record, the last one's alone.
    """
    others = len(rows) - 1
    if mode == "replicated":
        return sum(others * merge_bytes(rows[rank], num_q_heads, spec.v_dim) for spec in layers)
    total, lse = 0, [max(rows) * num_q_heads * 4 * seen for seen in watched or [False] * len(layers)]
    for spec, of_last_layer in zip(layers, [0, *lse], strict=False):
        total += others * share_bytes(max(rows), num_q_heads, spec, spec.k_dim, itemsize, lse=of_last_layer)
        total += partial_bytes(sum(rows) - rows[rank], num_q_heads, spec.v_dim)
    return total + (others * _sections([lse[-1]]) if lse[-1] else 0)


def _sections(sizes: list[int]) -> int:
    end = HEADER * 4
    for size in sizes:
        end = -(-end // ALIGN) * ALIGN + size
    return -(-end // ALIGN) * ALIGN
