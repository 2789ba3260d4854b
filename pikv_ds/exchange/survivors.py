"""After the death of a rank: the others find each other through the store of torch.distributed, and make a group of their own.

The store must outlive the rank that died. It lies in the process of rank 0 (env:// without a launcher), in the launcher (torchrun) or in a
file; when it is gone there is nobody to meet at, and all ranks have to start again.
"""

from __future__ import annotations

import time
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from pikv_ds.errors import PeerError, UnsupportedError

from .group_state import state_of

PAUSE_S = 0.05


def regroup(group: dist.ProcessGroup, *, wait_s: float = 60.0) -> dist.ProcessGroup:
    """A new group of the ranks of `group` that are left, in their order. Every survivor calls it, once a call of the cache has raised a
    PeerError on it.

    The first that has waited `wait_s` says who is in it, by one write that nobody can make twice: those that have come by then. All
    survivors get the same group, or, who came later, an error.

    Args:
        group: one that cannot be used any more. wait_s: seconds in which all survivors come, no less than 1.5 x timeout_s: so far apart
            they may hear of a death. It ends at once when all ranks of the group have come.

    Returns: a group with the backend of the default group; caches and attachments are made anew with it, prompts are run again.

    Raises: UnsupportedError for a group that still works. PeerError when the store is gone, no other rank is left to find, this rank came
    too late, or the new group could not be made. Sync: waits for the others, on the host.
    """
    if state_of(group).broken is None:
        raise UnsupportedError("this process group has not failed: regroup() is for what is left after a PeerError, on every survivor")
    ranks, own = dist.get_process_group_ranks(group), dist.get_rank()
    try:
        members = _members(dist.PrefixStore(f"pikv/survivors/{group.group_name}", _get_default_store()), ranks, own, wait_s)
    except (RuntimeError, dist.DistError) as error:
        raise PeerError(
            f"rank {own}: the store of torch.distributed does not answer, so survivors can't find each other. It died with the process "
            f"that held it (rank 0 without torchrun): start all ranks again, next time under torchrun or with a FileStore. Cause: {error}"
        ) from error
    if own not in members:
        raise PeerError(f"rank {own}: ranks {members} went on without this one, which came more than wait_s = {wait_s:g} s after the first")
    try:
        made = dist.new_group(members, timeout=timedelta(seconds=wait_s), use_local_synchronization=True)
        dist.barrier(made)
    except (RuntimeError, dist.DistError) as error:
        raise PeerError(f"rank {own}: the group of the survivors {members} could not be made: {error}") from error
    return made


def _members(store: dist.Store, ranks: list[int], own: int, wait_s: float) -> list[int]:
    """Who is in the new group, the same on all that ask. Raises: RuntimeError of torch's when the store is gone."""
    store.set(f"here {own}", "1")
    until, here = time.monotonic() + wait_s, [own]
    while time.monotonic() < until and len(here) < len(ranks) and not store.check(["members"]):
        time.sleep(PAUSE_S)
        here = [rank for rank in ranks if store.check([f"here {rank}"])]
    said = store.compare_set("members", "", ",".join(map(str, here)))
    return [int(rank) for rank in said.decode().split(",")]
