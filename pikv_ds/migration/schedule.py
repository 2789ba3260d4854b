"""When shards move by themselves ("storage.rebalance"): every so many forwards, if the fullest rank is too full. S shards, G ranks.

Every rank sees the same loads and counts the same forwards, so all decide alike without a message.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from pikv_ds.config.storage import RebalanceConfig
from pikv_ds.errors import MigrationError
from pikv_ds.exchange.exchange import Exchange
from pikv_ds.pages.layers import RankPages
from pikv_ds.placement.balance import balance
from pikv_ds.placement.copies import loads_of_homes, with_copies
from pikv_ds.placement.slots import peak_over_mean
from pikv_ds.step.step import Step

from .migration import Migration


class Rebalancing:
    """Looks at the loads after a forward and drives the moves. Owns the count of forwards; borrows the rest."""

    def __init__(self, config: RebalanceConfig | None, pages: RankPages, migration: Migration, exchange: Exchange) -> None:
        """config: None = a move begins only when the host says so."""
        self.config, self.pages, self.migration, self.exchange = config, pages, migration, exchange
        self.reads: Tensor | None = None
        """[S] f64 on the device: queries of this rank that have named each shard; None: none has chosen any."""
        self.forwards = 0
        self._warned = False

    def after_forward(self, step: Step) -> bool:
        """Begin a move, go on with it, or look whether one is due. Returns False: no entry has left the cache.

        A move is not committed while a crop is announced. Sync: reads the loads, every `every` forwards. Collectives: those of Migration.
        """
        self.forwards += 1
        migration = self.migration
        config = self.config
        if config is not None and migration.wanted is None and self.forwards % config.every == 0:
            holders = self.plan(config.threshold)
            if holders is not None:
                migration.begin(holders, config.bytes_per_step)
        if migration.wanted is not None and not (migration.whole and step.hold):
            try:
                migration.advance()
            except MigrationError as error:
                if not self._warned:
                    warnings.warn(f"pikv.storage.rebalance: {error}", stacklevel=2)
                self._warned = True
        return False

    def plan(self, threshold: float = 1.0) -> tuple[tuple[int, ...], ...] | None:
        """Holders that even out the bytes of the ranks; None: they are even enough. The same on all ranks. Sync: reads the loads.

        With replicas every rank also holds so many shards of other ranks, those that its queries have read most; one collective.
        """
        copies = 0 if self.config is None else self.config.replicas
        if not copies and not self.pages.map.copied:
            return planned(self.loads(), self.pages.map.of_ranks, threshold)
        return planned_copies(self.loads(), self._reads_of_all(), self.pages.map.holders, copies, threshold)

    def note_reads(self, named: Tensor) -> None:
        """named [n, S] bool: shards that this rank's queries read. Sync: none."""
        if self.config is not None and self.config.replicas:
            self.reads = named.new_zeros(named.shape[1], dtype=torch.float64) if self.reads is None else self.reads
            self.reads += named.sum(0)

    def _reads_of_all(self) -> Tensor:
        """[G, S] f64 on the host: entries that each rank's queries have read of each shard, up to a factor. One collective."""
        own = torch.zeros(self.pages.num_shards, dtype=torch.float64, device=self.pages.device) if self.reads is None else self.reads
        reads = self.exchange.all_gather(own, "what every rank reads of every shard").to("cpu")
        loads = self.loads()
        return torch.where(reads.sum() > 0, reads, torch.ones_like(reads)) * loads

    def loads(self) -> Tensor:
        """[S] f64 on the host: bytes of the entries that queries still see. Sync: reads the device."""
        each = [layer.nearest.fmt.record_bytes / layer.nearest.page_size for layer in self.pages.layers]
        return torch.tensor(each, dtype=torch.float64) @ self.pages.directory.load.to("cpu", torch.float64)


def planned_copies(
    loads: Tensor, reads: Tensor, present: tuple[tuple[int, ...], ...], copies: int, threshold: float
) -> tuple[tuple[int, ...], ...] | None:
    """Holders of every shard with `copies` on every rank; None: they are even enough, and as many. loads [S], reads [G, S]."""
    ranks = len(reads)
    own = loads_of_homes(reads.sum(0), present, ranks)
    held = sum(map(len, present)) - len(present)
    if held == copies * ranks and float(own.max()) <= threshold * max(float(own.mean()), torch.finfo(torch.float64).tiny):
        return None
    homes = [ranks_of[0] for ranks_of in present]
    of_ranks = [tuple(shard for shard, home in enumerate(homes) if home == rank) for rank in range(ranks)]
    if len({len(shards) for shards in of_ranks}) != 1:  # homes of copies are where reads are few: whole shards are dealt out anew
        of_ranks = [tuple(range(rank * len(homes) // ranks, (rank + 1) * len(homes) // ranks)) for rank in range(ranks)]
        homes = [rank for rank, shards in enumerate(of_ranks) for _ in shards]
    base = planned(loads, of_ranks, threshold)
    wanted = with_copies(homes if base is None else [rank for (rank,) in base], reads, copies)
    return None if wanted == present else wanted


def planned(loads: Tensor, of_ranks: list[tuple[int, ...]], threshold: float) -> tuple[tuple[int, ...], ...] | None:
    """Holders of every shard that even out loads [S]; None: the ranks are even enough, or there is nothing better."""
    present = torch.tensor(of_ranks).unsqueeze(0)
    now = float(peak_over_mean(loads.unsqueeze(0), present))
    if now <= threshold:
        return None
    slots = balance(loads.unsqueeze(0), len(of_ranks), present=present)
    if float(peak_over_mean(loads.unsqueeze(0), slots)) >= now:
        return None
    home = torch.empty(len(loads), dtype=torch.int64)
    home[slots[0]] = torch.arange(len(of_ranks)).unsqueeze(1).expand_as(slots[0])
    return tuple((rank,) for rank in home.tolist())
