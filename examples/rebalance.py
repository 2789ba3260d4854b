"""Requests whose experts are few fill some ranks more than others; whole shards of the cache change ranks while the text goes on, and the
model's experts with them.

    deepspeed --num_accelerators 2 examples/rebalance.py --json rows.json --plot rebalance.png

Rows: `before` and `after` the move, with the load of the fullest rank over the mean, and what a step took. The same prompts have run before
with shards and experts that stay, and must give the same tokens. With --config examples/ds_config_replicated.json every rank has all
experts, and entries move alone.
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch

import pikv_ds
from pikv_ds.bundled import load

parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int, default=0)
parser.add_argument("--config", default=str(Path(__file__).parent / "ds_config_autoep.json"))
parser.add_argument("--steps", type=int, default=128, help="before the move, and after it")
parser.add_argument("--shards-per-rank", type=int, default=4)
parser.add_argument("--bytes-per-step", type=int, default=65536)
parser.add_argument("--json", metavar="FILE")
parser.add_argument("--plot", metavar="PNG")
args = parser.parse_args()

MOVING = 128  # steps that a move may take, at most
ranks = int(os.environ["WORLD_SIZE"])
config = json.loads(Path(args.config).read_text())
# Without room above the balanced share, entries of a full shard spill to others, and there is nothing to even out.
config["pikv"]["storage"] = {"requests": "distinct", "num_shards": args.shards_per_rank * ranks, "capacity_tokens": 65536}
if "expert_parallel" in config:
    config["expert_parallel"]["autoep_size"] = ranks
model, tokenizer = load()
engine, *_ = pikv_ds.initialize(model=model, config=config)
engine.eval()
rank = torch.distributed.get_rank()
prompts = ["of of of ", "1 9 8 4 , 1 9 8 5 , "]  # both are routed to few experts, most of them on the last ranks
ids = tokenizer(24 * prompts[rank % 2], return_tensors="pt")["input_ids"].to(engine.device)


@torch.no_grad()
def steps(cache, token, count, until=None):
    """Greedy tokens [count] and milliseconds of each step; with `until`, steps go on until that is true."""
    tokens, took = [], []
    while len(tokens) < count or (until is not None and not until()):
        began = time.perf_counter()
        token = engine.module(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        took.append(1e3 * (time.perf_counter() - began))
        tokens.append(int(token))
    return tokens, took


def peak_over_mean(cache):
    load_per_rank = cache.stats()["load_per_rank"]
    return max(load_per_rank) / (sum(load_per_rank) / len(load_per_rank)), load_per_rank


first = ids[:, -1:]
stays = engine.pikv.new_cache()
with torch.no_grad():
    engine.module(input_ids=ids[:, :-1], past_key_values=stays, use_cache=True)
expected, _ = steps(stays, first, 2 * args.steps + MOVING)
stays.close()

cache = engine.pikv.new_cache()
with torch.no_grad():
    engine.module(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True)
tokens, before_ms = steps(cache, first, args.steps)
before, load_before = peak_over_mean(cache)
moves = cache.rebalance(bytes_per_step=args.bytes_per_step)
arrived = lambda: not (moves and cache.stats()["rebalance_under_way"])  # noqa: E731
more, moving_ms = steps(cache, torch.tensor([[tokens[-1]]], device=ids.device), 1, arrived)
tokens += more
after, load_after = peak_over_mean(cache)
more, after_ms = steps(cache, torch.tensor([[tokens[-1]]], device=ids.device), args.steps)
tokens += more
numbers = cache.stats()

assert len(tokens) <= len(expected), "the move took more steps than the run beside it; raise --bytes-per-step"
equal = torch.tensor(int(tokens == expected[: len(tokens)]), device=ids.device)
sent = torch.tensor([numbers[f"rebalance_{name}"] if moves else 0 for name in ("bytes_sent", "expert_bytes")], device=ids.device)
torch.distributed.all_reduce(equal, torch.distributed.ReduceOp.MIN)
torch.distributed.all_reduce(sent)
if rank == 0:
    experts = numbers["rebalance_experts_moved"] if moves else 0
    runs = [("before", before, 0, [0, 0], before_ms, load_before), ("after", after, experts, sent.tolist(), after_ms, load_after)]
    rows = []
    for when, peak, experts, moved, took, entries in runs:
        took = sorted(took)
        row = {"placement": when, "peak_over_mean": peak, "tokens_equal": bool(equal), "bytes_moved": moved[0], "load_per_rank": entries}
        row |= {"experts_moved": experts, "expert_bytes_moved": moved[1]}
        row |= {"step_ms_p50": took[len(took) // 2], "step_ms_p99": took[int(0.99 * (len(took) - 1))]}
        rows.append(row | {"steps_while_moving": len(moving_ms), "moving_ms_max": max(moving_ms)})
    for row in rows:
        print(row)
    if args.json:
        from pikv_ds.launch.output import write_json

        write_json(args.json, "examples/rebalance.py", rows)
    if args.plot:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 3))
        loads, times = figure.subplots(1, 2, width_ratios=(1, 2))
        loads.bar([i - 0.2 for i in range(ranks)], load_before, 0.4, label="before")
        loads.bar([i + 0.2 for i in range(ranks)], load_after, 0.4, label="after")
        loads.set(xlabel="rank", ylabel="entries", xticks=range(ranks))
        loads.legend()
        times.plot(before_ms + moving_ms + after_ms, linewidth=0.8)
        times.axvspan(len(before_ms), len(before_ms) + len(moving_ms), color="tab:orange", alpha=0.3, label="shards move")
        times.set(xlabel="step", ylabel="ms of a step on rank 0")
        times.legend()
        figure.savefig(args.plot, dpi=120, bbox_inches="tight")
torch.distributed.destroy_process_group()
assert bool(equal), "tokens differ from those of a cache whose shards stay"
