"""`pikv bench serve`: load on an OpenAI-compatible end point that runs, of this project or another.

Requests of mixed lengths, so many at once, greedy and streamed. Columns:
    lost                 requests without an answer, or with an error
    wrong                greedy texts that differ from transformers' own generate() of that prompt alone; ties: those of them where the two
                         best tokens lie within 1e-4 of each other at the first difference
    ttft, tbt, latency   milliseconds as the client sees them, median and 99th percentile: to the first token, between two, to the last
    tokens_s             tokens generated / seconds from the first request to the last answer
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import time
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from pikv_ds.launch.output import print_table, write_json

_SHOWN = (
    "name",
    "requests",
    "at_once",
    "lost",
    "wrong",
    "ttft_p50",
    "ttft_p99",
    "tbt_p50",
    "tbt_p99",
    "latency_p50",
    "latency_p99",
    "tokens_s",
)
_STARTS = 4  # beginnings that prompts share


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", default="http://127.0.0.1:8000", metavar="URL", help="of the end point (default http://127.0.0.1:8000)")
    parser.add_argument("--model", metavar="DIR", help="model folder, for prompts and single runs (default: the bundled model)")
    parser.add_argument("--name", metavar="NAME", help="what the end point calls the model (default: the first that it lists)")
    parser.add_argument("--label", default="pikv serve", metavar="TEXT", help="name of the row (default 'pikv serve')")
    parser.add_argument("--requests", type=int, default=200, metavar="N", help="requests (default 200)")
    parser.add_argument("--at-once", type=int, default=32, metavar="C", help="requests under way at a time (default 32)")
    parser.add_argument("--longest-prompt", type=int, default=256, metavar="N", help="tokens of the longest prompt (default 256)")
    parser.add_argument("--longest-answer", type=int, default=48, metavar="N", help="tokens of the longest answer (default 48)")
    parser.add_argument("--shared", type=float, default=0.25, metavar="X", help="share of prompts that begin as others do (default 0.25)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="chooses prompts and lengths (default 0)")
    parser.add_argument("--timeout-s", type=float, default=600.0, metavar="S", help="a request without an answer is lost (default 600)")
    parser.add_argument("--unchecked", action="store_true", help="do not compare with single runs")


def run(args: argparse.Namespace) -> int:
    asked = make_load(args)
    load_before = os.getloadavg()[0]
    seconds = asyncio.run(send_all(args, asked))
    row = summary(args, asked, seconds) | {"load_average": [round(load_before, 2), round(os.getloadavg()[0], 2)]}
    row |= {"attainment": _attainment(args.url)}
    if not args.unchecked:
        row |= compare(args, asked)
    shown = {name: f"{row[name]:.1f}" if isinstance(row[name], float) else row[name] for name in _SHOWN if name in row}
    print_table(f"{args.url}: milliseconds as the client sees them", [shown])
    for one in asked:
        if one.error:
            print(f"lost: {one.error}")
    write_json(args.json, "bench serve", [row])
    return 1 if row["lost"] or row.get("wrong") else 0


@dataclass(slots=True)
class Asked:
    """One request, and what came of it. Times in seconds of time.perf_counter()."""

    prompt: str
    max_tokens: int
    text: str = ""
    tokens: int = 0
    started: float = 0.0
    times: list[float] = field(default_factory=list)
    error: str | None = None


def make_load(args: argparse.Namespace) -> list[Asked]:
    """Prompts are pieces of the bundled text."""
    from transformers import AutoTokenizer

    from pikv_ds.bundled import evaluation_text, model_path

    chosen, tokenizer = random.Random(args.seed), AutoTokenizer.from_pretrained(args.model or model_path(), local_files_only=True)
    ids = tokenizer(evaluation_text(), verbose=False).input_ids
    longest = args.longest_prompt

    def piece(length: int) -> str:
        at = chosen.randrange(max(1, len(ids) - length))
        return tokenizer.decode(ids[at : at + length])

    starts = [piece(longest // 2) for _ in range(_STARTS)]
    asked = []
    for _ in range(args.requests):
        length = max(2, int(longest ** chosen.uniform(0.3, 1.0)))  # many short ones, some long
        shares = chosen.random() < args.shared
        prompt = chosen.choice(starts) + piece(max(2, length // 4)) if shares else piece(length)
        asked.append(Asked(prompt, chosen.randint(2, args.longest_answer)))
    return asked


async def send_all(args: argparse.Namespace, asked: list[Asked]) -> float:
    from openai import AsyncOpenAI

    async with AsyncOpenAI(base_url=f"{args.url}/v1", api_key="none", max_retries=0, timeout=args.timeout_s) as client:
        name = args.name or (await client.models.list()).data[0].id
        waiting = iter(asked)

        async def one_client() -> None:
            for each in waiting:
                try:
                    await _send(client, name, each)
                except Exception as error:  # noqa: BLE001  whatever goes wrong, this request is lost and the others go on
                    each.error = f"{type(error).__name__}: {error}"

        started = time.perf_counter()
        await asyncio.gather(*(one_client() for _ in range(args.at_once)))
        return time.perf_counter() - started


async def _send(client: Any, name: str, asked: Asked) -> None:
    asked.started = time.perf_counter()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    async for chunk in await client.completions.create(
        model=name, prompt=asked.prompt, max_tokens=asked.max_tokens, temperature=0, **options
    ):
        if chunk.choices and (chunk.choices[0].text or not chunk.usage):
            asked.times.append(time.perf_counter())
            asked.text += chunk.choices[0].text
        if chunk.usage:
            asked.tokens = chunk.usage.completion_tokens
    if not asked.times or not asked.tokens:
        asked.error = "the stream ended without a token"


def summary(args: argparse.Namespace, asked: list[Asked], seconds: float) -> dict[str, Any]:
    done = [one for one in asked if one.error is None]
    first = [1e3 * (one.times[0] - one.started) for one in done]
    between = [1e3 * (b - a) for one in done for a, b in zip(one.times, one.times[1:], strict=False)]
    whole = [1e3 * (one.times[-1] - one.started) for one in done]
    row: dict[str, Any] = {"name": args.label, "requests": len(asked), "at_once": args.at_once, "lost": len(asked) - len(done)}
    for name, values in (("ttft", first), ("tbt", between), ("latency", whole)):
        row |= {f"{name}_p50": median(values) if values else None, f"{name}_p99": percentile(values, 0.99)}
    tokens = sum(one.tokens for one in done)
    options = ("longest_prompt", "longest_answer", "shared", "seed")
    return row | {"tokens_s": tokens / seconds, "tokens": tokens, "seconds": seconds} | {name: getattr(args, name) for name in options}


def percentile(values: list[float], share: float) -> float | None:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else None


def compare(args: argparse.Namespace, asked: list[Asked]) -> dict[str, Any]:
    """With each prompt alone in transformers' own generate(), fp32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pikv_ds.bundled import model_path

    path = args.model or model_path()
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True).eval()
    wrong, ties, differences = 0, 0, []
    for one in asked:
        if one.error is not None:
            continue
        ids = tokenizer(one.prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            out = model.generate(
                ids, max_new_tokens=one.max_tokens, do_sample=False, return_dict_in_generate=True, output_scores=True, use_cache=True
            )
        new = out.sequences[0, ids.shape[1] :].tolist()
        expected = tokenizer.decode(new, skip_special_tokens=True)
        if (one.text, one.tokens) == (expected, len(new)):
            continue
        wrong += 1
        least = min(float(scores[0].topk(2).values.diff().abs()) for scores in out.scores)
        ties += least < 1e-4
        differences.append({"prompt_tokens": ids.shape[1], "expected": expected, "got": one.text, "least_margin": least})
    return {"wrong": wrong, "ties": ties, "differences": differences}


def _attainment(url: str) -> dict[str, float | None] | None:
    """Of the end point's own targets, from its /metrics; None where it has none."""
    import httpx
    from prometheus_client.parser import text_string_to_metric_families

    answer = httpx.get(f"{url}/metrics")
    if answer.status_code != 200:
        return None
    counted: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            if sample.name == "pikv_target_total":
                counted.setdefault(sample.labels["target"], {})[sample.labels["met"]] = sample.value
    return {target: met["true"] / (met["true"] + met["false"]) if any(met.values()) else None for target, met in counted.items()}
