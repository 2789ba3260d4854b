"""Blueprint: what one cache is made of, worked out before any of it exists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from pikv_ds.codecs.part_file import PartFile
from pikv_ds.codecs.table import CodecTable
from pikv_ds.config.blocks import Blocks
from pikv_ds.pages.far import TierSizes
from pikv_ds.pages.plan import PagesPlan
from pikv_ds.placement.placement import Placement
from pikv_ds.policies.base import RetentionPolicy
from pikv_ds.pools.base import PoolKind
from pikv_ds.retention.budgets import Budgets
from pikv_ds.routers.base import Router
from pikv_ds.spec import LayerSpec

from .facts import Facts
from .rules import enforce


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """Methods are built, once; budgets, formats and maps of every layer are known. Its methods are the cache's own: one cache each."""

    config: Blocks
    codec: CodecTable
    router: Router
    policy: RetentionPolicy
    attended: RetentionPolicy | None
    """Whose score says which pages stay near, see Methods."""
    behind: tuple[PoolKind, ...]
    """Kinds of the pools behind the codec's."""
    raw_window: bool
    """Entries are appended to a pool of their own, and encoded when they leave it."""
    budgets: Budgets | None
    """None = everything is kept."""
    placement: Placement
    pages: PagesPlan
    tier: TierSizes | None
    """None = all pages lie in the device's memory."""

    @classmethod
    def of(cls, config: Blocks, layers: Sequence[LayerSpec], dtype: torch.dtype, *, ranks: int = 1, num_experts: int = 1) -> Self:
        """Checks every rule that needs layers or ranks, touches no device memory. Raises: ConfigError."""
        facts = Facts.of(config, layers=tuple(layers), dtype=dtype, ranks=ranks, num_experts=num_experts)
        enforce(facts, "model")
        methods = facts.methods
        return cls(
            config=config, codec=methods.codec, router=methods.router, policy=methods.policy, attended=methods.attended,
            behind=methods.pools, raw_window=methods.near is not None and bool(facts.full_attention),
            budgets=facts.budgets, placement=facts.placement, pages=facts.pages, tier=facts.tier,
        )  # fmt: skip

    @property
    def knows_model(self) -> bool:
        """Whether something was fitted to the weights of one model, so that hosts must ask `check_model`."""
        return self.codec.calibrated or bool(self._trained)

    def check_model(self, spec: LayerSpec, norms: Tensor) -> None:
        """norms [H, D]: of the rows of a layer's key projection. Raises: ConfigError when something was fitted to other weights."""
        if self.codec.calibrated:
            self.codec.check_model(spec, norms)
        for key, trained in self._trained.items():
            trained.check_model(spec, norms, key)

    @property
    def _trained(self) -> dict[str, PartFile]:
        given = {"pikv.routing.path": self.router.trained, "pikv.scheduling.path": self.policy.trained}
        return {key: trained for key, trained in given.items() if trained is not None}

    def to(self, device: torch.device) -> Self:
        """With its maps and tables on a device."""
        return replace(self, pages=self.pages.to(device), placement=self.placement.to(device))
