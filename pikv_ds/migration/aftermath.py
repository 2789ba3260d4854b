"""What became of a move that a death broke off: survivors ask each other, and all that are left hold one map."""

from __future__ import annotations

import torch
import torch.distributed as dist

from pikv_ds.errors import PeerError
from pikv_ds.exchange.exchange import Exchange

from .migration import Migration


def settle(migration: Migration, group: dist.ProcessGroup) -> bool:
    """End a move that broke off: where any survivor has committed it, those in doubt do too; else they take it back.

    Args: migration: of the cache of before. group: of the survivors (exchange/survivors.py); all of them call it.

    Returns: whether the last move was committed. The entries of the rank that died are gone either way: the cache can be looked at, its
    group can't be used. Raises: PeerError when a survivor does not answer, or the survivors hold different maps, which they never may.
    """
    exchange = Exchange(group, 60.0, migration.pages.device)
    committed, started = migration.progress.committed, migration.progress.started
    row = torch.tensor([committed, started, int(migration.in_doubt is not None)], dtype=torch.int64, device=migration.pages.device)
    said = exchange.all_gather(row, "what became of a move").tolist()
    most = max(of_rank[0] for of_rank in said)
    if migration.in_doubt is not None:
        migration.resolve(committed=most > committed)
    migration.cancel()
    holders = torch.tensor([rank for ranks in migration.pages.map.holders for rank in (*ranks, -1)], dtype=torch.int64)
    own = torch.cat([torch.tensor([len(holders)]), holders]).to(migration.pages.device)
    lengths = exchange.all_gather(own[:1].contiguous(), "how long the maps of survivors are")
    alike = bool((lengths == lengths[0]).all()) and bool((exchange.all_gather(own, "the maps of survivors") == own).all())
    if not alike:
        raise PeerError(f"the survivors hold different maps; this one {migration.pages.map.holders}. Drop the cache and start again")
    return started > 0 and most == max(of_rank[1] for of_rank in said)
