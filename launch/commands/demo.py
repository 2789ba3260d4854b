"""`pikv demo`: the bundled model on expert-parallel ranks, its cache dense and sharded, the same tokens from both."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from itertools import groupby
from pathlib import Path
from typing import Any

SHORTEST_CONTEXT, SHORTEST_REAL = 64, 192


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("demo", help="dense and sharded KV cache side by side on local ranks")
    parser.add_argument("--ranks", type=_positive, default=2, metavar="G", help="expert-parallel ranks (default 2)")
    parser.add_argument("--context", type=_positive, default=1100, metavar="N", help="prompt tokens (default 1100)")
    real = "the real model on its experts' ranks, its question as a chat (python -m pikv_ds.launch.real_model makes it)"
    parser.add_argument("--real", action="store_true", help=real)
    parser.add_argument("--new-tokens", type=_positive, default=24, metavar="N", help="generated tokens (default 24)")


def run(args: argparse.Namespace) -> int:
    from pikv_ds.launch.output import print_table, write_json
    from pikv_ds.launch.ranks import RanksFailed, run_ranks

    _check(args)
    print(f"starting {args.ranks} ranks under deepspeed, experts and KV cache sharded over them", flush=True)
    with tempfile.TemporaryDirectory(prefix="pikv_demo_") as folder:
        result = Path(folder) / "rows.json"
        try:
            words = [str(result), str(args.context), str(args.new_tokens), *([str(_folder(args))] if args.real else [])]
            run_ranks("pikv_ds.launch.jobs.demo", words, args.ranks)
        except RanksFailed as error:
            print(f"pikv demo: {error}", file=sys.stderr)
            return 1
        document = json.loads(result.read_text(encoding="utf-8"))
    rows = document["rows"]
    print(f"\nprompt: {args.context:,} tokens of prose that hide the pass key {document['pass_key']}")
    print(f"question: {document['question']}\nanswer:  {rows[1]['answer']!r}\n")
    title = f"{'Real' if args.real else 'Bundled'} model, {args.ranks} ranks, {args.new_tokens} new tokens"
    print_table(title, [_shown(row) for row in rows])
    print_table("Entries stored, by expert", [line for row in rows for line in _by_expert(row)])
    print(*_conclusions(rows), sep="\n")
    write_json(args.json, "demo", rows)
    return 0 if all(row["tokens_equal"] for row in rows) else 1


def _check(args: argparse.Namespace) -> None:
    from transformers import AutoConfig

    from pikv_ds.launch.evaluation.model_facts import experts_of

    model = AutoConfig.from_pretrained(_folder(args), local_files_only=True)
    longest, shortest = model.max_position_embeddings - args.new_tokens, SHORTEST_REAL if args.real else SHORTEST_CONTEXT
    what, experts = f"the {'real' if args.real else 'bundled'} model", experts_of(model)
    if not shortest <= args.context <= longest:
        raise argparse.ArgumentTypeError(
            f"--context {args.context}: legal with --new-tokens {args.new_tokens} is {shortest} to {longest} (positions of {what})"
        )
    if args.new_tokens < 2:
        raise argparse.ArgumentTypeError(f"--new-tokens {args.new_tokens}: legal is 2 or more (a rate needs two)")
    if experts % args.ranks:
        raise argparse.ArgumentTypeError(
            f"--ranks {args.ranks}: the {experts} experts of {what} are divided over the ranks; legal are the divisors of {experts}"
        )


def _folder(args: argparse.Namespace) -> Path:
    """Raises: FileNotFoundError with the command that makes the real model."""
    from pikv_ds.bundled import model_path
    from pikv_ds.launch.real_model import needed

    return needed("moe") if args.real else model_path()


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": row["name"],
        "context": _runs(row["context_tokens"]),
        "KiB per rank": _runs([round(count / 1024) for count in row["kv_bytes_per_rank"]]),
        "tokens/s": f"{row['tokens_per_s']:.1f}",
        "logit diff": f"{row['max_logit_diff']:.0e}",
        "tokens": "same" if row["tokens_equal"] else "OTHER",
    }


def _by_expert(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"name": row["name"], "rank": rank, "entries": f"{row['entries_per_rank'][rank]:,}", "by expert": _columns(by_expert)}
        for rank, by_expert in enumerate(row["entries_per_expert"])
    ]


def _columns(values: list[int]) -> str:
    return " ".join(str(value) for value in values)


def _runs(values: list[int]) -> str:
    """Equal neighbours once, with their number: the table has 80 columns."""
    counted = [(value, len(list(same))) for value, same in groupby(values)]
    return " ".join(f"{value} x{count}" if count > 1 else str(value) for value, count in counted)


def _conclusions(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for dense, sharded in zip(rows[::2], rows[1::2], strict=True):
        before, after = max(dense["kv_bytes_per_rank"]), max(sharded["kv_bytes_per_rank"])
        lines.append(
            f"{sharded['name']}: the fullest rank holds {after:,} bytes of KV instead of {before:,} "
            f"({after / before:.2f} x), {'the same tokens' if sharded['tokens_equal'] else 'OTHER TOKENS'}"
        )
    return lines


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: legal is a number of at least 1")
    return value
