"""`pikv bench`: comparisons in one process.

`decode`: a step against the ordinary cache; `ops`: the ops; `errors`: their accuracy; `select`: reading some pages against reading all;
`model`: the source paper's latency model, fitted; `layouts`: the page formats beside KIVI's; `latents`: decode over MLA latents;
`chunks`: long chunks over stored pages; `merge`: partial attention into one; `serve`: load on an end point; `exchange`: ways of distinct
requests on several ranks; `prefix`: requests with a long common beginning; `fewshot`: an lm-eval task whose shots are shared; `soak`:
random requests and sessions for a while; `step`: what of a decode step is neither the model nor the ops; `peers`: decode attention of other
projects.
"""

from __future__ import annotations

import argparse
import time
from statistics import median, quantiles
from typing import Any

from pikv_ds.launch.bench import chunks as bench_chunks
from pikv_ds.launch.bench import errors as bench_errors
from pikv_ds.launch.bench import exchange as bench_exchange
from pikv_ds.launch.bench import few_shot as bench_few_shot
from pikv_ds.launch.bench import latents as bench_latents
from pikv_ds.launch.bench import layouts as bench_layouts
from pikv_ds.launch.bench import merge as bench_merge
from pikv_ds.launch.bench import model as bench_model
from pikv_ds.launch.bench import ops as bench_ops
from pikv_ds.launch.bench import page_choice as bench_select
from pikv_ds.launch.bench import peers as bench_peers
from pikv_ds.launch.bench import prefix as bench_prefix
from pikv_ds.launch.bench import serve as bench_serve
from pikv_ds.launch.bench import soak as bench_soak
from pikv_ds.launch.bench import step as bench_step
from pikv_ds.launch.output import print_table, write_json


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("bench", help="speed and accuracy against the hosts' own caches and torch")
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    decode = kinds.add_parser("decode", help="one decode step of one rank: DynamicCache + SDPA against PiKV, exact mode")
    decode.add_argument(
        "--model",
        metavar="PATH",
        help="model folder, or 'wide': one random layer of 32 heads, 8 KV heads, width 128 (default: the bundled model)",
    )
    decode.add_argument("--config", metavar="JSON", help='file with a "pikv" block (default: the defaults)')
    decode.add_argument("--context", type=int, nargs="+", default=[1024], metavar="N", help="tokens in the cache at the first step")
    decode.add_argument("--batch", type=int, default=1, metavar="B", help="requests")
    decode.add_argument("--steps", type=int, default=20, metavar="N", help="timed steps of each (default 20)")
    decode.add_argument("--warmup", type=int, default=5, metavar="N", help="steps of each before the timed ones (default 5)")
    decode.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the model and both caches lie (default cpu)")
    decode.add_argument("--threads", type=int, default=1, metavar="N", help="torch threads (default 1)")
    decode.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    decode.add_argument("--json", metavar="FILE", help="write the rows to FILE")
    ops = kinds.add_parser("ops", help="the compiled ops against torch's attention")
    bench_ops.add_arguments(ops)
    ops.add_argument("--json", metavar="FILE", help="write the rows and the table of targets to FILE")
    select = kinds.add_parser("select", help="a step that reads some of the pages against one that reads all, choosing included")
    bench_select.add_arguments(select)
    select.add_argument("--json", metavar="FILE", help="write the rows to FILE")
    model = kinds.add_parser("model", help="the source paper's latency model of a step, fitted to steps measured here")
    bench_model.add_arguments(model)
    model.add_argument("--json", metavar="FILE", help="write the rows and the fit to FILE")
    layouts = kinds.add_parser("layouts", help="bytes and error of the page formats beside KIVI's layout, on a model's keys and values")
    bench_layouts.add_arguments(layouts)
    layouts.add_argument("--json", metavar="FILE", help="write the rows to FILE")
    latents = kinds.add_parser("latents", help="decode over MLA latents in each record format, plain C++ and by hand")
    bench_latents.add_arguments(latents)
    latents.add_argument("--json", metavar="FILE", help="write the rows to FILE")
    chunks = kinds.add_parser("chunks", help="a long chunk of new tokens over stored pages against torch's flash attention")
    bench_chunks.add_arguments(chunks)
    chunks.add_argument("--json", metavar="FILE", help="write the rows to FILE")
    merge = kinds.add_parser("merge", help="partial attention into one: the op against its torch reference, time and error")
    bench_merge.add_arguments(merge)
    merge.add_argument("--json", metavar="FILE", help="write the rows to FILE")
    serve = kinds.add_parser("serve", help="load on an OpenAI-compatible end point: what is lost, wrong, how long it takes")
    bench_serve.add_arguments(serve)
    serve.add_argument("--json", metavar="FILE", help="write the row to FILE")
    exchange = kinds.add_parser("exchange", help="distinct requests on several ranks: bytes and time of a step by routing.exchange")
    bench_exchange.add_arguments(exchange)
    exchange.add_argument("--json", metavar="FILE", help="write the rows to FILE")
    prefix = kinds.add_parser("prefix", help="requests with a long common beginning, with storage.prefix and without")
    bench_prefix.add_arguments(prefix)
    prefix.add_argument("--json", metavar="FILE", help="write the rows to FILE")
    few_shot = kinds.add_parser("fewshot", help="a 5-shot lm-eval task, with storage.prefix and without")
    bench_few_shot.add_arguments(few_shot)
    few_shot.add_argument("--json", metavar="FILE", help="write the rows to FILE")
    soak = kinds.add_parser("soak", help="random requests and sessions on several ranks for a while: what is lost, memory, time of a step")
    bench_soak.add_arguments(soak)
    soak.add_argument("--json", metavar="FILE", help="write the row to FILE")
    step = kinds.add_parser("step", help="what of a decode step is neither the model's nor the ops': per forward and per layer")
    bench_step.add_arguments(step)
    step.add_argument("--json", metavar="FILE", help="write the rows to FILE")
    peers = kinds.add_parser("peers", help="decode attention of vLLM, SGLang, OpenVINO, PACE and torch beside ours")
    bench_peers.add_arguments(peers)
    peers.add_argument("--json", metavar="FILE", help="write the rows to FILE")
    errors = kinds.add_parser("errors", help="errors of the page formats and of the op that reads them, against fp64")
    errors.add_argument("--json", metavar="FILE", help="write the rows to FILE")


