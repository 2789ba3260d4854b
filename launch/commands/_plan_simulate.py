"""`pikv plan --simulate`: a decode step on 8 to 512 ranks of a named interconnect, beside three other ways to hold the cache."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from pikv_ds.errors import ConfigError
from pikv_ds.launch.evaluation.report import check_matplotlib
from pikv_ds.launch.output import human_bytes, print_table
from pikv_ds.launch.simulate.interconnects import INTERCONNECTS

from . import _plan_model as plan_model

if TYPE_CHECKING:
    from pikv_ds.launch.simulate.strategies import Job
    from pikv_ds.launch.simulate.traces import Trace

SAMPLE = 1 << 15  # tokens of a layer that are placed one by one
RECORDED = 20_480  # tokens of the bundled model's trace
FOLLOWING_BESIDE = "uniform"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("simulation of a decode step (docs/guide/simulating.md says what it leaves out)")
    group.add_argument(
        "--simulate",
        metavar="TRACE",
        help="what routers choose: uniform, zipf, bundled (recorded now), or a file of safetensors as for --placement",
    )
    group.add_argument("--interconnect", choices=sorted(INTERCONNECTS), default="h100-ndr", help="default h100-ndr")
    group.add_argument("--seed", type=int, default=0, help="of a drawn trace (default 0)")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows "step" per strategy and number of ranks, and "following" of KV that follows experts. Prints and draws. Raises: ConfigError."""
    from pikv_ds.launch.simulate.figures import draw
    from pikv_ds.launch.simulate.following import following
    from pikv_ds.launch.simulate.strategies import STRATEGIES, simulate
    from pikv_ds.launch.simulate.traces import drawn

    if args.context is None or len(args.context) != 1:
        raise ConfigError("--simulate needs --context with one number of tokens per request")
    if args.num_shards is not None or args.tiers is not None or args.placement is not None:
        raise ConfigError("--simulate has one shard per rank and one tier: leave out --num-shards, --tiers and --placement")
    if args.plot is not None:
        check_matplotlib()
    given, net = plan_model.read(args), INTERCONNECTS[args.interconnect]
    trace = trace_of(args, given)
    jobs = [job(args, given, ranks) for ranks in args.ranks]
    rows = [
        simulate(strategy, each, trace, net) | paper_terms(each, trace, args.kept_pages)
        for each in jobs
        for strategy in STRATEGIES
    ]  # fmt: skip
    common = {
        "model": args.model or "bundled", "interconnect": args.interconnect, "trace": trace.name, "context": args.context[0],
        "batch": args.batch, "codec": args.codec, "dtype": given.dtype, "page_size": given.page_size,
    }  # fmt: skip
    rows = [row | common for row in rows]
    beside = drawn(
        FOLLOWING_BESIDE, layers=len(trace.ids), tokens=trace.ids.shape[1], experts=trace.num_experts, k=trace.ids.shape[2], seed=args.seed
    )
    followed = []
    for ranks in args.ranks:
        own = job(args, given, ranks, requests="distinct")
        for each in (trace, beside) if trace.name != FOLLOWING_BESIDE else (trace,):
            followed += following(own, each)
    show(rows, followed, net.source, STRATEGIES)
    if args.plot is not None:
        draw(args.plot, rows)
        print(f"Drawn: {args.plot}")
    return rows + followed


def trace_of(args: argparse.Namespace, given: plan_model.PlannedModel) -> Trace:
    from pikv_ds.launch.simulate import traces

    if args.simulate == "bundled":
        return traces.bundled(RECORDED)
    if args.simulate not in traces.DRAWN:
        return traces.read(args.simulate)
    experts = next((n for name in ("num_experts", "n_routed_experts", "num_local_experts") if (n := getattr(given.text, name, None))), None)
    if experts is None:
        raise ConfigError(f"--simulate {args.simulate}: the model's configuration names no experts to draw from; give a trace's file")
    k = getattr(given.text, "num_experts_per_tok", None) or 1
    return traces.drawn(args.simulate, layers=len(given.layers), tokens=RECORDED, experts=experts, k=k, seed=args.seed)


