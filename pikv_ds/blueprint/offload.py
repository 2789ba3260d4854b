"""What tiers below the device's memory can't do, with the way out."""

from __future__ import annotations

from .facts import Facts
from .rule import Rule


def _given(facts: Facts) -> str:
    return f"pikv.offload.device_gib = {facts.config.offload.device_gib}"


def _on(facts: Facts) -> bool:
    return facts.config.offload.enabled


def _pools(facts: Facts) -> str | None:
    if not _on(facts) or (facts.methods.near is None and not facts.methods.pools):
        return None
    return (
        f"{_given(facts)} with several pools of pages (raw_sink_tokens, raw_recent_tokens, a light codec or pikv.pools): which pages go "
        f"below is said for one pool; use one pool, or leave offload out"
    )


def _fitted(facts: Facts) -> str | None:
    codec = facts.methods.codec
    if not _on(facts) or not codec.per_request:
        return None
    return (
        f"{_given(facts)} with pikv.compression.method = {codec.name!r}, whose bases change while a request grows: what lies below would "
        f"be encoded again each time; use a codec that is the same for all ('none', 'int8', 'lora'), or leave offload out"
    )


def _prefix(facts: Facts) -> str | None:
    if not _on(facts) or not facts.config.storage.prefix.enabled:
        return None
    return f"{_given(facts)} with pikv.storage.prefix.enabled = true: parked rows have no pages below yet; leave one of them out"


def _moves(facts: Facts) -> str | None:
    if not _on(facts) or facts.config.storage.rebalance is None:
        return None
    return (
        f"{_given(facts)} with pikv.storage.rebalance: shards move with the records of the device's memory only; set rebalance to null, or "
        f"leave offload out"
    )


def _budget(facts: Facts) -> str | None:
    block = facts.config.scheduling
    given = {name: value for name in ("budget_tokens", "budget_ratio", "budget_bytes") if (value := getattr(block, name)) is not None}
    if not _on(facts) or not given:
        return None
    return (
        f"{_given(facts)} with pikv.scheduling = {given}: nothing is evicted, the policy only says which pages go below first; leave the "
        f"budget out, or offload"
    )


def _watches(facts: Facts) -> str | None:
    policy = facts.methods.policy
    if not _on(facts) or not policy.watches:
        return None
    return (
        f"{_given(facts)} with pikv.scheduling.method = {policy.name!r}, which looks at the attention to every page: pages below would be "
        f"read for it in each step; use 'none' (the oldest go first) or a policy of what is stored ('knorm', 'keydiff', 'streaming_llm')"
    )


def _heads(facts: Facts) -> str | None:
    head_budget = facts.config.scheduling.head_budget
    if not _on(facts) or head_budget == "shared":
        return None
    return f"{_given(facts)} with pikv.scheduling.head_budget = {head_budget!r}: pages go below with all their heads; legal is 'shared'"


def _windows(facts: Facts) -> str | None:
    if not _on(facts) or facts.full_attention:
        return None
    return f"{_given(facts)} on a model whose layers all have a sliding window: these are bounded already; leave offload out"


def _blocks(facts: Facts) -> str | None:
    size = facts.config.routing.block_size
    if not _on(facts) or size in (None, facts.page_size):
        return None
    return f"pikv.routing.block_size = {size} with {_given(facts)}: pages come from below as a whole; legal is null"


def _sizes(facts: Facts) -> str | None:
    tier = facts.tier
    if tier is None:
        return None
    gives = {"device_gib": tier.num_near, "staging_mib": tier.num_staged}
    small = [f"pikv.offload.{key} = {getattr(facts.config.offload, key)} holds {n}" for key, n in gives.items() if n < 2]
    if not small:
        return None
    return f"{' and '.join(small)} pages of {facts.page_size} tokens in each of {len(facts.full_attention)} layers: legal is room for 2"


BLOCK = (
    Rule(
        "offload-one-pool", "block", ("offload", "compression", "pools"), "tiers with several pools of pages",
        "which pages go below is said for one pool", "one pool", _pools,
    ),
    Rule(
        "offload-whole-pages", "block", ("offload", "routing", "page_size"), "tiers with blocks inside of pages",
        "pages come from below as a whole", "whole pages", _blocks,
    ),
    Rule(
        "offload-no-request-bases", "block", ("offload", "compression"), "tiers with a codec that is fitted to each request",
        "what lies below would be encoded again", "a codec that is the same for all", _fitted,
    ),
    Rule(
        "offload-no-prefix", "block", ("offload", "storage"), "tiers with prefix", "parked rows have no pages below", "one of the two",
        _prefix,
    ),
    Rule(
        "offload-stays-where-it-is", "block", ("offload", "storage"), "tiers with rebalance",
        "shards move with records of the device's memory only", "one of the two", _moves,
    ),
    Rule(
        "offload-no-budget", "block", ("offload", "scheduling"), "tiers with a budget", "nothing is evicted", "no budget", _budget,
    ),
    Rule(
        "offload-policy-of-what-is-stored", "block", ("offload", "scheduling"), "tiers with a policy that watches attention",
        "pages below would be read for it in each step", "a policy of what is stored", _watches,
    ),
    Rule(
        "offload-shared-heads", "block", ("offload", "scheduling"), "tiers with pages per head", "pages go below with all heads",
        "head_budget 'shared'", _heads,
    ),
)  # fmt: skip
MODEL = (
    Rule(
        "offload-full-attention", "model", ("offload",), "tiers on a model of sliding windows alone",
        "layers with a window are bounded already", "leave offload out", _windows,
    ),
    Rule(
        "offload-holds-pages", "model", ("offload",), "tiers of less than two pages of a layer",
        "one is written to or read while another is on its way", "more memory, or smaller pages", _sizes,
    ),
)  # fmt: skip
