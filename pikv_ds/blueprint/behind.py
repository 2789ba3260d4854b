"""What pools behind those of the codec can't do, with the way out."""

from __future__ import annotations

from .facts import Facts
from .rule import Rule


def _given(facts: Facts) -> str:
    return "pikv.pools = [" + ", ".join(f"{kind.name!r}" for kind in facts.methods.pools) + "]"


def _routed(facts: Facts) -> str | None:
    if not facts.methods.pools or facts.methods.router.reads_all:
        return None
    return (
        f"{_given(facts)} with pikv.routing.method = {facts.config.routing.method!r}: a router chooses from one pool, and every query "
        f"would read what has left it; use routing 'all', or leave the pools out"
    )


def _heads(facts: Facts) -> str | None:
    head_budget = facts.config.scheduling.head_budget
    if not facts.methods.pools or head_budget == "shared":
        return None
    return (
        f"{_given(facts)} with pikv.scheduling.head_budget = {head_budget!r}: a page that holds one KV head has one pool; legal is 'shared'"
    )


def _bytes(facts: Facts) -> str | None:
    budget = facts.config.scheduling.budget_bytes
    if not facts.methods.pools or budget is None:
        return None
    return (
        f"{_given(facts)} with pikv.scheduling.budget_bytes = {budget}: entries have several sizes, so bytes do not say how many stay; use "
        f"budget_tokens or budget_ratio"
    )


def _request(facts: Facts) -> str | None:
    if not facts.methods.pools or not facts.methods.codec.per_request:
        return None
    return (
        f"{_given(facts)} with pikv.compression.method = {facts.methods.codec.name!r}, whose bases change while a request grows: pages "
        f"would be encoded again in every pool each time; use a calibrated codec ('lora', 'crop'), or leave the pools out"
    )


def _recent(facts: Facts) -> str | None:
    recent = [kind.recent_tokens for kind in facts.methods.pools]
    near = facts.config.compression.raw_recent_tokens or 0
    if not recent or (recent == sorted(recent) and recent[0] >= near):
        return None
    return (
        f"{_given(facts)} keep the latest {', '.join(map(str, recent))} tokens out, and pikv.compression.raw_recent_tokens = {near}: pages "
        f"reach a pool through the ones before it; give pools that lie further back no smaller numbers"
    )


def _windows(facts: Facts) -> str | None:
    if not facts.methods.pools or facts.full_attention:
        return None
    return f"{_given(facts)} on a model whose layers all have a sliding window: these keep one pool of pages; leave the pools out"


BLOCK = (
    Rule(
        "pools-read-all", "block", ("pools", "routing"), "pools behind the codec's with a router", "a router chooses from one pool",
        "routing 'all'", _routed,
    ),
    Rule(
        "pools-shared-heads", "block", ("pools", "scheduling"), "pools behind the codec's with budgets per head",
        "a page that holds one KV head has one pool", "head_budget 'shared'", _heads,
    ),
    Rule(
        "pools-no-byte-budget", "block", ("pools", "scheduling"), "pools behind the codec's with budget_bytes",
        "entries have several sizes", "budget_tokens or budget_ratio", _bytes,
    ),
    Rule(
        "pools-no-request-bases", "block", ("pools", "compression"), "pools behind a codec that is fitted to each request",
        "its bases change while a request grows", "a calibrated codec", _request,
    ),
    Rule(
        "pools-in-order", "block", ("pools", "compression"), "a pool that takes newer tokens than the one before it lets go",
        "pages reach a pool through the ones before it", "numbers of recent tokens that ascend", _recent,
    ),
)  # fmt: skip
MODEL = (
    Rule(
        "pools-full-attention", "model", ("pools",), "pools behind the codec's on a model of sliding windows alone",
        "layers with a window keep one pool", "leave them out", _windows,
    ),
)  # fmt: skip
