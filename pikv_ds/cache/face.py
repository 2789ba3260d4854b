"""What hosts may ask of a cache between its steps. tests/packaging/test_host_face.py holds adapters, launch and examples to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pikv_ds.blueprint.blueprint import Blueprint
from pikv_ds.blueprint.placing import no_copies
from pikv_ds.config.pikv import PiKVConfig
from pikv_ds.errors import ConfigError, UnsupportedError
from pikv_ds.exchange.digest import digest
from pikv_ds.exchange.exchange import Exchange
from pikv_ds.migration.along import Along
from pikv_ds.migration.migration import Migration
from pikv_ds.migration.schedule import Rebalancing
from pikv_ds.modes import eager
from pikv_ds.pages.layers import RankPages
from pikv_ds.step.agreement import Agreement
from pikv_ds.step.step import LocalStep, Step

from .plain import PlainSteps

NOT_NOW = {
    1: "a forward runs; call it between end_step and the next begin_step",
    2: "tokens of the last forward may still be taken back (a crop is announced, or what it counted waits for the next forward); call it "
    "outside of announce_crops, after a forward",
    3: "rows are parked for requests that begin alike (pikv.storage.prefix), whose pages would stay behind; leave prefix out",
}


class HostFace:
    """Of a PiKVCache, whose parts it reads: agreement, exchange, pages, writer."""

    blueprint: Blueprint
    config: PiKVConfig
    exchange: Exchange
    agreement: Agreement
    pages: RankPages
    migration: Migration
    hold_margin: int | None
    rehearsal: bool
    local: Any
    counting: tuple[Any, ...]
    after_forward: tuple[Callable[[Step], bool], ...]
    rebalancing: Rebalancing
    plain_steps: PlainSteps

    @property
    def ranks(self) -> Exchange:
        """The group that shares the entries; hosts gather flags and ids through it."""
        return self.exchange

    @property
    def number(self) -> int:
        """Of this cache on its group, equal on all ranks; 0 before its first forward, or on one rank."""
        return 0 if self.exchange.turn is None else self.exchange.turn.cache

    @property
    def parked_lens(self) -> list[int]:
        """Tokens of every parked row (pages/parked.py)."""
        return list(self.agreement.parked_lens)

    @property
    def holds_others(self) -> bool:
        """Whether other ranks have tokens of requests of their own in it."""
        agreement = self.agreement
        if agreement.mode != "distinct":
            return False
        own = sum(agreement.num_rows[: agreement.own])
        return any(agreement.lens[:own]) or any(agreement.lens[own + agreement.num_rows[agreement.own] :])

    def retire(self) -> None:
        """Drop every entry; the next forward is that of another cache, with a number of its own."""
        self.reset()
        self.exchange.turn.cache = 0

    @property
    def moving(self) -> bool:
        """Whether shards are changing ranks beside the forwards."""
        return self.migration.wanted is not None

    @property
    def replicated(self) -> bool | None:
        """Whether several ranks hold the same requests, as they have agreed; None before the first forward of a group."""
        return None if self.agreement.mode is None else self.agreement.mode == "replicated"

    @property
    def num_experts(self) -> int:
        return self.writer.num_experts

    @property
    def rotations(self) -> tuple[Tensor | None, ...]:
        """Per layer [k_dim / 2] f32, the inverse frequencies of the rotation that its codec takes off the keys; None = it takes none."""
        return tuple(None if maps is None else maps.inv_freq for maps in (layer.plan.unrotated for layer in self.pages.layers))

    @property
    def page_columns(self) -> list[str]:
        """Names of the numbers that policies keep per page: those that clear_column takes."""
        return sorted({name for layer in self.pages.layers for name in layer.plan.columns})

    def follow(self, along: Along | str) -> None:
        """What moves with the shards from now on; or why nothing does."""
        self.migration.follow(along)

    @property
    def moves_along(self) -> tuple[Along, ...]:
        """What moves with the shards."""
        return tuple(self.migration.along)

    @eager
    def rebalance(
        self,
        holders: Sequence[Sequence[int]] | None = None,
        *,
        bytes_per_step: int | None = None,
        experts: bool | None = None,
    ) -> bool:
        """Move shards with all their entries to other ranks. Between two forwards, all ranks at the same point with the same arguments.

        Args:
            holders: per shard the ranks that hold it from then on: its home, and those with a copy; every rank as many shards.
                None = a plan that evens out the bytes.
            bytes_per_step: None = now. Else pages are copied ahead, about so many bytes of a rank at the end of each forward, and the
                shards change ranks once all are there; until then the forwards read them where they are. `cancel_rebalance` ends it.
            experts: whether the model's experts change ranks with the shards of their entries; None = where an adapter has said how, and
                no shard has a copy.

        Returns: whether shards move. Raises, on all ranks: ConfigError for maps that can't be held or differ between the ranks,
        UnsupportedError while a forward runs or tokens may still be taken back, MigrationError where some rank could not take part; every
        shard stays where it was then. PeerError. Sync: reads sizes back. Collectives: one frame, and four records in a move at once.
        """
        if holders is None:
            holders = self.rebalancing.plan() or self.migration.pages.map.holders
        wanted = tuple(tuple(int(rank) for rank in ranks) for ranks in holders)
        if experts and not self.migration.along:
            raise UnsupportedError(f"experts = True: the model's experts can't move with the shards: {self.migration.alone}")
        copied = any(len(ranks) > 1 for ranks in wanted)
        if experts and copied:
            raise UnsupportedError("experts = True: an expert lies on one rank, and holders gives a shard to several; say experts = False")
        along = () if experts is False or copied else tuple(self.migration.along)
        own = self._said_of_a_move(wanted, bytes_per_step) + [len(along)]
        said = self.exchange.gather_ints(own, self.exchange.device, "moving shards to other ranks")
        if any(row[1:] != own[1:] for row in said):
            raise ConfigError(
                f"holders = {wanted}, bytes_per_step = {bytes_per_step} and experts = {experts} on rank {self.exchange.rank}, and "
                f"something else on another rank: give all ranks the same"
            )
        self.check_copies(wanted)
        if reason := max(first for first, *_ in said):
            raise UnsupportedError(f"shards can't change ranks now: {NOT_NOW[reason]}")
        with self.exchange.together():
            try:
                self.migration.begin(wanted, bytes_per_step, along)
            except ValueError as error:
                raise ConfigError(str(error)) from None
            if self.migration.wanted is None:
                return False  # every shard is there already
            if bytes_per_step is None:
                self.migration.advance()
            elif self.rebalancing.after_forward not in self.after_forward:
                self.after_forward += (self.rebalancing.after_forward,)
        return True

    def check_copies(self, holders: Sequence[Sequence[int]]) -> None:
        """Raises: ConfigError where shards have copies and this configuration can't keep or read them."""
        why = no_copies(self.blueprint.config, self.blueprint) if any(len(ranks) > 1 for ranks in holders) else None
        if why is not None:
            raise ConfigError(f"holders = {tuple(holders)} has copies of shards: {why}", rule="copies-have-one-reader")

    def cancel_rebalance(self) -> None:
        """A move under way does not take place, and nothing changes. Between forwards, all ranks at the same point; no collective."""
        self.migration.cancel()

    def _said_of_a_move(self, holders: tuple[tuple[int, ...], ...], bytes_per_step: int | None) -> list[int]:
        """What all ranks compare: a reason of NOT_NOW, and what to do."""
        may_go = self.hold_margin is not None or any(part.waiting for part in self.counting)
        reason = 1 if self.local is not None else 2 if may_go else 3 if self.pages.parked.num_rows else 0
        flat = [x for ranks in holders for x in (len(ranks), *ranks)]
        return [reason, digest([torch.tensor(flat, dtype=torch.int64)]), bytes_per_step or 0]

    @contextmanager
    def announce_crops(self, *, rehearsal: bool = False) -> Iterator[None]:
        """Forwards inside may be taken back (assisted decoding, rehearsals): what would leave a window stays until a crop is noted.

        rehearsal: what their queries attended to stays counted when they are taken back. A crop may then take back tokens of several
            forwards, else, where something counts attention, of the last one only.
        """
        before, self.hold_margin, self.rehearsal = (self.hold_margin, self.rehearsal), self.hold_margin or 0, rehearsal
        try:
            yield
        finally:
            self.hold_margin, self.rehearsal = before

    def note_crop(self) -> None:
        """The host has taken back what it will of the forwards so far; the rest of them stays. Without an announcement it means nothing."""
        if self.hold_margin is not None:
            self.hold_margin = 0

    @eager
    def reserve(self, tokens: int) -> None:
        """Make room for every row to grow to `tokens` tokens, now: until then decode steps replace no tensor of the cache, which a captured
        step needs (step_graph.py). Bytes are allocated and reported at once. It ends when rows change (forks, crops, a new generation), on
        reset(), and with the first row that grows longer. Call it between forwards, on all ranks alike. Sync: waits for sizes.

        Raises: UnsupportedError where pages move to another pool by themselves; CapacityError beyond storage.capacity_tokens.
        """
        if not self.agreement.steady or not self.agreement.lens:
            raise UnsupportedError("reserve() before the first forward: it is not known yet how many rows there are; run the prompt first")
        if tokens < max(self.agreement.lens):
            raise UnsupportedError(f"reserve({tokens}): a row has {max(self.agreement.lens)} tokens already; give what rows may grow to")
        if self.pages.num_levels > 1:
            raise UnsupportedError(
                "reserve() with several pools (a raw window, or 'pools' of the block): pages move on to a pool whose size follows from "
                "what is stored; leave the raw window at 0 and the list empty"
            )
        if self.config.offload.enabled:
            raise UnsupportedError(
                f"reserve() with pikv.offload.device_gib = {self.config.offload.device_gib}: near memory has a fixed size, and pages that "
                f"go below change the tables; set device_gib to null"
            )
        if self.pages.plan.rebased:
            raise UnsupportedError("reserve() with bases that are fitted to each request (svd): their memory is replaced while they grow")
        self.pages.room.hold(tokens)

    def plain(self, local: LocalStep) -> PlainSteps | None:
        """What attends in the layers of a forward that is a plain decode step (plain.py), after begin_step; None: this one is not."""
        return self.plain_steps if self.plain_steps.serves(local) else None

    @eager
    def clear_column(self, name: str) -> None:
        """Zero the policy's number `name` of every page, in all pools of all layers that keep it. Between forwards; no collective."""
        if name not in self.page_columns:
            raise ValueError(f"no policy of this cache keeps {name!r} per page; kept are {self.page_columns}")
        for pool in self.pages.all_pools:
            if name in pool.counters:  # layers with a window keep none
                pool.counter(name).zero_()
