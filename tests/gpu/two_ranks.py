"""Two ranks on one GPU: the exchange on tensors of a device, over gloo, which takes them through the host. NCCL refuses two ranks on a GPU.

    python -m tests.gpu.two_ranks [--device cuda|cpu] [--json FILE]

Each family decodes on two ranks, with the same requests and with requests of their own; tokens must be those of one rank alone.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from datetime import timedelta

import torch
import torch.distributed as dist

from pikv_ds.launch.output import write_json
from tests.dist.jobs.exact import generate, generate_sharded
from tests.tiny_models import prompt, tiny_model

RANKS, NEW_TOKENS, TIMEOUT_S = 2, 6, 80
FAMILIES = ("qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss")  # full attention, window, latent, sinks
TOLERANCE = 1e-4  # of logits in fp32, on another order of sums


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.two_ranks", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    if "RANK" in os.environ:
        return _rank(args)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.gpu.two_ranks", "--device", args.device, "--families", *args.families]
        command += [] if args.json is None else ["--json", args.json]
        shared = {"PIKV_TEST_STORE": f"{folder}/store", "OMP_NUM_THREADS": "1"}
        ranks = [
            subprocess.Popen(command, env=os.environ | shared | {"RANK": str(rank)}, stdin=subprocess.DEVNULL) for rank in range(RANKS)
        ]
        try:
            return max(abs(rank.wait(TIMEOUT_S)) for rank in ranks)
        finally:
            for rank in ranks:
                rank.kill()


def _rank(args: argparse.Namespace) -> int:
    rank = int(os.environ["RANK"])
    torch.backends.cuda.matmul.allow_tf32 = False
    store = dist.FileStore(os.environ["PIKV_TEST_STORE"], RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=TIMEOUT_S / 2))
    rows = [_checked(family, requests, rank, args.device) for family in args.families for requests in ("replicated", "distinct")]
    everyone: list = [None] * RANKS
    dist.all_gather_object(everyone, rows)
    dist.destroy_process_group()
    rows = [row for found in everyone for row in found]
    failed = [row for row in rows if not row["tokens_same"] or not row["difference"] <= TOLERANCE]
    if rank == 0:
        write_json(args.json, "two_ranks", rows)
        for row in failed:
            print(f"failed: {row}")
        worst = max(row["difference"] for row in rows)
        print(
            f"{len(rows)} runs of {RANKS} ranks on one {args.device} over gloo, {len(failed)} differ, largest logit difference {worst:.1e}"
        )
    return 1 if failed else 0


def _checked(family: str, requests: str, rank: int, device: str) -> dict:
    model = tiny_model(family).to(device)
    ids = prompt(21, seed=2 if requests == "replicated" else 2 + rank, batch=2).to(device)
    dense = generate(model, ids, new_tokens=NEW_TOKENS)
    config = {"page_size": 4, "storage": {"requests": requests}}
    ours = generate_sharded(model, ids, new_tokens=NEW_TOKENS, config=config, group=dist.group.WORLD, synced_gpus=True)
    return {
        "family": family, "requests": requests, "rank": rank, "tokens_same": torch.equal(dense.tokens, ours.tokens),
        "difference": ours.difference(dense), "attention_impl": ours.stats["attention_impl"],
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
