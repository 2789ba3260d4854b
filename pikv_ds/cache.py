"""PiKVCache: one decode or prefill step from plan to merged attention. The only file that knows all the others.

Shape legend: G ranks, R rows (requests of all ranks, or of one when replicated), S local shards, B rows and T columns of this rank's
forward, N tokens per source, H heads, D head_dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pikv_ds.ops import merge_partials, paged_attention

from .agreement import Agreed, Agreement
from .codecs import CODECS
from .config import PiKVConfig
from .counters import Counters
from .digest import digest
from .directory import Directory
from .exchange import Exchange
from .placement import Placement, hash_expert, local_shards
from .plan import LocalStep, Source, StepPlan, make_plan
from .recycle import expire, remap
from .sizing import pages_to_open, shard_capacity
from .slots import spill
from .spec import LayerSpec
from .store import LayerStore
from .wire import Layout, headers_of


class Partial(NamedTuple):
    """Attention over stored entries, merged over ranks: out [B, T, Hq, Dv] f32, lse [B, T, Hq] f32; 0 and -inf where nothing is stored.

    includes_self: this forward's own tokens are among them (one column); else the caller attends inside its chunk and merges.
    """

    out: Tensor
    lse: Tensor
    includes_self: bool
    empty: bool = False  # nothing was stored for these requests: out is 0, lse -inf, known on the host


class PiKVCache:
    """Expert-sharded KV cache of one model on one rank.

    Call order, the same on all ranks: begin_step(local), attend(layer 0), ..., attend(last layer), end_step(). reset() on all ranks or
    none. From attend down nothing reads the device back except the header of the forward's first record.
    """

    def __init__(
        self, layers: list[LayerSpec], config: PiKVConfig, *, num_experts: int, dtype: torch.dtype, device: torch.device, group=None
    ) -> None:
        self.layers, self.config, self.dtype, self.device = layers, config, dtype, device
        self.num_experts = num_experts
        self.exchange = Exchange(group, config.timeout_s)
        self.num_shards = config.storage.num_shards or self.exchange.size
        self.placement = Placement(
            config.storage.placement, num_experts, self.num_shards, n_tok=config.storage.n_tok, table=config.storage.table
        ).to(device)
        shards = local_shards(self.exchange.rank, self.num_shards, self.exchange.size)
        self.shard_begin, self.num_local = shards.start, len(shards)
        self.codec = CODECS.build(config.compression.method)
        self.page_size = config.page_size or self.codec.preferred_page_size
        self.staged_ids = config.storage.expert_ids == "true"
        self.agreement = Agreement(self.exchange, config.storage.requests, device)
        self.directory = Directory(layers, self.num_shards, device)
        self.counters = Counters(num_experts, device)
        self.hold_margin: int | None = None  # assisted decoding: tokens a crop may still take back; None = no crop is announced
        self.hold = False  # some rank whose requests are stored here announced crops
        self.plan: StepPlan | None = None
        self._local: LocalStep | None = None
        self._staged: tuple[int, Tensor, Tensor, Tensor | None] | None = None  # layer, k, v, expert ids once known
        self._allocate(0)

    # ---- host phase ----------------------------------------------------------------------------------------------------------

    def _allocate(self, num_rows: int) -> None:
        self.counts = torch.zeros(len(self.layers), num_rows, self.num_local, dtype=torch.int64, device=self.device)
        self.free_top = torch.zeros(len(self.layers), dtype=torch.int64, device=self.device)
        self.stores = [
            LayerStore(spec, self.codec, self.page_size, self.dtype, self.device, self.counts[i], self.free_top[i])
            for i, spec in enumerate(self.layers)
        ]
        self.directory.reset(num_rows)
        self._mirror()

    def _mirror(self) -> None:
        """Host copies of the sizes that plan the next forward. Sync: one read per forward, after its last layer; free on CPU."""
        self._counts_host, self._free_host, self._load_host = self.counts.cpu(), self.free_top.cpu(), self.directory.load.cpu()

    def reset(self) -> None:
        """Drop every entry, return all memory, zero the entry counters. All ranks must call it at the same point of their loops."""
        self._restart(0)
        self.agreement.forget()

    def _restart(self, num_rows: int) -> None:
        self._staged = None
        self.counters.clear()
        self._allocate(num_rows)

    def begin_step(self, local: LocalStep) -> None:
        """Announce this rank's part of the next forward. No communication yet: it rides in the first layer's record."""
        self._local, self.plan = local, None
        self.hold = self.hold_margin is not None
        if self.hold:
            self.hold_margin += local.num_columns

    def end_step(self) -> None:
        """Finish a forward: staged entries go home, windows expire, slabs are returned, late errors are raised (on all ranks alike)."""
        if self._staged is not None:
            self._flush_staged()
        plan, self.plan = self.plan, None
        if plan is None:
            return
        self._expire_windows()
        self._mirror()
        for i, (store, free) in enumerate(zip(self.stores, self._free_host.tolist(), strict=True)):
            self._free_host[i] = store.shrink(free)
        if self.config.storage.overflow == "error":
            self.counters.raise_if_overflowed(plan.capacity)

    def _expire_windows(self) -> None:
        if self.hold and self.agreement.mode == "distinct":
            return  # how far another rank may crop is not known here: its window layers keep everything until it stops
        lens = torch.tensor(self.agreement.lens, dtype=torch.int64).to(self.device) - (self.hold_margin or 0)
        for i, spec in enumerate(self.layers):
            if spec.window is not None and lens.numel():
                self.counters.expired += expire(self.stores[i], lens, spec.window)

    def _adopt(self, agreed: Agreed) -> StepPlan:
        """Bring tables and sizes in line with what the ranks agreed on, before any entry of the forward is written."""
        old_lens = self.agreement.lens
        before, after = self.agreement.commit(agreed)
        if agreed.restart:
            self._restart(len(before))
        elif not agreed.identity:
            self._remap(agreed, old_lens)
        plan = make_plan(agreed.shapes, self.agreement.own, before, after, self.device)
        self.directory.reserve(max(after, default=0))
        self._reserve(plan)
        return plan

    def _remap(self, agreed: Agreed, old_lens: list[int]) -> None:
        parent = torch.tensor(agreed.parent, dtype=torch.int64).to(self.device)
        keep = torch.tensor(agreed.keep, dtype=torch.int64).to(self.device)
        removed = self.directory.remap(parent, keep, torch.tensor(old_lens, dtype=torch.int64).to(self.device))
        mine = slice(self.shard_begin, self.shard_begin + self.num_local)
        old = self.counts
        self.counts = old.new_zeros(old.shape[0], parent.numel(), self.num_local)
        for i, store in enumerate(self.stores):
            kept = torch.where(parent.unsqueeze(-1) >= 0, old[i][parent.clamp_min(0)], 0)
            cut = removed[i][:, mine] if self.num_shards > 1 else removed[i]
            self.counts[i] = kept - cut
            if bool((self.counts[i] < 0).any()):
                raise RuntimeError(f"layer {i}: a crop reaches back into entries that have left the sliding window")
            remap(store, parent, self.counts[i])
            gone = torch.ones(old.shape[1], dtype=torch.bool, device=self.device)
            gone[parent[parent >= 0]] = False
            dropped = int(old[i][gone].sum()) if bool((parent < 0).any()) else 0
            self.counters.cropped += int(cut.sum()) + dropped
            self.counters.forked += int(self.counts[i].sum()) + int(cut.sum()) + dropped - int(old[i].sum())
        self._mirror()

    def _reserve(self, plan: StepPlan) -> None:
        page, storage = self.page_size, self.config.storage
        num_new = torch.tensor([a - b for a, b in zip(plan.lens_after_host, plan.lens_before_host, strict=True)], dtype=torch.int64)
        most_new = int(num_new.max()) if num_new.numel() else 0
        total_new = int(num_new.sum())
        fullest = self._counts_host.amax((1, 2)).tolist() if num_new.numel() else [0] * len(self.layers)
        free = self._free_host.tolist()
        if plan.decode:
            opens = (((self._counts_host % page == 0).any(-1)) & (num_new > 0)).sum(-1).tolist()
        for i, (spec, store) in enumerate(zip(self.layers, self.stores, strict=True)):
            plan.capacity.append(shard_capacity(spec, plan.lens_after_host, self.num_shards, page, storage.capacity_tokens))
            plan.may_spill.append(self.num_shards > 1 and int(self._load_host[i].max()) + total_new > plan.capacity[i])
            plan.read_pages.append(-(-(fullest[i] + (1 if plan.decode else 0)) // page))
            if plan.decode:
                needed = opens[i]
            else:
                kept = num_new if spec.window is None or self.hold else num_new.clamp_max(spec.window - 1)
                room = None
                if self.num_shards > 1 and spec.window is None:
                    room = plan.capacity[i] - self._load_host[i][self.shard_begin : self.shard_begin + self.num_local]
                needed = pages_to_open(self._counts_host[i], kept, room, page)
            store.reserve(free[i], needed, -(-(fullest[i] + most_new) // page))

    # ---- the step ------------------------------------------------------------------------------------------------------------

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, v_dim: int, expert_ids: Tensor | None
    ) -> Partial:
        """Store this forward's entries of one layer and attend to what is stored.

        Args:
            layer: index into the layers given at construction; ascending within a forward.
            q: [B, T, Hq, Dk]; MLA: the absorbed query. k: [B, T, Hkv, Dk], v: [B, T, Hkv, Dv] after RoPE (MLA: the latent, Dv = 0).
            scale: softmax scale. v_dim: width of the output (MLA: columns of the latent that are the value).
            expert_ids: [B * T] int64 primary experts, or None: position mod num_experts. Ignored for staged ("true") ids.

        Sync: none but the header of the first record of the forward. Collectives: 2, or 1 for replicated requests.
        """
        entries = {"k": k.flatten(0, 1), "v": v.flatten(0, 1)}
        if self.exchange.size == 1 or self.agreement.mode == "replicated":
            return self._attend_replicated(layer, q, entries, scale, v_dim, expert_ids)
        if self.agreement.mode == "distinct":
            return self._attend_distinct(layer, q, entries, scale, v_dim, expert_ids)
        # The first forward: no mode yet. Settle it, then take the way of the mode.
        headers = self.exchange.gather_ints(self.agreement.header(self._local, self.hold), self.device, "opening a forward")
        self._settle(headers, k)
        return self.attend(layer, q, k, v, scale=scale, v_dim=v_dim, expert_ids=expert_ids)

    def _settle(self, headers: list[list[int]], k: Tensor) -> None:
        self.hold = self.agreement.any_hold(headers)
        self.plan = self._adopt(self.agreement.settle(self._local, headers, lambda: digest([k])))

    def _attend_replicated(self, layer, q, entries, scale, v_dim, expert_ids) -> Partial:
        agreement, local = self.agreement, self._local
        first = self.plan is None
        unchecked = False
        if first and self.exchange.size == 1:
            plain = agreement.steady and agreement.is_plain(local)
            self.plan = self._adopt(agreement.continue_plain(local) if plain else agreement.settle(local, [agreement.header(local, self.hold)], None))
        elif first and agreement.is_plain(local):
            self.plan = self._adopt(agreement.continue_plain(local))
            unchecked = True  # the header in this layer's collective is compared below
        elif first:
            # Other ranks may be in plain decoding: answer their collective, then all see that this forward is not plain.
            width = q.shape[2] * (v_dim + 1)
            headers = self._gather_partials(q.new_zeros(agreement.num_rows[0], width, dtype=torch.float32))[1]
            if not agreement.all_fresh(headers):
                agreement.check_replicated(headers)
            self._settle(headers, entries["k"])
            if agreement.mode != "replicated":
                return self._attend_distinct(layer, q, entries, scale, v_dim, expert_ids)
        plan = self.plan
        if plan.positions is None:
            plan.set_positions(local.positions.flatten())
        before = None if plan.decode and not self.staged_ids else self.counts[layer].clone()
        self._store(layer, entries, expert_ids)
        source = plan.sources[0]
        if not self._reads(source):
            return self._nothing(q, v_dim)
        out, lse = self._read(layer, source.row0, source.num_rows, q, before, scale, v_dim)
        if self.exchange.size > 1:
            out, lse = self._merge_replicated(out, lse, unchecked)
        return Partial(out, lse, plan.decode and not self.staged_ids)

    def _merge_replicated(self, out: Tensor, lse: Tensor, unchecked: bool) -> tuple[Tensor, Tensor]:
        B, T, Hq, Dv = out.shape
        gathered, headers = self._gather_partials(torch.cat([out.reshape(B * T, -1), lse.reshape(B * T, -1)], 1), unchecked)
        if unchecked:
            self.agreement.check_replicated(headers)
        outs, lses = gathered.view(-1, B * T, Hq * (Dv + 1)).split([Hq * Dv, Hq], -1)
        return merge_partials(outs.reshape(-1, B, T, Hq, Dv), lses.reshape(-1, B, T, Hq))

    def _gather_partials(self, partials: Tensor, read_headers: bool = True) -> tuple[Tensor, list[list[int]] | None]:
        header = torch.tensor(self.agreement.header(self._local, self.hold), dtype=torch.int32).to(self.device)
        layout = Layout([("partials", tuple(partials.shape), torch.float32)])
        gathered = self.exchange.all_gather(layout.pack(header, {"partials": partials}, self.device), "merging partial attention")
        return layout.unpack(gathered)["partials"], headers_of(gathered) if read_headers else None

    def _attend_distinct(self, layer, q, entries, scale, v_dim, expert_ids) -> Partial:
        agreement, local = self.agreement, self._local
        first, fields = self.plan is None, None
        if first:
            plain = agreement.is_plain(local)
            buffers, layout = self._share(layer, max(agreement.num_rows), True, q, entries, expert_ids if plain else None, send=plain)
            headers = headers_of(buffers)
            if agreement.all_plain(headers):
                self.hold = agreement.any_hold(headers)
                self.plan, fields = self._adopt(agreement.continue_plain(local, headers)), layout.unpack(buffers)
            else:
                self._settle(headers, entries["k"])
                if agreement.mode == "replicated":
                    return self._attend_replicated(layer, q, entries, scale, v_dim, expert_ids)
        plan = self.plan
        wanted = any(self._reads(s) for s in plan.sources)
        if fields is None:
            buffers, layout = self._share(layer, plan.num_tokens, wanted, q, entries, expert_ids, send=True)
            fields = layout.unpack(buffers)
        if plan.positions is None:
            plan.set_positions(fields["positions"].reshape(-1))
        before = None if plan.decode and not self.staged_ids else self.counts[layer].clone()
        self._store_gathered(layer, fields, entries)
        if not wanted:
            return self._nothing(q, v_dim)
        return self._answer(layer, fields["q"], before, scale, v_dim, q.shape)

    def _share(self, layer, num_tokens, with_q, q, entries, expert_ids, *, send) -> tuple[Tensor, Layout]:
        """First collective of a layer: [q | k | v | expert ids | positions] of every rank to every rank."""
        kv, ids = (entries, expert_ids) if not self.staged_ids else self._staged_entries()
        fields, values = [("positions", (num_tokens,), torch.int32)], {"positions": self._local.positions.flatten()}
        if with_q:
            fields.append(("q", (num_tokens, *q.shape[2:]), q.dtype))
            values["q"] = q.flatten(0, 1)
        if kv is not None:
            fields += [(name, (num_tokens, *t.shape[1:]), t.dtype) for name, t in kv.items()]
            fields.append(("ids", (num_tokens,), torch.int32))
            values |= kv | {"ids": ids if ids is not None else torch.full_like(values["positions"], -1)}
        layout = Layout(fields)
        header = torch.tensor(self.agreement.header(self._local, self.hold), dtype=torch.int32).to(self.device)
        return self.exchange.all_gather(layout.pack(header, values if send else {}, self.device), f"sharing layer {layer}"), layout

    def _answer(self, layer, queries, before, scale, v_dim, shape) -> Partial:
        """Attend for every rank's queries to the entries held here, send the partials back, merge those of this rank's own queries."""
        plan, partials = self.plan, []
        for sources in _same_shape_runs(plan.sources):
            first, rows = sources[0], sum(s.num_rows for s in sources)
            begin = plan.sources.index(first)
            q = queries[begin : begin + len(sources), : first.num_tokens].reshape(rows, first.num_columns, *queries.shape[2:])
            out, lse = self._read(layer, first.row0, rows, q, before, scale, v_dim)
            partials.append(torch.cat([out.reshape(rows * first.num_columns, -1), lse.reshape(rows * first.num_columns, -1)], 1))
        sizes = [s.num_tokens for s in plan.sources]
        mine = self.exchange.all_to_all(torch.cat(partials), sizes, f"returning partial attention of layer {layer}")
        B, T, Hq = shape[0], shape[1], shape[2]
        outs, lses = mine.split([Hq * v_dim, Hq], -1)
        out, lse = merge_partials(outs.reshape(-1, B, T, Hq, v_dim), lses.reshape(-1, B, T, Hq))
        return Partial(out, lse, T == 1 and not self.staged_ids)

    def _reads(self, source: Source) -> bool:
        return (source.num_columns == 1 and not self.staged_ids) or self.plan.has_past(source)

    def _nothing(self, q: Tensor, v_dim: int) -> Partial:
        out = q.new_zeros(*q.shape[:3], v_dim, dtype=torch.float32)
        return Partial(out, torch.full(q.shape[:3], -torch.inf, device=q.device), False, True)

    def _read(self, layer, row0, num_rows, q, before, scale, v_dim) -> tuple[Tensor, Tensor]:
        store, plan, pages = self.stores[layer], self.plan, self.plan.read_pages[layer]
        rows = slice(row0, row0 + num_rows)
        seqlens = self.counts[layer][rows]
        if before is not None:
            decode_rows = plan.one_column[rows].unsqueeze(-1)
            seqlens = before[rows] if self.staged_ids else torch.where(decode_rows, seqlens, before[rows])
        table = store.block_table[rows, :, :pages]
        if table.numel() == 0 or store.num_pages == 0:
            none = self._nothing(q, v_dim)
            return none.out, none.lse
        k_pages = store.pages("k")
        v_pages = k_pages[..., :v_dim] if store.spec.latent else store.pages("v")
        q_positions = None
        if store.spec.window is not None:
            q_positions = self._query_positions(row0, num_rows, q.shape[1])
        return paged_attention(
            q, k_pages, v_pages, store.position_pages, table, seqlens, scale=scale, window=store.spec.window, q_positions=q_positions
        )

    def _query_positions(self, row0: int, num_rows: int, num_columns: int) -> Tensor:
        plan, position = self.plan, self.plan.positions.view(len(self.plan.sources), -1)
        for i, source in enumerate(plan.sources):
            if source.row0 == row0:
                run = position[i : i + max(1, num_rows // source.num_rows), : source.num_tokens]
                return run.reshape(num_rows, num_columns)
        raise AssertionError(f"no source starts at row {row0}: {plan.sources}")

    # ---- homes ---------------------------------------------------------------------------------------------------------------

    def _store(self, layer: int, entries: dict[str, Tensor], expert_ids: Tensor | None) -> None:
        """Replicated requests: every rank has all entries; each keeps those of its shards."""
        if self.staged_ids:
            self._flush_local_staged()
            self._staged = (layer, entries["k"], entries["v"], None)
            return
        self._append(layer, entries["k"], entries["v"], expert_ids)

    def _store_gathered(self, layer: int, fields: dict[str, Tensor], entries: dict[str, Tensor]) -> None:
        if self.staged_ids:
            staged, self._staged = self._staged, (layer, entries["k"], entries["v"], None)
            if staged is not None:
                self._append(staged[0], fields["k"].flatten(0, 1), fields["v"].flatten(0, 1), fields["ids"].reshape(-1).to(torch.int64))
            return
        self._append(layer, fields["k"].flatten(0, 1), fields["v"].flatten(0, 1), fields["ids"].reshape(-1).to(torch.int64))

    def _append(self, layer: int, k: Tensor, v: Tensor, expert_ids: Tensor | None) -> None:
        plan, spec = self.plan, self.layers[layer]
        positions, valid = plan.positions, plan.valid
        hashed = hash_expert(positions, self.num_experts)  # non-negative for padding too
        experts = hashed if expert_ids is None else torch.where(expert_ids < 0, hashed, expert_ids)
        if spec.window is not None and not plan.decode and not self.hold:
            # Entries that no query after this forward can see are not stored: they expire at birth.
            born = valid & (positions >= (plan.lens_after - (spec.window - 1))[plan.rows])
            self.counters.expire_at_birth(valid, born, experts, self._is_local(layer, experts, positions))
            valid = born
        shard = self._shards(layer, experts, positions, valid)
        self.directory.record(layer, plan.rows, positions, valid, shard, plan.lens_after, plan.decode)
        local = shard - self.shard_begin
        local = torch.where((local >= 0) & (local < self.num_local), local, -1)
        self.stores[layer].append(plan.rows, local, valid, positions, k, v, one_per_row=plan.decode)
        self.counters.count_appended(experts, valid & (local >= 0))

    def _is_local(self, layer: int, experts: Tensor, positions: Tensor) -> Tensor:
        local = self.placement.shard_of(layer, experts, positions.clamp_min(0)) - self.shard_begin
        return (local >= 0) & (local < self.num_local)

    def _shards(self, layer: int, experts: Tensor, positions: Tensor, valid: Tensor) -> Tensor:
        if self.num_shards == 1:
            return torch.zeros_like(experts)
        wanted = self.placement.shard_of(layer, experts, positions.clamp_min(0))
        if not self.plan.may_spill[layer]:
            return wanted
        shard, spilled = spill(wanted, valid, self.directory.load[layer], self.plan.capacity[layer])
        here = (shard >= self.shard_begin) & (shard < self.shard_begin + self.num_local)
        self.counters.count_spilled(spilled, spilled & here)
        return shard

    # ---- staged ("true") expert ids ------------------------------------------------------------------------------------------

    def name_experts(self, layer: int, expert_ids: Tensor) -> None:
        """Router `layer` has run: the staged entries of that layer know their expert now. expert_ids [B * T] int64."""
        if self._staged is not None and self._staged[0] == layer:
            self._staged = (*self._staged[:3], expert_ids)

    def _staged_entries(self) -> tuple[dict[str, Tensor] | None, Tensor | None]:
        if self._staged is None:
            return None, None
        return {"k": self._staged[1], "v": self._staged[2]}, self._staged[3]

    def _flush_local_staged(self) -> None:
        if self._staged is not None:
            layer, k, v, ids = self._staged
            self._staged = None
            self._append(layer, k, v, ids)

    def _flush_staged(self) -> None:
        """The last layer has no later record to ride in: one collective of its own for distinct requests."""
        if self.agreement.mode != "distinct":
            self._flush_local_staged()
            return
        layer, k, v, _ = self._staged
        buffers, layout = self._share(layer, self.plan.num_tokens, False, k, {"k": k, "v": v}, None, send=True)
        fields = layout.unpack(buffers)
        self._staged = None
        self._append(layer, fields["k"].flatten(0, 1), fields["v"].flatten(0, 1), fields["ids"].reshape(-1).to(torch.int64))


def _same_shape_runs(sources: list[Source]) -> list[list[Source]]:
    """Neighbouring sources with equal B and T: their queries are one batch."""
    runs: list[list[Source]] = []
    for source in sources:
        if runs and (runs[-1][0].num_rows, runs[-1][0].num_columns) == (source.num_rows, source.num_columns):
            runs[-1].append(source)
        else:
            runs.append([source])
    return runs
