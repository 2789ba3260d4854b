"""What the "compression" block can't do, with the way out."""

from __future__ import annotations

from pikv_ds.config.wording import illegal

from .facts import Facts
from .rule import Rule, said


def _alone(facts: Facts, per_request: bool) -> str | None:
    """Only the codec of all layers, keys and values can keep two pools of pages, or fit requests."""
    for key, block, codec in facts.methods.parts:
        if codec.per_request != per_request or (codec.light is None and not per_request):
            continue
        others = [name for name in ("k", "v", "layers") if getattr(block, name, None)]
        if key != "compression" or others:
            where = f"pikv.{key}" if key != "compression" else f"pikv.compression.{others[0]}"
            why = "its bases belong to requests, and are fitted and changed for all at once" if per_request else "its two pools hold both"
            legal = f"another codec in {where}: this one serves keys and values of all layers, {why}"
            return illegal(f"{key}.method", block.method, legal)
    return None


def _page_size(facts: Facts) -> str | None:
    try:
        facts.page_size  # noqa: B018
    except ValueError as error:
        return illegal("page_size", facts.config.page_size, str(error))
    return None


def _unknown_layers(facts: Facts) -> str | None:
    known = {spec.layer_idx for spec in facts.layers}
    unknown = [idx for idx in facts.config.compression.layers or {} if int(idx) not in known]
    return f"pikv.compression.layers.{unknown[0]}: the model has layers 0 to {max(known)}" if unknown else None


def _with(facts: Facts) -> str:
    return f"with pikv.compression.method = {facts.methods.codec.name!r}"


def _rebased_policy(facts: Facts) -> str | None:
    policy = facts.methods.policy
    if not facts.methods.codec.per_request or not policy.observes_queries or policy.row_queries or policy.reads_model_queries:
        return None
    return (
        f"pikv.scheduling.method = {policy.name!r} {_with(facts)}: it keeps what it was shown of queries per request, and does not say "
        f"which of that to rebase when the basis of a request changes (RetentionPolicy.row_queries); use another policy, or 'lora'"
    )


def _folded_policy(facts: Facts) -> str | None:
    if not facts.methods.policy.reads_model_queries or not facts.folds:
        return None
    return (
        f"pikv.scheduling.method = {facts.methods.policy.name!r} {_with(facts)}: it needs the model's own queries, and where projections "
        f"or rotations are folded into them the cache has none; use a record format without rotation ('int8', 'int4'), or another policy"
    )


def _folded_router(facts: Facts) -> str | None:
    if not facts.methods.router.reads_model_queries or not facts.folds:
        return None
    return (
        f"pikv.routing.method = {facts.config.routing.method!r} {_with(facts)}: its weights were fitted to the model's own queries, and "
        f"where projections or rotations are folded into them the cache has none; use a router of key geometry ('bounds', 'topk')"
    )


def _rebased_router(facts: Facts) -> str | None:
    router = facts.methods.router
    if not facts.methods.codec.per_request or router.rebuilds:
        return None
    return (
        f"pikv.routing.method = {router.name!r} with a codec whose bases belong to a request ('svd'): it keeps summaries of pages and "
        f"can't make them anew when a basis changes (Router.rebuilt); use another router, or a calibrated codec such as 'lora'"
    )


BLOCK = (
    Rule(
        "two-pool-codec-alone", "block", ("compression",),
        "a codec with a light one ('adaptive') beside another, for keys, values or single layers",
        "its two pools of pages hold keys and values of all layers", "that codec alone, or another in its place",
        lambda facts: _alone(facts, per_request=False),
    ),
    Rule(
        "request-codec-alone", "block", ("compression",),
        "a codec fitted to each request ('svd') beside another, for keys, values or single layers",
        "bases are fitted and changed for keys and values of all layers at once", "that codec alone, or 'lora'",
        lambda facts: _alone(facts, per_request=True),
    ),
    Rule(
        "page-holds-groups", "block", ("page_size", "compression"), "a page_size that is no multiple of the codec's group",
        "the scales of keys serve a whole group of tokens", "a multiple of the group, or null", _page_size,
    ),
)  # fmt: skip
COMBINED = (
    Rule(
        "policy-follows-bases", "block", ("scheduling", "compression"),
        "a policy that keeps queries per request without naming them, with a codec fitted to each request",
        "what it keeps would be in an old basis", "another policy, or 'lora'", _rebased_policy,
    ),
    Rule(
        "router-follows-bases", "block", ("routing", "compression"),
        "a router that keeps summaries of pages and can't make them anew, with a codec fitted to each request",
        "its summaries would be in an old basis", "another router, or a calibrated codec", _rebased_router,
    ),
)  # fmt: skip
MODEL = (
    Rule(
        "layers-of-the-model", "model", ("compression",), "compression.layers for a layer that the model does not have",
        "it would be ignored", "the indices of the model's attention layers", _unknown_layers,
    ),
    Rule(
        "codec-fits-layer", "model", ("compression",), "a codec without a record or maps for a layer's geometry or dtype",
        "widths are whole groups of 8, latents are stored once, a calibration is of one model", "another codec, or one for each layer",
        lambda facts: said(lambda: facts.pages),
    ),
    Rule(
        "policy-needs-model-queries", "model", ("scheduling", "compression"),
        "a policy that reads the model's own queries, with a codec that folds maps into them",
        "the cache has the folded ones only", "a record format without rotation, or another policy", _folded_policy,
    ),
    Rule(
        "router-needs-model-queries", "model", ("routing", "compression"),
        "a router whose weights were fitted to the model's queries, with a codec that folds maps into them",
        "the cache has the folded ones only", "a router of key geometry", _folded_router,
    ),
)  # fmt: skip
