"""Where blocks inside of pages can't be chosen (`routing.block_size`), with the way out."""

from __future__ import annotations

from pikv_ds.config.wording import illegal

from .facts import Facts
from .rule import Rule


def _block_size(facts: Facts) -> int | None:
    """None: whole pages are chosen."""
    size = facts.config.routing.block_size
    return None if size == facts.page_size else size


def _router(facts: Facts) -> str | None:
    size, router = _block_size(facts), facts.methods.router
    if size is None or router.by_block:
        return None
    method = facts.config.routing.method
    return illegal("routing.block_size", size, f"null with pikv.routing.method = {method!r}, which knows whole pages only; or 'bounds'")


def _divides(facts: Facts) -> str | None:
    size = _block_size(facts)
    if size is None or facts.page_size % size == 0:
        return None
    return illegal("routing.block_size", size, f"a divisor of the page size, {facts.page_size}: a block lies in one page")


def _formats(facts: Facts) -> str | None:
    size = _block_size(facts)
    for spec in facts.layers if size is not None else ():
        if spec.softcap is not None:
            return illegal(
                "routing.block_size", size, f"null: layer {spec.layer_idx} bounds its scores, and its pages are read whole, in torch"
            )
    for plan in facts.pages.layers if size is not None else ():
        if plan.unrotated is not None:
            return illegal(
                "routing.block_size", size, f"null with a codec of un-rotated keys (layer {plan.spec.layer_idx}): they are put together "
                "again page by page, in torch",
            )  # fmt: skip
        group = next((pool.fmt.group for pool in plan.pools if pool.fmt.grouped and pool.fmt.group % size), None)
        if group is not None:
            return illegal(
                "routing.block_size", size, f"a divisor of {group}: as many tokens share the scales of keys, a block's among them"
            )
    return None


BLOCK = (
    Rule(
        "blocks-need-a-router", "block", ("routing",), "block_size with a router that knows whole pages only",
        "nothing would say which block of a page is worth reading", "'bounds'; or whole pages", _router,
    ),
    Rule(
        "blocks-divide-pages", "block", ("routing", "page_size"), "a block_size that does not divide the page size",
        "a block lies in one page", "4, 8 or 16", _divides,
    ),
)  # fmt: skip
MODEL = (
    Rule(
        "blocks-fit-formats", "model", ("routing", "compression"),
        "block_size where keys are rebuilt or scores are bounded, or one that does not divide the group of an integer format",
        "the former are read by whole pages in torch; a block's keys share one scale", "whole pages; 4, 8 or 16", _formats,
    ),
)  # fmt: skip
