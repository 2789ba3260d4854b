"""PiKVCache: one decode or prefill step from plan to merged attention. The only file that knows all the others.

Shape legend: G ranks, R rows (requests of all ranks, or of one when replicated), S local shards, B rows and T columns of this rank's
forward, N tokens per source, H heads, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pikv_ds.ops import load, merge_partials

from .agreement import Agreed, Agreement
from .compression_checks import fit_transforms
from .config import PiKVConfig
from .digest import digest
from .distinct import DistinctStep
from .evict import Retention
from .exchange import Exchange
from .mass import Mass, Waiting
from .placement import Placement, Routed
from .plan import LocalStep, Source, StepPlan
from .reader import Before, Stored, read_pages, stored_entries
from .replicated import ReplicatedStep
from .request_basis import RequestBases
from .retention_checks import check_retention
from .selection import Selection
from .spec import LayerSpec
from .step import Partial, Query, Staged
from .store import LayerStore
from .tables import Tables
from .tier_checks import check_tiers
from .tiers import Tiers
from .turned_reader import read_turned
from .writer import Writer, Written


class PiKVCache:
    """Expert-sharded KV cache of one model on one rank.

    Call order, the same on all ranks: begin_step(local), attend(layer 0), ..., attend(last layer), end_step(). reset() on all ranks or
    none. From attend down nothing reads the device back except the header of the forward's first record.
    """

    def __init__(
        self, layers: list[LayerSpec], config: PiKVConfig, *, num_experts: int, dtype: torch.dtype, device: torch.device, group=None
    ) -> None:
        self.layers, self.config, self.dtype, self.device = layers, config, dtype, device
        self.exchange = Exchange(group, config.timeout_s)
        load.ensure(device.type)  # built here if at all, not in the first forward
        self.num_shards = config.storage.num_shards or self.exchange.size
        self.codec = codec = config.compression.build()
        policy = config.scheduling.build()
        check_retention(config, policy, layers, self.num_shards)
        self.page_size = codec.page_size(config.page_size)
        check_tiers(config, codec, layers, self.page_size)
        transforms = fit_transforms(codec, config, policy, layers)
        self.transforms = [None if transform is None else transform.to(device) for transform in transforms]
        self.tables = Tables(
            layers, config, codec, self.page_size, self.num_shards, self.exchange.rank, self.exchange.size, num_experts, dtype, device
        )
        if codec.light is None:  # near pages are as computed then: the maps are for far pages only
            self.tables.far_maps = [None if far is None else maps for far, maps in zip(self.tables.far, self.transforms, strict=True)]
            self.transforms = [maps if far is None else None for far, maps in zip(self.tables.far, self.transforms, strict=True)]
        self.bases: RequestBases | None = None  # None: the same maps for all requests, if there are any
        if codec.per_request:
            self.bases = RequestBases(layers, [codec.stored(spec) for spec in layers], codec.fit_tokens, self.exchange, device)
        self.retention = None if policy.keeps_all else Retention(config, policy, self.tables, self.exchange)
        self.tiers: Tiers | None = None  # None: one pool of pages per layer
        if self.tables.two_pools:
            watching = self.retention.mass if self.retention is not None and policy.watches else None
            self.tiers = Tiers(config, self.tables, self.exchange, watching)
        storage = config.storage
        placement = Placement(storage.placement, num_experts, self.num_shards, n_tok=storage.n_tok, table=storage.table)
        self.writer = Writer(self.tables, placement.to(device))
        self.stages = storage.expert_ids == "true"
        router = config.routing.build()
        self.selection: Selection | None = None  # None: every query reads every page
        if not router.reads_all:
            self.selection = Selection(
                config.routing, router, layers, self.tables, self.exchange, self.stages, policy.keeps_all, self.tiers
            )
            if self.retention is not None:
                self.retention.on_compact = self.selection.compacted
        self.staged: Staged | None = None
        self.waiting: Waiting | None = None  # distinct requests: a layer whose merged lse rides in the next record
        self.agreement = Agreement(self.exchange, storage.requests, device)
        self.replicated, self.distinct = ReplicatedStep(self), DistinctStep(self)
        self.hold_margin: int | None = None  # assisted decoding: tokens a crop may still take back; None = no crop is announced
        self.hold = False  # some rank whose requests are stored here announced crops
        self.plan: StepPlan | None = None
        self.local: LocalStep | None = None

    # ---- host phase ----------------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Drop every entry, return all memory, zero the entry counters. All ranks must call it at the same point of their loops."""
        self.staged = self.plan = None
        self._allocate(0)
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
            (self.distinct if self.agreement.mode == "distinct" else self.replicated).flush_staged()
        self.distinct.flush_watched()
        if self.selection is not None:
            self.selection.settle()
        expired = 0
        if not (self.hold and self.agreement.mode == "distinct"):
            # How far another rank may crop is not known here: while it may, window layers of distinct requests keep everything.
            expired = self.tables.expire(self.agreement.lens, self.hold_margin or 0)
        evicted = self.retention is not None and self.retention.after_forward(self.plan, self.agreement.lens, self.hold)
        demoted = [] if self.tiers is None else self.tiers.after_forward(self.plan, self.agreement.lens, self.hold)
        if self.selection is not None:
            self.selection.demoted(demoted)
        if expired or evicted or demoted or not self.plan.quiet:
            self.tables.shrink()
        if self.config.storage.overflow == "error":
            self.tables.counters.raise_if_overflowed(self.plan.capacity)
        if self.bases is not None:
            self.bases.settle(self.plan, self.tables.stores)
        self.plan = None

    def adopt(self, agreed: Agreed) -> None:
        """Bring tables and sizes in line with what the ranks agreed on, before any entry of the forward is written."""
        old_lens = self.agreement.lens
        before, after = self.agreement.commit(agreed)
        if self.bases is not None and not agreed.identity:
            self.bases.remap(agreed)
        if agreed.restart:
            self._allocate(len(before))
            if self.retention is not None:
                self.retention.reset()
            if self.tiers is not None:
                self.tiers.reset(len(before))
        elif not agreed.identity:
            if self.tiers is not None:
                self.tiers.remap(agreed, old_lens)
            self.tables.remap(agreed, old_lens)
            if self.retention is not None:
                self.retention.remap(agreed.parent)
            if self.selection is not None:
                self.selection.remap(agreed.parent)
        self.plan = StepPlan(agreed.shapes, self.agreement.own, before, after, self.device)
        if self.retention is not None:
            self.retention.before_forward(self.plan)
        self.tables.reserve(self.plan, self.hold)

    def _allocate(self, num_rows: int) -> None:
        self.tables.allocate(num_rows)
        if self.selection is not None:
            self.selection.open()

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
            return self.distinct.attend(query)
        return self.replicated.attend(query)

    def append(self, layer: int, k: Tensor, v: Tensor, expert_ids: Routed | Tensor | None) -> Written:
        written = self.writer.append(layer, self.plan, k, v, expert_ids, self.hold)
        if self.selection is not None:
            self.selection.wrote(layer, self.plan, k, written)
        return written

    def watch(self, query: Query, written: Written | None, lse: Tensor | None) -> None:
        """Show a policy that asks for it what a layer's queries attended to; lse [B, T, Hq] merged over ranks, None = nothing stored."""
        mass = self.watcher(query.layer)
        if mass is not None:
            q, k = query.q.flatten(0, 1).unsqueeze(0), query.k.unsqueeze(0)
            asked = Waiting(query.layer, query.scale, q, k, written.slot_mapping, None)
            mass.observe(asked, self.plan, None if lse is None else lse.flatten(0, 1).unsqueeze(0))

    def watcher(self, layer: int) -> Mass | None:
        """Who is shown what the queries of a layer attend to; never two at once (tier_checks.py)."""
        if self.retention is not None and self.retention.watches(layer):
            return self.retention.mass
        return self.tiers.mass if self.tiers is not None and self.tables.far[layer] is not None else None

    def name_experts(self, layer: int, expert_ids: Tensor) -> None:
        """Router `layer` has run: the staged entries of that layer know their expert now. expert_ids [B * T] int64."""
        if self.staged is not None and self.staged.layer == layer:
            self.staged = self.staged._replace(expert_ids=expert_ids)

    def reads(self, source: Source) -> bool:
        """Whether a source's queries have anything to look up: stored tokens, or their own entry (one column, stored before reading)."""
        return (source.num_columns == 1 and not self.stages) or self.plan.has_past(source)

    def before(self, layer: int) -> Before | None:
        """What readers see that must not see this forward's entries, copied before these are stored; None when all rows see their own."""
        if self.plan.decode and not self.stages:
            return None
        store = self.tables.stores[layer]
        # Staged entries are stored after the reading: the tail is still the old one then.
        return Before(store.counts.clone(), None if store.tail is None else store.tail if self.stages else store.tail.clone())

    def nothing(self, q: Tensor, v_dim: int) -> Partial:
        out = q.new_zeros(*q.shape[:3], v_dim, dtype=torch.float32)
        return Partial(out, torch.full(q.shape[:3], -torch.inf, device=q.device), False, True)

    def read(self, query: Query, q: Tensor, row0: int, num_rows: int, before: Before | None) -> tuple[Tensor, Tensor]:
        """Attention of q [num_rows, T, Hq, Dk] to the entries of rows row0 ... held on this rank: out f32, lse f32."""
        store, far, rows = self.tables.stores[query.layer], self.tables.far[query.layer], slice(row0, row0 + num_rows)
        selects = self.selection is not None and num_rows > 0
        own_visible = None if before is None else self.plan.one_column[rows] & (not self.stages)
        if far is None:
            if num_rows == 0 or (not selects and (store.num_pages == 0 or store.counts.numel() == 0)):
                return self._nothing(query, q)
            return self._read_pool(query, store, q, rows, before, own_visible, selects)
        if num_rows == 0:
            return self._nothing(query, q)
        # The far pool does not change within a forward. It is asked also when it is empty if choosing pages is a collective.
        near = self._read_pool(query, store, q, rows, before, own_visible, False) if store.num_pages else self._nothing(query, q)
        if not selects and not far.num_pages:
            return near
        maps, shift = self.tables.far_maps[query.layer], None
        if maps is not None:
            q, shift = maps.fold(q, query.scale)
        held = None
        if selects:
            held = stored_entries(store, rows, before, own_visible), near[1] if shift is None else near[1] - shift
        beside = self._read_pool(query, far, q, rows, None, None, selects, held)
        if maps is not None:
            beside = maps.leave(Partial(*beside, False), shift)[:2]
        if shift is not None and self.retention is not None and self.retention.watches(query.layer):
            self.retention.mass.shift(far, row0, shift)
        return merge_partials(torch.stack([near[0], beside[0]]), torch.stack([near[1], beside[1]]))

    def _nothing(self, query: Query, q: Tensor) -> tuple[Tensor, Tensor]:
        none = self.nothing(q, query.v_dim)
        return none.out, none.lse

    def _read_pool(
        self,
        query: Query,
        store: LayerStore,
        q: Tensor,
        rows: slice,
        before: Before | None,
        own_visible: Tensor | None,
        selects: bool,
        near: tuple[Stored, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """near: what a router is told of the entries that are read besides, and their lse."""
        window, mass = self.layers[query.layer].window, self.watcher(query.layer)
        if self.tiers is not None and mass is self.tiers.mass and store is self.tables.far[query.layer]:
            mass = None  # what is far never comes back, however important
        if not selects and (self.tables.heads > 1 or mass is not None):
            mass = self.retention.mass if mass is None else mass
            return mass.read(store, q, rows.start, stored_entries(store, rows, before, own_visible), query.scale)
        needs_positions = selects or window is not None or q.shape[1] > 1
        positions = self.plan.query_positions(rows.start, q.shape[0]) if needs_positions else None
        if selects:
            stored = stored_entries(store, rows, before, own_visible)
            out, lse, page_lse = self.selection.read(
                query, q, rows.start, positions, stored, self.plan, near, with_page_lse=mass is not None
            )
            if mass is not None:
                mass.keep(store, rows.start, page_lse)
            return out, lse
        options = {"scale": query.scale, "window": window, "q_positions": positions}
        maps = self.transforms[query.layer]
        if maps is not None and maps.inv_freq is not None:
            return read_turned(store, maps, q, rows, before, own_visible, **options)
        return read_pages(store, q, rows, before, own_visible, **options)
