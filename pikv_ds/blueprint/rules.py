"""RULES: every combination that is refused, in the order in which they are asked. `pikv config --rules` prints them."""

from __future__ import annotations

from pikv_ds.errors import ConfigError

from . import behind, blocks, compression, offload, ops, placing, prefix, retention, routed, routing, softcap, window
from .facts import Facts
from .rule import LooksAt, Rule

RULES: tuple[Rule, ...] = (
    *offload.BLOCK, *compression.BLOCK, *retention.BLOCK, *routing.BLOCK, *blocks.BLOCK, *routed.BLOCK, *retention.COMBINED, *window.BLOCK,
    *behind.BLOCK, *compression.COMBINED, *prefix.BLOCK, *placing.BLOCK, *placing.MODEL, *retention.MODEL, *window.MODEL, *behind.MODEL,
    *compression.MODEL, *ops.MODEL, *softcap.MODEL, *retention.SIZES, *routing.MODEL, *blocks.MODEL, *prefix.MODEL, *offload.MODEL,
)  # fmt: skip
BY_NAME = {rule.name: rule for rule in RULES}


def enforce(facts: Facts, looks_at: LooksAt) -> None:
    """Raises: ConfigError with the name of the first rule of this kind that refuses."""
    for rule in RULES:
        said = rule.says(facts) if rule.looks_at == looks_at else None
        if said is not None:
            raise ConfigError(said, rule=rule.name)
