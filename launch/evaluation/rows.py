"""The one row of every table, and how the ranks' measurements become one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any, NamedTuple

from pikv_ds.cache.stats import dense_bytes
from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.launch.ranks import gather

from .agreement import CHOSEN, Agreed
from .backend import Backend, Memory
from .ppl import PplSums
from .recall import Answer
from .spec import COLUMNS, RULER, EvalSpec, Unit, store_share

DEPTH_BINS = 5


class Measured(NamedTuple):
    """What one rank brings: the task's result, its cache after the first batch and the tokens in it."""

    data_rank: int
    result: Any
    memory: Memory
    tokens: int


def build_row(backend: Backend, spec: EvalSpec, unit: Unit, own: Measured) -> dict[str, Any]:
    """One row from all ranks, the same on each. Collective over the job."""
    ranks: list[Measured] = gather(own)
    # Replicated requests were measured by every rank, distinct ones once per data rank.
    counted = list({measured.data_rank: measured for measured in reversed(ranks)}.values()) if spec.requests == "distinct" else ranks[:1]
    quality, detail = _QUALITY[unit.task]([measured.result for measured in counted])
    allocated, tokens = [measured.memory.allocated for measured in ranks], sum(measured.tokens for measured in counted)
    config = None if unit.block is None else PiKVConfig.parse(unit.block)
    row = (
        dict.fromkeys(COLUMNS)
        | quality
        | {
            "backend": backend.name,
            "config": None if config is None else config.model_dump(mode="json", exclude_defaults=True),
            "method": method_name(config),
            "task": unit.task,
            "ranks": spec.ranks,
            "tp": spec.tp,
            "ep": spec.ep,
            "context": spec.context,
            "chunk": spec.chunk,
            "seed": spec.seed,
            "dtype": spec.dtype,
            "bytes_per_token": sum(allocated) / tokens,
            "compression": _two_byte_bytes(backend, spec, unit) / (sum(allocated) / tokens),
            "entries_read": _entries_read(config, [measured.memory for measured in ranks]),
            "mass_recall": _mass_recall(config, [measured.memory for measured in ranks]),
            "kv_bytes_per_rank": allocated,
            "attention_impl": ranks[0].memory.attention_impl,
        }
    )
    row["detail"] = detail | {
        "samples": spec.samples,
        "batch": min(spec.batch, spec.samples),
        "requests": spec.requests,
        "tokens_in_cache": tokens,
        "kv_bytes_dense_per_rank": [measured.memory.dense for measured in ranks],
        "fullest_shard_over_mean": ranks[0].memory.fullest_shard,
        "misses_per_shard": ranks[0].memory.misses,
        "store_share": store_share(backend.layers, spec.context, spec.chunk, spec.scored),
    }
    if spec.prefill_chunk is not None:
        row["detail"]["prefill_chunk"] = spec.prefill_chunk
    if spec.template is False:
        row["detail"]["plain_prompts"] = True
    assert set(row) == {*COLUMNS, "detail"}, sorted(row)
    return row


def method_name(config: PiKVConfig | None) -> str:
    """The methods that are not the default, joined by +; `exact` when all are, `dense` for the host's own cache.

    "host_penalty" stands for a penalty on the host's routers.
    """
    if config is None:
        return "dense"
    chosen = [config.routing.method, config.compression.method, config.scheduling.method]
    chosen += ["host_penalty"] if config.routing.host_penalty.asked else []
    return "+".join(name for name in chosen if name not in ("all", "none")) or "exact"


def _entries_read(config: PiKVConfig | None, memories: list[Memory]) -> float | None:
    """Share of the visible stored entries that a query reads, mean over kv heads; of the queries that are scored, or answer."""
    if _reads_all(config):
        return 1.0
    visible = sum(memory.visible for memory in memories)
    return sum(memory.read for memory in memories) / visible if visible else None


def _mass_recall(config: PiKVConfig | None, memories: list[Memory]) -> float | None:
    """Share of the attention to stored entries that lies on those read, mean over query heads, layers and queries; kept entries only."""
    if _reads_all(config):
        return 1.0
    queries = sum(memory.queries for memory in memories)
    return sum(memory.mass for memory in memories) / queries if queries and config.scheduling.method == "none" else None


def _reads_all(config: PiKVConfig | None) -> bool:
    return config is None or (config.routing.method == "all" and config.scheduling.method == "none")


def _two_byte_bytes(backend: Backend, spec: EvalSpec, unit: Unit) -> float:
    """Bytes per token of an ordinary cache of 2-byte elements with the same requests in it."""
    tokens = spec.context if unit.task in ("ppl", "bytes") else spec.context - 1
    return sum(dense_bytes(layer, 1, tokens, 2) for layer in backend.layers) / tokens


def _ppl_quality(results: Sequence[PplSums]) -> tuple[dict, dict]:
    tokens, nll, dense_nll, kl = map(sum, zip(*results, strict=True))
    change = 100 * math.expm1((nll - dense_nll) / tokens)
    return {"ppl": math.exp(nll / tokens), "ppl_change_pct": change, "kl": kl / tokens}, {"scored_tokens": tokens}


def _recall_quality(results: Sequence[tuple[list[Answer], list[float]]]) -> tuple[dict, dict]:
    answers = [answer for found, _ in results for answer in found]
    share = lambda chosen: [_total(answer.found for answer in chosen), len(chosen)]  # noqa: E731
    depth_bin = lambda answer: None if answer.depth is None else min(int(answer.depth * DEPTH_BINS), DEPTH_BINS - 1)  # noqa: E731
    detail = {
        "found_by_kind": {kind: share([a for a in answers if a.kind == kind]) for kind in sorted({a.kind for a in answers})},
        "found_by_depth": [share([a for a in answers if depth_bin(a) == idx]) for idx in range(DEPTH_BINS)],
    }
    if answers[0].found_after is not None:
        detail["found_question_after_eviction"] = [_total(answer.found_after for answer in answers), len(answers)]
    found, asked = share(answers)
    return {"recall": found / asked, "step_ms": median(results[0][1])}, detail


def _total(found: Iterable[float]) -> float:
    """A whole number where prompts were answered or not."""
    total = sum(found)
    return int(total) if total == int(total) else round(total, 3)


def _agreement_quality(results: Sequence[list[Agreed]]) -> tuple[dict, dict]:
    rows = [row for result in results for row in result]
    detail = {"agreement": sum(row.alike for row in rows) / (CHOSEN * len(rows))}
    return {}, detail | {"tokens_until_first_difference": sum(row.until_first for row in rows) / len(rows), "tokens_chosen": CHOSEN}


_QUALITY = {"ppl": _ppl_quality, "bytes": lambda results: ({}, {}), "agreement": _agreement_quality}
_QUALITY |= dict.fromkeys(("recall", *RULER), _recall_quality)
