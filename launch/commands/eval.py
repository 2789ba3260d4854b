"""`pikv eval`: perplexity and recall of a model through the store, on one rank or several, under DeepSpeed or Megatron-Core."""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

from pikv_ds.launch.evaluation.spec import BACKENDS, DEFAULT_TASKS, TASKS


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("eval", help="quality and bytes of a configuration, measured through the store")
    parser.add_argument("--backend", choices=BACKENDS, default="hf", help="hf: transformers, under DeepSpeed on several ranks (default)")
    add_arguments(parser)
    parser.add_argument("--ranks", type=int, default=1, metavar="R", help="ranks to start (default 1)")
    others = "also caches of others, comma-separated: those of pikv baseline --caches (hqq:4, fp8), kvpress:NAME:SHARE kept"
    parser.add_argument("--baseline", metavar="LIST", help=others)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `pikv eval` and the torchrun entry point have in common."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--config", metavar="FILE|JSON", help='the "pikv" block, or a configuration that holds it (default: the defaults)')
    what.add_argument("--sweep", metavar="FILE", help="JSON list of such configurations, measured one after the other")
    tasks = f"comma-separated, of: {', '.join(TASKS)} (default: {', '.join(DEFAULT_TASKS)})"
    parser.add_argument("--tasks", default=",".join(DEFAULT_TASKS), metavar="LIST", help=tasks)
    parser.add_argument("--model", metavar="DIR", help="transformers model folder (default: the bundled model)")
    parser.add_argument(
        "--load", metavar="DIR", help="Megatron checkpoint: weights for --model, or with --tokenizer the model too (backend megatron)"
    )
    parser.add_argument(
        "--tokenizer", metavar="T", help="folder of a transformers tokenizer, or tokenizer.json: the model is what --load's arguments say"
    )
    parser.add_argument("--text", metavar="FILE", help="text to measure on (default: the bundled one)")
    parser.add_argument(
        "--context", type=int, default=1024, metavar="N", help="tokens per window and per prompt with its answer (default 1024)"
    )
    parser.add_argument(
        "--chunk", type=int, metavar="N", help="tokens per forward where it is measured (default: the most that the rules allow, up to 32)"
    )
    before = "tokens per forward before what is measured: faster, and in-chunk attention there is on raw keys (default: as --chunk)"
    parser.add_argument("--prefill-chunk", type=int, metavar="N", help=before)
    parser.add_argument("--scored", type=int, metavar="N", help="tokens of a window that ppl scores, its last ones (default: half of it)")
    parser.add_argument("--plain-prompts", action="store_true", help="prompts as plain text where the model has a chat template, too")
    parser.add_argument("--samples", type=int, default=32, metavar="N", help="windows, and prompts (default 32)")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="samples in the cache at a time (default 8)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="chooses windows and prompts (default 0)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of weights and cache (default float32)"
    )
    parser.add_argument(
        "--requests", choices=("replicated", "distinct"), default="replicated", help="every rank the same samples, or each its share"
    )
    parser.add_argument("--tp", type=int, default=1, metavar="T", help="tensor-parallel ranks (backend megatron; default 1)")
    parser.add_argument("--ep", type=int, metavar="E", help="expert-parallel ranks (default: all; hf with 1: experts whole on every rank)")

    parser.add_argument("--report", metavar="DIR", help="also write report.html and its figures to DIR")


def run(args: argparse.Namespace) -> int:
    from pikv_ds.launch.evaluation.partial import Partial
    from pikv_ds.launch.evaluation.plan import read_spec

    spec, units = read_spec(args)
    with tempfile.TemporaryDirectory(prefix="pikv_eval_") as folder:
        partial = Partial(Path(f"{args.json}.partial" if args.json else f"{folder}/rows.json"))
        todo = partial.unfinished(spec, units)
        if todo:
            status = run_units(spec, todo, partial, Path(folder))
            if status:
                return status
        finish(args, command_line(args, "pikv eval"), spec, Partial(partial.path).rows_of(spec, units))
        partial.remove()
    return 0


