"""`pikv plan --placement`: from loads of experts, or a trace of what routers chose, to a better placement; what has to move for it."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pikv_ds.errors import ConfigError
from pikv_ds.launch.evaluation.report import check_matplotlib
from pikv_ds.launch.output import human_bytes, print_table

if TYPE_CHECKING:
    from torch import Tensor

LAYERS_SHOWN = 12  # the worst of them; --json has all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("placement of experts and their KV")
    group.add_argument(
        "--placement",
        metavar="FILE",
        help='plan from FILE: JSON {"loads": [layers][experts]} with, if known, "bytes" of the same shape and "present" '
        '[layers][ranks][slots]; or safetensors with "expert_ids" [layers, tokens], a trace of routers',
    )
    group.add_argument("--copies", type=int, default=0, metavar="R", help="slots for copies of hot experts, in all (default 0)")
    group.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes of the ranks: copies stay within one (default 1)")
    group.add_argument("--plot", metavar="PNG", help="draw the load of every rank before and after")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows "before" and "after" of all layers, then one of each layer. Prints them, and draws. Raises: ConfigError."""
    from pikv_ds.placement.balance import balance
    from pikv_ds.placement.slots import moved, peak_over_mean, rank_loads

    if args.plot is not None:
        check_matplotlib()
    loads, sizes, present = read(args.placement, args.ranks, args.copies)
    began = time.process_time()
    try:
        after = balance(loads, args.ranks, num_slots=loads.shape[1] + args.copies, num_nodes=args.nodes, present=present)
    except ValueError as error:
        raise ConfigError(f"--placement {args.placement} on {args.ranks} ranks: {error}") from None
    took = 1e3 * (time.process_time() - began)
    peaks = {"before": peak_over_mean(loads, present), "after": peak_over_mean(loads, after)}
    new = moved(present, after, loads.shape[1])
    of_layers = (new * sizes.unsqueeze(2)).sum((1, 2))
    common = {"layers": len(loads), "experts": loads.shape[1], "ranks": args.ranks, "copies": args.copies, "nodes": args.nodes}
    totals = [
        {
            "placement": when, "peak_over_mean": peak.mean().item(), "peak_over_mean_max": peak.max().item(),
            "experts_moved": int(new.sum()) * (when == "after"), "bytes_moved": int(of_layers.sum()) * (when == "after"),
            "cpu_ms": took * (when == "after"), **common,
        }
        for when, peak in peaks.items()
    ]  # fmt: skip
    per_layer = [
        {
            "layer": layer, "before": peaks["before"][layer].item(), "after": peaks["after"][layer].item(),
            "experts_moved": int(new[layer].sum()), "bytes_moved": int(of_layers[layer]), "slots": after[layer].tolist(),
        }
        for layer in range(len(loads))
    ]  # fmt: skip
    show(totals, per_layer)
    if args.plot is not None:
        draw(args.plot, *(rank_loads(loads, slots) / rank_loads(loads, slots).mean(1, keepdim=True) for slots in (present, after)))
        print(f"Drawn: {args.plot}")
    return [*totals, *per_layer]


def read(path: str, ranks: int, copies: int) -> tuple[Tensor, Tensor, Tensor]:
    """loads [L, E] f64; sizes [L, E] f64, bytes of an expert's KV, 0 where not known; present slots [L, G, n]. Raises: ConfigError."""
    import torch

    from pikv_ds.codecs.weights import read_file
    from pikv_ds.placement.slots import blocks

    if not Path(path).is_file():
        raise ConfigError(f"--placement {path}: there is no such file")
    try:
        if path.endswith(".safetensors"):
            tensors, about = read_file(path)
            ids = tensors["expert_ids"].long()
            if ids.dim() != 2 or bool((ids < 0).any()):
                raise ValueError(f"expert_ids has shape {list(ids.shape)}; legal is [layers, tokens], ids >= 0")
            experts = int(about.get("num_experts", int(ids.max()) + 1))
            given = {"loads": torch.stack([row.bincount(minlength=experts) for row in ids]).tolist()}
            given["bytes"] = [[n * float(about.get("bytes_per_token", 0)) for n in row] for row in given["loads"]]
        else:
            given = json.loads(Path(path).read_text(encoding="utf-8"))
        loads = torch.tensor(given["loads"], dtype=torch.float64)
        sizes = torch.tensor(given["bytes"], dtype=torch.float64) if "bytes" in given else torch.zeros_like(loads)
        if loads.dim() != 2 or sizes.shape != loads.shape:
            raise ValueError(f"loads has shape {list(loads.shape)} and bytes {list(sizes.shape)}; legal is [layers][experts], both alike")
        experts = loads.shape[1]
        if "present" in given:
            return loads, sizes, torch.tensor(given["present"], dtype=torch.int64)
        if experts % ranks or (experts + copies) % ranks:
            raise ValueError(f"{experts} experts and {copies} copies can't be dealt out evenly to {ranks} ranks")
        own = blocks(len(loads), experts, ranks)
        return loads, sizes, torch.cat([own, own[..., :1].expand(-1, -1, copies // ranks)], 2)  # slots of no use repeat an expert
    except (KeyError, ValueError, TypeError, json.JSONDecodeError) as error:
        raise ConfigError(f"--placement {path} is no file of loads: {error}") from None


def show(totals: list[dict[str, Any]], per_layer: list[dict[str, Any]]) -> None:
    first = totals[0]
    print_table(
        f"Load of the heaviest rank over the mean: {first['layers']} layers, {first['experts']} experts + {first['copies']} copies on "
        f"{first['ranks']} ranks",
        [
            {
                "placement": row["placement"], "mean of layers": f"{row['peak_over_mean']:.4f}",
                "worst layer": f"{row['peak_over_mean_max']:.4f}", "experts to move": row["experts_moved"],
                "KV bytes to move": human_bytes(row["bytes_moved"]), "planned in ms": f"{row['cpu_ms']:.1f}",
            }
            for row in totals
        ],
    )  # fmt: skip
    worst = sorted(per_layer, key=lambda row: -row["before"])[:LAYERS_SHOWN]
    print_table(
        f"The {len(worst)} layers that are worst now",
        [
            {
                "layer": row["layer"], "before": f"{row['before']:.4f}", "after": f"{row['after']:.4f}",
                "experts to move": row["experts_moved"], "KV bytes to move": human_bytes(row["bytes_moved"]),
            }
            for row in worst
        ],
    )  # fmt: skip


def draw(path: str, before: Tensor, after: Tensor) -> None:
    """before, after [L, G]: load of each rank over its layer's mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4))
    axes = figure.subplots(1, 2, sharey=True)
    top = max(float(before.max()), float(after.max()), 1.0)
    for axis, loads, title in zip(axes, (before, after), ("before", "after"), strict=True):
        for row in loads.tolist():
            axis.plot(range(len(row)), sorted(row, reverse=True), color="tab:blue", alpha=0.35, linewidth=1)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set(title=f"{title}: peak / mean {float(loads.amax(1).mean()):.3f}", xlabel="rank, heaviest first", ylim=(0, 1.05 * top))
    axes[0].set_ylabel("load of the rank over the mean, a line per layer")
    figure.savefig(path, dpi=120, bbox_inches="tight")