def job(args: argparse.Namespace, given: plan_model.PlannedModel, ranks: int, requests: str | None = None) -> Job:
    import torch

    from pikv_ds.launch.simulate.strategies import Job
    from pikv_ds.pages.pool import tail_dtype

    dtype = getattr(torch, given.dtype)
    try:
        pools = [given.codec.pool(layer, given.page_size, dtype) for layer in given.layers]
    except ValueError as error:
        raise ConfigError(f"--codec {args.codec}: {error}") from None
    if any(pool.light is not None or pool.request_bytes for pool in pools):
        raise ConfigError(f"--simulate: codec {args.codec} keeps more than pages of a request; see `pikv plan` without --simulate")
    return Job(
        layers=given.layers, num_q_heads=given.text.num_attention_heads, itemsize=dtype.itemsize, page_size=given.page_size,
        record_bytes=[pool.fmt.record_bytes for pool in pools],
        tail_bytes=[pool.fmt.tail_elements * tail_dtype(dtype).itemsize for pool in pools], requests=requests or args.requests,
        lengths=[[args.context[0]] * args.batch] * ranks, sample=SAMPLE,
    )  # fmt: skip


def paper_terms(job: Job, trace: Trace, kept: int | None) -> dict[str, float]:
    """Of one request and all layers, beside the bytes that are measured."""
    from pikv_ds.launch.simulate import paper

    tokens = job.stored[0]
    kept = kept or -(-tokens // job.page_size)
    best, k = paper.best_capacity(tokens, job.ranks, kept), trace.ids.shape[2]
    entries = [size / job.page_size for size in job.record_bytes]
    return {
        "paper_s_star": best,
        "paper_m_kv_bytes": sum(paper.rank_bytes(width, tokens, job.ranks, kept, best) for width in entries),
        "paper_m_kv_page_bytes": sum(paper.rank_bytes(width, tokens, job.ranks, kept, job.page_size) for width in entries),
        "paper_fpga_us": sum(paper.fpga_us(trace.num_experts, k, kept, width) for width in entries),
        "paper_fpga_bits": paper.fpga_bits(trace.num_experts, k, kept, best),
        "paper_k": kept,
    }


def show(rows: list[dict[str, Any]], followed: list[dict[str, Any]], source: str, strategies: dict[str, str]) -> None:
    first = rows[0]
    print_table(
        f"A decode step, {first['requests']} requests of {first['context']} tokens, {first['batch']} per rank, {first['dtype']}, codec "
        f"{first['codec']}, routing {first['trace']}, {first['interconnect']}",
        [
            {
                "ranks": row["ranks"], "KV": row["strategy"], "fullest rank": human_bytes(row["kv_bytes_fullest"]),
                "/ mean": f"{row['imbalance']:.3f}", "layer": f"{row['imbalance_worst_layer']:.2f}",
                "sent per rank": human_bytes(row["wire_bytes"]), "calls": row["collectives"], "read ms": f"{row['read_ms']:.3f}",
                "wire ms": f"{row['wire_ms']:.3f}", "step ms": f"{row['step_ms']:.3f}",
            }
            for row in rows
        ],
    )  # fmt: skip
    print("\n".join(f"{name}: {what}." for name, what in strategies.items()))
    print(
        "/ mean: fullest rank over the mean, all layers; layer: the worst of them. Times are lower bounds of reading stored entries and\n"
        f"of the collectives, one after the other, nothing else of a step. Sources: {source}."
    )
    if any(row["means"] for row in rows):
        print(f"More than {SAMPLE} tokens are not placed one by one: their shards are means, by how often each expert is chosen.")
    once = {row["ranks"]: row for row in rows}
    print_table(
        f"The PiKV paper's terms, one request, K = {first['paper_k']} pages",
        [
            {
                "ranks": ranks, "S*": f"{row['paper_s_star']:.2f}", "M_kv(S*)": human_bytes(row["paper_m_kv_bytes"]),
                "M_kv(page)": human_bytes(row["paper_m_kv_page_bytes"]), "FPGA us": f"{row['paper_fpga_us']:.1f}",
                "FPGA bits": f"{row['paper_fpga_bits']:.3g}",
            }
            for ranks, row in once.items()
        ],
    )  # fmt: skip
    print_table(
        "KV that follows experts against KV that stays, distinct requests; bytes across ranks per token and layer",
        [
            {
                "ranks": row["ranks"], "routing": row["trace"], "KV": row["kv"], "entries sent": f"{row['entries_sent_share']:.2f}",
                "exact": human_bytes(row["bytes_exact"]), "top k only": human_bytes(row["bytes_top_k"]),
                "ranks reached": f"{row['ranks_reached_top_k']:.2f}", "fullest / mean": f"{row['fullest_over_mean']:.3f}",
                "uneven": f"{row['fullest_over_mean_uneven']:.3f}", "no spill": f"{row['fullest_without_spill']:.2f}",
                "moved by a plan": "-" if row["bytes_moved_by_a_plan"] is None else human_bytes(row["bytes_moved_by_a_plan"]),
            }
            for row in followed
        ],
    )  # fmt: skip
