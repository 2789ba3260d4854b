"""Plans of `placement/balance.py` against those of DeepSeek's EPLB, on the same loads, in one process.

    python -m tests.balance PATH/TO/EPLB                        100 drawn traces of 61 layers x 256 experts + 64 copies on 8 to 64
                                                                ranks, and what the routers of the bundled model choose
    python -m tests.balance PATH/TO/EPLB --model DIR --text F   another model (a transformers folder) and text
    python -m tests.balance PATH/TO/EPLB --json rows.json

PATH is a checkout of https://github.com/deepseek-ai/EPLB (eplb.py in it). peak / mean: the heaviest rank's load over the mean rank's, of
every layer; a trace's numbers are their mean and their largest. EPLB may put copies of an expert side by side on a rank, each with a share
of its own, which a KV cache can't; it is counted as EPLB counts. CPU time of one thread, the least of a few runs: of a first plan, and of
the next one, by loads that have changed by a third and with what is placed already. Exit 1: some trace of ours is worse.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from pikv_ds import bundled
from pikv_ds.launch.output import print_table, write_json
from pikv_ds.placement.balance import balance
from pikv_ds.placement.slots import count_moves, peak_over_mean

from .traces import drawn, recorded

LAYERS, EXPERTS, COPIES, RANKS = 61, 256, 64, (8, 16, 32, 64)
ROUNDING = 1e-9  # of sums of floats
RUNS = 3


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.balance", description="Placement plans against those of EPLB.")
    parser.add_argument("eplb", type=Path, help="checkout of EPLB")
    parser.add_argument("--seeds", type=int, default=100, help="drawn traces (default 100)")
    parser.add_argument("--model", metavar="DIR", help="whose routers are counted (default: the bundled model)")
    parser.add_argument("--text", type=Path, metavar="FILE", help="what it reads (default: the bundled evaluation text)")
    parser.add_argument("--json", metavar="FILE", help="write a row per trace")
    args = parser.parse_args()
    torch.set_num_threads(1)
    theirs = load(args.eplb)
    cases = [(f"drawn {seed}", *drawn(seed, LAYERS, EXPERTS), ranks, COPIES) for seed in range(args.seeds) for ranks in RANKS]
    cases += [(f"recorded {i}", "recorded", loads, ranks, more) for i, loads in enumerate(counted(args)) for ranks, more in shapes(loads)]
    rows = [row(theirs, *case) for case in track(cases, description="plans", console=None, transient=True)]
    report(rows)
    write_json(args.json, "tests.balance", rows)
    return int(any(each["worse"] for each in rows))


def load(checkout: Path) -> Callable[..., tuple[Tensor, ...]]:
    spec = importlib.util.spec_from_file_location("eplb", checkout / "eplb.py")
    if spec is None or not (checkout / "eplb.py").is_file():
        raise SystemExit(f"{checkout} has no eplb.py: give a checkout of https://github.com/deepseek-ai/EPLB")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.rebalance_experts


def counted(args: argparse.Namespace) -> Iterator[Tensor]:
    model, tokenizer = bundled.load(args.model) if args.model else bundled.load()
    text = bundled.evaluation_text() if args.text is None else args.text.read_text()
    ids = tokenizer(text, add_special_tokens=False, verbose=False, return_tensors="pt")["input_ids"]
    return recorded(model, ids[:, : 20 * 1024], 1024)


def shapes(loads: Tensor) -> Iterator[tuple[int, int]]:
    """Ranks and copies that fit a model's experts."""
    experts = loads.shape[1]
    return (
        (ranks, more) for ranks in (2, 4, 8, 16) for more in (0, experts // 4) if ranks <= experts // 2 and (experts + more) % ranks == 0
    )


def row(theirs: Callable, name: str, kind: str, loads: Tensor, ranks: int, more: int) -> dict[str, Any]:
    slots = loads.shape[1] + more
    ours, took = timed(lambda: balance(loads, ranks, num_slots=slots), RUNS)
    later = 2 * loads + loads[:, torch.randperm(loads.shape[1], generator=torch.Generator().manual_seed(0))]
    after, took_again = timed(lambda: balance(later, ranks, num_slots=slots, present=ours), RUNS)
    other, took_peer = timed(lambda: theirs(loads.double(), slots, 1, 1, ranks)[0].view(len(loads), ranks, -1), 1)
    own, peer = peak_over_mean(loads, ours), by_slots(loads, other)
    stayed, again = peak_over_mean(later, ours), peak_over_mean(later, after)
    new = {"loads": loads.tolist()} if kind == "recorded" and not more else {}
    return {
        "trace": name, "kind": kind, "layers": len(loads), "experts": loads.shape[1], "copies": more, "ranks": ranks,
        "mean": own.mean().item(), "eplb_mean": peer.mean().item(), "max": own.max().item(), "eplb_max": peer.max().item(),
        "layers_worse": int((own > peer + ROUNDING).sum()), "layers_better": int((own < peer - ROUNDING).sum()),
        "worse": bool(own.mean() > peer.mean() + ROUNDING or own.max() > peer.max() + ROUNDING),
        "cpu_ms": took, "eplb_cpu_ms": took_peer, "again_cpu_ms": took_again, "again_stayed": stayed.mean().item(),
        "again_mean": again.mean().item(), "again_moved": int(count_moves(ours, after, loads.shape[1]).sum()), **new,
    }  # fmt: skip


def timed(made: Callable[[], Tensor], runs: int) -> tuple[Tensor, float]:
    """What it makes, and the least CPU time that took, in ms."""
    times = []
    for _ in range(runs):
        began = time.process_time()
        result = made()
        times.append(1e3 * (time.process_time() - began))
    return result, min(times)


def by_slots(loads: Tensor, slots: Tensor) -> Tensor:
    """[L] peak / mean as EPLB counts: every slot takes an equal share of its expert, also beside another one."""
    flat = slots.flatten(1)
    count = torch.zeros(loads.shape, dtype=torch.float64).scatter_add_(1, flat, torch.ones(flat.shape, dtype=torch.float64))
    per_rank = (loads / count).gather(1, flat).view(slots.shape).sum(2)
    return per_rank.amax(1) / per_rank.mean(1)


def report(rows: list[dict[str, Any]]) -> None:
    groups: dict[tuple, list[dict]] = {}
    for each in rows:
        groups.setdefault((each["kind"], each["experts"], each["copies"], each["ranks"]), []).append(each)
    shown = [
        {
            "loads": kind, "experts": experts, "copies": more, "ranks": ranks, "traces": len(group),
            "worse": sum(each["worse"] for each in group),
            "peak / mean": f"{median(each['mean'] for each in group):.4f}", "EPLB": f"{median(each['eplb_mean'] for each in group):.4f}",
            "largest": f"{max(each['max'] for each in group):.4f}", "EPLB's": f"{max(each['eplb_max'] for each in group):.4f}",
            "layers worse": sum(each["layers_worse"] for each in group), "better": sum(each["layers_better"] for each in group),
            "ms": f"{median(each['cpu_ms'] for each in group):.1f}", "longest": f"{max(each['cpu_ms'] for each in group):.1f}",
            "next": f"{median(each['again_cpu_ms'] for each in group):.1f}",
            "EPLB ms": f"{median(each['eplb_cpu_ms'] for each in group):.0f}",
        }
        for (kind, experts, more, ranks), group in groups.items()
    ]  # fmt: skip
    print_table("Heaviest rank over mean rank", shown)


if __name__ == "__main__":
    sys.exit(main())
