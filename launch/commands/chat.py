"""`pikv chat`: talk to a model whose cache is compressed and sharded over ranks of this machine."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

DEFAULT_BLOCK = '{"compression": {"method": "int8"}}'


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("chat", help="talk to a model in the terminal, on one rank or several")
    parser.add_argument("--model", metavar="DIR", help="model folder (default: the one that python -m pikv_ds.launch.real_model makes)")
    parser.add_argument("--config", metavar="FILE|JSON", default=DEFAULT_BLOCK, help=f'the "pikv" block (default: {DEFAULT_BLOCK})')
    parser.add_argument("--ranks", type=int, default=1, metavar="R", help="ranks that share the cache and the experts (default 1)")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="of an answer (default 256)")
    parser.add_argument("--chunk", type=int, default=512, metavar="N", help="tokens per forward over what was said (default 512)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="of drawing tokens; 0: the likeliest (default 0)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of drawing tokens (default 0)")
    parser.add_argument("--session", metavar="FILE", help="continue the conversation saved in FILE, if it exists, and save it at the end")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of weights and cache (float32)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="torch threads per rank (default 1)")


def run(args: argparse.Namespace) -> int:
    spec = read_spec(args)
    import torch

    from pikv_ds.launch.chat.loop import Chat
    from pikv_ds.launch.chat.talk import Talk
    from pikv_ds.launch.output import write_json
    from pikv_ds.launch.serving.control import Control
    from pikv_ds.launch.serving.start import RankEnded, ranks_of

    stdout = _own_stdout(spec)
    print(f"loading {Path(spec.model).name} on {spec.ranks} rank(s)", file=stdout, flush=True)
    torch.set_num_threads(spec.threads)
    try:
        with ranks_of(spec, "pikv_ds.launch.chat.follow"):
            talk, control = Talk(spec), Control(spec.timeout_s)
            rows = Chat(spec, talk, control, sys.stdin, stdout).run()
            control.tell("stop")
            talk.close()
    except RankEnded as error:
        print(f"pikv chat: {error}", file=sys.stderr)
        return 1
    write_json(args.json, "pikv chat", rows)
    return 0


def _own_stdout(spec: Any) -> Any:
    """On several ranks DeepSpeed's logger writes to stdout; what it says goes to stderr then."""
    from pikv_ds.launch.ranks import own_stdout

    return own_stdout() if spec.ep > 1 else sys.stdout


def _session(path: str) -> str:
    """A folder or .json would not be a session. Raises: ConfigError."""
    from pikv_ds.errors import ConfigError

    file = Path(path).expanduser().resolve()
    if not file.parent.is_dir() or file.is_dir() or file.suffix == ".json":
        raise ConfigError(f"--session {path!r}: legal is a file, not .json, in a folder that exists; its words alone are saved by /save")
    return str(file)


def read_spec(args: argparse.Namespace) -> Any:
    """Checked here, so that a mistake does not first start ranks. Raises: ConfigError, UnsupportedError, FileNotFoundError."""
    from pikv_ds.adapters.hf.model_spec import load_model_config
    from pikv_ds.errors import ConfigError
    from pikv_ds.launch.chat.spec import ChatSpec
    from pikv_ds.launch.evaluation.model_facts import facts_of
    from pikv_ds.launch.evaluation.plan import block_of
    from pikv_ds.launch.real_model import needed

    for name in ("ranks", "max_new_tokens", "chunk", "threads"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(args, name)}: legal is 1 or more")
    if args.temperature < 0:
        raise ConfigError(f"--temperature {args.temperature}: legal is 0 or more")
    model = Path(args.model).expanduser().resolve() if args.model else needed("moe").resolve()
    facts, block = facts_of(load_model_config(model)), block_of(args.config)
    if block["storage"]["requests"] == "distinct":
        raise ConfigError("pikv.storage.requests is 'distinct': the ranks of a chat hold one conversation; use 'auto' or 'replicated'")
    return ChatSpec(
        model=str(model), block=block, dtype=args.dtype, ranks=args.ranks, ep=args.ranks if facts.experts % args.ranks == 0 else 1,
        threads=args.threads, max_length=facts.longest or 1 << 20, new_tokens=args.max_new_tokens, chunk=args.chunk,
        temperature=args.temperature, seed=args.seed, timeout_s=block["timeout_s"],
        session=None if args.session is None else _session(args.session),
    )  # fmt: skip
