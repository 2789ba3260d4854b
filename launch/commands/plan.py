"""`pikv plan`: KV bytes per rank of a model before running it; or where experts and their KV should lie, from their loads."""

from __future__ import annotations

import argparse
from itertools import groupby
from typing import TYPE_CHECKING, Any

from pikv_ds.errors import ConfigError
from pikv_ds.launch.output import human_bytes, print_table, write_json

from . import _plan_model as plan_model
from . import _plan_placement as plan_placement
from . import _plan_simulate as plan_simulate
from . import _plan_tiers as plan_tiers

if TYPE_CHECKING:
    from pikv_ds.codecs.table import CodecTable

_BYTES_COLUMNS = {
    "layer_kind": "layer kind",
    "layers": "layers",
    "values_per_token": "values",
    "tokens_kept": "tokens",
    "dense_bytes": "dense",
    "pikv_balanced_bytes": "balanced",
    "pikv_worst_bytes": "worst",
}
_PAPER_COLUMNS = {"layer_kind": "layer kind", "paper_k": "K", "paper_s_star": "S*", "paper_m_star_bytes": "M*"}


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("plan", help="KV bytes per rank from a model's configuration")
    parser.add_argument("--model", metavar="PATH", help="model folder or config.json (default: the bundled model)")
    parser.add_argument(
        "--context",
        type=_contexts,
        metavar="N[,N...]",
        help="tokens per request; with --requests distinct also a list, one length per rank; needed but with --placement",
    )
    parser.add_argument(
        "--ranks", type=_contexts, required=True, metavar="G", help="ranks of the expert-parallel group; with --simulate also a list"
    )
    parser.add_argument("--batch", type=_positive, default=1, metavar="B", help="requests per rank (default 1)")
    parser.add_argument("--requests", choices=("replicated", "distinct"), default="replicated")
    parser.add_argument(
        "--codec", default="none", metavar="NAME|JSON", help="compression.method, see `pikv methods`, or the compression block"
    )
    parser.add_argument("--page-size", type=_positive, metavar="N", help="tokens per page (default: the codec's)")
    parser.add_argument("--num-shards", type=_positive, metavar="N", help="shards per layer (default: ranks)")
    parser.add_argument("--dtype", choices=plan_model.DTYPES, help=f"of keys and values (default: the model's, or {plan_model.ASSUMED})")
    parser.add_argument(
        "--kept-pages",
        type=_positive,
        metavar="K",
        help="K of the paper's formulas: pages of a request that the scheduler keeps (default: all of them)",
    )
    parser.add_argument(
        "--tiers",
        type=plan_tiers.tiers,
        metavar="NAME=GIB@GB_PER_S,...",
        help="memory for KV per rank, fastest first, with its bandwidth: also print FlexGen's placement of the balanced bytes, and the "
        "block that runs it; 'measure' for a bandwidth that is measured here, a folder for that of files in it "
        "(device=2@measure,disk=200@/nvme)",
    )
    plan_placement.add_arguments(parser)
    plan_simulate.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if args.simulate is not None:
        write_json(args.json, "plan", plan_simulate.run(args))
        return 0
    if len(args.ranks) > 1:
        raise ConfigError(f"--ranks has {len(args.ranks)} numbers of ranks; legal is one, or a list with --simulate")
    (args.ranks,) = args.ranks
    if args.placement is not None:
        write_json(args.json, "plan", plan_placement.run(args))
        return 0
    if args.context is None:
        raise ConfigError("--context is not given: legal is a number of tokens, or --placement FILE for a plan of experts")
    rows = plan_rows(args)
    total = rows[-1]
    print_table(
        f"KV bytes of the fullest of {args.ranks} ranks, {args.requests} requests, batch {args.batch}, "
        f"{total['dtype']}, codec {args.codec}, pages of {total['page_size']}",
        [_shown(row, _BYTES_COLUMNS) for row in rows],
    )
    if total["dtype_assumed"]:
        print(f"The model's configuration has no dtype: {total['dtype']} is assumed, --dtype says otherwise.")
    print(
        "values: numbers per token of one layer; tokens: those kept of the longest request.\n"
        "balanced: shards equally full; worst: each filled to the default capacity, ceil(1.1 x share) + one page.\n"
        "Both count whole pages and 4 bytes of position per slot; slabs may add up to 1 / 32."
    )
    print_table("The PiKV paper's memory model, for one request", [_shown(row, _PAPER_COLUMNS) for row in rows])
    print(
        "S* = sqrt(L/(K G)) tokens, M* = (4d/rho) sqrt(K L/G) bytes per rank: L tokens, G ranks,\n"
        "2d numbers per token, rho the codec's factor, K pages kept by the scheduler (--kept-pages; all by default).\n"
        "The model is of fixed circular buffers (section 3.1); this store does not allocate by it."
    )
    if args.tiers is not None:
        tiers = plan_tiers.tier_rows(total["pikv_balanced_bytes"], total["layers"], args.tiers)
        plan_tiers.show(tiers)
        rows += tiers
    write_json(args.json, "plan", rows)
    return 0


