"""What a layer that bounds its scores (LayerSpec.softcap) does not combine with, and the way out."""

from __future__ import annotations

from .facts import Facts
from .rule import Rule


def _capped(facts: Facts) -> str | None:
    capped = next((spec for spec in facts.layers if spec.softcap is not None), None)
    return None if capped is None else f"layer {capped.layer_idx} bounds its scores (softcap {capped.softcap})"


def _maps(facts: Facts) -> str | None:
    if not _capped(facts):
        return None
    mapped = facts.methods.codec.per_request or any(plan.transform is not None for plan in facts.pages.layers)
    return (
        f"{_capped(facts)}, and pikv.compression.method = {facts.methods.codec.name!r} maps keys and adds what it left out to their scores "
        "afterwards; use a record format ('int8', 'int4', ...)"
        if mapped
        else None
    )


def _watched(facts: Facts) -> str | None:
    policy = facts.methods.policy
    if not _capped(facts) or not (policy.watches or facts.methods.attended is not None):
        return None
    return (
        f"{_capped(facts)}, and pikv.scheduling.method = {policy.name!r} counts where attention goes, by scores without that bound; use a "
        "policy that does not watch attention ('streaming_llm', 'keydiff', ...)"
    )


MODEL = (
    Rule(
        "softcap-without-maps", "model", ("compression",), "a codec that maps keys or values, for layers that bound their scores (softcap)",
        "what it leaves out of keys is added to scores after they are bounded", "a record format", _maps,
    ),
    Rule(
        "softcap-without-shares", "model", ("scheduling",), "a policy that watches attention, for layers that bound their scores (softcap)",
        "it counts by scores without the bound", "a policy that does not watch attention", _watched,
    ),
)  # fmt: skip
