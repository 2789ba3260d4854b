"""What the "ops" block can't do, with the way out."""

from __future__ import annotations

from pikv_ds.config.wording import illegal

from .facts import Facts
from .rule import Rule


def _nothing_is_fast(facts: Facts) -> str | None:
    if facts.config.ops.precision != "fast":
        return None
    formats = {pool.fmt.label: pool.fmt for plan in facts.pages.layers for pool in plan.pools}
    if not formats or any(fmt.grouped or fmt.v_traits.levels for fmt in formats.values()):
        return None
    legal = f"'high': it rounds what meets integer pages, and here pages hold {', '.join(formats)}; or a codec of integers ('int8', 'int4')"
    return illegal("ops.precision", "fast", legal)


MODEL = (
    Rule(
        "fast-needs-integers", "model", ("ops", "compression"), "ops.precision = 'fast' where no pool holds integers",
        "it rounds queries and weights that meet integer codes only, and would be ignored", "'high', or 'int8', 'int4', 'int2'",
        _nothing_is_fast,
    ),
)  # fmt: skip