def finish(args: argparse.Namespace, command: str, spec: Any, rows: list[dict[str, Any]]) -> None:
    from pikv_ds.launch.evaluation.report import labels, write_report
    from pikv_ds.launch.output import document_of, print_table, write_json

    title = f"{spec.backend}, {spec.ranks} rank(s), tp {spec.tp}, ep {spec.ep}, context {spec.context}, chunk {spec.chunk}, {spec.dtype}"
    print_table(title, [_shown(row, name) for row, name in zip(rows, labels(rows), strict=True)])
    write_json(args.json, command, rows)
    if args.report is not None:
        print(f"report: {write_report(args.report, [document_of(command, rows)])}")


def command_line(args: argparse.Namespace, program: str, given: tuple[str, ...] = ()) -> str:
    """The command that makes these rows again, every option written out but those that `program` gives."""
    skipped = ("command", "run", "json", "report", *given)
    options = [(name, value) for name, value in vars(args).items() if name not in skipped and value is not None and value is not False]
    words = [word for name, value in options for word in (f"--{name.replace('_', '-')}", *([] if value is True else [str(value)]))]
    return " ".join([program, *map(shlex.quote, words)])


def run_units(spec: Any, todo: list, partial: Any, folder: Path) -> int:
    """Measure units of one spec, in this process or on ranks of their own; rows go to the file of `partial`. Returns an exit status."""
    from pikv_ds.errors import UnsupportedError
    from pikv_ds.launch.evaluation.job import evaluate
    from pikv_ds.launch.ranks import RanksFailed, run_ranks

    if spec.backend == "hf" and spec.ranks == 1:
        evaluate(spec, todo, partial, sys.stdout)
        return 0
    spec_file, error_file = folder / "spec.json", folder / "error.txt"
    spec_file.write_text(spec.to_json(todo), encoding="utf-8")
    print(f"starting {spec.ranks} rank(s) under the deepspeed launcher", flush=True)
    try:
        run_ranks("pikv_ds.launch.evaluation.job", [str(spec_file), str(partial.path), str(error_file)], spec.ranks)
    except RanksFailed as error:
        if error_file.is_file():
            raise UnsupportedError(error_file.read_text(encoding="utf-8")) from None
        print(f"pikv eval: {error}", file=sys.stderr)
        return 1
    return 0


def _shown(row: dict[str, Any], name: str) -> dict[str, Any]:
    form = {
        "ppl": ".4f",
        "ppl_change_pct": "+.4f",
        "kl": ".2e",
        "recall": ".3f",
        "bytes_per_token": ",.0f",
        "compression": ".2f",
        "step_ms": ".1f",
    }
    number = {name: None if row[name] is None else format(row[name], style) for name, style in form.items()}
    return {
        "configuration": name,
        "task": row["task"],
        "ppl": number["ppl"],
        "change %": number["ppl_change_pct"],
        "KL": number["kl"],
        "recall": number["recall"],
        "asked after eviction": _asked_after(row),
        "bytes/token": number["bytes_per_token"],
        "x smaller than 2-byte": number["compression"],
        "fullest rank KiB": round(max(row["kv_bytes_per_rank"]) / 1024),
        "of dense": f"{_of_dense(row):.3f}",
        "from store": f"{row['detail']['store_share']:.1%}",
        "agreement": None if "agreement" not in row["detail"] else f"{row['detail']['agreement']:.3f}",
        "step ms": number["step_ms"],
        "attention": row["attention_impl"],
    }


def _asked_after(row: dict[str, Any]) -> str | None:
    found = row["detail"].get("found_question_after_eviction")
    return None if found is None else f"{found[0] / found[1]:.3f}"


def _of_dense(row: dict[str, Any]) -> float:
    return max(row["kv_bytes_per_rank"]) / max(row["detail"]["kv_bytes_dense_per_rank"])