def _shown(row: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    return {title: human_bytes(row[key]) if key.endswith("_bytes") and row[key] is not None else row[key] for key, title in columns.items()}


def plan_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per kind of layer and a total; bytes are of the fullest rank."""
    given = plan_model.read(args)
    per_rank = _per_rank_contexts(args)
    context = {
        "batch": args.batch, "codec": args.codec, "dtype": given.dtype, "dtype_assumed": given.dtype_assumed, "page_size": given.page_size,
    }  # fmt: skip
    by_kind = sorted(given.layers, key=_kind)
    groups = [(kind, list(layers)) for kind, layers in groupby(by_kind, key=_kind)]
    try:
        rows = [_row(kind, layers, per_rank, context, given.codec, args) for kind, layers in groups]
    except ValueError as error:
        raise ConfigError(f"--codec {args.codec}: {error}") from None
    total = {key: sum(row[key] for row in rows) for key in rows[0] if key == "layers" or key.endswith("_bytes")}
    return [*rows, {**dict.fromkeys(rows[0]), "layer_kind": "total", **total, **context}]


def _row(kind: str, layers: list, per_rank: list[list[int]], context: dict, codec: CodecTable, args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from pikv_ds.pages import estimate

    layer, dtype, page_size = layers[0], getattr(torch, context["dtype"]), context["page_size"]
    itemsize = dtype.itemsize
    stored = per_rank[0] if args.requests == "replicated" else [n for contexts in per_rank for n in contexts]
    made = estimate.pikv_bytes(layers, stored, ranks=args.ranks, codec=codec, page_size=page_size, dtype=dtype, num_shards=args.num_shards)
    tokens = layer.tokens_kept(max(stored))
    kept_pages = args.kept_pages or estimate.max_pages(tokens, page_size)
    rho = layer.values_per_token * itemsize / codec.pool(layer, page_size, dtype).fmt.bytes_per_token
    least = estimate.paper_min_bytes(layer, tokens, kept_pages, args.ranks, itemsize=itemsize, rho=rho)
    return {
        "layer_kind": kind,
        "layers": len(layers),
        "values_per_token": layer.values_per_token,
        "tokens_kept": tokens,
        "dense_bytes": max(estimate.dense_bytes(layers, contexts, itemsize) for contexts in per_rank),
        "pikv_balanced_bytes": made.balanced,
        "pikv_worst_bytes": made.worst,
        "paper_k": kept_pages,
        "paper_s_star": round(estimate.paper_shard_capacity(tokens, kept_pages, args.ranks), 2),
        "paper_m_star_bytes": round(least * len(layers)),
        **context,
    }


def _kind(layer) -> str:
    window = "full" if layer.window is None else f"sliding {layer.window}"
    return f"{window} latent {layer.k_dim}" if layer.latent else f"{window} {layer.num_kv_heads}x({layer.k_dim}+{layer.v_dim})"


def _per_rank_contexts(args: argparse.Namespace) -> list[list[int]]:
    lengths = args.context
    if len(lengths) > 1 and (args.requests == "replicated" or len(lengths) != args.ranks):
        raise ConfigError(f"--context has {len(lengths)} lengths; legal is one, or one per rank ({args.ranks}) with --requests distinct")
    lengths = lengths * args.ranks if len(lengths) == 1 else lengths
    return [[length] * args.batch for length in lengths]


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not legal; give an integer >= 1")
    return value


def _contexts(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]
