"""`pikv train`: train a learned part on what a frozen model computes over a text, and write one file that the "pikv" block loads."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from pikv_ds.launch.training.engines import ENGINES, check_engine
from pikv_ds.launch.training.given import out_of, part_of, text_of


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("train", help="train a learned part (see `pikv methods`) and write its file")
    parser.add_argument("part", metavar="PART", help="what to train; `pikv methods` lists the parts")
    parser.add_argument("--model", metavar="DIR", help="transformers model folder (default: the bundled model)")
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text, another than is measured on (default: a bundled one)")
    parser.add_argument("--out", metavar="FILE", required=True, help="safetensors file to write; curve and checkpoints lie beside it")
    parser.add_argument("--steps", type=int, default=400, metavar="N", help="optimizer steps (default 400)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of first weights, window order and what is drawn (default 0)")
    parser.add_argument("--lr", type=float, metavar="X", help="highest rate (default 0.003, or what --config says)")
    parser.add_argument("--context", type=int, default=1024, metavar="N", help="tokens per window (default 1024)")
    parser.add_argument("--samples", type=int, metavar="N", help="windows of the text (default: all)")
    parser.add_argument("--facts", type=int, default=0, metavar="N", help="prompts that hide facts in the text and ask for one (default 0)")
    parser.add_argument(
        "--every", type=int, default=25, metavar="N", help="steps between held-out evaluations and checkpoints (default 25)"
    )
    parser.add_argument("--patience", type=int, default=8, metavar="N", help="evaluations without a better one before it stops; 0 = never")
    parser.add_argument("--engine", choices=ENGINES, default="local", help="what moves the weights (default local)")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="processes to train on (default 1)")
    parser.add_argument("--config", metavar="FILE", help="DeepSpeed's ds.json, for --engine deepspeed")
    parser.add_argument("--tp", type=int, default=1, metavar="T", help="tensor-parallel ranks (engine megatron; default 1)")
    parser.add_argument("--ep", type=int, metavar="E", help="expert-parallel ranks (engine megatron; default: all without --tp)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="option of the part, VALUE in JSON; may repeat")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the model (default float32)")
    parser.add_argument("--tensorboard", metavar="DIR", help="also write the curve there, through torch's writer")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints beside --out")


def run(args: argparse.Namespace) -> int:
    check_engine(args)
    part_of(args.part, args.set), out_of(args.out), text_of(args.text)
    from pikv_ds.launch.training.job import train

    if args.engine == "local":
        train(args, sys.stdout)
        return 0
    return _on_ranks(args)


def _on_ranks(args: argparse.Namespace) -> int:
    """Through DeepSpeed's launcher, which starts processes of Megatron-Core as well as its own."""
    from pikv_ds.errors import ConfigError
    from pikv_ds.launch.ranks import RanksFailed, run_ranks

    given = {name: value for name, value in vars(args).items() if isinstance(value, str | int | float | list | None)}
    given["words"] = sys.argv[1:]
    with tempfile.TemporaryDirectory(prefix="pikv_train_") as folder:
        spec, error = Path(folder, "spec.json"), Path(folder, "error.txt")
        spec.write_text(json.dumps(given), encoding="utf-8")
        print(f"starting {args.ranks} rank(s) under the deepspeed launcher", flush=True)
        try:
            run_ranks("pikv_ds.launch.training.job", [str(spec), str(error)], args.ranks)
        except RanksFailed as failed:
            if error.is_file():
                raise ConfigError(error.read_text(encoding="utf-8")) from None
            print(f"pikv train: {failed}\nits checkpoints are beside --out; --resume goes on from the last", file=sys.stderr)
            return 1
    return 0
