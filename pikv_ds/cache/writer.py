"""Entries go home: expert id -> shard -> slot, on the device. N tokens of a forward, S shards."""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds.pages.events import Written
from pikv_ds.pages.layers import RankPages
from pikv_ds.placement.placement import Placement, Routed
from pikv_ds.placement.spill import spill
from pikv_ds.step.query import LateEntries, Query
from pikv_ds.step.step import Step


class Writer:
    """Appends the entries of a layer and forward to the shards of this rank. Nothing here reads the device back.

    Late experts are its affair: then a layer's entries wait until its router has run, and go home with the next layer's.
    """

    def __init__(self, pages: RankPages, placement: Placement) -> None:
        self.pages, self.placement = pages, placement
        self.num_experts = placement.num_experts

    def due(self, step: Step, query: Query) -> Query | LateEntries | None:
        """The entries that go home with this layer: its own, or those of the layer before if they were late."""
        return step.late if step.late_experts else query

    def store(self, step: Step, query: Query, due: LateEntries | Query | None) -> Written | None:
        """Store what is `due`, this rank's or that of all ranks. None: this layer's own entries wait."""
        written = None if due is None else self.append(step, due.layer, due.k, due.v, due.expert_ids)
        if not step.late_experts:
            return written
        step.late = LateEntries(query.layer, query.k, query.v)
        return None

    def name_experts(self, step: Step, layer: int, expert_ids: Tensor) -> None:
        """Router `layer` has run: the late entries of that layer know their expert now. expert_ids [B * T] int64."""
        if step.late is not None and step.late.layer == layer:
            step.late = step.late._replace(expert_ids=expert_ids)

    def append(self, step: Step, layer: int, k: Tensor, v: Tensor, expert_ids: Routed | Tensor | None) -> Written:
        """Args: k [N, Hkv, Dk], v [N, Hkv, Dv]; expert_ids [N] int64 (-1 or None: position mod E), or with one shard
        a router's choice."""
        written = self._append(step, layer, k, v, expert_ids)
        for tell in self.pages.layers[layer].events.wrote:
            tell(layer, step, k, written)
        return written

    def _append(self, step: Step, layer: int, k: Tensor, v: Tensor, expert_ids: Routed | Tensor | None) -> Written:
        pages, spec = self.pages, self.pages.specs[layer]
        positions, valid = step.positions, step.valid
        experts = self._experts(expert_ids, step)
        if spec.window is not None and not step.decode and not step.hold:
            experts = experts.primary() if isinstance(experts, Routed) else experts
            born = valid & self.stays(step, spec.window)
            unseen_here = valid & ~born & pages.map.is_local(self.wanted(layer, experts, positions))
            pages.counters.expire_at_birth(unseen_here, experts)
            valid = born
        shard, here, local = None, valid, None
        if pages.num_shards > 1:
            pages.directory.leave(layer, step.rows, positions, valid, step.lens_before, step.lens_after, step.decode)
            shard = self.shards(layer, step, experts, positions, valid)
            pages.directory.record(layer, step.rows, positions, valid, shard, step.lens_after)
            here, local = valid & pages.map.is_local(shard), pages.map.index[shard]
        slots = self._slots(step, layer, local, here, k, v, all_valid=here is step.valid and step.all_valid)
        pages.counters.count_appended(experts, here)
        return Written(slots, shard, valid, here)

    @staticmethod
    def stays(step: Step, window: int) -> Tensor:
        """[N] bool. Entries that no query after this forward can see are not stored: they expire at birth."""
        return step.positions >= (step.lens_after - (window - 1))[step.rows]

    def _slots(self, step: Step, layer: int, shard: Tensor | None, here: Tensor, k: Tensor, v: Tensor, *, all_valid: bool) -> Tensor:
        """Where the tokens went, [N * H]. shard [N] int64 of this rank. With a page per kv head a token goes into a table per head."""
        pool, heads = self.pages.layers[layer].nearest, self.pages.heads
        rows, positions, one_per_row = step.rows, step.positions, step.decode
        if heads > 1:
            shard, one_per_row, all_valid = pool.table.of(shard, k.shape[0]), False, False
            rows, here, positions = (x.repeat_interleave(heads) for x in (rows, here, positions))
            k, v = (x.flatten(0, 1).unsqueeze(1) for x in (k, v))
        return pool.append(
            rows, shard, here, positions, k, v, one_per_row=one_per_row, may_open=step.may_open[layer], all_valid=all_valid
        )  # fmt: skip

    def _experts(self, expert_ids: Routed | Tensor | None, step: Step) -> Routed | Tensor:
        if expert_ids is None:
            return step.hashed_experts(self.num_experts)
        if len(step.sources) == 1:
            return expert_ids
        return torch.where(expert_ids < 0, step.hashed_experts(self.num_experts), expert_ids)

    def wanted(self, layer: int, experts: Tensor, positions: Tensor) -> Tensor:
        return self.placement.shard_of(layer, experts, positions.clamp_min(0))

    def shards(self, layer: int, step: Step, experts: Tensor, positions: Tensor, valid: Tensor) -> Tensor:
        wanted = self.wanted(layer, experts, positions)
        if not step.may_spill[layer]:
            return wanted
        load = -(-self.pages.directory.load[layer] // self.pages.heads)  # in tokens
        capacity = step.capacity[layer] if step.capacity_there is None else step.capacity_there[layer]
        shard, spilled = spill(wanted, valid, load, capacity)
        self.pages.counters.count_spilled(spilled, spilled & self.pages.map.is_local(shard))
        return shard
