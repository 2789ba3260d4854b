"""Entries go home: expert id -> shard -> slot, on the device. N tokens of a forward, S shards."""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds.pages.events import Written
from pikv_ds.pages.layers import Tables
from pikv_ds.placement.placement import Placement, Routed
from pikv_ds.placement.spill import spill
from pikv_ds.step.step import StepPlan


class Writer:
    """Appends the entries of one layer and forward to the shards of this rank. Nothing here reads the device back."""

    def __init__(self, tables: Tables, placement: Placement) -> None:
        self.tables, self.placement = tables, placement
        self.num_experts = placement.num_experts

    def append(self, layer: int, plan: StepPlan, k: Tensor, v: Tensor, expert_ids: Routed | Tensor | None, hold: bool) -> Written:
        """Args: k [N, Hkv, Dk], v [N, Hkv, Dv]; expert_ids [N] int64 (-1 or None: position mod E), or with one shard
        a router's choice; hold: nothing expires at birth."""
        tables, spec = self.tables, self.tables.layers[layer]
        positions, valid = plan.positions, plan.valid
        experts = self._experts(expert_ids, plan)
        if spec.window is not None and not plan.decode and not hold:
            experts = experts.primary() if isinstance(experts, Routed) else experts
            # Entries that no query after this forward can see are not stored: they expire at birth.
            born = valid & (positions >= (plan.lens_after - (spec.window - 1))[plan.rows])
            unseen_here = valid & ~born & self.tables.map.is_local(self._wanted(layer, experts, positions))
            tables.counters.expire_at_birth(unseen_here, experts)
            valid = born
        store, all_valid = tables.stores[layer], plan.all_valid and valid is plan.valid
        if tables.num_shards == 1 and tables.heads > 1:
            return self._append_heads(layer, plan, experts, positions, None, valid, valid, k, v)
        if tables.num_shards == 1:
            slots = store.append(
                plan.rows,
                None,
                valid,
                positions,
                k,
                v,
                one_per_row=plan.decode,
                may_open=plan.may_open[layer],
                all_valid=all_valid,
            )
            tables.counters.count_appended(experts, valid)
            return Written(slots, None, valid, valid)
        tables.directory.leave(layer, plan.rows, positions, valid, plan.lens_before, plan.lens_after, plan.decode)
        shard = self._shards(layer, plan, experts, positions, valid)
        tables.directory.record(layer, plan.rows, positions, valid, shard, plan.lens_after)
        here = valid & self.tables.map.is_local(shard)
        if tables.heads > 1:
            return self._append_heads(layer, plan, experts, positions, shard, valid, here, k, v)
        slots = store.append(
            plan.rows,
            tables.map.index[shard],
            here,
            positions,
            k,
            v,
            one_per_row=plan.decode,
            may_open=plan.may_open[layer],
            all_valid=False,
        )
        tables.counters.count_appended(experts, here)
        return Written(slots, shard, valid, here)

    def _append_heads(
        self,
        layer: int,
        plan: StepPlan,
        experts: Routed | Tensor,
        positions: Tensor,
        shard: Tensor | None,
        valid: Tensor,
        here: Tensor,
        k: Tensor,
        v: Tensor,
    ) -> Written:
        """Pages hold one kv head: a token goes into a table per head of its shard, shard * heads + head. The slots are [N * Hkv]."""
        heads = self.tables.heads
        table = torch.arange(heads, device=k.device).repeat(k.shape[0])
        if shard is not None:
            table = table + self.tables.map.index[shard].repeat_interleave(heads) * heads
        rows, stored, positions = (x.repeat_interleave(heads) for x in (plan.rows, here, positions))
        slots = self.tables.stores[layer].append(
            rows,
            table,
            stored,
            positions,
            k.flatten(0, 1).unsqueeze(1),
            v.flatten(0, 1).unsqueeze(1),
            one_per_row=False,
            may_open=plan.may_open[layer],
            all_valid=False,
        )
        self.tables.counters.count_appended(experts, here)
        return Written(slots, shard, valid, here)

    def _experts(self, expert_ids: Routed | Tensor | None, plan: StepPlan) -> Routed | Tensor:
        if expert_ids is None:
            return plan.hashed_experts(self.num_experts)
        if len(plan.sources) == 1:
            return expert_ids
        return torch.where(expert_ids < 0, plan.hashed_experts(self.num_experts), expert_ids)

    def _wanted(self, layer: int, experts: Tensor, positions: Tensor) -> Tensor:
        return self.placement.shard_of(layer, experts, positions.clamp_min(0))

    def _shards(self, layer: int, plan: StepPlan, experts: Tensor, positions: Tensor, valid: Tensor) -> Tensor:
        wanted = self._wanted(layer, experts, positions)
        if not plan.may_spill[layer]:
            return wanted
        load = -(-self.tables.directory.load[layer] // self.tables.heads)  # in tokens
        shard, spilled = spill(wanted, valid, load, plan.capacity[layer])
        self.tables.counters.count_spilled(spilled, spilled & self.tables.map.is_local(shard))
        return shard
