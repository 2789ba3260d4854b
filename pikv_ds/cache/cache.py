"""PiKVCache: one decode or prefill step from plan to merged attention. The only file that knows all the others.

Shape legend: G ranks, R rows (requests of all ranks, or of one when replicated), S local shards, B rows and T columns of this rank's
forward, N tokens per source, H heads, D head_dim.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from pikv_ds.blueprint.blueprint import Blueprint
from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.errors import UnsupportedError
from pikv_ds.exchange.digest import digest
from pikv_ds.exchange.exchange import Exchange
from pikv_ds.exchange.turn import Told
from pikv_ds.migration.migration import Migration
from pikv_ds.migration.schedule import Rebalancing
from pikv_ds.modes import eager, in_step
from pikv_ds.ops.build import load
from pikv_ds.pages.audit import audit
from pikv_ds.pages.layers import RankPages
from pikv_ds.pages.rows import RowChange
from pikv_ds.placement.placement import Routed
from pikv_ds.placement.shard_map import ShardMap
from pikv_ds.retention.retention import Retention
from pikv_ds.selection.selection import Selection
from pikv_ds.spec import LayerSpec
from pikv_ds.step.agreement import NOTHING, Agreed, Agreement, Announced
from pikv_ds.step.query import Partial, Query
from pikv_ds.step.step import LocalStep, Step
from pikv_ds.tiers.bases import RequestBases
from pikv_ds.tiers.behind import PoolsBehind
from pikv_ds.tiers.offload import Offload
from pikv_ds.tiers.window import RawWindow

from .alike import alike
from .distinct import DistinctWay
from .face import HostFace
from .plain import PlainSteps
from .reader import Reader
from .recorded import Record, declare
from .replicated import ReplicatedWay
from .routed import RoutedWay
from .writer import Writer


class PiKVCache(HostFace):
    """Expert-sharded KV cache of one model on one rank.

    Call order, the same on all ranks: begin_step(local), attend(layer 0), ..., attend(last layer), end_step(). reset() on all ranks or
    none. A decode step reads nothing back from the device but, on several ranks, the header of its first record.

    The modes that a caller has switched on do not matter: everything here runs as `eager` says (modes.py), and has no graph.
    """

    @eager
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
        told = Told(
            len(layers),
            facts=lambda: alike(config, layers, num_experts, dtype, self.map.holders, device),
            header=lambda: self.agreement.header(self.local, self.announced),
            state=lambda: self.agreement.known(),
        )
        self.exchange = Exchange(group, config.timeout_s, device, told)
        load.ensure(device.type)  # built here if at all, not in the first forward
        blueprint = Blueprint.of(config, layers, dtype, ranks=self.exchange.size, num_experts=num_experts).to(device)
        self.blueprint, plan, policy = blueprint, blueprint.pages, blueprint.policy
        self.codec, self.num_shards, self.page_size = blueprint.codec, plan.num_shards, plan.page_size
        self.map = ShardMap.blocks(self.num_shards, self.exchange.rank, self.exchange.size, device)
        if holders is not None:
            self.map = ShardMap(holders, self.exchange.rank, self.exchange.size, device)
            self.check_copies(holders)
        self.bases: RequestBases | None = None  # None: the same maps for all requests, if there are any
        if self.codec.per_request:
            self.bases = RequestBases(plan, self.codec, device, self.exchange)
        request_maps = {} if self.bases is None else self.bases.far_maps
        self.offload: Offload | None = None  # None: all pages lie in the device's memory
        if blueprint.tier is not None:
            self.offload = Offload(blueprint, config, device, self.exchange.rank)
        tiers = None if self.offload is None else self.offload.tiers
        self.pages = pages = RankPages(plan, config.storage, self.map, num_experts, device, request_maps, tiers)
        self.retention: Retention | None = None  # None: everything is kept
        if blueprint.budgets is not None:
            attended = blueprint.attended if policy.watches else None
            self.retention = Retention(config.scheduling, policy, blueprint.budgets, pages, self.exchange, attended)
        self.window: RawWindow | None = None  # None: nothing leaves the nearest pool for another
        if blueprint.raw_window:
            self.window = RawWindow(blueprint, pages, self.exchange, counted=self.retention is not None and policy.watches)
        self.migration = Migration(pages, self.exchange, self._rehomed)
        self.rebalancing = Rebalancing(config.storage.rebalance, pages, self.migration, self.exchange)
        self.graph_from = declare(pages.rows)
        behind = PoolsBehind(blueprint.behind, pages) if blueprint.behind else None
        self.writer = Writer(pages, blueprint.placement)
        self.late_experts = config.storage.expert_ids == "true"
        router = blueprint.router
        self.selection: Selection | None = None  # None: every query reads every page
        if not router.reads_all:
            self.selection = Selection(config.routing, router, pages, self.exchange, blueprint.budgets is None, self.window)
        shares = tuple(part.shares for part in (self.retention, self.window) if part is not None and part.shares is not None)
        self.reader = Reader(pages, self.selection, shares)
        self.counting = tuple(one for one in (*shares, self.selection) if one is not None and one.undoing is not None)
        self.agreement = Agreement(self.exchange, config.storage.requests, device)
        replicated = ReplicatedWay(self)
        routed = config.routing.exchange == "routed" and self.exchange.size > 1
        self.ways = {"local": replicated, "replicated": replicated, "distinct": (RoutedWay if routed else DistinctWay)(self)}
        self.plain_steps = PlainSteps(self)
        # In this order: bases change before pages are demoted into them, and what a budget drops is not encoded first.
        refit = None if self.bases is None else partial(self.bases.refit, pages=pages)
        moving = self.rebalancing if config.storage.rebalance is not None and self.exchange.size > 1 else None
        evict, encode, move_on, rebalance = (
            None if part is None else part.after_forward for part in (self.retention, self.window, behind, moving)
        )
        self.after_forward = tuple(each for each in (pages.expire, evict, refit, encode, move_on, rebalance) if each is not None)
        self.hold_margin: int | None = None  # assisted decoding: tokens a crop may still take back; None = no crop is announced
        self.rehearsal = False  # what announced crops take back stays counted
        self.announced = NOTHING  # what this rank has said before the running forward
        self.step: Step | None = None
        self.local: LocalStep | None = None

    # ---- host phase ----------------------------------------------------------------------------------------------------------

    @eager
    def reset(self) -> None:
        """Drop every entry, return all memory, zero the entry counters. All ranks must call it at the same point of their loops."""
        self.step = self.local = self.hold_margin = None
        self.announced = NOTHING
        self._start(0)
        self.agreement.forget()
        self.exchange.turn.close()
        if self.bases is not None:
            self.bases.reset()

    @eager
    def begin_step(self, local: LocalStep) -> None:
        """Announce this rank's part of the next forward. No communication yet: it rides in the first layer's record."""
        if self.migration.in_doubt is not None:
            self.migration.check()
        self.local, self.step = local, None
        self.exchange.turn.begin()
        if self.bases is not None:
            self.bases.begin(local)
        self.announced = NOTHING
        if self.hold_margin is not None:
            self.announced = Announced(hold=True, unsettled=self.hold_margin > 0, rehearsal=self.rehearsal)
            self.hold_margin += local.num_columns

    @eager
    def end_step(self) -> None:
        """Finish a forward: late entries go home, pages leave windows and budgets, slabs are returned, late errors are raised (on all
        ranks alike); those that need sizes of a device at the start of the next forward. Sync: none in a decode step, but when an
        eviction is due or pages move to another pool."""
        step = self.step
        if step is None:
            raise UnsupportedError("a forward of this cache has ended and no layer has called attend: its tokens are stored nowhere")
        self.exchange.turn.finish()
        self.ways[self.agreement.mode].flush(step)
        if self.selection is not None:
            self.selection.end_step()
        for part in self.counting:
            part.note(step)
        left = [after_forward(step) for after_forward in self.after_forward]
        self.pages.room.settle(step, left=any(left), refuses_spills=self.config.storage.overflow == "error")
        if self.config.storage.audit:
            audit(self.pages)
        self.exchange.turn.end()
        self.step = self.local = None

    @eager
    def agree(self, headers: list[list[int]], k: Tensor) -> None:
        """Agree on a forward that is not plain decoding; k: this rank's keys of the first layer, compared only if the inputs are equal."""
        self.open(self.agreement.agree(self.local, headers, lambda: digest([k])), [Announced.of(header) for header in headers])

    @eager
    def open(self, agreed: Agreed, announced: list[Announced]) -> None:
        """Bring tables and sizes in line with what the ranks agreed on, before any entry of the forward is written.

        announced: by each rank.
        """
        self.pages.room.check_last()
        lens, parked_lens = self.agreement.lens, self.agreement.parked_lens
        before, after = self.agreement.commit(agreed)
        parks = bool(parked_lens if agreed.parked is None else agreed.parked)
        if agreed.restart and not parks:
            self._start(len(before))
        elif agreed.identity:
            for part in self.counting:
                part.settle(None)
        else:
            change = RowChange.of(agreed, lens, parked_lens, self.device)
            if self.selection is not None and self.selection.routes is not None:
                self.selection.routes.follow(change)
            with self.pages.parked.joined(change):
                for part in self.counting:
                    part.settle(change)
                self.pages.change(change)
            self.pages.settle_rows()
            if self.bases is not None:
                self.bases.rows.change(change)
        # How far another rank may crop is not known here: while it may, window layers of distinct requests keep everything.
        hold = any(one.hold for one in announced)
        margin = None if hold and self.agreement.mode == "distinct" else self.hold_margin or 0
        self.step = Step(
            agreed.shapes, self.agreement.own, before, after, self.device,
            hold=hold, margin=margin, late_experts=self.late_experts, rehearsal=any(one.rehearsal for one in announced),
            unsettled=[one.unsettled for one in announced], aligned=agreed.aligned, prompt=agreed.prompt,
        )  # fmt: skip
        if self.retention is not None:
            self.retention.before_forward(self.step)
        self.pages.room.reserve(self.step)

    def begin_rows(self, num_rows: int) -> None:
        """Empty rows, which a copy fills (copies.py)."""
        self._start(num_rows)

    def _start(self, num_rows: int) -> None:
        """A generation of `num_rows` requests begins: nothing of the last one stays."""
        self.migration.start()
        self.pages.allocate(num_rows)
        for part in (self.selection, self.retention, *self.reader.watching):
            if part is not None:
                part.start()
        if self.bases is not None:
            self.bases.rows.start(num_rows)

    def _rehomed(self, shard_map: ShardMap) -> None:
        self.map = shard_map

    # ---- the step ------------------------------------------------------------------------------------------------------------

    @in_step
    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float,
        v_dim: int,
        expert_ids: Routed | Tensor | None,
        record: Record | None = None,
    ) -> Partial:
        """Store this forward's entries of one layer and attend to what is stored.

        Args:
            layer: index into the layers given at construction; ascending within a forward.
            q: [B, T, Hq, Dk]; MLA: the absorbed query. k: [B, T, Hkv, Dk], v: [B, T, Hkv, Dv] after RoPE (MLA: the latent, Dv = 0).
            scale: softmax scale. v_dim: width of the output (MLA: columns of the latent that are the value).
            expert_ids: what a router chose, or [B * T] int64 primary experts, or None: position mod num_experts. Ignored for staged
                ("true") ids.
            record: filled with what is read, for a backward (gradient.py); None: nobody needs it. The result has no graph either way.

        Sync: none but the header of the first record of the forward; with routing.exchange "needed" the sizes of what comes back.
        Collectives: 2, or 1 for replicated requests; those of a router besides.
        """
        if isinstance(expert_ids, Routed) and (self.num_shards > 1 or self.exchange.size > 1):
            expert_ids = expert_ids.primary()
        maps = self.pages.layers[layer].entry_maps if self.bases is None else self.bases.maps(layer, k, v)
        saw = None
        if record is not None and self.offload is not None:
            raise UnsupportedError(
                f"a graph for a backward with pikv.offload.device_gib = {self.config.offload.device_gib}: what was read is copied from "
                f"pages that all lie near; set device_gib to null to train"
            )
        if record is not None:
            record.open(maps, self.local.positions, fitted_now=self.bases is not None and bool(self.bases.new))
            saw = partial(record.add, self.layers[layer].window) if self.exchange.size == 1 else None
        if maps is None:
            found = self._attend(layer, q, k, v, scale, v_dim, expert_ids, saw)
        else:
            q, k, v, shift = maps.enter(q, k, v, scale, self.local.positions)
            found = maps.leave(self._attend(layer, q, k, v, scale, maps.v_rank, expert_ids, saw), shift)
        if record is not None:
            record.close(self.graph_from, self.step, self.exchange.size)
        return found

    def _attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, v_dim: int, expert_ids: Routed | Tensor | None, saw=None
    ) -> Partial:
        """From here down keys, values and outputs are as wide as the nearest pages hold them."""
        query = Query(layer, q, k.flatten(0, 1), v.flatten(0, 1), scale, v_dim, expert_ids, saw)
        if self.exchange.size > 1:
            self.exchange.turn.step(layer, (q.shape[2], q.dtype, k.dtype))
            if self.agreement.mode is None:
                self.agree(self.exchange.headers("opening the first forward"), query.k)
            found = self.ways[self.agreement.mode].attend(query)
            self.exchange.turn.stepped()
            return found
        return self.ways["local"].attend(query)

    @in_step
    def name_experts(self, layer: int, expert_ids: Tensor) -> None:
        """Router `layer` has run: the late entries of that layer know their expert now. expert_ids [B * T] int64."""
        if self.step is not None:
            self.writer.name_experts(self.step, layer, expert_ids)
