"""What the "scheduling" block can't do, with the way out."""

from __future__ import annotations

from pikv_ds.config.wording import illegal

from .facts import Facts
from .rule import Rule, said


def _given(facts: Facts) -> dict[str, float]:
    block, names = facts.config.scheduling, ("budget_tokens", "budget_ratio", "budget_bytes")
    return {name: getattr(block, name) for name in names if getattr(block, name) is not None}


def _keeps_all(facts: Facts) -> str | None:
    if facts.config.scheduling.method != "none":
        return None
    for name, value in _given(facts).items():
        return illegal(f"scheduling.{name}", value, "null with pikv.scheduling.method = 'none', which never evicts; name another method")
    return None


def _one_budget(facts: Facts) -> str | None:
    given, method = _given(facts), facts.config.scheduling.method
    if method == "none" or len(given) == 1 or facts.config.offload.enabled:
        return None
    return illegal("scheduling", given, f"one of budget_tokens, budget_ratio, budget_bytes with method {method!r}")


def _pinned(facts: Facts) -> str | None:
    block = facts.config.scheduling
    pinned = block.sink_tokens + block.recent_tokens
    if block.budget_tokens is None or block.budget_tokens >= pinned:
        return None
    return illegal(
        "scheduling.budget_tokens", block.budget_tokens,
        f">= {pinned}: sink_tokens = {block.sink_tokens} and recent_tokens = {block.recent_tokens} are part of it and always kept",
    )  # fmt: skip


def _method(facts: Facts) -> str:
    return f"pikv.scheduling.method = {facts.methods.policy.name!r}"


def _windows(facts: Facts) -> str | None:
    if facts.methods.policy.keeps_all or facts.full_attention:
        return None
    return (
        f"{_method(facts)} on a model whose layers all have a sliding window: nothing would be evicted, windows bound the cache; use 'none'"
    )


def _one_shard(facts: Facts) -> str | None:
    if not facts.methods.policy.needs_one_shard or facts.num_shards == 1:
        return None
    return (
        f"{_method(facts)} with {facts.num_shards} shards (pikv.storage.num_shards, one per rank by default): a score depends on all "
        f"entries of a request; use one shard on one rank, or another method"
    )


def _summed_shards(facts: Facts) -> str | None:
    placement = facts.config.storage.placement
    if not facts.methods.policy.sums_layers or facts.num_shards == 1 or facts.methods.placement.alike_in_layers:
        return None
    return (
        f"{_method(facts)} with pikv.storage.placement = {placement!r} and {facts.num_shards} shards: pages hold other entries in "
        f"each layer, so scores can't be summed over layers; use placement 'position', or one shard"
    )


def _summed_budgets(facts: Facts) -> str | None:
    policy, layer_budget = facts.methods.policy, facts.config.scheduling.layer_budget
    if not policy.sums_layers or layer_budget == "uniform":
        return None
    return (
        f"pikv.scheduling.layer_budget = {layer_budget!r} with method {policy.name!r}, which keeps the same entries "
        f"in every layer: legal is 'uniform'"
    )


def _own_head_budget(facts: Facts) -> str | None:
    policy, head_budget = facts.methods.policy, facts.config.scheduling.head_budget
    if policy.needs_head_budget in (None, head_budget):
        return None
    return f"pikv.scheduling.head_budget = {head_budget!r} with {_method(facts)}: legal is {policy.needs_head_budget!r}"


def _heads_kept(facts: Facts) -> str | None:
    block = facts.config.scheduling
    if block.method != "none" or block.head_budget == "shared":
        return None
    legal = "'shared' with pikv.scheduling.method = 'none', which never evicts; name another method"
    return illegal("scheduling.head_budget", block.head_budget, legal)


def _per_head(facts: Facts) -> str | None:
    """The setting, where every head has a budget and pages of its own."""
    head_budget = facts.config.scheduling.head_budget
    return None if head_budget == "shared" else f"pikv.scheduling.head_budget = {head_budget!r}"


def _heads_of_layers(facts: Facts) -> str | None:
    given, layers = _per_head(facts), facts.layers
    for spec in layers if given else ():
        if spec.latent:
            return f"{given}, but layer {spec.layer_idx} stores a latent (MLA) that all heads share: legal is 'shared'"
        if spec.window is not None:
            return f"{given}, but layer {spec.layer_idx} has a sliding window of {spec.window}: legal is 'shared'"
        if spec.num_kv_heads != layers[0].num_kv_heads:
            return (
                f"{given}, but layer {spec.layer_idx} has {spec.num_kv_heads} KV heads and layer {layers[0].layer_idx} "
                f"{layers[0].num_kv_heads}: legal is 'shared'"
            )
    return None