def run(args: argparse.Namespace) -> int:
    kinds = {"ops": bench_ops, "select": bench_select, "model": bench_model, "layouts": bench_layouts, "latents": bench_latents}
    kinds |= {"errors": bench_errors, "merge": bench_merge, "serve": bench_serve, "exchange": bench_exchange, "prefix": bench_prefix}
    kinds |= {"chunks": bench_chunks, "soak": bench_soak, "fewshot": bench_few_shot, "step": bench_step}
    kinds |= {"peers": bench_peers}
    if getattr(args, "device", "cpu") == "cuda" and not _has_cuda():
        print(f"pikv bench {args.kind} --device cuda: this torch sees no CUDA device")
        return 1
    if args.kind == "ops" and args.sweep:
        from pikv_ds.launch.bench import sweep as bench_sweep

        return bench_sweep.run(args)
    if args.kind == "ops" and args.device == "cuda":
        from pikv_ds.launch.bench import ops_cuda as bench_ops_cuda

        return bench_ops_cuda.run(args)
    return _run_decode(args) if args.kind == "decode" else kinds[args.kind].run(args)


def _run_decode(args: argparse.Namespace) -> int:
    import torch

    torch.set_num_threads(args.threads)
    rows = [row for context in args.context for row in _decode_rows(args, context)]
    shown = ("name", "context_tokens", "step_ms", "cpu_ms", "ratio", "ratio_p20", "ratio_p80", "max_logit_diff", "kv_bytes")
    print_table(
        f"Decode step, {args.dtype}, batch {args.batch}, {args.threads} thread(s): median of {args.steps}, interleaved",
        [{key: _round(row[key]) for key in shown} for row in rows],
    )
    write_json(args.json, "bench decode", rows)
    ours = [row for row in rows if row["name"] == "pikv exact"]
    print("; ".join(f"{row['context_tokens']} tokens: {row['ratio']:.2f} of the step of DynamicCache and SDPA" for row in ours))
    return 0


