"""What rows that others begin as (storage.prefix) can't do, with the way out."""

from __future__ import annotations

from .facts import Facts
from .rule import Rule

_GIVEN = "pikv.storage.prefix.enabled = true"


def _on(facts: Facts) -> bool:
    return facts.config.storage.prefix.enabled


def _fitted(facts: Facts) -> str | None:
    codec = facts.methods.codec
    if not _on(facts) or not codec.per_request:
        return None
    return (
        f"{_GIVEN} with pikv.compression.method = {codec.name!r}, which fits a basis to each request: what one request has stored means "
        f"nothing in another's; use a codec that is the same for all ('none', 'int8', 'lora'), or leave prefix out"
    )


def _evicted(facts: Facts) -> str | None:
    if not _on(facts) or facts.methods.policy.keeps_all:
        return None
    return (
        f"{_GIVEN} with pikv.scheduling.method = {facts.config.scheduling.method!r}: entries of a finished request were evicted that a "
        f"shorter one would still hold; use scheduling 'none', or leave prefix out"
    )


def _pools(facts: Facts) -> str | None:
    if not _on(facts) or (facts.methods.near is None and not facts.methods.pools):
        return None
    return (
        f"{_GIVEN} with several pools of pages (raw_sink_tokens, raw_recent_tokens, a light codec or pikv.pools): pages of a finished "
        f"request have moved on that a shorter one would hold near; use one pool, or leave prefix out"
    )


def _learns(facts: Facts) -> str | None:
    if not _on(facts) or not facts.methods.router.learns:
        return None
    return (
        f"{_GIVEN} with pikv.routing.method = {facts.config.routing.method!r}, which keeps what it has seen of a request and can't take "
        f"back a part of it; use routing 'all', or leave prefix out"
    )


def _moves(facts: Facts) -> str | None:
    if not _on(facts) or facts.config.storage.rebalance is None:
        return None
    return (
        f"{_GIVEN} with pikv.storage.rebalance: rows that wait for requests that begin alike have pages that no move takes along; set "
        f"rebalance to null, or leave prefix out"
    )


def _auto(facts: Facts) -> str | None:
    if not _on(facts) or facts.ranks == 1 or facts.config.storage.requests != "auto":
        return None
    return (
        f"{_GIVEN} with pikv.storage.requests = 'auto' on {facts.ranks} ranks: beginnings are looked up before a forward shows whether the "
        f"ranks run the same requests; set requests to 'replicated' or 'distinct'"
    )


def _windows(facts: Facts) -> str | None:
    found = next(((i, spec.window) for i, spec in enumerate(facts.layers) if spec.window is not None), None)
    if not _on(facts) or found is None:
        return None
    return (
        f"{_GIVEN} on a model whose layer {found[0]} has a sliding window of {found[1]}: entries that a shorter request would see have "
        f"left it when a request ends; leave prefix out"
    )


BLOCK = (
    Rule(
        "prefix-no-request-bases", "block", ("storage", "compression"), "prefix with a codec that is fitted to each request",
        "what one request has stored means nothing in another's basis", "a codec that is the same for all", _fitted,
    ),
    Rule(
        "prefix-keeps-all", "block", ("storage", "scheduling"), "prefix with a policy that evicts",
        "a shorter request would still hold what a longer one has lost", "scheduling 'none'", _evicted,
    ),
    Rule(
        "prefix-one-pool", "block", ("storage", "compression", "pools"), "prefix with several pools of pages",
        "pages have moved on that a shorter request would hold near", "one pool", _pools,
    ),
    Rule(
        "prefix-no-learning-router", "block", ("storage", "routing"), "prefix with a router that keeps what it has seen of a request",
        "a part of it can't be taken back", "routing 'all'", _learns,
    ),
    Rule(
        "prefix-stays-where-it-is", "block", ("storage",), "prefix with rebalance",
        "pages of rows that wait are not moved", "one of the two", _moves,
    ),
)  # fmt: skip
MODEL = (
    Rule(
        "prefix-names-requests", "model", ("storage",), "prefix with requests 'auto' on several ranks",
        "beginnings are looked up before a forward shows which requests the ranks have", "requests 'replicated' or 'distinct'", _auto,
    ),
    Rule(
        "prefix-no-windows", "model", ("storage",), "prefix on a model with sliding windows",
        "entries that a shorter request would see have left them", "leave prefix out", _windows,
    ),
)  # fmt: skip
