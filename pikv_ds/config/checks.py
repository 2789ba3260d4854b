"""Checks of the "storage" block that need more than a line."""

from __future__ import annotations

from typing import Any

from .wording import problem


def check_companion(key: str, value: Any, selector: str, chosen: str, needed: str) -> None:
    """`storage.<key>` is given exactly when `storage.<selector>` is `needed`."""
    if value is None and chosen == needed:
        raise problem(f"storage.{key}", None, f"a value: pikv.storage.{selector} = {needed!r} needs it")
    if value is not None and chosen != needed:
        raise problem(f"storage.{key}", value, f"null with pikv.storage.{selector} = {chosen!r}; it only acts in {needed!r}")


def check_table(table: tuple, num_shards: int | None) -> None:
    key = "storage.table"
    if not table or not table[0] or not table[0][0]:
        raise problem(key, table, "a list [num_layers or 1][num_experts][max_replicas] with no empty level")
    num_experts, max_replicas = len(table[0]), len(table[0][0])
    for layer_idx, experts in enumerate(table):
        if len(experts) != num_experts:
            raise problem(f"{key}[{layer_idx}]", experts, f"{num_experts} experts, as in {key}[0]")
        for expert, shards in enumerate(experts):
            homes = [shard for shard in shards if shard != -1]
            top = "" if num_shards is None else f" to {num_shards - 1} (pikv.storage.num_shards = {num_shards})"
            if len(shards) != max_replicas or min(shards) < -1 or (num_shards is not None and max(shards) >= num_shards):
                legal = f"{max_replicas} shard ids, each -1 (no replica) or 0{top or ' and up'}"
            elif not homes:
                legal = "at least one shard id that is not -1: each expert's entries need a home"
            elif len(set(homes)) != len(homes):
                legal = "different shards: two replicas on one shard store an entry twice"
            else:
                continue
            raise problem(f"{key}[{layer_idx}][{expert}]", shards, legal)
