"""`pikv serve`: an OpenAI-compatible end point over the expert-sharded cache, on one rank or several of this machine."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from pikv_ds.launch.serving.spec import BACKENDS, SCHEDULES


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("serve", help="serve a model: OpenAI-compatible completions and chat, metrics, a page")
    parser.add_argument("--backend", choices=BACKENDS, default="hf", help="hf: transformers (default); megatron: dynamic batching")
    parser.add_argument("--model", metavar="DIR", help="transformers model folder (default: the bundled model)")
    parser.add_argument("--load", metavar="DIR", help="Megatron dist checkpoint of that model's weights (backend megatron)")
    parser.add_argument("--name", metavar="NAME", help="what clients call the model (default: the folder's name)")
    parser.add_argument("--config", metavar="FILE|JSON", help='the "pikv" block, or a configuration that holds it (default: the defaults)')
    parser.add_argument("--chat-template", metavar="FILE", help="Jinja template of a chat, where the tokenizer has none")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of weights and cache (float32)")
    parser.add_argument("--ranks", type=int, default=1, metavar="R", help="ranks, each with requests of its own (default 1)")
    parser.add_argument("--tp", type=int, default=1, metavar="T", help="tensor-parallel ranks (backend megatron; default 1)")
    parser.add_argument("--ep", type=int, metavar="E", help="expert-parallel ranks (default: hf 1, experts whole; megatron: all)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="torch threads per rank (default 1)")
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on (default 127.0.0.1: this machine)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="0: any that is free (default 8000)")
    parser.add_argument("--max-length", type=int, metavar="N", help="tokens of a prompt and what follows (default: the model's)")
    parser.add_argument("--max-running", type=int, default=32, metavar="N", help="requests in the cache, per rank (default 32)")
    parser.add_argument("--max-waiting", type=int, default=256, metavar="N", help="requests that wait; more are refused, 429 (default 256)")
    parser.add_argument(
        "--kv-tokens", type=int, metavar="N", help="tokens that requests of a rank may come to hold, kept ones included (default: any)"
    )
    parser.add_argument(
        "--prefix-rows", type=int, default=8, metavar="N", help="finished requests kept per rank for prompts that begin alike (default 8)"
    )
    parser.add_argument("--max-chunk", type=int, default=512, metavar="N", help="prompt tokens per step and rank (default 512)")
    parser.add_argument(
        "--schedule", choices=SCHEDULES, default="deadline", help="deadline: keep the targets (default); fcfs: first come, first served"
    )
    parser.add_argument("--ttft-ms", type=float, default=2000.0, metavar="MS", help="target: arrival to first token (default 2000)")
    parser.add_argument("--tbt-ms", type=float, default=200.0, metavar="MS", help="target: between two tokens (default 200)")


def run(args: argparse.Namespace) -> int:
    spec = read_spec(args)
    from pikv_ds.launch.serving.service import serve
    from pikv_ds.launch.serving.start import RankEnded

    try:
        return serve(spec, args.host, args.port)
    except RankEnded as error:
        print(f"pikv serve: {error}", file=sys.stderr)
        return 1


def read_spec(args: argparse.Namespace) -> Any:
    """Checked here, so that a mistake does not first start ranks."""
    from pikv_ds.adapters.hf.model_spec import load_model_config
    from pikv_ds.bundled import model_path
    from pikv_ds.errors import ConfigError
    from pikv_ds.launch.evaluation.model_facts import experts_of
    from pikv_ds.launch.evaluation.plan import block_of, expert_ranks, megatron_folder
    from pikv_ds.launch.serving.spec import ServeSpec

    _check_installed()
    model = Path(args.model).expanduser().resolve() if args.model else model_path()
    config = load_model_config(model)
    text, block = config.get_text_config(decoder=True), block_of(args.config)
    if args.backend == "hf" and args.ep is None:
        args.ep = 1
    most = getattr(text, "max_position_embeddings", None)
    max_length = args.max_length or most
    _check_numbers(args)
    if max_length is None:
        raise ConfigError(f"{model}/config.json names no max_position_embeddings; give --max-length")
    if most is not None and max_length > most:
        raise ConfigError(f"--max-length {max_length}: the model has {most} positions")
    ep, load = expert_ranks(args, experts_of(config)), megatron_folder(args.load, args.backend)
    if block["storage"]["requests"] == "replicated" and args.ranks > 1:
        raise ConfigError(
            "pikv.storage.requests is 'replicated': the ranks of a service run requests of their own; use 'auto' or 'distinct'"
        )
    return ServeSpec(
        backend=args.backend, model=str(model), load=load, name=args.name or (model.name if args.model else "bundled"), block=block,
        dtype=args.dtype, ranks=args.ranks, tp=args.tp, ep=ep, threads=args.threads, max_length=max_length, max_running=args.max_running,
        max_waiting=args.max_waiting, kv_tokens=args.kv_tokens, prefix_rows=args.prefix_rows, max_chunk=args.max_chunk,
        schedule=args.schedule, ttft_ms=args.ttft_ms, tbt_ms=args.tbt_ms, timeout_s=block["timeout_s"],
        chat_template=_template(args.chat_template),
    )  # fmt: skip


def _check_numbers(args: argparse.Namespace) -> None:
    from pikv_ds.errors import ConfigError

    positive = ("ranks", "tp", "threads", "max_length", "max_running", "max_waiting", "kv_tokens", "max_chunk", "ttft_ms", "tbt_ms")
    for name in positive:
        value = getattr(args, name)
        if value is not None and not value > 0:  # nor NaN
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be above 0")
    if args.prefix_rows < 0:
        raise ConfigError(f"--prefix-rows {args.prefix_rows}: must be 0 or more")
    if not 0 <= args.port <= 65535:
        raise ConfigError(f"--port {args.port}: legal are 1 to 65535, and 0 for any that is free")


def _template(file: str | None) -> str | None:
    if file is None:
        return None
    if not Path(file).is_file():
        raise FileNotFoundError(f"no file {file!r}; --chat-template is a Jinja template of a chat")
    return Path(file).read_text(encoding="utf-8")


def _check_installed() -> None:
    from importlib.util import find_spec

    from pikv_ds.errors import UnsupportedError

    missing = [name for name in ("fastapi", "uvicorn", "openai", "prometheus_client") if find_spec(name) is None]
    if missing:
        raise UnsupportedError(f"pikv serve needs {', '.join(missing)}, which this environment has not; pip install 'pikv-ds[serve]'")
