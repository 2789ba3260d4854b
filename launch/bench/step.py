"""`pikv bench step`: where the time of a decode step goes that is not the model's and not the ops': per forward, and per layer.

Random models of the bundled one's shape with 2 and 10 layers, one request, one thread, CPU. Each takes turns of steps in four ways; a row
holds microseconds of CPU time, the 20th percentile of all steps, as other work on the machine makes steps longer and never shorter:
    pikv_us      attached: hooks, layers, ops
    bare_us      the same model with attention that returns zeros and no cache
    ops_us       the ops of one step by themselves, with the arguments that the step gives them
    dense_us     DynamicCache and SDPA
    python_us    pikv_us - bare_us - ops_us
    host_us      dense_us - bare_us: what the host's own cache and attention take, ops included
From both rows follow python_us per layer and per forward. `--profile` adds functions of PiKV by their calls per step (10 layers), with
their own time under cProfile, which makes calls look dearer than they are.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from statistics import quantiles
from types import SimpleNamespace
from typing import Any

from pikv_ds.launch.output import print_table, write_json

LAYERS = (2, 10)
TURN, LEAD_IN = 8, 2  # steps of one turn; those before it, not timed: the other ways have used the caches of the CPU
NOTHING = "pikv_bench_nothing"
Step = Callable[[], Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--context", type=int, default=1024, metavar="N", help="tokens in the cache at the first step (default 1024)")
    parser.add_argument("--turns", type=int, default=40, metavar="N", help=f"turns of {TURN} steps of each way (default 40)")
    parser.add_argument("--profile", action="store_true", help="functions of PiKV by calls per step")


def run(args: argparse.Namespace) -> int:
    import torch

    torch.set_num_threads(1)
    rows = [_row(layers, args.context, args.turns) for layers in LAYERS]
    few, many = rows
    per_layer = (many["python_us"] - few["python_us"]) / (many["layers"] - few["layers"])
    split = {"python_us_per_layer": per_layer, "python_us_per_forward": few["python_us"] - few["layers"] * per_layer}
    shown = [{key: _short(value) for key, value in row.items()} for row in rows]
    print_table(f"Decode step at {args.context} tokens, CPU time in us", shown)
    print("; ".join(f"{key} {value:.1f}" for key, value in split.items()))
    found: list[dict[str, Any]] = []
    if args.profile:
        found = _profile(LAYERS[-1], args.context)
        calls = sum(row["calls"] for row in found)
        split["calls_per_step"] = calls
        print_table(f"{calls:.0f} calls of PiKV's functions per step of {LAYERS[-1]} layers", found[:40])
    write_json(args.json, f"bench step --context {args.context}", [*rows, split, *found])
    return 0


def _row(layers: int, context: int, turns: int) -> dict[str, Any]:
    from pikv_ds.ops import library

    with _ways(layers, context) as ways:
        times = {name: [] for name in ways}
        for turn in range(turns):
            for name in list(ways)[:: 1 if turn % 2 else -1]:
                times[name] += _turn(ways[name])
        with _seen(library.CALLS) as calls:
            ways["pikv"]()
        ops = [_alone(*call) for call in calls]
    found = {name: quantiles(each, n=5)[0] for name, each in times.items()}
    row = {"layers": layers, "context_tokens": context, "steps": turns * TURN, "pikv_us": found["pikv"], "bare_us": found["bare"]}
    row |= {"ops_us": sum(ops), "dense_us": found["dense"]}
    return row | {"python_us": row["pikv_us"] - row["bare_us"] - row["ops_us"], "host_us": row["dense_us"] - row["bare_us"]}


def _turn(step: Step) -> list[float]:
    """us of CPU time of each step."""
    for _ in range(LEAD_IN):
        step()
    times = []
    for _ in range(TURN):
        started = time.thread_time_ns()
        step()
        times.append((time.thread_time_ns() - started) / 1e3)
    return times


@contextlib.contextmanager
def _ways(layers: int, context: int) -> Iterator[dict[str, Step]]:
    """A decode step of a model, each on a copy of its own, in inference mode."""
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface

    import pikv_ds
    from pikv_ds.adapters.hf.argument_names import cache_argument, cache_of

    AttentionInterface.register(NOTHING, _zeros)
    AttentionMaskInterface.register(NOTHING, lambda *args, **kwargs: None)
    ids = torch.randint(3, 200, (1, context), generator=torch.Generator().manual_seed(0))
    dense, pikv, bare = _model(layers, "sdpa"), _model(layers, "sdpa"), _model(layers, NOTHING)
    token, at = ids[:, -1:], count(context)
    with torch.inference_mode(), pikv_ds.attach(pikv) as cache:
        past = cache_argument(dense, cache_of(dense(ids, use_cache=True)))
        kept = cache_argument(pikv, cache)
        pikv(ids, **kept)
        yield {
            "pikv": lambda: pikv(token, **kept),
            "bare": lambda: bare(token, use_cache=False, position_ids=torch.tensor([[next(at)]])),
            "dense": lambda: dense(token, **past),
        }


def _zeros(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> tuple[Any, None]:
    """An attention function: [B, T, Hq, Dv], nothing attended to."""
    return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None


def _model(layers: int, attention: str) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from pikv_ds.bundled import model_path

    shape = AutoConfig.from_pretrained(model_path(), local_files_only=True)
    shape.num_hidden_layers = layers
    if getattr(shape, "layer_types", None) is not None:
        shape.layer_types = (shape.layer_types * layers)[:layers]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(shape, dtype=torch.float32, attn_implementation=attention).eval()


@contextlib.contextmanager
def _seen(ops: SimpleNamespace) -> Iterator[list[tuple[Callable[..., Any], tuple]]]:
    """Inside, calls of the ops are noted: the op and its arguments."""
    calls: list[tuple[Callable[..., Any], tuple]] = []

    def noted(op: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: (calls.append((op, args)), op(*args))[1]

    before = dict(vars(ops))
    try:
        vars(ops).update({name: noted(op) for name, op in before.items()})
        yield calls
    finally:
        vars(ops).update(before)


def _alone(op: Callable[..., Any], args: tuple, rounds: int = 60, each: int = 8) -> float:
    """us of one call, the least of `rounds`. Entries that it counts are taken back each time (assign_slots), so that no page is missing."""
    import torch

    times = []
    with torch.inference_mode():
        counted = args[0].clone() if args[0].dtype == torch.int32 else None
        each = each if counted is None else 1
        for _ in range(rounds):
            started = time.thread_time_ns()
            for _ in range(each):
                op(*args)
            times.append((time.thread_time_ns() - started) / 1e3 / each)
            if counted is not None:
                args[0].copy_(counted)
    return min(times)


def _profile(layers: int, context: int, steps: int = 100) -> list[dict[str, Any]]:
    """Functions of PiKV, by calls per step."""
    import pikv_ds

    profile = cProfile.Profile()
    with _ways(layers, context) as ways:
        for _ in range(20):
            ways["pikv"]()
        profile.enable()
        for _ in range(steps):
            ways["pikv"]()
        profile.disable()
    top, found = Path(pikv_ds.__file__).resolve().parents[1], {}
    for entry in profile.getstats():
        path = None if isinstance(entry.code, str) else Path(entry.code.co_filename)
        if path is not None and path.is_relative_to(top) and path != Path(__file__):
            name = f"{path.relative_to(top)}: {entry.code.co_name}"
            calls, own = found.get(name, (0.0, 0.0))
            found[name] = calls + entry.callcount / steps, own + 1e6 * entry.inlinetime / steps
    rows = [{"function": name, "calls": calls, "own_us": round(own, 1)} for name, (calls, own) in found.items()]
    return sorted(rows, key=lambda row: -row["own_us"])


def _short(value: Any) -> Any:
    return round(value, 1) if isinstance(value, float) else value
