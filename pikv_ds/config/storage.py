"""The "storage" block: where each entry is stored."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from .block import Block
from .wording import problem


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(item) for item in value) if isinstance(value, list | tuple) else value


Table = Annotated[tuple[tuple[tuple[int, ...], ...], ...], BeforeValidator(_as_tuples)]


class StorageConfig(Block):
    """Where each entry is stored."""

    requests: Literal["auto", "replicated", "distinct"] = Field(
        "auto", description="Whether the ranks run the same requests; auto compares a digest of them at prefill."
    )
    num_shards: int | None = Field(None, ge=1, description="Logical shards per layer; null = number of EP ranks.")
    placement: Literal["experts", "xor", "position", "table"] = Field(
        "experts",
        description="How an entry finds its shard: its expert, (t mod n_tok) XOR expert, its position, or `table`.",
    )
    expert_ids: Literal["previous_layer", "lookahead", "true", "gate", "hash"] = Field(
        "previous_layer", description="Which router names the expert of an entry."
    )
    n_tok: int = Field(1, ge=1, description="Token modulus of the xor placement; a power of two.")
    table: Table | None = Field(
        None,
        description="Shard ids [num_layers or 1][num_experts][max_replicas], -1 = none; for placement table only.",
    )
    gate_path: str | None = Field(None, min_length=1, description="safetensors file of a learned KV gate; for expert_ids gate only.")
    capacity_tokens: int | None = Field(
        None, ge=1, description="Entries per layer and shard; null = ceil(1.1 x the balanced share) + one page."
    )
    overflow: Literal["spill", "error"] = Field(
        "spill", description="What happens when a shard is full: use the least loaded one, or stop."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.n_tok & (self.n_tok - 1):
            raise problem("storage.n_tok", self.n_tok, "a power of two (1, 2, 4, ...): the XOR must stay in range")
        if self.n_tok != 1 and self.placement != "xor":
            raise problem(
                "storage.n_tok",
                self.n_tok,
                f"1 with pikv.storage.placement = {self.placement!r}; n_tok only acts in 'xor'",
            )
        check_companion("table", self.table, "placement", self.placement, "table")
        check_companion("gate_path", self.gate_path, "expert_ids", self.expert_ids, "gate")
        if self.table is not None:
            check_table(self.table, self.num_shards)
        return self


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
