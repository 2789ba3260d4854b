"""`pikv generate`: text from a model on disk, streamed to the terminal, on one rank or several."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")
DEFAULT_PROMPT = "The history of the town begins"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("generate", help="generate text, streamed to the terminal")
    parser.add_argument("--model", metavar="PATH", help="model folder on disk (default: the bundled model)")
    parser.add_argument("--config", metavar="FILE", help='JSON: a DeepSpeed configuration, or the "pikv" block alone')
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", nargs="+", action="extend", metavar="TEXT", help="one or more prompts")
    source.add_argument("--prompts-file", metavar="FILE", help="one prompt per line")
    parser.add_argument("--max-new-tokens", type=_positive, default=64, metavar="N", help="per prompt (default 64)")
    parser.add_argument("--ranks", type=_positive, default=1, metavar="G", help="ranks to start (default 1)")
    parser.add_argument("--chunk", type=_positive, metavar="N", help="prefill in chunks of N tokens")
    parser.add_argument("--session", metavar="FILE", help="continue the session saved in FILE, if it exists, and save it there at the end")
    parser.add_argument("--dtype", choices=DTYPES, help="of weights and cache (default: the checkpoint's)")


def run(args: argparse.Namespace) -> int:
    from pikv_ds.launch.jobs.generate import generate_all
    from pikv_ds.launch.output import write_json
    from pikv_ds.launch.ranks import RanksFailed, run_ranks

    spec = read_spec(args)
    if args.ranks == 1 and set(spec["ds_config"]) == {"pikv"}:
        rows = generate_all(spec, sys.stdout)
    else:
        with tempfile.TemporaryDirectory(prefix="pikv_generate_") as folder:
            spec_file, result = Path(folder) / "spec.json", Path(folder) / "rows.json"
            spec_file.write_text(json.dumps(spec), encoding="utf-8")
            print(f"starting {args.ranks} ranks under the deepspeed launcher", flush=True)
            try:
                run_ranks("pikv_ds.launch.jobs.generate", [str(spec_file), str(result)], args.ranks)
            except RanksFailed as error:
                print(f"pikv generate: {error}", file=sys.stderr)
                return 1
            rows = json.loads(result.read_text(encoding="utf-8"))
    _print_stats(rows)
    write_json(args.json, "generate", rows)
    return 0


def read_spec(args: argparse.Namespace) -> dict[str, Any]:
    """Everything the ranks need, checked here so that a mistake does not first start them."""
    from pikv_ds.adapters.hf.model_spec import load_model_config
    from pikv_ds.bundled import model_path
    from pikv_ds.config.pikv import PiKVConfig

    model = Path(args.model).expanduser().resolve() if args.model else model_path()
    load_model_config(model)
    return {
        "model": str(model),
        "ds_config": _ds_config(args.config, PiKVConfig),
        "prompts": _prompts(args),
        "max_new_tokens": args.max_new_tokens,
        "chunk": args.chunk,
        "dtype": args.dtype,
        "session": _session(args.session),
    }


def _session(path: str | None) -> str | None:
    """Absolute, as ranks may start elsewhere. Raises: FileNotFoundError for a folder that is not there."""
    if path is None:
        return None
    file = Path(path).expanduser().resolve()
    if not file.parent.is_dir():
        raise FileNotFoundError(f"--session {path!r}: there is no folder {str(file.parent)!r}")
    return str(file)


def _ds_config(path: str | None, config_class: type) -> dict[str, Any]:
    config = config_class.parse(path)
    written = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
    others = {key: value for key, value in written.items() if key != "pikv"} if "pikv" in written else {}
    return {**others, "pikv": config.model_dump(mode="json")}


def _prompts(args: argparse.Namespace) -> list[str]:
    if args.prompts_file is None:
        return args.prompt or [DEFAULT_PROMPT]
    path = Path(args.prompts_file)
    if not path.is_file():
        raise FileNotFoundError(f"no prompts file {str(path)!r}; it is a text file with one prompt per line")
    prompts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise argparse.ArgumentTypeError(f"--prompts-file {str(path)!r} holds no prompt; write one per line")
    return prompts


def _print_stats(rows: list[dict[str, Any]]) -> None:
    from pikv_ds.launch.output import print_table

    print_table(
        "KV cache after each prompt",
        [
            {
                "prompt tokens": row["prompt_tokens"],
                "new tokens": row["new_tokens"],
                "tokens/s": f"{row['tokens_per_s']:.1f}",
                "KiB per rank": " ".join(str(round(count / 1024)) for count in row["kv_bytes_per_rank"]),
                "dense KiB": round(row["kv_bytes_dense"] / 1024),
            }
            for row in rows
        ],
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: legal is a number of at least 1")
    return value
