"""PiKVCache: one decode or prefill step from plan to merged attention. The only file that knows all the others.

Shape legend: G ranks, R rows (requests of all ranks, or of one when replicated), S local shards, B rows and T columns of this rank's
forward, N tokens per source, H heads, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds.blueprint.blueprint import Blueprint
from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.exchange.digest import digest
from pikv_ds.exchange.exchange import Exchange
from pikv_ds.ops.build import load
from pikv_ds.pages.events import Written
from pikv_ds.pages.layers import Tables
from pikv_ds.pages.rows import RowChange
from pikv_ds.placement.placement import Routed
from pikv_ds.placement.shard_map import ShardMap
from pikv_ds.retention.attention import Waiting
from pikv_ds.retention.retention import Retention
from pikv_ds.selection.selection import Selection
from pikv_ds.spec import LayerSpec
from pikv_ds.step.agreement import Agreed, Agreement
from pikv_ds.step.query import Partial, Query, Staged
from pikv_ds.step.step import LocalStep, StepPlan
from pikv_ds.tiers.bases import RequestBases
from pikv_ds.tiers.window import Tiers

from .distinct import DistinctStep
from .face import HostFace
from .reader import PoolReader
from .replicated import ReplicatedStep
from .writer import Writer


class PiKVCache(HostFace):
    """Expert-sharded KV cache of one model on one rank.

    Call order, the same on all ranks: begin_step(local), attend(layer 0), ..., attend(last layer), end_step(). reset() on all ranks or
    none. From attend down nothing reads the device back except the header of the forward's first record.
    """

    def __init__(
        self,
        layers: list[LayerSpec],
        config: PiKVConfig,
        *,
        num_experts: int,
        dtype: torch.dtype,
        device: torch.device,
        group=None,
        holders: tuple[tuple[int, ...], ...] | None = None,
    ) -> None:
        """holders: per shard the ranks that hold it (placement/shard_map.py), equal on all ranks; None = neighbouring shards on a rank."""
        self.layers, self.config, self.dtype, self.device = layers, config, dtype, device
        self.exchange = Exchange(group, config.timeout_s)
        load.ensure(device.type)  # built here if at all, not in the first forward
        blueprint = Blueprint.of(config, layers, dtype, ranks=self.exchange.size, num_experts=num_experts).to(device)
        self.blueprint, pages, codec, policy = blueprint, blueprint.pages, blueprint.codec, blueprint.policy
        self.codec, self.num_shards, self.page_size = codec, pages.num_shards, pages.page_size
        self.transforms = [plan.near_maps for plan in pages.layers]
        self.map = ShardMap.blocks(self.num_shards, self.exchange.rank, self.exchange.size, device)
        if holders is not None:
            self.map = ShardMap(holders, self.exchange.rank, self.exchange.size, device)
        self.tables = Tables(pages, config.storage, self.map, num_experts, device)
        self.bases: RequestBases | None = None  # None: the same maps for all requests, if there are any
        if codec.per_request:
            self.bases = RequestBases(layers, codec, self.tables, self.exchange)
        self.retention: Retention | None = None  # None: everything is kept
        if blueprint.budgets is not None:
            self.retention = Retention(config.scheduling, policy, blueprint.budgets, self.tables, self.exchange)
        self.tiers: Tiers | None = None  # None: one pool of pages per layer
        if self.tables.two_pools:
            watching = self.retention.mass if self.retention is not None and policy.watches else None
            self.tiers = Tiers(blueprint, self.tables, self.exchange, watching)
        self.writer = Writer(self.tables, blueprint.placement)
        self.stages = config.storage.expert_ids == "true"
        router = blueprint.router
        self.selection: Selection | None = None  # None: every query reads every page
        if not router.reads_all:
            self.selection = Selection(
                config.routing, router, layers, self.tables, self.exchange, self.stages, policy.keeps_all, self.tiers
            )
        self.reader = PoolReader(self.tables, self.selection, self.retention, self.tiers, self.stages)
        self.staged: Staged | None = None
        self.waiting: Waiting | None = None  # distinct requests: a layer whose merged lse rides in the next record
        self.agreement = Agreement(self.exchange, config.storage.requests, device)
        self.replicated_way, self.distinct_way = ReplicatedStep(self), DistinctStep(self)
        self.hold_margin: int | None = None  # assisted decoding: tokens a crop may still take back; None = no crop is announced
        self.hold = False  # some rank whose requests are stored here announced crops
        self.plan: StepPlan | None = None
        self.local: LocalStep | None = None

    # ---- host phase ----------------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Drop every entry, return all memory, zero the entry counters. All ranks must call it at the same point of their loops."""
        self.staged = self.waiting = self.plan = self.local = self.hold_margin = None
        self.hold = False
        self._start(0)
        self.agreement.forget()
        if self.bases is not None:
            self.bases.reset()

    def begin_step(self, local: LocalStep) -> None:
        """Announce this rank's part of the next forward. No communication yet: it rides in the first layer's record."""
        self.local, self.plan, self.staged, self.waiting = local, None, None, None
        if self.bases is not None:
            self.bases.begin(local)
        self.hold = self.hold_margin is not None
        if self.hold:
            self.hold_margin += local.num_columns

    def end_step(self) -> None:
        """Finish a forward: staged entries go home, windows expire, slabs are returned, late errors are raised (on all ranks alike)."""
        if self.staged is not None:
            (self.distinct_way if self.agreement.mode == "distinct" else self.replicated_way).flush_staged()
        self.distinct_way.flush_watched()
        if self.selection is not None:
            self.selection.end_step()
        expired = 0
        if not (self.hold and self.agreement.mode == "distinct"):
            # How far another rank may crop is not known here: while it may, window layers of distinct requests keep everything.
            expired = self.tables.expire(self.agreement.lens, self.hold_margin or 0)
        evicted = self.retention is not None and self.retention.after_forward(self.plan, self.agreement.lens, self.hold)
        if self.bases is not None:
            self._turn()
        demoted = [] if self.tiers is None else self.tiers.after_forward(self.plan, self.agreement.lens, self.hold)
        if self.selection is not None:
            self.selection.news.demoted(demoted)
        if expired or evicted or demoted or not self.plan.quiet:
            self.tables.shrink()
        if self.config.storage.overflow == "error":
            self.tables.counters.raise_if_overflowed(self.plan.capacity)
        self.plan = self.local = None

    def _turn(self) -> None:
        """Bases of requests that have grown; what is kept of keys and queries beside the pages follows them."""
        for layer, turn in self.bases.settle(self.plan):
            if self.selection is not None:
                self.selection.news.turned(layer, turn)
            if self.retention is not None:
                self.retention.mass.turned(layer, turn)

    def adopt(self, agreed: Agreed) -> None:
        """Bring tables and sizes in line with what the ranks agreed on, before any entry of the forward is written."""
        old_lens = self.agreement.lens
        before, after = self.agreement.commit(agreed)
        if agreed.restart:
            self._start(len(before))
        elif not agreed.identity:
            change = RowChange.of(agreed, old_lens, self.device)
            self.tables.change(change)
            if self.bases is not None:
                self.bases.rows.change(change)
        self.plan = StepPlan(agreed.shapes, self.agreement.own, before, after, self.device)
        if self.retention is not None:
            self.retention.before_forward(self.plan)
        self.tables.reserve(self.plan, self.hold)

    def _start(self, num_rows: int) -> None:
        """A generation of `num_rows` requests begins: nothing of the last one stays."""
        self.tables.allocate(num_rows)
        if self.selection is not None:
            self.selection.open()
        if self.retention is not None:
            self.retention.reset()
        if self.tiers is not None:
            self.tiers.reset()
        if self.bases is not None:
            self.bases.rows.start(num_rows)

    def settle(self, headers: list[list[int]], k: Tensor) -> None:
        """Agree on a forward that is not plain decoding; k: this rank's keys of the first layer, compared only if the inputs are equal."""
        self.hold = self.agreement.any_hold(headers)
        self.adopt(self.agreement.settle(self.local, headers, lambda: digest([k])))

    # ---- the step ------------------------------------------------------------------------------------------------------------

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, v_dim: int, expert_ids: Routed | Tensor | None
    ) -> Partial:
        """Store this forward's entries of one layer and attend to what is stored.

        Args:
            layer: index into the layers given at construction; ascending within a forward.
            q: [B, T, Hq, Dk]; MLA: the absorbed query. k: [B, T, Hkv, Dk], v: [B, T, Hkv, Dv] after RoPE (MLA: the latent, Dv = 0).
            scale: softmax scale. v_dim: width of the output (MLA: columns of the latent that are the value).
            expert_ids: what a router chose, or [B * T] int64 primary experts, or None: position mod num_experts. Ignored for staged
                ("true") ids.

        Sync: none but the header of the first record of the forward; with routing.exchange "needed" the sizes of what comes back.
        Collectives: 2, or 1 for replicated requests; those of a router besides.
        """
        if isinstance(expert_ids, Routed) and (self.num_shards > 1 or self.exchange.size > 1):
            expert_ids = expert_ids.primary()
        transform = self.transforms[layer] if self.bases is None else self.bases.maps(layer, k, v)
        if transform is None:
            return self._attend(layer, q, k, v, scale, v_dim, expert_ids)
        q, k, v, shift = transform.enter(q, k, v, scale, self.local.positions)
        return transform.leave(self._attend(layer, q, k, v, scale, transform.v_rank, expert_ids), shift)

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, v_dim: int, expert_ids: Routed | Tensor | None) -> Partial:
        """From here down keys, values and outputs are as wide as the pages hold them."""
        query = Query(layer, q, k.flatten(0, 1), v.flatten(0, 1), scale, v_dim, expert_ids)
        if self.exchange.size > 1 and self.agreement.mode is None:
            headers = self.exchange.gather_ints(self.agreement.header(self.local, self.hold), self.device, "opening the first forward")
            self.settle(headers, query.k)
        if self.agreement.mode == "distinct":
            return self.distinct_way.attend(query)
        return self.replicated_way.attend(query)

    def append(self, layer: int, k: Tensor, v: Tensor, expert_ids: Routed | Tensor | None) -> Written:
        written = self.writer.append(layer, self.plan, k, v, expert_ids, self.hold)
        if self.selection is not None:
            self.selection.news.wrote(layer, self.plan, k, written)
        return written

    def watch(self, query: Query, written: Written | None, lse: Tensor | None) -> None:
        """Show a policy that asks for it what a layer's queries attended to; lse [B, T, Hq] merged over ranks, None = nothing stored."""
        mass = self.reader.watcher(query.layer)
        if mass is not None:
            q, k = query.q.flatten(0, 1).unsqueeze(0), query.k.unsqueeze(0)
            asked = Waiting(query.layer, query.scale, q, k, written.slot_mapping, None)
            mass.observe(asked, self.plan, None if lse is None else lse.flatten(0, 1).unsqueeze(0))

    def name_experts(self, layer: int, expert_ids: Tensor) -> None:
        """Router `layer` has run: the staged entries of that layer know their expert now. expert_ids [B * T] int64."""
        if self.staged is not None and self.staged.layer == layer:
            self.staged = self.staged._replace(expert_ids=expert_ids)
