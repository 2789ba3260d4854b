"""The "storage" block with its "rebalance", and the small one "monitor"."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from .block import Block
from .checks import check_companion, check_table
from .wording import problem


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(item) for item in value) if isinstance(value, list | tuple) else value


Table = Annotated[tuple[tuple[tuple[int, ...], ...], ...], BeforeValidator(_as_tuples)]


class RebalanceConfig(Block):
    """Shards move between ranks when these are unevenly full. A map is planned from the bytes of every shard, and whole shards move."""

    every: int = Field(256, ge=1, description="Forwards between two looks at the loads of the ranks.")
    threshold: float = Field(1.2, ge=1, description="Load of the fullest rank over the mean above which shards move.")
    bytes_per_step: int | None = Field(
        1 << 20, ge=1, description="Bytes of pages that a rank copies ahead after each forward; null = all at once, in one."
    )
    replicas: int = Field(0, ge=0, description="Copies of other ranks' shards that every rank holds: of those that it reads most.")


class PrefixConfig(Block):
    """Requests that begin like an earlier one take over its entries."""

    enabled: bool = Field(False, description="Keep the rows of finished requests, and let requests that begin alike continue them.")
    budget_tokens: int = Field(65536, ge=16, description="Tokens that are kept for it in a cache; what rows share counts once.")
    eviction: Literal["lru"] = Field("lru", description="Which rows go when there are more: the longest unused.")


class StorageConfig(Block):
    """Where each entry is stored."""

    requests: Literal["auto", "replicated", "distinct"] = Field(
        "auto", description="Whether the ranks run the same requests; auto compares a digest of them at prefill."
    )
    num_shards: int | None = Field(None, ge=1, description="Logical shards per layer; null = number of EP ranks.")
    placement: str = Field(
        "experts",
        description='How an entry finds its shard: "experts", "xor" ((t mod n_tok) XOR expert), "position", "table"; see `pikv methods`.',
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
    prefix: PrefixConfig = Field(PrefixConfig(), description=PrefixConfig.__doc__)

    audit: bool = Field(False, description="Compare page tables with their allocator after every forward; slow, for debugging.")
    rebalance: RebalanceConfig | None = Field(None, description="Shards move to even out the ranks; null = they stay.")

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


class MonitorConfig(Block):
    """Metrics through DeepSpeed's monitor."""

    enabled: bool = Field(True, description="Write PiKV/<group>/<metric> to the monitors that DeepSpeed has configured.")
    interval: int = Field(100, ge=1, description="Decode steps between two writes.")
