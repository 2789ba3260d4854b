"""What routing.exchange "routed" can't do, with the way out: keys go to their homes only, and queries to the ranks that they read."""

from __future__ import annotations

from pikv_ds.config.wording import illegal

from .facts import Facts
from .rule import Rule


def _refused(facts: Facts, does: bool, why: str) -> str | None:
    exchange = facts.config.routing.exchange
    return illegal("routing.exchange", exchange, why) if exchange == "routed" and does else None


def _pages(facts: Facts) -> str | None:
    router = facts.methods.router
    return _refused(
        facts, router.budgeted and not router.reads_all and not router.knows_pages_only,
        f"'all' or 'needed' with pikv.routing.method = {router.name!r}: it must be told of the keys of all ranks, and keys go home only; "
        f"or take 'bounds'",
    )  # fmt: skip


def _answers(facts: Facts) -> str | None:
    router = facts.methods.router
    return _refused(
        facts, router.wants_page_lse,
        f"'all' or 'needed' with pikv.routing.method = {router.name!r}: it learns from the attention that every rank found, one more "
        f"collective of all ranks; or take another router of shards ('topk')",
    )  # fmt: skip


def _watched(facts: Facts) -> str | None:
    policy = facts.methods.policy
    return _refused(
        facts, policy.watches,
        f"'all' or 'needed' with pikv.scheduling.method = {policy.name!r}: the ranks that hold a request's pages must see all of its "
        f"queries and keys; or take a policy that looks at no attention ('knorm', 'streaming')",
    )  # fmt: skip


def _one_pool(facts: Facts) -> str | None:
    return _refused(
        facts,
        facts.methods.near is not None,
        "'all' with a raw window or a light codec (pikv.compression): every query reads the raw pages, which lie on all ranks",
    )


def _shared_bases(facts: Facts) -> str | None:
    codec = facts.methods.codec
    return _refused(
        facts, codec.per_request,
        f"'all' or 'needed' with pikv.compression.method = {codec.name!r}: bases are fitted to each request from all of its keys where "
        f"they are stored; or take a calibrated codec ('lora', 'crop')",
    )  # fmt: skip


BLOCK = (
    Rule(
        "routed-exchange-own-pages", "block", ("routing",), "exchange 'routed' with a router of pages that needs the keys of all ranks",
        "keys go to their homes only", "exchange 'all' or 'needed', or 'bounds'", _pages,
    ),
    Rule(
        "routed-exchange-own-facts", "block", ("routing",), "exchange 'routed' with a router that learns from the attention found",
        "that is known on the ranks that read", "exchange 'all' or 'needed', or another router of shards", _answers,
    ),
    Rule(
        "routed-exchange-unwatched", "block", ("routing", "scheduling"), "exchange 'routed' with a policy that looks at attention",
        "the ranks that hold pages do not see all queries", "exchange 'all' or 'needed', or a policy that looks at none", _watched,
    ),
    Rule(
        "routed-exchange-one-pool", "block", ("routing", "compression"), "exchange 'routed' with a raw window or a light codec",
        "every query reads raw pages, which lie on all ranks", "exchange 'all'", _one_pool,
    ),
    Rule(
        "routed-exchange-shared-bases", "block", ("routing", "compression"), "exchange 'routed' with a codec fitted to each request",
        "bases follow from all keys of a request where they are stored", "exchange 'all' or 'needed', or a calibrated codec", _shared_bases,
    ),
)  # fmt: skip
