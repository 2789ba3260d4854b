"""`pikv eval --backend megatron` for ranks that a launcher of your own starts:

torchrun --nproc-per-node 2 -m pikv_ds.launch.jobs.megatron_eval --ep 2 --tasks ppl,recall --json FILE
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from pikv_ds.launch.cli import TOLD
from pikv_ds.launch.commands.eval import add_arguments, command_line, finish
from pikv_ds.launch.device import let_memory_grow
from pikv_ds.launch.ranks import started_ranks

LAUNCH = "torchrun --nproc-per-node {ranks} -m pikv_ds.launch.jobs.megatron_eval"


def main() -> int:
    parser = argparse.ArgumentParser(prog="megatron_eval", description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--json", metavar="FILE", help="also write command, versions, machine and rows to FILE")
    args = parser.parse_args()
    let_memory_grow()
    ranks = started_ranks()
    if ranks is None:
        parser.error(f"started without a launcher; use {LAUNCH.format(ranks='R')}, or pikv eval --backend megatron --ranks R")
    args.backend, args.ranks = "megatron", ranks
    try:
        return _run(args)
    except TOLD as error:
        if os.environ["RANK"] == "0":  # the same mistake is seen by all ranks
            print(f"megatron_eval: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    import torch.distributed as dist

    from pikv_ds.launch.evaluation.job import evaluate, start_distributed
    from pikv_ds.launch.evaluation.partial import Partial
    from pikv_ds.launch.evaluation.plan import read_spec

    spec, units = read_spec(args)
    start_distributed()
    first = dist.get_rank() == 0
    with tempfile.TemporaryDirectory(prefix="pikv_eval_") as folder:
        partial = Partial(Path(f"{args.json}.partial" if args.json else f"{folder}/rows.json")) if first else None
        todo = [partial.unfinished(spec, units) if first else None]
        dist.broadcast_object_list(todo, src=0)
        evaluate(spec, todo[0], partial, sys.stdout if first else None)
        if first:
            command = command_line(args, LAUNCH.format(ranks=spec.ranks), given=("backend", "ranks"))
            finish(args, command, spec, partial.rows_of(spec, units))
            partial.remove()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
