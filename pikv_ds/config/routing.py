"""The "routing" block: a router, what every query reads besides, and the penalty on the model's own routers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .block import Block, MethodBlock


class HostPenaltyConfig(Block):
    """What the model's own expert routers take off their logits, from the state of the cache; 0 and 0: nothing is installed."""

    load: float = Field(0, ge=0, allow_inf_nan=False, description="Strength: shard of the expert fuller than the mean of the shards.")
    miss: float = Field(0, ge=0, allow_inf_nan=False, description="Strength: log(1 + misses of the expert).")
    applies_to: Literal["selection", "selection_and_weights"] = Field(
        "selection", description="Choose experts by lowered logits and weigh them by the model's own, or lower both."
    )

    @property
    def asked(self) -> bool:
        """Whether anything is taken off."""
        return bool(self.load or self.miss)


class RoutingConfig(MethodBlock):
    """Which pages a query reads. Other keys are the options of the router, see `pikv methods`."""

    method: str = Field("all", description="KV router, see `pikv methods`.")
    budget_ratio: float | None = Field(None, gt=0, le=1, description="Pages a query reads per kv head, as a share of its request's tokens.")
    budget_pages: int | None = Field(None, ge=1, description="Pages a query reads per kv head and layer; in place of budget_ratio.")
    block_size: int | None = Field(
        None, ge=1, description="Tokens that are chosen as one, inside of pages; budget_pages counts them. null: whole pages."
    )
    sink_tokens: int = Field(4, ge=0, description="First tokens of a request that every query reads, inside the budget.")
    recent_tokens: int = Field(64, ge=0, description="Latest tokens before a query that it always reads, inside the budget.")
    exchange: Literal["all", "needed", "routed"] = Field(
        "all",
        description="Distinct requests: queries go to all ranks and partial attention comes back from all, or from those that read "
        "something (needed); or queries go only to the ranks that they read, and keys and values home (routed).",
    )
    host_penalty: HostPenaltyConfig = Field(HostPenaltyConfig(), description=HostPenaltyConfig.__doc__)