def _decode_rows(args: argparse.Namespace, context: int) -> list[dict[str, Any]]:
    import torch

    import pikv_ds
    from pikv_ds.adapters.hf.argument_names import cache_argument, cache_of
    from pikv_ds.launch.bench.clock import Clock

    dense, pikv = _load(args), _load(args)
    ids = torch.randint(3, dense.config.vocab_size, (args.batch, context), generator=torch.Generator().manual_seed(0)).to(args.device)
    clock = Clock(args.device)
    times: dict[str, list[float]] = {"dense": [], "pikv": []}
    cpu_times: dict[str, list[float]] = {"dense": [], "pikv": []}
    difference = 0.0
    with torch.no_grad(), pikv_ds.attach(pikv, args.config) as cache:
        past = cache_of(dense(ids, use_cache=True))
        given = {"dense": cache_argument(dense, past), "pikv": cache_argument(pikv, cache)}
        pikv(ids)
        token = ids[:, -1:]
        for step in range(args.warmup + args.steps):
            logits = {}
            # The order alternates, so that neither always runs on the other's warm caches.
            for name in ("dense", "pikv") if step % 2 else ("pikv", "dense"):
                started, cpu_started = clock.now(), time.process_time()
                out = (dense if name == "dense" else pikv)(token, **given[name]).logits
                elapsed, cpu = 1e3 * (clock.now() - started), 1e3 * (time.process_time() - cpu_started)
                logits[name] = out
                if step >= args.warmup:
                    times[name].append(elapsed)
                    cpu_times[name].append(cpu)
            difference = max(difference, (logits["dense"] - logits["pikv"]).abs().max().item())
            token = logits["dense"][:, -1].argmax(-1, keepdim=True)
        stats = cache.stats()
    dense_bytes = sum(t.nbytes for layer in past.layers for t in (layer.keys, layer.values))
    ratios = [p / d for p, d in zip(times["pikv"], times["dense"], strict=True)]
    common = {"context_tokens": context, "batch": args.batch, "dtype": args.dtype, "threads": args.threads, "steps": args.steps}
    return [
        {
            "name": "DynamicCache + sdpa",
            **common,
            **_spread("step_ms", times["dense"]),
            "cpu_ms": median(cpu_times["dense"]),
            **_spread("ratio", [1.0] * len(ratios)),
            "max_logit_diff": 0.0,
            "kv_bytes": dense_bytes,
            "attention_impl": "sdpa",
        },
        {
            "name": "pikv exact",
            **common,
            **_spread("step_ms", times["pikv"]),
            "cpu_ms": median(cpu_times["pikv"]),
            **_spread("ratio", ratios),
            "max_logit_diff": difference,
            "kv_bytes": stats["kv_bytes_allocated"],
            "attention_impl": stats["attention_impl"],
        },
    ]


def _load(args: argparse.Namespace):
    import torch
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    from pikv_ds.bundled import model_path

    if args.model == "wide":
        torch.manual_seed(0)
        shape = Qwen3MoeConfig(
            num_hidden_layers=1, hidden_size=1024, num_attention_heads=32, num_key_value_heads=8, head_dim=128, num_experts=4,
            num_experts_per_tok=2, moe_intermediate_size=256, intermediate_size=256, vocab_size=512, max_position_embeddings=1 << 17,
            attn_implementation="sdpa",
        )  # fmt: skip
        return Qwen3MoeForCausalLM(shape).to(args.device, getattr(torch, args.dtype)).eval()
    model = AutoModelForCausalLM.from_pretrained(
        args.model or model_path(), dtype=getattr(torch, args.dtype), attn_implementation="sdpa", local_files_only=True
    )
    return model.eval().to(args.device)


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _spread(name: str, values: list[float]) -> dict[str, float]:
    fifths = quantiles(values, n=5) if len(values) > 1 else [values[0]] * 4
    return {name: median(values), f"{name}_p20": fifths[0], f"{name}_p80": fifths[3]}


def _round(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value
