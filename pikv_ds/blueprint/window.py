"""What two pools of pages (tiers/window.py) can't do, with the way out."""

from __future__ import annotations

from .facts import Facts
from .rule import Rule


def _given(facts: Facts) -> str:
    codec, block = facts.methods.codec, facts.config.compression
    if codec.light is not None:
        return f"pikv.compression.method = {codec.name!r}"
    return f"pikv.compression.raw_sink_tokens = {block.raw_sink_tokens}, raw_recent_tokens = {block.raw_recent_tokens}"


def _windows(facts: Facts) -> str | None:
    if facts.methods.near is None or facts.full_attention:
        return None
    return (
        f"{_given(facts)} on a model whose layers all have a sliding window: these keep one pool of pages, in the codec's format; leave "
        f"it out"
    )


def _request_router(facts: Facts) -> str | None:
    codec, routing = facts.methods.codec, facts.config.routing
    if facts.methods.near is None or not codec.per_request or facts.methods.router.reads_all:
        return None
    return (
        f"{_given(facts)} with pikv.compression.method = {codec.name!r} and pikv.routing.method = {routing.method!r}: a router "
        f"is told of keys when they are stored, and here they have no coefficients before they leave the raw window, as the basis of a "
        f"request is fitted after its forward; use routing 'all', a calibrated codec ('lora', 'crop'), or leave the raw window out"
    )


def _heads(facts: Facts) -> str | None:
    head_budget = facts.config.scheduling.head_budget
    if facts.methods.near is None or head_budget == "shared":
        return None
    return (
        f"{_given(facts)} with pikv.scheduling.head_budget = {head_budget!r}: a page that holds one KV head has no second "
        f"pool in this version; legal is 'shared'"
    )


def _bytes(facts: Facts) -> str | None:
    budget = facts.config.scheduling.budget_bytes
    if facts.methods.near is None or budget is None:
        return None
    return (
        f"{_given(facts)} with pikv.scheduling.budget_bytes = {budget}: entries have two sizes, so bytes do not say "
        f"how many stay; use budget_tokens or budget_ratio"
    )


def _budget_pages(facts: Facts) -> str | None:
    block, budget = facts.config.compression, facts.config.routing.budget_pages
    least = (block.raw_sink_tokens or 0) + (block.raw_recent_tokens or 0)
    if facts.methods.near is None or budget is None or budget * facts.page_size >= least:
        return None
    return (
        f"pikv.routing.budget_pages = {budget}: {budget} pages of {facts.page_size} tokens are fewer than raw_sink_tokens + "
        f"raw_recent_tokens = {least} of pikv.compression, which every query reads; raise it or lower those"
    )


def _needed(facts: Facts) -> str | None:
    routing = facts.config.routing
    if facts.methods.near is None or routing.exchange != "needed" or facts.methods.router.budgeted:
        return None
    return (
        f"{_given(facts)} with pikv.routing.exchange = 'needed' and method {routing.method!r}: every query reads the raw pages, and a "
        f"router of shards does not say where these are; use exchange 'all', or a router with a budget"
    )


def _attention(facts: Facts) -> str | None:
    if facts.methods.codec.light is None or facts.config.storage.expert_ids != "true":
        return None
    return (
        f"{_given(facts)} with pikv.storage.expert_ids = 'true': entries are stored after the queries of their forward have read, so the "
        f"attention they get is not known; use 'previous_layer'"
    )


def _demoted(facts: Facts) -> str | None:
    router = facts.methods.router
    if facts.methods.near is None or router.rebuilds:
        return None
    return (
        f"pikv.routing.method = {router.name!r} keeps summaries of pages and can't make them for pages that were encoded again "
        f"(Router.rebuilt); use another router, or pikv.compression without raw_sink_tokens and raw_recent_tokens"
    )


BLOCK = (
    Rule(
        "two-pools-svd-router", "block", ("compression", "routing"), "a raw window, a codec fitted to each request, and a router",
        "keys have no coefficients before they leave the window, so the router can't be told of them",
        "routing 'all', a calibrated codec, or no raw window", _request_router,
    ),
    Rule(
        "two-pools-shared-heads", "block", ("compression", "scheduling"), "a raw window or a light codec with budgets per head",
        "a page that holds one KV head has no second pool", "head_budget 'shared'", _heads,
    ),
    Rule(
        "two-pools-no-byte-budget", "block", ("compression", "scheduling"), "a raw window or a light codec with budget_bytes",
        "entries have two sizes", "budget_tokens or budget_ratio", _bytes,
    ),
    Rule(
        "budget-holds-raw-window", "block", ("compression", "routing"), "fewer budget_pages than the raw window fills",
        "every query reads it, inside the budget", "more pages, or a smaller window", _budget_pages,
    ),
    Rule(
        "two-pools-needed-exchange", "block", ("compression", "routing"), "a raw window, exchange 'needed' and a router of shards",
        "it does not say on which ranks the raw pages are", "exchange 'all', or a router with a budget", _needed,
    ),
    Rule(
        "light-codec-sees-attention", "block", ("compression", "storage"), "a light codec with expert_ids 'true'",
        "entries are stored after their queries, so the attention they get is not known", "expert_ids 'previous_layer'", _attention,
    ),
    Rule(
        "router-follows-demotion", "block", ("compression", "routing"),
        "two pools of pages with a router that keeps summaries and can't make them for pages that moved",
        "pages are encoded again when they leave the first pool", "another router, or no raw window", _demoted,
    ),
)  # fmt: skip
MODEL = (
    Rule(
        "two-pools-full-attention", "model", ("compression",), "a raw window or a light codec on a model of sliding windows alone",
        "layers with a window keep one pool", "leave it out", _windows,
    ),
)  # fmt: skip
