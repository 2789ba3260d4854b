"""Decode steps of attached models under the profiler: kernels and copies of a step, and where the host stopped for the device.

A step is a whole forward of the model with one token, what comes before and after it included; beside it the same with the host's own
cache. Models are random: what is counted depends on shapes only. On a CPU, ops are counted in the place of kernels.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

import pikv_ds
from pikv_ds.adapters.hf.argument_names import cache_argument, cache_of
from pikv_ds.launch.bench.clock import Clock
from pikv_ds.launch.output import print_table, write_json

SHAPES = {  # layers, hidden, heads, KV heads, experts
    "tiny": (2, 256, 4, 2, 4),
    "1B": (16, 2048, 16, 4, 8),
}
CONFIGS: dict[str, dict[str, Any]] = {"pikv": {}, "pikv int8": {"compression": {"method": "int8"}}}
BLOCKING = "called a synchronizing CUDA operation"  # what torch's sync debug mode warns with
SHOWN = 5


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pikv_ds.launch.first_hour.profile", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="decode steps of each (default 20)")
    parser.add_argument("--quick", action="store_true", help="the tiny model, two steps")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(argv)
    steps, rows = 2 if args.quick else args.steps, []
    for name in ("tiny",) if args.quick else SHAPES:
        model = _model(name, args.device)
        rows += [_row(name, cache, model, steps, args.device) for cache in ("own", *CONFIGS)]
        write_json(args.json, "profile", rows)
    names = ("model", "cache", "step_ms", "kernels", "kernels_per_layer", "copies", "syncs")
    print_table(f"One decode step on {args.device}", [{key: row[key] for key in names} for row in rows])
    for row in rows:
        for place, count in row["where"]:
            print(f"{row['model']}, {row['cache']}: {count:g} syncs per step at {place}")
    print("; ".join(f"{row['model']} {row['cache']}: {row['kernels']:g} kernels, {row['syncs']:g} syncs" for row in rows))
    return 0


def _model(name: str, device: str):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    layers, hidden, heads, kv_heads, experts = SHAPES[name]
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=128,
        num_experts=experts, num_experts_per_tok=2, moe_intermediate_size=hidden, intermediate_size=hidden, vocab_size=1024,
        max_position_embeddings=4096, attn_implementation="sdpa",
    )  # fmt: skip
    with torch.device(device):
        return Qwen3MoeForCausalLM(config).to(torch.bfloat16).eval()


def _row(name: str, cache: str, model: Any, steps: int, device: str) -> dict[str, Any]:
    with torch.no_grad():
        if cache == "own":
            return _profiled(name, cache, model, None, steps, device)
        with pikv_ds.attach(model, CONFIGS[cache]) as attached:
            return _profiled(name, cache, model, attached, steps, device)


def _profiled(name: str, cache: str, model: Any, attached: Any, steps: int, device: str) -> dict[str, Any]:
    ids = torch.randint(3, 1000, (4, 200), generator=torch.Generator().manual_seed(0)).to(device)
    past = cache_of(model(ids, use_cache=True)) if attached is None else attached
    given = cache_argument(model, past)
    if attached is not None:
        model(ids, **given)
    token, clock = ids[:, -1:], Clock(device)
    step = lambda: model(token, **given)  # noqa: E731
    for _ in range(3):
        step()
    times = []
    for _ in range(steps):
        started = clock.now()
        step()
        times.append(1e3 * (clock.now() - started))
    launched, copies = kernels(step, steps, device)
    places = syncs(step, steps, device)
    return {
        "model": name, "cache": cache, "device": device, "layers": model.config.num_hidden_layers, "batch": ids.shape[0], "steps": steps,
        "step_ms": round(median(times), 3), "kernels": launched, "kernels_per_layer": round(launched / model.config.num_hidden_layers, 1),
        "copies": copies, "syncs": round(sum(places.values()) / steps, 2),
        "where": [(place, count / steps) for place, count in places.most_common(SHOWN)],
    }  # fmt: skip


def kernels(step: Callable[[], Any], steps: int, device: str) -> tuple[float, float]:
    """Kernels and copies (host to device, device to host, within) per step; on a CPU the ops that torch was asked for, and its copies."""
    from torch.profiler import ProfilerActivity, profile

    cuda = device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as found:
        for _ in range(steps):
            step()
        if cuda:
            torch.cuda.synchronize()
    names = [event.name for event in found.events() if not cuda or event.device_type == torch.autograd.DeviceType.CUDA]
    copies = [name for name in names if name.startswith(("Memcpy", "Memset")) or name == "aten::copy_"]
    return round((len(names) - (len(copies) if cuda else 0)) / steps, 2), round(len(copies) / steps, 2)


def syncs(step: Callable[[], Any], steps: int, device: str) -> Counter[str]:
    """Stops of the host in `steps` steps, by the line of Python that they come from. A CPU has none."""
    if device == "cpu":
        return Counter()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            for _ in range(steps):
                step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return Counter(place(warning) for warning in heard if BLOCKING in str(warning.message))


def place(warning: warnings.WarningMessage) -> str:
    """ "pages/recycle.py:40": no folder of this machine."""
    return f"{'/'.join(Path(warning.filename).parts[-2:])}:{warning.lineno}"


if __name__ == "__main__":
    sys.exit(main())