def _heads_routed(facts: Facts) -> str | None:
    given, method = _per_head(facts), facts.config.routing.method
    if not given or facts.methods.router.reads_all:
        return None
    return (
        f"{given} with pikv.routing.method = {method!r}: legal is 'all'; a router scores a page for the heads in it and "
        f"counts its budget in pages that all heads share"
    )


def _heads_adaptive(facts: Facts) -> str | None:
    given, policy = _per_head(facts), facts.methods.policy
    if not given or policy.target_hit_rate is None:
        return None
    return f"{given} with the adaptive threshold of method {policy.name!r}: set its rate to 0, or 'shared'"


def _attention(facts: Facts) -> str | None:
    if not facts.methods.policy.watches or facts.config.storage.expert_ids != "true":
        return None
    return (
        f"pikv.storage.expert_ids = 'true' with {_method(facts)}: entries are stored after the queries of their forward have read, so the "
        f"attention they get is not known; use 'previous_layer', or a method that looks at positions or keys"
    )


BLOCK = (
    Rule(
        "nothing-evicted-no-budget", "block", ("scheduling",), "a budget with method 'none'", "it never evicts", "another method",
        _keeps_all,
    ),
    Rule(
        "nothing-evicted-shared-heads", "block", ("scheduling",), "budgets per head with method 'none'",
        "it never evicts", "head_budget 'shared', or another method", _heads_kept,
    ),
    Rule(
        "policy-needs-one-budget", "block", ("scheduling",), "a retention policy without a budget, or with several",
        "something must say how much stays, in one unit", "one of budget_tokens, budget_ratio, budget_bytes", _one_budget,
    ),
    Rule(
        "budget-holds-pinned-tokens", "block", ("scheduling",), "budget_tokens below sink_tokens and recent_tokens together",
        "these are always kept and part of the budget", "a larger budget, or fewer pinned tokens", _pinned,
    ),
)  # fmt: skip
COMBINED = (
    Rule(
        "summed-layers-alike", "block", ("scheduling",), "layer_budget 'pyramid' with a policy that sums its scores over layers",
        "it keeps the same entries in every layer", "layer_budget 'uniform'", _summed_budgets,
    ),
    Rule(
        "policy-head-budget", "block", ("scheduling",), "a policy of single heads without head_budget 'adaptive'",
        "it compares the heads of a layer", "the head_budget that it names", _own_head_budget,
    ),
    Rule(
        "heads-read-everything", "block", ("scheduling", "routing"), "budgets per head with a router",
        "a router scores a page for all heads in it, and counts its budget in such pages", "routing 'all'", _heads_routed,
    ),
    Rule(
        "heads-without-threshold", "block", ("scheduling",), "budgets per head with a policy's adaptive threshold",
        "the threshold is one for a row", "its rate 0, or head_budget 'shared'", _heads_adaptive,
    ),
    Rule(
        "policy-sees-attention", "block", ("scheduling", "storage"), "a policy that measures attention with expert_ids 'true'",
        "entries are stored after their queries, so the attention they get is not known",
        "expert_ids 'previous_layer', or a policy of positions or keys", _attention,
    ),
)  # fmt: skip
MODEL = (
    Rule(
        "eviction-full-attention", "model", ("scheduling",), "a retention policy on a model of sliding windows alone",
        "windows bound the cache, nothing would be evicted", "method 'none'", _windows,
    ),
    Rule(
        "policy-one-shard", "model", ("scheduling", "storage"), "a policy that scores by all entries of a request, on several shards",
        "every shard has a part of them", "one shard on one rank, or another method", _one_shard,
    ),
    Rule(
        "summed-layers-placed-alike", "model", ("scheduling", "storage"),
        "a policy that sums its scores over layers, on several shards by expert",
        "pages hold other entries in each layer", "placement 'position', or one shard", _summed_shards,
    ),
    Rule(
        "heads-of-all-layers", "model", ("scheduling",), "budgets per head on a model with latents, windows or unequal heads",
        "every layer must have the same KV heads with full attention", "head_budget 'shared'", _heads_of_layers,
    ),
    Rule(
        "policy-fits-model", "model", ("scheduling",), "a policy with weights of another model, or with settings that it can't serve",
        "it says so itself (RetentionPolicy.check)", "weights of this model",
        lambda facts: said(lambda: facts.methods.policy.check(facts.config.scheduling, list(facts.full_attention))),
    ),
)  # fmt: skip
SIZES = (
    Rule(
        "budget-holds-pinned-pages-of-shards", "model", ("scheduling", "storage"),
        "a budget below the pages that can hold what is always kept",
        "pinned tokens may open a page in every shard", "a larger budget, smaller pages, or fewer pinned tokens",
        lambda facts: said(lambda: facts.budgets),
    ),
)  # fmt: skip
