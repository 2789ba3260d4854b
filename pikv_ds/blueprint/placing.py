"""What the "storage" block can't do with a model and a group, with the way out."""

from __future__ import annotations

from typing import Any

from pikv_ds.config.blocks import Blocks

from .facts import Facts
from .rule import Rule


def _divided(facts: Facts) -> str | None:
    shards = facts.config.storage.num_shards
    if shards is None or shards % facts.ranks == 0:
        return None
    return f"pikv.storage.num_shards = {shards} is not a multiple of the {facts.ranks} ranks of the group; each rank holds as many shards"


def _table(facts: Facts) -> str | None:
    try:
        facts.placement  # noqa: B018
    except ValueError as error:
        return str(error)
    return None


def _nothing_to_move(facts: Facts) -> str | None:
    shards = facts.config.storage.num_shards or facts.ranks
    if facts.config.storage.rebalance is None or facts.ranks == 1 or shards > facts.ranks:
        return None
    return (
        f"pikv.storage.rebalance with pikv.storage.num_shards = {facts.config.storage.num_shards} on {facts.ranks} ranks: each rank holds "
        f"one shard, and no exchange of whole shards evens them out; set num_shards to several times the ranks, or rebalance to null"
    )


def no_copies(config: Blocks, methods: Any) -> str | None:
    """Why shards can't have copies on further ranks; None: they can. methods: a Methods or a Blueprint."""
    router, policy, codec = methods.router, methods.policy, methods.codec
    if policy.watches:
        return (
            f"pikv.scheduling.method = {policy.name!r} watches attention, and only the rank that reads a shard sees any of it: its copies "
            f"would keep other entries; take a policy that looks at no attention ('knorm', 'streaming_llm'), or no copies"
        )
    if codec.per_request:
        return f"pikv.compression.method = {codec.name!r} fits bases where entries lie; take a calibrated codec, or no copies"
    if not router.reads_all and (router.budgeted or config.routing.exchange != "routed"):
        return (
            f"pikv.routing.method = {router.name!r} with exchange {config.routing.exchange!r} chooses among what every rank holds, and "
            f"would count copies twice; take 'all', or a router of shards ('topk') with exchange 'routed'"
        )
    return None


def _copies(facts: Facts) -> str | None:
    rebalance = facts.config.storage.rebalance
    why = no_copies(facts.config, facts.methods) if rebalance is not None and rebalance.replicas else None
    return why and f"pikv.storage.rebalance.replicas = {rebalance.replicas}: {why}"


def _so_many_copies(facts: Facts) -> str | None:
    rebalance = facts.config.storage.rebalance
    others = facts.num_shards - facts.num_shards // facts.ranks
    if rebalance is None or facts.ranks == 1 or rebalance.replicas <= others:
        return None
    return (
        f"pikv.storage.rebalance.replicas = {rebalance.replicas} of {facts.num_shards} shards on {facts.ranks} ranks: other ranks have "
        f"{others}, so legal is 0 to {others}"
    )


BLOCK = (
    Rule(
        "copies-have-one-reader", "block", ("storage", "scheduling", "compression", "routing"),
        "rebalance.replicas with what looks at all tables of a rank", "a copy is read on one rank, and must be kept alike on all",
        "routing 'all', or a router of shards with exchange 'routed'; policies that watch no attention", _copies,
    ),
)  # fmt: skip
MODEL = (
    Rule(
        "copies-are-of-other-ranks", "model", ("storage",), "more rebalance.replicas than other ranks have shards",
        "a rank holds a shard once", "at most num_shards less those of a rank", _so_many_copies,
    ),
    Rule(
        "shards-divide-among-ranks", "model", ("storage",), "a number of shards that is no multiple of the ranks",
        "every rank holds as many", "a multiple of the ranks, or null", _divided,
    ),
    Rule(
        "table-fits-model", "model", ("storage",), "a placement table for another number of experts or shards",
        "every expert's entries need a home that exists", "a table of this model", _table,
    ),
    Rule(
        "rebalance-has-shards-to-move", "model", ("storage",), "rebalance with one shard on each of several ranks",
        "whole shards move, and ranks with one each stay as full as they are", "several shards per rank, or no rebalance",
        _nothing_to_move,
    ),
)  # fmt: skip
