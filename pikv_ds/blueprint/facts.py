"""What the rules look at: a configuration with its methods built, and the layers and ranks that a cache is made for. On the host."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from pikv_ds.config.blocks import Blocks
from pikv_ds.pages.far import TierSizes
from pikv_ds.pages.plan import LayerPlan, PagesPlan, PoolPlan
from pikv_ds.placement.placement import Placement
from pikv_ds.retention.budgets import Budgets
from pikv_ds.spec import LayerSpec

from .fitting import page_format, pool_behind, pool_of
from .methods import Methods


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What follows from these is worked out once, when it is first asked for."""

    config: Blocks
    methods: Methods
    layers: tuple[LayerSpec, ...] = ()
    """Empty where the configuration alone is looked at; then the rest says nothing either."""
    dtype: torch.dtype = torch.float32
    ranks: int = 1
    num_experts: int = 1

    @classmethod
    def of(cls, config: Blocks, **model) -> Facts:
        """Builds every method. Raises: ConfigError for a method by itself."""
        return cls(config=config, methods=Methods.of(config), **model)

    @property
    def num_shards(self) -> int:
        return self.config.storage.num_shards or self.ranks

    @cached_property
    def page_size(self) -> int:
        """Tokens per page. Raises: ValueError when the codec's groups do not fit into it."""
        return self.methods.codec.page_size(self.config.page_size)

    @property
    def full_attention(self) -> tuple[LayerSpec, ...]:
        return tuple(spec for spec in self.layers if spec.window is None)

    @property
    def folds(self) -> bool:
        """Some layer's queries are mapped before the cache sees them."""
        return self.methods.codec.per_request or any(
            plan.transform is not None and plan.transform.inv_freq is None for plan in self.pages.layers
        )

    @cached_property
    def pages(self) -> PagesPlan:
        """Raises: ConfigError for a layer that the codec can't store."""
        methods = self.methods
        heads = self.layers[0].num_kv_heads if self.config.scheduling.head_budget != "shared" else 1
        stored = [pool_of(methods.codec, spec, self.page_size, self.dtype) for spec in self.layers]
        columns = methods.policy.page_values | ({} if methods.attended is None else methods.attended.page_values)
        plans = []
        for spec, pool in zip(self.layers, stored, strict=True):
            own = page_format(methods.codec, pool, heads)
            routed = {"always_read": methods.router.reads_all, "block_size": self.config.routing.block_size}
            pools = (PoolPlan(fmt=own, **routed),)
            if methods.near is not None and spec.window is None:
                near = page_format(methods.near, pool_of(methods.near, spec, self.page_size, self.dtype), heads)
                far = PoolPlan(fmt=own, mapped=methods.codec.light is None, **routed)
                pools = (PoolPlan(fmt=near), far)
            if spec.window is None:
                for i, kind in enumerate(methods.pools):
                    pools += (pool_behind(f"pools[{i}]", kind, pools[-1], spec, self.dtype),)
            if self.config.ops.precision == "fast":
                pools = tuple(replace(pool, fmt=replace(pool.fmt, fast=True)) for pool in pools)
            plans.append(LayerPlan(spec=spec, pools=pools, transform=pool.maps, columns=columns if spec.window is None else {}))
        return PagesPlan(
            layers=tuple(plans), page_size=self.page_size, heads=heads, num_shards=self.num_shards, dtype=self.dtype,
            rebased=methods.codec.per_request,
        )  # fmt: skip

    @cached_property
    def budgets(self) -> Budgets | None:
        """What requests may keep; None = everything. Raises: ConfigError for a budget below what is always kept."""
        policy = self.methods.policy
        if policy.keeps_all or self.config.offload.enabled:
            return None
        values = sum(dtype.itemsize for dtype in policy.page_values.values()) / self.page_size
        plans = [plan for plan in self.pages.layers if plan.spec.window is None]
        entry_bytes = self.pages.heads * sum(plan.pools[0].fmt.record_bytes / self.page_size + values for plan in plans)
        return Budgets(self.config.scheduling, len(plans), self.page_size, self.num_shards, entry_bytes)

    @cached_property
    def tier(self) -> TierSizes | None:
        """None = all pages lie in the device's memory."""
        block = self.config.offload
        if not block.enabled or not self.full_attention:
            return None
        page = sum(plan.pools[0].fmt.record_bytes for plan in self.pages.layers if plan.spec.window is None)
        sizes = (block.device_gib * 2**30, block.staging_mib * 2**20, block.host_gib * 2**30, block.nvme_gib * 2**30)
        return TierSizes(*(int(size / page) for size in sizes))

    @cached_property
    def placement(self) -> Placement:
        """Raises: ValueError for a table of another model."""
        storage = self.config.storage
        return Placement(storage.placement, self.num_experts, self.num_shards, n_tok=storage.n_tok, table=storage.table)
