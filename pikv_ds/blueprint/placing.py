"""What the "storage" block can't do with a model and a group, with the way out."""

from __future__ import annotations

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


MODEL = (
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
