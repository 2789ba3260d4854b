"""`pikv bench prefix`: requests with a long common beginning, one generate() after the other, with storage.prefix and without.

Two models of the same weights run in turns, one request each. Columns:
    tokens_run             tokens of prompts that the model has run
    ttft_ms, ttft_cpu_ms   until the first token, median over the requests after the first: wall and CPU time
    step_ms                of a later forward, median: parked rows lie beside it with prefix
    kv_bytes               allocated at the end: all requests are held with prefix, the last one without
    kv_bytes / ideal       ideal: of the common beginning once, and of what each request has beside it, without rounding to pages
    kv_bytes / by pages    the same, each request's own tokens rounded to pages
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import time
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

from pikv_ds.launch.output import print_table, write_json

if TYPE_CHECKING:
    import torch

_SHOWN = ("prefix", "page_size", "tokens_run", "ttft_ms", "ttft_cpu_ms", "step_ms", "kv_bytes", "kv_bytes / ideal", "kv_bytes / by pages")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, default=1000, metavar="N", help="of the common beginning (default 1000)")
    parser.add_argument("--own", type=int, default=64, metavar="N", help="tokens of each prompt after it (default 64)")
    parser.add_argument("--new", type=int, default=16, metavar="N", help="tokens generated for each (default 16)")
    parser.add_argument("--requests", type=int, default=16, metavar="N", help="requests (default 16)")
    parser.add_argument("--page-size", type=int, nargs="+", default=[8, 16], metavar="P", help="entries of a page (default 8 16)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="torch threads (default 1)")


def run(args: argparse.Namespace) -> int:
    import torch

    torch.set_num_threads(args.threads)
    rows = [row for page_size in args.page_size for row in _rows(args, page_size)]
    title = f"{args.requests} requests of {args.tokens} common and {args.own} own tokens, {args.new} generated, {args.threads} thread(s)"
    print_table(title, [{key: _short(row[key]) for key in _SHOWN} for row in rows])
    command = f"bench prefix --tokens {args.tokens} --own {args.own} --new {args.new} --requests {args.requests} --threads {args.threads}"
    write_json(args.json, f"{command} --page-size {' '.join(map(str, args.page_size))}", rows)
    return 0


def _rows(args: argparse.Namespace, page_size: int) -> list[dict[str, Any]]:
    import torch

    import pikv_ds
    from pikv_ds.bundled import load

    budget = args.tokens + args.requests * (args.own + args.new)
    models = {name: load()[0] for name in ("off", "on")}
    blocks = {"off": {}, "on": {"prefix": {"enabled": True, "budget_tokens": budget}}}
    generator, vocabulary = torch.Generator().manual_seed(0), models["on"].config.vocab_size
    common = torch.randint(3, vocabulary, (1, args.tokens), generator=generator)
    prompts = [torch.cat([common, torch.randint(3, vocabulary, (1, args.own), generator=generator)], 1) for _ in range(args.requests)]
    runs = {name: _Run(model, args.new) for name, model in models.items()}
    with contextlib.ExitStack() as stack:
        for name, model in models.items():
            block = {"page_size": page_size, "storage": blocks[name]}
            runs[name].cache = stack.enter_context(pikv_ds.attach(model, block))
        for i, ids in enumerate(prompts):
            for name in ("off", "on") if i % 2 else ("on", "off"):  # in turns, so that neither always comes second
                runs[name].generate(ids)
        same = runs["off"].answers == runs["on"].answers
        return [_row(args, page_size, name, run) | {"same_tokens": same} for name, run in runs.items()]


class _Run:
    """generate() on one model. ms, cpu_ms: until the first token; steps_ms: of each later forward; tokens: run by first forwards."""

    cache: Any

    def __init__(self, model: Any, new: int) -> None:
        self.model, self.new = model, new
        self.ms: list[float] = []
        self.cpu_ms: list[float] = []
        self.steps_ms: list[float] = []
        self.tokens: list[int] = []
        self.answers: list[list[int]] = []
        self._ends: list[tuple[float, float]] = []
        model.register_forward_pre_hook(lambda module, args, given: self._begins(given["input_ids"].numel()), with_kwargs=True)
        model.register_forward_hook(lambda *_: self._ends.append((time.perf_counter(), time.process_time())))

    def _begins(self, tokens: int) -> None:
        if not self._ends:
            self.tokens.append(tokens)

    def generate(self, ids: torch.Tensor) -> None:
        self._ends = []
        started, cpu = time.perf_counter(), time.process_time()
        made = self.model.generate(ids, max_new_tokens=self.new, min_new_tokens=self.new, do_sample=False, pad_token_id=0)
        self.answers.append(made[0, ids.shape[1] :].tolist())
        self.ms.append(1e3 * (self._ends[0][0] - started))
        self.cpu_ms.append(1e3 * (self._ends[0][1] - cpu))
        self.steps_ms += [1e3 * (after - before) for (before, _), (after, _) in itertools.pairwise(self._ends)]


def _row(args: argparse.Namespace, page_size: int, name: str, run: _Run) -> dict[str, Any]:
    stats, rows = run.cache.stats(), args.requests if name == "on" else 1
    held = args.own + args.new - 1  # the last token has not been run
    token = run.model.config.num_hidden_layers * stats["kv_bytes_live"] / stats["entries_live"]
    shared = args.tokens // page_size * page_size
    by_pages = shared + rows * -(-(args.tokens - shared + held) // page_size) * page_size
    ideal, later = (args.tokens + rows * held) * token, run.ms[1:]
    fifths = quantiles(later, n=5) if len(later) > 1 else later * 4
    return {
        "prefix": name, "requests": args.requests, "common_tokens": args.tokens, "own_tokens": args.own, "new_tokens": args.new,
        "page_size": page_size, "tokens_run": sum(run.tokens), "ttft_ms": median(later), "ttft_p20": fifths[0], "ttft_p80": fifths[3],
        "ttft_cpu_ms": median(run.cpu_ms[1:]), "first_ttft_ms": run.ms[0], "step_ms": median(run.steps_ms),
        "kv_bytes": stats["kv_bytes_allocated"], "kv_bytes_parked": stats["kv_bytes_parked"], "ideal_bytes": round(ideal),
        "kv_bytes / ideal": stats["kv_bytes_allocated"] / ideal, "kv_bytes / by pages": stats["kv_bytes_allocated"] / (by_pages * token),
        "hit_rate": stats.get("prefix_hit_rate"), "tokens_reused": stats.get("prefix_tokens_reused"), "rows_parked": stats["rows_parked"],
        "tokens_parked": stats.get("prefix_tokens_parked"), "attention_impl": stats["attention_impl"],
    }  # fmt: skip


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value
