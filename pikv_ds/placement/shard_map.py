"""ShardMap: which ranks hold which shard, and where a shard lies in its rank's memory. S shards, G ranks, L shards of one rank."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from pikv_ds.errors import ConfigError
from pikv_ds.modes import eager


class ShardMap:
    """Which ranks hold which shard: equal on all ranks but for `rank`. Every rank holds as many shards, copies among them.

    A rank keeps its shards in ascending order, so that sums over them do not depend on the map; what ranks send is brought into the order
    of shards before it is added up or compared (`in_shard_order`, `in_rank_order`).

    Args: holders: per shard the ranks that hold it, first its home. Further ranks hold a copy: entries are appended on all of them, and a
        query reads the shard on one (`reader`).
    """

    def __init__(self, holders: tuple[tuple[int, ...], ...], rank: int, num_ranks: int, device: torch.device) -> None:
        self.holders, self.rank, self.num_ranks, self.device = holders, rank, num_ranks, device
        self.of_ranks = [tuple(shard for shard, ranks in enumerate(holders) if each in ranks) for each in range(num_ranks)]
        if any(not ranks or len(set(ranks)) != len(ranks) or not set(ranks) <= set(range(num_ranks)) for ranks in holders):
            raise ValueError(f"holders = {holders}: per shard the different ranks that hold it, of 0 to {num_ranks - 1}, first its home")
        if len({len(shards) for shards in self.of_ranks}) != 1:
            raise ValueError(f"holders = {holders}: every rank of {num_ranks} holds as many shards, here {[len(x) for x in self.of_ranks]}")
        self.local = self.of_ranks[rank]
        self.num_shards, self.num_local = len(holders), len(self.local)
        self.copied = any(len(ranks) > 1 for ranks in holders)
        homes = [ranks[0] for ranks in holders]
        first = [homes.index(each) if each in homes else self.num_shards + each for each in range(num_ranks)]
        self._ranks = sorted(range(num_ranks), key=first.__getitem__)  # by the first shard that they are the home of
        self.contiguous = [shard for shards in self.of_ranks for shard in shards] == list(range(self.num_shards))

    @classmethod
    def blocks(cls, num_shards: int, rank: int, num_ranks: int, device: torch.device) -> ShardMap:
        """Neighbouring shards on a rank, as AutoEP and Megatron lay out experts.

        Raises: ConfigError when the shards can't be dealt out evenly.
        """
        if num_shards % num_ranks:
            raise ConfigError(
                f"pikv.storage.num_shards = {num_shards} with {num_ranks} ranks: legal is a multiple of {num_ranks}, so that every rank "
                f"holds as many shards; or null, which is one per rank"
            )
        return cls(tuple((shard * num_ranks // num_shards,) for shard in range(num_shards)), rank, num_ranks, device)

    @property
    def rank_order(self) -> list[int]:
        """The ranks by the first shards that they are the home of: the order in which their partials are added up."""
        return self._ranks

    def home(self, shard: int) -> int:
        """The rank that a shard's entries are counted for."""
        return self.holders[shard][0]

    @cached_property
    @eager
    def shards(self) -> Tensor:
        """[L] int64, the global shard of each local one."""
        return torch.tensor(self.local, device=self.device)

    @cached_property
    @eager
    def index(self) -> Tensor:
        """[S] int64, the local index of each shard; -1 = on another rank."""
        index = torch.full((self.num_shards,), -1, dtype=torch.int64)
        index[list(self.local)] = torch.arange(self.num_local)
        return index.to(self.device)

    @cached_property
    @eager
    def by_rank(self) -> Tensor:
        """[S] int64, all shards in the order in which a gather brings them: those of rank 0, of rank 1, ..."""
        return torch.tensor([shard for shards in self.of_ranks for shard in shards], device=self.device)

    @cached_property
    @eager
    def _order(self) -> Tensor:
        """[S] int64, where in `by_rank` a shard's home has it."""
        at = {(rank, shard): i for i, (rank, shard) in enumerate((rank, s) for rank, own in enumerate(self.of_ranks) for s in own)}
        return torch.tensor([at[self.home(shard), shard] for shard in range(self.num_shards)], device=self.device)

    @cached_property
    @eager
    def _rank_order(self) -> Tensor:
        return torch.tensor(self._ranks, device=self.device)

    # ---- copies ----------------------------------------------------------------------------------------------------------------

    def reader(self, shard: int, source: int | None) -> int:
        """The one rank that reads a shard for queries of rank `source`: that rank itself if it holds the shard, else the shard's home.
        None: queries that all ranks have alike, read by the home."""
        return source if source in self.holders[shard] else self.home(shard)

    @cached_property
    @eager
    def readers(self) -> Tensor:
        """[G, S] int64, `reader` of every shard for queries of every rank."""
        return torch.tensor([[self.reader(s, g) for s in range(self.num_shards)] for g in range(self.num_ranks)], device=self.device)

    @cached_property
    @eager
    def reads_here(self) -> Tensor:
        """[G + 1, L] bool: local shards that this rank reads for queries of every rank; last, for queries that all ranks have alike."""
        sources = (*range(self.num_ranks), None)
        return torch.tensor([[self.reader(s, g) == self.rank for s in self.local] for g in sources], device=self.device)

    @cached_property
    @eager
    def held(self) -> Tensor:
        """[G, S] bool: which ranks hold which shards."""
        return torch.tensor([[g in ranks for ranks in self.holders] for g in range(self.num_ranks)], device=self.device)

    def serves(self, rank: int, source: int) -> bool:
        """Whether `rank` reads anything for queries of rank `source`."""
        return any(self.reader(shard, source) == rank for shard in self.of_ranks[rank])

    # ---- the step: no sync -----------------------------------------------------------------------------------------------------

    def is_local(self, shard: Tensor) -> Tensor:
        """Whether this rank holds the shards [N] int64."""
        return self.index[shard] >= 0

    def in_shard_order(self, x: Tensor, dim: int, heads: int = 1) -> Tensor:
        """What a gather brought, shards (times heads) of rank 0, 1, ... along `dim` -> ascending shards."""
        return x if self.contiguous else _select(x, self._order, dim, heads)

    def in_rank_order(self, x: Tensor) -> Tensor:
        """Partials [G, ...] of ranks -> by the first shard of each: sums over them are the same whoever holds which shards."""
        return x if self._ranks == list(range(self.num_ranks)) else x.index_select(0, self._rank_order)

    def own(self, x: Tensor, dim: int, heads: int = 1) -> Tensor:
        """Of all shards (times heads) along `dim` this rank's."""
        if self.contiguous:
            return x.narrow(dim, self.local[0] * heads, self.num_local * heads)
        return _select(x, self.shards, dim, heads)


def _select(x: Tensor, shards: Tensor, dim: int, heads: int) -> Tensor:
    dim %= x.dim()
    if heads == 1:
        return x.index_select(dim, shards.to(x.device))
    return x.unflatten(dim, (-1, heads)).index_select(dim, shards.to(x.device)).flatten(dim, dim + 1)
